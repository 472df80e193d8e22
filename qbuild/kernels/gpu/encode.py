"""``kernels.quantize_into`` on a CUDA device: whole tensors of the device, or chunks that stream through it.

A ``Stream`` belongs to one thread; its copies and kernels are queued on a CUDA stream of its own, so that several
threads overlap what goes up, what is computed and what comes down.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch

from qbuild.ggml import QTYPES
from qbuild.kernels.gpu import blocks as k
from qbuild.kernels.numerators import CODES, SYMMETRIC, steps

__all__ = ["TYPES", "Stream", "footprint", "pin", "quantize", "workspace"]

_LANES = {"BLOCK": 128, "num_warps": 4, "enable_fp_fusion": False}  # one element to a thread: see lanes
_CASTS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.int16}


@dataclass(frozen=True)
class Field:
    """Bytes of a block that hold levels: ``pack`` says how."""

    at: int
    nbytes: int
    run: int
    count: int
    right: int
    bits: int


@dataclass(frozen=True)
class Type:
    """A type: weights one lane searches, highest level (or half the levels, if signed), rules, fields."""

    sub: int
    top: int
    plain: str  # what weighs a weight without an imatrix
    weighted: str  # and with one
    fields: tuple[Field, ...]
    sigma: float = 2.0  # with an imatrix, sigma2 = sigma * mean(x * x)
    first: float = 0.0  # numerators of the search without an imatrix: first + 0.1 * s + top
    tries: int = 0
    minimum: bool = True

    @property
    def legacy(self) -> bool:
        return self.plain == "round"


def _legacy(top: int, minimum: bool) -> Type:
    at = 4 if minimum else 2
    fifth = (Field(at, 4, 1, 8, 4, 1),) if top == 31 else ()
    return Type(32, top, "round", "sigma", (*fifth, Field(at + 4 * len(fifth), 16, 16, 2, 0, 4)), 1.0, minimum=minimum)


TYPES = {
    "Q8_0": Type(32, 255, "round", "round", (Field(2, 32, 32, 1, 0, 8),), minimum=False),
    "Q4_0": _legacy(15, False),
    "Q4_1": _legacy(15, True),
    "Q5_0": _legacy(31, False),
    "Q5_1": _legacy(31, True),
    "Q2_K": Type(16, 3, "magnitude", "sigma", (Field(16, 64, 32, 4, 0, 2),), 1.0, -0.5, 16),
    "Q4_K": Type(32, 15, "average", "sigma", (Field(16, 128, 32, 2, 0, 4),), 2.0, -1.0, 21),
    "Q5_K": Type(
        32, 31, "average", "sigma", (Field(16, 32, 32, 8, 4, 1), Field(48, 128, 32, 2, 0, 4)), 2.0, -0.5, 16
    ),
    "Q3_K": Type(
        16, 4, "square", "sigma", (Field(0, 32, 32, 8, 2, 1), Field(32, 64, 32, 4, 0, 2)), minimum=False
    ),
    "Q6_K": Type(
        16, 32, "square", "imatrix", (Field(0, 128, 64, 2, 0, 4), Field(128, 64, 32, 4, 4, 2)), minimum=False
    ),
}  # fmt: skip


def workspace(name: str, weights: int) -> int:
    """Bytes of device scratch that ``quantize`` takes for a chunk of ``weights``."""
    if name in _CASTS:
        return 0
    t = TYPES[name]
    subs = weights // t.sub
    planes = 0 if t.plain == "round" and t.weighted == "round" else 2 + (name == "Q3_K")
    return 4 * (planes * weights + 10 * subs)


def footprint(name: str, weights: int, cols: int, source_bytes: int = 4) -> int:
    """Bytes of device memory one ``Stream`` holds while chunks of ``weights`` pass through it."""
    out = weights // QTYPES[name].block * QTYPES[name].nbytes
    return workspace(name, weights) + weights * source_bytes + out + 4 * cols


def _numerators(t: Type, weighted: bool) -> tuple[np.ndarray, np.ndarray]:
    """Of the search, and of that for the codes of a block."""
    if not t.minimum:
        half = (t.top + 1) // 2 if t.legacy else t.top
        return -steps(0, 0.1, SYMMETRIC, half), -steps(0, 0.1, SYMMETRIC, 32)
    codes = steps(0, 0.1, CODES, 15 if t.sub == 16 else 63)
    return steps(-0.9, 0.05, range(37), t.top) if weighted else steps(t.first, 0.1, range(t.tries), t.top), codes


@cache
def _on_device(t: Type, weighted: bool, device: Any) -> tuple[Any, Any]:
    """The numerators in device memory, copied once."""
    search, codes = (torch.from_numpy(a).to(device) for a in _numerators(t, weighted))
    return search, codes


def _grid(n: int) -> tuple[int]:
    return (-(-n // _LANES["BLOCK"]),)


class _Job:
    """One chunk: its planes carved from the scratch."""

    def __init__(self, name: str, source: Any, out: Any, cols: int, imatrix: Any, scratch: Any) -> None:
        self.name, self.t, self.source, self.out, self.cols = name, TYPES[name], source, out, cols
        self.imatrix = None if name == "Q8_0" else imatrix
        self.bf16, self.nbytes, self.block = source.dtype == torch.int16, QTYPES[name].nbytes, QTYPES[name].block
        self.n, self.blocks = source.numel() // self.t.sub, source.numel() // self.block
        n, at = self.n, 0
        sizes = {"fits": 5 * n, "d": 2 * n, "codes": 2 * n, "sigma2": n}
        if len(scratch) > 10 * n:
            sizes |= {"x": source.numel(), "w": source.numel()}
        if name == "Q3_K":
            sizes |= {"kept": source.numel()}
        self.planes = {}
        for plane, size in sizes.items():
            self.planes[plane] = scratch[at : at + size]
            at += size

    def run(self) -> None:
        t, p = self.t, self.planes
        weighted = self.imatrix is not None
        if t.legacy and not weighted:
            k.round_legacy[_grid(self.n)](
                self.source, p["fits"], self.out, self.n, self.bf16, t.top, t.minimum, self.nbytes, **_LANES
            )
            self.pack("q8" if t.top == 255 else "round" if t.minimum else "round_signed", t.top)
            return
        search, codes = _on_device(t, weighted, self.source.device)
        self.weigh(weighted)
        if t.minimum:
            self.search_affine(search, codes, weighted)
        else:
            self.search_symmetric(search, codes, weighted)

    def weigh(self, weighted: bool) -> None:
        t, p = self.t, self.planes
        rule = t.weighted if weighted else t.plain
        span = self.cols if t.legacy else 256
        if rule == "sigma":
            runs = self.source.numel() // span
            k.mean_square[_grid(runs)](self.source, p["sigma2"], runs, span, t.sigma, self.bf16, **_LANES)
        imatrix = self.imatrix if weighted else p["x"]
        k.weigh[_grid(self.n)](
            self.source, imatrix, p["sigma2"], p["x"], p["w"], self.n, self.cols, span // t.sub,
            self.bf16, t.sub, rule, **_LANES,
        )  # fmt: skip

    def search_affine(self, search: Any, codes: Any, weighted: bool) -> None:
        t, p = self.t, self.planes
        absolute = self.name == "Q2_K" and not weighted
        k.search_affine[_grid(self.n)](
            p["x"], p["w"], p["fits"], search, self.n, t.sub, float(t.top), len(search), absolute, **_LANES
        )
        if t.legacy:
            k.head_legacy[_grid(self.n)](p["fits"], self.out, self.n, True, self.nbytes, **_LANES)
            self.pack("fitted", float(t.top))
            return
        limit = self.name == "Q5_K" or (self.name == "Q4_K" and not weighted)
        k.scales_affine[_grid(self.blocks)](
            p["fits"], p["codes"].view(torch.int32), p["d"], codes, self.out, self.n, self.blocks,
            256 // t.sub, 15 if t.sub == 16 else 63, self.nbytes, weighted, limit, **_LANES,
        )  # fmt: skip
        self.pack("affine", float(t.top))

    def search_symmetric(self, search: Any, codes: Any, weighted: bool) -> None:
        t, p = self.t, self.planes
        descend = self.name == "Q3_K" and not weighted
        half = float((t.top + 1) // 2 if t.legacy else t.top)
        k.search_scale[_grid(self.n)](
            p["x"], p["w"], p["fits"], p.get("kept", p["x"]), search, self.n, t.sub, half, 19, descend, **_LANES
        )
        if t.legacy:
            k.head_legacy[_grid(self.n)](p["fits"], self.out, self.n, False, self.nbytes, **_LANES)
            self.pack("fitted_signed", half)
            return
        fit = self.name == "Q3_K" and weighted
        k.scales_symmetric[_grid(self.blocks)](
            p["fits"], p["codes"].view(torch.int32), p["d"], codes, self.out, self.n, self.blocks,
            self.name == "Q3_K", fit, **_LANES,
        )  # fmt: skip
        self.pack("descended" if descend else "symmetric", half)

    def pack(self, rule: str, top: float) -> None:
        p = self.planes
        for f in self.t.fields:
            size = self.blocks * f.nbytes
            k.pack[_grid(size)](
                self.source, p["fits"], p["d"], p.get("kept", p["fits"]), self.out, self.n, size,
                self.bf16, self.t.sub, top, rule, self.nbytes, self.block,
                f.at, f.nbytes, f.run, f.count, f.right, f.bits, **_LANES,
            )  # fmt: skip


def quantize(name: str, source: Any, out: Any, cols: int, imatrix: Any = None, scratch: Any = None) -> None:
    """Queue the quantization of whole rows on the current CUDA stream.

    source: float32, float16, or int16 (the bits of bfloat16), flat, finite, below 2**31 weights; out: uint8, flat;
    imatrix: float32 [cols]; scratch: uint8 of at least ``workspace`` bytes, all on one device.
    """
    if name in _CASTS:
        size = source.numel()
        target = out.view(_CASTS[name])
        k.cast[_grid(size)](source, target, size, source.dtype == torch.int16, name, **_LANES)
        return
    need = workspace(name, source.numel())
    if scratch is None:
        scratch = torch.empty(need, dtype=torch.uint8, device=source.device)
    _Job(name, source, out, cols, imatrix, scratch[:need].view(torch.float32)).run()


def pin(buffer: np.ndarray) -> None:
    """Lock a host buffer in memory for the buffer's life, so that copies to and from it run beside kernels."""
    code = int(torch.cuda.cudart().cudaHostRegister(buffer.ctypes.data, buffer.nbytes, 0))
    if code:
        raise RuntimeError(f"cudaHostRegister: error {code} for {buffer.nbytes} bytes")


