"""The files of a model directory, each written once, in the store."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping

from qbuild.actions.directory import tree
from qbuild.digest import Digest, Hasher
from qbuild.inputs import InputFile
from qbuild.jobs import Emit
from qbuild.quant.directory import Chunk, Directory, Item, OutFile, write
from qbuild.store import Partial, Store

__all__ = ["put"]

COPY = 4 << 20


def put(
    directory: Directory,
    copies: Mapping[str, InputFile],
    get: Callable[[Item], Mapping[str, Iterable[Chunk]]],
    key: str,
    store: Store,
    emit: Emit,
) -> tuple[Digest, ...]:
    """Store every file of ``directory``, ``get`` giving the bytes of its items. Its tree's digest, then the files'."""
    began = time.monotonic()
    found: dict[str, Digest] = {name: store.put_bytes(text.encode()) for name, text in directory.texts.items()}
    found |= {name: store.put_bytes(file.read()) for name, file in copies.items()}
    written = finished = 0

    def progress(file: OutFile, nbytes: int) -> None:
        times = {"read": 0.0, "hash": time.monotonic() - began}
        done = written + nbytes
        emit({"event": "progress", "tensors": finished, "bytes": done, "current": file.name, "seconds": times})

    for file in directory.files:
        with store.partial(f"{key[:32]}-{file.name}", file.size) as partial:
            write(file, _putting(partial, lambda n, file=file: progress(file, n)), get)  # type: ignore[misc]
            found[file.name] = _commit(partial)
        written, finished = written + file.size, finished + 1
        progress(file, 0)
    return store.put_bytes(tree(found)), *(digest for _, digest in sorted(found.items()))


def _putting(partial: Partial, progress: Callable[[int], None]) -> Callable[[int, Chunk], None]:
    done = 0

    def put_chunk(offset: int, data: Chunk) -> None:
        nonlocal done
        partial.write_at(offset, data)
        done += memoryview(data).nbytes
        progress(done)

    return put_chunk


def _commit(partial: Partial) -> Digest:
    hasher, buffer = Hasher(), memoryview(bytearray(COPY))
    while hasher.size < partial.size:
        part = buffer[: min(COPY, partial.size - hasher.size)]
        partial.read_at(hasher.size, part)
        hasher.update(part)
    digest = hasher.digest()
    partial.commit(digest)
    return digest
