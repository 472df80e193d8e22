"""Quantized linears, whatever layout will hold them: codes, scales and zeros of groups of columns."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from safetensors.torch import load, save

__all__ = ["Codes", "Solved"]


@dataclass(frozen=True)
class Codes:
    """w[o, i] = (codes[o, i] - zeros[o, g]) * scales[o, g] with g = ``groups_of[i]``, or i // group_size without it.

    ``codes`` uint8 [out, in], below 2**bits; ``scales`` float16 [out, groups], not 0; ``zeros`` uint8 [out, groups].
    """

    codes: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor
    bits: int
    group_size: int
    symmetric: bool
    groups_of: torch.Tensor | None = None

    @property
    def columns_group(self) -> torch.Tensor:
        """int64 [in]: the group of each column."""
        if self.groups_of is not None:
            return self.groups_of.long()
        return torch.arange(self.codes.shape[1], device=self.codes.device) // self.group_size

    def split(self, rows: Sequence[int]) -> list[Codes]:
        """Parts of so many rows."""
        parts = zip(*(values.split(list(rows)) for values in (self.codes, self.scales, self.zeros)), strict=True)
        return [replace(self, codes=codes, scales=scales, zeros=zeros) for codes, scales, zeros in parts]

    def dequantize(self) -> torch.Tensor:
        """float32 [out, in]."""
        if self.groups_of is None:  # columns of a group lie side by side: nothing has to be gathered
            grouped = self.codes.unflatten(1, (-1, self.group_size)).float()
            return ((grouped - self.zeros.float()[..., None]) * self.scales.float()[..., None]).flatten(1)
        at = self.columns_group
        return (self.codes.float() - self.zeros.float()[:, at]) * self.scales.float()[:, at]


@dataclass(frozen=True)
class Solved:
    """One layer: linears by checkpoint name without .weight, and plain tensors that changed with them, by name."""

    codes: Mapping[str, Codes]
    tensors: Mapping[str, torch.Tensor]

    def to_bytes(self) -> bytes:
        """Safetensors: the same values are the same bytes. Codes of four and two bits are packed into bytes."""
        tensors = {f"tensor {name}": value.cpu().contiguous() for name, value in self.tensors.items()}
        about = {}
        for name, made in self.codes.items():
            about[name] = [made.bits, made.group_size, made.symmetric, list(made.codes.shape)]
            tensors[f"codes {name}"] = _pack(made.codes, made.bits).cpu()
            tensors[f"scales {name}"], tensors[f"zeros {name}"] = made.scales.cpu(), made.zeros.cpu()
            if made.groups_of is not None:
                tensors[f"groups {name}"] = made.groups_of.cpu()
        return bytes(save(tensors, {"qbuild": json.dumps(about, sort_keys=True)}))

    @staticmethod
    def from_bytes(data: bytes) -> Solved:
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        found, codes = load(data), {}
        for name, (bits, group_size, symmetric, shape) in json.loads(header["__metadata__"]["qbuild"]).items():
            values = _unpack(found[f"codes {name}"], bits, shape)
            parts = found[f"scales {name}"], found[f"zeros {name}"]
            codes[name] = Codes(values, *parts, bits, group_size, symmetric, found.get(f"groups {name}"))
        plain = {n.removeprefix("tensor "): t for n, t in found.items() if n.startswith("tensor ")}
        return Solved(codes, plain)


def _pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    each = 8 // bits
    if bits not in (2, 4) or codes.shape[1] % each:
        return codes
    packed = torch.zeros(codes.shape[0], codes.shape[1] // each, dtype=torch.uint8, device=codes.device)
    for lane in range(each):
        packed |= codes[:, lane::each] << (bits * lane)
    return packed


def _unpack(packed: torch.Tensor, bits: int, shape: list[int]) -> torch.Tensor:
    if list(packed.shape) == shape:
        return packed
    each = 8 // bits
    codes = torch.empty(shape, dtype=torch.uint8)
    for lane in range(each):
        codes[:, lane::each] = (packed >> (bits * lane)) & (2**bits - 1)
    return codes
