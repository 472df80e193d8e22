"""MXFP4, NVFP4: 4-bit floats (E2M1) with an 8-bit scale to 32 weights (a power of two) or to 16 (E4M3, no sign).

Byte-equal to quantize_mxfp4 and quantize_nvfp4 of llama.cpp (ggml-quants.c), which ignore an imatrix. The formats: OCP
Microscaling Formats 1.0; NVFP4 as NVIDIA describes it, without its scale per tensor. A lane is one scale's weights.
"""

from __future__ import annotations

from functools import cache

import numpy as np

from qbuild.kernels.search import largest_of
from qbuild.kernels.simd import (
    bits,
    fabs,
    fmin,
    gather,
    inline,
    kernel,
    load,
    select,
    splat,
    store,
    to,
    transpose,
    zeros,
)
from qbuild.kernels.superblock import WIDTH, load_runs, work

_U8, _I32, _F32 = np.uint8, np.int32, np.float32
VALUES = np.array([0, 1, 2, 3, 4, 6, 8, 12], _F32)  # of the codes 0..7, doubled; 8..15 are their negatives
LOWEST = -149  # exponent of the least float32


def quantize(name: str, source: np.ndarray, kind: int, out: np.ndarray, cols: int, imatrix: np.ndarray | None) -> None:
    """Quantize the blocks of ``source`` (its bytes, flat) into ``out`` (flat)."""
    if name == "MXFP4":
        _quantize(source, kind, out, out.size // 17, 32, _rounded_up())
    else:
        _quantize(source, kind, out, out.size // 9, 16, _rounded_up())


@cache
def _rounded_up() -> np.ndarray:
    """By exponent from LOWEST on: mantissa bits from which the C library's log2f rounds up to the next exponent.

    log2f is the correctly rounded logarithm there, and a float32 near 127 resolves 2**-17.
    """
    exponents = np.arange(LOWEST, 128)
    mantissas = np.arange((1 << 23) - 256, 1 << 23)
    logs = exponents[:, None] + np.log2(1 + mantissas / (1 << 23))
    return (mantissas[-1] + 1 - (logs.astype(_F32) > exponents[:, None] + 0.99999999).sum(axis=1)).astype(_I32)


@kernel
def _quantize(source, kind, out, runs, sub, limits):
    k, zero = work(), splat(0.0, WIDTH)
    half = sub // 2
    for first in range(0, runs, WIDTH):
        load_runs(source, kind, first, runs, sub, runs * sub, WIDTH, k.x, k)
        largest = largest_of(k.x, sub, zero)
        if sub == 32:
            code, d = _power(largest, limits)
        else:
            code, d = _e4m3(largest)
        store(k.codes, 0, code)
        for i in range(half):
            low = _nearest(load(k.x, i * WIDTH, zero), d, zero)
            high = _nearest(load(k.x, (i + half) * WIDTH, zero), d, zero)
            store(k.rows, i * WIDTH, to(low | (high << 4), _U8))
        for lane in range(0, WIDTH, 16):
            transpose(k.rows, lane, WIDTH, k.levels, lane * 16, 16)
        for j in range(min(WIDTH, runs - first)):
            run = first + j
            if sub == 32:
                out[run * 17] = _U8(k.codes[j])
                store(out, run * 17 + 1, load(k.levels, j * 16, 16))
            else:
                at = run // 4 * 36
                out[at + run % 4] = _U8(k.codes[j])
                store(out, at + 4 + run % 4 * 8, load(k.levels, j * 16, 8))


@inline
def _power(largest, limits):
    """(code, half of what it means): floor(log2f(largest)) - 2, biased by 127, kept to 8 bits as C does on x86."""
    small = largest < 1.1754943508222875e-38
    word = bits(select(small, largest * 16777216.0, largest), _I32)  # a subnormal gets an exponent
    exponent = (word >> 23) - 127 - (to(small, _I32) * 24)
    index = select(exponent < LOWEST, 0, exponent - LOWEST)
    up = to((word & 0x7FFFFF) >= gather(limits, index), _I32)
    code = select(largest > 0.0, (exponent + up + 125) & 255, 0)
    tiny = (code << 21) + 0x00200000  # 2**-128, 2**-127
    return code, bits(select(code < 2, tiny, (code - 1) << 23), _F32)


@inline
def _e4m3(largest):
    """(code, half of what it means) of largest / 6; a mantissa is rounded half up, by adding one bit."""
    v = fmin(largest / 6.0, splat(448.0, largest))
    word = bits(v, _I32)
    exponent = (word >> 23) - 120
    man = to(v * 512.0 + 0.5, _I32)
    normal = ((word >> 20) & 7) + (exponent << 3) + ((word >> 19) & 1)
    normal = select(normal < 120, normal, 126)
    code = select(exponent < 1, select(man < 7, man, 7), normal)
    value = bits(((code >> 3) + 119 << 23) | ((code & 7) << 20), _F32)
    return code, select(code < 8, to(code, _F32) * 0.0009765625, value)


@inline
def _nearest(v, d, zero):
    """The first code of least error, in float32 as ggml computes it: products may overflow or be subnormal."""
    best, code = fabs(v), zeros(zero, _I32)
    for i in range(1, 16):
        if i != 8:  # minus zero is never better than zero
            point = d * VALUES[i & 7]
            error = fabs(point - v) if i < 8 else fabs(point + v)
            better = error < best
            best, code = select(better, error, best), select(better, i, code)
    return code
