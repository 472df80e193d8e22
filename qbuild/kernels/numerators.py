"""The numerators of the searches' inverse scales, for kernels on any device: numpy only."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

SYMMETRIC = (0, *range(-9, 0), *range(1, 10))  # the tries of make_qx_quants, in its order
CODES = (0, -4, -3, -2, -1, 1, 2, 3, 4)  # those of make_qp_quants


def steps(first: float, delta: float, tries: Sequence[int], top: int) -> np.ndarray:
    """(first + delta * s) + top, in C's float32 arithmetic."""
    return np.float32(first) + np.float32(delta) * np.array(tries, np.float32) + np.float32(top)
