"""GPTQ: columns are rounded one after the other, and what each rounding loses is made good in those that follow.

Source: Frantar et al. 2022, arXiv:2210.17323. The Hessian of a linear's loss is 2XᵀX, so the Gram matrix is all of the
calibration that it needs. Columns go by falling diagonal of it ("activation"): those that matter most are rounded while
there are many left to make good. Groups stay where they are and their grids are fitted before, so that a file needs no
index of groups.
"""

from __future__ import annotations

import torch

from qbuild.errors import ActionFailed
from qbuild.quant.codes import Codes
from qbuild.quant.grid import Grid, fit, quantize

__all__ = ["gptq"]

BLOCK = 128  # columns between two updates of all that follow
RETRIES = 9  # with ten times the damping each, where the Gram matrix is not positive definite


def gptq(weight: torch.Tensor, gram: torch.Tensor, grid: Grid, order: str, damping: float) -> Codes:
    """Codes of ``weight`` float32 [out, in] for inputs with ``gram`` float32 [in, in] (XᵀX, any scale).

    ``order``: natural, activation, or group (whole groups by their mean diagonal, columns inside likewise).
    ``damping`` is added to the diagonal, as a share of its mean. Raises ActionFailed when the Gram matrix cannot be
    factored, however damped.
    """
    size = weight.shape[1] if grid.group_size == -1 else grid.group_size
    hessian = gram / gram.diagonal().mean().clamp(min=1e-30)
    dead = hessian.diagonal() == 0
    hessian[dead, dead] = 1
    scales, zeros = fit(weight, hessian.diagonal(), grid)
    columns = _order(hessian.diagonal(), size, order)
    factor = _inverse_factor(hessian[columns][:, columns], damping)
    codes = torch.empty_like(weight)
    codes[:, columns] = _round(weight[:, columns], factor, scales, zeros, (columns // size).tolist(), grid.top)
    made = codes.to(torch.uint8), scales.half(), zeros.to(torch.uint8)
    return Codes(*made, grid.bits, size, grid.symmetric)


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


def _inverse_factor(hessian: torch.Tensor, damping: float) -> torch.Tensor:
    """U, upper triangular, with UᵀU the inverse of the damped Hessian."""
    mean = hessian.diagonal().mean()
    for _ in range(RETRIES):
        damped = hessian.clone()
        damped.diagonal().add_(damping * mean)
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if not failed:
                return upper
        damping *= 10
    raise ActionFailed("gptq", "the Gram matrix cannot be factored", "use more calibration samples, or more damping")


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
