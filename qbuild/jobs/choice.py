"""Damages → the types of a file's tensors."""

from __future__ import annotations

import json

from qbuild import fit, imatrix
from qbuild.actions.choice import KIND, Params, Task
from qbuild.actions.metadata import unpack
from qbuild.arch.metadata import quantized_kvs
from qbuild.cache import ActionCache, ActionResult
from qbuild.digest import Digest
from qbuild.jobs import Emit, content, needed
from qbuild.store import Store

__all__ = ["run"]


def run(task: Task, store: Store, _emit: Emit) -> Digest:
    kvs = unpack(needed(store, task.metadata))
    called = task.params.imatrix or ""
    matrix = imatrix.parse(called, content(store, task.matrix)) if task.matrix else None
    noted = None if matrix is None else imatrix.noted(matrix, called)
    header = sum(len(kv.raw) for kv in quantized_kvs(kvs, 0, noted))
    found = fit.fitted(_tensors(task.params, task, store), header, task.params.max_bytes, f"targets.{task.target}")
    made = store.put_bytes(json.dumps(found, separators=(",", ":")).encode())
    result = ActionResult(KIND, (made,), inputs=tuple(d for _, _, d in task.damages))
    ActionCache(store).put(task.key, result)
    return made


def _tensors(params: Params, task: Task, store: Store) -> list[fit.Tensor]:
    damages = {(name, type_): float(needed(store, digest)) for name, type_, digest in task.damages}
    return [
        fit.Tensor(name, shape, {type_: damages.get((name, type_), 0.0) for type_ in types})
        for name, shape, types in params.tensors
    ]
