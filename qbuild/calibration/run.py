"""The calibration run: hidden states go through the model a layer at a time, and every layer's statistics are saved."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from qbuild.calibration.collect import Collector, Watch
from qbuild.calibration.forward import Layer, Streamed
from qbuild.calibration.shapes import KEPT, TOGETHER_CUDA, linears
from qbuild.calibration.states import States
from qbuild.calibration.statistics import Statistics
from qbuild.calibration.weights import Read
from qbuild.heap import settle, trim
from qbuild.overlap import Ahead, Behind

__all__ = [
    "Pass",
    "Save",
    "calibrate",
    "collector_of",
    "started",
    "states_of",
    "through",
    "watched",
]

Save = Callable[[int, bytearray], None]  # layer, Statistics.to_bytes()


@dataclass(frozen=True)
class Pass:
    """One calibration pass over the layers ``first`` to ``last``, both included.

    ``tensors`` are the shapes of the checkpoint's tensors by name, ``tokens`` int32 [windows, length]. ``states`` is a
    folder of this pass's own, for the hidden states after the last finished layers; with ``spill`` they are never
    whole in memory. Neither it nor ``threads`` nor where a pass was cut off changes a byte of the statistics.
    """

    config: Mapping[str, Any]
    tensors: Mapping[str, tuple[int, ...]]
    tokens: np.ndarray
    first: int
    last: int
    states: Path
    gram: bool = True
    dtype: str = "float32"
    device: str = "cpu"
    spill: bool = False
    threads: int = 1


def calibrate(task: Pass, read: Read, save: Save) -> None:
    """Run a pass, calling ``save`` after every layer.

    It goes on from the newest hidden states in the folder that are not beyond ``first``, else from the embedding;
    layers before ``first`` are run without being measured. A killed pass loses the layer it was in, or the few seconds
    of layers since the states were written last. While a device computes, the next layer is read and the last one
    saved. Raises InputError for weights or activations that cannot be used, and what ``save`` raises.
    """
    with (
        Ahead(read, task.device) as reading,
        Behind(task.device) as saving,
        started(task, reading) as (model, pool),
        states_of(task, model) as states,
    ):
        model.prepare(task.tokens.shape[1])
        for index in range(states.ready, task.last + 1):
            if index < task.last:
                reading.expect(model.layer_tensors(index + 1))
            if index < task.first:
                with model.layer(index) as layer:
                    states.advance(partial(through, pool, layer))
            else:
                collector = _measured(task, model, index, states, pool)
                saving.wait()  # two layers' statistics are enough to hold
                made = collector.statistics()
                saving.do(partial(_save, save, made))
                del collector, made
                trim()  # products in bfloat16 leave a MB with every layer
            if states.due(last=index == task.last):
                saving.wait()  # until they are safe a new process needs the states before them
                states.keep()


def _save(save: Save, made: Statistics) -> None:
    save(made.layer, made.to_bytes())


@contextmanager
def started(task: Pass, read: Read) -> Iterator[tuple[Streamed, Executor]]:
    """The model of a pass, and the threads that its windows are spread over."""
    torch.set_num_threads(1)  # how a product is split over threads changes its last bits: windows are split instead
    settle(top=KEPT)  # what a window frees is for the next: to fault it in again was a tenth of a pass
    model = Streamed(task.config, task.tensors, read, device=task.device, dtype=task.dtype)
    with ThreadPoolExecutor(task.threads if task.device == "cpu" else 1) as pool:
        yield model, pool


def _together(task: Pass) -> int:
    """Windows in a layer at a time: one a thread."""
    return task.threads if task.device == "cpu" else TOGETHER_CUDA


def states_of(task: Pass, model: Streamed, part: str = "") -> States:
    """The hidden states of a pass; ``part``: of one model of several."""
    folder = task.states / part
    return States(folder, task.tokens, model, task.first, together=_together(task), spill=task.spill)


def collector_of(task: Pass, model: Streamed, index: int, length: int = 0) -> Collector:
    """For the linears of a layer that is in memory."""
    wanted = [linear.name for linear in linears(model.prefix, index, task.tensors)]
    return Collector(index, model.parameters(index), wanted, task.gram, length)


def through(pool: Executor, layer: Layer, windows: list[torch.Tensor]) -> list[torch.Tensor]:
    return list(pool.map(layer, windows))


def watched(
    pool: Executor, layer: Layer, collector: Collector, windows: list[torch.Tensor]
) -> tuple[list[Watch], list[torch.Tensor]]:
    """Windows through a layer, and what was noted of each."""
    watches = [collector.watch() for _ in windows]

    def one(watch: Watch, window: torch.Tensor) -> torch.Tensor:
        with watch:
            return layer(window)

    return watches, list(pool.map(one, watches, windows))


def _measured(task: Pass, model: Streamed, index: int, states: States, pool: Executor) -> Collector:
    """What was summed of a layer, which is out of memory again."""
    with model.layer(index) as layer:
        collector = collector_of(task, model, index)

        def run(windows: list[torch.Tensor]) -> list[torch.Tensor]:
            watches, made = watched(pool, layer, collector, windows)
            collector.add(watches, pool)
            return made

        states.advance(run)
    return collector
