"""``gguf.damage``: the KL divergence to the source, in nats a token, that storing a tensor in a type adds to a model.

To second order and of this tensor alone: see ``calibration.curvature``. The type's own quantizer makes the bytes, with
the importance matrix that the file would be made with, and what llama.cpp reads in them is compared with the source.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from qbuild import kernels
from qbuild.actions import tensor
from qbuild.actions.stream import Piece
from qbuild.calibration.curvature import Curvature, Term
from qbuild.checkpoint import SourceFile
from qbuild.digest import Digest
from qbuild.ggml import QTYPES
from qbuild.inputs import InputFile

KIND = "gguf.damage"
SALT = 1
CHUNK = 1 << 19  # weights in one chunk
WEIGHT_RAM = 32  # bytes of a weight in a chunk, from its source to its losses


@dataclass(frozen=True)
class Params:
    """``made``: how the tensor is quantized; ``parts``: (source tensor, first row, stop row or None) in its order;
    ``matrices``: of a stack of experts."""

    made: tensor.Params
    parts: tuple[tuple[str, int, int | None], ...]
    matrices: int


@dataclass(frozen=True)
class Want:
    """One action: a type, and its importance matrix, given or made."""

    id: str
    key: str
    params: Params
    imatrix: InputFile | Digest | None


@dataclass(frozen=True)
class Item:
    """A tensor and what is asked of it, all read from ``pieces`` once."""

    name: str
    pieces: tuple[Piece, ...]
    wants: tuple[Want, ...]


@dataclass(frozen=True)
class Task:
    files: tuple[SourceFile, ...]
    items: tuple[Item, ...]
    curvature: Digest
    threads: int


def terms(params: Params, curvature: Curvature) -> list[Term]:
    """The terms of a GGUF tensor, with its own order of rows. Raises KeyError where curvature knows none of it."""
    known = [curvature.terms.get(source.removesuffix(".weight")) for source, _, _ in params.parts]
    uses = max((len(found) for found in known if found), default=0)
    if not uses:
        raise KeyError(params.parts[0][0])
    return [_term(params, [found[use] if found else None for found in known]) for use in range(uses)]


def _term(params: Params, found: Sequence[Term | None]) -> Term:
    """One use of all sources of a tensor; of a source that no token reached all is 0."""
    like = next(term for term in found if term is not None)
    blank = Term(np.zeros_like(like.rows), np.zeros_like(like.cols))
    sources = [blank if term is None else term for term in found]
    numbers = [np.arange(t.rows.size)[start:stop] for t, (_, start, stop) in zip(sources, params.parts, strict=True)]
    rows = np.concatenate([term.rows[own] for term, own in zip(sources, numbers, strict=True)])
    firsts = zip(sources, _firsts(numbers, params), strict=True)
    cols = np.concatenate([term.cols[own // (term.rows.size // len(term.cols))] for term, own in firsts])
    ordered = params.made.transform.apply(rows.reshape(-1, 1)).reshape(-1)
    return Term(np.ascontiguousarray(ordered), cols)


def _firsts(numbers: Sequence[np.ndarray], params: Params) -> list[np.ndarray]:
    """Of each source the rows with which a matrix of the tensor begins: all rows of a matrix read the same columns."""
    each = sum(own.size for own in numbers) // params.matrices
    found, at = [], 0
    for own in numbers:
        found.append(own[-at % each :: each])
        at += own.size
    return found


def losses(
    raw: np.ndarray, first: int, params: Sequence[Params], imatrices: Sequence[np.ndarray | None],
    found: Sequence[Term],
) -> list[np.ndarray]:  # fmt: skip
    """What each row costs, float64 [rows], for each of ``params``, which differ in their types alone.

    ``raw``: uint8 [rows, source row bytes], whole units of rows; ``first``: the number of the first one in the tensor;
    ``imatrices``: float32 [matrices, cols]. Raises BadWeights as ``tensor.encode`` does.
    """
    rows, cols = len(raw), params[0].made.cols
    wanted = np.empty((rows, cols), np.float32)
    tensor.encode(raw, replace(params[0].made, type="F32"), wanted.view(np.uint8))
    each = found[0].rows.size // params[0].matrices
    made = []
    for one, imatrix in zip(params, imatrices, strict=True):
        cost = np.zeros(rows)
        for part, matrix in _by_matrix(first, rows, each):
            out = np.empty((part.stop - part.start, QTYPES[one.made.type].row_bytes(cols)), np.uint8)
            tensor.encode(raw[part], one.made, out, None if imatrix is None else imatrix[matrix])
            values = kernels.dequantize(out, one.made.type)
            for term in found:
                own = term.rows[first + part.start : first + part.stop]
                cost[part] += 0.5 * own * kernels.row_losses(values, wanted[part], term.cols[matrix])
        made.append(cost)
    return made


def _by_matrix(first: int, rows: int, each: int) -> Iterator[tuple[slice, int]]:
    at = 0
    while at < rows:
        matrix = (first + at) // each
        stop = min(rows, (matrix + 1) * each - first)
        yield slice(at, stop), matrix
        at = stop
