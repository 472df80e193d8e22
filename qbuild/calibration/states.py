"""The hidden states of all windows between two layers of a pass: in memory or in files, and taken up again."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import torch

from qbuild.calibration.forward import Streamed
from qbuild.errors import StoreError
from qbuild.fsutil import disk_error, fsync_dir, read_exact, write_all

__all__ = ["Run", "States"]

KEEP_EVERY = 5.0  # seconds of work between writes of the hidden states; less is not worth a sync of the disk

Run = Callable[[list[torch.Tensor]], list[torch.Tensor]]  # windows through a layer, in their order


class States:
    """The hidden states of all windows between two layers, in memory or in a file. ``ready``: the layer they are for.

    A window at a time goes through a layer, whatever the memory: how sums are split would change their last bits.
    """

    def __init__(
        self, folder: Path, tokens: np.ndarray, model: Streamed, first: int, *, together: int, spill: bool
    ) -> None:
        """``tokens`` int32 [windows, length]; states beyond layer ``first`` are of no use. ``together``: windows in
        memory at a time, beside the states themselves."""
        self.together = together
        self.folder, self.spill, self.dtype = folder, spill, model.dtype
        self.windows, length = tokens.shape
        self.shape = (1, length, model.width)
        self.size = length * model.width * model.dtype.itemsize  # bytes of a window
        self.ready = 0
        whole = 0 if self.spill else self.windows  # one block: many small ones would leave holes in memory
        pinned = model.device.type == "cuda"  # so that copies need not wait for what is computed
        self._hidden = torch.empty(whole, length, model.width, dtype=model.dtype, pin_memory=pinned)
        self._file: int | None = None
        self._kept = time.monotonic()
        self.folder.mkdir(parents=True, exist_ok=True)
        if not self._found(first):
            self._embed(tokens, model)

    def __enter__(self) -> States:
        return self

    def __exit__(self, *_: object) -> None:
        self._close()

    def advance(self, run: Run) -> None:
        """Send every window through a layer, some at a time."""
        if self.spill:
            self._write(self.ready + 1, self._sent(run))
        else:
            for hidden, made in zip(self._hidden.split(1), self._sent(run), strict=True):
                hidden.copy_(made, non_blocking=True)
            if self._hidden.is_pinned():
                torch.cuda.synchronize()
        self.ready += 1

    def blocks(self) -> Iterator[list[torch.Tensor]]:
        """The windows, as many at a time as go through a layer together."""
        for start in range(0, self.windows, self.together):
            windows = range(start, min(start + self.together, self.windows))
            yield [self._read(window) if self.spill else self._hidden[window : window + 1] for window in windows]

    def _sent(self, run: Run) -> Iterator[torch.Tensor]:
        for block in self.blocks():
            yield from run(block)

    def due(self, *, last: bool) -> bool:
        """Whether the work since the states were kept is worth keeping them."""
        return self.spill or last or time.monotonic() - self._kept >= KEEP_EVERY

    def keep(self) -> None:
        """Write the states for a later process, and drop older ones.

        To be called when the statistics of the layer are safe: until then a new process needs the states before it.
        """
        if not self.spill:
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
