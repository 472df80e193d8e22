"""``kernels.quantize_into`` on a CUDA device: whole tensors of the device, or chunks that stream through it.

A ``Stream`` belongs to one thread; its copies and kernels are queued on a CUDA stream of its own, so that several
threads overlap what goes up, what is computed and what comes down.
"""

from __future__ import annotations

import threading
from functools import cache
from typing import Any

import numpy as np
import torch

from qbuild.budget import format_size
from qbuild.errors import ActionFailed
from qbuild.ggml import QTYPES
from qbuild.kernels.gpu import blocks as k
from qbuild.kernels.gpu.table import TYPES, Type, parts, planes
from qbuild.kernels.numerators import CODES, SYMMETRIC, steps

__all__ = ["Stream", "pin", "quantize"]

_LANES = {"BLOCK": 128, "num_warps": 4, "enable_fp_fusion": False}  # one element to a thread: see lanes
_SEARCH = {"BLOCK": 32, "num_warps": 1, "enable_fp_fusion": False}  # no warp waits for another
_LAUNCHING = threading.Lock()  # a first launch loads or compiles, which Triton does not call safe between threads
_KINDS = {torch.float32: "F32", torch.float16: "F16", torch.int16: "BF16"}


def _numerators(t: Type, weighted: bool) -> tuple[np.ndarray, np.ndarray]:
    """Of the search, and of that for the codes of a block."""
    if not t.minimum:
        half = (t.top + 1) // 2 if t.legacy else t.top
        return -steps(0, 0.1, SYMMETRIC, half), -steps(0, 0.1, SYMMETRIC, 32)
    codes = steps(0, 0.1, CODES, 15 if t.sub == 16 else 63)
    return steps(-0.9, 0.05, range(37), t.top) if weighted else steps(t.first, 0.1, range(t.tries), t.top), codes


@cache
def _on_device(t: Type, weighted: bool, device: Any) -> tuple[Any, Any]:
    """The numerators in device memory, copied once. Not for the stream that needs them first: torch keeps a piece of
    the device for each stream that allocates."""
    with torch.cuda.stream(torch.cuda.default_stream(device) if device.type == "cuda" else None):
        search, codes = (torch.from_numpy(a).to(device) for a in _numerators(t, weighted))
    return search, codes


