"""Targets that are cut into shards, and options of GGUF targets, through the whole engine."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest

import qbuild
from qbuild import recipe, schema, upkeep
from qbuild.errors import ConfigError
from qbuild.gguffile import read_header
from qbuild.store import Store

DATA = Path(__file__).parent.parent / "data"
NAME = "tiny-llama-Q8_0"


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copy(DATA / "tiny-llama-imatrix.gguf", "im.gguf")


def build(targets: dict[str, dict[str, Any]], source: Path = DATA / "tiny-llama") -> qbuild.Result:
    config = {"model": {"source": str(source)}, "targets": targets, "store": {"dir": "store"}, "out": "out"}
    return qbuild.build(config, quiet=True)


def shards(size: str = "1MB") -> dict[str, dict[str, Any]]:
    return {"q8_0": {"ftype": "Q8_0", "max_shard_size": size}}


def names(result: qbuild.Result) -> list[str]:
    return [path.name for path in result.targets["q8_0"].files]


def test_second_build_of_shards_runs_nothing_and_puts_missing_ones_back() -> None:
    made = build(shards())
    assert names(made) == [f"{NAME}-0000{n}-of-00004.gguf" for n in (1, 2, 3, 4)]
    assert made.targets["q8_0"].path == made.targets["q8_0"].files[0]
    assert made.targets["q8_0"].bytes == sum(path.stat().st_size for path in made.targets["q8_0"].files)
    made.targets["q8_0"].files[2].unlink()
    again = build(shards())
    assert again.targets["q8_0"].verdicts == {"hit": 29}
    assert again.document["totals"]["computed"] == again.document["totals"]["reused"] == 0
    assert all(path.is_file() for path in made.targets["q8_0"].files)


def test_another_size_of_shards_and_the_whole_file_compute_nothing() -> None:
    build(shards())
    assert len(names(build(shards("2MB")))) == 2
    whole = build(shards("1GB"))
    assert names(whole) == [f"{NAME}.gguf"]
    assert whole.document["totals"]["computed"] == 0
    assert not any(kv.key.startswith("split.") for kv in read_header(whole.targets["q8_0"].path).kvs)


def test_shards_that_a_target_of_another_name_made_get_this_ones_names() -> None:
    first = build(shards()).targets["q8_0"]
    second = build({"q8_0": shards()["q8_0"] | {"suffix": "other"}}).targets["q8_0"]
    assert second.verdicts == {"hit": 29}
    assert [path.name for path in second.files] == [f"tiny-llama-other-0000{n}-of-00004.gguf" for n in (1, 2, 3, 4)]
    assert [path.read_bytes() for path in second.files] == [path.read_bytes() for path in first.files]


def test_a_damaged_shard_is_found_and_made_again_the_others_stay() -> None:
    made = build(shards()).targets["q8_0"]
    before = [path.read_bytes() for path in made.files]
    blob = Store(Path("store")).outputs()[1]
    path = Store(Path("store")).blob_path(blob.digest)
    path.chmod(0o600)
    with path.open("r+b") as file:
        file.seek(-64, os.SEEK_END)
        file.write(b"damaged!")
    problems = list(upkeep.verify(Store(Path("store"))))
    assert {p.path.name for p in problems} >= {path.name}
    again = build(shards())
    assert again.targets["q8_0"].verdicts == {"hit": 28, "run": 1}
    assert [path.read_bytes() for path in made.files] == before


def test_gc_keeps_a_target_that_is_cut() -> None:
    build(shards())
    upkeep.gc(Store(Path("store")))
    again = build(shards())
    assert again.targets["q8_0"].verdicts == {"hit": 29}
    assert again.document["totals"]["written_bytes"] == 0


def test_shards_are_a_source_like_the_file_they_were_cut_from() -> None:
    cut = build(shards()).targets["q8_0"].path
    whole = build(shards("1GB")).targets["q8_0"].path
    copy = {"q8_0": {"ftype": "Q8_0", "suffix": "copy"}}
    assert build(copy, cut).targets["q8_0"].digest == build(copy, whole).targets["q8_0"].digest


def test_pruning_computes_nothing_that_the_whole_file_has() -> None:
    build({"q8_0": {"ftype": "Q8_0"}})
    made = build({"q8_0": {"ftype": "Q8_0", "prune_layers": [1]}})
    assert made.targets["q8_0"].path.name.endswith("-Q8_0-pruned.gguf")  # the whole file stays
    assert made.targets["q8_0"].verdicts == {"hit": 20}
    assert len(read_header(made.targets["q8_0"].path).tensors) == 20


def test_targets_whose_headers_are_equal_are_written_apart() -> None:
    """Only the weights of their matrices differ, which no header tells."""
    parts = {n: {"ftype": "Q4_K_M", "imatrix": "im.gguf", "include_weights": [n], "suffix": n} for n in ("up", "gate")}
    both = build(parts).targets
    first, second = (read_header(both[name].path) for name in parts)
    assert first == second
    assert both["up"].digest != both["gate"].digest
    shutil.rmtree("store")
    alone = build({"gate": parts["gate"]}).targets["gate"]
    assert alone.digest == both["gate"].digest


def test_more_shards_than_files_can_be_open_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recipe, "MAX_SHARDS", 3)
    with pytest.raises(ConfigError, match="1MB makes 4 files"):
        build(shards())


@pytest.mark.parametrize(
    ("over", "fact"),
    [
        ({"prune_layers": [3]}, "there is no layer 3"),
        ({"prune_layers": [0, 1, 2]}, "no layer would be left"),
        ({"max_shard_size": "1KB"}, "the first tensor, output_norm.weight, is larger than 1KB"),
        ({"override_kv": {"general.architecture": "qwen2"}}, "describes the weights"),
        ({"override_kv": {"llama.block_count": 2}}, "describes the weights"),
        ({"override_kv": {"split.count": 2}}, "describes the weights"),
        ({"override_kv": {"llama.rope.freq_base": 10000}}, "the model has FLOAT32"),
        ({"override_kv": {"tokenizer.ggml.tokens": "none"}}, "the model has ARRAY"),
        ({"imatrix": "im.gguf", "include_weights": ["nothing"]}, "none of the 21 entries"),
    ],
)
def test_what_llama_quantize_would_do_wrong_in_silence_is_refused(over: dict[str, Any], fact: str) -> None:
    with pytest.raises(ConfigError, match=fact):
        build({"q8_0": {"ftype": "Q8_0", **over}})


@pytest.mark.parametrize(
    ("over", "fact"),
    [
        ({"prune_layers": [-1]}, "-1 is not the number of a layer"),
        ({"prune_layers": 3}, "is not a list"),
        ({"prune_layers": ["3"]}, "is not a whole number"),
        ({"override_kv": {"a": -1}}, "does not fit"),
        ({"override_kv": {"a": 1 << 32}}, "does not fit"),
        ({"override_kv": {"a": float("inf")}}, "does not fit"),
        ({"override_kv": {"a": [1]}}, "cannot be written"),
        ({"override_kv": {"a": "x" * 128}}, "longer than 127 bytes"),
        ({"include_weights": ["a"]}, "no importance matrix"),
        ({"include_weights": ["a"], "exclude_weights": ["b"], "imatrix": "x"}, "both"),
        ({"exclude_weights": [""], "imatrix": "x"}, "empty"),
        ({"max_shard_size": "many"}, "is not a size"),
    ],
)
def test_an_option_that_cannot_be_is_refused(over: dict[str, Any], fact: str) -> None:
    with pytest.raises(ConfigError, match=fact):
        schema.parse({"targets": {"q": {"ftype": "Q8_0", **over}}})
