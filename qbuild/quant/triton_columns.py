"""``columns`` for a CUDA device: one launch a block. A program holds all columns of some rows in registers, and takes a
column out of them by a sum over a mask. What needs no loop over columns is torch's.

Only a worker that was given a device imports this module. Division is the IEEE one and rounding goes to even, as in
``columns``; sums of products may be fused, so last bits differ.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from qbuild.quant import grid as grids
from qbuild.quant.grid import Grid

__all__ = ["fit", "improve", "laid_out", "round_block"]

ROWS, COLUMNS = 16, 128  # of weights in a program, the columns at most
EVEN = tl.constexpr(12582912.0)  # 1.5 * 2**23: added and taken away, it rounds to even


@triton.jit
def _code(value, scale, zero, top):
    """Codes as they are, and clamped: what is larger than 2**22 is rounded wrongly, and then clamped."""
    steps = (tl.div_rn(value, scale) + EVEN) - EVEN
    return tl.minimum(tl.maximum(steps + zero, 0.0), top)


hash(_code)  # before its callers: see the end of kernels.gpu.blocks


@triton.jit
def _round(
    block,
    local,
    scales,
    zeros,
    groups,
    codes,
    errors,
    top,
    out,
    columns: tl.constexpr,
    WIDTH: tl.constexpr,
    HEIGHT: tl.constexpr,
):
    row, column = tl.program_id(0) * HEIGHT + tl.arange(0, HEIGHT), tl.arange(0, WIDTH)
    live = row < out
    inside = (column < columns)[:, None] & live[None, :]
    left = tl.load(block + column[:, None] * out + row[None, :], mask=inside, other=0.0)
    for at in range(columns):
        group = tl.load(groups + at)
        scale = tl.load(scales + group * out + row, mask=live, other=1.0)
        zero = tl.load(zeros + group * out + row, mask=live, other=0.0)
        value = tl.sum(tl.where(column[:, None] == at, left, 0.0), axis=0)
        code = _code(value, scale, zero, top)
        error = tl.div_rn(value - (code - zero) * scale, tl.load(local + at * columns + at))
        tl.store(codes + at * out + row, code, mask=live)
        tl.store(errors + at * out + row, error, mask=live)
        later = tl.load(local + at * columns + column, mask=(column > at) & (column < columns), other=0.0)
        left -= later[:, None] * error[None, :]


@triton.jit
def _recode(
    values, slope, own, scale, zero, codes, top, out, columns: tl.constexpr, WIDTH: tl.constexpr, HEIGHT: tl.constexpr
):
    row, column = tl.program_id(0) * HEIGHT + tl.arange(0, HEIGHT), tl.arange(0, WIDTH)
    live = row < out
    inside = (column < columns)[:, None] & live[None, :]
    incline = tl.load(slope + column[:, None] * out + row[None, :], mask=inside, other=0.0)
    step = tl.load(scale + row, mask=live, other=1.0)
    middle = tl.load(zero + row, mask=live, other=0.0)
    for at in range(columns):
        value = tl.load(values + at * out + row, mask=live, other=0.0)
        now = tl.sum(tl.where(column[:, None] == at, incline, 0.0), axis=0)
        code = _code(value - tl.div_rn(now, tl.load(own + at * columns + at)), step, middle, top)
        tl.store(codes + at * out + row, code, mask=live)
        beside = tl.load(own + at * columns + column, mask=column < columns, other=0.0)  # symmetric: a row is a column
        incline += beside[:, None] * ((code - middle) * step - value)[None, :]


def laid_out(weight: torch.Tensor) -> torch.Tensor:
    """``weight`` [out, in] as [in, out]."""
    return weight.T.contiguous()


def fit(columns: torch.Tensor, cost: torch.Tensor, grid: Grid) -> tuple[torch.Tensor, torch.Tensor]:
    """As ``columns.fit``."""
    scales, zeros = grids.fit(columns.T.contiguous(), cost, grid)
    return scales.T.contiguous(), zeros.T.contiguous()


def round_block(
    block: torch.Tensor,
    local: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor,
    groups: torch.Tensor,
    top: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As ``columns.round_block``; ``block`` stays as it is."""
    codes, errors = torch.empty_like(block), torch.empty_like(block)
    columns, out = block.shape
    given = block, local.contiguous(), scales, zeros, groups, codes, errors, float(top)
    _round[(triton.cdiv(out, ROWS),)](*given, out, columns, triton.next_power_of_2(columns), ROWS)
    return codes, errors


def improve(
    codes: torch.Tensor,
    errors: torch.Tensor,
    slope: torch.Tensor,
    columns: torch.Tensor,
    own: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor,
    top: int,
) -> None:
    """As ``columns.improve``."""
    before = (codes - zero) * scale
    codes.copy_(_recoded(before, slope, own, scale, zero, top))
    scale.copy_(_rescaled(codes - zero, before, slope, own, scale))
    torch.sub((codes - zero) * scale, columns, out=errors)


def _recoded(
    values: torch.Tensor, slope: torch.Tensor, own: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, top: int
) -> torch.Tensor:
    """Codes float32 [size, out] that are better than those of ``values``."""
    slope, codes = slope.clone(), torch.empty_like(values)
    size, out = values.shape
    for start in range(0, size, COLUMNS):
        inside = slice(start, min(start + COLUMNS, size))
        columns, local = inside.stop - start, own[inside, inside].contiguous()
        given = values[inside], slope[inside], local, scale, zero, codes[inside], float(top)
        _recode[(triton.cdiv(out, ROWS),)](*given, out, columns, triton.next_power_of_2(columns), ROWS)
        if inside.stop < size:
            better = (codes[inside] - zero) * scale
            slope[inside.stop :].addmm_(own[inside.stop :, inside], better - values[inside])
    return codes


def _rescaled(
    steps: torch.Tensor, before: torch.Tensor, slope: torch.Tensor, own: torch.Tensor, scale: torch.Tensor
) -> torch.Tensor:
    """The scale [out] that is best for ``steps``; ``slope`` belongs to the values ``before``."""
    now = slope + own @ (steps * scale - before)
    best = scale - (now * steps).sum(0) / ((own @ steps) * steps).sum(0).clamp(min=1e-30)
    best = best.half().float()
    return torch.where((best / scale > 0.5) & (best / scale < 2), best, scale)
