"""Bad input: a clear error with the right exit code, the store intact, the next run fine."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest


def rewrite_header(path: Path, change) -> None:
    """Change the JSON header of a safetensors file, keeping its data."""
    data = path.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])


def test_truncated_shard_is_refused_before_work(space: Any) -> None:
    path = space.model / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    error = space.run(code=4)["error"]
    assert "model.safetensors" in error["place"] + error["fact"]
    assert not space.store.exists() or not any((space.store / "blobs").rglob("*/*"))


def test_missing_shard_is_named(space: Any) -> None:
    names = {"model.norm.weight": "model-00002-of-00002.safetensors"}
    (space.model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    (space.model / "model.safetensors").unlink()
    assert "model-00002-of-00002.safetensors" in json.dumps(space.run(code=4)["error"])


def test_nan_weight_is_refused_with_its_tensor_and_row_and_the_rest_is_kept(space: Any) -> None:
    path = space.model / "model.safetensors"
    good = path.read_bytes()
    name = "model.layers.2.mlp.down_proj.weight"
    length = struct.unpack("<Q", good[:8])[0]
    entry = json.loads(good[8 : 8 + length])[name]
    at = 8 + length + entry["data_offsets"][0] + 2 * (5 * entry["shape"][1] + 3)
    path.write_bytes(good[:at] + b"\xc0\x7f" + good[at + 2 :])
    error = space.run(code=4)["error"]
    assert name in error["place"]
    assert "row 5" in error["fact"]
    assert not space.output().exists()
    path.write_bytes(good)
    result = space.run()
    assert result["totals"]["reused"] > 0


def test_unknown_architecture_names_the_nearest(space: Any) -> None:
    config = json.loads((space.model / "config.json").read_text())
    config["architectures"] = ["LlamoForCausalLM"]
    (space.model / "config.json").write_text(json.dumps(config))
    error = space.run(code=4)["error"]
    assert "LlamoForCausalLM" in error["fact"]
    assert "LlamaForCausalLM" in error["fact"] + error["remedy"]


def test_missing_tensor_is_named(space: Any) -> None:
    rewrite_header(space.model / "model.safetensors", lambda h: h.pop("model.layers.1.self_attn.k_proj.weight"))
    space.run(code=4)


def test_pickle_checkpoint_is_refused_with_the_way_out(space: Any) -> None:
    (space.model / "model.safetensors").unlink()
    (space.model / "pytorch_model.bin").write_bytes(b"\x80\x02}q\x00.")
    error = space.run(code=4)["error"]
    assert "save_pretrained" in error["remedy"]


def test_missing_folder_is_an_input_error(space: Any) -> None:
    space.model = space.root / "not-there"
    space.run(code=4)


@pytest.mark.parametrize(
    "word", ["targets.q4_k_m.output_type=Q9_K", "targets.q4_k_m.outputtype=Q8_0", "budget.ram=16G", "nonsense"]
)
def test_wrong_words_are_usage_errors(space: Any, word: str) -> None:
    assert space.run(word, code=2)["error"]["exit_code"] == 2


def test_budget_too_small_is_refused_with_a_remedy_that_works(space: Any) -> None:
    error = space.run("budget.ram=64MiB", code=3)["error"]
    assert not space.store.exists() or not any((space.store / "blobs").rglob("*/*"))
    override = error["remedy"].split("→ ")[1].splitlines()[0].strip()
    space.run(override)
