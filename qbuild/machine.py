"""What this machine has, and the only place that reads the environment. Nothing is read at import.

The null build imports this: what costs time to load (pathlib, dataclasses) is not loaded for it.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

__all__ = [
    "Gpu",
    "Machine",
    "cache_dir",
    "cpu_count",
    "environ",
    "gpus",
    "has_torch",
    "has_triton",
    "inspect",
    "memory_limit",
    "null_record",
    "peak_rss",
    "process_rss",
    "tree_rss",
    "triton_cache",
    "worker_environ",
]

MARGIN = 0.10  # of the memory that is free: other programs grow while a build runs


def environ() -> Mapping[str, str]:
    return os.environ


def cache_dir() -> Path:
    """The user's cache folder for qbuild: ``$XDG_CACHE_HOME/qbuild``, else ``~/.cache/qbuild``."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path("~/.cache").expanduser()) / "qbuild"


def null_record(name: str) -> str:
    """Where the answer of a null build is remembered."""
    return str(cache_dir() / "null" / f"{name}.json")


def triton_cache() -> Path:
    """Where Triton keeps its kernels: ``$TRITON_CACHE_DIR``, else ``.triton/cache`` of ``$TRITON_HOME`` or home."""
    home = os.environ.get("TRITON_HOME") or "~"
    return Path(os.environ.get("TRITON_CACHE_DIR") or f"{home}/.triton/cache").expanduser()


def worker_environ(package_root: Path) -> dict[str, str]:
    """The environment of a worker: ours, with thread pools of numeric libraries held to one and no telemetry.

    ``package_root`` is the folder that holds the package: a worker imports the same qbuild as its parent.
    """
    env = dict(os.environ)
    env["PYTHONPATH"] = os.pathsep.join([str(package_root), *filter(None, [os.environ.get("PYTHONPATH")])])
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        env.setdefault(name, "1")
    env["TOKENIZERS_PARALLELISM"] = "false"
    env["HF_HUB_DISABLE_TELEMETRY"] = "1"
    env["PYTHONUNBUFFERED"] = "1"
    env.setdefault("CUDA_DEVICE_ORDER", "PCI_BUS_ID")  # as NVML counts, so that its first GPU is the one that is used
    # A freed buffer goes back to the system: the prediction of a peak is then the sum of what is alive.
    env.setdefault("MALLOC_ARENA_MAX", "2")
    return env


def cpu_count() -> int:
    """Cores this process may use: the affinity mask, lowered by a cgroup CPU quota."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        if quota != "max":
            cores = min(cores, max(1, int(quota) // int(period)))
    except (OSError, ValueError):
        pass  # no cgroup v2 here
    return cores


def _meminfo(field: str) -> int | None:
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith(field + ":"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass  # not Linux
    return None


def _cgroup_value(name: str) -> int | None:
    try:
        text = Path("/sys/fs/cgroup", name).read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None


def memory_limit() -> int:
    """Bytes a build may take by itself: the least of physical, cgroup limit and available memory, less a margin."""
    total, available = _meminfo("MemTotal"), _meminfo("MemAvailable")
    if total is None or available is None:
        import psutil

        memory = psutil.virtual_memory()
        total, available = memory.total, memory.available
    limits = [total, available]
    ceiling = _cgroup_value("memory.max")
    if ceiling is not None:
        limits.append(max(0, ceiling - (_cgroup_value("memory.current") or 0)))
    return int(min(limits) * (1 - MARGIN))


def process_rss(pid: int) -> int:
    """Resident bytes of one process; 0 when it is gone."""
    try:
        return int(Path(f"/proc/{pid}/statm").read_bytes().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, IndexError):
        return _rss_elsewhere(pid)


def tree_rss(pid: int) -> int:
    """Resident bytes of a process and of those that its main thread started."""
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        children = []  # it is gone, or there is no /proc
    return process_rss(pid) + sum(tree_rss(int(child)) for child in children)


def _rss_elsewhere(pid: int) -> int:
    """Without /proc: a process that is gone there is gone here too."""
    import psutil

    try:
        return int(psutil.Process(pid).memory_info().rss)
    except psutil.Error:
        return 0


def peak_rss(usage_maxrss: int) -> int:
    """``ru_maxrss`` in bytes: Linux counts KiB, macOS bytes."""
    return usage_maxrss if sys.platform == "darwin" else usage_maxrss * 1024


class Machine(NamedTuple):
    """A reading of the machine, taken once and passed as a value."""

    cores: int
    memory: int  # bytes, memory_limit()
    arch: str  # x86_64, aarch64, ...


def inspect() -> Machine:
    return Machine(cpu_count(), memory_limit(), os.uname().machine)


# GPUs ----------------------------------------------------------------------------------------------------------------


class Gpu(NamedTuple):
    """A CUDA device as the driver describes it: bytes of its memory, and of those that are free now."""

    name: str
    total: int
    free: int


def gpus() -> tuple[Gpu, ...]:
    """The CUDA devices this process may use, by NVML, which needs no CUDA context; none without a driver."""
    import ctypes

    try:
        nvml = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return ()  # no NVIDIA driver
    if nvml.nvmlInit_v2() != 0:
        return ()
    try:
        count = ctypes.c_uint(0)
        nvml.nvmlDeviceGetCount_v2(ctypes.byref(count))
        found = [_gpu(nvml, index) for index in range(count.value)]
    finally:
        nvml.nvmlShutdown()
    return _visible([device for device in found if device is not None], os.environ.get("CUDA_VISIBLE_DEVICES"))


def _gpu(nvml: Any, index: int) -> tuple[str, Gpu] | None:
    """A device by its number: its UUID and what it is. None for one that the driver cannot describe."""
    import ctypes

    handle, memory = ctypes.c_void_p(), (ctypes.c_ulonglong * 3)()  # nvmlMemory_t: total, free, used
    uuid, name = ctypes.create_string_buffer(96), ctypes.create_string_buffer(96)
    codes = (
        nvml.nvmlDeviceGetHandleByIndex_v2(ctypes.c_uint(index), ctypes.byref(handle)),
        nvml.nvmlDeviceGetUUID(handle, uuid, len(uuid)),
        nvml.nvmlDeviceGetName(handle, name, len(name)),
        nvml.nvmlDeviceGetMemoryInfo(handle, memory),
    )
    return None if any(codes) else (uuid.value.decode(), Gpu(name.value.decode(), memory[0], memory[1]))


def _visible(found: list[tuple[str, Gpu]], chosen: str | None) -> tuple[Gpu, ...]:
    """The devices that CUDA_VISIBLE_DEVICES names, in its order: numbers or UUIDs; CUDA stops at the first unknown."""
    if chosen is None:
        return tuple(gpu for _, gpu in found)
    visible = []
    for word in filter(None, (word.strip() for word in chosen.split(","))):
        named = [g for n, (uuid, g) in enumerate(found) if word == str(n) or (word[0] == "G" and uuid.startswith(word))]
        if len(named) != 1:
            break
        visible.append(named[0])
    return tuple(visible)


def has_torch() -> bool:
    """Whether torch is installed with CUDA in it, by where its files are: it is not loaded."""
    from importlib.util import find_spec

    found = find_spec("torch")
    folders = (found.submodule_search_locations or []) if found is not None else []
    return any((Path(folder) / "lib" / "libtorch_cuda.so").exists() for folder in folders)


def has_triton() -> bool:
    from importlib.util import find_spec

    return find_spec("triton") is not None
