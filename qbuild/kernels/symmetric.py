"""Q3_K, Q6_K: a weight is d * code * q with signed q, by make_q3_quants (Q3_K without an imatrix) or make_qx_quants.

Byte-equal to quantize_q3_K and quantize_q6_K of llama.cpp (ggml-quants.c).
"""

from __future__ import annotations

import numpy as np

from qbuild.ggml import QTYPES
from qbuild.kernels.numerators import SYMMETRIC, steps
from qbuild.kernels.search import (
    TINY,
    extreme_of,
    fit_scale,
    fit_scale_by_descent,
    level_int,
    nearest_int,
    signed_byte,
)
from qbuild.kernels.simd import any_lane, from_half, inline, kernel, load, select, splat, store, to, to_half
from qbuild.kernels.superblock import (
    GROUP,
    SUBS,
    WIDTH,
    by_block,
    load_group,
    load_importance,
    load_sigma2,
    pack2,
    pack_bit,
    pack_q6,
    put_half,
    unload_tile,
    weigh,
    work,
)

_U8, _I32, _F32 = np.uint8, np.int32, np.float32
SUB, PER_BLOCK = 16, 16
TILES = GROUP * PER_BLOCK // WIDTH
TYPES = ("Q3_K", "Q6_K")


def quantize(name: str, source: np.ndarray, kind: int, out: np.ndarray, cols: int, imatrix: np.ndarray | None) -> None:
    """Quantize the super-blocks of ``source`` (its bytes, flat) into ``out`` (flat). ``imatrix``: float32 [cols]."""
    blocks = out.size // QTYPES[name].nbytes
    weights = np.empty(0, _U8) if imatrix is None else imatrix.view(_U8)
    q3 = name == "Q3_K"
    fine, coarse = -steps(0, 0.1, SYMMETRIC, 4 if q3 else 32), -steps(0, 0.1, SYMMETRIC, 32)
    _quantize(source, kind, out, blocks, cols, weights, q3, 4 if q3 else 32, fine, coarse)


@kernel
def _quantize(source, kind, out, blocks, cols, imatrix, q3, top, fine, coarse):
    k, zero, weighted = work(), splat(0.0, WIDTH), len(imatrix) > 0
    descend = q3 and not weighted
    for first in range(0, blocks, GROUP):
        load_group(source, kind, first, blocks, SUB, k)
        if q3 and weighted:
            load_sigma2(source, kind, first, blocks, 2.0, SUB, k)
        for tile in range(TILES):
            if weighted:
                load_importance(imatrix, cols, first, tile, SUB, k)
                if q3:
                    weigh(tile, SUB, k)
            else:
                _squares(tile, k, zero)
            if descend:
                _descend_tile(tile, top, k, zero)
            else:
                _fit_tile(tile, top, fine, k, zero)
        if q3 and weighted:
            _fit_codes(coarse, k)
        else:
            _round_codes(q3, k)
        live = min(GROUP, blocks - first)
        for block in range(live):
            _pack_scales(q3, out, first + block, block, k)
        for tile in range(TILES):
            _levels(tile, top, descend, k, zero)
        for block in range(live):
            _pack_levels(q3, out, first + block, 256 * block, k)


@inline
def _squares(tile, k, zero):
    for i in range(SUB):
        v = load(k.x, (tile * SUB + i) * WIDTH, zero)
        store(k.w, i * WIDTH, v * v)


@inline
def _fit_tile(tile, top, tries, k, zero):
    scale, inverse = fit_scale(k.x[tile * SUB * WIDTH :], k.w, SUB, _F32(top), tries, zero)
    total = zero
    for i in range(SUB):
        total += load(k.w, i * WIDTH, zero)
    store(k.fits, tile * WIDTH, scale)
    store(k.fits, SUBS + tile * WIDTH, total)
    store(k.fits, 2 * SUBS + tile * WIDTH, inverse)


@inline
def _descend_tile(tile, top, k, zero):
    at = tile * SUB * WIDTH
    scale, empty = fit_scale_by_descent(k.x[at:], k.w, k.q, SUB, _F32(top), zero)
    store(k.fits, tile * WIDTH, scale)
    for i in range(SUB):
        l = to(load(k.q, i * WIDTH, zero), _I32) + top
        store(k.kept, at + i * WIDTH, to(select(empty, 0, l), _U8))


