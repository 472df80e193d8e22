"""Compile the kernels a pass needs, once per machine, in a process that ends before the pass begins.

Compiling takes seconds and memory of its own; here it is a step with a name instead of a stall.
"""

from __future__ import annotations

import contextlib
import platform
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from qbuild import kernels, machine
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
    return digest_bytes(text.encode()).hash


def is_done(task: Task) -> bool:
    """Whether these kernels were compiled on this machine."""
    return (machine.cache_dir() / "kernels" / stamp(task)).exists()


def note(task: Task) -> None:
    """Remember that they were; a cache folder that cannot be written costs half a second a build."""
    path = machine.cache_dir() / "kernels" / stamp(task)
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return "".join(line for line in lines[:40] if line.startswith(("model name", "flags")))


def run(task: Task) -> None:
    for dtype in task.dtypes:
        kernels.warm(task.types, dtype)
