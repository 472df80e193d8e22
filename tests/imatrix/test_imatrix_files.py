"""Importance matrices from strangers: both formats, and everything that can be wrong with one."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest

from qbuild.errors import InputError
from qbuild.gguffile import GGUFType, encode_kv, header
from qbuild.imatrix import load

DATA = Path(__file__).parent.parent / "data" / "tiny-llama-imatrix.gguf"
KVS = [
    encode_kv("general.type", "imatrix", GGUFType.STRING),
    encode_kv("imatrix.datasets", ["a.txt", "b.txt"], GGUFType.ARRAY, GGUFType.STRING),
    encode_kv("imatrix.chunk_count", 3, GGUFType.UINT32),
    encode_kv("imatrix.chunk_size", 512, GGUFType.UINT32),
]


def write(path: Path, tensors: dict[str, np.ndarray], kvs=KVS) -> Path:
    head = header(kvs, [(name, data.shape, "F32") for name, data in tensors.items()])
    body = b"".join(data.tobytes() + bytes(-data.nbytes % 32) for data in tensors.values())
    path.write_bytes(head + body)
    return path


def f32(*values: float) -> np.ndarray:
    return np.array([values], np.float32)


def test_values_are_sums_over_counts_and_a_row_never_seen_counts_as_one(tmp_path: Path) -> None:
    sums = np.array([[2, 4], [7, 9]], np.float32)
    counts = np.array([[2], [0]], np.float32)
    found = load(str(write(tmp_path / "i.gguf", {"w.in_sum2": sums, "w.counts": counts})))
    values = found.values("w", 2, 2, "here")
    assert values is not None
    assert values.tolist() == [[1, 2], [1, 1]]
    assert (found.dataset, found.chunks) == ("a.txt", 3)


def test_old_format_divides_by_calls(tmp_path: Path) -> None:
    path = tmp_path / "i.dat"
    entry = struct.pack("<i", 1) + b"w" + struct.pack("<ii", 4, 2) + struct.pack("<2f", 8, 2)
    path.write_bytes(struct.pack("<i", 1) + entry + struct.pack("<ii", 9, 5) + b"t.txt")
    found = load(str(path))
    assert found.entries["w"].tolist() == [2, 0.5]
    assert (found.dataset, found.chunks) == ("t.txt", 9)


def test_a_matrix_of_another_model_is_refused_with_both_sizes(tmp_path: Path) -> None:
    found = load(str(write(tmp_path / "i.gguf", {"w.in_sum2": f32(1, 2), "w.counts": f32(1)})))
    with pytest.raises(InputError, match="2 values for w, which has 3 columns"):
        found.values("w", 1, 3, "targets.q4")


@pytest.mark.parametrize(
    ("tensors", "kvs", "fact"),
    [
        ({"w.in_sum2": f32(1, float("nan")), "w.counts": f32(1)}, KVS, "NaN"),
        ({"w.in_sum2": f32(1, float("inf")), "w.counts": f32(1)}, KVS, "infinite"),
        ({"w.in_sum2": f32(1, 2)}, KVS, "without fitting counts"),
        ({"w.in_sum2": f32(1, 2, 3), "w.counts": f32(1, 1)}, KVS, "without fitting counts"),
        ({}, KVS, "no entries"),
        ({"w.in_sum2": f32(1), "w.counts": f32(1)}, KVS[:2], "chunk_count"),
    ],
)
def test_a_wrong_matrix_is_refused(tmp_path: Path, tensors: dict[str, np.ndarray], kvs: list, fact: str) -> None:
    with pytest.raises(InputError, match=fact):
        load(str(write(tmp_path / "i.gguf", tensors, kvs)))


@pytest.mark.parametrize("keep", [0, 3, 11, 40, 1000])
def test_a_truncated_matrix_is_refused(tmp_path: Path, keep: int) -> None:
    path = tmp_path / "i.gguf"
    path.write_bytes(DATA.read_bytes()[:keep])
    with pytest.raises(InputError):
        load(str(path))


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"none\.gguf"):
        load(str(tmp_path / "none.gguf"))
