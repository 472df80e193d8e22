"""Quantizers byte-equal to llama.cpp's on x86-64, and the checks llama-quantize makes.

Weights are float32, float16, or bfloat16 held as uint16: C-contiguous [rows, cols]. Quantized data is uint8
[rows, row bytes]. Importing this package loads no numba: a quantizer's module is imported at its first use, and its
kernel then comes from numba's disk cache, or is compiled (``warm`` does that ahead). Kernels release the GIL.

A quantizer is a module named in ``MODULES`` with ``quantize(name, source, kind, out, cols, imatrix)``: source and out
are flat uint8 arrays, kind is one of simd's F32, F16, BF16.
"""

from __future__ import annotations

import ctypes
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from qbuild.ggml import QTYPES, QType

__all__ = [
    "MODULES", "NEEDS_IMATRIX", "called_files", "cast_into", "dequantize", "first_nonfinite", "invalid_blocks",
    "quantize", "quantize_into", "row_losses", "warm", "warm_losses",
]  # fmt: skip

MODULES = {
    "Q8_0": "legacy",
    "Q4_0": "legacy",
    "Q4_1": "legacy",
    "Q5_0": "legacy",
    "Q5_1": "legacy",
    "Q2_K": "affine",
    "Q4_K": "affine",
    "Q5_K": "affine",
    "Q3_K": "symmetric",
    "Q6_K": "symmetric",
    **dict.fromkeys(("IQ1_S", "IQ1_M"), "split"),
    **dict.fromkeys(("IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S"), "grid"),
    **dict.fromkeys(("IQ4_NL", "IQ4_XS"), "nonlinear"),
    **dict.fromkeys(("MXFP4", "NVFP4"), "microscale"),
    **dict.fromkeys(("TQ1_0", "TQ2_0"), "ternary"),
    **dict.fromkeys(("Q1_0", "Q2_0"), "onebit"),
}
NEEDS_IMATRIX = frozenset({"IQ2_XXS", "IQ2_XS", "IQ1_S"})  # ggml asserts one, whatever the tensor
_UNPACKED = ("legacy", "affine", "symmetric", "onebit")  # modules whose types unpack.py reads
_KINDS = {"F32": 0, "F16": 1, "BF16": 2}
_HELD = {np.dtype(np.float32): "F32", np.dtype(np.float16): "F16", np.dtype(np.uint16): "BF16"}
_DTYPES = {"F32": np.float32, "F16": np.float16, "BF16": np.uint16}

