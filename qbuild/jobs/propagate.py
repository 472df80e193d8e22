"""Weights and tokens → codes, layer after layer, each made for what the quantized layers below it give."""

from __future__ import annotations

import shutil
import time

import torch

from qbuild.actions.propagate import KIND, Item, Task
from qbuild.actions.solve import Made
from qbuild.cache import ActionCache, ActionResult
from qbuild.calibration import tokens
from qbuild.calibration.collect import Collector
from qbuild.calibration.families import layer_prefix
from qbuild.calibration.run import Pass
from qbuild.calibration.statistics import notices
from qbuild.digest import Digest
from qbuild.jobs import Emit, needed
from qbuild.jobs.solve import quantized
from qbuild.jobs.tensors import Tensors
from qbuild.quant.codes import Solved
from qbuild.quant.propagation import Quantized, propagate, seen
from qbuild.quant.scaling import Seen
from qbuild.store import Store

__all__ = ["run"]


def run(task: Task, store: Store, emit: Emit) -> Made:
    """Each layer is stored and cached before the next begins: a killed worker loses the one it was in."""
    windows = tokens.Packed.from_bytes(needed(store, task.tokens)).ids
    with Tensors(task.checkpoint) as read:
        chain = _Chain(task, store, emit, read)
        missing = [number for number, item in enumerate(task.items) if item.made is None]
        params = task.items[0].params
        propagate(
            Pass(
                config=task.checkpoint.config,
                tensors={name: tensor.shape for name, tensor in task.checkpoint.tensors.items()},
                tokens=windows,
                first=missing[0],
                last=missing[-1],
                states=task.states,
                dtype=params.dtype,
                device=params.rounding.device,
                spill=task.spill,
                threads=task.threads,
            ),
            read,
            missing,
            chain.known,
            chain.solve,
        )
    shutil.rmtree(task.states, ignore_errors=True)
    return Made(chain.outputs, read.reader.bytes_read)


class _Chain:
    def __init__(self, task: Task, store: Store, emit: Emit, read: Tensors) -> None:
        self.task, self.store, self.emit, self.read = task, store, emit, read
        self.cache = ActionCache(store)
        self.prefix = layer_prefix(task.checkpoint.config, task.checkpoint.tensors)
        self.outputs: dict[str, Digest] = {}
        self.began = time.monotonic()

    def known(self, layer: int) -> Quantized:
        made = self.task.items[layer].made
        if made is None:
            raise RuntimeError(f"BUG: layer {layer} is to be made and is asked for")
        return _replacing(Solved.from_bytes(needed(self.store, made)))

    def solve(self, layer: int, collector: Collector) -> Quantized:
        item = self.task.items[layer]
        torch.set_num_threads(self.task.threads)
        solved = self._solved(item, collector)
        torch.set_num_threads(1)
        made = self.outputs[item.id] = self.store.put_bytes(solved.to_bytes())
        self.cache.put(item.key, ActionResult(KIND, (made,), inputs=(self.task.tokens,)))
        times = {"read": 0.0, "hash": time.monotonic() - self.began}
        event = {"event": "progress", "tensors": layer + 1, "bytes": layer + 1, "current": f"layer {layer}"}
        self.emit(event | {"seconds": times})
        return _replacing(solved)

    def _solved(self, item: Item, collector: Collector) -> Solved:
        wanted = item.params.rounding
        unreached, measured = collector.unreached(), list(collector.measured())
        for notice in notices(wanted.layer, measured, unreached):
            self.emit({"event": "message", "level": "warning", "text": notice})
        found: dict[str, Seen] = {}
        for one in measured:
            found |= dict.fromkeys(one.shared, seen(one))
        device = torch.device(wanted.device)
        tensors = {name: self.read(name).to(device) for name in item.tensors}
        prefix = f"{self.prefix}{wanted.layer}."
        return quantized(wanted, self.task.checkpoint.config, prefix, tensors, lambda name: found.get(name))


def _replacing(solved: Solved) -> Quantized:
    weights = {f"{name}.weight": codes.dequantize() for name, codes in solved.codes.items()}
    return weights | dict(solved.tensors)
