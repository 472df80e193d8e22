"""What the K-quants have in common: 16 super-blocks of 256 weights at a time, into lane order and back.

A *group* is 16 super-blocks. Its weights are loaded transposed, a sub-block per lane, in *tiles* of ``WIDTH``
sub-blocks; block scales are fitted with a super-block per lane. A group that reaches past the end of the data repeats
the last block.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from qbuild.kernels.search import sum_of_squares
from qbuild.kernels.simd import host_lanes, inline, load, load_columns, scratch, sqrt, store, transpose

GROUP = 16  # super-blocks
WIDTH = host_lanes()
SUBS = 16 * GROUP  # sub-blocks of a group, at most
_U8, _I32, _F32 = np.uint8, np.int32, np.float32


class Work(NamedTuple):
    """Scratch of one call; about 60 KiB. Float32 unless said otherwise."""

    x: np.ndarray  # weights of a group: x[tile * sub * WIDTH + i * WIDTH + lane]
    w: np.ndarray  # importance of a tile
    q: np.ndarray  # levels of a tile during a search
    fits: np.ndarray  # results of the searches, [what * SUBS + sub-block]
    columns: np.ndarray  # the same with a super-block per lane, [what * SUBS + sub-block * GROUP + super-block]
    codes: np.ndarray  # int32 block-scale codes in the layout of columns
    halves: np.ndarray  # int32: float16 bits of the block scales, [what * GROUP + super-block]
    scales: np.ndarray  # their values
    d: np.ndarray  # what a code stands for, [what * SUBS + sub-block]
    kept: np.ndarray  # uint8 levels of the search, where they cannot be made again; lane order
    rows: np.ndarray  # uint8 levels of a tile, lane order
    levels: np.ndarray  # uint8 levels of the group, memory order
    page: np.ndarray
    starts: np.ndarray  # int64


@inline
def work():
    return Work(
        scratch(GROUP, 256, _F32), scratch(32, WIDTH, _F32), scratch(32, WIDTH, _F32), scratch(5, SUBS, _F32),
        scratch(5, SUBS, _F32), scratch(2, SUBS, _I32), scratch(2, GROUP, _I32), scratch(2, GROUP, _F32),
        scratch(2, SUBS, _F32), scratch(GROUP, 256, _U8), scratch(32, WIDTH, _U8), scratch(GROUP, 256, _U8),
        scratch(2, 256, _F32), scratch(2, 16, np.int64),
    )  # fmt: skip


@inline
def load_group(source, kind, first, blocks, sub, k):
    """Weights of the group from super-block ``first`` on."""
    per_block = 256 // sub
    for at in range(0, GROUP * per_block, 16):
        for j in range(16):
            block = min(first + (at + j) // per_block, blocks - 1)
            k.starts[j] = block * 256 + (at + j) % per_block * sub
        tile, lane = at // WIDTH, at % WIDTH
        load_columns(source, kind, k.starts, sub, k.x[tile * sub * WIDTH + lane :], WIDTH, k.page)


@inline
def load_runs(source, kind, first, count, sub, wrap, width, target, k):
    """Runs of ``sub`` weights, a run per lane, from run ``first`` of ``count`` on, the last one repeated.

    ``wrap``: weights in all, or of a row where ``source`` is an imatrix.
    """
    for lane in range(0, width, 16):
        for j in range(16):
            k.starts[j] = min(first + lane + j, count - 1) * sub % wrap
        load_columns(source, kind, k.starts, sub, target[lane:], width, k.page)


@inline
def load_importance(imatrix, cols, first, tile, sub, k):
    """Importance of a tile's weights, in lane order. ``imatrix``: the float32 of one row, as bytes."""
    for lane in range(0, WIDTH, 16):
        for j in range(16):
            k.starts[j] = (first * 256 + (tile * WIDTH + lane + j) * sub) % cols
        load_columns(imatrix, 0, k.starts, sub, k.w[lane:], WIDTH, k.page)


@inline
def load_sigma2(source, kind, first, blocks, factor, sub, k):
    """sigma2 = factor * sum(x * x) / 256 of each super-block, repeated for its sub-blocks, into k.d."""
    for j in range(16):
        k.starts[j] = min(first + j, blocks - 1) * 256
    store(k.columns, 0, factor * sum_of_squares(source, kind, 256, k.starts, k.page) / 256.0)
    per_block = 256 // sub
    for s in range(GROUP * per_block):
        k.d[s] = k.columns[s // per_block]


@inline
def weigh(tile, sub, k):
    """Turn a tile's importance q into weights q * sqrt(sigma2 + x * x)."""
    sigma2 = load(k.d, tile * WIDTH, WIDTH)
    for i in range(sub):
        v = load(k.x, (tile * sub + i) * WIDTH, WIDTH)
        store(k.w, i * WIDTH, load(k.w, i * WIDTH, WIDTH) * sqrt(sigma2 + v * v))


@inline
def by_block(what, subs, k):
    """Row ``what`` of k.fits into k.columns: a super-block per lane."""
    for block in range(GROUP):
        for j in range(subs):
            k.columns[what * SUBS + j * GROUP + block] = k.fits[what * SUBS + block * subs + j]


@inline
def unload_tile(tile, sub, k):
    """A tile's levels from lane order to memory order."""
    for lane in range(0, WIDTH, 16):
        for i in range(0, sub, 16):
            transpose(k.rows, i * WIDTH + lane, WIDTH, k.levels, (tile * WIDTH + lane) * sub + i, sub)


@inline
def put_half(out, at, half):
    out[at], out[at + 1] = _U8(half & 255), _U8(half >> 8)


@inline
def pack2(levels, at, out, to):
    """The low 2 bits of 256 levels in 64 bytes: 32 bytes hold four runs of 32."""
    for h in range(2):
        a, b = load(levels, at + 128 * h, 32), load(levels, at + 128 * h + 32, 32)
        c, d = load(levels, at + 128 * h + 64, 32), load(levels, at + 128 * h + 96, 32)
        store(out, to + 32 * h, (a & 3) | ((b & 3) << 2) | ((c & 3) << 4) | (d << 6))


@inline
def pack4(levels, at, out, to):
    """The low 4 bits of 256 levels in 128 bytes: 32 bytes hold two runs of 32."""
    for h in range(4):
        a, b = load(levels, at + 64 * h, 32), load(levels, at + 64 * h + 32, 32)
        store(out, to + 32 * h, (a & 15) | (b << 4))


@inline
def pack_bit(levels, at, bit, out, to):
    """One bit of 256 levels in 32 bytes: run r of 32 is bit r."""
    high = (load(levels, at, 32) >> bit) & 1
    for r in range(1, 8):
        high |= ((load(levels, at + 32 * r, 32) >> bit) & 1) << r
    store(out, to, high)


@inline
def pack_q6(levels, at, out, to):
    """256 levels of 6 bits: the low 4 bits in 128 bytes, the high 2 bits in 64."""
    for h in range(2):
        a, b = load(levels, at + 128 * h, 32), load(levels, at + 128 * h + 32, 32)
        c, d = load(levels, at + 128 * h + 64, 32), load(levels, at + 128 * h + 96, 32)
        store(out, to + 64 * h, (a & 15) | (c << 4))
        store(out, to + 64 * h + 32, (b & 15) | (d << 4))
        store(out, to + 128 + 32 * h, (a >> 4) | ((b >> 4) << 2) | ((c >> 4) << 4) | ((d >> 4) << 6))
