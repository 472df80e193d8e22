"""The GGUF container, against the gguf package, and against damage."""

from __future__ import annotations

import random
from pathlib import Path

import gguf
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qbuild.checkpoint import open_path
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


def test_what_is_written_is_read(tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    path.write_bytes(ours())
    found = read_header(path)
    assert found.kvs == tuple(KVS)
    assert [decode_kv(kv) for kv in found.kvs] == ["llama", 7, 0.5, True, ["é", "", "x"], [1, -2], 1 << 40]
    assert [(t.name, t.shape, t.type) for t in found.tensors] == TENSORS


def test_a_large_vocabulary_is_read_in_steps(tmp_path: Path) -> None:
    path, words = tmp_path / "a.gguf", [f"token number {i}" for i in range(120_000)]
    path.write_bytes(ours(kvs=[*KVS, encode_kv("tokens", words, GGUFType.ARRAY, GGUFType.STRING)]))
    assert decode_kv(read_header(path).kvs[-1]) == words


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


def test_a_header_that_lies_about_its_lengths_allocates_nothing(tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    raw = bytearray(ours())
    raw[16:24] = (1 << 60).to_bytes(8, "little")  # key-value pairs
    path.write_bytes(raw)
    with pytest.raises(InputError):
        read_header(path)


@given(st.integers(0, 400), st.binary(min_size=1, max_size=8))
def test_any_damage_is_an_input_error_or_harmless(
    tmp_path_factory: pytest.TempPathFactory, at: int, junk: bytes
) -> None:
    path = tmp_path_factory.getbasetemp() / "fuzz.gguf"
    raw = bytearray(ours())
    raw[at : at + len(junk)] = junk
    path.write_bytes(raw)
    try:
        open_path(path, "fuzz.gguf")
    except InputError:
        pass


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
    found = open_path(tmp_path / "m-00001-of-00002.gguf", "m")
    assert [(t.name, t.file) for t in found.tensors.values()] == [("t1.weight", 0), ("t2.weight", 1)]
    assert found.kvs == tuple(KVS)


def test_random_bytes_are_no_gguf(tmp_path: Path) -> None:
    rng = random.Random(3)
    for size in (1, 24, 5000):
        path = tmp_path / "r.gguf"
        path.write_bytes(b"GGUF" + rng.randbytes(size))
        with pytest.raises(InputError):
            read_header(path)
