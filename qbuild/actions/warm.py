"""Compile the kernels a pass needs, once per machine, in a process that ends before the pass begins.

Compiling takes seconds and memory of its own; here it is a step with a name instead of a stall.
"""

from __future__ import annotations

import platform
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from qbuild import kernels
from qbuild.digest import digest_bytes

RAM = 320 << 20  # LLVM at work: about 300 MiB with every type compiled, 150 when the cache has them


@dataclass(frozen=True)
class Task:
    types: tuple[str, ...]
    dtypes: tuple[str, ...]


def stamp(task: Task) -> str:
    """Names a compilation: what numba's disk cache depends on, without loading numba."""
    folder = Path(kernels.__file__).parent
    stats = [(p.name, p.stat().st_mtime_ns, p.stat().st_size) for p in sorted(folder.glob("*.py"))]
    text = repr((task, stats, str(folder), version("numba"), platform.python_version(), _cpu()))
    return "kernels " + digest_bytes(text.encode()).hash


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return "".join(line for line in lines[:40] if line.startswith(("model name", "flags")))


def run(task: Task) -> None:
    for dtype in task.dtypes:
        kernels.warm(task.types, dtype)
