"""``calibration.sensitivity``: what errors of each weight cost at the model's end, from one pass back through it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from qbuild.checkpoint import Checkpoint
from qbuild.digest import Digest

KIND = "calibration.sensitivity"
SALT = 1
VERSIONS = ("torch", "transformers")
WINDOWS = 32  # of the calibration's; what is summed over all rows and columns of a tensor needs no more


@dataclass(frozen=True)
class Params:
    """``windows``: at most so many of the tokens' windows, evenly spread; ``dtype``: float32 or bfloat16 arithmetic;
    ``device``: cpu or cuda, whose sums differ in their last bits."""

    windows: int
    dtype: str
    device: str


@dataclass(frozen=True)
class Task:
    key: str
    params: Params
    checkpoint: Checkpoint
    tokens: Digest
    states: Path
    threads: int
