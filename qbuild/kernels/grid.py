"""IQ2_XXS, IQ2_XS, IQ2_S, IQ3_XXS, IQ3_S: 8 or 4 magnitudes at a time are a grid point, signs and scales are apart.

Byte-equal to quantize_iq2_* and quantize_iq3_* of llama.cpp (ggml-quants.c). A group of 16 or 32 weights has one scale:
each step of its search rounds the weights to codes, moves every code that is no grid point to the best of its
neighbours, and fits a scale to the points. A lane is one group.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from qbuild.ggml import QTYPES
from qbuild.kernels.grids import RUN, tables
from qbuild.kernels.numerators import CODES, steps
from qbuild.kernels.search import fit_positive, level_int
from qbuild.kernels.simd import (
    fmax,
    inline,
    kernel,
    load,
    scratch,
    select,
    splat,
    sqrt,
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
    by_block,
    load_group,
    load_importance,
    load_sigma2,
    put_half,
    weigh,
    work,
)

_U8, _I32, _F32, _BOOL = np.uint8, np.int32, np.float32, np.bool_
_WORD = ir.IntType(32)
XXS, XS, S = 0, 1, 2  # layouts


@dataclass(frozen=True)
class Form:
    """A type: weights to a scale, its layout, the search's numerators, and what it does differently."""

    weights: int
    layout: int
    tries: int  # steps to each side
    tiny: float  # a group whose largest magnitude is below is all zero
    sigma: float  # sigma2 is this times the mean square
    factor: float  # what the block scale is stored times
    redo: bool  # the last pass rounds all codes again, not only those off the grid


FORMS = {
    "IQ2_XXS": Form(32, XXS, 6, 1e-15, 1.0, 1.0, True),
    "IQ2_XS": Form(16, XS, 9, 1e-15, 1.0, 1.0, False),
    "IQ2_S": Form(16, S, 9, 1e-8, 2.0, 0.9875, False),
    "IQ3_XXS": Form(32, XXS, 15, 1e-8, 2.0, 1.0125, False),
    "IQ3_S": Form(32, S, 9, 1e-45, 2.0, 1.033, True),
}


class Group(NamedTuple):
    """Scratch of a tile, and what is kept of a group. Lane order: element i of lane k at i * WIDTH + k."""

    v: np.ndarray  # magnitudes (one may be negative, where an even number of signs is wanted)
    wv: np.ndarray  # weight times magnitude
    root: np.ndarray  # square root of the weight
    v_rows: np.ndarray  # v lane by lane
    root_rows: np.ndarray  # root lane by lane
    codes: np.ndarray  # int32 codes of a step
    best: np.ndarray  # int32 codes of the best step, OFF added to those that were moved to a neighbour
    points: np.ndarray  # int32 codes of the whole group of super-blocks, [tile][code][lane]
    signs: np.ndarray  # int32, the same for signs, 8 to an element
    scale: np.ndarray  # scales of a step, by lane
    levels: np.ndarray  # int32, what fit_positive leaves
    off: np.ndarray  # int32: where codes are off the grid
    ladder: np.ndarray  # what the low bits of 0..15 stand for as a level


@inline
def _group():
    return Group(
        scratch(32, WIDTH, _F32), scratch(32, WIDTH, _F32), scratch(32, WIDTH, _F32), scratch(32, WIDTH, _F32),
        scratch(32, WIDTH, _F32), scratch(8, WIDTH, _I32), scratch(8, WIDTH, _I32), scratch(4, SUBS, _I32),
        scratch(2, SUBS, _I32), scratch(1, WIDTH, _F32), scratch(32, WIDTH, _I32),
        scratch(8, WIDTH, _I32), scratch(1, RUN, _F32),
    )  # fmt: skip


OFF = 1 << 16  # marks a code that was moved to a neighbour


# ---- 16 candidates at a time


