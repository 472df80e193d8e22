"""The GGUF container, version 3: encoding and decoding of headers. No tensor data passes through here.

Source: the GGUF specification (ggml/docs/gguf.md). Little endian only.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Sequence
from enum import IntEnum
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

from qbuild.errors import InputError
from qbuild.ggml import BY_ID, QTYPES

MAGIC, VERSION, ALIGNMENT = b"GGUF", 3, 32


class GGUFType(IntEnum):
    """Value types of the format."""

    UINT8 = 0
    INT8 = 1
    UINT16 = 2
    INT16 = 3
    UINT32 = 4
    INT32 = 5
    FLOAT32 = 6
    BOOL = 7
    STRING = 8
    ARRAY = 9
    UINT64 = 10
    INT64 = 11
    FLOAT64 = 12


SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}


class KV(NamedTuple):
    """A key-value pair; ``raw`` is the whole encoded entry, key included."""

    key: str
    raw: bytes


class TensorInfo(NamedTuple):
    """``shape`` is row-major (the last dimension is ggml's ne[0]); ``offset`` counts from the data section."""

    name: str
    shape: tuple[int, ...]
    type: str
    offset: int
    nbytes: int


class GgufHeader(NamedTuple):
    kvs: tuple[KV, ...]
    tensors: tuple[TensorInfo, ...]
    data_offset: int
    alignment: int


def _string(text: str | bytes) -> bytes:
    data = text.encode("utf-8", "surrogateescape") if isinstance(text, str) else text
    return struct.pack("<Q", len(data)) + data


def _value(value: Any, vtype: GGUFType, item: GGUFType | None) -> bytes:
    if vtype == GGUFType.STRING:
        return _string(value)
    if vtype == GGUFType.ARRAY:
        if item is None:
            raise ValueError("BUG: an array without an item type")
        head = struct.pack("<IQ", item, len(value))
        if item == GGUFType.STRING:
            return head + b"".join(map(_string, value))
        return head + struct.pack(f"<{len(value)}{SCALARS[item]}", *value)
    return struct.pack("<" + SCALARS[vtype], value)


def encode_kv(key: str, value: Any, vtype: GGUFType, item: GGUFType | None = None) -> KV:
    """Encode a pair; ``item`` is the element type of an array."""
    return KV(key, _string(key) + struct.pack("<I", vtype) + _value(value, vtype, item))


def decode_kv(kv: KV) -> Any:
    """The value of an entry: str, int, float, bool or a list of them."""
    cursor = _Cursor(kv.raw, kv.key)
    cursor.string()
    return cursor.value()


class _Short(Exception):
    """More bytes of the file are needed."""


class _Cursor:
    """Reads values off the front of a buffer. Lengths come from strangers: nothing is allocated by them."""

    def __init__(self, data: bytes, place: str) -> None:
        self.data, self.at, self.place = data, 0, place

    def take(self, count: int) -> bytes:
        if self.at + count > len(self.data):
            raise _Short
        self.at += count
        return self.data[self.at - count : self.at]

    def unpack(self, code: str) -> Any:
        return struct.unpack("<" + code, self.take(struct.calcsize("<" + code)))[0]

    def string(self) -> str:
        return self.take(self.unpack("Q")).decode("utf-8", "surrogateescape")

    def kind(self) -> GGUFType:
        number = self.unpack("I")
        try:
            return GGUFType(number)
        except ValueError:
            raise self.damaged(f"has the unknown value type {number}") from None

    def damaged(self, fact: str) -> InputError:
        return InputError(self.place, f"its header {fact}", "fetch it again: the file is damaged")

    def value(self) -> Any:
        return self._value(self.kind())

    def _value(self, vtype: GGUFType) -> Any:
        if vtype == GGUFType.STRING:
            return self.string()
        if vtype != GGUFType.ARRAY:
            return self.unpack(SCALARS[vtype])
        item, count = self.kind(), self.unpack("Q")
        if item == GGUFType.ARRAY:
            raise self.damaged("has an array of arrays")
        if item == GGUFType.STRING:
            return [self.string() for _ in range(count)]
        data = self.take(count * struct.calcsize("<" + SCALARS[item]))
        return list(struct.unpack(f"<{count}{SCALARS[item]}", data))

    def skip_value(self) -> None:
        """Like ``value``, but only moves on: vocabularies hold hundreds of thousands of strings."""
        vtype = self.kind()
        if vtype == GGUFType.ARRAY:
            item, count = self.kind(), self.unpack("Q")
            if item not in (GGUFType.STRING, GGUFType.ARRAY):
                self.take(count * struct.calcsize("<" + SCALARS[item]))
                return
            if item == GGUFType.ARRAY:
                raise self.damaged("has an array of arrays")
        elif vtype != GGUFType.STRING:
            self.unpack(SCALARS[vtype])
            return
        else:
            count = 1
        data, at, end, read = self.data, self.at, len(self.data), _LENGTH.unpack_from
        for _ in range(count):
            if at + 8 > end:
                raise _Short
            at += 8 + read(data, at)[0]
            if at > end:
                raise _Short
        self.at = at


_LENGTH = struct.Struct("<Q")


def _padded(n: int) -> int:
    return n + -n % ALIGNMENT


Named = tuple[str, tuple[int, ...], str]  # name, row-major shape, ggml type


def header_size(kv_bytes: int, tensors: Sequence[Named]) -> int:
    """Bytes before the data section of a file with so many bytes of key-value pairs."""
    infos = sum(8 + len(name.encode()) + 4 + 8 * len(shape) + 4 + 8 for name, shape, _ in tensors)
    return _padded(24 + kv_bytes + infos)


def layout(tensors: Sequence[Named]) -> tuple[list[int], int]:
    """Offset of each tensor in the data section, and the size of that section; every tensor is padded, the last too."""
    offsets, at = [], 0
    for _, shape, type_ in tensors:
        offsets.append(at)
        at += _padded(prod(shape[:-1]) * QTYPES[type_].row_bytes(shape[-1]))
    return offsets, at


def header(kvs: Sequence[KV], tensors: Sequence[Named]) -> bytes:
    """Everything before the data section, padding included."""
    out = [MAGIC, struct.pack("<IQQ", VERSION, len(tensors), len(kvs)), *(kv.raw for kv in kvs)]
    offsets, _ = layout(tensors)
    for (name, shape, type_), offset in zip(tensors, offsets, strict=True):
        out += [_string(name), struct.pack("<I", len(shape)), struct.pack(f"<{len(shape)}Q", *reversed(shape))]
        out.append(struct.pack("<IQ", QTYPES[type_].id, offset))
    data = b"".join(out)
    return data + bytes(-len(data) % ALIGNMENT)


FIRST_READ, MAX_HEADER = 1 << 20, 1 << 29  # bytes; a header of half a GiB is no header


def read_header(path: Path) -> GgufHeader:
    """Header of a GGUF file, read in growing steps and validated. InputError says what is wrong with it."""
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            data = file.read(FIRST_READ)
            while True:
                try:
                    return _parse(_Cursor(data, str(path)))
                except _Short:
                    if len(data) >= min(size, MAX_HEADER):
                        raise InputError(str(path), "its header is truncated", "fetch it again") from None
                    data += file.read(len(data))
    except OSError as error:
        raise InputError(str(path), f"cannot be read: {error.strerror}", "check the path and the disk") from None


def _parse(c: _Cursor) -> GgufHeader:
    if c.take(4) != MAGIC:
        raise InputError(c.place, "is not a GGUF file", "model.source=FILE.gguf")
    version = c.unpack("I")
    if version != VERSION:
        raise InputError(
            c.place, f"is GGUF version {version}; version {VERSION} little endian can be read", "convert it anew"
        )
    tensor_count, kv_count = c.unpack("Q"), c.unpack("Q")
    kvs = []
    for _ in range(kv_count):
        start, key = c.at, c.string()
        c.skip_value()
        kvs.append(KV(key, c.data[start : c.at]))
    if len({kv.key for kv in kvs}) != len(kvs):
        raise c.damaged("has a key twice")
    tensors = [_tensor(c) for _ in range(tensor_count)]
    alignment = next((decode_kv(kv) for kv in kvs if kv.key == "general.alignment"), ALIGNMENT)
    if not isinstance(alignment, int) or alignment < 8 or alignment & (alignment - 1) or alignment > 1 << 20:
        raise c.damaged(f"has the alignment {alignment!r}")
    if any(t.offset % alignment for t in tensors):
        raise c.damaged("has a tensor off its alignment")
    return GgufHeader(tuple(kvs), tuple(tensors), c.at + -c.at % alignment, alignment)


def _tensor(c: _Cursor) -> TensorInfo:
    name, dims = c.string(), c.unpack("I")
    if not 1 <= dims <= 4:
        raise c.damaged(f"gives tensor {name!r} {dims} dimensions")
    shape = tuple(c.unpack("Q") for _ in range(dims))[::-1]
    number = c.unpack("I")
    if number not in BY_ID:
        raise c.damaged(f"gives tensor {name!r} the unknown type {number}")
    if any(n == 0 or n >= 1 << 48 for n in shape) or shape[-1] % BY_ID[number].block:
        raise c.damaged(f"gives tensor {name!r} the shape {list(shape)}")
    nbytes = prod(shape[:-1]) * BY_ID[number].row_bytes(shape[-1])
    return TensorInfo(name, shape, BY_ID[number].name, c.unpack("Q"), nbytes)
