"""``calibration.statistics``: what the inputs of one decoder layer's linears look like over the calibration tokens."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qbuild.checkpoint import Checkpoint
from qbuild.digest import Digest

KIND = "calibration.statistics"
SALT = 3
VERSIONS = ("torch", "transformers")


@dataclass(frozen=True)
class Params:
    """``detail``: ``gram`` or ``diagonal``; ``dtype``: float32 or bfloat16 arithmetic; ``device``: cpu or cuda, whose
    sums differ in their last bits."""

    layer: int
    detail: str
    dtype: str
    device: str


@dataclass(frozen=True)
class Task:
    """One forward pass. ``keys`` is by layer: where results go; ``wanted`` those that are missing."""

    checkpoint: Checkpoint
    tokens: Digest
    params: Params  # of the first layer
    keys: Mapping[int, str]
    wanted: frozenset[int]
    states: Path
    spill: bool
    threads: int


@dataclass(frozen=True)
class Made:
    """What the pass did: per layer the statistics' digest; warnings have been shown."""

    digests: Mapping[int, Digest]
    read_bytes: int


def config_of(checkpoint: Checkpoint) -> dict[str, Any]:
    """The configuration that decides arithmetic: without names, paths and the version that wrote it."""
    noise = ("_name_or_path", "transformers_version", "dtype", "torch_dtype")
    return {key: value for key, value in sorted(checkpoint.config.items()) if key not in noise}
