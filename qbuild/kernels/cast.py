"""F32, F16, BF16: casts between them, and the search for weights that are not finite.

Casts are bit-equal to ggml_fp32_to_fp16_row, ggml_fp32_to_bf16_row_ref and their inverses.
"""

from __future__ import annotations

import numpy as np

from qbuild.kernels.simd import (
    BF16,
    F16,
    F32,
    any_lane,
    inline,
    kernel,
    load_as,
    load_weights,
    splat,
    store_as,
    to,
    to_bfloat,
    to_half,
    zeros,
)

WIDTH = 64
_U16, _U32, _BOOL = np.uint16, np.uint32, np.bool_


def cast(source: np.ndarray, kind: int, target: np.ndarray, to_kind: int, n: int) -> None:
    """Cast n weights from bytes to bytes; kinds as in simd."""
    _cast(source, kind, target, to_kind, n)


def first_nonfinite(source: np.ndarray, kind: int, n: int) -> int:
    """The index of the first NaN or infinity among n weights, or -1."""
    return _first_nonfinite(source, kind, n)


@kernel
def _cast(source, kind, target, to_kind, n):
    whole = n - n % WIDTH
    for i in range(0, whole, WIDTH):
        _cast_lanes(source, kind, target, to_kind, i, splat(0.0, WIDTH))
    for i in range(whole, n):
        _cast_lanes(source, kind, target, to_kind, i, splat(0.0, 1))


@inline
def _cast_lanes(source, kind, target, to_kind, i, zero):
    v = load_weights(source, kind, i, zero)
    if to_kind == F32:
        store_as(target, 4 * i, v)
    elif to_kind == F16:
        store_as(target, 2 * i, to(to_half(v), _U16))
    elif to_kind == BF16:
        store_as(target, 2 * i, to(to_bfloat(v), _U16))


@kernel
def _first_nonfinite(source, kind, n):
    chunk = 64 * WIDTH
    for at in range(0, n, chunk):
        end = min(at + chunk, n)
        found = zeros(WIDTH, _BOOL)
        whole = end - (end - at) % WIDTH
        for i in range(at, whole, WIDTH):
            found |= _nonfinite(source, kind, i, splat(0.0, WIDTH))
        if any_lane(found) or whole < end:
            for i in range(at, end):
                if any_lane(_nonfinite(source, kind, i, splat(0.0, 1))):
                    return i
    return -1


@inline
def _nonfinite(source, kind, i, like):
    """All exponent bits set: shifting the sign out leaves the exponent on top."""
    if kind == F32:
        return (load_as(source, 4 * i, _U32, like) << 1) >= 0xFF000000
    word = load_as(source, 2 * i, _U16, like) << 1
    return (word >= 0xF800) if kind == F16 else (word >= 0xFF00)
