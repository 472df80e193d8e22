"""Importance matrices: the mean square of every column's input, by weight name, from a file of llama.cpp's.

Both of its formats are read: GGUF (``general.type`` imatrix) and the older ``.dat``. Source: llama.cpp's
tools/quantize and tools/imatrix (facts, no code).
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from qbuild.digest import Digest, digest_bytes
from qbuild.errors import ConfigError, InputError
from qbuild.gguffile import (
    KV,
    GgufHeader,
    GGUFType,
    Named,
    decode_kv,
    encode_kv,
    header,
    header_size,
    layout,
    parse_header,
)

__all__ = ["Imatrix", "Noted", "counts", "dump", "load", "noted", "parse", "size"]

Noted = tuple[str, str | None, int, int]  # file, data set, entries, chunks

MAX_BYTES = 2 << 30  # all of it is held in memory
SUMS, COUNTS = ".in_sum2", ".counts"


@dataclass(frozen=True)
class Imatrix:
    """``entries`` are float32, flat: columns, times experts for stacked weights. ``file`` is the path as typed,
    ``digest`` that of its bytes."""

    file: str
    entries: Mapping[str, np.ndarray]
    dataset: str | None
    chunks: int
    digest: Digest

    def values(self, name: str, matrices: int, cols: int, place: str) -> np.ndarray | None:
        """[matrices, cols] for a weight; None where the file has no entry for it."""
        found = self.entries.get(name)
        if found is None:
            return None
        if found.size != matrices * cols:
            if name == "token_embd.weight":
                return None  # llama-quantize passes over it too
            fact = f"{self.file} has {found.size} values for {name}, which has {matrices * cols} columns"
            raise InputError(place, fact, "make an importance matrix of this very model: llama-imatrix")
        return found.reshape(matrices, cols)

    def chosen(self, include: Sequence[str], exclude: Sequence[str], place: str) -> Imatrix:
        """With the entries that ``counts`` lets through alone."""
        entries = {name: values for name, values in self.entries.items() if counts(name, include, exclude)}
        if not entries:
            fact = f"none of the {len(self.entries)} entries of {self.file} is left"
            raise ConfigError(place, fact, f"its names are like {next(iter(self.entries))}")
        return replace(self, entries=entries)


def counts(name: str, include: Sequence[str], exclude: Sequence[str]) -> bool:
    """Whether a weight's entry is used: its name has a part that is included (all, where none is named), and none that
    is excluded."""
    return (not include or any(part in name for part in include)) and not any(part in name for part in exclude)


def load(file: str) -> Imatrix:
    """Read and check an importance matrix."""
    path = Path(file).expanduser()
    try:
        if path.stat().st_size > MAX_BYTES:
            raise InputError(file, "is too large for an importance matrix", "name the right file")
        return parse(file, path.read_bytes())
    except OSError as error:
        remedy = "check the path, or make one with llama-imatrix"
        raise InputError(file, f"cannot be read: {error.strerror}", remedy) from None


def parse(file: str, data: bytes) -> Imatrix:
    """An importance matrix out of the bytes of ``file``, checked."""
    found = (_parse_gguf if data[:4] == b"GGUF" else _parse_dat)(file, data)
    if not found.entries:
        raise InputError(file, "has no entries", "make an importance matrix with llama-imatrix")
    for name, values in found.entries.items():
        if not np.isfinite(values).all():
            raise InputError(file, f"{name} has values that are NaN or infinite", "make the importance matrix anew")
    return found


def noted(matrix: Imatrix, file: str) -> Noted:
    """What a GGUF file says of its importance matrix, which it calls ``file``."""
    return file, matrix.dataset, len(matrix.entries), matrix.chunks


def dump(
    entries: Mapping[str, tuple[np.ndarray, np.ndarray]], datasets: Sequence[str], chunks: int, chunk_size: int
) -> bytes:
    """The GGUF file that llama-imatrix would write.

    ``entries``: by weight name, the sums of squares float32 [matrices, columns] and the rows each matrix saw, float32
    [matrices] (an expert of its own rows); ``chunk_size`` in tokens.
    """
    for name, (sums, counts) in entries.items():
        if sums.ndim != 2 or counts.shape != sums.shape[:1]:
            raise ValueError(f"BUG: {name} has sums {sums.shape} and counts {counts.shape}")
    named = _named({name: (sums.shape[0], sums.shape[1]) for name, (sums, _) in entries.items()})
    offsets, nbytes = layout(named)
    data = bytearray(nbytes)
    for values, offset in zip((v for _, pair in sorted(entries.items()) for v in pair), offsets, strict=True):
        data[offset : offset + 4 * values.size] = values.astype("<f4").tobytes()
    return header(_kvs(datasets, chunks, chunk_size), named) + bytes(data)


def size(shapes: Mapping[str, tuple[int, int]], datasets: Sequence[str]) -> int:
    """Bytes of the file that ``dump`` makes of entries of these shapes, (matrices, columns) by weight name."""
    named = _named(shapes)
    return header_size(sum(len(kv.raw) for kv in _kvs(datasets, 0, 0)), named) + layout(named)[1]


def _named(shapes: Mapping[str, tuple[int, int]]) -> list[Named]:
    """Sums and counts of every weight. ggml does not count outer dimensions of one."""
    found: list[Named] = []
    for name, (matrices, cols) in sorted(shapes.items()):
        alone = matrices == 1
        found += [
            (name + SUMS, (cols,) if alone else (matrices, cols), "F32"),
            (name + COUNTS, (1,) if alone else (matrices, 1), "F32"),
        ]
    return found


def _kvs(datasets: Sequence[str], chunks: int, chunk_size: int) -> list[KV]:
    return [
        encode_kv("general.type", "imatrix", GGUFType.STRING),
        encode_kv("imatrix.datasets", list(datasets), GGUFType.ARRAY, GGUFType.STRING),
        encode_kv("imatrix.chunk_count", chunks, GGUFType.UINT32),
        encode_kv("imatrix.chunk_size", chunk_size, GGUFType.UINT32),
    ]


def _parse_gguf(file: str, raw: bytes) -> Imatrix:
    header = parse_header(raw, file)
    kvs = {kv.key: kv for kv in header.kvs}
    missing = [k for k in ("imatrix.datasets", "imatrix.chunk_count", "imatrix.chunk_size") if k not in kvs]
    if missing:
        raise InputError(file, f"is no importance matrix: it has no {missing[0]}", "make one with llama-imatrix")
    data = _tensors(file, raw, header)
    entries = {}
    for name, sums in data.items():
        if not name.endswith(SUMS):
            continue
        weight = name.removesuffix(SUMS)
        counts = data.get(weight + COUNTS)
        if counts is None or counts.size == 0 or sums.size % counts.size:
            raise InputError(file, f"{weight} has sums without fitting counts", "make the importance matrix anew")
        each = sums.reshape(counts.size, -1)
        counts = counts.reshape(-1, 1)
        entries[weight] = np.where(counts > 0, each / np.maximum(counts, np.float32(1e-30)), np.float32(1)).reshape(-1)
    datasets = decode_kv(kvs["imatrix.datasets"])
    chunks = int(decode_kv(kvs["imatrix.chunk_count"]))
    return Imatrix(file, entries, datasets[0] if datasets else None, chunks, digest_bytes(raw))


def _tensors(file: str, data: bytes, header: GgufHeader) -> dict[str, np.ndarray]:
    found = {}
    for tensor in header.tensors:
        if tensor.type != "F32":
            raise InputError(file, f"{tensor.name} is {tensor.type}, not F32", "make the importance matrix anew")
        start = header.data_offset + tensor.offset
        found[tensor.name] = np.frombuffer(data, np.float32, tensor.nbytes // 4, start)
    return found


def _parse_dat(file: str, data: bytes) -> Imatrix:
    """int32 count; per entry: name length, name, calls, number of values, sums over calls; then chunks, data set."""
    at, entries = 4, {}
    try:
        for _ in range(struct.unpack_from("<i", data)[0]):
            length = struct.unpack_from("<i", data, at)[0]
            name = data[at + 4 : at + 4 + length].decode()
            calls, count = struct.unpack_from("<ii", data, at + 4 + length)
            at += 12 + length
            values = np.frombuffer(data, "<f4", count, at)
            at += 4 * count
            entries[name] = values / np.float32(calls) if calls > 0 else values.copy()
        chunks, dataset = 0, None
        if at + 8 <= len(data):
            chunks, length = struct.unpack_from("<ii", data, at)
            dataset = data[at + 8 : at + 8 + length].decode()
    except (struct.error, ValueError, UnicodeDecodeError):
        raise InputError(file, "is no importance matrix, or is truncated", "make one with llama-imatrix") from None
    return Imatrix(file, entries, dataset, chunks, digest_bytes(data))