@intrinsic(prefer_literal=True)
def lookup(tyctx, table, index, width):
    """table[index & 15] for each of 16 lanes; the table repeats after 2 ** width entries, width 2 or 3."""
    few = width.literal_value == 2

    def codegen(context, builder, sig, args):
        features = context.codegen().magic_tuple()[2]
        if "+avx512f" in features:
            return _call(builder, "llvm.x86.avx512.permvar.sf.512", *args[:2])
        if "+avx2" in features and not few:
            return _by_halves(builder, "llvm.x86.avx2.permps", *args[:2])
        if "+avx" in features and few:
            return _by_halves(builder, "llvm.x86.avx.vpermilvar.ps.256", *args[:2])
        out = ir.Constant(table.llvm, ir.Undefined)
        for k in range(16):
            at = builder.and_(builder.extract_element(args[1], _WORD(k)), _WORD(15))
            out = builder.insert_element(out, builder.extract_element(args[0], at), _WORD(k))
        return out

    return table(table, index, width), codegen


def _call(builder, name, table, index):
    shape = ir.FunctionType(table.type, [table.type, index.type])
    return builder.call(cgutils.get_or_insert_function(builder.module, shape, name), [table, index])


def _by_halves(builder, name, table, index):
    def half(v, h):
        return builder.shuffle_vector(v, v, ir.Constant(ir.VectorType(_WORD, 8), list(range(8 * h, 8 * h + 8))))

    both = (_call(builder, name, half(table, 0), half(index, h)) for h in range(2))
    return builder.shuffle_vector(*both, ir.Constant(ir.VectorType(_WORD, 16), list(range(16))))


def _least_bits(builder, value):
    """The least of 16 floats >= 0 as a splat of bits: they order as unsigned integers do."""
    words = ir.VectorType(_WORD, 16)
    v = builder.bitcast(value, words)
    for step in (8, 4, 2, 1):
        other = builder.shuffle_vector(v, v, ir.Constant(words, [k ^ step for k in range(16)]))
        v = builder.select(builder.icmp_unsigned("<", other, v), other, v)
    return v


@intrinsic
def first_least(tyctx, value):
    """The first lane of 16 with the least value; values are >= 0."""

    def codegen(context, builder, sig, args):
        words = ir.VectorType(_WORD, 16)
        equal = builder.icmp_unsigned("==", builder.bitcast(args[0], words), _least_bits(builder, args[0]))
        word = builder.zext(builder.bitcast(equal, ir.IntType(16)), ir.IntType(64))
        return builder.cttz(word, ir.IntType(1)(1))

    return types.int64(value), codegen


@intrinsic
def first_least_of(tyctx, value, run):
    """16 * run + lane, the least of those with the least value."""

    def codegen(context, builder, sig, args):
        words = ir.VectorType(_WORD, 16)
        equal = builder.icmp_unsigned("==", builder.bitcast(args[0], words), _least_bits(builder, args[0]))
        at = builder.add(builder.shl(args[1], ir.Constant(words, [4] * 16)), ir.Constant(words, list(range(16))))
        at = builder.select(equal, at, ir.Constant(words, [0x7FFFFFFF] * 16))
        least = _least_bits(builder, at)
        return builder.zext(builder.extract_element(least, _WORD(0)), ir.IntType(64))

    return types.int64(value, run), codegen


def quantize(name: str, source: np.ndarray, kind: int, out: np.ndarray, cols: int, imatrix: np.ndarray | None) -> None:
    """Quantize the super-blocks of ``source`` (its bytes, flat) into ``out`` (flat). ``imatrix``: float32 [cols]."""
    f, t, blocks = FORMS[name], tables(name), out.size // QTYPES[name].nbytes
    weights = np.empty(0, _U8) if imatrix is None else imatrix.view(_U8)
    pairs = name.startswith("IQ2")
    tries = steps(0, 0.1 if pairs else 0.2, range(-f.tries, f.tries + 1), 5 if pairs else 15)
    search = _quantize2 if pairs else _quantize3
    search(
        source, kind, out, blocks, cols, weights, f.weights, f.layout, _F32(f.tiny), _F32(f.sigma), _F32(f.factor),
        f.redo, tries, steps(0, 0.1, CODES, 4), t.place, t.runs, t.lists,
    )  # fmt: skip


