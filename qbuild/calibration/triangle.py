"""Symmetric matrices as their upper triangle, row by row: half the bytes to store, and to move from and to a device."""

from __future__ import annotations

import torch

__all__ = ["mirror", "square", "upper"]

BLOCK = 1024
ROWS = 64  # that are taken together: on a device one by one they cost more than the products that they are sums of


def upper(matrix: torch.Tensor) -> torch.Tensor:
    """[n (n + 1) / 2]: the diagonal of ``matrix`` [n, n] and what is right of it, on its device."""
    blocks = (matrix[start : start + ROWS, start:] for start in range(0, len(matrix), ROWS))
    return torch.cat([block.masked_select(_right(block)) for block in blocks])


def square(packed: torch.Tensor, n: int) -> torch.Tensor:
    """The symmetric matrix [n, n] of what ``upper`` gave."""
    made, at = torch.empty(n, n, dtype=packed.dtype, device=packed.device), 0
    for start in range(0, n, ROWS):
        block = made[start : start + ROWS, start:]
        taken = block.numel() - len(block) * (len(block) - 1) // 2
        block.masked_scatter_(_right(block), packed[at : at + taken])
        at += taken
    return mirror(made)


def _right(block: torch.Tensor) -> torch.Tensor:
    """True from the diagonal on."""
    return torch.ones_like(block, dtype=torch.bool).triu()


def mirror(matrix: torch.Tensor) -> torch.Tensor:
    """The lower triangle becomes that of the upper one, in place."""
    for start in range(0, len(matrix), BLOCK):  # in blocks: whole columns at a time would miss every cache
        stop = start + BLOCK
        matrix[stop:, start:stop] = matrix[start:stop, stop:].T
        block = matrix[start:stop, start:stop]
        block.copy_(block.triu() + block.triu(1).T)
    return matrix
