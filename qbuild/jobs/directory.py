"""Solved layers and plain tensors → the files of a model directory."""

from __future__ import annotations

from qbuild.actions.directory import KIND, Made, Task
from qbuild.cache import ActionCache, ActionResult
from qbuild.checkpoint import Reader
from qbuild.heap import settle
from qbuild.jobs import Emit, needed
from qbuild.jobs.files import put
from qbuild.quant.codes import Solved
from qbuild.quant.contents import Contents
from qbuild.store import Store

__all__ = ["run"]


def run(task: Task, store: Store, emit: Emit) -> Made:
    settle()  # layers come and go

    def solved(layer: int) -> Solved:
        return Solved.from_bytes(needed(store, task.solved[layer]))

    with Reader(task.checkpoint.files) as reader:
        get = Contents(task.checkpoint, reader, task.scheme, solved)
        outputs = put(task.directory, task.copies, get, task.key, store, emit)
    ActionCache(store).put(task.key, ActionResult(KIND, outputs))
    return Made(outputs[0], reader.bytes_read, sum(file.size for file in task.directory.files))
