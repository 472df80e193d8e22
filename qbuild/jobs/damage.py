"""Tensors, each in several types, against their source: what each type costs the model."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np

from qbuild import imatrix
from qbuild.actions import damage, tensor
from qbuild.actions.damage import KIND, Item, Task, Want
from qbuild.actions.stream import Piece
from qbuild.cache import ActionCache, ActionResult
from qbuild.calibration.curvature import Curvature
from qbuild.checkpoint import Reader
from qbuild.digest import Digest, Hasher
from qbuild.errors import InputError
from qbuild.inputs import InputFile, changed
from qbuild.jobs import Emit, content, needed
from qbuild.store import Store

__all__ = ["run"]

Losses = list[np.ndarray]
Matrices = Mapping[InputFile | Digest, imatrix.Imatrix]


def run(task: Task, store: Store, emit: Emit) -> dict[str, Digest]:
    """Digests of the damages by action; a tensor's are cached as soon as all of them are known."""
    cache, began, done = ActionCache(store), time.monotonic(), 0
    made: dict[str, Digest] = {}
    curvature = Curvature.from_bytes(needed(store, task.curvature))
    given = {want.imatrix for item in task.items for want in item.wants if want.imatrix is not None}
    matrices = {one: imatrix.parse(_name(one), content(store, one)) for one in given}
    with Reader(task.files) as reader, ThreadPoolExecutor(task.threads) as pool:
        for number, item in enumerate(task.items, start=1):
            found = _measured(item, task, curvature, matrices, reader, pool)
            digests = {w.id: store.put_bytes(repr(value).encode()) for w, value in zip(item.wants, found, strict=True)}
            results = [ActionResult(KIND, (digests[w.id],), inputs=(task.curvature,)) for w in item.wants]
            cache.put_many(zip([w.key for w in item.wants], results, strict=True))
            made |= digests
            done += sum(piece.nbytes for piece in item.pieces)
            times = {"read": 0.0, "hash": time.monotonic() - began}
            emit({"event": "progress", "tensors": number, "bytes": done, "current": item.name, "seconds": times})
    return made


def _measured(
    item: Item, task: Task, curvature: Curvature, matrices: Matrices, reader: Reader,
    pool: ThreadPoolExecutor,
) -> list[float]:  # fmt: skip
    params = [want.params for want in item.wants]
    try:
        terms = damage.terms(params[0], curvature)
    except KeyError as missing:
        fact = f"no gradients of {missing.args[0]} were seen: the model does not multiply by it in a plain linear way"
        raise InputError(item.name, fact, "such a model cannot be fitted: choose a file type") from None
    weights = [_weights(item, want, matrices) for want in item.wants]
    parts: list[Losses] = []
    waiting: deque[Future[Losses]] = deque()
    try:
        for first, raw in _chunks(item, reader):
            waiting.append(pool.submit(damage.losses, raw, first, params, weights, terms))
            if len(waiting) > task.threads:
                parts.append(waiting.popleft().result())
        parts += [future.result() for future in waiting]
    except tensor.BadWeights as bad:
        raise InputError(item.pieces[0].name, bad.fact, bad.remedy) from None
    return [math.fsum(np.concatenate(rows)) for rows in zip(*parts, strict=True)]


def _name(matrix: InputFile | Digest) -> str:
    return str(matrix.path) if isinstance(matrix, InputFile) else "imatrix=auto"


def _weights(item: Item, want: Want, matrices: Matrices) -> np.ndarray | None:
    if want.imatrix is None:
        return None
    return matrices[want.imatrix].values(item.name, want.params.matrices, want.params.made.cols, item.name)


def _chunks(item: Item, reader: Reader) -> Iterator[tuple[int, np.ndarray]]:
    """(number of the first row, uint8 [rows, source row bytes]): whole units of rows."""
    made = item.wants[0].params.made
    width, unit, first = tensor.source_row_bytes(made), made.transform.unit, 0
    step = max(1, damage.CHUNK // (made.cols * unit)) * unit
    for piece in item.pieces:
        hasher, rows = Hasher(), piece.nbytes // width
        for at in range(0, rows, step):
            raw = np.empty((min(step, rows - at), width), np.uint8)
            view = memoryview(raw).cast("B")  # type: ignore[arg-type]  # numpy's stubs do not say it is a buffer
            reader.read_into(piece.file, piece.offset + at * width, view)
            hasher.update(view)
            yield first + at, raw
        _check(piece, hasher.digest(), reader)
        first += rows


def _check(piece: Piece, digest: Digest, reader: Reader) -> None:
    if piece.digest is not None and piece.digest != digest:
        raise changed(reader.files[piece.file].path, piece.name)
