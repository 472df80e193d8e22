"""Bytes with digests, a committed file of slices, a flipped byte."""

from __future__ import annotations

import os
from pathlib import Path

from qbuild.digest import Digest, digest_bytes
from qbuild.store import Store


def digest_of(seed: int, size: int = 1000) -> tuple[bytes, Digest]:
    data = bytes((seed * 31 + i * 7) % 256 for i in range(size))
    return data, digest_bytes(data)


def flip(path: Path, offset: int = 0, *, keep_mtime: bool) -> None:
    """Change one byte of a file, read-only or not."""
    found = path.stat()
    path.chmod(0o644)
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 1]))
    path.chmod(found.st_mode & 0o777)
    if keep_mtime:
        os.utime(path, ns=(found.st_atime_ns, found.st_mtime_ns))
    else:
        os.utime(path, ns=(found.st_atime_ns, found.st_mtime_ns + 1))


def packed(store: Store, name: str = "out", count: int = 4) -> tuple[Digest, list[Digest], bytes]:
    """A committed file of ``count`` slices of 1000 bytes."""
    parts = [digest_of(seed) for seed in range(count)]
    whole = b"".join(data for data, _ in parts)
    with store.partial(name, len(whole)) as partial:
        for i, (data, digest) in enumerate(parts):
            partial.write_at(1000 * i, data)
            partial.finished(digest, 1000 * i)
        partial.commit(digest_bytes(whole))
    return digest_bytes(whole), [digest for _, digest in parts], whole
