"""Weights and statistics of layers → codes."""

from __future__ import annotations

import time

import torch

from qbuild.actions.solve import KIND, Item, Made, Task
from qbuild.cache import ActionCache, ActionResult
from qbuild.calibration.families import layer_prefix
from qbuild.calibration.statistics import Statistics
from qbuild.digest import Digest
from qbuild.jobs import Emit, needed
from qbuild.jobs.tensors import Tensors
from qbuild.quant.codes import Solved
from qbuild.quant.families import groups
from qbuild.quant.grid import Grid
from qbuild.quant.layer import Params, solve
from qbuild.quant.scaling import Seen
from qbuild.store import Store

__all__ = ["run"]


def run(task: Task, store: Store, emit: Emit) -> Made:
    """Solve every item in turn, one layer in memory. Each result is cached at once."""
    torch.set_num_threads(task.threads)
    cache, began = ActionCache(store), time.monotonic()
    made: dict[str, Digest] = {}
    prefix = layer_prefix(task.checkpoint.config, task.checkpoint.tensors)
    with Tensors(task.checkpoint) as read:
        for number, item in enumerate(task.items, start=1):
            start = time.monotonic()
            statistics = Statistics.from_bytes(needed(store, item.statistics))
            solved = _solve(item, task, f"{prefix}{item.params.layer}.", read, statistics)
            made[item.id] = store.put_bytes(solved.to_bytes())
            cache.put(item.key, ActionResult(KIND, (made[item.id],), time.monotonic() - start))
            times = {"read": 0.0, "hash": time.monotonic() - began}
            current = f"layer {item.params.layer}"
            emit({"event": "progress", "tensors": number, "bytes": number, "current": current, "seconds": times})
    return Made(made, read.reader.bytes_read)


def _solve(item: Item, task: Task, prefix: str, read: Tensors, statistics: Statistics) -> Solved:
    wanted, device = item.params, torch.device(item.params.device)
    tensors = {name: read(name).to(device) for name in item.tensors}
    held: dict[str, Seen] = {}

    def seen(linear: str) -> Seen | None:
        """By input: linears that share one share its tensors."""
        if linear in statistics.unreached:
            return None
        found = statistics.of(linear)
        if found.name not in held:
            if found.gram is None:
                raise RuntimeError(f"BUG: the statistics of {linear} hold no Gram matrix")
            values = torch.from_numpy(found.gram).to(device), torch.from_numpy(found.mean_abs).to(device)
            held[found.name] = Seen(*values, found.count)
        return held[found.name]

    found = groups(task.checkpoint.config, prefix, tensors, wanted.linears)
    grid = Grid(wanted.bits, wanted.group_size, wanted.symmetric)
    params = Params(grid, wanted.scaled, wanted.rounding, wanted.order, wanted.damping)
    solved: Solved = solve(tensors, seen, found, params)
    return solved
