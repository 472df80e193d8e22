"""IQ1_S, IQ1_M: three levels a step apart, moved by an eighth of a step up or down; 8 levels are a grid point.

Byte-equal to quantize_iq1_s and quantize_iq1_m of llama.cpp (ggml-quants.c). The weights of a group (32 or 16) are
sorted, and every way to split them in three is tried with every move: IQ1_S moves a group, IQ1_M each half of it.
Codes that are no grid point then go to the best of their neighbours, and the scale is fitted once more. A lane is one
group.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from qbuild.ggml import QTYPES
from qbuild.kernels.grid import OFF, block_scale, neighbour
from qbuild.kernels.grids import RUN, tables
from qbuild.kernels.search import largest_of
from qbuild.kernels.simd import (
    inline,
    kernel,
    load,
    scratch,
    select,
    splat,
    store,
    to,
    to_half,
    transpose,
    zeros,
)
from qbuild.kernels.superblock import (
    GROUP,
    SUBS,
    WIDTH,
    load_group,
    load_importance,
    load_sigma2,
    put_half,
    weigh,
    work,
)

_U8, _I32, _F32 = np.uint8, np.int32, np.float32
_MOVE = _F32(0.125)
_LEAST = -np.finfo(np.float32).max
_TINY = {"IQ1_S": 1e-12, "IQ1_M": 1e-7}  # a group whose largest magnitude is below is all zero


class Group(NamedTuple):
    """Scratch of a tile, and what is kept of a group. Lane order: element i of lane k at i * WIDTH + k."""

    weights: np.ndarray  # importance of the whole group of super-blocks, as Work.x
    rank: np.ndarray  # int32: place of a weight in ascending order, equal ones in order
    sum_x: np.ndarray  # sums of weight * x over the first weights in ascending order, [half][count]
    sum_w: np.ndarray  # the same of weights
    x_rows: np.ndarray  # x lane by lane
    w_rows: np.ndarray  # weights lane by lane
    codes: np.ndarray  # int32, 8 levels each
    moves: np.ndarray  # how far the levels of a code are moved
    points: np.ndarray  # int32 codes of the whole group of super-blocks, [tile][code][lane]
    minus: np.ndarray  # int32: a bit for each half (IQ1_M, the first is the high one) or the group moved down
    scale: np.ndarray  # by lane
    off: np.ndarray  # int32: where codes are off the grid
    ladder: np.ndarray  # what the low bits of 0..15 stand for


@inline
def _group():
    return Group(
        scratch(GROUP, 256, _F32), scratch(32, WIDTH, _I32), scratch(34, WIDTH, _F32), scratch(34, WIDTH, _F32),
        scratch(32, WIDTH, _F32), scratch(32, WIDTH, _F32), scratch(4, WIDTH, _I32), scratch(4, WIDTH, _F32),
        scratch(2, SUBS, _I32), scratch(1, SUBS, _I32), scratch(1, WIDTH, _F32), scratch(4, WIDTH, _I32),
        scratch(1, RUN, _F32),
    )  # fmt: skip


def quantize(name: str, source: np.ndarray, kind: int, out: np.ndarray, cols: int, imatrix: np.ndarray | None) -> None:
    """Quantize the super-blocks of ``source`` (its bytes, flat) into ``out`` (flat). ``imatrix``: float32 [cols]."""
    t, blocks = tables(name), out.size // QTYPES[name].nbytes
    weights = np.empty(0, _U8) if imatrix is None else imatrix.view(_U8)
    search = _quantize_s if name == "IQ1_S" else _quantize_m
    search(source, kind, out, blocks, cols, weights, _F32(_TINY[name]), t.place, t.runs, t.lists)


@kernel
def _quantize_s(source, kind, out, blocks, cols, imatrix, tiny, place, runs, lists):
    k, g = work(), _group()
    _set_ladder(g)
    for first in range(0, blocks, GROUP):
        load_group(source, kind, first, blocks, 32, k)
        load_sigma2(source, kind, first, blocks, 2.0, 32, k)
        for tile in range(GROUP * 8 // WIDTH):
            load_importance(imatrix, cols, first, tile, 32, k)
            weigh(tile, 32, k)
            _sort(tile, 32, 1, k, g)
            scale, found = _split_group(g)
            _fit(tile, 32, scale, found, tiny, place, runs, lists, k, g)
        block_scale(8, 7, _F32(1.125), k)
        for block in range(min(GROUP, blocks - first)):
            _pack_s(out, (first + block) * 50, block, place, k, g)


@kernel
def _quantize_m(source, kind, out, blocks, cols, imatrix, tiny, place, runs, lists):
    k, g = work(), _group()
    _set_ladder(g)
    for first in range(0, blocks, GROUP):
        load_group(source, kind, first, blocks, 16, k)
        load_sigma2(source, kind, first, blocks, 2.0, 16, k)
        for tile in range(GROUP * 16 // WIDTH):
            _weigh_m(imatrix, cols, first, tile, k, g)
            _sort(tile, 16, 2, k, g)
            scale, found = _split_halves(g)
            _fit(tile, 16, scale, found, tiny, place, runs, lists, k, g)
        block_scale(16, 7, _F32(1.125), k)
        for block in range(min(GROUP, blocks - first)):
            _pack_m(out, (first + block) * 56, block, place, k, g)


@inline
def _set_ladder(g):
    for j in range(RUN):
        g.ladder[j] = _F32((j & 3) - 1)


@inline
def _weigh_m(imatrix, cols, first, tile, k, g):
    """Weights of a tile; without an imatrix x * x. They are kept for the fit of the block scale."""
    if len(imatrix) > 0:
        load_importance(imatrix, cols, first, tile, 16, k)
        weigh(tile, 16, k)
    for i in range(16):
        at = (tile * 16 + i) * WIDTH
        if len(imatrix) == 0:
            x = load(k.x, at, WIDTH)
            store(k.w, i * WIDTH, x * x)
        store(g.weights, at, load(k.w, i * WIDTH, WIDTH))


@inline
def _sort(tile, n, halves, k, g):
    """Ranks of a tile's weights (ggml's qsort is stable), and sums in ascending order."""
    zero, at = splat(0.0, WIDTH), tile * n * WIDTH
    for i in range(n):
        store(g.rank, i * WIDTH, zeros(zero, _I32))
    for i in range(halves * (n + 1)):
        store(g.sum_x, i * WIDTH, zero)
        store(g.sum_w, i * WIDTH, zero)
    for i in range(n):
        x, rank = load(k.x, at + i * WIDTH, zero), load(g.rank, i * WIDTH, zero)
        for j in range(i + 1, n):
            less = to(load(k.x, at + j * WIDTH, zero) < x, _I32)
            rank += less
            store(g.rank, j * WIDTH, load(g.rank, j * WIDTH, zero) + (1 - less))
        store(g.rank, i * WIDTH, rank)
    for i in range(n):
        half = (i * halves // n) * (n + 1) + 1
        for lane in range(WIDTH):
            w, to_ = k.w[i * WIDTH + lane], (half + g.rank[i * WIDTH + lane]) * WIDTH + lane
            g.sum_x[to_] = w * k.x[at + i * WIDTH + lane]
            g.sum_w[to_] = w
    for half in range(halves):
        for i in range(half * (n + 1), half * (n + 1) + n):
            store(g.sum_x, (i + 1) * WIDTH, load(g.sum_x, i * WIDTH, zero) + load(g.sum_x, (i + 1) * WIDTH, zero))
            store(g.sum_w, (i + 1) * WIDTH, load(g.sum_w, i * WIDTH, zero) + load(g.sum_w, (i + 1) * WIDTH, zero))
    for lane in range(0, WIDTH, 16):
        for i in range(0, n, 16):
            transpose(k.x, at + i * WIDTH + lane, WIDTH, g.x_rows, lane * n + i, n)
            transpose(k.w, i * WIDTH + lane, WIDTH, g.w_rows, lane * n + i, n)


@inline
def _better(sum_qx, sum_q2, split, best, scale, found):
    better = (sum_q2 > 0.0) & (sum_qx * sum_qx > best * sum_q2)
    scale = select(better, sum_qx / sum_q2, scale)
    return select(better, scale * sum_qx, best), scale, select(better, split, found)


@inline
def _split_group(g):
    """Scale and split (first index, second index << 8, moves down << 16; -1: none) of 32 weights with one move."""
    zero = splat(0.0, WIDTH)
    best, scale, found = splat(_LEAST, WIDTH), zero, ~zeros(zero, _I32)
    all_x, all_w = load(g.sum_x, 32 * WIDTH, zero), load(g.sum_w, 32 * WIDTH, zero)
    for i in range(33):
        low_x, low_w = load(g.sum_x, i * WIDTH, zero), load(g.sum_w, i * WIDTH, zero)
        up_x, up_w = low_x * _F32(-0.875), low_w * _F32(-0.875) * _F32(-0.875)
        down_x, down_w = low_x * _F32(-1.125), low_w * _F32(-1.125) * _F32(-1.125)
        for j in range(i, 33):
            to_x, to_w = load(g.sum_x, j * WIDTH, zero), load(g.sum_w, j * WIDTH, zero)
            mid_x, mid_w = to_x - low_x, (to_w - low_w) * _MOVE * _MOVE
            high_x, high_w = all_x - to_x, all_w - to_w
            split = i | j << 8
            sum_qx = up_x + mid_x * _MOVE + high_x * _F32(1.125)
            sum_q2 = up_w + mid_w + high_w * _F32(1.125) * _F32(1.125)
            best, scale, found = _better(sum_qx, sum_q2, split, best, scale, found)
            sum_qx = down_x + mid_x * -_MOVE + high_x * _F32(0.875)
            sum_q2 = down_w + mid_w + high_w * _F32(0.875) * _F32(0.875)
            best, scale, found = _better(sum_qx, sum_q2, split | 1 << 16, best, scale, found)
    return scale, found


@inline
def _half_sums(half, i, j, total_x, total_w, g):
    """Sums of w * q * x and of w * q * q over half a group, moved up and moved down."""
    at = half * 17
    a_w, b_w = load(g.sum_w, (at + i) * WIDTH, total_w), load(g.sum_w, (at + j) * WIDTH, total_w)
    below = load(g.sum_x, (at + i) * WIDTH, total_x) + load(g.sum_x, (at + j) * WIDTH, total_x)
    up_w = total_w * _F32(1.125) * _F32(1.125) + a_w * _F32(0.75) + b_w * _F32(-1.25)
    down_w = total_w * _F32(0.875) * _F32(0.875) + a_w * _F32(1.25) + b_w * _F32(-0.75)
    return total_x * _F32(1.125) - below, up_w, total_x * _F32(0.875) - below, down_w


@inline
def _split_halves(g):
    """As _split_group, for 16 weights of which each half has its move."""
    zero = splat(0.0, WIDTH)
    best, scale, found = splat(_LEAST, WIDTH), zero, ~zeros(zero, _I32)
    x0, w0 = load(g.sum_x, 16 * WIDTH, zero), load(g.sum_w, 16 * WIDTH, zero)
    x1, w1 = load(g.sum_x, 33 * WIDTH, zero), load(g.sum_w, 33 * WIDTH, zero)
    for i in range(17):
        for j in range(i, 17):
            up_x0, up_w0, down_x0, down_w0 = _half_sums(0, i, j, x0, w0, g)
            up_x1, up_w1, down_x1, down_w1 = _half_sums(1, i, j, x1, w1, g)
            split = i | j << 8
            best, scale, found = _better(up_x0 + up_x1, up_w0 + up_w1, split, best, scale, found)
            best, scale, found = _better(up_x0 + down_x1, up_w0 + down_w1, split | 1 << 16, best, scale, found)
            best, scale, found = _better(down_x0 + up_x1, down_w0 + up_w1, split | 2 << 16, best, scale, found)
            best, scale, found = _better(down_x0 + down_x1, down_w0 + down_w1, split | 3 << 16, best, scale, found)
    return scale, found


@inline
def _fit(tile, n, scale, found, tiny, place, runs, lists, k, g):
    """Scales, moves and grid points of a tile's groups from their splits."""
    zero = splat(0.0, WIDTH)
    most = largest_of(k.x[tile * n * WIDTH :], n, zero)
    empty, flip = (found < 0) | (most < tiny), scale < 0.0
    minus = (found >> 16) ^ select(flip, zeros(found, _I32) + (3 if n == 16 else 1), 0)
    minus = select(empty, 0, minus)
    scale = select(flip, -scale, scale)
    low, high = found & 255, (found >> 8) & 255
    for c in range(n // 8):
        code = zeros(found, _I32)
        for i in range(8):
            rank = load(g.rank, (8 * c + i) * WIDTH, found)
            level = to(rank >= low, _I32) + to(rank >= high, _I32)
            code |= select(flip, 2 - level, level) << (2 * i)
        down = (minus >> (1 - c if n == 16 else 0)) & 1
        store(g.codes, c * WIDTH, select(empty, 0, code))
        store(g.moves, c * WIDTH, select(down == 1, -_MOVE, splat(_MOVE, WIDTH)))
    _move(scale, n, place, runs, lists, g)
    scale = _refit(tile, n, scale, k, g)
    store(k.fits, tile * WIDTH, select(empty, 0.0, scale))
    store(g.minus, tile * WIDTH, minus)
    for c in range(n // 8):
        store(g.points, (tile * (n // 8) + c) * WIDTH, load(g.codes, c * WIDTH, WIDTH) & 0xFFFF)


@inline
def _move(scale, n, place, runs, lists, g):
    """Replace codes off the grid by their best neighbours, and mark them."""
    store(g.scale, 0, scale)
    count = 0
    for at in range(n // 8 * WIDTH):
        g.off[count] = at
        count += place[g.codes[at]] < 0
    for o in range(count):
        at = g.off[o]
        lane, code = at % WIDTH, g.codes[at]
        begin = RUN * np.int64(~place[code])
        levels, row = g.scale[lane] * (load(g.ladder, 0, RUN) + g.moves[at]), lane * n + at // WIDTH * 8
        found = neighbour(lists, begin, runs[code], 8, 2, levels, g.x_rows, g.w_rows, row)
        g.codes[at] = OFF | lists[begin + found]


@inline
def _refit(tile, n, scale, k, g):
    """The scale that fits the grid points best, where one of them is a neighbour."""
    zero = splat(0.0, WIDTH)
    sum_qx, sum_q2, off = zero, zero, zeros(zero, _I32)
    for c in range(n // 8):
        code, move = load(g.codes, c * WIDTH, zero), load(g.moves, c * WIDTH, zero)
        off |= code
        for i in range(8):
            at = 8 * c + i
            q = to(((code >> (2 * i)) & 3) - 1, _F32) + move
            wq = load(k.w, at * WIDTH, zero) * q
            sum_qx += wq * load(k.x, (tile * n + at) * WIDTH, zero)
            sum_q2 += wq * q
    return select((off >= OFF) & (sum_qx > 0.0) & (sum_q2 > 0.0), sum_qx / sum_q2, scale)


@inline
def _pack_s(out, o, block, place, k, g):
    put_half(out, o, k.halves[block])
    for j in range(8):
        sub = block * 8 + j
        at, word = sub // WIDTH * 4 * WIDTH + sub % WIDTH, 0
        for c in range(4):
            point = place[g.points[at + c * WIDTH]]
            out[o + 2 + 4 * j + c] = _U8(point & 255)
            word |= point >> 8 << 3 * c
        if k.scales[block] != 0.0:
            word |= (k.codes[j * GROUP + block] | g.minus[sub] << 3) << 12
        put_half(out, o + 34 + 2 * j, word)


@inline
def _pack_m(out, o, block, place, k, g):
    live, half = k.scales[block] != 0.0, 0
    if live:
        half = _half_m(block, k, g)
    for j in range(0, 16, 4):
        word = (half >> j & 15) << 12
        for s in range(j, j + 4):
            sub = block * 16 + s
            at = sub // WIDTH * 2 * WIDTH + sub % WIDTH
            a, b = place[g.points[at]], place[g.points[at + WIDTH]]
            high = a >> 8 | b >> 8 << 4
            if live:
                high |= (g.minus[sub] >> 1) << 3 | (g.minus[sub] & 1) << 7
                word |= k.codes[s * GROUP + block] << 3 * (s - j)
            out[o + 2 * s], out[o + 2 * s + 1], out[o + 32 + s] = _U8(a & 255), _U8(b & 255), _U8(high)
        put_half(out, o + 48 + j // 2, word)


@inline
def _half_m(block, k, g):
    """float16 bits of the block scale that fits all 256 weights best."""
    sum_qx, sum_q2, zero = _F32(0.0), _F32(0.0), splat(0.0, GROUP)
    for s in range(16):
        sub = block * 16 + s
        tile, lane = sub // WIDTH, sub % WIDTH
        times = _F32(2 * k.codes[s * GROUP + block] + 1)
        for i in range(16):
            code = g.points[(tile * 2 + i // 8) * WIDTH + lane] >> (2 * (i % 8))
            down = g.minus[sub] >> (1 - i // 8) & 1
            q = (_F32((code & 3) - 1) + (-_MOVE if down else _MOVE)) * times
            at = (tile * 16 + i) * WIDTH + lane
            wq = g.weights[at] * q
            sum_qx += wq * k.x[at]
            sum_q2 += wq * q
    d = k.scales[block] / _F32(15.0)
    if sum_q2 > 0.0:
        d = sum_qx / sum_q2
    store(k.halves, 0, to_half(zero + d * _F32(1.1125)))
    return k.halves[0]
