"""What a linear's inputs are like: the Gram matrix G = XᵀX of all tokens, its diagonal, and the mean of |X|.

One pass over a text serves every format. imatrix is the diagonal and the count; GPTQ's Hessian is 2G (Frantar et al.
2022, arXiv:2210.17323); the error of a rounded weight in AWQ's search (Lin et al. 2023, arXiv:2306.00978) is
tr((W−Ŵ) G (W−Ŵ)ᵀ), the same number as over the activations themselves.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import numpy as np

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

    def to_bytes(self) -> bytearray:
        """Canonical: the same numbers are the same bytes. Of a Gram matrix the upper triangle is kept, row by row.

        In the safetensors format, written in place: Gram matrices are the largest objects of a pass.
        """
        header: dict[str, Any] = {"__metadata__": {"qbuild": self._about()}}
        parts: list[tuple[int, np.ndarray]] = []
        end = 0
        for found in self.inputs:
            for kind, array in (("gram", found.gram), ("diagonal", found.diagonal), ("mean_abs", found.mean_abs)):
                if array is None:
                    continue
                size = array.size if array.ndim == 1 else _packed_size(len(array))
                header[f"{found.name}.{kind}"] = {
                    "dtype": "F32", "shape": [size], "data_offsets": [end, end + 4 * size]
                }  # fmt: skip
                parts.append((end, array))
                end += 4 * size
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        made = bytearray(8 + len(text) + end)
        made[: 8 + len(text)] = len(text).to_bytes(8, "little") + text
        values = np.frombuffer(made, np.float32, offset=8 + len(text))
        for start, array in parts:
            _pack(array, values[start // 4 :])
        return made

    def _about(self) -> str:
        inputs = [[found.name, found.shared, found.count] for found in self.inputs]
        about = {"layer": self.layer, "inputs": inputs, "unreached": self.unreached}
        return json.dumps(about, separators=(",", ":"))

    @staticmethod
    def from_bytes(data: bytes | bytearray, *, grams: bool = True) -> Statistics:
        """Raises ValueError or KeyError for bytes that ``to_bytes`` did not make. Without ``grams`` they stay out."""
        start = 8 + int.from_bytes(data[:8], "little")
        header = json.loads(data[8:start])
        about = json.loads(header["__metadata__"]["qbuild"])

        def values(name: str) -> np.ndarray:
            begin, end = header[name]["data_offsets"]
            return np.frombuffer(data, np.float32, (end - begin) // 4, start + begin)

        inputs = []
        for name, shared, count in about["inputs"]:
            diagonal = values(f"{name}.diagonal").copy()
            held = grams and f"{name}.gram" in header
            gram = _square(values(f"{name}.gram"), len(diagonal)) if held else None
            inputs.append(Input(name, tuple(shared), count, gram, diagonal, values(f"{name}.mean_abs").copy()))
        return Statistics(about["layer"], tuple(inputs), tuple(about["unreached"]))


def _packed_size(n: int) -> int:
    return n * (n + 1) // 2


def _pack(array: np.ndarray, into: np.ndarray) -> None:
    if array.ndim == 1:
        into[: len(array)] = array
        return
    at, n = 0, len(array)
    for row in range(n):
        into[at : at + n - row] = array[row, row:]
        at += n - row


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