@kernel
def _quantize2(
    source, kind, out, blocks, cols, imatrix, n, layout, tiny, sigma, factor, redo, tries, coarse, place, runs, lists
):
    k, g = work(), _group()
    _set_ladder(3, g)
    for first in range(0, blocks, GROUP):
        _load(source, kind, first, blocks, n, sigma, k)
        for tile in range(GROUP * 256 // n // WIDTH):
            _weigh(imatrix, cols, first, tile, n, 0.25, k)
            _magnitudes(tile, n, layout != S, k, g)
            _fit(tile, n, 8, 2, layout == XXS, tiny, redo, tries, coarse, place, runs, lists, layout != S, k, g)
        block_scale(256 // n, 15, factor, k)
        for block in range(min(GROUP, blocks - first)):
            if layout == XXS:
                _pack_iq2_xxs(out, (first + block) * 66, block, place, k, g)
            else:
                _pack_iq2(out, (first + block) * (74 if layout == XS else 82), block, layout == XS, place, k, g)


@kernel
def _quantize3(
    source, kind, out, blocks, cols, imatrix, n, layout, tiny, sigma, factor, redo, tries, coarse, place, runs, lists
):
    k, g = work(), _group()
    _set_ladder(7, g)
    for first in range(0, blocks, GROUP):
        _load(source, kind, first, blocks, n, sigma, k)
        for tile in range(GROUP * 256 // n // WIDTH):
            _weigh(imatrix, cols, first, tile, n, 0.0, k)
            _magnitudes(tile, n, layout != S, k, g)
            _fit(tile, n, 4, 3, False, tiny, redo, tries, coarse, place, runs, lists, layout != S, k, g)
        block_scale(256 // n, 15, factor, k)
        for block in range(min(GROUP, blocks - first)):
            if layout == XXS:
                _pack_iq3_xxs(out, (first + block) * 98, block, place, k, g)
            else:
                _pack_iq3_s(out, (first + block) * 110, block, place, k, g)


@inline
def _set_ladder(mask, g):
    for j in range(RUN):
        g.ladder[j] = _F32(2 * (j & mask) + 1)


@inline
def _load(source, kind, first, blocks, n, sigma, k):
    load_group(source, kind, first, blocks, n, k)
    load_sigma2(source, kind, first, blocks, sigma, n, k)


@inline
def _weigh(imatrix, cols, first, tile, n, share, k):
    """Weights of a tile; without an imatrix x * x plus a share of sigma2."""
    if len(imatrix) > 0:
        load_importance(imatrix, cols, first, tile, n, k)
        weigh(tile, n, k)
    else:
        sigma2 = load(k.d, tile * WIDTH, WIDTH)
        for i in range(n):
            v = load(k.x, (tile * n + i) * WIDTH, WIDTH)
            store(k.w, i * WIDTH, v * v if share == 0.0 else _F32(share) * sigma2 + v * v)


@inline
def _magnitudes(tile, n, even, k, g):
    """Signs and magnitudes. ``even``: an odd number of minus signs in 8 is mended where it costs least."""
    zero = splat(0.0, WIDTH)
    for o in range(n // 8):
        signs, odd = zeros(zero, _I32), zeros(zero, _BOOL)
        at = (tile * n + 8 * o) * WIDTH
        cheapest, least = zeros(zero, _I32), zero
        for i in range(8):
            x, w = load(k.x, at + i * WIDTH, zero), load(k.w, (8 * o + i) * WIDTH, zero)
            minus = x < 0.0
            signs |= to(minus, _I32) << i
            odd = odd ^ minus
            v = select(minus, -x, x)
            store(g.v, (8 * o + i) * WIDTH, v)
            cost = w * x * x
            if i == 0:
                least = cost
            else:
                less = cost < least
                least, cheapest = select(less, cost, least), select(less, i, cheapest)
        if even:
            for i in range(8):
                flip = odd & (cheapest == i)
                v = load(g.v, (8 * o + i) * WIDTH, zero)
                store(g.v, (8 * o + i) * WIDTH, select(flip, -v, v))
                signs = signs ^ (to(flip, _I32) << i)
            signs = signs & 127
        store(g.signs, (tile * (n // 8) + o) * WIDTH, signs)
    for i in range(n):
        v, w = load(g.v, i * WIDTH, zero), load(k.w, i * WIDTH, zero)
        store(g.wv, i * WIDTH, w * v)
        store(g.root, i * WIDTH, sqrt(w))
    for lane in range(0, WIDTH, 16):
        for i in range(0, n, 16):
            transpose(g.v, i * WIDTH + lane, WIDTH, g.v_rows, lane * n + i, n)
            transpose(g.root, i * WIDTH + lane, WIDTH, g.root_rows, lane * n + i, n)


@inline
def _fit(tile, n, per, width, positive, tiny, redo, tries, coarse, place, runs, lists, even, k, g):
    """Scales and grid points of a tile's groups. A code is ``per`` levels of ``width`` bits."""
    zero = splat(0.0, WIDTH)
    most = load(g.v, 0, zero)
    for i in range(1, n):
        most = fmax(most, load(g.v, i * WIDTH, zero))
    empty = most < tiny
    top = 2 if width == 2 else 7
    scale = most / (2 * top + 1)
    if positive:
        scale = fit_positive(g.v, k.w, g.levels, 32, 4, coarse, zero)
        most = scale * 3.0
        empty |= most <= 0.0
    best = zero
    for c in range(n // per):
        store(g.best, c * WIDTH, zeros(zero, _I32) + (OFF if redo else 0))
    for s in range(len(tries)):
        inverse = tries[s] / most
        for c in range(n // per):
            store(g.codes, c * WIDTH, _round(inverse, c, per, width, top, g))
        _move(1.0 / inverse, n, per, width, place, runs, lists, g)
        sum_qx, sum_q2 = _sums(n, per, width, k, g)
        better = (sum_q2 > 0.0) & (sum_qx * sum_qx > best * sum_q2)
        scale = select(better, sum_qx / sum_q2, scale)
        best = select(better, scale * sum_qx, best)
        for c in range(n // per):
            store(g.best, c * WIDTH, select(better, load(g.codes, c * WIDTH, WIDTH), load(g.best, c * WIDTH, WIDTH)))
    scale = _refit(scale, n, per, width, top, redo, positive, place, runs, lists, k, g)
    flip = scale < 0.0
    scale = select(empty, 0.0, select(flip, -scale, scale))
    store(k.fits, tile * WIDTH, scale)
    store(k.fits, SUBS + tile * WIDTH, select(empty, splat(1.0, WIDTH), zero))
    for c in range(n // per):
        store(g.points, (tile * (n // per) + c) * WIDTH, select(empty, 0, load(g.codes, c * WIDTH, WIDTH) & 0xFFFF))
    for o in range(n // 8):
        at = (tile * (n // 8) + o) * WIDTH
        signs = load(g.signs, at, WIDTH)
        signs = select(flip, ~signs & (127 if even else 255), signs)
        store(g.signs, at, select(empty, 0, signs))


@inline
def _round(inverse, c, per, width, top, g):
    code = zeros(inverse, _I32)
    for i in range(per):
        v = load(g.v, (c * per + i) * WIDTH, inverse)
        code |= level_int(0.5 * (inverse * v - 1.0), 0.0, _F32(top)) << (width * i)
    return code


@inline
def _sums(n, per, width, k, g):
    """Sums of (w * v) * q and (w * q) * q over the grid points in g.codes."""
    zero = splat(0.0, WIDTH)
    sum_qx, sum_q2 = zero, zero
    for c in range(n // per):
        code = load(g.codes, c * WIDTH, zero)
        for i in range(per):
            q = to((((code >> (width * i)) & ((1 << width) - 1)) << 1) | 1, _F32)
            at = (c * per + i) * WIDTH
            sum_qx += load(g.wv, at, zero) * q
            sum_q2 += load(k.w, at, zero) * q * q
    return sum_qx, sum_q2


@inline
def _refit(scale, n, per, width, top, redo, always, place, runs, lists, k, g):
    """Round again with the best scale what had left the grid (or all), and fit the scale once more."""
    zero = splat(0.0, WIDTH)
    off = zeros(zero, _I32)
    for c in range(n // per):
        off |= load(g.best, c * WIDTH, zero)
    again = scale > 0.0
    if not always:
        again &= off >= OFF
    inverse = 1.0 / scale
    for c in range(n // per):
        code = load(g.best, c * WIDTH, zero)
        fresh = again if redo else again & (code >= OFF)
        store(g.codes, c * WIDTH, select(fresh, _round(inverse, c, per, width, top, g), code & 0xFFFF))
    _move(scale, n, per, width, place, runs, lists, g)
    sum_qx, sum_q2 = _sums(n, per, width, k, g)
    return select(again & (sum_q2 > 0.0), sum_qx / sum_q2, scale)


@inline
def _move(scale, n, per, width, place, runs, lists, g):
    """Replace codes off the grid by their best neighbours, and mark them."""
    store(g.scale, 0, scale)
    count = 0
    for at in range(n // per * WIDTH):  # without a branch: which codes are off the grid cannot be predicted
        g.off[count] = at
        count += place[g.codes[at]] < 0
    for o in range(count):
        at = g.off[o]
        lane, code = at % WIDTH, g.codes[at]
        begin = RUN * np.int64(~place[code])
        levels, row = g.scale[lane] * load(g.ladder, 0, RUN), lane * n + at // WIDTH * per
        found = neighbour(lists, begin, runs[code], per, width, levels, g.v_rows, g.root_rows, row)
        g.codes[at] = OFF | lists[begin + found]


@inline
def neighbour(lists, begin, runs, per, width, levels, values, weights, row):
    """Which candidate has the least sum of (weight * d) * d, d = level - value: the first of equals.

    ``levels``: what the low bits of a code stand for; ``values`` and ``weights`` of the code start at ``row``.
    """
    index = to(load(lists, begin, RUN), _I32)
    least = _errors(index, per, width, levels, values, weights, row)
    if runs == 1:
        return first_least(least)
    where = zeros(index, _I32)
    for r in range(1, runs):
        index = to(load(lists, begin + r * RUN, RUN), _I32)
        errors = _errors(index, per, width, levels, values, weights, row)
        less = errors < least
        least, where = select(less, errors, least), select(less, r, where)
    return first_least_of(least, where)


@inline
def _errors(index, per, width, levels, values, weights, row):
    """Errors of 16 codes: that of a weight is looked up by its level, the low bits of a shifted code."""
    total = splat(0.0, RUN)
    for i in range(per):
        d = levels - values[row + i]
        table = weights[row + i] * d * d
        part = lookup(table, index >> (width * i), 2) if width == 2 else lookup(table, index >> (width * i), 3)
        total = part if i == 0 else total + part
    return total


@inline
def block_scale(subs, top, factor, k):
    """Block scale, stored times ``factor``, and codes 0..top of the group scales; a super-block per lane."""
    zero = splat(0.0, GROUP)
    by_block(0, subs, k)
    most = zero
    for j in range(subs):
        most = fmax(most, load(k.columns, j * GROUP, zero))
    dead = most == 0.0
    d = most / _F32(2 * top + 1)
    inverse = 1.0 / d
    for j in range(subs):
        l = level_int(0.5 * (inverse * load(k.columns, j * GROUP, zero) - 1.0), 0.0, _F32(top))
        store(k.codes, j * GROUP, select(dead, 0, l))
    store(k.halves, 0, select(dead, 0, to_half(d * factor)))
    store(k.scales, 0, most)


@inline
def _pack_nibbles(out, o, subs, block, k):
    for j in range(0, subs, 2):
        out[o + j // 2] = _U8(k.codes[j * GROUP + block] | k.codes[(j + 1) * GROUP + block] << 4)


@inline
def _pack_word(out, o, at, code, g):
    """28 sign bits and the 4-bit scale code of a group of 32."""
    word = code << 28
    for s in range(4):
        word |= g.signs[at + s * WIDTH] << (7 * s)
    for b in range(4):
        out[o + b] = _U8((word >> (8 * b)) & 255)


@inline
def _pack_iq2_xxs(out, o, block, place, k, g):
    put_half(out, o, k.halves[block])
    for j in range(8):
        sub = block * 8 + j
        at = sub // WIDTH * 4 * WIDTH + sub % WIDTH
        for c in range(4):
            out[o + 2 + 8 * j + c] = _U8(place[g.points[at + c * WIDTH]])
        _pack_word(out, o + 6 + 8 * j, at, k.codes[j * GROUP + block], g)
    if k.scales[block] == 0.0:
        out[o + 2 : o + 66] = 0


@inline
def _pack_iq2(out, o, block, xs, place, k, g):
    put_half(out, o, k.halves[block])
    if not xs:
        out[o + 66 : o + 74] = 0
    for j in range(16):
        sub = block * 16 + j
        for c in range(2):
            at = (sub // WIDTH * 2 + c) * WIDTH + sub % WIDTH
            point, signs, to_ = place[g.points[at]], g.signs[at], 2 * j + c
            if xs:
                put_half(out, o + 2 + 2 * to_, point | signs << 9)
            else:
                out[o + 2 + to_] = _U8(point & 255)
                out[o + 34 + to_] = _U8(signs)
                out[o + 66 + to_ // 4] |= _U8(point >> 8 << 2 * (to_ % 4))
    if xs and k.scales[block] == 0.0:
        out[o + 2 : o + 66] = 0
    _pack_nibbles(out, o + (66 if xs else 74), 16, block, k)


@inline
def _pack_iq3_xxs(out, o, block, place, k, g):
    put_half(out, o, k.halves[block])
    for j in range(8):
        sub = block * 8 + j
        at = sub // WIDTH * 8 * WIDTH + sub % WIDTH
        for c in range(8):
            out[o + 2 + 8 * j + c] = _U8(place[g.points[at + c * WIDTH]])
        _pack_word(out, o + 66 + 4 * j, sub // WIDTH * 4 * WIDTH + sub % WIDTH, k.codes[j * GROUP + block], g)
    if k.scales[block] == 0.0:
        out[o + 2 : o + 98] = 0


@inline
def _pack_iq3_s(out, o, block, place, k, g):
    """ggml's fault, kept: after a group of zeros the points and signs of later groups are stored one group early."""
    put_half(out, o, k.halves[block])
    out[o + 2 : o + 106] = 0
    live = 0
    for j in range(8):
        sub = block * 8 + j
        if k.fits[SUBS + sub] == 0.0:
            for c in range(8):
                point = place[g.points[(sub // WIDTH * 8 + c) * WIDTH + sub % WIDTH]]
                out[o + 2 + 8 * live + c] = _U8(point & 255)
                out[o + 66 + j] |= _U8(point >> 8 << c)
            for s in range(4):
                out[o + 74 + 4 * live + s] = _U8(g.signs[(sub // WIDTH * 4 + s) * WIDTH + sub % WIDTH])
            live += 1
    _pack_nibbles(out, o + 106, 8, block, k)
