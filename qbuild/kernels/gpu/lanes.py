"""The searches of ``qbuild.kernels.search`` with one problem per GPU thread: the same float32 operations in that order.

Kernels are launched with ``enable_fp_fusion=False``; division and root are the IEEE ones; ``/`` would be approximate.
A NaN made by x86 has the mantissa 0x400000, one made by a GPU has 0x7FFFFF, and ggml's rounding looks at the mantissa:
``nearest`` gives a NaN the bits it has on x86.

A lane's weights ``xs``, their importance ``ws`` and their levels are tuples of ``SUB`` tensors, which live in
registers: the loops over them are unrolled, and launches keep one element to a thread (``BLOCK`` = 32 * warps).
"""

from __future__ import annotations

import triton
import triton.language as tl

MAGIC = tl.constexpr(12582912.0)
MAGIC_BITS = tl.constexpr(0x4B400000)
TINY = tl.constexpr(1.0000000036274937e-15)  # the float32 nearest to 1e-15


@triton.jit
def weights_at(source, at, live, KIND: tl.constexpr):
    """Weights as float32. ``source`` holds float32, float16, or the bits of bfloat16 in int16."""
    v = tl.load(source + at, mask=live, other=0)
    if KIND == "BF16":
        return (v.to(tl.int32) << 16).to(tl.float32, bitcast=True)
    return v.to(tl.float32)


