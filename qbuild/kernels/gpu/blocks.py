"""From weights to blocks, in steps that each fill the device: fit, choose block scales, pack.

A *sub* is what one lane searches: a sub-block of a K-quant, a block of a legacy type; there are ``n``. ``fits`` has
five planes of n: scale, minus the minimum (or the sum of weights), inverse, base, sum of weights; with these a level is
made again. ``d`` has two: what a code stands for. ``kept`` holds levels that cannot be: those of sub k at k, n + k, ...
"""

from __future__ import annotations

import triton
import triton.language as tl

from qbuild.kernels.gpu.lanes import (
    TINY,
    all_at,
    all_weights_at,
    extreme_of,
    fit_affine,
    fit_positive,
    fit_scale,
    fit_scale_by_descent,
    from_half,
    less,
    level,
    more,
    nearest_int,
    put_half,
    signed_byte,
    to_half,
    total_of,
    truncate,
    weights_at,
)

COUNTS = ("n", "cols", "per_sigma", "length", "blocks", "size")  # else a kernel is compiled again for multiples of 16


@triton.jit
def _lanes(n, BLOCK: tl.constexpr):
    lane = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    return lane, lane < n


@triton.jit(do_not_specialize=COUNTS)
def mean_square(words, out, n, length, factor, KIND: tl.constexpr, BLOCK: tl.constexpr):
    """factor * sum(x * x) / length over each of n runs of ``length`` weights (a multiple of 32), summed in order."""
    lane, live = _lanes(n, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for i in range(0, length, 32):
        xs = all_weights_at(words, lane * length + i, live, KIND, 32)
        for j in tl.static_range(32):
            total += xs[j] * xs[j]
    tl.store(out + lane, tl.div_rn(factor * total, tl.zeros_like(total) + length), mask=live)


@triton.jit
def _importance(xs, imatrix, sigma2, lane, live, cols, per_sigma, SUB: tl.constexpr, RULE: tl.constexpr):
    """What each weight of a sub counts: by the imatrix (alone, or times sqrt(sigma2 + x * x)) or by the weights."""
    average = tl.zeros_like(xs[0])
    sigma = average
    if RULE == "average":
        for i in tl.static_range(SUB):
            average += xs[i] * xs[i]
        average = tl.sqrt_rn(tl.div_rn(average, tl.zeros_like(average) + SUB))
    if RULE == "sigma":
        sigma = tl.load(sigma2 + lane // per_sigma, mask=live, other=0.0)
    if RULE == "sigma" or RULE == "imatrix":
        columns = all_weights_at(imatrix, lane * SUB % cols, live, "F32", SUB)
    ws = ()
    for i in tl.static_range(SUB):
        if RULE == "square":
            weight = xs[i] * xs[i]
        elif RULE == "average" or RULE == "magnitude":
            weight = average + tl.abs(xs[i])
        else:
            weight = columns[i]
            if RULE == "sigma":
                weight = weight * tl.sqrt_rn(sigma + xs[i] * xs[i])
        ws = ws + (weight,)
    return ws


@triton.jit(do_not_specialize=COUNTS)
def search_affine(
    words, imatrix, sigma2, fits, wild, tries, n, cols, per_sigma,
    KIND: tl.constexpr, SUB: tl.constexpr, TOP: tl.constexpr, TRIES: tl.constexpr, ABS: tl.constexpr,
    RULE: tl.constexpr, CALM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Calm, it notes in ``wild``, float32 [n], which subs it got wrong; a second launch that is not does those."""
    lane, live = _lanes(n, BLOCK)
    if not CALM:
        if tl.max(tl.load(wild + lane, mask=live, other=0.0), 0) == 0.0:
            return
    xs = all_weights_at(words, lane * SUB, live, KIND, SUB)
    ws = _importance(xs, imatrix, sigma2, lane, live, cols, per_sigma, SUB, RULE)
    scale, low, inverse, base, sum_w, missed = fit_affine(xs, ws, tries, SUB, TOP, TRIES, ABS, CALM)
    tl.store(fits + lane, scale, mask=live)
    tl.store(fits + n + lane, low * -1.0, mask=live)
    tl.store(fits + 2 * n + lane, inverse, mask=live)
    tl.store(fits + 3 * n + lane, base, mask=live)
    tl.store(fits + 4 * n + lane, sum_w, mask=live)
    if CALM:
        tl.store(wild + lane, missed.to(tl.float32), mask=live)


@triton.jit(do_not_specialize=COUNTS)
def search_scale(
    words, imatrix, sigma2, fits, kept, tries, n, cols, per_sigma,
    KIND: tl.constexpr, SUB: tl.constexpr, TOP: tl.constexpr, TRIES: tl.constexpr, DESCEND: tl.constexpr,
    RULE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    lane, live = _lanes(n, BLOCK)
    xs = all_weights_at(words, lane * SUB, live, KIND, SUB)
    ws = _importance(xs, imatrix, sigma2, lane, live, cols, per_sigma, SUB, RULE)
    if DESCEND:
        scale, empty, ls = fit_scale_by_descent(xs, ws, SUB, TOP)
        for i in tl.static_range(SUB):
            tl.store(kept + i * n + lane, tl.where(empty, 0.0, ls[i] + TOP), mask=live)
    else:
        scale, inverse = fit_scale(xs, ws, tries, SUB, TOP, TRIES, True)
        tl.store(fits + 2 * n + lane, inverse, mask=live)
    tl.store(fits + lane, scale, mask=live)
    tl.store(fits + n + lane, total_of(ws, SUB), mask=live)


# ---- block scales


@triton.jit
def _codes(
    plane, weights, tries, live, SUBS: tl.constexpr, TOP: tl.constexpr, WEIGHTED: tl.constexpr, LIMIT: tl.constexpr
):  # fmt: skip
    """Codes of the scales of a super-block by a scale of their own: its float16 bits, and the codes."""
    xs = all_at(plane, 1, live, SUBS)
    if WEIGHTED:
        scale, ls = fit_positive(xs, all_at(weights, 1, live, SUBS), tries, SUBS, TOP, 9)
    else:
        largest = tl.zeros_like(xs[0])
        for j in tl.static_range(SUBS):
            largest = more(xs[j], largest)
        top = tl.zeros_like(largest) + TOP
        inverse = tl.where(largest > 0.0, tl.div_rn(top, largest), 0.0)
        ls = ()
        for j in tl.static_range(SUBS):
            ls = ls + (nearest_int(inverse * xs[j]) & 255,)
        scale = tl.div_rn(largest, top)
    codes = ()
    for j in tl.static_range(SUBS):
        codes = codes + (tl.where(ls[j] < 63, ls[j], 63) if LIMIT else ls[j],)
    return to_half(scale), codes


@triton.jit(do_not_specialize=COUNTS)
def scales_affine(
    fits, d, tries, out, n, blocks,
    SUBS: tl.constexpr, TOP: tl.constexpr, NBYTES: tl.constexpr, WEIGHTED: tl.constexpr, LIMIT: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Header of a super-block of Q2_K, Q4_K or Q5_K, and what its codes stand for, as a reader will see them."""
    block, live = _lanes(blocks, BLOCK)
    plane = fits + block * SUBS
    half, p = _codes(plane, plane + 4 * n, tries, live, SUBS, TOP, WEIGHTED, LIMIT)
    half_low, q = _codes(plane + n, plane + 4 * n, tries, live, SUBS, TOP, WEIGHTED, LIMIT)
    scale, scale_low, o = from_half(half), from_half(half_low), block * NBYTES
    at = o if SUBS == 8 else o + 80
    put_half(out, at, half, live)
    put_half(out, at + 2, half_low, live)
    for j in tl.static_range(4 if SUBS == 8 else 16):
        to = d + block * SUBS + j
        if SUBS == 16:
            both = (p[j] | (q[j] << 4)) & 255
            tl.store(out + o + j, both.to(tl.uint8), mask=live)
            tl.store(to, scale * (both & 15).to(tl.float32), mask=live)
            tl.store(to + n, scale_low * (both >> 4).to(tl.float32), mask=live)
        else:
            a, b, a4, b4 = p[j], q[j], p[j + 4], q[j + 4]
            first, second = (a | ((a4 >> 4) << 6)) & 255, (b | ((b4 >> 4) << 6)) & 255
            third = ((a4 & 15) | ((b4 & 15) << 4)) & 255
            tl.store(out + o + 4 + j, first.to(tl.uint8), mask=live)
            tl.store(out + o + 8 + j, second.to(tl.uint8), mask=live)
            tl.store(out + o + 12 + j, third.to(tl.uint8), mask=live)
            tl.store(to, scale * (first & 63).to(tl.float32), mask=live)
            tl.store(to + n, scale_low * (second & 63).to(tl.float32), mask=live)
            tl.store(to + 4, scale * ((third & 15) | ((first >> 6) << 4)).to(tl.float32), mask=live)
            tl.store(to + n + 4, scale_low * ((third >> 4) | ((second >> 6) << 4)).to(tl.float32), mask=live)


@triton.jit(do_not_specialize=COUNTS)
def scales_symmetric(fits, d, tries, out, n, blocks, Q3: tl.constexpr, FIT: tl.constexpr, BLOCK: tl.constexpr):
    """The same for Q3_K (its codes fitted, with an imatrix) and Q6_K."""
    block, live = _lanes(blocks, BLOCK)
    plane = fits + block * 16
    xs = all_at(plane, 1, live, 16)
    if FIT:
        scale, inverse = fit_scale(xs, all_at(plane + n, 1, live, 16), tries, 16, 32.0, 19, False)
        dead = inverse == 0.0
    else:
        extreme, largest = extreme_of(xs, 16)
        dead = (extreme == 0.0) if Q3 else (largest < TINY)
        inverse = tl.div_rn(tl.zeros_like(extreme) + (-32.0 if Q3 else -128.0), extreme)
        scale = tl.where(dead, 0.0, tl.div_rn(tl.zeros_like(extreme) + 1.0, inverse))
    half = to_half(scale)
    value = from_half(half)
    codes = ()
    for j in tl.static_range(16):
        v = inverse * xs[j]
        if FIT:
            l = level(v, -32.0, 31.0).to(tl.int32)
        elif Q3:
            l = signed_byte(nearest_int(v))
            l = tl.where(l < 31, tl.where(l > -32, l, -32), 31)
        else:
            l = nearest_int(v)
            l = signed_byte(tl.where(l < 127, l, 127))
        l = tl.where(dead, -32 if Q3 else 0, l)
        codes = codes + (l,)
        tl.store(d + block * 16 + j, value * l.to(tl.float32), mask=live)
        if not Q3:
            tl.store(out + block * 210 + 192 + j, (l & 255).to(tl.uint8), mask=live)
            tl.store(fits + 2 * n + block * 16 + j, tl.zeros_like(v), mask=live & dead)
    if Q3:
        _pack_q3_codes(codes, out, block, live)
        put_half(out, block * 110 + 108, half, live)
    else:
        put_half(out, block * 210 + 208, half, live)


@triton.jit
def _pack_q3_codes(codes, out, block, live):
    """16 codes of 6 bits: the low 4 bits in 8 bytes, the high 2 in 4."""
    o = out + block * 110 + 96
    for j in tl.static_range(8):
        both = ((codes[j] + 32) & 15) | (((codes[j + 8] + 32) & 15) << 4)
        tl.store(o + j, both.to(tl.uint8), mask=live)
    for j in tl.static_range(4):
        high = tl.zeros(block.shape, tl.int32)
        for t in tl.static_range(4):
            high |= ((codes[j + 4 * t] + 32) >> 4) << (2 * t)
        tl.store(o + 8 + j, high.to(tl.uint8), mask=live)


# ---- legacy types


@triton.jit(do_not_specialize=COUNTS)
def round_legacy(
    source, fits, out, n, KIND: tl.constexpr, TOP: tl.constexpr, MINIMUM: tl.constexpr, NBYTES: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Header of a block without an imatrix; inverse and base go to ``fits``."""
    lane, live = _lanes(n, BLOCK)
    v = weights_at(source, lane * 32, live, KIND)
    zero = tl.zeros([BLOCK], tl.float32)
    low, high, largest, extreme = v, v, more(zero, tl.abs(v)), tl.where(tl.abs(v) > 0.0, v, zero)
    for i in range(1, 32):
        v = weights_at(source, lane * 32 + i, live, KIND)
        a = tl.abs(v)
        low, high = less(v, low), more(v, high)
        extreme, largest = tl.where(a > largest, v, extreme), more(largest, a)
    if TOP == 255:
        d = tl.div_rn(largest, zero + 127.0)
    elif MINIMUM:
        d = tl.div_rn(high - low, zero + TOP)
        put_half(out, lane * NBYTES + 2, to_half(low), live)
    else:
        d = tl.div_rn(extreme, zero - (TOP + 1) // 2)
    put_half(out, lane * NBYTES, to_half(d), live)
    tl.store(fits + 2 * n + lane, tl.where(d != 0.0, tl.div_rn(zero + 1.0, d), 0.0), mask=live)
    tl.store(fits + 3 * n + lane, low if MINIMUM else zero, mask=live)


@triton.jit(do_not_specialize=COUNTS)
def head_legacy(fits, out, n, MINIMUM: tl.constexpr, NBYTES: tl.constexpr, BLOCK: tl.constexpr):
    """Header of a block that was fitted."""
    lane, live = _lanes(n, BLOCK)
    put_half(out, lane * NBYTES, to_half(tl.load(fits + lane, mask=live, other=0.0)), live)
    if MINIMUM:
        low = tl.load(fits + n + lane, mask=live, other=0.0) * -1.0
        put_half(out, lane * NBYTES + 2, to_half(low), live)


# ---- levels


@triton.jit
def _level(source, fits, d, kept, n, at, live, KIND: tl.constexpr, SUB: tl.constexpr, TOP: tl.constexpr,
           RULE: tl.constexpr):  # fmt: skip
    """The level of weight ``at`` as an unsigned code. Where a scale is stored as 0, ggml keeps those of the search."""
    v, sub = weights_at(source, at, live, KIND), at // SUB
    inverse = tl.load(fits + 2 * n + sub, mask=live, other=0.0)
    if RULE == "q8":
        v = v * inverse
        l = truncate(tl.abs(v) + 0.49999997)
        return tl.where(v < 0.0, 0 - l, l)
    if RULE == "round" or RULE == "round_signed":
        base = tl.load(fits + 3 * n + sub, mask=live, other=0.0)
        l = signed_byte(truncate((v - base) * inverse + (0.5 if RULE == "round" else (TOP + 1) / 2 + 0.5)))
        return tl.where(l < TOP, l, TOP)
    if RULE == "affine" or RULE == "fitted":
        base = tl.load(fits + 3 * n + sub, mask=live, other=0.0)
        l = level(inverse * (v - base), 0.0, TOP)
        if RULE == "affine":
            scale = tl.load(d + sub, mask=live, other=0.0)
            low = tl.load(d + n + sub, mask=live, other=0.0)
            l = tl.where(scale == 0.0, l, level(tl.div_rn(v + low, scale), 0.0, TOP))
        return l.to(tl.int32)
    if RULE == "descended":
        l = tl.load(kept + at % SUB * n + sub, mask=live, other=0.0)
    else:
        l = tl.where(inverse == 0.0, 0.0, level(inverse * v, -TOP, TOP - 1.0) + TOP)
    if RULE != "fitted_signed":
        scale = tl.load(d + sub, mask=live, other=0.0)
        l = tl.where(scale == 0.0, l, level(tl.div_rn(v, scale), -TOP, TOP - 1.0) + TOP)
    return l.to(tl.int32)


@triton.jit(do_not_specialize=COUNTS)
def pack(
    source, fits, d, kept, out, n, size,
    KIND: tl.constexpr, SUB: tl.constexpr, TOP: tl.constexpr, RULE: tl.constexpr,
    NBYTES: tl.constexpr, WEIGHTS: tl.constexpr, AT: tl.constexpr, BYTES: tl.constexpr,
    RUN: tl.constexpr, COUNT: tl.constexpr, RIGHT: tl.constexpr, BITS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One field of every block: its byte r of a run holds ``BITS`` bits of the levels r, RUN + r, 2 * RUN + r, ..."""
    index, live = _lanes(size, BLOCK)
    block, p = index // BYTES, index % BYTES
    first = block * WEIGHTS + p // RUN * (RUN * COUNT) + p % RUN
    value = tl.zeros([BLOCK], tl.int32)
    for t in tl.static_range(COUNT):
        l = _level(source, fits, d, kept, n, first + t * RUN, live, KIND, SUB, TOP, RULE)
        value |= ((l >> RIGHT) & ((1 << BITS) - 1)) << (t * BITS)
    tl.store(out + block * NBYTES + AT + p, (value & 255).to(tl.uint8), mask=live)


# Triton names a compiled kernel by its source and all that it uses, but asks a callee what that is before it has read
# it: names depend on which kernel came first, and another order compiles all again. So here is one order.
for _function in [function for function in globals().values() if isinstance(function, triton.JITFunction)]:
    hash(_function)
