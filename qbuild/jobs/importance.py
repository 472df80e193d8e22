"""Statistics of every layer → an importance matrix in llama.cpp's format."""

from __future__ import annotations

from qbuild import imatrix
from qbuild.actions.importance import KIND, Task
from qbuild.cache import ActionCache, ActionResult
from qbuild.calibration.imatrix import entries
from qbuild.calibration.statistics import Statistics
from qbuild.calibration.tokens import Packed
from qbuild.digest import Digest
from qbuild.jobs import Emit, needed
from qbuild.store import Store

__all__ = ["run"]


def run(task: Task, store: Store, _emit: Emit) -> Digest:
    layers = (Statistics.from_bytes(needed(store, digest), grams=False) for digest in task.statistics)
    windows, length = Packed.from_bytes(needed(store, task.tokens)).ids.shape
    made = store.put_bytes(imatrix.dump(entries(task.specs, layers), [task.params.dataset], windows, length))
    ActionCache(store).put(task.key, ActionResult(KIND, (made,)))
    return made
