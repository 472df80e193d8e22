"""Q8_0, Q4_0, Q4_1, Q5_0, Q5_1: blocks of 32, a block per lane. Rounded, or fitted where an imatrix weighs the columns.

Byte-equal to quantize_q8_0 and quantize_q{4,5}_{0,1} of llama.cpp (ggml-quants.c). With an imatrix a block depends on
its whole row, through sigma2. Q8_0 ignores an imatrix.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from qbuild.ggml import QTYPES
from qbuild.kernels.numerators import SYMMETRIC, steps
from qbuild.kernels.search import (
    extreme_of,
    fit_affine,
    fit_scale,
    inverse_of,
    largest_of,
    level_int,
    roundf,
    signed_byte,
    sum_of_squares,
)
from qbuild.kernels.simd import (
    fmax,
    fmin,
    host_lanes,
    inline,
    kernel,
    load,
    scratch,
    select,
    splat,
    sqrt,
    store,
    store_as,
    to,
    to_half,
    transpose,
    zeros,
)
from qbuild.kernels.superblock import load_runs, put_half

WIDTH = host_lanes()
_U8, _I32, _F32 = np.uint8, np.int32, np.float32


@dataclass(frozen=True)
class Legacy:
    """A type: levels 0..top, and whether a block stores its minimum (else levels are signed, stored with an offset)."""

    top: int
    minimum: bool


TYPES = {
    "Q8_0": Legacy(255, False),
    "Q4_0": Legacy(15, False),
    "Q4_1": Legacy(15, True),
    "Q5_0": Legacy(31, False),
    "Q5_1": Legacy(31, True),
}


class Work(NamedTuple):
    """Scratch of one call, in lane order unless said otherwise."""

    x: np.ndarray
    w: np.ndarray
    q: np.ndarray
    sigma2: np.ndarray  # float32, by lane
    head: np.ndarray  # int32: float16 bits of scale and minimum, then the fifth bits
    rows: np.ndarray  # uint8 levels, packed
    levels: np.ndarray  # uint8, the same block by block
    page: np.ndarray
    starts: np.ndarray  # int64


def quantize(name: str, source: np.ndarray, kind: int, out: np.ndarray, cols: int, imatrix: np.ndarray | None) -> None:
    """Quantize the blocks of ``source`` (its bytes, flat) into ``out`` (flat). ``imatrix``: float32 [cols]."""
    t, nbytes = TYPES[name], QTYPES[name].nbytes
    blocks = out.size // nbytes
    if imatrix is None or name == "Q8_0":
        _round(source, kind, out, blocks, nbytes, t.top, t.minimum)
    elif t.minimum:
        _fit(
            source, kind, out, blocks, nbytes, cols, imatrix.view(_U8), t.top, True, steps(-0.9, 0.05, range(37), t.top)
        )
    else:
        tries = -steps(0, 0.1, SYMMETRIC, (t.top + 1) // 2)
        _fit(source, kind, out, blocks, nbytes, cols, imatrix.view(_U8), t.top, False, tries)


@inline
def _work():
    return Work(
        scratch(32, WIDTH, _F32), scratch(32, WIDTH, _F32), scratch(32, WIDTH, _F32), scratch(1, WIDTH, _F32),
        scratch(3, WIDTH, _I32), scratch(32, WIDTH, _U8), scratch(32, WIDTH, _U8), scratch(2, 256, _F32),
        scratch(2, 16, np.int64),
    )  # fmt: skip


@kernel
def _round(source, kind, out, blocks, nbytes, top, minimum):
    k, zero = _work(), splat(0.0, WIDTH)
    for first in range(0, blocks, WIDTH):
        load_runs(source, kind, first, blocks, 32, blocks * 32, WIDTH, k.x, k)
        if top == 255:
            _round_q8(k, zero)
        elif minimum:
            _round_range(top, k, zero)
        else:
            _round_signed(top, k, zero)
        _unload(out, first, min(WIDTH, blocks - first), nbytes, top, minimum, k, zero)


@inline
def _round_q8(k, zero):
    d = largest_of(k.x, 32, zero) / 127.0
    inverse = inverse_of(d)
    store(k.head, 0, to_half(d))
    for i in range(32):
        store(k.rows, i * WIDTH, to(roundf(load(k.x, i * WIDTH, zero) * inverse), _U8))


@inline
def _round_signed(top, k, zero):
    extreme, _ = extreme_of(k.x, 32, zero)
    half = (top + 1) // 2
    d = extreme / -half
    inverse = inverse_of(d)
    store(k.head, 0, to_half(d))
    _round_levels(zero, inverse, half + 0.5, top, k, zero)


@inline
def _round_range(top, k, zero):
    low = high = load(k.x, 0, zero)
    for i in range(1, 32):
        v = load(k.x, i * WIDTH, zero)
        low, high = fmin(v, low), fmax(v, high)
    d = (high - low) / top
    store(k.head, 0, to_half(d))
    store(k.head, WIDTH, to_half(low))
    _round_levels(low, inverse_of(d), 0.5, top, k, zero)


@inline
def _round_levels(low, inverse, offset, top, k, zero):
    """Truncate to int8_t as C does; only then is the level limited."""
    for i in range(32):
        l = signed_byte(to((load(k.x, i * WIDTH, zero) - low) * inverse + offset, _I32))
        store(k.rows, i * WIDTH, to(select(l < top, l, top), _U8))


@kernel
def _fit(source, kind, out, blocks, nbytes, cols, imatrix, top, minimum, tries):
    k, zero = _work(), splat(0.0, WIDTH)
    per_row = cols // 32
    sums = scratch(1, 16, _F32)
    for band in range(0, blocks, 16 * per_row):  # 16 rows: one lane each for their sums of squares
        end = min(band + 16 * per_row, blocks)
        _load_sums(source, kind, band, blocks, cols, sums, k)
        for first in range(band, end, WIDTH):
            load_runs(source, kind, first, blocks, 32, blocks * 32, WIDTH, k.x, k)
            load_runs(imatrix, 0, first, blocks, 32, cols, WIDTH, k.w, k)
            for j in range(WIDTH):
                k.sigma2[j] = sums[min(15, (first + j - band) // per_row)]
            _weigh(k, zero)
            if minimum:
                _fit_range(top, tries, k, zero)
            else:
                _fit_signed(top, tries, k, zero)
            _unload(out, first, min(WIDTH, end - first), nbytes, top, minimum, k, zero)


@inline
def _load_sums(source, kind, band, blocks, cols, sums, k):
    """sigma2 of 16 rows: x * x summed along the row, in order, over its length."""
    for j in range(16):
        k.starts[j] = min(band + j * (cols // 32), blocks - cols // 32) * 32
    store(sums, 0, sum_of_squares(source, kind, cols, k.starts, k.page) / cols)


@inline
def _weigh(k, zero):
    sigma2 = load(k.sigma2, 0, zero)
    for i in range(32):
        v = load(k.x, i * WIDTH, zero)
        store(k.w, i * WIDTH, load(k.w, i * WIDTH, zero) * sqrt(sigma2 + v * v))


@inline
def _fit_range(top, tries, k, zero):
    scale, low, inverse, base, _ = fit_affine(k.x, k.w, k.q, 32, _F32(top), tries, False, zero)
    store(k.head, 0, to_half(scale))
    store(k.head, WIDTH, to_half(low))
    for i in range(32):
        l = level_int(inverse * (load(k.x, i * WIDTH, zero) - base), 0.0, top)
        store(k.rows, i * WIDTH, to(l, _U8))


@inline
def _fit_signed(top, tries, k, zero):
    """An all-zero block gets the code 0, not the level 0: ggml's rounding path and its fitting path differ there."""
    half = (top + 1) // 2
    scale, inverse = fit_scale(k.x, k.w, 32, _F32(half), tries, zero)
    store(k.head, 0, to_half(scale))
    for i in range(32):
        l = level_int(inverse * load(k.x, i * WIDTH, zero), -half, half - 1.0) + half
        store(k.rows, i * WIDTH, to(select(inverse == 0.0, 0, l), _U8))