@inline
def _store_scale(scale, k):
    half = to_half(scale)
    store(k.halves, 0, half)
    store(k.scales, 0, from_half(to(half, np.uint16)))


@inline
def _fit_codes(tries, k):
    """Q3_K with an imatrix: block scale and codes by the same search; a sub-block weighs the sum of its weights."""
    zero = splat(0.0, GROUP)
    by_block(0, PER_BLOCK, k)
    by_block(1, PER_BLOCK, k)
    scale, inverse = fit_scale(k.columns, k.columns[SUBS:], PER_BLOCK, _F32(32), tries, zero)
    for j in range(PER_BLOCK):
        l = level_int(inverse * load(k.columns, j * GROUP, zero), -32.0, 31.0)
        store(k.codes, j * GROUP, select(inverse == 0.0, -32, l))
    _store_scale(scale, k)


@inline
def _round_codes(q3, k):
    """The block scale that gives the first scale of largest magnitude the lowest code; codes are signed."""
    zero = splat(0.0, GROUP)
    by_block(0, PER_BLOCK, k)
    extreme, largest = extreme_of(k.columns, PER_BLOCK, zero)
    dead = (extreme == 0.0) if q3 else (largest < TINY)
    inverse = (-32.0 if q3 else -128.0) / extreme
    for j in range(PER_BLOCK):
        l = nearest_int(inverse * load(k.columns, j * GROUP, zero))
        if q3:
            l = signed_byte(l)
            l = select(l < 31, select(l > -32, l, -32), 31)
        else:
            l = signed_byte(select(l < 127, l, 127))
        store(k.codes, j * GROUP, select(dead, -32 if q3 else 0, l))
    _store_scale(select(dead, 0.0, 1.0 / inverse), k)
    if not q3 and any_lane(dead):
        _clear_dead_blocks(k)


@inline
def _clear_dead_blocks(k):
    """Q6_K: a super-block of scales below TINY is all zero bytes, whatever its search found."""
    for block in range(GROUP):
        if k.scales[block] == 0.0 and k.halves[block] == 0:
            worst = _F32(0)
            for j in range(PER_BLOCK):
                size = abs(k.fits[block * PER_BLOCK + j])
                if size > worst:
                    worst = size
            if worst < TINY:
                k.fits[2 * SUBS + block * PER_BLOCK : 2 * SUBS + (block + 1) * PER_BLOCK] = 0


@inline
def _pack_scales(q3, out, index, block, k):
    """Codes and block scale of one super-block, and what each code stands for."""
    if q3:
        o = index * 110 + 96
        for j in range(12):
            out[o + j] = 0
        for j in range(PER_BLOCK):
            l = k.codes[j * GROUP + block] + 32
            out[o + j % 8] |= _U8((l & 15) << (4 * (j // 8)))
            out[o + 8 + j % 4] |= _U8((l >> 4) << (2 * (j // 4)))
        put_half(out, o + 12, k.halves[block])
    else:
        o = index * 210 + 192
        for j in range(PER_BLOCK):
            out[o + j] = _U8(k.codes[j * GROUP + block] & 255)
        put_half(out, o + 16, k.halves[block])
    for j in range(PER_BLOCK):
        k.d[block * PER_BLOCK + j] = k.scales[block] * _F32(k.codes[j * GROUP + block])


@inline
def _levels(tile, top, descended, k, zero):
    """Quantize with the scales as stored; where one is stored as 0, ggml keeps the levels of the search."""
    d, inverse = load(k.d, tile * WIDTH, zero), load(k.fits, 2 * SUBS + tile * WIDTH, zero)
    keeps = d == 0.0
    some, low, high = any_lane(keeps), _F32(-top), _F32(top - 1)
    for i in range(SUB):
        at = (tile * SUB + i) * WIDTH
        v = load(k.x, at, zero)
        l = level_int(v / d, low, high) + top
        if some:
            if descended:
                l = select(keeps, to(load(k.kept, at, zero), _I32), l)
            else:
                l = select(keeps, select(inverse == 0.0, 0, level_int(inverse * v, low, high) + top), l)
        store(k.rows, i * WIDTH, to(l, _U8))
    unload_tile(tile, SUB, k)


@inline
def _pack_levels(q3, out, index, at, k):
    if q3:
        pack_bit(k.levels, at, 2, out, index * 110)
        pack2(k.levels, at, out, index * 110 + 32)
    else:
        pack_q6(k.levels, at, out, index * 210)
