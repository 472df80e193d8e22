"""``quant.backend``: a model directory out of a whole model, by another library in an environment of its own.

What the library writes is checked and laid out anew, as our own directories are: its files hold nothing of the run.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from qbuild.backends.environment import Environment
from qbuild.checkpoint import Checkpoint
from qbuild.digest import Digest
from qbuild.inputs import InputFile
from qbuild.quant.directory import Directory
from qbuild.quant.shapes import Scheme

KIND = "quant.backend"
SALT = 1


@dataclass(frozen=True)
class Params:
    """``lock``: digest of every package of the library's environment. ``files``: as of a directory. ``device``: cpu or
    cuda, whose sums differ in their last bits."""

    backend: str
    lock: str
    scheme: Scheme
    damping: float
    files: str
    device: str


@dataclass(frozen=True)
class Task:
    """``place``: what an error names; ``copies``: files that go along as they are, by name;
    ``scratch``: a folder of the job's own."""

    key: str
    place: str
    checkpoint: Checkpoint
    environment: Environment
    tokens: Digest
    params: Params
    directory: Directory
    copies: Mapping[str, InputFile]
    scratch: Path
    threads: int
