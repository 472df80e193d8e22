"""The searches that ggml's quantizers share, one independent problem per lane.

Each routine repeats the float32 arithmetic of its namesake in llama.cpp's ggml-quants.c (ggml 0.25) in that order of
operations, so scales have equal bits on any finite input, overflow included.

``x`` and ``w`` are float32 tiles in lane order, element i of lane k at i * lanes + k; ``zero`` is a Vec of zeros, which
says how many lanes. A search does not store the levels of its best step: a lane remembers the inverse scale (and the
minimum) they were made with, and levels are made again for the rare lane that keeps them.
"""

from __future__ import annotations

import numpy as np

from qbuild.kernels.simd import (
    any_lane,
    bits,
    fabs,
    fmax,
    fmin,
    inline,
    lanes,
    load,
    load_columns,
    rint,
    select,
    splat,
    store,
    to,
    zeros,
)

_F32, _I32, _BOOL = np.float32, np.int32, np.bool_
MAGIC = 12582912.0  # 1.5 * 2**23: adding it rounds to an integer, half to even, and leaves it in the low mantissa bits
MAGIC_BITS = 0x4B400000
TINY = np.float32(1e-15)  # ggml's GROUP_MAX_EPS: a block whose largest weight is below it is all zero


# ---- rounding


@inline
def nearest(v):
    """ggml's nearest_int(v), plus MAGIC, as a float32: outside +-2**22 it wraps to the same garbage."""
    return bits((bits(v + MAGIC, _I32) & 0x7FFFFF) | 0x4B000000, _F32)


@inline
def nearest_int(v):
    return bits(nearest(v), _I32) - MAGIC_BITS


@inline
def level(v, low, high):
    """nearest_int(v) clamped to low..high, as a float32."""
    return fmin(fmax(nearest(v), splat(MAGIC + low, v)), splat(MAGIC + high, v)) - MAGIC


@inline
def level_int(v, low, high):
    return bits(fmin(fmax(nearest(v), splat(MAGIC + low, v)), splat(MAGIC + high, v)), _I32) - MAGIC_BITS


@inline
def roundf(v):
    """C's roundf, as int32: half away from zero; the constant is the float32 below one half."""
    l = to(fabs(v) + 0.49999997, _I32)
    return select(v < 0.0, 0 - l, l)


@inline
def inverse_of(d):
    return select(d == 0.0, 0.0, 1.0 / d)


@inline
def byte(v):
    """int32 lanes as C's uint8_t holds them."""
    return v & 255


@inline
def signed_byte(v):
    """int32 lanes as C's int8_t holds them."""
    return (v << 24) >> 24


# ---- scale and minimum: x = scale * q + low, q in 0..top


@inline
def fit_affine(x, w, q, n, top, tries, absolute, zero):
    """make_qkx2_quants and make_qkx3_quants: (scale, low, inverse, base, sum of w); kept q = inverse * (x - base).

    ``tries``: the numerators of ``steps``. ``absolute``: weigh |error|, not its square. ``q``: scratch of a tile.
    """
    width = lanes(zero)
    v, weight = load(x, 0, zero), load(w, 0, zero)
    low, high, sum_w, sum_x = v, v, weight, weight * v
    for i in range(1, n):
        v, weight = load(x, i * width, zero), load(w, i * width, zero)
        low, high = fmin(v, low), fmax(v, high)
        sum_w += weight
        sum_x += weight * v
    low = select(low > 0.0, 0.0, low)
    flat, floor = low == high, low
    lowest = low
    inverse = top / (high - low)
    scale = 1.0 / inverse
    for i in range(n):
        store(q, i * width, level(inverse * (load(x, i * width, zero) - low), 0.0, top))
    best = _misfit(x, w, q, n, scale, low, absolute, zero)
    base = low
    for s in range(len(tries)):
        trial = tries[s] / (high - low)
        calm = flat | ((fabs(trial * (high - low)) < 4194304.0) & (fabs(trial * (lowest - low)) < 4194304.0))
        if any_lane(~calm):
            sum_l, sum_l2, sum_xl = _sums(x, w, q, n, trial, low, top, False, zero)
        else:
            sum_l, sum_l2, sum_xl = _sums(x, w, q, n, trial, low, top, True, zero)
        D = sum_w * sum_l2 - sum_l * sum_l
        new_scale = (sum_w * sum_xl - sum_x * sum_l) / D
        new_low = (sum_l2 * sum_x - sum_l * sum_xl) / D
        above = new_low > 0.0
        new_scale = select(above, sum_xl / sum_l2, new_scale)
        new_low = select(above, 0.0, new_low)
        error = _misfit(x, w, q, n, new_scale, new_low, absolute, zero)
        better = (D > 0.0) & (error < best)
        best, scale = select(better, error, best), select(better, new_scale, scale)
        inverse, base = select(better, trial, inverse), select(better, low, base)
        low = select(better, new_low, low)
    scale, low = select(flat, 0.0, scale), select(flat, floor, low)
    return scale, low, select(flat, 0.0, inverse), select(flat, 0.0, base), sum_w


