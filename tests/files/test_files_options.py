"""Whole files with options, of GGUF sources, and in shards, against what llama.cpp's tools made (tests/reference)."""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
from collections.abc import Mapping
from contextlib import chdir
from itertools import groupby
from pathlib import Path
from typing import Any

import blake3
import pytest

import qbuild

REFERENCE = Path(__file__).parent.parent / "reference"
DATA = REFERENCE.parent / "data"
RECORDED: dict[str, dict[str, str]] = json.loads((REFERENCE / "options.json").read_text())["files"]


def _cases() -> Any:
    sys.path.insert(0, str(REFERENCE))  # it takes a function of make_reference.py
    try:
        spec = importlib.util.spec_from_file_location("make_options", REFERENCE / "make_options.py")
        assert spec is not None
        assert spec.loader is not None
        module = sys.modules["make_options"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(REFERENCE))
    return module.CASES


CASES = _cases()


def built(folder: Path, source: Path, targets: Mapping[str, Any]) -> dict[str, tuple[Path, ...]]:
    """The files of each target. A GGUF source may be quantized already."""
    model = {"source": str(source), "allow_requantize": True}
    config = {"model": model, "targets": targets, "store": {"dir": str(folder / "store")}, "out": str(folder / "out")}
    with chdir(folder):  # the files note the matrix's path as it is typed
        made = qbuild.build(config, quiet=True).targets
    return {name: target.files for name, target in made.items()}


def source_of(folder: Path, case: Any) -> Path:
    source = DATA / "tiny-llama"
    for ftype in case.sources:
        cut = {"max_shard_size": f"{case.cut}B"} if case.cut else {}
        source = built(folder, source, {"source": {"ftype": ftype, "suffix": f"source-{ftype}", **cut}})["source"][0]
    return source


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, ...]]:
    """By case. Those with one source are one build."""
    folder = tmp_path_factory.mktemp("options")
    shutil.copy(DATA / "tiny-llama-imatrix.gguf", folder)
    found: dict[str, tuple[Path, ...]] = {}
    in_order = sorted(CASES, key=lambda name: (CASES[name].sources, CASES[name].cut or ""))
    for _, names in groupby(in_order, key=lambda name: (CASES[name].sources, CASES[name].cut)):
        targets = {}
        for name in names:
            case, suffix = CASES[name], name.replace(" ", "-")
            cut = {"max_shard_size": f"{case.shards}B"} if case.shards else {}
            targets[name] = {"ftype": case.ftype, "suffix": suffix, **case.target, **cut}
        found |= built(folder, source_of(folder, case), targets)
    return found


@pytest.mark.parametrize("name", CASES)
def test_options_and_sources_give_llama_cpps_files(name: str, files: dict[str, tuple[Path, ...]]) -> None:
    digests = {
        path.name.rpartition(name.replace(" ", "-"))[2]: (
            f"{blake3.blake3(path.read_bytes()).hexdigest()}/{path.stat().st_size}"
        )
        for path in files[name]
    }
    assert digests == RECORDED[name]
