"""Hash source tensors without making anything of them: for files that changed while results for their tensors exist."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from qbuild.checkpoint import Reader, SourceFile
from qbuild.digest import Digest, Hasher
from qbuild.store import Store

RAM = 52 << 20  # a worker with numpy and SQLite loaded, and one buffer (measured: 46 to 51 MiB)
BUFFER = 8 << 20


@dataclass(frozen=True)
class Range:
    name: str
    file: int
    offset: int
    nbytes: int


@dataclass(frozen=True)
class Task:
    files: tuple[SourceFile, ...]
    ranges: tuple[Range, ...]


def run(task: Task, store: Store, emit: Callable[[dict[str, Any]], None]) -> dict[tuple[str, int], Digest]:
    """Digests by (file, offset), recorded with what the files were before the first read."""
    identities = [f.identity() for f in task.files]
    buffer, found, done = memoryview(bytearray(BUFFER)), {}, 0
    seconds = dict.fromkeys(("read", "hash"), 0.0)
    with Reader(task.files) as reader:
        for number, item in enumerate(task.ranges, start=1):
            hasher = Hasher()
            for start in range(0, item.nbytes, BUFFER):
                part = buffer[: min(BUFFER, item.nbytes - start)]
                began = time.monotonic()
                reader.read_into(item.file, item.offset + start, part)
                read = time.monotonic()
                hasher.update(part)
                seconds["read"] += read - began
                seconds["hash"] += time.monotonic() - read
            done += item.nbytes
            found[str(task.files[item.file].path), item.offset] = hasher.digest()
            store.sources.put(identities[item.file], item.offset, hasher.digest())
            emit({"event": "progress", "tensors": number, "bytes": done, "current": item.name, "seconds": seconds})
    return found
