"""Error propagation: a layer is quantized for the inputs that the quantized layers below it give, and toward what the
source gives in its place, so that it makes good a part of what they lost.

With X the inputs of a linear in the quantized model and X' those in the source, ‖X Ŵᵀ − X' Wᵀ‖² has its least at
Ŵᵀ = Wᵀ + (XᵀX)⁻¹ Xᵀ(X' − X) Wᵀ; weights on the way there are rounded, for the Gram matrix of X. Sources: GPTQ runs
layers on quantized inputs (Frantar et al. 2022, arXiv:2210.17323), the cross term is asymmetric calibration (Li et al.
2025, arXiv:2504.02692).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from concurrent.futures import Executor
from functools import partial

import torch

from qbuild.calibration.collect import Collector, Measured
from qbuild.calibration.forward import Streamed
from qbuild.calibration.run import Pass, collector_of, started, states_of, through, watched
from qbuild.calibration.states import States
from qbuild.calibration.triangle import mirror
from qbuild.calibration.weights import Read
from qbuild.quant.scaling import Seen

__all__ = ["Quantized", "propagate", "seen"]

Quantized = Mapping[str, torch.Tensor]  # what a quantized layer has in place of the source's tensors, by their names


def propagate(
    task: Pass,
    read: Read,
    wanted: Collection[int],
    known: Callable[[int], Quantized],
    solve: Callable[[int, Collector], Quantized],
) -> None:
    """Quantize the layers ``wanted`` from the first to the last one, ``task.first`` to ``task.last``.

    ``solve`` makes a layer of what was measured in it, and leaves it where ``known`` finds it again: another process
    goes on from the newest hidden states, and from what is known. The states of both models are in ``task.states``.
    """
    replaced: dict[str, torch.Tensor] = {}

    def reading(name: str) -> torch.Tensor:
        return replaced[name] if name in replaced else read(name)

    with (
        started(task, reading) as (model, pool),
        states_of(task, model, "source") as source,
        states_of(task, model, "quantized") as own,
    ):
        model.prepare(task.tokens.shape[1])
        for index in range(min(source.ready, own.ready), task.last + 1):
            made: Quantized | None = None
            if index in wanted:
                made = solve(index, _compared(task, model, index, (source, own), pool))
            elif source.ready == index:
                _advance(model, index, source, pool)
            if own.ready == index and index < task.last:
                replaced |= known(index) if made is None else made
                _advance(model, index, own, pool)
                replaced.clear()
            for states in (source, own):
                if states.due(last=index == task.last):
                    states.keep()


def _advance(model: Streamed, index: int, states: States, pool: Executor) -> None:
    with model.layer(index) as layer:
        states.advance(partial(through, pool, layer))


def _compared(task: Pass, model: Streamed, index: int, both: tuple[States, States], pool: Executor) -> Collector:
    """What a layer's linears read in the quantized model, and how far that is from what they read in the source."""
    source, own = both
    blocks = own.blocks()
    with model.layer(index) as layer:
        collector = collector_of(task, model, index, length=task.tokens.shape[1])

        def run(windows: list[torch.Tensor]) -> list[torch.Tensor]:
            beside, made = watched(pool, layer, collector, windows)
            watches, _ = watched(pool, layer, collector, next(blocks))
            collector.add(watches, pool, beside)
            return made

        source.advance(run)
    return collector


def seen(found: Measured) -> Seen:
    """What rounding needs of an input that was measured here; its Gram matrix is made whole in place."""
    gram = found.gram
    if gram is None:
        raise RuntimeError(f"BUG: {found.name} was measured without a Gram matrix")
    return Seen(mirror(gram), found.mean_abs, found.count, found.drift)
