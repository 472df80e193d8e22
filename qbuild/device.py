"""Where a build computes: what ``device=auto|cpu|cuda`` means for each kind of work, decided here and nowhere else.

GGUF bytes are the same on every device: for them it is a strategy, and ``auto`` takes a GPU where that is faster. Sums
of a calibration differ in their last bits: there the device is in the key, and ``auto`` is the CPU, so that what a
recipe makes does not depend on the machine that runs it.
"""

from __future__ import annotations

from qbuild import machine, schema
from qbuild.budget import parse_size
from qbuild.errors import ConfigError
from qbuild.machine import Gpu

__all__ = ["for_calibration", "for_gguf", "gpu", "vram"]


def for_calibration(config: schema.Config) -> str:
    """``cpu``, or ``cuda`` where it is asked for."""
    return "cuda" if config.device == "cuda" else "cpu"


def gpu(config: schema.Config) -> Gpu | None:
    """The GPU a build may use: the first visible one. Raises ConfigError where one is asked for and none is there."""
    if config.device == "cpu":
        return None
    found = machine.gpus()
    if not found and config.device == "cuda":
        raise ConfigError(
            "device", "cuda is asked for, no CUDA device is found", "device=auto takes one where there is one"
        )
    return found[0] if found else None


def vram(config: schema.Config, found: Gpu | None) -> int:
    """Bytes of device memory a build may take; ``auto`` is what is free, less a margin."""
    if found is None:
        return 0
    wanted = config.budget.vram
    return int(found.free * (1 - machine.MARGIN)) if wanted == "auto" else parse_size(wanted, "budget.vram")


def for_gguf(config: schema.Config, found: Gpu | None) -> tuple[str, ...]:
    """Devices GGUF tensors can be encoded on, best first. Raises ConfigError where what ``cuda`` takes is missing."""
    if found is None:
        return ("cpu",)
    missing = [name for name, there in (("torch", machine.has_torch()), ("triton", machine.has_triton())) if not there]
    if config.device == "cuda":
        if missing:
            fact = f"cuda is asked for, {' and '.join(missing)} with CUDA is not installed"
            raise ConfigError("device", fact, "pip install 'qbuild[calibrate]'")
        return ("cuda",)
    return ("cpu",) if missing else ("cuda", "cpu")
