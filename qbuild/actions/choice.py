"""``gguf.choice``: the type of every tensor of a file that must not be larger than a size, from measured damages."""

from __future__ import annotations

from dataclasses import dataclass

from qbuild.digest import Digest
from qbuild.inputs import InputFile

KIND = "gguf.choice"
SALT = 1
VERSIONS = ("scipy",)
RAM = 110 << 20  # a worker with scipy and the program


@dataclass(frozen=True)
class Params:
    """``max_bytes`` of the whole file. ``tensors``: (name, shape, types that it can get) in file order; ``imatrix``:
    how the file names its importance matrix."""

    max_bytes: int
    tensors: tuple[tuple[str, tuple[int, ...], tuple[str, ...]], ...]
    imatrix: str | None


@dataclass(frozen=True)
class Task:
    """``damages``: (tensor, type, digest of the number); ``matrix``: an importance matrix, given or made."""

    target: str
    key: str
    params: Params
    metadata: Digest
    damages: tuple[tuple[str, str, Digest], ...]
    matrix: InputFile | Digest | None
