"""Weights of any output by the names of the checkpoint that it was made of, as the evaluation wants them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

import numpy as np
import torch

from qbuild import kernels
from qbuild.arch.convert import TensorSpec, Transform
from qbuild.calibration.weights import Read
from qbuild.checkpoint import Checkpoint, Reader, Stored, stored
from qbuild.ggml import QTYPES
from qbuild.quant.packing import unpack
from qbuild.quant.shapes import Scheme

__all__ = ["Tensors", "gguf", "packed", "safetensors", "undo"]

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
CHUNK = 1 << 20  # weights that are dequantized at a time


@dataclass(frozen=True)
class Tensors:
    """A model's tensors by their names in the source checkpoint."""

    names: tuple[str, ...]
    read: Read

    def on(self, device: str) -> Tensors:
        """The same tensors, on a device."""
        return Tensors(self.names, lambda name: self.read(name).to(device))


def safetensors(checkpoint: Checkpoint, reader: Reader) -> Tensors:
    """The tensors of a checkpoint as they are stored, and were when they were hashed."""

    def read(name: str) -> torch.Tensor:
        tensor = checkpoint.tensors[name]
        return torch.frombuffer(reader.tensor(tensor), dtype=DTYPES[tensor.dtype]).view(tensor.shape)

    return Tensors(tuple(checkpoint.tensors), read)


def packed(
    files: Sequence[Path], shapes: Mapping[str, tuple[int, ...]], scheme: Scheme, device: str = "cpu"
) -> Tensors:
    """The tensors of safetensors files of quantized linears, ``shapes`` those of their source: the quantized ones as
    float32, unpacked on ``device``, the others as they are stored, there too."""
    entries = {name: entry for path in files for name, entry in stored(path)}

    def read(name: str) -> torch.Tensor:
        if name in entries:
            return _tensor(entries[name]).to(device)
        linear = name.removesuffix(".weight")
        parts = {part: _tensor(entry).to(device) for part, entry in entries.items() if part.startswith(f"{linear}.")}
        return unpack(scheme, linear, parts, *shapes[name]).dequantize()

    return Tensors(tuple(shapes), read)


def _tensor(entry: Stored) -> torch.Tensor:
    return torch.frombuffer(entry.read(), dtype=DTYPES[entry.dtype]).view(entry.shape)


@dataclass(frozen=True)
class _Part:
    """Where rows of a source tensor are: from row ``at`` of the GGUF tensor of ``spec``, ``rows`` of them, which are
    the rows from ``start`` of the source tensor seen as [rows, columns of the GGUF tensor]."""

    spec: TensorSpec
    at: int
    rows: int
    start: int

    @property
    def cols(self) -> int:
        return self.spec.shape[-1]


def gguf(
    file: Checkpoint, reader: Reader, specs: Sequence[TensorSpec], shapes: Mapping[str, tuple[int, ...]], source: Read
) -> Tensors:
    """The tensors of a GGUF file that was made by ``specs`` of a checkpoint whose tensors have ``shapes``: float32,
    by the checkpoint's names and in its order of rows. ``source`` gives what the file does not hold."""
    parts = _parts(specs, shapes)

    def read(name: str) -> torch.Tensor:
        found, shape = parts.get(name, []), shapes[name]
        if len(found) == 1 and found[0].rows * found[0].cols == prod(shape):
            return torch.from_numpy(_values(file, reader, found[0])).view(shape)
        if sum(part.rows * part.cols for part in found) < prod(shape):
            whole = source(name).float().numpy().reshape(-1).copy()
        else:
            whole = np.empty(prod(shape), np.float32)
        for part in found:
            whole.reshape(-1, part.cols)[part.start : part.start + part.rows] = _values(file, reader, part)
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


def _values(file: Checkpoint, reader: Reader, part: _Part) -> np.ndarray:
    """float32 [rows, cols]: the rows of a part in the source's order."""
    tensor = file.tensors[part.spec.name]
    size = QTYPES[tensor.dtype].row_bytes(part.cols)
    values = np.empty((part.rows, part.cols), np.float32)
    some = max(1, CHUNK // part.cols)
    for at in range(0, part.rows, some):
        data = np.empty((min(some, part.rows - at), size), np.uint8)
        reader.read_into(tensor.file, tensor.offset + (part.at + at) * size, data.data)
        values[at : at + some] = kernels.dequantize(data, tensor.dtype)
    return undo(part.spec.transform, values)


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
