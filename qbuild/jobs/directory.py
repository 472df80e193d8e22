"""Solved layers and plain tensors → the files of a model directory, each written once, in the store."""

from __future__ import annotations

import time
from collections.abc import Callable

from qbuild.actions.directory import KIND, Made, Task, tree
from qbuild.cache import ActionCache, ActionResult
from qbuild.checkpoint import Reader
from qbuild.digest import Digest, Hasher
from qbuild.jobs import Emit, needed
from qbuild.quant.codes import Solved
from qbuild.quant.contents import Contents
from qbuild.quant.directory import Chunk, OutFile, write
from qbuild.store import Partial, Store

__all__ = ["run"]

COPY = 4 << 20


def run(task: Task, store: Store, emit: Emit) -> Made:
    began = time.monotonic()
    found: dict[str, Digest] = {name: store.put_bytes(text.encode()) for name, text in task.directory.texts.items()}
    found |= {name: store.put_bytes(path.read_bytes()) for name, path in task.directory.copies.items()}
    written = finished = 0

    def solved(layer: int) -> Solved:
        return Solved.from_bytes(needed(store, task.solved[layer]))

    def progress(file: OutFile, nbytes: int) -> None:
        times = {"read": 0.0, "hash": time.monotonic() - began}
        done = written + nbytes
        emit({"event": "progress", "tensors": finished, "bytes": done, "current": file.name, "seconds": times})

    with Reader(task.checkpoint.files) as reader:
        get = Contents(task.checkpoint, reader, task.scheme, solved)
        for file in task.directory.files:
            name = f"{task.key[:32]}-{file.name}"
            with store.partial(name, file.size) as partial:
                write(file, _putting(partial, lambda n, file=file: progress(file, n)), get)  # type: ignore[misc]
                found[file.name] = _commit(partial)
            written, finished = written + file.size, finished + 1
            progress(file, 0)
    made = store.put_bytes(tree(found))
    outputs = (made, *(digest for _, digest in sorted(found.items())))
    ActionCache(store).put(task.key, ActionResult(KIND, outputs, time.monotonic() - began))
    return Made(made, reader.bytes_read, written)


def _putting(partial: Partial, progress: Callable[[int], None]) -> Callable[[int, Chunk], None]:
    done = 0

    def put(offset: int, data: Chunk) -> None:
        nonlocal done
        partial.write_at(offset, data)
        done += memoryview(data).nbytes
        progress(done)

    return put


def _commit(partial: Partial) -> Digest:
    hasher, buffer = Hasher(), memoryview(bytearray(COPY))
    while hasher.size < partial.size:
        part = buffer[: min(COPY, partial.size - hasher.size)]
        partial.read_at(hasher.size, part)
        hasher.update(part)
    digest = hasher.digest()
    partial.commit(digest)
    return digest
