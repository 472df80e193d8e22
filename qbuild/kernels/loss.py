"""Weighted squares of differences, row by row, in float64 and in order: how rows are cut into chunks changes no bit."""

from __future__ import annotations

import numpy as np

from qbuild.kernels.simd import kernel


def row_losses(made: np.ndarray, wanted: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """float64 [rows]: Σ weights[j] (made[i, j] - wanted[i, j])². made, wanted: float32 [rows, cols], C-contiguous;
    weights: float32 [cols]."""
    losses = np.empty(len(made), np.float64)
    _row_losses(made.reshape(-1), wanted.reshape(-1), weights.astype(np.float64), losses, len(made), len(weights))
    return losses


@kernel
def _row_losses(made, wanted, weights, losses, rows, cols):
    for row in range(rows):
        total = 0.0
        for column in range(cols):
            error = np.float64(made[row * cols + column]) - np.float64(wanted[row * cols + column])
            total += weights[column] * error * error
        losses[row] = total
