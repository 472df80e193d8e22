"""A digest is a BLAKE3 hash and a size, always together: a size can be checked before a blob is touched."""

from __future__ import annotations

from typing import NamedTuple

import blake3

__all__ = ["Digest", "Hasher", "digest_bytes"]


class Digest(NamedTuple):
    """``hash`` is 64 lower-case hex characters; ``size`` counts bytes. The text form is ``<hash>/<size>``."""

    hash: str
    size: int

    def __str__(self) -> str:
        return f"{self.hash}/{self.size}"

    @classmethod
    def parse(cls, text: str) -> Digest:
        name, _, size = text.partition("/")
        if len(name) != 64 or not size.isdigit():
            raise ValueError(f"not a digest: {text!r}")
        return cls(name, int(size))


class Hasher:
    """Incremental digest. ``update`` takes any C-contiguous buffer and releases the GIL for large ones, which
    ``threads`` threads then share."""

    def __init__(self, threads: int = 1) -> None:
        self._hash = blake3.blake3(max_threads=threads)
        self.size = 0

    def update(self, data: bytes | bytearray | memoryview) -> None:
        view = memoryview(data).cast("B")
        self._hash.update(view)
        self.size += view.nbytes

    def digest(self) -> Digest:
        return Digest(self._hash.hexdigest(), self.size)


def digest_bytes(data: bytes | bytearray | memoryview) -> Digest:
    hasher = Hasher()
    hasher.update(data)
    return hasher.digest()
