"""GPTQ: columns are rounded one after the other, and what each rounding loses is made good in those that follow; then
codes and scales are improved in turns until little is left to win.

Source: Frantar et al. 2022, arXiv:2210.17323. The Hessian of a linear's loss is 2XᵀX, so the Gram matrix is all of the
calibration that it needs. Columns go by falling diagonal of it ("activation"): those that matter most are rounded while
there are many left to make good. Groups stay where they are and their grids are fitted before, so that a file needs no
index of groups.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from qbuild.errors import ActionFailed
from qbuild.quant.codes import Codes
from qbuild.quant.grid import Grid, fit, quantize

__all__ = ["ORDERS", "Curvature", "curvature", "descend", "gptq"]

ORDERS = ("natural", "activation", "group", "indexed")
BLOCK = 128  # columns between two updates of all that follow
ROWS = 4096  # rows are independent: so many at a time bound the memory
RETRIES = 9  # with ten times the damping each, where the Gram matrix is not positive definite


@dataclass(frozen=True)
class Curvature:
    """What rounding needs to know of an input, float32.

    ``hessian`` [in, in]: the Gram matrix, its diagonal 1 in the mean before damping. ``columns`` int64 [in]: the order
    of rounding. ``factor`` [in, in]: upper triangular U with UᵀU the inverse of the Hessian in that order.
    """

    hessian: torch.Tensor
    columns: torch.Tensor
    factor: torch.Tensor


def curvature(gram: torch.Tensor, size: int, order: str, damping: float) -> Curvature:
    """Of inputs with ``gram`` float32 [in, in] (XᵀX, any scale) and groups of ``size`` columns.

    ``order``: natural, activation, or group (whole groups by their mean diagonal, columns inside likewise).
    ``damping`` is added to the diagonal, as a share of its mean. Raises ActionFailed when the Gram matrix cannot be
    factored, however damped.
    """
    hessian = gram / gram.diagonal().mean().clamp(min=1e-30)
    diagonal = hessian.diagonal()
    diagonal[diagonal == 0] = 1
    columns, plain = _order(diagonal, size, order), diagonal.clone()
    for _ in range(RETRIES):
        diagonal.copy_(plain + damping * plain.mean())
        lower, failed = torch.linalg.cholesky_ex(hessian[columns[:, None], columns])
        if not failed:
            factor, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if not failed:
                return Curvature(hessian, columns, factor)
        damping *= 10
    raise ActionFailed("gptq", "the Gram matrix cannot be factored", "use more calibration samples, or more damping")


def gptq(weight: torch.Tensor, gram: torch.Tensor, grid: Grid, order: str, damping: float, sweeps: int = 3) -> Codes:
    """Codes of ``weight`` float32 [out, in] for inputs with ``gram``; see ``curvature``, and ``descend`` for sweeps.

    ``order`` may also be indexed: columns are sorted by their diagonal and groups are made of what is adjacent then
    (desc_act), which needs the index of groups in files.
    """
    size = weight.shape[1] if grid.group_size == -1 else grid.group_size
    if order == "indexed":
        columns = _order(gram.diagonal(), size, "activation")
        sorted_gram = gram[columns[:, None], columns]
        return _scattered(gptq(weight[:, columns], sorted_gram, grid, "natural", damping, sweeps), columns)
    seen = curvature(gram, size, order, damping)
    parts = [_solved(rows, seen, grid, size, sweeps) for rows in weight.split(ROWS)]
    codes, scales, zeros = (torch.cat(part) for part in zip(*parts, strict=True))
    made = codes.to(torch.uint8), scales.half(), zeros.to(torch.uint8)
    return Codes(*made, grid.bits, size, grid.symmetric)


def _scattered(made: Codes, columns: torch.Tensor) -> Codes:
    """Columns in their own places again, each with the number of its group."""
    codes = torch.empty_like(made.codes)
    codes[:, columns] = made.codes
    groups_of = torch.empty(len(columns), dtype=torch.int32, device=columns.device)
    groups_of[columns] = made.columns_group.to(groups_of)
    return replace(made, codes=codes, groups_of=groups_of)


def _solved(
    weight: torch.Tensor, seen: Curvature, grid: Grid, size: int, sweeps: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes [out, in], scales and zeros [out, groups], float32."""
    scales, zeros = fit(weight, seen.hessian.diagonal(), grid)
    codes = torch.empty_like(weight)
    groups = (seen.columns // size).tolist()
    codes[:, seen.columns] = _round(weight[:, seen.columns], seen.factor, scales, zeros, groups, grid.top)
    codes, scales = descend(weight, seen.hessian, codes, scales, zeros, grid.top, sweeps)
    return codes, scales, zeros


def _order(diagonal: torch.Tensor, size: int, order: str) -> torch.Tensor:
    """The columns in the order of rounding."""
    if order == "natural":
        return torch.arange(len(diagonal), device=diagonal.device)
    if order == "activation":
        return torch.argsort(diagonal, descending=True, stable=True)
    blocks = diagonal.view(-1, size)
    inside = torch.argsort(blocks, dim=1, descending=True, stable=True)
    which = torch.argsort(blocks.mean(1), descending=True, stable=True)
    return (which[:, None] * size + inside[which]).reshape(-1)


def _round(
    weight: torch.Tensor,
    factor: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor,
    group: list[int],
    top: int,
) -> torch.Tensor:
    """Codes, float32 [out, in], of columns in the order of ``weight``."""
    cols = weight.shape[1]
    columns = weight.T.contiguous()  # as rows: each step reads and writes whole rows of memory
    codes = torch.empty_like(columns)
    scales, zeros = scales.T.contiguous(), zeros.T.contiguous()
    for start in range(0, cols, BLOCK):
        stop = min(start + BLOCK, cols)
        block, errors = columns[start:stop], torch.empty_like(columns[start:stop])
        local = factor[start:stop, start:stop]
        for at in range(stop - start):
            index = group[start + at]
            code, value = quantize(block[at], scales[index], zeros[index], top)
            codes[start + at] = code
            errors[at] = (block[at] - value) / local[at, at]
            block[at + 1 :].addr_(local[at, at + 1 :], errors[at], alpha=-1)
        columns[stop:].addmm_(factor[start:stop, stop:].T, errors, alpha=-1)
    return codes.T


def descend(
    weight: torch.Tensor,
    hessian: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor,
    top: int,
    sweeps: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Coordinate descent on the loss tr((W-Ŵ) H (W-Ŵ)ᵀ): each column in turn takes the code that is best while all
    others stay, then each group the scale; ``sweeps`` times. No step makes the loss of a row larger.

    Shapes as in ``Codes``, all float32; groups are of adjacent columns. Returns codes and scales.
    """
    columns, steps, middles = weight.T, scales.T.contiguous(), zeros.T.contiguous()
    codes = codes.T.contiguous()
    size = len(codes) // len(steps)
    values = ((codes.view(len(steps), size, -1) - middles[:, None]) * steps[:, None]).view_as(codes)
    slope = hessian @ (values - columns)  # half the gradient of the loss
    for _ in range(sweeps):
        for group, (scale, zero) in enumerate(zip(steps, middles, strict=True)):
            inside = slice(group * size, (group + 1) * size)
            own, before = hessian[inside, inside], values[inside].clone()
            codes[inside] = _recoded(before, slope[inside], own, scale, zero, top)
            scale.copy_(_rescaled(codes[inside] - zero, before, slope[inside], own, scale))
            values[inside] = (codes[inside] - zero) * scale
            slope.addmm_(hessian[:, inside], values[inside] - before)
    return codes.T, steps.T


def _recoded(
    values: torch.Tensor, slope: torch.Tensor, own: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, top: int
) -> torch.Tensor:
    """Codes [columns, out] of one group, a column at a time."""
    slope, codes = slope.clone(), torch.empty_like(values)
    for at, value in enumerate(values):
        codes[at], better = quantize(value - slope[at] / own[at, at], scale, zero, top)
        slope.addr_(own[:, at], better - value)
    return codes


def _rescaled(
    steps: torch.Tensor, before: torch.Tensor, slope: torch.Tensor, own: torch.Tensor, scale: torch.Tensor
) -> torch.Tensor:
    """The scale [out] of one group that is best for its codes, in float16's values, and near the one it had.

    ``slope`` belongs to the values ``before``.
    """
    now = slope + own @ (steps * scale - before)
    best = scale - (now * steps).sum(0) / ((own @ steps) * steps).sum(0).clamp(min=1e-30)
    best = best.half().float()
    return torch.where((best / scale > 0.5) & (best / scale < 2), best, scale)