@triton.jit
def all_weights_at(words, first, live, KIND: tl.constexpr, COUNT: tl.constexpr):
    """``COUNT`` weights from ``first`` on, both multiples of 4. ``words`` is the source as int64: Triton's time to
    compile grows with the number of loads."""
    EACH: tl.constexpr = 2 if KIND == "F32" else 4
    found = ()
    for i in tl.static_range(COUNT // EACH):
        word = tl.load(words + first // EACH + i, mask=live, other=0)
        for j in tl.static_range(EACH):
            if KIND == "F32":
                v = (word >> (32 * j)).to(tl.int32).to(tl.float32, bitcast=True)
            elif KIND == "F16":
                v = (word >> (16 * j)).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
            else:
                v = ((word >> (16 * j)).to(tl.int32) << 16).to(tl.float32, bitcast=True)
            found = found + (v,)
    return found


@triton.jit
def all_at(at, step, live, COUNT: tl.constexpr):
    """``COUNT`` float32 of memory, ``step`` apart."""
    found = ()
    for i in tl.static_range(COUNT):
        found = found + (tl.load(at + i * step, mask=live, other=0.0),)
    return found


@triton.jit
def total_of(values, COUNT: tl.constexpr):
    """Their sum in order, from 0."""
    total = tl.zeros_like(values[0])
    for i in tl.static_range(COUNT):
        total += values[i]
    return total


@triton.jit
def less(a, b):
    return tl.where(a < b, a, b)


@triton.jit
def more(a, b):
    return tl.where(a > b, a, b)


@triton.jit
def nearest(v):
    """ggml's nearest_int(v), plus MAGIC, as a float32."""
    t = v + MAGIC
    word = tl.where(t == t, t.to(tl.int32, bitcast=True), 0x7FC00000)
    return ((word & 0x7FFFFF) | 0x4B000000).to(tl.float32, bitcast=True)


@triton.jit
def nearest_int(v):
    return nearest(v).to(tl.int32, bitcast=True) - MAGIC_BITS


@triton.jit
def level(v, LOW: tl.constexpr, HIGH: tl.constexpr):
    """nearest_int(v) clamped to LOW..HIGH, as a float32."""
    t = nearest(v)
    t = tl.where(t > MAGIC + LOW, t, MAGIC + LOW)
    return tl.where(t < MAGIC + HIGH, t, MAGIC + HIGH) - MAGIC


@triton.jit
def calm_level(v, LOW: tl.constexpr, HIGH: tl.constexpr):
    """``level`` where |v| < 2**22: there ``nearest`` changes nothing, and four instructions are left of nine."""
    return tl.minimum(tl.maximum(v + MAGIC, MAGIC + LOW), MAGIC + HIGH) - MAGIC


@triton.jit
def level_of(v, LOW: tl.constexpr, HIGH: tl.constexpr, CALM: tl.constexpr):
    if CALM:
        return calm_level(v, LOW, HIGH)
    return level(v, LOW, HIGH)


@triton.jit
def truncate(v):
    """float32 to int32 as x86 does it: out of range and NaN give INT_MIN."""
    inside = tl.abs(v) < 2147483648.0
    return tl.where(inside, tl.where(inside, v, 0.0).to(tl.int32), -2147483648)


@triton.jit
def signed_byte(v):
    return (v << 24) >> 24


@triton.jit
def to_half(v):
    """float32 to float16 bits in int32, round to nearest even; a NaN as x86 makes it: negative, 0x7E00."""
    half = v.to(tl.float16).to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
    return tl.where(v == v, half, 0xFE00)


@triton.jit
def from_half(half):
    return half.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def put_half(out, at, half, live):
    tl.store(out + at, (half & 255).to(tl.uint8), mask=live)
    tl.store(out + at + 1, (half >> 8).to(tl.uint8), mask=live)


# ---- scale and minimum: x = scale * q + low, q in 0..TOP


@triton.jit
def fit_affine(
    xs, ws, tries, SUB: tl.constexpr, TOP: tl.constexpr, TRIES: tl.constexpr, ABS: tl.constexpr, CALM: tl.constexpr
):  # fmt: skip
    """make_qkx2_quants and make_qkx3_quants, as search.fit_affine: (scale, low, inverse, base, sum of weights, wild).

    ``CALM``: levels are rounded by ``calm_level``; where a lane is ``wild``, that was wrong.
    """
    zero = tl.zeros_like(xs[0])
    low, high, sum_w, sum_x = xs[0], xs[0], ws[0], ws[0] * xs[0]
    for i in tl.static_range(1, SUB):
        low, high = less(xs[i], low), more(xs[i], high)
        sum_w += ws[i]
        sum_x += ws[i] * xs[i]
    low = tl.where(low > 0.0, 0.0, low)
    flat, floor, base = low == high, low, low
    inverse = tl.div_rn(zero + TOP, high - low)
    scale = tl.div_rn(zero + 1.0, inverse)
    calm = _is_calm(inverse, floor, high, low)
    ls = _levels(xs, inverse, low, SUB, TOP, CALM)
    best = _misfit(xs, ws, ls, scale, low, SUB, ABS)
    for s in range(TRIES):
        trial = tl.div_rn(zero + tl.load(tries + s), high - low)
        calm &= _is_calm(trial, floor, high, low)
        ls = _levels(xs, trial, low, SUB, TOP, CALM)
        sum_l, sum_l2, sum_xl = zero, zero, zero
        for i in tl.static_range(SUB):
            wl = ws[i] * ls[i]
            sum_l += wl
            sum_l2 += wl * ls[i]
            sum_xl += wl * xs[i]
        D = sum_w * sum_l2 - sum_l * sum_l
        new_scale = tl.div_rn(sum_w * sum_xl - sum_x * sum_l, D)
        new_low = tl.div_rn(sum_l2 * sum_x - sum_l * sum_xl, D)
        above = new_low > 0.0
        new_scale = tl.where(above, tl.div_rn(sum_xl, sum_l2), new_scale)
        new_low = tl.where(above, 0.0, new_low)
        error = _misfit(xs, ws, ls, new_scale, new_low, SUB, ABS)
        better = (D > 0.0) & (error < best)
        best, scale = tl.where(better, error, best), tl.where(better, new_scale, scale)
        inverse, base = tl.where(better, trial, inverse), tl.where(better, low, base)
        low = tl.where(better, new_low, low)
    scale, low = tl.where(flat, 0.0, scale), tl.where(flat, floor, low)
    return scale, low, tl.where(flat, 0.0, inverse), tl.where(flat, 0.0, base), sum_w, ~(calm | flat)


@triton.jit
def _is_calm(inverse, lowest, high, low):
    """Rounding is monotone: what holds at both ends of the weights holds between them."""
    return (tl.abs(inverse * (high - low)) < 4194304.0) & (tl.abs(inverse * (lowest - low)) < 4194304.0)


@triton.jit
def _levels(xs, inverse, base, SUB: tl.constexpr, TOP: tl.constexpr, CALM: tl.constexpr):
    ls = ()
    for i in tl.static_range(SUB):
        ls = ls + (level_of(inverse * (xs[i] - base), 0.0, TOP, CALM),)
    return ls


@triton.jit
def _misfit(xs, ws, ls, scale, low, SUB: tl.constexpr, ABS: tl.constexpr):
    total = tl.zeros_like(scale)
    for i in tl.static_range(SUB):
        d = scale * ls[i] + low - xs[i]
        if ABS:
            total += ws[i] * tl.abs(d)
        else:
            total += ws[i] * (d * d)
    return total


# ---- scale alone: x = scale * q, q in -TOP..TOP-1


@triton.jit
def extreme_of(xs, SUB: tl.constexpr):
    """The first weight of largest magnitude, and that magnitude."""
    extreme = tl.zeros_like(xs[0])
    largest = extreme
    for i in tl.static_range(SUB):
        a = tl.abs(xs[i])
        above = a > largest
        extreme, largest = tl.where(above, xs[i], extreme), tl.where(above, a, largest)
    return extreme, largest


@triton.jit
def fit_scale(xs, ws, tries, SUB: tl.constexpr, TOP: tl.constexpr, TRIES: tl.constexpr, CALM: tl.constexpr):
    """make_qx_quants: (scale, inverse), as search.fit_scale. ``CALM``: the weights are finite, so that their levels are
    below 2**22 wherever the block is not taken for all zero."""
    extreme, largest = extreme_of(xs, SUB)
    zero = tl.zeros_like(largest)
    inverse = tl.div_rn(zero + tl.load(tries), extreme)
    sum_lx, sum_l2 = _scale_sums(xs, ws, inverse, SUB, TOP, CALM)
    scale = tl.where(sum_l2 != 0.0, tl.div_rn(sum_lx, sum_l2), 0.0)
    best = scale * sum_lx
    for s in range(1, TRIES):
        trial = tl.div_rn(zero + tl.load(tries + s), extreme)
        sum_lx, sum_l2 = _scale_sums(xs, ws, trial, SUB, TOP, CALM)
        better = (sum_l2 > 0.0) & (sum_lx * sum_lx > best * sum_l2)
        scale, inverse = tl.where(better, tl.div_rn(sum_lx, sum_l2), scale), tl.where(better, trial, inverse)
        best = tl.where(better, scale * sum_lx, best)
    empty = largest < TINY
    return tl.where(empty, 0.0, scale), tl.where(empty, 0.0, inverse)


@triton.jit
def _scale_sums(xs, ws, inverse, SUB: tl.constexpr, TOP: tl.constexpr, CALM: tl.constexpr):
    sum_lx = tl.zeros_like(inverse)
    sum_l2 = sum_lx
    for i in tl.static_range(SUB):
        l = level_of(inverse * xs[i], -TOP, TOP - 1.0, CALM)
        sum_lx += ws[i] * xs[i] * l
        sum_l2 += ws[i] * l * l
    return sum_lx, sum_l2


@triton.jit
def fit_scale_by_descent(xs, ws, SUB: tl.constexpr, TOP: tl.constexpr):
    """make_q3_quants with rmse: (scale, mask of all-zero lanes, levels in float32)."""
    extreme, largest = extreme_of(xs, SUB)
    sum_lx = tl.zeros_like(largest)
    sum_l2 = sum_lx
    inverse = tl.div_rn(sum_lx - TOP, extreme)
    ls = ()
    for i in tl.static_range(SUB):
        l = level(inverse * xs[i], -TOP, TOP - 1.0)
        ls = ls + (l,)
        sum_lx += ws[i] * xs[i] * l
        sum_l2 += ws[i] * l * l
    for _ in range(5):  # a lane that no longer changes stays as it is
        ls, sum_lx, sum_l2 = _descend(xs, ws, ls, sum_lx, sum_l2, SUB, TOP)
    empty = largest < TINY
    return tl.where(empty | ~(sum_l2 > 0.0), 0.0, tl.div_rn(sum_lx, sum_l2)), empty, ls


@triton.jit
def _descend(xs, ws, ls, sum_lx, sum_l2, SUB: tl.constexpr, TOP: tl.constexpr):
    moved_to = ()
    for i in tl.static_range(SUB):
        l, wv = ls[i], ws[i] * xs[i]
        lx, l2 = sum_lx - wv * l, sum_l2 - ws[i] * l * l
        new = level(tl.div_rn(xs[i] * l2, lx), -TOP, TOP - 1.0)
        moved = (lx > 0.0) & (new != l)
        lx, l2 = lx + wv * new, l2 + ws[i] * new * new
        better = moved & (l2 > 0.0) & (lx * lx * sum_l2 > sum_lx * sum_lx * l2)
        moved_to = moved_to + (tl.where(better, new, l),)
        sum_lx, sum_l2 = tl.where(better, lx, sum_lx), tl.where(better, l2, sum_l2)
    return moved_to, sum_lx, sum_l2


@triton.jit
def fit_positive(xs, ws, tries, SUB: tl.constexpr, TOP: tl.constexpr, TRIES: tl.constexpr):
    """make_qp_quants: the scale of x >= 0 with q in 0..TOP, and the levels, int32 as uint8_t holds them."""
    largest = tl.zeros_like(xs[0])
    for i in tl.static_range(SUB):
        largest = more(largest, xs[i])
    zero = tl.zeros_like(largest)
    inverse = tl.div_rn(zero + tl.load(tries), largest)
    best = _positive_error(xs, ws, inverse, SUB, TOP, True)
    for s in range(1, TRIES):
        trial = tl.div_rn(zero + tl.load(tries + s), largest)
        error = _positive_error(xs, ws, trial, SUB, TOP, False)
        better = error < best
        best, inverse = tl.where(better, error, best), tl.where(better, trial, inverse)
    sum_lx, sum_l2 = zero, zero
    ls = ()
    for i in tl.static_range(SUB):
        l = _at_most(nearest_int(inverse * xs[i]), TOP)
        ls = ls + (l & 255,)
        f = l.to(tl.float32)
        sum_lx += ws[i] * xs[i] * f
        sum_l2 += ws[i] * f * f
    for _ in range(5):
        ls, sum_lx, sum_l2 = _descend_positive(xs, ws, ls, sum_lx, sum_l2, SUB, TOP)
    empty = largest < TINY
    codes = ()
    for i in tl.static_range(SUB):
        codes = codes + (tl.where(empty, 0, ls[i]),)
    return tl.where(empty | ~(sum_l2 > 0.0), 0.0, tl.div_rn(sum_lx, sum_l2)), codes


@triton.jit
def _descend_positive(xs, ws, ls, sum_lx, sum_l2, SUB: tl.constexpr, TOP: tl.constexpr):
    moved_to = ()
    for i in tl.static_range(SUB):
        l, wv = ls[i], ws[i] * xs[i]
        f = l.to(tl.float32)
        lx, l2 = sum_lx - wv * f, sum_l2 - ws[i] * f * f
        new = _at_most(nearest_int(tl.div_rn(xs[i] * l2, lx)), TOP)
        moved = (lx > 0.0) & (l2 > 0.0) & (new != l)
        g = new.to(tl.float32)
        lx, l2 = lx + wv * g, l2 + ws[i] * g * g
        better = moved & (lx * lx * sum_l2 > sum_lx * sum_lx * l2)
        moved_to = moved_to + (tl.where(better, new & 255, l),)
        sum_lx, sum_l2 = tl.where(better, lx, sum_lx), tl.where(better, l2, sum_l2)
    return moved_to, sum_lx, sum_l2


@triton.jit
def _positive_error(xs, ws, trial, SUB: tl.constexpr, TOP: tl.constexpr, FIRST: tl.constexpr):
    error = tl.zeros_like(trial)
    scale = tl.div_rn(error + 1.0, trial)
    for i in tl.static_range(SUB):
        l = nearest_int(trial * xs[i])
        if FIRST:
            l = l & 255
        else:
            l = _at_most(l, TOP)
        d = xs[i] - scale * l.to(tl.float32)
        error += ws[i] * d * d
    return error


@triton.jit
def _at_most(l, TOP: tl.constexpr):
    return tl.where(l < TOP, l, TOP)
