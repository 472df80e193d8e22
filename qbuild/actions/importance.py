"""``calibration.imatrix``: the statistics of every layer as an importance matrix in llama.cpp's format."""

from __future__ import annotations

from dataclasses import dataclass

from qbuild.arch.convert import TensorSpec
from qbuild.digest import Digest

KIND = "calibration.imatrix"
SALT = 2
RAM = 48 << 20  # a worker with numpy, and the sums of every layer (measured: 40 to 43)


@dataclass(frozen=True)
class Params:
    """``dataset`` is noted in the file. ``tensors``: digest of the GGUF tensors and where their rows come from."""

    dataset: str
    tensors: str


@dataclass(frozen=True)
class Task:
    key: str
    params: Params
    tokens: Digest
    statistics: tuple[Digest, ...]  # by layer
    specs: tuple[TensorSpec, ...]
