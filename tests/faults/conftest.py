"""Real builds in real processes: a folder to work in, a store of its own, and the command line."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

TINY = Path(__file__).parent.parent / "data" / "tiny-llama"


@dataclass
class Space:
    """``run`` builds as a user would; ``model`` is a private copy of a small real checkpoint."""

    root: Path
    env: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.model, self.store, self.out = self.root / "tiny-llama", self.root / "store", self.root / "out"
        shutil.copytree(TINY, self.model)
        self.env = os.environ | {"XDG_CACHE_HOME": str(self.root / "cache")}

    def command(self, *words: str, target: str = "q4_k_m") -> list[str]:
        targets = target if "=" in target else f"target=gguf/{target}"
        base = [sys.executable, "-m", "qbuild", *words, targets, f"model.source={self.model}"]
        return [*base, f"store.dir={self.store}", f"out={self.out}", "format=json"]

    def run(self, *words: str, target: str = "q4_k_m", code: int = 0) -> dict[str, Any]:
        done = subprocess.run(
            self.command(*words, target=target), env=self.env, capture_output=True, text=True, cwd=self.root
        )
        assert done.returncode == code, f"exit {done.returncode}\n{done.stdout}\n{done.stderr}"
        return json.loads(done.stdout) if done.stdout.strip() else {}

    def start(self, *words: str, target: str = "q4_k_m") -> subprocess.Popen[str]:
        """A build in a process group of its own."""
        return subprocess.Popen(
            self.command(*words, target=target), env=self.env, text=True, cwd=self.root, start_new_session=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip

    def kill_after(self, seconds: float, target: str = "q4_k_m") -> bool:
        """SIGKILL a build (its own process, as the kernel would) after so long; False if it had already ended."""
        process = self.start(target=target)
        time.sleep(seconds)
        alive = process.poll() is None
        process.send_signal(signal.SIGKILL) if alive else None
        process.communicate()
        return alive

    def output(self, target: str = "Q4_K_M") -> Path:
        return self.out / f"tiny-llama-{target}.gguf"


@pytest.fixture
def space(tmp_path: Path) -> Space:
    return Space(tmp_path)


@pytest.fixture
def elsewhere(tmp_path_factory: pytest.TempPathFactory) -> Space:
    """A second space with a store of its own."""
    return Space(tmp_path_factory.mktemp("elsewhere"))
