"""What runs again, and what does not. Counted in build.json, not guessed from times."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest


def counts(result: dict, target: str) -> dict[str, int]:
    return result["targets"][target]["verdicts"]


TENSORS = 29  # of tiny-llama: 3 layers of 9, the embedding and the last norm


def test_second_build_runs_nothing(space: Any) -> None:
    first = space.run()
    before = space.output().stat()
    second = space.run()
    assert counts(first, "q4_k_m") == {"run": TENSORS}
    assert counts(second, "q4_k_m") == {"hit": TENSORS}
    assert second["totals"]["read_bytes"] == 0
    assert second["targets"]["q4_k_m"]["digest"] == first["targets"]["q4_k_m"]["digest"]
    assert space.output().stat().st_mtime_ns == before.st_mtime_ns


def test_cold_build_reads_the_source_once_and_writes_its_output_once(space: Any) -> None:
    result = space.run(target="target=[gguf/q4_k_m,gguf/q5_k_m,gguf/q8_0]")
    weights = sum(f.stat().st_size for f in space.model.glob("*.safetensors"))
    written = sum(t["bytes"] for t in result["targets"].values())
    assert 0.99 * weights < result["totals"]["read_bytes"] <= weights
    assert result["totals"]["written_bytes"] <= 1.05 * written
    assert json.loads((space.out / "build.json").read_text())["targets"] == result["targets"]


def test_touched_source_is_hashed_once_and_nothing_is_quantized(space: Any) -> None:
    space.run()
    os.utime(space.model / "model.safetensors")
    result = space.run()
    assert counts(result, "q4_k_m") == {"hit": TENSORS}
    assert result["totals"]["computed"] == 0
    assert space.run()["totals"]["read_bytes"] == 0


def test_source_at_another_place_reuses_everything(space: Any) -> None:
    space.run()
    moved = space.root / "elsewhere" / "tiny-llama"
    shutil.copytree(space.model, moved)
    space.model = moved
    assert space.run()["totals"]["computed"] == 0


def test_one_changed_tensor_requantizes_that_tensor_alone(space: Any) -> None:
    space.run()
    flip_source_byte(space.model, "model.layers.1.mlp.up_proj.weight")
    result = space.run()
    assert counts(result, "q4_k_m") == {"hit": TENSORS - 1, "run": 1}


def test_q4_k_s_after_q4_k_m_shares_every_equal_tensor(space: Any) -> None:
    space.run()
    result = space.run(target="q4_k_s")
    plan = space.run("plan", target="q4_k_s")
    assert counts(result, "q4_k_s")["hit"] > TENSORS // 2
    assert sum(counts(result, "q4_k_s").values()) == TENSORS
    assert plan["targets"]["q4_k_s"]["verdict"]["state"] == "hit"


def test_explain_gives_each_input_that_is_not_known_a_reason_of_its_own(space: Any) -> None:
    space.run()
    (found,) = space.run("explain", "q4_k_s", target="q4_k_s")["actions"]
    told = {line.split()[1]: line for line in found["manifest"] if line.startswith("input")}
    missing = {name for name, line in told.items() if "not known yet" in line}
    assert missing
    assert "blk.0.attn_norm.weight" in told.keys() - missing
    assert all(f"not known yet: {name}:" in told[name] for name in missing)


# When a worker has read an eighth of the model, the last weights of it are written anew in their place.
REWRITTEN = """
import sys
if any("qbuild.worker" in word for word in sys.orig_argv):
    from qbuild import checkpoint
    whole = checkpoint.Reader.read_into
    def read_into(self, file, offset, buffer):
        whole(self, file, offset, buffer)
        path, before = self.files[file].path, self.bytes_read - buffer.nbytes
        if before <= path.stat().st_size // 8 < self.bytes_read:
            with path.open("r+b") as opened:
                opened.seek(-4, 2)
                last = opened.read()
                opened.seek(-4, 2)
                opened.write(last[::-1])
    checkpoint.Reader.read_into = read_into
"""


def test_a_model_that_is_written_while_it_is_read_for_the_first_time_makes_no_file(space: Any) -> None:
    hook, before = space.root / "hook", space.env.get("PYTHONPATH", "")
    hook.mkdir()
    (hook / "sitecustomize.py").write_text(REWRITTEN)
    space.env["PYTHONPATH"] = f"{hook}:{before}"
    error = space.run(target="q8_0", code=4)["error"]
    assert (error["place"], error["fact"]) == (str(space.model / "model.safetensors"), "was written while it was read")
    assert not space.output("Q8_0").exists()
    space.env["PYTHONPATH"] = before
    assert counts(space.run(target="q8_0"), "q8_0")["hit"] > 0  # tensors keep what they were read as


def test_rebuild_makes_everything_again_and_the_bytes_are_the_same(space: Any) -> None:
    first = space.run()
    again = space.run("-B")
    assert counts(again, "q4_k_m") == {"run": TENSORS}
    assert again["targets"]["q4_k_m"]["digest"] == first["targets"]["q4_k_m"]["digest"]


def test_deleted_output_is_put_back_without_work(space: Any) -> None:
    space.run()
    space.output().unlink()
    result = space.run()
    assert result["totals"]["computed"] == 0
    assert space.output().exists()


@pytest.mark.parametrize("change", ["budget.threads=1", "budget.ram=600MiB", "out={root}/other"])
def test_how_it_runs_is_not_in_the_key(space: Any, change: str) -> None:
    space.run()
    words = space.command(change.format(root=space.root))
    if change.startswith("out="):
        space.out = space.root / "other"
        words = space.command()
    del words
    assert space.run(*([] if change.startswith("out=") else [change]))["totals"]["computed"] == 0


def flip_source_byte(model: Path, tensor: str) -> None:
    """Change one weight of one tensor in place: the lowest bit of a bf16 mantissa, so it stays finite."""
    path = model / "model.safetensors"
    with path.open("r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        at = 8 + length + header[tensor]["data_offsets"][0]
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 1]))
