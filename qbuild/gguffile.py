"""The GGUF container, version 3: encoding and decoding of headers. No tensor data passes through here.

Source: the GGUF specification (ggml/docs/gguf.md). Little endian only.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Sequence
from enum import IntEnum
from io import RawIOBase
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

from qbuild.digest import Digest, digest_bytes
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
    """``digest``: of the bytes up to the end of the last tensor's entry."""

    kvs: tuple[KV, ...]
    tensors: tuple[TensorInfo, ...]
    data_offset: int
    alignment: int
    digest: Digest


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


def value_type(kv: KV) -> GGUFType:
    """What kind of value an entry holds."""
    cursor = _Cursor(kv.raw, kv.key)
    cursor.string()
    return cursor.kind()


class _Short(Exception):
    """More of the file is needed: at least up to byte ``end``."""

    def __init__(self, end: int) -> None:
        super().__init__(end)
        self.end = end


class _Cursor:
    """Reads values off the front of a buffer. Lengths come from strangers: nothing is allocated by them."""

    def __init__(self, data: bytes, place: str) -> None:
        self.data, self.at, self.place = data, 0, place

    def take(self, count: int) -> bytes:
        if self.at + count > len(self.data):
            raise _Short(self.at + count)
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
        vtype = self.kind()
        if vtype == GGUFType.STRING:
            return self.string()
        if vtype != GGUFType.ARRAY:
            return self.unpack(SCALARS[vtype])
        item, count = self._array()
        if item == GGUFType.STRING:
            start, ends = self.at + 8, self._string_ends(count)
            starts = [start, *(end + 8 for end in ends)]
            return [self.data[i:j].decode("utf-8", "surrogateescape") for i, j in zip(starts, ends, strict=False)]
        return list(struct.unpack(f"<{count}{SCALARS[item]}", self.take(count * struct.calcsize("<" + SCALARS[item]))))

    def skip_value(self) -> None:
        """Like ``value``, but only moves on: vocabularies hold hundreds of thousands of strings."""
        vtype = self.kind()
        if vtype == GGUFType.STRING:
            self.take(self.unpack("Q"))
        elif vtype != GGUFType.ARRAY:
            self.unpack(SCALARS[vtype])
        else:
            item, count = self._array()
            if item == GGUFType.STRING:
                self._string_ends(count)
            else:
                self.take(count * struct.calcsize("<" + SCALARS[item]))

    def _array(self) -> tuple[GGUFType, int]:
        item, count = self.kind(), self.unpack("Q")
        if item == GGUFType.ARRAY:
            raise self.damaged("has an array of arrays")
        return item, count

    def _string_ends(self, count: int) -> list[int]:
        """Pass so many strings; where each ends. A count that the data cannot hold is found before the first."""
        data, at, size, length = self.data, self.at, len(self.data), _LENGTH.unpack_from
        if at + 8 * count > size:
            raise _Short(at + 8 * count)
        ends = []
        for _ in range(count):
            if at + 8 > size:
                raise _Short(at + 8)
            at += 8 + length(data, at)[0]
            ends.append(at)
        if at > size:
            raise _Short(at)
        self.at = at
        return ends


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


def shards(tensors: Sequence[Named], limit: int) -> list[int]:
    """How many tensors each file has where none is to hold more than ``limit`` bytes of them, as llama-gguf-split
    --split-max-size cuts: in order, and a tensor larger than that in a file of its own. A first one of zero tensors is
    where it stops."""
    counts, at = [0], 0
    for tensor in tensors:
        nbytes = layout([tensor])[1]
        if at + nbytes > limit:
            counts.append(0)
            at = 0
        at += nbytes
        counts[-1] += 1
    return counts


def split_kvs(number: int, count: int, tensors: int) -> list[KV]:
    """What tells that a file is shard ``number`` (from 0) of ``count`` with so many tensors in all of them."""
    return [
        encode_kv("split.no", number, GGUFType.UINT16),
        encode_kv("split.tensors.count", tensors, GGUFType.INT32),
        encode_kv("split.count", count, GGUFType.UINT16),
    ]


def split_name(stem: str, number: int, count: int) -> str:
    """The usual name of shard ``number`` (from 0)."""
    return f"{stem}-{number + 1:05d}-of-{count:05d}.gguf"


def header(kvs: Sequence[KV], tensors: Sequence[Named]) -> bytes:
    """Everything before the data section, padding included."""
    out = [MAGIC, struct.pack("<IQQ", VERSION, len(tensors), len(kvs)), *(kv.raw for kv in kvs)]
    if any(kv.key == "general.alignment" and decode_kv(kv) != ALIGNMENT for kv in kvs):
        raise ValueError(f"BUG: a header that promises another alignment than {ALIGNMENT}")
    offsets, _ = layout(tensors)
    for (name, shape, type_), offset in zip(tensors, offsets, strict=True):
        out += [_string(name), struct.pack("<I", len(shape)), struct.pack(f"<{len(shape)}Q", *reversed(shape))]
        out.append(struct.pack("<IQ", QTYPES[type_].id, offset))
    data = b"".join(out)
    return data + bytes(-len(data) % ALIGNMENT)


