"""TQ1_0, TQ2_0: weights -1, 0, 1 times the largest magnitude of 256, five to a byte or four.

Byte-equal to quantize_tq1_0 and quantize_tq2_0 of llama.cpp (ggml-quants.c), which ignore an imatrix. Lanes are
neighbouring weights: nothing is summed, so no order is to be kept.
"""

from __future__ import annotations

import numpy as np

from qbuild.kernels.simd import (
    fabs,
    fmax,
    inline,
    kernel,
    lane,
    load,
    load_weights,
    scratch,
    splat,
    store,
    to,
    to_half,
)
from qbuild.kernels.superblock import put_half

_U8, _I32, _F32 = np.uint8, np.int32, np.float32


def quantize(name: str, source: np.ndarray, kind: int, out: np.ndarray, cols: int, imatrix: np.ndarray | None) -> None:
    """Quantize the blocks of ``source`` (its bytes, flat) into ``out`` (flat)."""
    if name == "TQ1_0":
        _quantize(source, kind, out, out.size // 54, True)
    else:
        _quantize(source, kind, out, out.size // 66, False)


@kernel
def _quantize(source, kind, out, blocks, dense):
    x = scratch(1, 256, _F32)
    for block in range(blocks):
        d = _load(source, kind, block * 256, x)
        inverse = _F32(0.0) if d == 0.0 else _F32(1.0) / d
        half = lane(to_half(splat(d, 1)), 0)
        if dense:
            at = block * 54
            store(out, at, _five(x, 0, 32, inverse))
            store(out, at + 32, _five(x, 160, 16, inverse))
            q = _digit(x, 240, 4, inverse)
            for n in range(1, 4):
                q = q * 3 + _digit(x, 240 + 4 * n, 4, inverse)
            store(out, at + 48, _fraction(q * 3))
            put_half(out, at + 52, half)
        else:
            at = block * 66
            for part in range(2):
                q = _digit(x, 128 * part, 32, inverse)
                for n in range(1, 4):
                    q |= _digit(x, 128 * part + 32 * n, 32, inverse) << (2 * n)
                store(out, at + 32 * part, to(q, _U8))
            put_half(out, at + 64, half)


@inline
def _load(source, kind, at, x):
    """256 weights, and their largest magnitude."""
    most = splat(0.0, 32)
    for i in range(0, 256, 32):
        v = load_weights(source, kind, at + i, 32)
        store(x, i, v)
        most = fmax(most, fabs(v))
    largest = _F32(0.0)
    for i in range(32):
        largest = max(largest, lane(most, i))
    return largest


@inline
def _digit(x, at, like, inverse):
    """0, 1, 2 by C's lroundf; what does not fit a long (an infinite inverse makes it) counts as zero on x86."""
    v = load(x, at, like) * inverse
    return 1 + to((v >= 0.5) & (v < 2.0), _I32) - to((v <= -0.5) & (v > -2.0), _I32)


@inline
def _five(x, at, like, inverse):
    q = _digit(x, at, like, inverse)
    for n in range(1, 5):
        q = q * 3 + _digit(x, at + n * like, like, inverse)
    return _fraction(q)


@inline
def _fraction(q):
    """ceil(q * 256 / 243) for q < 243, without a division: readers multiply by 3 and take the bits above 8."""
    return to(q + ((q * 13 + 242) * 270 >> 16), _U8)
