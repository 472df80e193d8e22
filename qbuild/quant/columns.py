"""Loops over the columns of a block, each of which changes those that follow, in plain torch.

Shapes are [columns, out]: each step reads and writes whole rows of memory. ``triton_columns`` has the same two loops
for a CUDA device, where a launch for each of a hundred small operations a column is what would take the time.
"""

from __future__ import annotations

import torch

from qbuild.quant.grid import quantize

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
    for at, group in enumerate(groups.tolist()):
        codes[at], value = quantize(block[at], scales[group], zeros[group], top)
        errors[at] = (block[at] - value) / local[at, at]
        block[at + 1 :].addr_(local[at, at + 1 :], errors[at], alpha=-1)
    return codes, errors


def recode(
    values: torch.Tensor, slope: torch.Tensor, own: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, top: int
) -> torch.Tensor:
    """Codes float32 [columns, out] of one group: each column in turn the best while all others stay.

    ``values`` are those of now and ``slope`` half the gradient of the loss there, float32 [columns, out]; ``own``
    [columns, columns] is the group's part of the Hessian, ``scale`` and ``zero`` [out] its grid.
    """
    steps, slope, codes = (values / scale).round_(), slope / scale, torch.empty_like(values)
    low, high = -zero, top - zero
    for at, (step, curve) in enumerate(zip(steps, own.diagonal().tolist(), strict=True)):
        torch.clamp(torch.sub(step, slope[at], alpha=1 / curve).round_(), low, high, out=codes[at])
        slope[at + 1 :].addr_(own[at + 1 :, at], codes[at] - step)
    return codes.add_(zero)
