"""docs/families.md: its table is the table, its example runs, and its commands do what it says."""

from __future__ import annotations

import doctest
import json
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from arch.arch_kit import DATA, maker

from qbuild.arch.families import FAMILIES
from qbuild.arch.shapes import text_part

ROOT = Path(__file__).parent.parent.parent
PAGE = ROOT / "docs" / "families.md"
MAKER = maker("make_families")
CONVERTER = """
import pathlib, sys
pathlib.Path(sys.argv[3]).write_bytes(b"converted " + pathlib.Path(sys.argv[1]).name.encode())
"""
QUANTIZER = """#!/bin/sh
cat "$1" > "$2"
"""


def commands() -> list[str]:
    return [line.strip() for line in PAGE.read_text().splitlines() if line.startswith("    ")]


def test_the_page_lists_every_family_and_no_other() -> None:
    listed = re.findall(r"^\| `(\w+)` \| (\S+) \|$", PAGE.read_text(), re.MULTILINE)
    assert listed == [(name, rules.arch) for name, rules in FAMILIES.items()]


def test_every_family_has_files_of_llama_cpps_to_compare_with() -> None:
    recorded = json.loads((DATA / "arch/families.json").read_text())["files"]
    assert recorded.keys() == MAKER.VARIANTS.keys()
    named = [(text_part(over) or over).get("architectures", over["architectures"]) for over in MAKER.VARIANTS.values()]
    assert {name for names in named for name in names} == FAMILIES.keys()


def test_the_example_of_a_family_runs() -> None:
    try:
        done = doctest.testfile(str(PAGE), module_relative=False)
    finally:
        FAMILIES.pop("MineForCausalLM", None)
    assert done.attempted > 5
    assert done.failed == 0


def test_the_command_that_records_writes_what_llama_cpp_made(tmp_path: Path) -> None:
    """With a stand-in for llama.cpp: its two programs, where the command looks for them."""
    llama, record = tmp_path / "llama.cpp", tmp_path / "families.json"
    (llama / "build/bin").mkdir(parents=True)
    (llama / "convert_hf_to_gguf.py").write_text(CONVERTER)
    (llama / "build/bin/llama-quantize").write_text(QUANTIZER)
    (llama / "build/bin/llama-quantize").chmod(0o755)
    shutil.copy(DATA / "arch/families.json", record)
    before = json.loads(record.read_text())["files"]
    line = next(c for c in commands() if "make_families.py" in c)
    places = {"python": sys.executable, "LLAMA_CPP": str(llama), "tests/data/arch/families.json": str(record)}
    words = [places.get(word, word) for word in shlex.split(line)]
    subprocess.run(words, cwd=ROOT, check=True, capture_output=True)
    after = json.loads(record.read_text())["files"]
    assert [name for name in after if after[name] != before[name]] == words[4:]
    assert after["qwen3"]["F16"].endswith(f"/{len('converted Tiny-qwen3-Base')}")


def test_the_tests_that_the_page_names_are_there() -> None:
    line = next(c for c in commands() if "pytest" in c)
    chosen = shlex.split(line)[-1].split(" or ")
    assert set(chosen) <= MAKER.VARIANTS.keys()


def test_what_the_page_does_not_list_is_refused_in_a_plan(project: Path, qbuild: Callable[..., Any]) -> None:
    folder = MAKER.write("deepseek3", project)
    config = json.loads((folder / "config.json").read_text()) | {"architectures": ["DeepseekV9ForCausalLM"]}
    (folder / "config.json").write_text(json.dumps(config))
    done = qbuild("plan", f"model.source={folder}", "target=gguf/q4_k_m")
    assert done.code == 4
    assert "architecture DeepseekV9ForCausalLM is not supported" in done.err
    assert "nearest: DeepseekV3ForCausalLM, DeepseekV2ForCausalLM" in " ".join(done.err.split())
