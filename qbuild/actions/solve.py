"""``quant.layer``: the linears of one decoder layer as codes, by AWQ or GPTQ, out of its weights and its statistics.

Codes, not a layout: every format that packs them shares one result.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from qbuild.checkpoint import Checkpoint
from qbuild.digest import Digest

KIND = "quant.layer"
SALT = 12
VERSIONS = ("torch",)


@dataclass(frozen=True)
class Params:
    """``scaled``: AWQ's scales; ``rounding``: gptq or nearest; ``order`` and ``damping`` are gptq's. ``linears``:
    checkpoint names without .weight."""

    layer: int
    bits: int
    group_size: int
    symmetric: bool
    scaled: bool
    rounding: str
    order: str
    damping: float
    linears: tuple[str, ...]
    device: str


@dataclass(frozen=True)
class Item:
    """One layer to solve: ``tensors`` are all checkpoint tensors of the layer."""

    id: str
    key: str
    params: Params
    statistics: Digest
    tensors: tuple[str, ...]


@dataclass(frozen=True)
class Task:
    checkpoint: Checkpoint
    items: tuple[Item, ...]
    threads: int


@dataclass(frozen=True)
class Made:
    """``outputs`` by action id."""

    outputs: Mapping[str, Digest]
    read_bytes: int