FIRST_READ, MAX_HEADER = 1 << 20, 128 << 20  # bytes; the largest vocabularies make headers of some 20 MB
MAX_COUNT = 1 << 16  # of key-value pairs and of tensors; the largest models have some 2,000


def read_header(path: Path) -> GgufHeader:
    """Header of a GGUF file, read in growing steps and validated. InputError says what is wrong with it."""
    try:
        with path.open("rb", buffering=0) as file:
            size = os.fstat(file.fileno()).st_size
            data = file.read(FIRST_READ)
            while True:
                try:
                    return _parse(_Cursor(data, str(path)), size)
                except _Short as short:
                    data += _more(file, str(path), len(data), short.end, size)
    except OSError as error:
        raise InputError(str(path), f"cannot be read: {error.strerror}", "check the path and the disk") from None


def parse_header(data: bytes, place: str) -> GgufHeader:
    """The header of a GGUF file that is in memory whole, validated as ``read_header`` does."""
    try:
        return _parse(_Cursor(data, place), len(data))
    except _Short as short:
        fact = f"its header is truncated: it goes on to byte {short.end} of {len(data)}"
        raise InputError(place, fact, "fetch or make it again") from None


def _more(file: RawIOBase, place: str, have: int, need: int, size: int) -> bytes:
    """The next bytes of a header, at least to byte ``need``; more than that only as far as doubling goes."""
    if need > size:
        fact = f"its header is truncated: it goes on to byte {need} of {size}"
        raise InputError(place, fact, "fetch it again: the download did not finish")
    if need > MAX_HEADER:
        fact = f"its header is longer than {MAX_HEADER >> 20} MiB"
        raise InputError(place, fact, "fetch it again: the file is damaged")
    found = file.read(max(need, min(2 * have, MAX_HEADER)) - have)
    if not found:
        raise InputError(place, "became shorter while it was read", "leave the file alone while it is built from")
    return found


def _parse(c: _Cursor, size: int) -> GgufHeader:
    if c.take(4) != MAGIC:
        raise InputError(c.place, "is not a GGUF file", "model.source=FILE.gguf")
    version = c.unpack("I")
    if version != VERSION:
        found = "big endian" if version & 0xFFFF == 0 else f"GGUF version {version}"
        fact = f"is {found}; version {VERSION}, little endian, can be read"
        raise InputError(c.place, fact, "convert the model anew with a current llama.cpp")
    tensor_count, kv_count = c.unpack("Q"), c.unpack("Q")
    if max(tensor_count, kv_count) > MAX_COUNT:
        raise c.damaged(f"counts {tensor_count} tensors and {kv_count} key-value pairs")
    kvs: dict[str, KV] = {}
    for _ in range(kv_count):
        start, key = c.at, c.string()
        if key in kvs:
            raise c.damaged(f"has the key {key!r} twice")
        c.skip_value()
        kvs[key] = KV(key, c.data[start : c.at])
    tensors = tuple(_tensor(c) for _ in range(tensor_count))
    alignment = decode_kv(kvs["general.alignment"]) if "general.alignment" in kvs else ALIGNMENT
    if type(alignment) is not int or alignment < 8 or alignment & (alignment - 1) or alignment > 1 << 20:
        raise c.damaged(f"has the alignment {alignment!r}")
    start, digest = c.at + -c.at % alignment, digest_bytes(memoryview(c.data)[: c.at])
    header = GgufHeader(tuple(kvs.values()), tensors, start, alignment, digest)
    _check_places(c, header, size)
    return header


def _check_places(c: _Cursor, header: GgufHeader, size: int) -> None:
    """Every name once, every tensor aligned, inside the file and clear of the others."""
    end, names = 0, set()
    for t in sorted(header.tensors, key=lambda t: (t.offset, t.nbytes)):
        if t.name in names:
            raise c.damaged(f"has the tensor {t.name} twice")
        names.add(t.name)
        if t.offset % header.alignment:
            raise c.damaged(f"has tensor {t.name} off its alignment")
        if t.offset < end:
            raise c.damaged(f"has tensor {t.name} overlap another")
        end = t.offset + t.nbytes
        if header.data_offset + end > size:
            fact = f"is truncated: tensor {t.name} ends at byte {header.data_offset + end} of {size}"
            raise InputError(c.place, fact, "fetch it again: the download did not finish")


def _tensor(c: _Cursor) -> TensorInfo:
    name, dims = c.string(), c.unpack("I")
    if not name or not name.isprintable():
        raise c.damaged(f"names a tensor {name[:80]!r}")
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