@inline
def _sums(x, w, q, n, trial, low, top, calm, zero):
    width = lanes(zero)
    sum_l, sum_l2, sum_xl = zero, zero, zero
    for i in range(n):
        v, weight = load(x, i * width, zero), load(w, i * width, zero)
        if calm:
            l = fmin(fmax(rint(trial * (v - low)), zero), splat(top, zero))
        else:
            l = level(trial * (v - low), 0.0, top)
        store(q, i * width, l)
        wl = weight * l
        sum_l += wl
        sum_l2 += wl * l
        sum_xl += wl * v
    return sum_l, sum_l2, sum_xl


@inline
def _misfit(x, w, q, n, scale, low, absolute, zero):
    width = lanes(zero)
    total = zero
    if absolute:
        for i in range(n):
            d = scale * load(q, i * width, zero) + low - load(x, i * width, zero)
            total += load(w, i * width, zero) * fabs(d)
    else:
        for i in range(n):
            d = scale * load(q, i * width, zero) + low - load(x, i * width, zero)
            total += load(w, i * width, zero) * (d * d)
    return total


# ---- scale alone: x = scale * q, q in -top..top-1


@inline
def extreme_of(x, n, zero):
    """The first weight of largest magnitude, and that magnitude."""
    width = lanes(zero)
    extreme, largest = zero, zero
    for i in range(n):
        v = load(x, i * width, zero)
        a = fabs(v)
        more = a > largest
        extreme, largest = select(more, v, extreme), select(more, a, largest)
    return extreme, largest


@inline
def largest_of(x, n, zero):
    """The largest magnitude of n weights."""
    width, largest = lanes(zero), zero
    for i in range(n):
        largest = fmax(largest, fabs(load(x, i * width, zero)))
    return largest


@inline
def fit_scale(x, w, n, top, tries, zero):
    """make_qx_quants: (scale, inverse); kept q = inverse * x, or ggml's code 0 (not q = 0) where inverse is 0.

    ``tries``: -(top + 0.1 * s) for s in -9..9, the first one s = 0.
    """
    width = lanes(zero)
    extreme, largest = extreme_of(x, n, zero)
    scale, best, inverse = zero, zero, zero
    for s in range(len(tries)):
        trial = tries[s] / extreme
        sum_lx, sum_l2 = zero, zero
        for i in range(n):
            v, weight = load(x, i * width, zero), load(w, i * width, zero)
            l = level(trial * v, -top, top - 1.0)
            sum_lx += weight * v * l
            sum_l2 += weight * l * l
        if s == 0:
            scale, inverse = select(sum_l2 != 0.0, sum_lx / sum_l2, 0.0), trial
            best = scale * sum_lx
        else:
            better = (sum_l2 > 0.0) & (sum_lx * sum_lx > best * sum_l2)
            scale, inverse = select(better, sum_lx / sum_l2, scale), select(better, trial, inverse)
            best = select(better, scale * sum_lx, best)
    empty = largest < TINY
    return select(empty, 0.0, scale), select(empty, 0.0, inverse)


