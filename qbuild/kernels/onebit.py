"""Q1_0, Q2_0: the signs of 128 weights with their mean magnitude, or 64 weights of 2 bits with the largest magnitude.

Byte-equal to quantize_q1_0 and quantize_q2_0 of llama.cpp (ggml-quants.c), which ignore an imatrix. A lane is a block.
"""

from __future__ import annotations

import numpy as np

from qbuild.kernels.search import largest_of, roundf
from qbuild.kernels.simd import (
    fabs,
    inline,
    kernel,
    load,
    select,
    splat,
    store,
    to,
    to_half,
    transpose,
    zeros,
)
from qbuild.kernels.superblock import GROUP, load_runs, put_half, work

_U8, _I32 = np.uint8, np.int32
NBYTES = 18


def quantize(name: str, source: np.ndarray, kind: int, out: np.ndarray, cols: int, imatrix: np.ndarray | None) -> None:
    """Quantize the blocks of ``source`` (its bytes, flat) into ``out`` (flat)."""
    _quantize(source, kind, out, out.size // NBYTES, 128 if name == "Q1_0" else 64)


@kernel
def _quantize(source, kind, out, blocks, n):
    k, zero = work(), splat(0.0, GROUP)
    for first in range(0, blocks, GROUP):
        load_runs(source, kind, first, blocks, n, blocks * n, GROUP, k.x, k)
        if n == 128:
            _signs(k, zero)
        else:
            _pairs(k, zero)
        transpose(k.rows, 0, GROUP, k.levels, 0, 16)
        for j in range(min(GROUP, blocks - first)):
            at = (first + j) * NBYTES
            put_half(out, at, k.codes[j])
            store(out, at + 2, load(k.levels, j * 16, 16))


@inline
def _signs(k, zero):
    total = zero
    for byte in range(16):
        q = zeros(zero, _I32)
        for bit in range(8):
            v = load(k.x, (8 * byte + bit) * GROUP, zero)
            total += fabs(v)
            q |= to(v >= 0.0, _I32) << bit
        store(k.rows, byte * GROUP, to(q, _U8))
    store(k.codes, 0, to_half(total / 128.0))


@inline
def _pairs(k, zero):
    """Levels by C's roundf; an infinite inverse makes all of them the lowest, as x86 converts what is no int."""
    largest = largest_of(k.x, 64, zero)
    inverse = select(largest > 0.0, 1.0 / largest, 0.0)
    store(k.codes, 0, to_half(largest))
    for byte in range(16):
        q = zeros(zero, _I32)
        for pair in range(4):
            l = roundf(load(k.x, (4 * byte + pair) * GROUP, zero) * inverse) + 1
            q |= select(l < 0, 0, select(l < 3, l, 3)) << (2 * pair)
        store(k.rows, byte * GROUP, to(q, _U8))
