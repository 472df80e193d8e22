"""The pass back through the model: what errors of its weights cost."""

from __future__ import annotations

import shutil
import time

import numpy as np

from qbuild.actions.sensitivity import KIND, Task
from qbuild.cache import ActionCache, ActionResult
from qbuild.calibration import tokens
from qbuild.calibration.reverse import Pass, measure
from qbuild.digest import Digest
from qbuild.jobs import Emit, needed
from qbuild.jobs.tensors import Tensors
from qbuild.store import Store

__all__ = ["run"]


def run(task: Task, store: Store, emit: Emit) -> Digest:
    began = time.monotonic()

    def progress(done: int, current: str) -> None:
        times = {"read": 0.0, "hash": time.monotonic() - began}
        emit({"event": "progress", "tensors": done, "bytes": done, "current": current, "seconds": times})

    windows = _spread(tokens.Packed.from_bytes(needed(store, task.tokens)).ids, task.params.windows)
    shapes = {name: tensor.shape for name, tensor in task.checkpoint.tensors.items()}
    config, params = task.checkpoint.config, task.params
    with Tensors(task.checkpoint) as read:
        work = Pass(config, shapes, windows, task.states, params.dtype, params.device, task.threads)
        found = measure(work, read, progress)
    made = store.put_bytes(found.to_bytes())
    shutil.rmtree(task.states, ignore_errors=True)
    ActionCache(store).put(task.key, ActionResult(KIND, (made,), inputs=(task.tokens,)))
    return made


def _spread(windows: np.ndarray, most: int) -> np.ndarray:
    """At most so many windows, as far apart as can be: neighbours are parts of one document."""
    count = min(most, len(windows))
    return windows[np.arange(count) * len(windows) // count]
