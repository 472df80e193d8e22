"""The GGUF container, against the gguf package, and against damage."""

from __future__ import annotations

import random
import struct
import time
import tracemalloc
from pathlib import Path

import gguf
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qbuild.checkpoint import Checkpoint, open_path
from qbuild.errors import InputError
from qbuild.gguffile import GGUFType, decode_kv, encode_kv, header, header_size, layout, read_header

KVS = [
    encode_kv("general.architecture", "llama", GGUFType.STRING),
    encode_kv("a.u32", 7, GGUFType.UINT32),
    encode_kv("a.f32", 0.5, GGUFType.FLOAT32),
    encode_kv("a.bool", True, GGUFType.BOOL),
    encode_kv("a.strings", ["é", "", "x"], GGUFType.ARRAY, GGUFType.STRING),
    encode_kv("a.ints", [1, -2], GGUFType.ARRAY, GGUFType.INT32),
    encode_kv("a.u64", 1 << 40, GGUFType.UINT64),
]
TENSORS = [("t.weight", (3, 32), "F32"), ("n", (5,), "F32"), ("q.weight", (2, 64), "Q8_0")]


def ours(tensors=TENSORS, kvs=KVS) -> bytes:
    head = header(kvs, tensors)
    assert len(head) == header_size(sum(len(kv.raw) for kv in kvs), tensors)
    return head + bytes(layout(tensors)[1])


