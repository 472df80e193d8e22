"""The searches of ``qbuild.kernels.search`` with one problem per GPU thread: the same float32 operations in that order.

Kernels are launched with ``enable_fp_fusion=False``; division and root are the IEEE ones; ``/`` would be approximate.
A NaN made by x86 has the mantissa 0x400000, one made by a GPU has 0x7FFFFF, and ggml's rounding looks at the mantissa:
``nearest`` gives a NaN the bits it has on x86.

``px`` and ``pw`` are the addresses of a lane's first weight and importance, ``step`` the distance to its next. What a
lane stores it loads again itself: launches keep one element to a thread (``BLOCK`` = 32 * warps).
"""

from __future__ import annotations

import triton
import triton.language as tl

MAGIC = tl.constexpr(12582912.0)
MAGIC_BITS = tl.constexpr(0x4B400000)
TINY = tl.constexpr(1.0000000036274937e-15)  # the float32 nearest to 1e-15


@triton.jit
def weights_at(source, at, live, BF16: tl.constexpr):
    """Weights as float32. ``source`` holds float32, float16, or the bits of bfloat16 in int16."""
    v = tl.load(source + at, mask=live, other=0)
    if BF16:
        return (v.to(tl.int32) << 16).to(tl.float32, bitcast=True)
    return v.to(tl.float32)


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
def fit_affine(px, pw, step, tries, live, SUB: tl.constexpr, TOP: tl.constexpr, TRIES: tl.constexpr, ABS: tl.constexpr):
    """make_qkx2_quants and make_qkx3_quants: (scale, low, inverse, base, sum of weights), as search.fit_affine."""
    v = tl.load(px, mask=live, other=0.0)
    weight = tl.load(pw, mask=live, other=0.0)
    low, high, sum_w, sum_x = v, v, weight, weight * v
    for i in range(1, SUB):
        v = tl.load(px + i * step, mask=live, other=0.0)
        weight = tl.load(pw + i * step, mask=live, other=0.0)
        low, high = less(v, low), more(v, high)
        sum_w += weight
        sum_x += weight * v
    low = tl.where(low > 0.0, 0.0, low)
    zero = tl.zeros_like(low)
    flat, floor, base = low == high, low, low
    inverse = tl.div_rn(zero + TOP, high - low)
    scale = tl.div_rn(zero + 1.0, inverse)
    best = _misfit(px, pw, step, live, inverse, base, scale, low, SUB, TOP, ABS)
    for s in range(TRIES):
        trial = tl.div_rn(zero + tl.load(tries + s), high - low)
        sum_l, sum_l2, sum_xl = zero, zero, zero
        for i in range(SUB):
            v = tl.load(px + i * step, mask=live, other=0.0)
            l = level(trial * (v - low), 0.0, TOP)
            wl = tl.load(pw + i * step, mask=live, other=0.0) * l
            sum_l += wl
            sum_l2 += wl * l
            sum_xl += wl * v
        D = sum_w * sum_l2 - sum_l * sum_l
        new_scale = tl.div_rn(sum_w * sum_xl - sum_x * sum_l, D)
        new_low = tl.div_rn(sum_l2 * sum_x - sum_l * sum_xl, D)
        above = new_low > 0.0
        new_scale = tl.where(above, tl.div_rn(sum_xl, sum_l2), new_scale)
        new_low = tl.where(above, 0.0, new_low)
        error = _misfit(px, pw, step, live, trial, low, new_scale, new_low, SUB, TOP, ABS)
        better = (D > 0.0) & (error < best)
        best, scale = tl.where(better, error, best), tl.where(better, new_scale, scale)
        inverse, base = tl.where(better, trial, inverse), tl.where(better, low, base)
        low = tl.where(better, new_low, low)
    scale, low = tl.where(flat, 0.0, scale), tl.where(flat, floor, low)
    return scale, low, tl.where(flat, 0.0, inverse), tl.where(flat, 0.0, base), sum_w


@triton.jit
def _misfit(px, pw, step, live, inverse, base, scale, low, SUB: tl.constexpr, TOP: tl.constexpr, ABS: tl.constexpr):
    total = tl.zeros_like(scale)
    for i in range(SUB):
        v = tl.load(px + i * step, mask=live, other=0.0)
        d = scale * level(inverse * (v - base), 0.0, TOP) + low - v
        weight = tl.load(pw + i * step, mask=live, other=0.0)
        if ABS:
            total += weight * tl.abs(d)
        else:
            total += weight * (d * d)
    return total


