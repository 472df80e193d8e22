"""``evaluation.states`` and ``evaluation.result``: what a source's last layer gives on a text, and how far a target is
from it."""

from __future__ import annotations

from dataclasses import dataclass

from qbuild.arch.convert import TensorSpec
from qbuild.checkpoint import Checkpoint
from qbuild.digest import Digest
from qbuild.quant.shapes import Scheme

STATES, RESULT = "evaluation.states", "evaluation.result"
SALT = 3
VERSIONS = ("torch", "transformers")


@dataclass(frozen=True)
class Params:
    """``dtype``: float32 or bfloat16 arithmetic; ``device``: cpu or cuda, whose sums differ in their last bits."""

    dtype: str
    device: str


@dataclass(frozen=True)
class Target:
    """What is measured: a GGUF file of ``specs``, or files of a directory whose linears are stored by ``scheme``, with
    AWQ's scales where it is ``scaled``."""

    name: str
    key: str
    digests: tuple[Digest, ...]
    specs: tuple[TensorSpec, ...]
    scheme: Scheme | None
    scaled: bool


@dataclass(frozen=True)
class Task:
    """``states``: the source's, if they are stored already; else they are made first and stored under ``key``."""

    checkpoint: Checkpoint
    tokens: Digest
    params: Params
    states: Digest | None
    key: str
    targets: tuple[Target, ...]
    threads: int