# Where a block keeps its float16 scales (ggml-common.h); what ggml_validate_row_data looks at.
_SCALES: dict[str, tuple[int, ...]] = {
    **dict.fromkeys(("Q8_0", "Q4_0", "Q5_0", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ1_S"), (0,)),
    **dict.fromkeys(("IQ4_NL", "IQ4_XS", "Q1_0", "Q2_0"), (0,)),
    **dict.fromkeys(("Q4_1", "Q5_1", "Q4_K", "Q5_K"), (0, 2)),
    "Q2_K": (80, 82),
    "Q3_K": (108,),
    "Q6_K": (208,),
    "TQ1_0": (52,),
    "TQ2_0": (64,),
    **dict.fromkeys(("MXFP4", "NVFP4", "IQ1_M"), ()),  # no float16 in one place: see _bad_scales
}


def quantize(x: np.ndarray, type: str, imatrix: np.ndarray | None = None, threads: int = 1) -> np.ndarray:  # noqa: A002
    """Weights [rows, cols] to uint8 [rows, row bytes] of a ggml type; see ``quantize_into`` for the errors."""
    rows, cols = x.shape
    out = np.empty((rows, _qtype(type).row_bytes(cols)), np.uint8)
    share = -(-rows // max(1, threads))
    parts = [slice(at, at + share) for at in range(0, rows, share)] if share else []
    if len(parts) < 2:
        quantize_into(x, out, type, imatrix)
        return out
    with ThreadPoolExecutor(len(parts)) as pool:
        for job in [pool.submit(quantize_into, x[part], out[part], type, imatrix) for part in parts]:
            job.result()
    return out


def quantize_into(x: np.ndarray, out: np.ndarray, type: str, imatrix: np.ndarray | None = None) -> None:  # noqa: A002
    """Quantize rows on this thread, without the GIL, with less than 1 MiB of scratch.

    x: float32, float16 or uint16 (bfloat16) [rows, cols]; out: uint8 [rows, row bytes]; imatrix: float32 [cols], the
    mean square of each column's input. F16, BF16 and F32 are casts. Raises ValueError on a shape, dtype or layout that
    does not fit, or where ``type`` needs an imatrix or has no quantizer. Weights must be finite (``first_nonfinite``);
    scales that overflow float16 are stored as they come (``invalid_blocks``).
    """
    rows, cols = x.shape
    q, held = _qtype(type), _held(x)
    if out.shape != (rows, q.row_bytes(cols)) or out.dtype != np.uint8:
        raise ValueError(f"{type}: out is {out.dtype} {out.shape}, not uint8 {(rows, q.row_bytes(cols))}")
    if imatrix is not None and (imatrix.shape != (cols,) or imatrix.dtype != np.float32):
        raise ValueError(f"{type}: imatrix is {imatrix.dtype} {imatrix.shape}, not float32 {(cols,)}")
    if imatrix is None and type in NEEDS_IMATRIX:
        raise ValueError(f"{type} needs an imatrix")
    if type in _KINDS:
        cast_into(x, out.view(_DTYPES[type]), held, type)
    elif out.size:
        weights = None if imatrix is None else _bytes(imatrix).view(np.float32)
        _module(type).quantize(type, _bytes(x), _KINDS[held], _bytes(out), cols, weights)


def cast_into(x: np.ndarray, out: np.ndarray, src_dtype: str, dst_type: str) -> None:
    """Cast between F32, F16 and BF16 (round to nearest even), bit-equal to ggml. x and out: one shape, C-contiguous."""
    if x.shape != out.shape or x.dtype != _DTYPES[src_dtype] or out.dtype != _DTYPES[dst_type]:
        raise ValueError(f"cannot cast {src_dtype} {x.dtype} {x.shape} to {dst_type} {out.dtype} {out.shape}")
    if src_dtype == dst_type:
        np.copyto(out, x)
    elif x.size:
        import_module("qbuild.kernels.cast").cast(_bytes(x), _KINDS[src_dtype], _bytes(out), _KINDS[dst_type], x.size)


def dequantize(data: np.ndarray, type: str) -> np.ndarray:  # noqa: A002
    """uint8 [rows, row bytes] to float32 [rows, cols], bit-equal to ggml; other types by the gguf package."""
    q = _qtype(type)
    rows, blocks = data.shape[0], data.shape[1] // q.nbytes
    if type in _KINDS:
        out = np.empty((rows, blocks), np.float32)
        cast_into(data.view(_DTYPES[type]), out, type, "F32")
        return out
    if MODULES[type] not in _UNPACKED:
        from gguf import GGMLQuantizationType
        from gguf.quants import dequantize as gguf_dequantize

        return np.ascontiguousarray(gguf_dequantize(data, GGMLQuantizationType[type]), np.float32)
    out = np.empty((rows, blocks * q.block), np.float32)
    import_module("qbuild.kernels.unpack").dequantize(type, _bytes(data), out.reshape(-1))
    return out


def first_nonfinite(x: np.ndarray) -> int | None:
    """The first row of x with a NaN or an infinity, or None. One pass at the speed of memory."""
    at = import_module("qbuild.kernels.cast").first_nonfinite(_bytes(x), _KINDS[_held(x)], x.size)
    return None if at < 0 else at // x.shape[-1]


def invalid_blocks(out: np.ndarray, type: str) -> int | None:  # noqa: A002
    """The first block (counted over all rows) whose scale is NaN or infinite, or None. llama-quantize stops there."""
    if type in _KINDS:
        at = import_module("qbuild.kernels.cast").first_nonfinite(
            _bytes(out), _KINDS[type], out.size // _stored(type).nbytes
        )
        return None if at < 0 else at
    blocks = out.reshape(-1, _stored(type).nbytes)
    for at in range(0, len(blocks), 1 << 14):
        bad = _bad_scales(blocks[at : at + (1 << 14)], type)
        if bad.any():
            return at + int(bad.argmax())
    return None


def _bad_scales(blocks: np.ndarray, type: str) -> np.ndarray:  # noqa: A002
    if type == "MXFP4":
        return blocks[:, 0] == 0xFF
    if type == "IQ1_M":  # the float16 is spread over the top nibbles of four words
        return (blocks[:, 55] & 0x70 == 0x70) & (blocks[:, 53] & 0xC0 == 0xC0)
    bad = np.zeros(len(blocks), bool)
    for at in _SCALES[type]:
        bad |= blocks[:, at + 1] & 0x7C == 0x7C
    return bad


def row_losses(made: np.ndarray, wanted: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """float64 [rows]: Σ weights[j] (made[i, j] - wanted[i, j])², whatever rows come together. made, wanted: float32
    [rows, cols], C-contiguous; weights: float32 [cols]."""
    losses: np.ndarray = import_module("qbuild.kernels.loss").row_losses(made, wanted, weights)
    return losses


def warm(types: Any, dtype: str = "F32", imatrix: bool = True) -> None:
    """Load the kernels of ``types`` from the disk cache, or compile them. One kernel serves every source dtype."""
    for name in types:
        cols = 8 * QTYPES[name].block
        x = np.zeros((1, cols), _DTYPES.get(dtype, np.float32))
        out = np.empty((1, QTYPES[name].row_bytes(cols)), np.uint8)
        if name not in NEEDS_IMATRIX:
            quantize_into(x, out, name)
        if imatrix and name in MODULES:
            quantize_into(x, out, name, np.ones(cols, np.float32))
        first_nonfinite(x)


def warm_losses(types: Any) -> None:
    """The same for ``dequantize`` of ``types`` and ``row_losses``."""
    for name in types:
        values = dequantize(np.zeros((1, QTYPES[name].nbytes), np.uint8), name)
        row_losses(values, values, np.ones(values.shape[1], np.float32))


def called_files() -> list[Path]:
    """Files of the disk cache that hold the kernels which were called since this was asked last."""
    found: list[Path] = import_module("qbuild.kernels.simd").called_files()
    return found


def _stored(name: str) -> QType:
    if name not in _SCALES and name not in _KINDS:
        raise ValueError(f"blocks of {name} are not checked; those of {', '.join([*_KINDS, *_SCALES])} are")
    return QTYPES[name]


def _qtype(name: str) -> QType:
    if name not in MODULES and name not in _KINDS:
        raise ValueError(f"no quantizer for {name}; there are {', '.join([*_KINDS, *MODULES])}")
    return QTYPES[name]


def _module(name: str) -> Any:
    return import_module(f"qbuild.kernels.{MODULES[name]}")


def _held(x: np.ndarray) -> str:
    if x.dtype not in _HELD:
        raise ValueError(f"weights are {x.dtype}; float32, float16 or uint16 (bfloat16) can be read")
    return _HELD[x.dtype]


def _bytes(x: np.ndarray) -> np.ndarray:
    """The bytes of a C-contiguous array, flat. Never read-only: numba would compile a second kernel for that."""
    if not x.flags.c_contiguous:
        raise ValueError("the array is not C-contiguous")
    if x.flags.writeable or not x.size:
        return x.reshape(-1).view(np.uint8)
    return np.ctypeslib.as_array((ctypes.c_uint8 * x.nbytes).from_address(x.ctypes.data))
