"""The calibration run: hidden states go through the model a layer at a time, and every layer's statistics are saved."""

from __future__ import annotations

import ctypes
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from qbuild.calibration.collect import Collector, Watch
from qbuild.calibration.forward import Layer, Streamed
from qbuild.calibration.shapes import linears
from qbuild.calibration.statistics import Statistics
from qbuild.calibration.weights import Read
from qbuild.errors import StoreError
from qbuild.fsutil import disk_error, fsync_dir, read_exact, write_all

__all__ = ["Pass", "Save", "calibrate"]

M_MMAP_THRESHOLD = -3  # malloc.h of glibc
KEEP_EVERY = 5.0  # seconds of work between writes of the hidden states; less is not worth a sync of the disk

Save = Callable[[int, bytearray, float], None]  # layer, Statistics.to_bytes(), seconds of work


@dataclass(frozen=True)
class Pass:
    """One calibration pass over the layers ``first`` to ``last``, both included.

    ``tensors`` are the shapes of the checkpoint's tensors by name, ``tokens`` int32 [windows, length]. ``states`` is a
    folder of this pass's own, for the hidden states after the last finished layers; with ``spill`` they are never
    whole in memory. Neither it nor ``threads`` nor where a pass was cut off changes a byte of the statistics.
    """

    config: Mapping[str, Any]
    tensors: Mapping[str, tuple[int, ...]]
    tokens: np.ndarray
    first: int
    last: int
    states: Path
    gram: bool = True
    dtype: str = "float32"
    device: str = "cpu"
    spill: bool = False
    threads: int = 1


def calibrate(task: Pass, read: Read, save: Save) -> None:
    """Run a pass, calling ``save`` after every layer.

    It goes on from the newest hidden states in the folder that are not beyond ``first``, else from the embedding;
    layers before ``first`` are run without being measured. A killed pass loses the layer it was in, or the few seconds
    of layers since the states were written last. Raises InputError for weights or activations that cannot be used.
    """
    torch.set_num_threads(1)  # how a product is split over threads changes its last bits: windows are split instead
    _give_back_freed_memory()
    model = Streamed(task.config, task.tensors, read, device=task.device, dtype=task.dtype)
    threads = task.threads if task.device == "cpu" else 1
    with ThreadPoolExecutor(threads) as pool, _States(task, model, threads) as states:
        model.prepare(task.tokens.shape[1])
        for index in range(states.ready, task.last + 1):
            began = time.monotonic()
            if index < task.first:
                with model.layer(index) as layer:
                    states.advance(partial(_unwatched, pool, layer))
            else:
                data = _measured(task, model, index, states, pool).to_bytes()
                save(index, data, time.monotonic() - began)
                del data
            states.keep(last=index == task.last)


def _unwatched(pool: Executor, layer: Layer, windows: list[torch.Tensor]) -> list[torch.Tensor]:
    return list(pool.map(layer, windows))


def _measured(task: Pass, model: Streamed, index: int, states: _States, pool: Executor) -> Statistics:
    """The statistics of a layer, which is out of memory again."""
    wanted = [linear.name for linear in linears(model.prefix, index, task.tensors)]
    with model.layer(index) as layer:
        collector = Collector(index, model.parameters(index), wanted, task.gram)

        def watched(watch: Watch, window: torch.Tensor) -> torch.Tensor:
            with watch:
                return layer(window)

        def run(windows: list[torch.Tensor]) -> list[torch.Tensor]:
            watches = [collector.watch() for _ in windows]
            made = list(pool.map(watched, watches, windows))
            collector.add(watches, pool)
            return made

        states.advance(run)
    return collector.statistics()


