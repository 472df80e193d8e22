"""What a linear's inputs are like: the Gram matrix G = XᵀX of all tokens, its diagonal, and the mean of |X|.

One pass over a text serves every format. imatrix is the diagonal and the count; GPTQ's Hessian is 2G (Frantar et al.
2022, arXiv:2210.17323); the error of a rounded weight in AWQ's search (Lin et al. 2023, arXiv:2306.00978) is
tr((W−Ŵ) G (W−Ŵ)ᵀ), the same number as over the activations themselves.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

__all__ = ["Input", "Statistics", "notices"]

STARVED = 128  # tokens: fewer say little about an expert's inputs


class Counted(Protocol):
    """Linears that read one input, and for how many tokens."""

    @property
    def shared(self) -> tuple[str, ...]: ...

    @property
    def count(self) -> int: ...


def notices(layer: int, inputs: Iterable[Counted], unreached: Collection[str]) -> tuple[str, ...]:
    """What a user should know: experts that saw few tokens or none, of which the statistics say little."""
    sizes = [(len(found.shared), found.count) for found in inputs]
    starved = sum(linears for linears, count in sizes if count < STARVED)
    if not starved and not unreached:
        return ()
    linears = sum(linears for linears, _ in sizes) + len(unreached)
    few = f"{starved + len(unreached)} of {linears} linears saw fewer than {STARVED} tokens"
    none = f", {len(unreached)} of them none" if unreached else ""
    return (f"layer {layer}: {few}{none}; more samples reach more experts",)


@dataclass(frozen=True)
class Input:
    """What one or several linears read, over all tokens of a calibration.

    ``name`` is the first of them and ``shared`` are all, by their checkpoint names without ``.weight``. A matrix of a
    stacked tensor has its number in brackets: ``model.layers.0.mlp.experts.down_proj[3]``. ``count`` is the number of
    tokens; ``diagonal`` [n] is a sum over them, ``mean_abs`` [n] a mean, ``upper`` [n (n + 1) / 2] the upper triangle
    of the Gram matrix row by row (``triangle``); all float32.
    """

    name: str
    shared: tuple[str, ...]
    count: int
    upper: np.ndarray | None
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

    def to_bytes(self) -> bytearray:
        """Canonical: the same numbers are the same bytes.

        In the safetensors format, written in place: Gram matrices are the largest objects of a pass.
        """
        header: dict[str, Any] = {"__metadata__": {"qbuild": self._about()}}
        parts: list[tuple[int, np.ndarray]] = []
        end = 0
        for found in self.inputs:
            for kind, array in (("gram", found.upper), ("diagonal", found.diagonal), ("mean_abs", found.mean_abs)):
                if array is None:
                    continue
                header[f"{found.name}.{kind}"] = {
                    "dtype": "F32", "shape": [array.size], "data_offsets": [end, end + array.nbytes]
                }  # fmt: skip
                parts.append((end, array))
                end += array.nbytes
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        made = bytearray(8 + len(text) + end)
        made[: 8 + len(text)] = len(text).to_bytes(8, "little") + text
        values = np.frombuffer(made, np.float32, offset=8 + len(text))
        for start, array in parts:
            values[start // 4 : start // 4 + array.size] = array
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
            upper = values(f"{name}.gram").copy() if held else None
            inputs.append(Input(name, tuple(shared), count, upper, diagonal, values(f"{name}.mean_abs").copy()))
        return Statistics(about["layer"], tuple(inputs), tuple(about["unreached"]))