# ---- scale alone: x = scale * q, q in -TOP..TOP-1


@triton.jit
def extreme_of(px, step, live, SUB: tl.constexpr):
    """The first weight of largest magnitude, and that magnitude."""
    v = tl.load(px, mask=live, other=0.0)
    extreme = tl.where(tl.abs(v) > 0.0, v, 0.0)
    largest = tl.where(tl.abs(v) > 0.0, tl.abs(v), 0.0)
    for i in range(1, SUB):
        v = tl.load(px + i * step, mask=live, other=0.0)
        a = tl.abs(v)
        above = a > largest
        extreme, largest = tl.where(above, v, extreme), tl.where(above, a, largest)
    return extreme, largest


@triton.jit
def fit_scale(px, pw, step, tries, live, SUB: tl.constexpr, TOP: tl.constexpr, TRIES: tl.constexpr):
    """make_qx_quants: (scale, inverse), as search.fit_scale."""
    extreme, largest = extreme_of(px, step, live, SUB)
    zero = tl.zeros_like(largest)
    inverse = tl.div_rn(zero + tl.load(tries), extreme)
    sum_lx, sum_l2 = _scale_sums(px, pw, step, live, inverse, SUB, TOP)
    scale = tl.where(sum_l2 != 0.0, tl.div_rn(sum_lx, sum_l2), 0.0)
    best = scale * sum_lx
    for s in range(1, TRIES):
        trial = tl.div_rn(zero + tl.load(tries + s), extreme)
        sum_lx, sum_l2 = _scale_sums(px, pw, step, live, trial, SUB, TOP)
        better = (sum_l2 > 0.0) & (sum_lx * sum_lx > best * sum_l2)
        scale, inverse = tl.where(better, tl.div_rn(sum_lx, sum_l2), scale), tl.where(better, trial, inverse)
        best = tl.where(better, scale * sum_lx, best)
    empty = largest < TINY
    return tl.where(empty, 0.0, scale), tl.where(empty, 0.0, inverse)


@triton.jit
def _scale_sums(px, pw, step, live, inverse, SUB: tl.constexpr, TOP: tl.constexpr):
    sum_lx = tl.zeros_like(inverse)
    sum_l2 = sum_lx
    for i in range(SUB):
        v = tl.load(px + i * step, mask=live, other=0.0)
        weight = tl.load(pw + i * step, mask=live, other=0.0)
        l = level(inverse * v, -TOP, TOP - 1.0)
        sum_lx += weight * v * l
        sum_l2 += weight * l * l
    return sum_lx, sum_l2


@triton.jit
def fit_scale_by_descent(px, pw, pq, step, live, SUB: tl.constexpr, TOP: tl.constexpr):
    """make_q3_quants with rmse: (scale, mask of all-zero lanes); levels, float32, are left at ``pq``."""
    extreme, largest = extreme_of(px, step, live, SUB)
    sum_lx = tl.zeros_like(largest)
    sum_l2 = sum_lx
    inverse = tl.div_rn(sum_lx - TOP, extreme)
    for i in range(SUB):
        v = tl.load(px + i * step, mask=live, other=0.0)
        weight = tl.load(pw + i * step, mask=live, other=0.0)
        l = level(inverse * v, -TOP, TOP - 1.0)
        tl.store(pq + i * step, l, mask=live)
        sum_lx += weight * v * l
        sum_l2 += weight * l * l
    for _ in range(5):  # a lane that no longer changes stays as it is
        for i in range(SUB):
            v = tl.load(px + i * step, mask=live, other=0.0)
            weight = tl.load(pw + i * step, mask=live, other=0.0)
            l = tl.load(pq + i * step, mask=live, other=0.0)
            wv = weight * v
            lx, l2 = sum_lx - wv * l, sum_l2 - weight * l * l
            new = level(tl.div_rn(v * l2, lx), -TOP, TOP - 1.0)
            moved = (lx > 0.0) & (new != l)
            lx, l2 = lx + wv * new, l2 + weight * new * new
            better = moved & (l2 > 0.0) & (lx * lx * sum_l2 > sum_lx * sum_lx * l2)
            tl.store(pq + i * step, tl.where(better, new, l), mask=live)
            sum_lx, sum_l2 = tl.where(better, lx, sum_lx), tl.where(better, l2, sum_l2)
    empty = largest < TINY
    return tl.where(empty | ~(sum_l2 > 0.0), 0.0, tl.div_rn(sum_lx, sum_l2)), empty


