"""What README and docs tell people to type: every command is understood, and those that can run here do."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from qbuild.cli import compose
from qbuild.cli.args import read
from qbuild.cli.verbs import VERBS

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
RUNNABLE = re.compile(r"qbuild (plan |info |graph |explain )?\S*(recipe=(tiny|smollm2)_|recipe=llama\w+ ?|tests/data)")


def blocks(text: str) -> Iterator[str]:
    """Lines of code blocks: fenced, or set in by four blanks after an empty line."""
    fenced, indented, previous = False, False, ""
    for line in text.splitlines():
        if line.lstrip().startswith("```"):
            fenced = not fenced
        elif fenced:
            yield line.strip()
        else:
            indented = line.startswith("    ") and (indented or not previous.strip())
            if indented:
                yield line.strip()
        previous = line


def commands(program: str) -> list[str]:
    found = []
    for page in PAGES:
        lines = (line.removeprefix("$ ") for line in blocks(page.read_text()))
        found += [line.partition(" #")[0].strip() for line in lines if line.startswith(f"{program} ")]
    return list(dict.fromkeys(found))


@pytest.mark.parametrize("line", commands("qbuild"))
def test_a_command_in_the_docs_is_understood(project: Path, line: str) -> None:
    args = read(shlex.split(line)[1:], {name: verb.words for name, verb in VERBS.items()})
    with compose.opened(args, project) as composer:
        if "multirun" in args.switches:
            assert composer.jobs()
        else:
            assert composer.job()


@pytest.mark.parametrize("line", commands("make"))
def test_a_make_target_in_the_docs_exists(line: str) -> None:
    targets = re.findall(r"^([a-z-]+):.*## ", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert line.split()[1] in targets


@pytest.mark.slow
@pytest.mark.parametrize("line", [c for c in commands("qbuild") if RUNNABLE.match(c) and "_q4" in c])
def test_a_command_in_the_docs_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: str) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    words = shlex.split(line)[1:]
    if not line.startswith("qbuild plan") and "recipe=llama" in line:
        pytest.skip("downloads a model")
    done = subprocess.run(
        [sys.executable, "-m", "qbuild", *words, f"out={tmp_path}/out"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_the_readme_shows_commands() -> None:
    assert commands("qbuild")
    assert commands("make")