@inline
def fit_scale_by_descent(x, w, q, n, top, zero):
    """make_q3_quants with rmse: (scale, mask of all-zero lanes); levels are left in ``q``, float32 in -top..top-1."""
    width = lanes(zero)
    extreme, largest = extreme_of(x, n, zero)
    inverse = -top / extreme
    sum_lx, sum_l2 = zero, zero
    for i in range(n):
        v, weight = load(x, i * width, zero), load(w, i * width, zero)
        l = level(inverse * v, -top, top - 1.0)
        store(q, i * width, l)
        sum_lx += weight * v * l
        sum_l2 += weight * l * l
    for _ in range(5):
        changed = zeros(zero, _BOOL)
        for i in range(n):
            v, weight, l = load(x, i * width, zero), load(w, i * width, zero), load(q, i * width, zero)
            wv = weight * v
            lx, l2 = sum_lx - wv * l, sum_l2 - weight * l * l
            new = level(v * l2 / lx, -top, top - 1.0)
            moved = (lx > 0.0) & (new != l)
            if any_lane(moved):  # seldom after the first pass, and then the next weight need not wait for this one
                lx, l2 = lx + wv * new, l2 + weight * new * new
                better = moved & (l2 > 0.0) & (lx * lx * sum_l2 > sum_lx * sum_lx * l2)
                store(q, i * width, select(better, new, l))
                sum_lx, sum_l2 = select(better, lx, sum_lx), select(better, l2, sum_l2)
                changed |= better
        if not any_lane(changed):
            break
    empty = largest < TINY
    return select(empty | ~(sum_l2 > 0.0), 0.0, sum_lx / sum_l2), empty


@inline
def fit_positive(x, w, q, n, top, tries, zero):
    """make_qp_quants: the scale of x >= 0 with q in 0..top; levels are left in ``q`` (int32, as uint8_t holds them).

    ``tries``: top + 0.1 * s for s in -4..4, the first one s = 0.
    """
    width = lanes(zero)
    largest = zero
    for i in range(n):
        largest = fmax(largest, load(x, i * width, zero))
    best, inverse = zero, zero
    for s in range(len(tries)):
        trial = tries[s] / largest
        scale = 1.0 / trial
        error = zero
        for i in range(n):
            v = load(x, i * width, zero)
            l = nearest_int(trial * v)
            l = byte(l) if s == 0 else _at_most(l, top)
            d = v - scale * to(l, _F32)
            error += load(w, i * width, zero) * d * d
        better = error < best
        if s == 0:
            best, inverse = error, trial
        else:
            best, inverse = select(better, error, best), select(better, trial, inverse)
    sum_lx, sum_l2 = zero, zero
    for i in range(n):
        v, weight = load(x, i * width, zero), load(w, i * width, zero)
        l = _at_most(nearest_int(inverse * v), top)
        store(q, i * width, byte(l))
        f = to(l, _F32)
        sum_lx += weight * v * f
        sum_l2 += weight * f * f
    sum_lx, sum_l2 = _descend(x, w, q, n, top, sum_lx, sum_l2)
    empty = largest < TINY
    for i in range(n):
        store(q, i * width, select(empty, 0, load(q, i * width, zero)))
    return select(empty | ~(sum_l2 > 0.0), 0.0, sum_lx / sum_l2)


@inline
def _at_most(l, top):
    return select(l < top, l, top)


@inline
def _descend(x, w, q, n, top, sum_lx, sum_l2):
    """Coordinate descent over the levels, at most five passes."""
    width = lanes(sum_lx)
    for _ in range(5):
        changed = zeros(sum_lx, _BOOL)
        for i in range(n):
            v, weight, l = load(x, i * width, sum_lx), load(w, i * width, sum_lx), load(q, i * width, sum_lx)
            wv, f = weight * v, to(l, _F32)
            lx, l2 = sum_lx - wv * f, sum_l2 - weight * f * f
            new = _at_most(nearest_int(v * l2 / lx), top)
            moved = (lx > 0.0) & (l2 > 0.0) & (new != l)
            g = to(new, _F32)
            lx, l2 = lx + wv * g, l2 + weight * g * g
            better = moved & (lx * lx * sum_l2 > sum_lx * sum_lx * l2)
            store(q, i * width, select(better, byte(new), l))
            sum_lx, sum_l2 = select(better, lx, sum_lx), select(better, l2, sum_l2)
            changed |= better
        if not any_lane(changed):
            break
    return sum_lx, sum_l2


@inline
def sum_of_squares(source, kind, n, starts, page):
    """x * x summed in order over the n weights (a multiple of 16) from starts[k] on, for 16 lanes.

    Scratch: ``page``, float32 [512], and starts[16:32].
    """
    total = splat(0.0, 16)
    for i in range(0, n, 16):
        for k in range(16):
            starts[16 + k] = starts[k] + i
        load_columns(source, kind, starts[16:], 16, page[256:], 16, page)
        for r in range(16):
            v = load(page, 256 + 16 * r, total)
            total += v * v
    return total
