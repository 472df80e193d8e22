"""The memory of a CUDA device in a worker: what it may take, and what it took at most."""

from __future__ import annotations

import sys
from dataclasses import dataclass

from qbuild import machine
from qbuild.errors import ActionFailed, ConfigError

__all__ = ["CONTEXT", "Hold", "hold", "ran_out", "reserved"]

SMALL = 2 << 20  # bytes that torch takes of a device at a time, at least
CONTEXT = 560 << 20  # of a process that uses a device, before it allocates anything


def reserved(nbytes: int) -> int:
    """What torch takes of a device for a tensor of ``nbytes`` that finds no room in what it holds: its budget counts
    that. 2 MiB up to 1 MiB, 20 MiB below 10 MiB, else whole pieces of 2 MiB."""
    if nbytes <= 1 << 20:
        return SMALL
    return 10 * SMALL if nbytes < 5 * SMALL else -(-nbytes // SMALL) * SMALL


@dataclass(frozen=True)
class Hold:
    """``context``: bytes of the device that this process took before it allocated anything."""

    context: int

    def peak(self) -> int:
        """Bytes taken at most: tensors, and the context."""
        import torch

        return int(torch.cuda.max_memory_allocated()) + self.context


def hold(limit: int) -> Hold:
    """From now on this process takes at most ``limit`` bytes of the first device, its context with them: what goes over
    is torch.OutOfMemoryError. Raises ActionFailed where torch cannot use the device, ConfigError without torch."""
    try:
        import torch

        before = machine.gpus()[0].free  # as late as can be: what other processes take meanwhile would count as ours
        free, total = torch.cuda.mem_get_info()
    except ImportError:
        raise ConfigError("device", "torch is not installed", "pip install 'qbuild[calibrate]'") from None
    except (RuntimeError, AssertionError) as error:  # an old driver, no memory left, a torch without CUDA
        raise ActionFailed("device", f"torch cannot use the GPU: {str(error).splitlines()[0]}", "device=cpu") from None
    allowed = limit - CONTEXT + SMALL // 2  # torch rounds the share down: the last piece would not fit
    torch.cuda.set_per_process_memory_fraction(min(1.0, max(0, allowed) / total))
    return Hold(max(0, before - free))


def ran_out(error: BaseException) -> bool:
    """Whether an error is torch's for a device without memory left. torch is not loaded for it."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(error, torch.OutOfMemoryError)
