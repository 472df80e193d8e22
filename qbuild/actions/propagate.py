"""``quant.propagated``: a decoder layer as codes, out of what the quantized layers below it give it to read.

Keyed as statistics are: by the tokens and by all weights up to the layer, which the layers below it are made of.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from qbuild.actions import solve
from qbuild.checkpoint import Checkpoint
from qbuild.digest import Digest

KIND = "quant.propagated"
SALT = 9
VERSIONS = ("torch", "transformers")


@dataclass(frozen=True)
class Params:
    """``rounding``: what is asked of the layer; ``dtype``: float32 or bfloat16 arithmetic of the forward passes."""

    rounding: solve.Params
    dtype: str


@dataclass(frozen=True)
class Item:
    """One layer. ``made``: what it became, if that is stored; ``tensors`` are its checkpoint tensors."""

    id: str
    key: str
    params: Params
    tensors: tuple[str, ...]
    made: Digest | None


@dataclass(frozen=True)
class Task:
    """One target's layers up to the last that is missing, in order."""

    checkpoint: Checkpoint
    tokens: Digest
    items: tuple[Item, ...]
    states: Path
    spill: bool
    threads: int