def _give_back_freed_memory() -> None:
    """glibc raises the size above which memory goes back to the system when freed, up to 32 MiB: weights would stay."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(M_MMAP_THRESHOLD, 4 << 20)


class _States:
    """The hidden states of all windows between two layers, in memory or in a file. ``ready``: the layer they are for.

    A window at a time goes through a layer, whatever the memory: how sums are split would change their last bits.
    """

    def __init__(self, task: Pass, model: Streamed, together: int) -> None:
        self.together = together  # windows in memory at a time, beside the states themselves
        self.folder, self.spill, self.dtype = task.states, task.spill, model.dtype
        self.windows, length = task.tokens.shape
        self.shape = (1, length, model.width)
        self.size = length * model.width * model.dtype.itemsize  # bytes of a window
        self.ready = 0
        whole = 0 if self.spill else self.windows  # one block: many small ones would leave holes in memory
        self._hidden = torch.empty(whole, length, model.width, dtype=model.dtype)
        self._file: int | None = None
        self._kept = time.monotonic()
        self.folder.mkdir(parents=True, exist_ok=True)
        if not self._found(task.first):
            self._embed(task.tokens, model)

    def __enter__(self) -> _States:
        return self

    def __exit__(self, *_: object) -> None:
        self._close()

    def advance(self, run: Callable[[list[torch.Tensor]], list[torch.Tensor]]) -> None:
        """Send every window through a layer, some at a time."""
        if self.spill:
            self._write(self.ready + 1, self._sent(run))
        else:
            for hidden, made in zip(self._hidden.split(1), self._sent(run), strict=True):
                hidden.copy_(made)
        self.ready += 1

    def _sent(self, run: Callable[[list[torch.Tensor]], list[torch.Tensor]]) -> Iterator[torch.Tensor]:
        for start in range(0, self.windows, self.together):
            windows = range(start, min(start + self.together, self.windows))
            yield from run(
                [self._read(window) if self.spill else self._hidden[window : window + 1] for window in windows]
            )

    def keep(self, *, last: bool) -> None:
        """Write the states for a later process, where the work since the last time is worth it, and drop older ones.

        To be called when the statistics of the layer are safe: until then a new process needs the states before it.
        """
        if not self.spill:
            if not last and time.monotonic() - self._kept < KEEP_EVERY:
                return
            self._write(self.ready, self._hidden.split(1))
            self._close()
            self._kept = time.monotonic()
        for other in self.folder.glob("before-*.hidden"):
            if other != self._path(self.ready):
                other.unlink()

    def _found(self, first: int) -> bool:
        """Take up what an earlier process left."""
        files = {int(path.stem.partition("-")[2]): path for path in self.folder.glob("before-*.hidden")}
        usable = [n for n, path in files.items() if n <= first and path.stat().st_size == self.windows * self.size]
        if not usable:
            return False
        self.ready = max(usable)
        self._file = os.open(files[self.ready], os.O_RDONLY)
        if not self.spill:
            for window, hidden in enumerate(self._hidden.split(1)):
                hidden.copy_(self._read(window))
            self._close()
        return True

    def _embed(self, tokens: np.ndarray, model: Streamed) -> None:
        ids = torch.from_numpy(tokens.astype(np.int64))
        made = (model.embed(ids[window : window + 1]) for window in range(self.windows))
        if self.spill:
            self._write(0, made)
        else:
            for hidden, embedded in zip(self._hidden.split(1), made, strict=True):
                hidden.copy_(embedded)
        model.release()

    def _path(self, ready: int) -> Path:
        return self.folder / f"before-{ready:04d}.hidden"

    def _write(self, ready: int, windows: Iterable[torch.Tensor]) -> None:
        """A file of states appears whole or not at all; it is open for reading after."""
        path, aside = self._path(ready), self.folder / "aside"
        try:
            fd = os.open(aside, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
            try:
                for window, hidden in enumerate(windows):
                    write_all(fd, _bytes(hidden), window * self.size)
                os.fsync(fd)
                aside.replace(path)
                fsync_dir(self.folder)
            except BaseException:
                os.close(fd)
                raise
        except OSError as error:
            raise disk_error(error, self.folder, self.windows * self.size) from None
        self._close()
        self._file = fd

    def _read(self, window: int) -> torch.Tensor:
        buffer = bytearray(self.size)
        if self._file is None or not read_exact(self._file, memoryview(buffer), window * self.size):
            raise StoreError(str(self.folder), "a file of hidden states became shorter", "start the build again")
        return torch.frombuffer(buffer, dtype=self.dtype).view(self.shape)

    def _close(self) -> None:
        if self._file is not None:
            os.close(self._file)
            self._file = None


def _bytes(hidden: torch.Tensor) -> memoryview:
    flat = hidden.contiguous().cpu().view(torch.uint8).numpy()
    return memoryview(flat).cast("B")
