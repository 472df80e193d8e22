"""Threads beside a device: one reads what is needed next, one writes what was made last.

On a CPU there are none: cores and memory are what is computed with.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, Self, TypeVar

__all__ = ["Ahead", "Behind"]

Key = TypeVar("Key")
Value = TypeVar("Value")


def _thread(device: str) -> ThreadPoolExecutor | None:
    return None if device == "cpu" else ThreadPoolExecutor(1)


class Ahead(Generic[Key, Value]):
    """``read``, begun before it is called where it was told what to expect. Its errors come where it is called."""

    def __init__(self, read: Callable[[Key], Value], device: str) -> None:
        self._read, self._pool = read, _thread(device)
        self._coming: dict[Key, Future[Value]] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def expect(self, keys: Iterable[Key]) -> None:
        """What will be asked for, in this order. It is in memory until then."""
        if self._pool is not None:
            self._coming |= {key: self._pool.submit(self._read, key) for key in keys}

    def __call__(self, key: Key) -> Value:
        coming = self._coming.pop(key, None)
        return self._read(key) if coming is None else coming.result()


class Behind:
    """Does one thing after another, each beside what the caller does next. The error of one comes with the next, with
    ``wait`` or at the end."""

    def __init__(self, device: str) -> None:
        self._pool = _thread(device)
        self._last: Future[None] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                self.wait()
        finally:
            if self._pool is not None:
                self._pool.shutdown()  # after an error too: what was made before it is kept

    def do(self, job: Callable[[], None]) -> None:
        self.wait()
        if self._pool is None:
            job()
        else:
            self._last = self._pool.submit(job)

    def wait(self) -> None:
        """Until all is done."""
        last, self._last = self._last, None
        if last is not None:
            last.result()
