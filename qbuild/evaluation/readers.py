"""Weights of any output by the names of the checkpoint that it was made of, as the evaluation wants them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod

import numpy as np
import torch

from qbuild import kernels
from qbuild.arch.convert import TensorSpec, Transform
from qbuild.calibration.weights import Read
from qbuild.checkpoint import Checkpoint, Reader, SourceTensor
from qbuild.ggml import QTYPES

__all__ = ["Tensors", "gguf", "safetensors", "undo"]

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip


@dataclass(frozen=True)
class Tensors:
    """A model's tensors by their names in the source checkpoint."""

    names: tuple[str, ...]
    read: Read


def safetensors(checkpoint: Checkpoint, reader: Reader) -> Tensors:
    """The tensors of a checkpoint as they are stored."""

    def read(name: str) -> torch.Tensor:
        tensor = checkpoint.tensors[name]
        data = bytearray(tensor.nbytes)
        reader.read_into(tensor.file, tensor.offset, memoryview(data))
        return torch.frombuffer(data, dtype=DTYPES[tensor.dtype]).view(tensor.shape)

    return Tensors(tuple(checkpoint.tensors), read)


@dataclass(frozen=True)
class _Part:
    """Where rows of a source tensor are: from row ``at`` of the GGUF tensor of ``spec``, ``rows`` of them, which are
    the rows from ``start`` of the source tensor seen as [rows, columns of the GGUF tensor]."""

    spec: TensorSpec
    at: int
    rows: int
    start: int


def gguf(
    file: Checkpoint, reader: Reader, specs: Sequence[TensorSpec], shapes: Mapping[str, tuple[int, ...]], source: Read
) -> Tensors:
    """The tensors of a GGUF file that was made by ``specs`` of a checkpoint whose tensors have ``shapes``: float32,
    by the checkpoint's names and in its order of rows. ``source`` gives what the file does not hold."""
    parts = _parts(specs, shapes)

    def read(name: str) -> torch.Tensor:
        found = parts.get(name, [])
        shape = shapes[name]
        if sum(part.rows * part.spec.shape[-1] for part in found) < prod(shape):
            whole = source(name).float().numpy().reshape(-1).copy()
        else:
            whole = np.empty(prod(shape), np.float32)
        for part in found:
            cols = part.spec.shape[-1]
            values = undo(part.spec.transform, _rows(file.tensors[part.spec.name], reader, part.at, part.rows, cols))
            whole.reshape(-1, cols)[part.start : part.start + part.rows] = values
        return torch.from_numpy(whole).view(shape)

    return Tensors(tuple(shapes), read)


def _parts(specs: Sequence[TensorSpec], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, list[_Part]]:
    found: dict[str, list[_Part]] = {}
    for spec in specs:
        at = 0
        for piece in spec.pieces:
            stop = prod(shapes[piece.source]) // spec.shape[-1] if piece.stop is None else piece.stop
            rows = stop - piece.start
            found.setdefault(piece.source, []).append(_Part(spec, at, rows, piece.start))
            at += rows
    return found


def _rows(tensor: SourceTensor, reader: Reader, at: int, rows: int, cols: int) -> np.ndarray:
    """float32 [rows, cols]: some rows of a tensor of a GGUF file."""
    size = QTYPES[tensor.dtype].row_bytes(cols)
    data = np.empty((rows, size), np.uint8)
    reader.read_into(tensor.file, tensor.offset + at * size, data.data)
    return kernels.dequantize(data, tensor.dtype)


def undo(transform: Transform, chunk: np.ndarray) -> np.ndarray:
    """What ``transform.apply`` was given when it gave ``chunk``, float32 [rows, cols] of whole units."""
    rows, cols = chunk.shape
    unit = transform.unit
    match transform.kind:
        case "none":
            return chunk
        case "add_one":
            return chunk - np.float32(1)
        case "transpose":
            return chunk.reshape(-1, unit, cols).swapaxes(1, 2).reshape(rows, cols)
        case "qkv":
            return chunk.reshape(3, -1, unit).swapaxes(0, 1).reshape(rows, cols)
        case "permute" if rows == 1:
            return undo(transform, chunk.reshape(-1, 1)).reshape(1, -1)
        case "permute":
            return chunk.reshape(rows // unit, unit // 2, 2, cols).swapaxes(1, 2).reshape(rows, cols)
        case other:
            raise RuntimeError(f"BUG: nothing undoes the transform {other}")
