"""Symmetric matrices as their upper triangle, row by row: half the bytes to store, and to move from and to a device."""

from __future__ import annotations

import torch

__all__ = ["mirror", "square", "upper"]

BLOCK = 1024


def upper(matrix: torch.Tensor) -> torch.Tensor:
    """[n (n + 1) / 2]: the diagonal of ``matrix`` [n, n] and what is right of it, on its device."""
    n, at = len(matrix), 0
    made = torch.empty(n * (n + 1) // 2, dtype=matrix.dtype, device=matrix.device)
    for row in range(n):
        made[at : at + n - row] = matrix[row, row:]
        at += n - row
    return made


def square(packed: torch.Tensor, n: int) -> torch.Tensor:
    """The symmetric matrix [n, n] of what ``upper`` gave."""
    made, at = torch.empty(n, n, dtype=packed.dtype, device=packed.device), 0
    for row in range(n):
        made[row, row:] = packed[at : at + n - row]
        at += n - row
    return mirror(made)


def mirror(matrix: torch.Tensor) -> torch.Tensor:
    """The lower triangle becomes that of the upper one, in place."""
    for start in range(0, len(matrix), BLOCK):  # in blocks: whole columns at a time would miss every cache
        stop = start + BLOCK
        matrix[stop:, start:stop] = matrix[start:stop, stop:].T
        block = matrix[start:stop, start:stop]
        block.copy_(block.triu() + block.triu(1).T)
    return matrix
