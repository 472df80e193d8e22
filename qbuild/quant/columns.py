"""Loops over columns on a CPU: float32 tensors handed to ``kernels.columns``. ``triton_columns`` has the same four for
a CUDA device.

A weight is laid out [in, width], its columns as rows of memory: each step then reads and writes whole vectors, a row of
the weight in each lane. ``width`` is its rows and what fills the last vector up.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from qbuild.kernels import columns as kernels
from qbuild.quant.grid import SHARES, TINY, Grid

__all__ = ["fit", "improve", "laid_out", "round_block"]


def laid_out(weight: torch.Tensor) -> torch.Tensor:
    """``weight`` [out, in] as [in, width]; rows of zeros are added."""
    rows, columns = weight.shape
    made = torch.zeros(columns, -(-rows // kernels.LANES) * kernels.LANES)
    made[:, :rows] = weight.T
    return made


def fit(columns: torch.Tensor, cost: torch.Tensor, grid: Grid) -> tuple[torch.Tensor, torch.Tensor]:
    """As ``grid.fit`` of a weight that is laid out: scales and zeros [groups, width]."""
    size, width = grid.size(len(columns)), columns.shape[1]
    groups = len(columns) // size
    scales, zeros = torch.empty(groups, width), torch.empty(groups, width)
    weighed, shares = _flat(cost.contiguous()), np.array(SHARES, np.float32)
    top, tiny = np.float32(grid.top), np.float32(TINY)
    for group in range(groups):
        own = slice(group * size, (group + 1) * size)
        block, found = _flat(columns[own]), (_flat(scales[group]), _flat(zeros[group]))
        kernels.fit(block, weighed[own], shares, *found, size, width, top, grid.symmetric, tiny)
    return scales, zeros


def round_block(
    block: torch.Tensor,
    local: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor,
    groups: torch.Tensor,
    top: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """GPTQ inside a block: codes and errors, float32, of columns whose errors are made good in those after them.

    ``block`` float32 [columns, width] is used up; ``local`` [columns, columns] is the factor's part, ``groups`` int64
    [columns] which row of ``scales`` and ``zeros`` [groups, width] each takes.
    """
    codes, errors = torch.empty_like(block), torch.empty_like(block)
    given = (block, local.contiguous(), scales, zeros, groups, codes, errors)
    kernels.round_block(*map(_flat, given), *block.shape, np.float32(top))
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
    """Better codes of one group, in place: each column in turn takes the best while all others stay, then the group
    the scale that is best for them, in float16's values, if that is neither half nor twice the one of before.

    ``codes``, ``errors`` Ŵ − W, ``columns`` W, and ``slope``, half the gradient of the loss by Ŵ: float32 [size,
    width]; ``own`` [size, size] is the group's part of the Hessian, ``scale`` and ``zero`` [width] its grid.
    """
    given = (codes, errors, slope.contiguous(), columns, own.contiguous(), scale, zero)
    kernels.improve(*map(_flat, given), *codes.shape, np.float32(top))


def _flat(tensor: torch.Tensor) -> Any:
    """The memory of a contiguous tensor."""
    return tensor.view(-1).numpy()
