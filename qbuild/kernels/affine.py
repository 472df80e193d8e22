"""Q2_K, Q4_K, Q5_K: a weight is d * code * q - dmin * code', fitted by make_qkx2_quants or, with an imatrix, make_qkx3.

Byte-equal to quantize_q2_K, quantize_q4_K and quantize_q5_K of llama.cpp (ggml-quants.c).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from qbuild.ggml import QTYPES
from qbuild.kernels.numerators import CODES, steps
from qbuild.kernels.search import byte, fit_affine, fit_positive, level_int, nearest_int
from qbuild.kernels.simd import (
    any_lane,
    fabs,
    fmax,
    from_half,
    inline,
    kernel,
    load,
    select,
    splat,
    sqrt,
    store,
    to,
    to_half,
)
from qbuild.kernels.superblock import (
    GROUP,
    SUBS,
    WIDTH,
    by_block,
    load_group,
    load_importance,
    load_sigma2,
    pack2,
    pack4,
    pack_bit,
    put_half,
    unload_tile,
    weigh,
    work,
)

_U8, _I32, _F32 = np.uint8, np.int32, np.float32
_Q2, _Q4, _Q5 = 0, 1, 2


@dataclass(frozen=True)
class Affine:
    """A type: sub-block length, highest level, highest block-scale code, the numerators of its searches."""

    code: int
    sub: int
    top: int
    code_top: int
    plain: np.ndarray
    weighted: np.ndarray
    sigma: float  # with an imatrix, sigma2 = sigma * mean(x * x) of the super-block


def _affine(code: int, sub: int, top: int, code_top: int, first: float, tries: int, sigma: float) -> Affine:
    plain, weighted = steps(first, 0.1, range(tries + 1), top), steps(-0.9, 0.05, range(37), top)
    return Affine(code, sub, top, code_top, plain, weighted, sigma)


TYPES = {
    "Q2_K": _affine(_Q2, 16, 3, 15, -0.5, 15, 1.0),
    "Q4_K": _affine(_Q4, 32, 15, 63, -1.0, 20, 2.0),
    "Q5_K": _affine(_Q5, 32, 31, 63, -0.5, 15, 2.0),
}


def quantize(name: str, source: np.ndarray, kind: int, out: np.ndarray, cols: int, imatrix: np.ndarray | None) -> None:
    """Quantize the super-blocks of ``source`` (its bytes, flat) into ``out`` (flat). ``imatrix``: float32 [cols]."""
    t = TYPES[name]
    blocks = out.size // QTYPES[name].nbytes
    weights = np.empty(0, _U8) if imatrix is None else imatrix.view(_U8)
    tries = t.plain if imatrix is None else t.weighted
    codes = steps(0, 0.1, CODES, t.code_top)
    _quantize(source, kind, out, blocks, cols, weights, t.code, t.sub, t.top, t.code_top, tries, codes, t.sigma)


@kernel
def _quantize(source, kind, out, blocks, cols, imatrix, code, sub, top, code_top, tries, codes, sigma):
    k, zero, weighted = work(), splat(0.0, WIDTH), len(imatrix) > 0
    tiles, subs = GROUP * 256 // sub // WIDTH, 256 // sub
    for first in range(0, blocks, GROUP):
        load_group(source, kind, first, blocks, sub, k)
        if weighted:
            load_sigma2(source, kind, first, blocks, sigma, sub, k)
        for tile in range(tiles):
            if weighted:
                load_importance(imatrix, cols, first, tile, sub, k)
                weigh(tile, sub, k)
            else:
                _plain_weights(code, tile, sub, k, zero)
            _fit_tile(tile, sub, top, tries, code == _Q2 and not weighted, k, zero)
        for what in range(2):
            _fit_codes(what, weighted, code, subs, code_top, codes, k)
        live = min(GROUP, blocks - first)
        for block in range(live):
            _pack_scales(code, out, first + block, block, k)
        for tile in range(tiles):
            _levels(tile, sub, top, k, zero)
        for block in range(live):
            _pack_levels(code, out, first + block, 256 * block, k)


@inline
def _plain_weights(code, tile, sub, k, zero):
    """|x| for Q2_K, else sqrt(mean(x * x)) + |x| over the sub-block."""
    at, average = tile * sub * WIDTH, zero
    if code != _Q2:
        for i in range(sub):
            v = load(k.x, at + i * WIDTH, zero)
            average += v * v
        average = sqrt(average / sub)
    for i in range(sub):
        store(k.w, i * WIDTH, average + fabs(load(k.x, at + i * WIDTH, zero)))


@inline
def _fit_tile(tile, sub, top, tries, absolute, k, zero):
    fit = fit_affine(k.x[tile * sub * WIDTH :], k.w, k.q, sub, _F32(top), tries, absolute, zero)
    store(k.fits, tile * WIDTH, fit[0])
    store(k.fits, SUBS + tile * WIDTH, -fit[1])
    store(k.fits, 2 * SUBS + tile * WIDTH, fit[2])
    store(k.fits, 3 * SUBS + tile * WIDTH, fit[3])
    store(k.fits, 4 * SUBS + tile * WIDTH, fit[4])


@inline
def _fit_codes(what, weighted, code, subs, code_top, codes, k):
    """Block scale and codes of the scales (what = 0) or minimums (1); codes as ggml's uint8_t holds them."""
    zero, at = splat(0.0, GROUP), what * SUBS
    by_block(what, subs, k)
    if weighted:
        by_block(4, subs, k)
        scale = fit_positive(k.columns[at:], k.columns[4 * SUBS :], k.codes[at:], subs, code_top, codes, zero)
    else:
        largest = zero
        for j in range(subs):
            largest = fmax(load(k.columns, at + j * GROUP, zero), largest)
        inverse = select(largest > 0.0, code_top / largest, 0.0)
        for j in range(subs):
            store(k.codes, at + j * GROUP, byte(nearest_int(inverse * load(k.columns, at + j * GROUP, zero))))
        scale = largest / code_top
    if code == _Q5 or (code == _Q4 and not weighted):
        for j in range(subs):
            l = load(k.codes, at + j * GROUP, zero)
            store(k.codes, at + j * GROUP, select(l < 63, l, 63))
    half = to_half(scale)
    store(k.halves, what * GROUP, half)
    store(k.scales, what * GROUP, from_half(to(half, np.uint16)))


