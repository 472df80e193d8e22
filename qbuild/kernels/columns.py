"""The loops of GPTQ over the columns of a weight; ``quant.columns`` says what they compute.

Matrices are flat float32, [columns, width] with neighbouring rows of the weight in neighbouring lanes: ``width`` is a
multiple of ``LANES``. Every lane computes as one row alone would, so what rows come together changes no bit.
"""

from __future__ import annotations

import numpy as np

from qbuild.kernels.simd import (
    fabs,
    fmax,
    fmin,
    from_half,
    host_lanes,
    inline,
    kernel,
    load,
    rint,
    select,
    splat,
    store,
    to_half,
)

__all__ = ["LANES", "fit", "improve", "round_block", "warm"]

LANES = host_lanes()
_F32 = np.float32


def warm() -> None:
    """Load the loops from the disk cache, or compile them."""
    row, one, groups = np.ones(LANES, _F32), np.ones(1, _F32), np.zeros(1, np.int64)
    fit(row, one, one, row, row, 1, LANES, one[0], True, one[0])
    round_block(row, one, row, row, groups, row, row, 1, LANES, one[0])
    improve(row, row, row, row, one, row, row, 1, LANES, one[0])


@inline
def _half(v):
    """The nearest float16, as float32."""
    return from_half(to_half(v))


@inline
def _clamped(v, low, high):
    return fmin(fmax(v, low), high)


@inline
def _code(value, scale, zero, top):
    return _clamped(rint(value / scale) + zero, splat(_F32(0.0), LANES), splat(top, LANES))


@kernel
def fit(block, cost, shares, scales, zeros, size, width, top, symmetric, tiny):
    """The grid of one group of ``size`` columns: of ranges as wide as ``shares`` the one with the least squared error
    weighted by ``cost`` [size]. Writes ``scales`` and ``zeros`` [width]."""
    nothing, middle = splat(_F32(0.0), LANES), splat((top + _F32(1.0)) * _F32(0.5), LANES)
    for start in range(0, width, LANES):
        high, low = nothing, nothing
        for at in range(size):
            value = load(block, at * width + start, LANES)
            high, low = fmax(high, value), fmin(low, value)
        if symmetric:
            low = select(high > -low, high, low)
            high = -low
        best, found, zero = splat(_F32(np.inf), LANES), nothing, middle
        for share in shares:
            scale = _half((high - low) * share / top)
            scale = select(fabs(scale) < tiny, splat(tiny, LANES), scale)
            tried = middle
            if not symmetric:
                tried = _clamped(rint(-low * share / scale), nothing, splat(top, LANES))
            lost = _lost(block, cost, scale, tried, size, width, start, top)
            found, zero = select(lost < best, scale, found), select(lost < best, tried, zero)
            best = fmin(lost, best)
        if not symmetric:
            under, over = fmax(zero - _F32(1.0), nothing), fmin(zero + _F32(1.0), splat(top, LANES))
            for tried in (under, over):
                lost = _lost(block, cost, found, tried, size, width, start, top)
                zero = select(lost < best, tried, zero)
                best = fmin(lost, best)
        store(scales, start, found)
        store(zeros, start, zero)


@inline
def _lost(block, cost, scale, zero, size, width, start, top):
    total = splat(_F32(0.0), LANES)
    for at in range(size):
        value = load(block, at * width + start, LANES)
        error = (_code(value, scale, zero, top) - zero) * scale - value
        total = total + error * error * cost[at]
    return total


@kernel
def round_block(block, local, scales, zeros, groups, codes, errors, columns, width, top):
    """``local`` [columns, columns], ``groups`` [columns]: which row of ``scales`` and ``zeros`` each column takes."""
    for start in range(0, width, LANES):
        for at in range(columns):
            here, grid = at * width + start, groups[at] * width + start
            value, scale, zero = load(block, here, LANES), load(scales, grid, LANES), load(zeros, grid, LANES)
            code = _code(value, scale, zero, top)
            error = (value - (code - zero) * scale) / local[at * columns + at]
            store(codes, here, code)
            store(errors, here, error)
            for later in range(at + 1, columns):
                there = later * width + start
                store(block, there, load(block, there, LANES) - error * local[at * columns + later])


@kernel
def improve(codes, errors, slope, weights, own, scale, zero, size, width, top):
    """One group of ``size`` columns; ``own`` [size, size], ``scale`` and ``zero`` [width], all else [size, width].
    ``slope`` is used up."""
    for start in range(0, width, LANES):
        step, middle = load(scale, start, LANES), load(zero, start, LANES)
        low, high = -middle, top - middle
        for at in range(size):
            here = at * width + start
            store(slope, here, load(slope, here, LANES) / step)
            store(codes, here, load(codes, here, LANES) - middle)
        for at in range(size):
            here = at * width + start
            before = load(codes, here, LANES)
            after = _clamped(rint(before - load(slope, here, LANES) / own[at * size + at]), low, high)
            store(codes, here, after)
            change = after - before
            for other in range(size):
                there = other * width + start
                store(slope, there, load(slope, there, LANES) + change * own[at * size + other])
        fitted = _rescaled(codes, slope, own, step, size, width, start)
        store(scale, start, fitted)
        for at in range(size):
            here = at * width + start
            steps = load(codes, here, LANES)
            store(errors, here, steps * fitted - load(weights, here, LANES))
            store(codes, here, steps + middle)


@inline
def _rescaled(steps, slope, own, scale, size, width, start):
    """The scale that is best for these steps, in float16's values, and near the one that they had."""
    tilt, curve = splat(_F32(0.0), LANES), splat(_F32(0.0), LANES)
    for at in range(size):
        step = load(steps, at * width + start, LANES)
        tilt = tilt + load(slope, at * width + start, LANES) * step
        beside = splat(_F32(0.0), LANES)
        for other in range(at):
            beside = beside + load(steps, other * width + start, LANES) * own[at * size + other]
        curve = curve + (beside + beside + step * own[at * size + at]) * step
    share = tilt / fmax(curve, splat(_F32(1e-30), LANES))
    fitted = _half(scale - scale * share)
    change = fitted / scale
    return select((change > _F32(0.5)) & (change < _F32(2.0)), fitted, scale)