def test_bytes_equal_those_of_the_gguf_package(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "llama")
    writer.add_uint32("a.u32", 7)
    writer.add_float32("a.f32", 0.5)
    writer.add_bool("a.bool", True)
    writer.add_array("a.strings", ["é", "", "x"])
    writer.add_array("a.ints", [1, -2])
    writer.add_uint64("a.u64", 1 << 40)
    writer.add_tensor("t.weight", np.zeros((3, 32), np.float32))
    writer.add_tensor("n", np.zeros(5, np.float32))
    writer.add_tensor("q.weight", np.zeros((2, 68), np.uint8), raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert (tmp_path / "a.gguf").read_bytes() == ours()


@pytest.mark.parametrize("vtype", [t for t in GGUFType if t not in (GGUFType.ARRAY, GGUFType.STRING)])
def test_every_scalar_and_its_array_equals_the_gguf_packages(tmp_path: Path, vtype: GGUFType) -> None:
    value = {GGUFType.BOOL: True, GGUFType.FLOAT32: 0.1, GGUFType.FLOAT64: -1e300}.get(vtype, 100)
    theirs, name = gguf.GGUFValueType(vtype.value), tmp_path / "a.gguf"
    writer = gguf.GGUFWriter(name, "llama")
    writer.add_key_value("s", value, theirs)
    writer.add_key_value("a", [value, value], gguf.GGUFValueType.ARRAY, theirs)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    kvs = [KVS[0], encode_kv("s", value, vtype), encode_kv("a", [value, value], GGUFType.ARRAY, vtype)]
    ours = header(kvs, [])
    assert ours.startswith(name.read_bytes())
    assert not ours[name.stat().st_size :].strip(b"\0")
    stored = struct.unpack("f", struct.pack("f", value))[0] if vtype == GGUFType.FLOAT32 else value
    assert [decode_kv(kv) for kv in kvs[1:]] == [stored, [stored, stored]]


def test_what_the_gguf_package_reads_is_what_was_written(tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    path.write_bytes(ours())
    reader = gguf.GGUFReader(path)
    assert [reader.fields[kv.key].contents() for kv in KVS] == [decode_kv(kv) for kv in KVS]
    found = read_header(path)
    assert [(t.name, t.data_offset, t.n_bytes) for t in reader.tensors] == [
        (t.name, found.data_offset + t.offset, t.nbytes) for t in found.tensors
    ]


def test_what_is_written_is_read(tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    path.write_bytes(ours())
    found = read_header(path)
    assert found.kvs == tuple(KVS)
    assert [decode_kv(kv) for kv in found.kvs] == ["llama", 7, 0.5, True, ["é", "", "x"], [1, -2], 1 << 40]
    assert [(t.name, t.shape, t.type) for t in found.tensors] == TENSORS


def test_another_alignment_is_read_and_not_passed_on(tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_custom_alignment(256)
    for name in ("t.weight", "u.weight"):
        writer.add_tensor(name, np.full((1, 32), ord(name[0]), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    found, raw = open_path(path, "a"), path.read_bytes()
    assert [kv.key for kv in found.kvs] == ["general.architecture"]
    for name, t in found.tensors.items():
        assert np.frombuffer(raw, np.float32, 32, t.offset).tolist() == [ord(name[0])] * 32


def test_a_header_never_promises_an_alignment_it_does_not_keep() -> None:
    with pytest.raises(ValueError, match="BUG"):
        header([encode_kv("general.alignment", 64, GGUFType.UINT32)], [])


def test_text_that_is_not_utf8_comes_back_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    kv = encode_kv("k", [b"\xff\xfe", "\udcff"], GGUFType.ARRAY, GGUFType.STRING)
    path.write_bytes(ours(kvs=[*KVS, kv]))
    read = decode_kv(read_header(path).kvs[-1])
    assert encode_kv("k", read, GGUFType.ARRAY, GGUFType.STRING) == kv


def test_a_large_vocabulary_is_read_in_steps(tmp_path: Path) -> None:
    path, words = tmp_path / "a.gguf", [f"token number {i}" for i in range(120_000)]
    path.write_bytes(ours(kvs=[*KVS, encode_kv("tokens", words, GGUFType.ARRAY, GGUFType.STRING)]))
    began = time.perf_counter()
    assert decode_kv(read_header(path).kvs[-1]) == words
    assert time.perf_counter() - began < 1  # some 0.05 s; a header is read on every plan


@pytest.mark.parametrize("keep", [0, 3, 4, 23, 24, 60, 200])
def test_a_truncated_header_is_an_input_error(tmp_path: Path, keep: int) -> None:
    path = tmp_path / "a.gguf"
    path.write_bytes(ours()[:keep])
    with pytest.raises(InputError):
        read_header(path)


def test_a_truncated_tensor_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    path.write_bytes(ours()[:-64])
    with pytest.raises(InputError, match=r"q\.weight ends at"):
        open_path(path, "a.gguf")


def kv_header(value: bytes, tensors: int = 0, kvs: int = 1) -> bytes:
    return b"GGUF" + struct.pack("<IQQQ", 3, tensors, kvs, 1) + b"k" + value


def tensor_header(name: bytes, dims: tuple[int, ...], type_: int, offset: int, count: int = 1) -> bytes:
    info = struct.pack("<Q", len(name)) + name + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, type_, offset)
    return b"GGUF" + struct.pack("<IQQ", 3, count, 0) + info * count


LIES = {
    "no gguf": (b"PK\3\4", "is not a GGUF file"),
    "version 1": (b"GGUF" + struct.pack("<III", 1, 0, 0), "GGUF version 1"),
    "version 2": (b"GGUF" + struct.pack("<IQQ", 2, 0, 0), "GGUF version 2"),
    "big endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "big endian"),
    "2^60 pairs": (kv_header(b"", kvs=1 << 60), "counts 0 tensors and"),
    "2^60 tensors": (kv_header(b"", tensors=1 << 60), "counts 1152921504606846976 tensors"),
    "a string of 2^40 bytes": (kv_header(struct.pack("<IQ", 8, 1 << 40)), "truncated: it goes on to byte"),
    "a string of 2^64-1 bytes": (kv_header(struct.pack("<IQ", 8, (1 << 64) - 1)), "truncated: it goes on to byte"),
    "a string longer than headers are": (kv_header(struct.pack("<IQ", 8, 200 << 20)), "longer than 128 MiB"),
    "2^58 strings": (kv_header(struct.pack("<IIQ", 9, 8, 1 << 58)), "truncated: it goes on to byte"),
    "2^64-1 numbers": (kv_header(struct.pack("<IIQ", 9, 10, (1 << 64) - 1)), "truncated: it goes on to byte"),
    "an array of arrays": (kv_header(struct.pack("<IIQ", 9, 9, 1)), "array of arrays"),
    "an unknown value type": (kv_header(struct.pack("<I", 13)), "unknown value type 13"),
    "an unknown item type": (kv_header(struct.pack("<IIQ", 9, 99, 1)), "unknown value type 99"),
    "a key twice": (kv_header(struct.pack("<IBQ", 0, 1, 1) + b"k" + struct.pack("<IB", 0, 1), kvs=2), "'k' twice"),
    "an unknown tensor type": (tensor_header(b"t", (32,), 4, 0), "unknown type 4"),
    "no dimensions": (tensor_header(b"t", (), 0, 0), "0 dimensions"),
    "five dimensions": (tensor_header(b"t", (1,) * 5, 0, 0), "5 dimensions"),
    "an empty dimension": (tensor_header(b"t", (0,), 0, 0), r"the shape \[0\]"),
    "a negative dimension": (tensor_header(b"t", ((1 << 64) - 1,), 0, 0), "the shape"),
    "part of a block": (tensor_header(b"t", (33,), 8, 0), r"the shape \[33\]"),
    "a tensor twice": (tensor_header(b"t", (8,), 0, 0, count=2), "tensor t twice"),
    "a tensor off its alignment": (tensor_header(b"t", (8,), 0, 8), "off its alignment"),
    "a tensor beyond the end": (tensor_header(b"t", (1 << 40,), 0, 0), "t ends at byte"),
    "an offset beyond the end": (tensor_header(b"t", (8,), 0, (1 << 64) - 32), "t ends at byte"),
    "a nameless tensor": (tensor_header(b"", (8,), 0, 0), "names a tensor ''"),
    "a tensor with a terminal's escape": (tensor_header(b"\x1b[2J", (8,), 0, 0), "names a tensor"),
    "a tensor named in no encoding": (tensor_header(b"\xff", (8,), 0, 0), "names a tensor"),
}


@pytest.mark.parametrize("name", LIES)
def test_a_header_that_lies_is_refused_before_anything_is_allocated(tmp_path: Path, name: str) -> None:
    raw, fact = LIES[name]
    path = tmp_path / "a.gguf"
    with path.open("wb") as file:
        file.write(raw)
        file.truncate(300 << 20)  # sparse; so that a length of hundreds of megabytes is no lie at first sight
    with pytest.raises(InputError, match=fact):
        measured(path)


def test_a_tensor_that_overlaps_another_is_refused(tmp_path: Path) -> None:
    raw = bytearray(ours())
    at = raw.index(b"q.weight") + 8 + 4 + 16 + 4
    assert raw[at : at + 8] == struct.pack("<Q", 416)
    raw[at : at + 8] = struct.pack("<Q", 384)
    (tmp_path / "a.gguf").write_bytes(raw)
    with pytest.raises(InputError, match=r"q\.weight overlap another"):
        read_header(tmp_path / "a.gguf")


@pytest.mark.parametrize("alignment", [0, 1, 33, 48, 1 << 31, "32"])
def test_an_alignment_that_is_none_is_refused(tmp_path: Path, alignment: int | str) -> None:
    kv = encode_kv("general.alignment", alignment, GGUFType.STRING if alignment == "32" else GGUFType.UINT32)
    head = header(KVS, TENSORS)
    (tmp_path / "a.gguf").write_bytes(head[:16] + struct.pack("<Q", len(KVS) + 1) + kv.raw + head[24:] + bytes(4096))
    with pytest.raises(InputError, match="has the alignment"):
        read_header(tmp_path / "a.gguf")


def measured(path: Path) -> Checkpoint | None:
    tracemalloc.start()
    try:
        return open_path(path, "fuzz.gguf")
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 8 << 20


@given(st.integers(0, 400), st.binary(min_size=1, max_size=8))
def test_any_damage_is_an_input_error_or_harmless(
    tmp_path_factory: pytest.TempPathFactory, at: int, junk: bytes
) -> None:
    path = tmp_path_factory.getbasetemp() / "fuzz.gguf"
    raw = bytearray(ours())
    raw[at : at + len(junk)] = junk
    path.write_bytes(raw)
    try:
        found = measured(path)
    except InputError as error:
        str(error).encode()
        return
    assert found is not None
    assert all(t.offset + t.nbytes <= len(raw) for t in found.tensors.values())
    for kv in found.kvs:
        decode_kv(kv)


@pytest.mark.parametrize("value", [("x", GGUFType.STRING), (-1, GGUFType.INT32), (2, GGUFType.UINT16)])
def test_a_part_of_a_split_file_under_another_name_is_refused(tmp_path: Path, value: tuple[object, GGUFType]) -> None:
    (tmp_path / "a.gguf").write_bytes(ours(kvs=[*KVS, encode_kv("split.count", *value)]))
    with pytest.raises(InputError, match="under another name"):
        open_path(tmp_path / "a.gguf", "a")


def test_a_tensor_in_two_parts_of_a_split_file_is_refused(tmp_path: Path) -> None:
    split = [encode_kv("split.count", 2, GGUFType.UINT16)]
    for number in (1, 2):
        (tmp_path / f"m-0000{number}-of-00002.gguf").write_bytes(ours(kvs=[*KVS, *split]))
    with pytest.raises(InputError, match=r"t\.weight is in m-00001-of-00002\.gguf too"):
        open_path(tmp_path / "m-00001-of-00002.gguf", "m")


def test_a_missing_part_of_a_split_file_is_named(tmp_path: Path) -> None:
    split = [encode_kv("split.count", 3, GGUFType.UINT16), encode_kv("split.no", 0, GGUFType.UINT16)]
    path = tmp_path / "m-00001-of-00003.gguf"
    path.write_bytes(ours(kvs=[*KVS, *split]))
    with pytest.raises(InputError, match=r"m-00002-of-00003\.gguf"):
        open_path(path, str(path))


def test_parts_of_a_split_file_are_one_checkpoint(tmp_path: Path) -> None:
    for number in (1, 2):
        split = [encode_kv("split.count", 2, GGUFType.UINT16), encode_kv("split.no", number - 1, GGUFType.UINT16)]
        part = ours([(f"t{number}.weight", (3, 32), "F32")], [*KVS, *split] if number == 1 else split)
        (tmp_path / f"m-0000{number}-of-00002.gguf").write_bytes(part)
    for named in (1, 2):
        found = open_path(tmp_path / f"m-0000{named}-of-00002.gguf", "m")
        assert [(t.name, t.file) for t in found.tensors.values()] == [("t1.weight", 0), ("t2.weight", 1)]
        assert found.kvs == tuple(KVS)


def test_random_bytes_are_no_gguf(tmp_path: Path) -> None:
    rng = random.Random(3)
    for size in (1, 24, 5000):
        path = tmp_path / "r.gguf"
        path.write_bytes(b"GGUF" + rng.randbytes(size))
        with pytest.raises(InputError):
            read_header(path)
