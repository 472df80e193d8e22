"""From weights to blocks, in steps that each fill the device: weigh, fit, choose block scales, pack.

A *sub* is what one lane searches: a sub-block of a K-quant, a block of a legacy type. Planes of ``x`` and ``w`` hold
element i of sub k at i * n + k, ``n`` subs to a plane. ``fits`` has five planes of n: scale, minus the minimum (or the
sum of weights), inverse, base, sum of weights; with these a level is made again. ``d`` has two: what a code stands for.
"""

from __future__ import annotations

import triton
import triton.language as tl

from qbuild.kernels.gpu.lanes import (
    TINY,
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
    truncate,
    weights_at,
)


@triton.jit
def _lanes(n, BLOCK: tl.constexpr):
    lane = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    return lane, lane < n


@triton.jit
def mean_square(source, out, n, length, factor, BF16: tl.constexpr, BLOCK: tl.constexpr):
    """factor * sum(x * x) / length over each of n runs of ``length`` weights, summed in order."""
    lane, live = _lanes(n, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for i in range(length):
        v = weights_at(source, lane * length + i, live, BF16)
        total += v * v
    tl.store(out + lane, tl.div_rn(factor * total, tl.zeros_like(total) + length), mask=live)


@triton.jit
def weigh(
    source, imatrix, sigma2, x, w, n, cols, per_sigma,
    BF16: tl.constexpr, SUB: tl.constexpr, RULE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Planes of weights and of their importance: by the imatrix (alone, or times sqrt(sigma2 + x * x)) or by x."""
    lane, live = _lanes(n, BLOCK)
    average = tl.zeros([BLOCK], tl.float32)
    sigma = average
    if RULE == "average":
        for i in range(SUB):
            v = weights_at(source, lane * SUB + i, live, BF16)
            average += v * v
        average = tl.sqrt_rn(tl.div_rn(average, tl.zeros_like(average) + SUB))
    if RULE == "sigma":
        sigma = tl.load(sigma2 + lane // per_sigma, mask=live, other=0.0)
    for i in range(SUB):
        v = weights_at(source, lane * SUB + i, live, BF16)
        tl.store(x + i * n + lane, v, mask=live)
        if RULE == "square":
            weight = v * v
        elif RULE == "average" or RULE == "magnitude":
            weight = average + tl.abs(v)
        else:
            weight = tl.load(imatrix + lane * SUB % cols + i, mask=live, other=0.0)
            if RULE == "sigma":
                weight = weight * tl.sqrt_rn(sigma + v * v)
        tl.store(w + i * n + lane, weight, mask=live)


@triton.jit
def search_affine(
    x, w, fits, tries, n,
    SUB: tl.constexpr, TOP: tl.constexpr, TRIES: tl.constexpr, ABS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    lane, live = _lanes(n, BLOCK)
    scale, low, inverse, base, sum_w = fit_affine(x + lane, w + lane, n, tries, live, SUB, TOP, TRIES, ABS)
    tl.store(fits + lane, scale, mask=live)
    tl.store(fits + n + lane, low * -1.0, mask=live)
    tl.store(fits + 2 * n + lane, inverse, mask=live)
    tl.store(fits + 3 * n + lane, base, mask=live)
    tl.store(fits + 4 * n + lane, sum_w, mask=live)


@triton.jit
def search_scale(
    x, w, fits, kept, tries, n,
    SUB: tl.constexpr, TOP: tl.constexpr, TRIES: tl.constexpr, DESCEND: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    lane, live = _lanes(n, BLOCK)
    if DESCEND:
        scale, empty = fit_scale_by_descent(x + lane, w + lane, kept + lane, n, live, SUB, TOP)
        for i in range(SUB):
            l = tl.load(kept + i * n + lane, mask=live, other=0.0)
            tl.store(kept + i * n + lane, tl.where(empty, 0.0, l + TOP), mask=live)
    else:
        scale, inverse = fit_scale(x + lane, w + lane, n, tries, live, SUB, TOP, TRIES)
        tl.store(fits + 2 * n + lane, inverse, mask=live)
    total = tl.zeros([BLOCK], tl.float32)
    for i in range(SUB):
        total += tl.load(w + i * n + lane, mask=live, other=0.0)
    tl.store(fits + lane, scale, mask=live)
    tl.store(fits + n + lane, total, mask=live)


# ---- block scales


@triton.jit
def _codes(
    fits, weights, codes, tries, blocks, block, live,
    SUBS: tl.constexpr, TOP: tl.constexpr, WEIGHTED: tl.constexpr, LIMIT: tl.constexpr,
):  # fmt: skip
    """Codes of one plane of ``fits`` by a scale of their own: its float16 bits."""
    plane = fits + block * SUBS
    if WEIGHTED:
        scale = fit_positive(plane, weights + block * SUBS, codes + block, 1, blocks, tries, live, SUBS, TOP, 9)
    else:
        largest = tl.zeros(block.shape, tl.float32)
        for j in range(SUBS):
            largest = more(tl.load(plane + j, mask=live, other=0.0), largest)
        top = tl.zeros_like(largest) + TOP
        inverse = tl.where(largest > 0.0, tl.div_rn(top, largest), 0.0)
        for j in range(SUBS):
            l = nearest_int(inverse * tl.load(plane + j, mask=live, other=0.0)) & 255
            tl.store(codes + j * blocks + block, l, mask=live)
        scale = tl.div_rn(largest, top)
    if LIMIT:
        for j in range(SUBS):
            l = tl.load(codes + j * blocks + block, mask=live, other=0)
            tl.store(codes + j * blocks + block, tl.where(l < 63, l, 63), mask=live)
    return to_half(scale)


@triton.jit
def scales_affine(
    fits, codes, d, tries, out, n, blocks,
    SUBS: tl.constexpr, TOP: tl.constexpr, NBYTES: tl.constexpr, WEIGHTED: tl.constexpr, LIMIT: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Header of a super-block of Q2_K, Q4_K or Q5_K, and what its codes stand for, as a reader will see them."""
    block, live = _lanes(blocks, BLOCK)
    lows = codes + SUBS * blocks
    half = _codes(fits, fits + 4 * n, codes, tries, blocks, block, live, SUBS, TOP, WEIGHTED, LIMIT)
    half_low = _codes(fits + n, fits + 4 * n, lows, tries, blocks, block, live, SUBS, TOP, WEIGHTED, LIMIT)
    scale, scale_low, o = from_half(half), from_half(half_low), block * NBYTES
    at = o if SUBS == 8 else o + 80
    put_half(out, at, half, live)
    put_half(out, at + 2, half_low, live)
    p, q = codes + block, lows + block
    for j in range(4 if SUBS == 8 else 16):
        a = tl.load(p + j * blocks, mask=live, other=0)
        b = tl.load(q + j * blocks, mask=live, other=0)
        to = d + block * SUBS + j
        if SUBS == 16:
            both = (a | (b << 4)) & 255
            tl.store(out + o + j, both.to(tl.uint8), mask=live)
            tl.store(to, scale * (both & 15).to(tl.float32), mask=live)
            tl.store(to + n, scale_low * (both >> 4).to(tl.float32), mask=live)
        else:
            a4 = tl.load(p + (j + 4) * blocks, mask=live, other=0)
            b4 = tl.load(q + (j + 4) * blocks, mask=live, other=0)
            first, second = (a | ((a4 >> 4) << 6)) & 255, (b | ((b4 >> 4) << 6)) & 255
            third = ((a4 & 15) | ((b4 & 15) << 4)) & 255
            tl.store(out + o + 4 + j, first.to(tl.uint8), mask=live)
            tl.store(out + o + 8 + j, second.to(tl.uint8), mask=live)
            tl.store(out + o + 12 + j, third.to(tl.uint8), mask=live)
            tl.store(to, scale * (first & 63).to(tl.float32), mask=live)
            tl.store(to + n, scale_low * (second & 63).to(tl.float32), mask=live)
            tl.store(to + 4, scale * ((third & 15) | ((first >> 6) << 4)).to(tl.float32), mask=live)
            tl.store(to + n + 4, scale_low * ((third >> 4) | ((second >> 6) << 4)).to(tl.float32), mask=live)


@triton.jit
def scales_symmetric(fits, codes, d, tries, out, n, blocks, Q3: tl.constexpr, FIT: tl.constexpr, BLOCK: tl.constexpr):
    """The same for Q3_K (its codes fitted, with an imatrix) and Q6_K."""
    block, live = _lanes(blocks, BLOCK)
    plane = fits + block * 16
    if FIT:
        scale, inverse = fit_scale(plane, plane + n, 1, tries, live, 16, 32.0, 19)
        dead = inverse == 0.0
    else:
        extreme, largest = extreme_of(plane, 1, live, 16)
        dead = (extreme == 0.0) if Q3 else (largest < TINY)
        inverse = tl.div_rn(tl.zeros_like(extreme) + (-32.0 if Q3 else -128.0), extreme)
        scale = tl.where(dead, 0.0, tl.div_rn(tl.zeros_like(extreme) + 1.0, inverse))
    half = to_half(scale)
    value = from_half(half)
    for j in range(16):
        v = inverse * tl.load(plane + j, mask=live, other=0.0)
        if FIT:
            l = level(v, -32.0, 31.0).to(tl.int32)
        elif Q3:
            l = signed_byte(nearest_int(v))
            l = tl.where(l < 31, tl.where(l > -32, l, -32), 31)
        else:
            l = nearest_int(v)
            l = signed_byte(tl.where(l < 127, l, 127))
        l = tl.where(dead, -32 if Q3 else 0, l)
        tl.store(codes + j * blocks + block, l, mask=live)
        tl.store(d + block * 16 + j, value * l.to(tl.float32), mask=live)
        if not Q3:
            tl.store(out + block * 210 + 192 + j, (l & 255).to(tl.uint8), mask=live)
            tl.store(fits + 2 * n + block * 16 + j, tl.zeros_like(v), mask=live & dead)
    if Q3:
        _pack_q3_codes(codes, out, blocks, block, live)
        put_half(out, block * 110 + 108, half, live)
    else:
        put_half(out, block * 210 + 208, half, live)


@triton.jit
def _pack_q3_codes(codes, out, blocks, block, live):
    """16 codes of 6 bits: the low 4 bits in 8 bytes, the high 2 in 4."""
    p, o = codes + block, out + block * 110 + 96
    for j in range(8):
        a = tl.load(p + j * blocks, mask=live, other=0) + 32
        b = tl.load(p + (j + 8) * blocks, mask=live, other=0) + 32
        tl.store(o + j, ((a & 15) | ((b & 15) << 4)).to(tl.uint8), mask=live)
    for j in range(4):
        high = tl.zeros(block.shape, tl.int32)
        for t in tl.static_range(4):
            l = tl.load(p + (j + 4 * t) * blocks, mask=live, other=0) + 32
            high |= (l >> 4) << (2 * t)
        tl.store(o + 8 + j, high.to(tl.uint8), mask=live)


# ---- legacy types


@triton.jit
def round_legacy(
    source, fits, out, n, BF16: tl.constexpr, TOP: tl.constexpr, MINIMUM: tl.constexpr, NBYTES: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Header of a block without an imatrix; inverse and base go to ``fits``."""
    lane, live = _lanes(n, BLOCK)
    v = weights_at(source, lane * 32, live, BF16)
    zero = tl.zeros([BLOCK], tl.float32)
    low, high, largest, extreme = v, v, more(zero, tl.abs(v)), tl.where(tl.abs(v) > 0.0, v, zero)
    for i in range(1, 32):
        v = weights_at(source, lane * 32 + i, live, BF16)
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


@triton.jit
def head_legacy(fits, out, n, MINIMUM: tl.constexpr, NBYTES: tl.constexpr, BLOCK: tl.constexpr):
    """Header of a block that was fitted."""
    lane, live = _lanes(n, BLOCK)
    put_half(out, lane * NBYTES, to_half(tl.load(fits + lane, mask=live, other=0.0)), live)
    if MINIMUM:
        low = tl.load(fits + n + lane, mask=live, other=0.0) * -1.0
        put_half(out, lane * NBYTES + 2, to_half(low), live)


# ---- levels


@triton.jit
def _level(source, fits, d, kept, n, at, live, BF16: tl.constexpr, SUB: tl.constexpr, TOP: tl.constexpr,
           RULE: tl.constexpr):  # fmt: skip
    """The level of weight ``at`` as an unsigned code. Where a scale is stored as 0, ggml keeps those of the search."""
    v, sub = weights_at(source, at, live, BF16), at // SUB
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


@triton.jit
def pack(
    source, fits, d, kept, out, n, size,
    BF16: tl.constexpr, SUB: tl.constexpr, TOP: tl.constexpr, RULE: tl.constexpr,
    NBYTES: tl.constexpr, WEIGHTS: tl.constexpr, AT: tl.constexpr, BYTES: tl.constexpr,
    RUN: tl.constexpr, COUNT: tl.constexpr, RIGHT: tl.constexpr, BITS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One field of every block: its byte r of a run holds ``BITS`` bits of the levels r, RUN + r, 2 * RUN + r, ..."""
    index, live = _lanes(size, BLOCK)
    block, p = index // BYTES, index % BYTES
    first = block * WEIGHTS + p // RUN * (RUN * COUNT) + p % RUN
    value = tl.zeros([BLOCK], tl.int32)
    for t in tl.static_range(COUNT):
        l = _level(source, fits, d, kept, n, first + t * RUN, live, BF16, SUB, TOP, RULE)
        value |= ((l >> RIGHT) & ((1 << BITS) - 1)) << (t * BITS)
    tl.store(out + block * NBYTES + AT + p, (value & 255).to(tl.uint8), mask=live)


@triton.jit
def cast(source, out, size, BF16: tl.constexpr, TO: tl.constexpr, BLOCK: tl.constexpr):
    """Finite weights to float32, float16, or bfloat16 bits in int16; round to nearest even."""
    at, live = _lanes(size, BLOCK)
    v = weights_at(source, at, live, BF16)
    if TO == "F16":
        tl.store(out + at, v.to(tl.float16), mask=live)
    elif TO == "BF16":
        word = v.to(tl.uint32, bitcast=True)
        tl.store(out + at, ((word + (((word >> 16) & 1) + 0x7FFF)) >> 16).to(tl.int16), mask=live)
    else:
        tl.store(out + at, v, mask=live)