@inline
def _unload(out, first, live, nbytes, top, minimum, k, zero):
    """Levels and headers of a tile to blocks: scale, minimum, fifth bits, then levels (two to a byte below 8 bits)."""
    n = 32
    if top != 255:
        n = 16
        _merge_nibbles(k, zero)
    for lane in range(0, WIDTH, 16):
        for i in range(0, n, 16):
            transpose(k.rows, i * WIDTH + lane, WIDTH, k.levels, lane * n + i, n)
    for j in range(live):
        at = (first + j) * nbytes
        put_half(out, at, k.head[j])
        at += 2
        if minimum:
            put_half(out, at, k.head[WIDTH + j])
            at += 2
        if top == 31:
            store_as(out, at, load(k.head, 2 * WIDTH + j, 1))
            at += 4
        for i in range(0, n, 16):
            store(out, at + i, load(k.levels, j * n + i, 16))


@inline
def _merge_nibbles(k, zero):
    fifth = zeros(zero, _I32)
    for i in range(16):
        a, b = load(k.rows, i * WIDTH, zero), load(k.rows, (i + 16) * WIDTH, zero)
        fifth |= (to(a >> 4, _I32) & 1) << i
        fifth |= (to(b >> 4, _I32) & 1) << (i + 16)
        store(k.rows, i * WIDTH, (a & 15) | (b << 4))
    store(k.head, 2 * WIDTH, fifth)
