"""Compile the kernels a pass needs, once per machine, in a process that ends before the pass begins.

Compiling takes seconds and memory of its own; here it is a step with a name instead of a stall. What was compiled for a
GPU is held against the CPU's kernels before its first use: that bytes are equal rests on this very GPU, driver and
compiler, and the tests know only some.
"""

from __future__ import annotations

import contextlib
import platform
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from qbuild import kernels, machine
from qbuild.digest import digest_bytes
from qbuild.errors import ActionFailed
from qbuild.ggml import QTYPES
from qbuild.kernels.gpu.table import footprint

RAM = 320 << 20  # LLVM at work: about 300 MiB with every type compiled, 150 when the cache has them
RAM_CUDA = 1150 << 20  # and with torch, a CUDA context and Triton (its parts were measured: 665, 145, 300)
VRAM = 16 << 20  # what the rows take that are compared


class OnGpu(NamedTuple):
    """A kernel on a GPU is one for a type, the type that it reads, and whether columns are weighed."""

    type: str
    held: str
    weighted: bool


@dataclass(frozen=True)
class Task:
    """``types`` to encode, on the CPU, from any dtype; ``measured``: those that are read again, and compared with the
    source; ``columns``: GPTQ's loops over them on the CPU."""

    types: tuple[str, ...] = ()
    on_gpu: tuple[OnGpu, ...] = ()
    measured: tuple[str, ...] = ()
    columns: bool = False

    @property
    def names(self) -> tuple[str, ...]:
        """The types, each once, and GPTQ; none: there is nothing to compile."""
        types = sorted({*self.types, *self.measured, *(kernel.type for kernel in self.on_gpu)})
        return (*types, "GPTQ") if self.columns else tuple(types)


def ram(task: Task) -> int:
    """Peak bytes of the process that compiles these kernels."""
    return RAM_CUDA if task.on_gpu else RAM


def left(task: Task) -> Task:
    """What of a task was not compiled on this machine yet."""
    done = _Done()
    return Task(
        tuple(name for name in task.types if ("encode", name) not in done),
        tuple(kernel for kernel in task.on_gpu if ("gpu", *kernel) not in done),
        tuple(name for name in task.measured if ("measure", name) not in done),
        task.columns and ("columns",) not in done,
    )


class _Done:
    """Which kernels were compiled, by a file for each: named after what numba's disk cache depends on, without loading
    numba. In it stand the files of that cache or of Triton's, which may be cleared without us."""

    def __init__(self) -> None:
        folder = Path(kernels.__file__).parent
        stats = [(p.name, p.stat().st_mtime_ns, p.stat().st_size) for p in sorted(folder.rglob("*.py"))]
        self._under = repr((stats, str(folder), version("numba"), platform.python_version(), _cpu()))

    def __contains__(self, kernel: tuple[Any, ...]) -> bool:
        try:
            return all(Path(line).exists() for line in self._stamp(kernel).read_text().splitlines())
        except OSError:
            return False

    def add(self, kernel: tuple[Any, ...], files: Iterable[Path] = ()) -> None:
        """At once, so that a build that is interrupted has lost the one kernel that it was at. A cache folder that
        cannot be written costs half a second a build."""
        path = self._stamp(kernel)
        with contextlib.suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("".join(f"{file}\n" for file in files))

    def _stamp(self, kernel: tuple[Any, ...]) -> Path:
        gpu = (version("triton"), *(g.name for g in machine.gpus()[:1])) if kernel[0] == "gpu" else ()
        return machine.cache_dir() / "kernels" / digest_bytes(repr((kernel, self._under, gpu)).encode()).hash


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return "".join(line for line in lines[:40] if line.startswith(("model name", "flags")))


def run(task: Task) -> None:
    done = _Done()
    kernels.called_files()  # from here on those of each type
    for name in task.types:
        kernels.warm([name], "F16" if name == "BF16" else "BF16")  # one kernel serves every dtype but its own
        done.add(("encode", name), kernels.called_files())
    for name in task.measured:
        kernels.warm_losses([name])
        done.add(("measure", name), kernels.called_files())
    if task.columns:
        import_module("qbuild.kernels.columns").warm()
        done.add(("columns",), kernels.called_files())
    if task.on_gpu:
        encode = import_module("qbuild.kernels.gpu.encode")
        for kernel in task.on_gpu:
            before = _kept_by_triton()
            _compare(encode, kernel)
            # What it shares with kernels that were compiled before it is not new: it has the whole folder at least.
            done.add(("gpu", *kernel), _kept_by_triton() - before or before & {machine.triton_cache()})


def _kept_by_triton() -> set[Path]:
    """Triton's cache, and what is in it: a folder for each kernel."""
    folder = machine.triton_cache()
    return {folder, *folder.iterdir()} if folder.is_dir() else set()


def _compare(encode: Any, kernel: OnGpu) -> None:
    x = hard_rows(kernel.held)
    imatrix = np.geomspace(1e-6, 1e6, x.shape[1], dtype=np.float32) if kernel.weighted else None
    found = np.empty((len(x), QTYPES[kernel.type].row_bytes(x.shape[1])), np.uint8)
    stream = encode.Stream(footprint(kernel.type, x.size, x.shape[1], x.itemsize))
    stream.quantize_into(x, found, kernel.type, imatrix)
    if not np.array_equal(found, kernels.quantize(x, kernel.type, imatrix)):
        fact = f"the GPU's {kernel.type} blocks are not those of the CPU, with triton {version('triton')}"
        raise ActionFailed("device", fact, "device=cpu")


def hard_rows(held: str) -> np.ndarray:
    """[rows, 512] weights in F32, F16 or BF16 that take a quantizer's every path: outliers, ties, ranges of an ulp."""
    rng = np.random.default_rng(1)
    normal = rng.standard_normal((8, 512)).astype(np.float32) * np.float32(0.02)
    narrow = np.float32(-0.1) + rng.integers(0, 3, normal.shape).astype(np.float32) * np.float32(2.0**-27)
    scales = (10.0 ** rng.uniform(-38, 4, (8, 16))).astype(np.float32).repeat(32, axis=1)
    outliers = np.where(rng.random(normal.shape) < 0.02, normal * 1000, normal)
    ties = rng.integers(-3, 4, normal.shape).astype(np.float32) / 8
    x = np.concatenate((normal, np.abs(normal), -np.abs(normal), 0 * normal, narrow, normal * scales, outliers, ties))
    if held == "BF16":
        return (x.view(np.uint32) >> 16).astype(np.uint16)
    return x.astype(np.float16) if held == "F16" else x
