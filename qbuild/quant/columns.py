"""Loops over the columns of a block, each of which changes those that follow, in plain torch.

Shapes are [columns, out]: each step reads and writes whole rows of memory. They are taken apart before the loop: to
index a tensor takes a third of the time of a subtraction. ``triton_columns`` has the same two loops for a CUDA device,
where a launch for each of a hundred small operations a column is what would take the time.
"""

from __future__ import annotations

import torch

__all__ = ["recode", "round_block"]


def round_block(
    block: torch.Tensor,
    local: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor,
    groups: torch.Tensor,
    top: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """GPTQ inside a block: codes and errors, float32, of columns whose errors are made good in those after them.

    ``block`` float32 [columns, out] is used up; ``local`` [columns, columns] is the factor's part, ``groups`` int64
    [columns] which row of ``scales`` and ``zeros`` [groups, out] each takes.
    """
    codes, errors = torch.empty_like(block), torch.empty_like(block)
    grids = list(zip(scales.unbind(), zeros.unbind(), strict=True))
    rows = zip(block.unbind(), codes.unbind(), errors.unbind(), local.unbind(), groups.tolist(), strict=True)
    for at, (weights, code, error, row, group) in enumerate(rows):
        scale, zero = grids[group]
        torch.div(weights, scale, out=code).round_().add_(zero).clamp_(0, top)  # as ``grid.quantize``, in place
        torch.sub(weights, torch.sub(code, zero, out=error).mul_(scale), out=error).div_(row[at])
        block[at + 1 :].addr_(row[at + 1 :], error, alpha=-1)
    return codes, errors


def recode(
    values: torch.Tensor, slope: torch.Tensor, own: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, top: int
) -> torch.Tensor:
    """Codes float32 [columns, out] of one group: each column in turn the best while all others stay.

    ``values`` are those of the codes of now and ``slope`` half the gradient of the loss there, float32 [columns, out];
    ``own`` [columns, columns] is the group's part of the Hessian, ``scale`` and ``zero`` [out] its grid.
    """
    steps, slope, codes = (values / scale).round_(), slope / scale, torch.empty_like(values)
    low, high, change = -zero, top - zero, torch.empty_like(zero)
    rows = zip(steps.unbind(), slope.unbind(), codes.unbind(), own.unbind(), own.diagonal().tolist(), strict=True)
    for at, (step, tilt, code, row, curve) in enumerate(rows):
        torch.sub(step, tilt, alpha=1 / curve, out=code).round_().clamp_(low, high)
        slope[at + 1 :].addr_(row[at + 1 :], torch.sub(code, step, out=change))
    return codes.add_(zero)
