"""Fixtures for every part: a folder to work in that shares no cache with the user's, the command line in it, and whole
builds of a small real model."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from qbuild.cli import main


@dataclass(frozen=True)
class Done:
    """How a command ended."""

    code: int
    out: str
    err: str

    @property
    def document(self) -> dict[str, Any]:
        """Standard output as the one JSON document that it must be."""
        return json.loads(self.out)

    @property
    def error(self) -> dict[str, Any]:
        return self.document["error"]


Run = Callable[..., Done]
Build = Callable[..., dict[str, Any]]

TINY = Path(__file__).parent / "data" / "tiny-llama"


@pytest.fixture(autouse=True)
def logging_as_it_was() -> Iterator[None]:
    """Hydra's --info sets up the root logger: left so, numba writes a line for every step of every compilation."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty project folder as the working folder, with a cache of its own."""
    folder = tmp_path / "project"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return folder


@pytest.fixture
def qbuild(project: Path, capfd: pytest.CaptureFixture[str]) -> Run:
    """The command line in this process: ``qbuild("plan", "+recipe=x").code``."""

    def run(*argv: str) -> Done:
        capfd.readouterr()
        code = main(list(argv))
        return Done(code, *capfd.readouterr())

    return run


@pytest.fixture
def model(project: Path) -> Path:
    """A copy of a small real checkpoint that a test may change."""
    folder = project / "tiny-llama"
    shutil.copytree(TINY, folder)
    return folder


@pytest.fixture
def text(project: Path) -> Path:
    path = project / "text.txt"
    path.write_text("\n".join(f"Section {n}: how {n * n} things are told apart by size and colour." for n in range(80)))
    return path


@pytest.fixture
def attempt(qbuild: Run, model: Path, text: Path) -> Run:
    """A command about the model with a little calibration, however it ends."""

    def run(*words: str) -> Done:
        settings = ["calibration.samples=4", "calibration.length=64", "format=json", "device=cpu"]
        return qbuild(*settings, f"model.source={model}", f"calibration.source={text}", *words)

    return run


@pytest.fixture
def build(attempt: Run) -> Build:
    """A build that succeeds: its document."""

    def run(*words: str) -> dict[str, Any]:
        done = attempt(*words)
        assert done.code == 0, done.out + done.err
        return done.document

    return run
