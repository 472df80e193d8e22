"""Threads that share the work on a layer.

Rows of a weight do not depend on each other, so rows, not products, are spread over threads: torch's own wait for each
other, spinning, in each of thousands of small products. A factorization gets one as well: with more its last bits would
depend on how many there are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

from qbuild.calibration.extent import SOLVED_ROWS

__all__ = ["Team", "split"]

T = TypeVar("T")
R = TypeVar("R")
DEVICE_ROWS = 4096


def split(weight: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Rows that are solved at a time: as many as the kind of device says, and so are the results."""
    return tuple(weight.split(SOLVED_ROWS if weight.device.type == "cpu" else DEVICE_ROWS))


class Team:
    """As many threads as torch has before ``with team:``; inside, torch's own are one. For another device it is one."""

    def __init__(self, device: torch.device) -> None:
        self._torch = torch.get_num_threads()
        self._pool = ThreadPoolExecutor(self._torch) if device.type == "cpu" and self._torch > 1 else None

    def __enter__(self) -> Team:
        torch.set_num_threads(1)
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool is not None:
            self._pool.shutdown()
        torch.set_num_threads(self._torch)

    def map(self, work: Callable[[T], R], parts: Iterable[T]) -> list[R]:
        """``work`` on every part, in the order of the parts."""
        if self._pool is None:
            return [work(part) for part in parts]
        return list(self._pool.map(torch.no_grad()(work), parts))  # it is a thread's own
