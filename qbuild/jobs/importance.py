"""Statistics of every layer → an importance matrix in llama.cpp's format."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping

import numpy as np

from qbuild import imatrix
from qbuild.actions.importance import KIND, Task
from qbuild.arch.convert import TensorSpec
from qbuild.cache import ActionCache, ActionResult
from qbuild.calibration.statistics import Input, Statistics
from qbuild.calibration.tokens import Packed
from qbuild.digest import Digest
from qbuild.jobs import Emit, needed
from qbuild.store import Store

__all__ = ["entries", "run"]


def run(task: Task, store: Store, _emit: Emit) -> Digest:
    began = time.monotonic()
    inputs: dict[str, Input] = {}
    for digest in task.statistics:
        for found in Statistics.from_bytes(needed(store, digest), grams=False).inputs:
            inputs |= dict.fromkeys(found.shared, found)
    windows, length = Packed.from_bytes(needed(store, task.tokens)).ids.shape
    made = store.put_bytes(imatrix.dump(entries(task.specs, inputs), [task.params.dataset], windows, length))
    result = ActionResult(KIND, (made,), time.monotonic() - began, inputs=task.statistics)
    ActionCache(store).put(task.key, result)
    return made


def entries(specs: Iterable[TensorSpec], inputs: Mapping[str, Input]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """GGUF tensors whose inputs were seen: sums of squares float32 [matrices, columns], rows seen float32 [matrices].

    ``inputs`` is by checkpoint name without .weight. An expert that no token reached has zeros and a count of 0.
    """
    found: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    for spec in specs:
        linears = _linears(spec)
        seen = [inputs.get(name) for name in linears]
        width = spec.shape[-1]
        if any(item is not None for item in seen):
            sums = [np.zeros(width, np.float32) if item is None else item.diagonal for item in seen]
            counts = np.array([0 if item is None else item.count for item in seen], np.float32)
            found[spec.name] = np.stack(sums), counts
    return found


def _linears(spec: TensorSpec) -> list[str]:
    """The linears of a tensor: one, or one per expert. Rows of one linear that were put together share its input."""
    sources = [piece.source.removesuffix(".weight") for piece in spec.pieces]
    if len(spec.shape) < 3:
        return sources[:1]
    if len(sources) == spec.shape[0]:
        return sources
    return [f"{sources[0]}[{expert}]" for expert in range(spec.shape[0])]