@inline
def _pack_scales(code, out, index, block, k):
    """The header of one super-block, and what each code stands for, as a reader of it will see."""
    if code == _Q2:
        o, halves, per_block = index * 84, 80, 16
        for j in range(16):
            out[o + j] = _U8((k.codes[j * GROUP + block] | (k.codes[SUBS + j * GROUP + block] << 4)) & 255)
    else:
        o, halves, per_block = index * (144 if code == _Q4 else 176), 0, 8
        for j in range(4):
            scale, low = k.codes[j * GROUP + block], k.codes[SUBS + j * GROUP + block]
            scale4, low4 = k.codes[(j + 4) * GROUP + block], k.codes[SUBS + (j + 4) * GROUP + block]
            out[o + 4 + j] = _U8((scale | ((scale4 >> 4) << 6)) & 255)
            out[o + 8 + j] = _U8((low | ((low4 >> 4) << 6)) & 255)
            out[o + 12 + j] = _U8((scale4 & 15) | ((low4 & 15) << 4))
    put_half(out, o + halves, k.halves[block])
    put_half(out, o + halves + 2, k.halves[GROUP + block])
    for j in range(per_block):
        if code == _Q2:
            scale, low = out[o + j] & 15, out[o + j] >> 4
        else:
            scale, low = read_scale_min(out, o + 4, j)
        k.d[block * per_block + j] = k.scales[block] * _F32(scale)
        k.d[SUBS + block * per_block + j] = k.scales[GROUP + block] * _F32(low)


@inline
def read_scale_min(data, at, j):
    """The 6-bit codes of scale and minimum of sub-block j in the 12 bytes at ``at``."""
    if j < 4:
        return data[at + j] & 63, data[at + 4 + j] & 63
    both = data[at + 4 + j]
    return (both & 15) | ((data[at + j - 4] >> 6) << 4), (both >> 4) | ((data[at + j] >> 6) << 4)


@inline
def _levels(tile, sub, top, k, zero):
    """Quantize with the scales as stored; where one is stored as 0, ggml keeps the levels of the search."""
    at = tile * WIDTH
    d, m = load(k.d, at, zero), load(k.d, SUBS + at, zero)
    inverse, base = load(k.fits, 2 * SUBS + at, zero), load(k.fits, 3 * SUBS + at, zero)
    keeps = d == 0.0
    some = any_lane(keeps)
    for i in range(sub):
        v = load(k.x, (tile * sub + i) * WIDTH, zero)
        l = level_int((v + m) / d, 0.0, top)
        if some:
            l = select(keeps, level_int(inverse * (v - base), 0.0, top), l)
        store(k.rows, i * WIDTH, to(l, _U8))
    unload_tile(tile, sub, k)


@inline
def _pack_levels(code, out, index, at, k):
    if code == _Q2:
        pack2(k.levels, at, out, index * 84 + 16)
    elif code == _Q4:
        pack4(k.levels, at, out, index * 144 + 16)
    else:
        pack_bit(k.levels, at, 4, out, index * 176 + 16)
        pack4(k.levels, at, out, index * 176 + 48)
