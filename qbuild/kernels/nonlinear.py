"""IQ4_NL, IQ4_XS: a weight is scale * one of 16 uneven values; the scale of 32 weights is searched.

Byte-equal to quantize_iq4_nl and quantize_iq4_xs of llama.cpp (ggml-quants.c). A lane is 32 weights. IQ4_NL stores
their scale; IQ4_XS has super-blocks of 256 and stores a 6-bit code for each scale.
"""

from __future__ import annotations

import numpy as np

from qbuild.ggml import QTYPES
from qbuild.kernels.numerators import steps
from qbuild.kernels.search import TINY, extreme_of, inverse_of, nearest_int
from qbuild.kernels.simd import (
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
from qbuild.kernels.superblock import GROUP, WIDTH, by_block, load_runs, load_sigma2, put_half, weigh, work

_U8, _I32, _F32 = np.uint8, np.int32, np.float32
SUB, PER_BLOCK = 32, 8
RUN = GROUP * PER_BLOCK  # lanes of a group: 16 super-blocks of IQ4_XS, 128 blocks of IQ4_NL
VALUES = np.array([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], _F32)
# The nearest value is the number of these that are not above x: ggml gives a tie to the upper value, and NaN the last.
MIDDLES = (VALUES[1:] + VALUES[:-1]) / 2
STEPS = VALUES[1:] - VALUES[:-1]


def quantize(name: str, source: np.ndarray, kind: int, out: np.ndarray, cols: int, imatrix: np.ndarray | None) -> None:
    """Quantize the blocks of ``source`` (its bytes, flat) into ``out`` (flat). ``imatrix``: float32 [cols]."""
    runs = out.size // QTYPES[name].nbytes * (QTYPES[name].block // SUB)
    weights = np.empty(0, _U8) if imatrix is None else imatrix.view(_U8)
    _quantize(source, kind, out, runs, cols, weights, name == "IQ4_XS", steps(0, 1, range(-7, 8), -127))


@kernel
def _quantize(source, kind, out, runs, cols, imatrix, coded, tries):
    k, zero, weighted = work(), splat(0.0, WIDTH), len(imatrix) > 0
    for first in range(0, runs, RUN):
        live = min(RUN, runs - first)
        tiles = (live + WIDTH - 1) // WIDTH
        if weighted and coded:
            load_sigma2(source, kind, first // PER_BLOCK, runs // PER_BLOCK, 1.0, SUB, k)
        for tile in range(tiles):
            load_runs(source, kind, first + tile * WIDTH, runs, SUB, runs * SUB, WIDTH, k.x[tile * SUB * WIDTH :], k)
            if weighted:
                load_runs(imatrix, 0, first + tile * WIDTH, runs, SUB, cols, WIDTH, k.w, k)
            _weigh(tile, weighted, coded, k, zero)
            store(k.fits, tile * WIDTH, _fit(k.x[tile * SUB * WIDTH :], k.w, tries, zero))
        if coded:
            for tile in range(tiles, RUN // WIDTH):
                store(k.fits, tile * WIDTH, zero)
            _codes(k)
        for tile in range(tiles):
            if not coded:
                store(k.d, tile * WIDTH, inverse_of(load(k.fits, tile * WIDTH, zero)))
            _levels(tile, k, zero)
        if coded:
            _put_super_blocks(out, first // PER_BLOCK, live // PER_BLOCK, k)
        else:
            _put_blocks(out, first, live, tiles, k, zero)


@inline
def _weigh(tile, weighted, coded, k, zero):
    """x * x, or importance * sqrt(sigma2 + x * x); sigma2 is 2 / n times the sum of squares of a block of n."""
    if weighted:
        if coded:
            sigma2 = 2.0 * load(k.d, tile * WIDTH, zero)
        else:
            sigma2 = zero
            for i in range(SUB):
                v = load(k.x, (tile * SUB + i) * WIDTH, zero)
                sigma2 += v * v
            sigma2 = sigma2 * 0.0625
        store(k.d, tile * WIDTH, sigma2)
        weigh(tile, SUB, k)
    else:
        for i in range(SUB):
            v = load(k.x, (tile * SUB + i) * WIDTH, zero)
            store(k.w, i * WIDTH, v * v)


@inline
def _fit(x, w, tries, zero):
    """The scale of least weighted error: first the one that puts the extreme weight on -127, then the tries."""
    extreme, largest = extreme_of(x, SUB, zero)
    sum_qx, sum_q2 = _sums(x, w, 1.0 / (extreme / 127.0), zero)
    scale = select(sum_q2 > 0.0, sum_qx / sum_q2, 0.0)
    best = scale * sum_qx
    for s in range(len(tries)):
        sum_qx, sum_q2 = _sums(x, w, tries[s] / extreme, zero)
        better = (sum_q2 > 0.0) & (sum_qx * sum_qx > best * sum_q2)
        scale = select(better, sum_qx / sum_q2, scale)
        best = select(better, scale * sum_qx, best)
    return select(largest < TINY, 0.0, scale)


@inline
def _sums(x, w, inverse, zero):
    sum_qx, sum_q2 = zero, zero
    for i in range(SUB):
        v = load(x, i * WIDTH, zero)
        y = inverse * v
        q = splat(VALUES[0], zero)
        for m in range(15):
            q += select(y < MIDDLES[m], 0.0, splat(STEPS[m], zero))
        wq = load(w, i * WIDTH, zero) * q
        sum_qx += wq * v
        sum_q2 += wq * q
    return sum_qx, sum_q2


@inline
def _codes(k):
    """Codes -32..31 of 16 super-blocks, by the first scale of largest magnitude; what a code stands for is inverted."""
    zero = splat(0.0, GROUP)
    by_block(0, PER_BLOCK, k)
    extreme, _ = extreme_of(k.columns, PER_BLOCK, zero)
    d = -extreme / 32.0
    inverse = inverse_of(d)
    store(k.halves, 0, to_half(d))
    for j in range(PER_BLOCK):
        l = nearest_int(inverse * load(k.columns, j * GROUP, zero))
        l = select(l < 31, select(l > -32, l, -32), 31)
        store(k.codes, j * GROUP, l + 32)
        store(k.columns, j * GROUP, inverse_of(d * to(l, _F32)))
    for block in range(GROUP):
        for j in range(PER_BLOCK):
            k.d[block * PER_BLOCK + j] = k.columns[j * GROUP + block]


@inline
def _levels(tile, k, zero):
    """Levels of a tile, two to a byte, in memory order: 16 bytes to a lane."""
    inverse = load(k.d, tile * WIDTH, zero)
    for i in range(16):
        low = _level(inverse * load(k.x, (tile * SUB + i) * WIDTH, zero), zero)
        high = _level(inverse * load(k.x, (tile * SUB + i + 16) * WIDTH, zero), zero)
        store(k.rows, i * WIDTH, to(low | (high << 4), _U8))
    for lane in range(0, WIDTH, 16):
        transpose(k.rows, lane, WIDTH, k.levels, (tile * WIDTH + lane) * 16, 16)


@inline
def _level(y, zero):
    l = zeros(zero, _I32)
    for m in range(15):
        l += to(~(y < MIDDLES[m]), _I32)
    return l


@inline
def _put_blocks(out, first, live, tiles, k, zero):
    for tile in range(tiles):
        store(k.codes, tile * WIDTH, to_half(load(k.fits, tile * WIDTH, zero)))
    for j in range(live):
        at = (first + j) * 18
        put_half(out, at, k.codes[j])
        store(out, at + 2, load(k.levels, j * 16, 16))


@inline
def _put_super_blocks(out, first, live, k):
    """A super-block: the scale, the high 2 bits of 8 codes, their low 4 bits, the levels."""
    for block in range(live):
        at = (first + block) * 136
        put_half(out, at, k.halves[block])
        high = 0
        for j in range(PER_BLOCK):
            high |= (k.codes[j * GROUP + block] >> 4) << (2 * j)
        put_half(out, at + 2, high)
        for j in range(0, PER_BLOCK, 2):
            low = (k.codes[j * GROUP + block] & 15) | ((k.codes[(j + 1) * GROUP + block] & 15) << 4)
            out[at + 4 + j // 2] = _U8(low)
        for i in range(0, 128, 32):
            store(out, at + 8 + i, load(k.levels, block * 128 + i, 32))
