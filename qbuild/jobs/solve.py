"""Weights and statistics of layers → codes."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch

from qbuild.actions import solve
from qbuild.actions.solve import KIND, Item, Made, Task
from qbuild.cache import ActionCache, ActionResult
from qbuild.calibration.families import layer_prefix
from qbuild.calibration.statistics import Statistics
from qbuild.calibration.triangle import square
from qbuild.digest import Digest
from qbuild.heap import settle, trim
from qbuild.jobs import Emit, needed
from qbuild.jobs.tensors import Tensors
from qbuild.overlap import Ahead, Behind
from qbuild.quant import layer
from qbuild.quant.codes import Solved
from qbuild.quant.families import groups
from qbuild.quant.grid import Grid
from qbuild.quant.scaling import Seen
from qbuild.store import Store

__all__ = ["quantized", "run"]

_Loaded = tuple[Statistics, dict[str, torch.Tensor]]  # the layer's tensors as they are stored


def run(task: Task, store: Store, emit: Emit) -> Made:
    """Solve every item in turn, one layer in memory. Each result is cached at once: while a device computes, beside
    the next, whose weights and statistics are read before it."""
    torch.set_num_threads(task.threads)
    settle(top=8 << 20)
    cache, began = ActionCache(store), time.monotonic()
    made: dict[str, Digest] = {}
    prefix = layer_prefix(task.checkpoint.config, task.checkpoint.tensors)
    device = task.items[0].params.device
    with Tensors(task.checkpoint) as read:

        def load(item: Item) -> _Loaded:
            return Statistics.from_bytes(needed(store, item.statistics)), {name: read(name) for name in item.tensors}

        def save(item: Item, data: bytes) -> None:
            made[item.id] = store.put_bytes(data)
            cache.put(item.key, ActionResult(KIND, (made[item.id],)))
            number, times = len(made), {"read": 0.0, "hash": time.monotonic() - began}
            current = f"layer {item.params.layer}"
            emit({"event": "progress", "tensors": number, "bytes": number, "current": current, "seconds": times})

        with Ahead(load, device) as loading, Behind(device) as saving:
            for number, item in enumerate(task.items, start=1):
                loaded = loading(item)
                loading.expect(task.items[number : number + 1])
                data = _solve(item, task, f"{prefix}{item.params.layer}.", *loaded).to_bytes()
                saving.do(partial(save, item, data))
                del loaded, data  # before the next is read
                trim()
    return Made(made, read.reader.bytes_read)


def _solve(item: Item, task: Task, prefix: str, statistics: Statistics, stored: Mapping[str, torch.Tensor]) -> Solved:
    wanted, device = item.params, torch.device(item.params.device)
    tensors = {name: tensor.to(device) for name, tensor in stored.items()}
    held: dict[str, Seen] = {}

    def seen(linear: str) -> Seen | None:
        """By input: linears that share one share its tensors."""
        if linear in statistics.unreached:
            return None
        found = statistics.of(linear)
        if found.name not in held:
            if found.upper is None:
                raise RuntimeError(f"BUG: the statistics of {linear} hold no Gram matrix")
            packed, mean_abs = (torch.from_numpy(part).to(device) for part in (found.upper, found.mean_abs))
            held[found.name] = Seen(square(packed, len(mean_abs)), mean_abs, found.count)
        return held[found.name]

    return quantized(wanted, task.checkpoint.config, prefix, tensors, seen)


def quantized(
    wanted: solve.Params,
    config: Mapping[str, Any],
    prefix: str,
    tensors: Mapping[str, torch.Tensor],
    seen: Callable[[str], Seen | None],
) -> Solved:
    """A layer, of the ``tensors`` below ``prefix``, as an action's parameters ask for it."""
    grid = Grid(wanted.bits, wanted.group_size, wanted.symmetric)
    params = layer.Params(grid, wanted.scaled, wanted.rounding, wanted.order, wanted.damping)
    solved: Solved = layer.solve(tensors, seen, groups(config, prefix, tensors, wanted.linears), params)
    return solved
