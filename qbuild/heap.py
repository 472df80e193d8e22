"""What glibc's allocator keeps of memory that was freed: a predicted peak counts what is alive."""

from __future__ import annotations

import ctypes

__all__ = ["settle", "trim"]

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h of glibc


def settle(blocks: int = 4 << 20, top: int | None = None) -> None:
    """Blocks of so many bytes go back to the system when they are freed, and what is free at the end of the heap where
    it is more than ``top``. By itself glibc raises the first, up to 32 MiB, as larger ones are freed: weights would
    stay."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(M_MMAP_THRESHOLD, blocks)
        if top is not None:
            libc.mallopt(M_TRIM_THRESHOLD, top)


def trim() -> None:
    """Give back what lies free between blocks in use: gradients leave MBs with every layer (240 in 30)."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)