@triton.jit
def fit_positive(px, pw, pq, step, qstep, tries, live, SUB: tl.constexpr, TOP: tl.constexpr, TRIES: tl.constexpr):
    """make_qp_quants: the scale of x >= 0 with q in 0..TOP; levels, int32 as uint8_t holds them, are left at ``pq``."""
    largest = tl.load(px, mask=live, other=0.0)
    largest = more(tl.zeros_like(largest), largest)
    for i in range(1, SUB):
        largest = more(largest, tl.load(px + i * step, mask=live, other=0.0))
    zero = tl.zeros_like(largest)
    inverse = tl.div_rn(zero + tl.load(tries), largest)
    best = _positive_error(px, pw, step, live, inverse, SUB, TOP, True)
    for s in range(1, TRIES):
        trial = tl.div_rn(zero + tl.load(tries + s), largest)
        error = _positive_error(px, pw, step, live, trial, SUB, TOP, False)
        better = error < best
        best, inverse = tl.where(better, error, best), tl.where(better, trial, inverse)
    sum_lx, sum_l2 = zero, zero
    for i in range(SUB):
        v = tl.load(px + i * step, mask=live, other=0.0)
        weight = tl.load(pw + i * step, mask=live, other=0.0)
        l = _at_most(nearest_int(inverse * v), TOP)
        tl.store(pq + i * qstep, l & 255, mask=live)
        f = l.to(tl.float32)
        sum_lx += weight * v * f
        sum_l2 += weight * f * f
    sum_lx, sum_l2 = _descend(px, pw, pq, step, qstep, live, sum_lx, sum_l2, SUB, TOP)
    empty = largest < TINY
    for i in range(SUB):
        l = tl.load(pq + i * qstep, mask=live, other=0)
        tl.store(pq + i * qstep, tl.where(empty, 0, l), mask=live)
    return tl.where(empty | ~(sum_l2 > 0.0), 0.0, tl.div_rn(sum_lx, sum_l2))


@triton.jit
def _positive_error(px, pw, step, live, trial, SUB: tl.constexpr, TOP: tl.constexpr, FIRST: tl.constexpr):
    error = tl.zeros_like(trial)
    scale = tl.div_rn(error + 1.0, trial)
    for i in range(SUB):
        v = tl.load(px + i * step, mask=live, other=0.0)
        l = nearest_int(trial * v)
        if FIRST:
            l = l & 255
        else:
            l = _at_most(l, TOP)
        d = v - scale * l.to(tl.float32)
        error += tl.load(pw + i * step, mask=live, other=0.0) * d * d
    return error


@triton.jit
def _at_most(l, TOP: tl.constexpr):
    return tl.where(l < TOP, l, TOP)


@triton.jit
def _descend(px, pw, pq, step, qstep, live, sum_lx, sum_l2, SUB: tl.constexpr, TOP: tl.constexpr):
    for _ in range(5):
        for i in range(SUB):
            v = tl.load(px + i * step, mask=live, other=0.0)
            weight = tl.load(pw + i * step, mask=live, other=0.0)
            l = tl.load(pq + i * qstep, mask=live, other=0)
            wv, f = weight * v, l.to(tl.float32)
            lx, l2 = sum_lx - wv * f, sum_l2 - weight * f * f
            new = _at_most(nearest_int(tl.div_rn(v * l2, lx)), TOP)
            moved = (lx > 0.0) & (l2 > 0.0) & (new != l)
            g = new.to(tl.float32)
            lx, l2 = lx + wv * g, l2 + weight * g * g
            better = moved & (lx * lx * sum_l2 > sum_lx * sum_lx * l2)
            tl.store(pq + i * qstep, tl.where(better, new & 255, l), mask=live)
            sum_lx, sum_l2 = tl.where(better, lx, sum_lx), tl.where(better, l2, sum_l2)
    return sum_lx, sum_l2
