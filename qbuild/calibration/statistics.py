"""What a linear's inputs are like: the Gram matrix G = XᵀX of all tokens, its diagonal, and the mean of |X|.

One pass over a text serves every format. imatrix is the diagonal and the count; GPTQ's Hessian is 2G (Frantar et al.
2022, arXiv:2210.17323); the error of a rounded weight in AWQ's search (Lin et al. 2023, arXiv:2306.00978) is
tr((W−Ŵ) G (W−Ŵ)ᵀ), the same number as over the activations themselves.
"""

from __future__ import annotations

import json
from dataclasses import dataclass

import numpy as np
from safetensors.numpy import load, save

__all__ = ["Input", "Statistics", "mirrored"]

BLOCK = 256
STARVED = 128  # tokens: fewer say little about an expert's inputs


@dataclass(frozen=True)
class Input:
    """What one or several linears read, over all tokens of a calibration.

    ``name`` is the first of them and ``shared`` are all, by their checkpoint names without ``.weight``. A matrix of a
    stacked tensor has its number in brackets: ``model.layers.0.mlp.experts.down_proj[3]``. ``count`` is the number of
    tokens; ``gram`` [n, n] and ``diagonal`` [n] are sums over them, ``mean_abs`` [n] is a mean; all float32.
    """

    name: str
    shared: tuple[str, ...]
    count: int
    gram: np.ndarray | None
    diagonal: np.ndarray
    mean_abs: np.ndarray


@dataclass(frozen=True)
class Statistics:
    """The inputs of one decoder layer, sorted by name. ``unreached`` are linears of experts that saw no token."""

    layer: int
    inputs: tuple[Input, ...]
    unreached: tuple[str, ...] = ()

    def of(self, linear: str) -> Input:
        """The input of a linear by its checkpoint name without ``.weight``. Raises KeyError."""
        for found in self.inputs:
            if linear in found.shared:
                return found
        raise KeyError(linear)

    def notices(self) -> tuple[str, ...]:
        """What a user should know: experts that saw few tokens or none, of which the statistics say little."""
        starved = sum(len(found.shared) for found in self.inputs if found.count < STARVED)
        if not starved and not self.unreached:
            return ()
        linears = sum(len(found.shared) for found in self.inputs) + len(self.unreached)
        few = f"{starved + len(self.unreached)} of {linears} linears saw fewer than {STARVED} tokens"
        none = f", {len(self.unreached)} of them none" if self.unreached else ""
        return (f"layer {self.layer}: {few}{none}; more samples reach more experts",)

    def to_bytes(self) -> bytes:
        """Canonical: the same numbers are the same bytes. Of a Gram matrix the upper triangle is kept, row by row."""
        tensors: dict[str, np.ndarray] = {}
        for found in self.inputs:
            if found.gram is not None:
                tensors[f"{found.name}.gram"] = _triangle(found.gram)
            tensors[f"{found.name}.diagonal"] = found.diagonal
            tensors[f"{found.name}.mean_abs"] = found.mean_abs
        about = {
            "layer": self.layer,
            "inputs": [[found.name, found.shared, found.count] for found in self.inputs],
            "unreached": self.unreached,
        }
        return bytes(save(tensors, {"qbuild": json.dumps(about, separators=(",", ":"))}))

    @staticmethod
    def from_bytes(data: bytes) -> Statistics:
        """Raises ValueError or KeyError for bytes that ``to_bytes`` did not make."""
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        about = json.loads(header["__metadata__"]["qbuild"])
        tensors = load(data)
        inputs = []
        for name, shared, count in about["inputs"]:
            diagonal, packed = tensors[f"{name}.diagonal"], tensors.pop(f"{name}.gram", None)
            gram = None if packed is None else _square(packed, len(diagonal))
            inputs.append(Input(name, tuple(shared), count, gram, diagonal, tensors[f"{name}.mean_abs"]))
        return Statistics(about["layer"], tuple(inputs), tuple(about["unreached"]))


def _triangle(gram: np.ndarray) -> np.ndarray:
    n = len(gram)
    packed = np.empty(n * (n + 1) // 2, np.float32)
    at = 0
    for row in range(n):
        packed[at : at + n - row] = gram[row, row:]
        at += n - row
    return packed


def _square(packed: np.ndarray, n: int) -> np.ndarray:
    gram = np.empty((n, n), np.float32)
    at = 0
    for row in range(n):
        gram[row, row:] = packed[at : at + n - row]
        at += n - row
    return mirrored(gram)


def mirrored(gram: np.ndarray) -> np.ndarray:
    """A square matrix with its lower triangle made that of its upper one, in place."""
    for start in range(0, len(gram), BLOCK):  # in blocks: whole columns at a time would miss every cache
        rows = slice(start, start + BLOCK)
        for other in range(0, start, BLOCK):
            gram[rows, other : other + BLOCK] = gram[other : other + BLOCK, rows].T
        square = gram[rows, rows]
        square[:] = np.triu(square) + np.triu(square, 1).T
    return gram