class Stream:
    """Chunks through a device, from host memory to host memory; for one thread. Holds ``nbytes`` of device memory."""

    def __init__(self, nbytes: int, device: str = "cuda") -> None:
        self.memory = torch.empty(nbytes, dtype=torch.uint8, device=device)
        self.stream = torch.cuda.Stream(device) if self.memory.is_cuda else None

    def quantize_into(self, x: np.ndarray, out: np.ndarray, name: str, imatrix: np.ndarray | None = None) -> None:
        """As ``kernels.quantize_into``; returns when ``out`` is complete. Rows must fit ``footprint``."""
        with torch.cuda.stream(self.stream):
            result = self._queue(x, name, imatrix)
            torch.from_numpy(out.reshape(-1)).copy_(result, non_blocking=True)
            if self.stream is not None:
                self.stream.synchronize()

    def _queue(self, x: np.ndarray, name: str, imatrix: np.ndarray | None) -> Any:
        held = x.view(np.int16) if x.dtype == np.uint16 else x
        host, at = torch.from_numpy(held.reshape(-1)), 0
        need = workspace(name, x.size)
        parts = []
        out_bytes = x.size // QTYPES[name].block * QTYPES[name].nbytes
        for size in (need, host.nbytes, 0 if imatrix is None else imatrix.nbytes, out_bytes):
            parts.append(self.memory[at : at + size])
            at += size
        if at > len(self.memory):
            raise ValueError(
                f"{name}: a chunk of {x.size} weights needs {at} bytes of device memory, not {len(self.memory)}"
            )
        scratch, raw, weights, result = parts
        source = raw.view(host.dtype)
        source.copy_(host, non_blocking=True)
        importance = None
        if imatrix is not None:
            importance = weights.view(torch.float32)
            importance.copy_(torch.from_numpy(imatrix), non_blocking=True)
        quantize(name, source, result, x.shape[1], importance, scratch)
        return result
