"""The forward pass that every calibrated target rests on: layer by layer, each layer's statistics stored at once."""

from __future__ import annotations

import shutil
import time

from qbuild.actions.statistics import KIND, Made, Task
from qbuild.cache import ActionCache, ActionResult
from qbuild.calibration import tokens
from qbuild.calibration.run import Pass, calibrate
from qbuild.calibration.statistics import Statistics, notices
from qbuild.jobs import Emit, needed
from qbuild.jobs.tensors import Tensors
from qbuild.store import Store

__all__ = ["run"]


def run(task: Task, store: Store, emit: Emit) -> Made:
    cache, made = ActionCache(store), {}
    windows = tokens.Packed.from_bytes(needed(store, task.tokens)).ids
    began = time.monotonic()
    with Tensors(task.checkpoint) as read:

        def save(layer: int, data: bytearray) -> None:
            kept = Statistics.from_bytes(data, grams=False)
            for notice in notices(layer, kept.inputs, kept.unreached):
                emit({"event": "message", "level": "warning", "text": notice})
            made[layer] = store.put_bytes(data)
            cache.put(task.keys[layer], ActionResult(KIND, (made[layer],), inputs=(task.tokens,)))
            progress(layer + 1, f"layer {layer}")

        def progress(done: int, current: str) -> None:
            times = {"read": 0.0, "hash": time.monotonic() - began}
            emit({"event": "progress", "tensors": done, "bytes": done, "current": current, "seconds": times})

        calibrate(
            Pass(
                config=task.checkpoint.config,
                tensors={name: tensor.shape for name, tensor in task.checkpoint.tensors.items()},
                tokens=windows,
                first=min(task.wanted),
                last=max(task.wanted),
                states=task.states,
                gram=task.params.detail == "gram",
                dtype=task.params.dtype,
                device=task.params.device,
                spill=task.spill,
                threads=task.threads,
            ),
            read,
            save,
        )
    shutil.rmtree(task.states, ignore_errors=True)
    return Made(made, read.reader.bytes_read)