def _grid(n: int, launch: dict[str, int] = _LANES) -> tuple[int]:
    return (-(-n // launch["BLOCK"]),)


class _Job:
    """One chunk: its planes carved from the scratch."""

    def __init__(self, name: str, source: Any, out: Any, cols: int, imatrix: Any, scratch: Any) -> None:
        self.name, self.t, self.source, self.out, self.cols = name, TYPES[name], source, out, cols
        self.imatrix = None if name == "Q8_0" else imatrix
        self.kind, self.nbytes, self.block = _KINDS[source.dtype], QTYPES[name].nbytes, QTYPES[name].block
        self.n, self.blocks = source.numel() // self.t.sub, source.numel() // self.block
        sizes = planes(name, source.numel())
        self.fits, self.d, self.sigma2, self.kept = scratch[: sum(sizes)].split(sizes)

    def run(self) -> None:
        t = self.t
        weighted = self.imatrix is not None
        if t.legacy and not weighted:
            k.round_legacy[_grid(self.n)](
                self.source, self.fits, self.out, self.n, self.kind, t.top, t.minimum, self.nbytes, **_LANES
            )
            self.pack("q8" if t.top == 255 else "round" if t.minimum else "round_signed", t.top)
            return
        search, codes = _on_device(t, weighted, self.source.device)
        if t.minimum:
            self.search_affine(search, codes, weighted)
        else:
            self.search_symmetric(search, codes, weighted)

    def weighed(self, weighted: bool) -> tuple[tuple[Any, ...], tuple[int, int, int], str]:
        """What a search weighs by: source, imatrix and mean squares; how they are indexed; the rule."""
        t = self.t
        rule, span = (t.weighted if weighted else t.plain), (self.cols if t.legacy else 256)
        words = self.source.view(torch.int64)
        if rule == "sigma":
            runs = self.source.numel() // span
            k.mean_square[_grid(runs)](words, self.sigma2, runs, span, t.sigma, self.kind, **_LANES)
        imatrix = words if self.imatrix is None else self.imatrix.view(torch.int64)
        return (words, imatrix, self.sigma2), (self.n, self.cols, span // t.sub), rule

    def search_affine(self, search: Any, codes: Any, weighted: bool) -> None:
        t = self.t
        inputs, sizes, rule = self.weighed(weighted)
        absolute = self.name == "Q2_K" and not weighted
        for calm in (True, False):
            k.search_affine[_grid(self.n, _SEARCH)](
                *inputs, self.fits, self.d, search, *sizes,
                self.kind, t.sub, float(t.top), len(search), absolute, rule, calm, **_SEARCH,
            )  # fmt: skip
        if t.legacy:
            k.head_legacy[_grid(self.n)](self.fits, self.out, self.n, True, self.nbytes, **_LANES)
            self.pack("fitted", float(t.top))
            return
        limit = self.name == "Q5_K" or (self.name == "Q4_K" and not weighted)
        k.scales_affine[_grid(self.blocks, _SEARCH)](
            self.fits, self.d, codes, self.out, self.n, self.blocks,
            256 // t.sub, 15 if t.sub == 16 else 63, self.nbytes, weighted, limit, **_SEARCH,
        )  # fmt: skip
        self.pack("affine", float(t.top))

    def search_symmetric(self, search: Any, codes: Any, weighted: bool) -> None:
        t = self.t
        inputs, sizes, rule = self.weighed(weighted)
        descend = self.name == "Q3_K" and not weighted
        half = float((t.top + 1) // 2 if t.legacy else t.top)
        k.search_scale[_grid(self.n, _SEARCH)](
            *inputs, self.fits, self.kept, search, *sizes, self.kind, t.sub, half, 19, descend, rule, **_SEARCH
        )
        if t.legacy:
            k.head_legacy[_grid(self.n)](self.fits, self.out, self.n, False, self.nbytes, **_LANES)
            self.pack("fitted_signed", half)
            return
        fit = self.name == "Q3_K" and weighted
        k.scales_symmetric[_grid(self.blocks, _SEARCH)](
            self.fits, self.d, codes, self.out, self.n, self.blocks, self.name == "Q3_K", fit, **_SEARCH
        )
        self.pack("descended" if descend else "symmetric", half)

    def pack(self, rule: str, top: float) -> None:
        for f in self.t.fields:
            size = self.blocks * f.nbytes
            k.pack[_grid(size)](
                self.source, self.fits, self.d, self.kept, self.out, self.n, size,
                self.kind, self.t.sub, top, rule, self.nbytes, self.block,
                f.at, f.nbytes, f.run, f.count, f.right, f.bits, **_LANES,
            )  # fmt: skip


def quantize(name: str, source: Any, out: Any, cols: int, imatrix: Any = None, scratch: Any = None) -> None:
    """Queue the quantization of whole rows on the current CUDA stream.

    source: float32, float16, or int16 (the bits of bfloat16), flat, finite, below 2**31 weights; out: uint8, flat;
    imatrix: float32 [cols]; scratch: float32 of at least ``planes`` floats, all on one device, aligned to 256 bytes.
    """
    if scratch is None:
        scratch = torch.empty(sum(planes(name, source.numel())), dtype=torch.float32, device=source.device)
    with _LAUNCHING:
        _Job(name, source, out, cols, imatrix, scratch).run()


def pin(buffer: np.ndarray) -> None:
    """Lock a host buffer in memory for the life of the process, so that copies to and from it run beside kernels.
    Where the system allows no more of that, copies are slower and no less right."""
    torch.cuda.cudart().cudaHostRegister(buffer.ctypes.data, buffer.nbytes, 0)


class Stream:
    """Chunks through a device, from host memory to host memory; for one thread. Holds ``nbytes`` of device memory."""

    def __init__(self, nbytes: int, device: str = "cuda") -> None:
        """Raises ActionFailed where the device has no such memory left."""
        try:
            self.memory = torch.empty(nbytes, dtype=torch.uint8, device=device)
            self.stream = torch.cuda.Stream(device) if self.memory.is_cuda else None
        except torch.OutOfMemoryError:
            free, total = map(format_size, torch.cuda.mem_get_info())
            fact = f"no {format_size(nbytes)} of the GPU's memory is left for it: {free} of {total} are free in all"
            raise ActionFailed("device", fact, "budget.vram=SIZE for less, or device=cpu") from None

    def quantize_into(self, x: np.ndarray, out: np.ndarray, name: str, imatrix: np.ndarray | None = None) -> None:
        """As ``kernels.quantize_into``; returns when ``out`` is complete. Rows must fit ``footprint``."""
        with torch.cuda.stream(self.stream):
            result = self._queue(x, name, imatrix)
            torch.from_numpy(out.reshape(-1)).copy_(result, non_blocking=True)
            if self.stream is not None:
                self.stream.synchronize()

    def _queue(self, x: np.ndarray, name: str, imatrix: np.ndarray | None) -> Any:
        host = torch.from_numpy((x.view(np.int16) if x.dtype == np.uint16 else x).reshape(-1))
        sizes = parts(name, x.size, x.shape[1], host.itemsize)
        if sum(sizes) > len(self.memory):
            raise ValueError(f"{name}: {x.size} weights need {sum(sizes)} bytes of the device, not {len(self.memory)}")
        scratch, raw, weights, result = self.memory[: sum(sizes)].split(sizes)
        importance = None
        if imatrix is not None:  # first: a copy from memory that is not pinned waits for all before it
            importance = weights[: imatrix.nbytes].view(torch.float32)
            importance.copy_(torch.tensor(imatrix), non_blocking=True)
        source = raw[: host.nbytes].view(host.dtype)
        source.copy_(host, non_blocking=True)
        result = result[: x.size // QTYPES[name].block * QTYPES[name].nbytes]
        quantize(name, source, result, x.shape[1], importance, scratch.view(torch.float32))
        return result
