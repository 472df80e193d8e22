"""One pass over a source: every tensor is read once, hashed on the way, and encoded for every file that wants it.

    reader (this thread)          pool of compute threads        writer thread
    read a chunk          ──────► encode it to each type  ─────► hash, write in place, journal
                          └─────► a thread hashes it      ──────┘

With a GPU, a compute thread has a stream of it: chunks go up, are encoded and come down beside each other. A type that
the GPU has no kernel for is encoded on the CPU by the same thread.

Buffers are preallocated slots that travel this line and come back, so memory is slots x slot size whatever the model.
The writer takes chunks in order. A finished tensor is journalled with its digest, and its result is cached, at once:
a killed pass loses the tensors in flight. The digest of a file is computed as its bytes are written.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np

from qbuild import kernels
from qbuild.actions import tensor
from qbuild.cache import ActionCache, ActionResult
from qbuild.checkpoint import Reader, SourceFile
from qbuild.digest import Digest, Hasher, digest_bytes
from qbuild.errors import InputError
from qbuild.ggml import QTYPES
from qbuild.inputs import changed
from qbuild.kernels.gpu.table import TYPES as ON_GPU
from qbuild.kernels.gpu.table import footprint
from qbuild.manifest import action_key, walk
from qbuild.store import Location, Partial, Store

ALIGNMENT = 32
STAGES = ("read", "hash", "encode", "write", "wait_slot", "wait_encode")

Times = list[tuple[str, int, float]]  # (rate name, weights, seconds of one thread)


class Stream(Protocol):
    """Encodes on a GPU for one thread; holds device memory as long as it lives."""

    def quantize_into(self, x: np.ndarray, out: np.ndarray, name: str, imatrix: np.ndarray | None = None) -> None: ...


class Gpu(Protocol):
    """``qbuild.kernels.gpu.encode``, which only a worker that has a GPU imports."""

    def Stream(self, nbytes: int) -> Stream: ...  # noqa: N802

    def pin(self, buffer: np.ndarray) -> None: ...


@dataclass(frozen=True)
class Piece:
    """Rows of the source: bytes of file ``file`` at ``offset``, or ``data`` that was computed from the config."""

    name: str
    file: int
    offset: int
    nbytes: int
    digest: Digest | None = None  # known before the read, from an unchanged file's record
    data: bytes | None = None


@dataclass(frozen=True)
class Want:
    """One ``gguf.tensor`` action: the tensor in one type, and the places (output, offset) its bytes go to."""

    params: tensor.Params
    places: tuple[tuple[int, int], ...]
    imatrix: bytes | None = None  # float32 [experts or 1, cols]


@dataclass(frozen=True)
class TensorTask:
    """Everything to be made of one output tensor."""

    name: str
    pieces: tuple[Piece, ...]
    unit_rows: int
    wants: tuple[Want, ...]

    @property
    def nbytes(self) -> int:
        return sum(p.nbytes for p in self.pieces)


@dataclass(frozen=True)
class OutputTask:
    """A file to be made: ``header`` is complete (or empty in a plan), ``size`` is that of the whole file, ``name`` its
    name in the store until it is finished."""

    target: str
    name: str
    header: bytes
    header_bytes: int
    size: int


@dataclass(frozen=True)
class PassTask:
    files: tuple[SourceFile, ...]
    tensors: tuple[TensorTask, ...]
    outputs: tuple[OutputTask, ...]
    chunk_bytes: int
    threads: int
    since: int = 0  # results that were stored before (nanoseconds since the epoch) are not used
    device: str = "cpu"  # or cuda: encodes what has a kernel there


@dataclass
class Tally:
    """What a pass did, for build.json."""

    computed: int = 0
    reused: int = 0
    read_bytes: int = 0
    written_bytes: int = 0
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(STAGES, 0.0))
    sources: dict[tuple[str, int], Digest] = field(default_factory=dict)  # (file, offset) -> what was read there
    encoded: dict[str, tuple[int, float]] = field(default_factory=dict)  # rate name -> (weights, seconds of one thread)

    def encode(self, rate: str, weights: int, seconds: float) -> None:
        self.seconds["encode"] += seconds
        before = self.encoded.get(rate, (0, 0.0))
        self.encoded[rate] = (before[0] + weights, before[1] + seconds)


@dataclass(frozen=True)
class FileResult:
    target: str
    digest: Digest
    computed: int
    reused: int


def slot_bytes(task: PassTask) -> tuple[int, int]:
    """(bytes of one slot's buffers, scratch bytes of one compute thread) at this task's chunk size."""
    largest = stage = 0
    for t in task.tensors:
        rows = chunk_rows(t, task.chunk_bytes)
        row = tensor.source_row_bytes(t.wants[0].params)
        out = sum(_out_row_bytes(w) for w in t.wants)
        largest = max(largest, rows * (row + out))
        stage = max(stage, rows * max(tensor.stage_row_bytes(w.params) for w in t.wants))
    return largest, stage


def device_bytes(task: PassTask) -> int:
    """Bytes of GPU memory that one compute thread holds at this task's chunk size."""
    largest = 0
    for t in task.tensors:
        rows = chunk_rows(t, task.chunk_bytes)
        for params in (w.params for w in t.wants if on_gpu(w.params.type, task.device)):
            item = QTYPES[tensor.held_as(params)].nbytes
            largest = max(largest, footprint(params.type, rows * params.cols, params.cols, item))
    return largest


def on_gpu(type_: str, device: str) -> bool:
    return device == "cuda" and type_ in ON_GPU


def rate_name(type_: str, device: str) -> str:
    """Under which the speed of encoding is remembered."""
    return f"encode {type_} on cuda" if on_gpu(type_, device) else f"encode {type_}"


def slots(task: PassTask) -> int:
    return task.threads + 2  # one being read, one being written


def resized(task: PassTask, chunk_bytes: int, threads: int, device: str) -> PassTask:
    """The same work by another strategy."""
    return replace(task, chunk_bytes=chunk_bytes, threads=threads, device=device)


def _out_row_bytes(want: Want) -> int:
    return QTYPES[want.params.type].row_bytes(want.params.cols)


def chunk_rows(task: TensorTask, chunk_bytes: int) -> int:
    """Rows of a chunk: whole units, about ``chunk_bytes`` of source, never more than the tensor's largest piece."""
    row = tensor.source_row_bytes(task.wants[0].params)
    units = max(1, chunk_bytes // (row * task.unit_rows))
    return min(units * task.unit_rows, max(p.nbytes for p in task.pieces) // row)


class _OutputFile:
    """A file being written in place, hashed in order; what arrived out of order is read back at the end."""

    def __init__(self, task: OutputTask, partial: Partial, threads: int) -> None:
        self.task, self.partial = task, partial
        self.hasher = Hasher(threads)
        self.computed = self.reused = 0

    def write(self, offset: int, data: memoryview) -> None:
        self.partial.write_at(offset, data)
        self.saw(offset, data)

    def saw(self, offset: int, data: memoryview) -> None:
        """Bytes known to stand at ``offset``: feed the file's hash when they are next in line."""
        if offset == self.hasher.size:
            self.hasher.update(data)

    def finish_tensor(self, offset: int, nbytes: int, digest: Digest) -> None:
        pad = -(offset + nbytes) % ALIGNMENT
        if pad:
            self.write(offset + nbytes, memoryview(bytes(pad)))
        self.partial.finished(digest, offset)

    def commit(self, buffer: memoryview) -> Digest:
        while self.hasher.size < self.task.size:
            part = buffer[: min(len(buffer), self.task.size - self.hasher.size)]
            self.partial.read_at(self.hasher.size, part)
            self.hasher.update(part)
        digest = self.hasher.digest()
        self.partial.commit(digest)
        return digest


class _Slot:
    def __init__(self, nbytes: int, gpu: Gpu | None) -> None:
        self.buffer = np.empty(nbytes, np.uint8)
        if gpu is not None:
            gpu.pin(self.buffer)
        self.view = _bytes(self.buffer)


def _bytes(array: np.ndarray) -> memoryview:
    """The bytes of a C-contiguous array."""
    return memoryview(array).cast("B")  # type: ignore[arg-type]  # numpy's stubs do not say it is a buffer


@dataclass
class _Chunk:
    slot: _Slot
    task: TensorTask
    row: int
    rows: int
    raw: np.ndarray
    outs: list[np.ndarray]
    last: bool


@dataclass
class _Open:
    """A tensor in flight: which wants are computed, their output hashers, and the locks held for them."""

    task: TensorTask
    wants: list[Want]
    locks: ExitStack
    digests: list[Digest]
    hashers: list[Hasher]


class Pass:
    """Runs one PassTask. ``emit`` gets progress values; it is called from one thread at a time."""

    def __init__(
        self, task: PassTask, store: Store, emit: Callable[[dict[str, Any]], None], gpu: Gpu | None = None
    ) -> None:
        self.task, self.store, self.emit, self.gpu = task, store, emit, gpu
        self.cache = ActionCache(store, task.since)
        # On a GPU the compute threads wait for it most of the time: hashing, then the slowest stage, takes them all.
        self.hash_threads = task.threads if gpu is not None else max(1, task.threads // 4)
        self.device_bytes, self.of_thread = device_bytes(task), threading.local()
        self.tally = Tally()
        # Taken before the first read: what is read of a file that changes meanwhile is recorded under the old identity.
        self.identities = [f.identity() for f in task.files]
        self.free: queue.Queue[_Slot] = queue.Queue()
        self.ready: queue.Queue[tuple[_Open, _Chunk, Future[Times], Future[None]] | None] = queue.Queue()
        self.failure: BaseException | None = None
        self.outputs: list[_OutputFile] = []
        self.done_tensors = self.done_bytes = 0
        self.emitted = 0.0

    def run(self) -> list[FileResult]:
        size, _ = slot_bytes(self.task)
        for _ in range(slots(self.task)):
            self.free.put(_Slot(size, self.gpu))
        with ExitStack() as stack:
            wanted = [(o.name, o.size) for o in self.task.outputs]
            partials = stack.enter_context(self.store.partials(wanted))
            both = zip(self.task.outputs, partials, strict=True)
            self.outputs = [_OutputFile(o, p, self.hash_threads) for o, p in both]
            for output in self.outputs:
                output.write(0, memoryview(output.task.header))
            reader = stack.enter_context(Reader(self.task.files))
            self._stream(reader)
            reader.check()  # tensors that had no digest were compared with nothing
            self.tally.read_bytes = reader.bytes_read
            return [self._commit(o) for o in self.outputs]

    def _stream(self, reader: Reader) -> None:
        writer = threading.Thread(target=self._write_all, name="qbuild-writer")
        writer.start()
        try:
            pool = ThreadPoolExecutor(self.task.threads, "qbuild-encode")
            with pool, ThreadPoolExecutor(1, "qbuild-hash") as hashing:
                for task in self.task.tensors:
                    self._one(task, reader, pool, hashing)
                    if self.failure is not None:
                        break
        except BaseException as error:
            self.failure = self.failure or error
        finally:
            self.ready.put(None)
            writer.join()
        if self.failure is not None:
            raise self.failure

    # reader side -----------------------------------------------------------------------------------------------------

    def _one(self, task: TensorTask, reader: Reader, pool: ThreadPoolExecutor, hashing: ThreadPoolExecutor) -> None:
        digests = [p.digest if p.data is None else digest_bytes(p.data) for p in task.pieces]
        locks = ExitStack()
        try:
            for want in task.wants:
                locks.enter_context(self.store.lock(self._lock_name(task, want), on_wait=self._waiting))
            if None in digests:  # another build may have read it while this one waited
                digests = [d or self._recorded(p) for p, d in zip(task.pieces, digests, strict=True)]
            known = [d for d in digests if d is not None]
            todo = [w for w in task.wants if len(known) < len(digests) or not self._reuse(w, known)]
            if not todo:
                locks.close()
                self._progress(task, 1, task.nbytes)
                return
            hashers = [Hasher(self.hash_threads) for _ in todo]
            work = _Open(task, todo, locks, [], hashers)
            for chunk, hashed in self._chunks(work, reader, hashing):
                self.ready.put((work, chunk, pool.submit(self._encode, chunk, todo), hashed))
                if self.failure is not None:
                    return
        except BaseException:
            locks.close()
            raise

    def _recorded(self, piece: Piece) -> Digest | None:
        found = self.store.sources.get(self.identities[piece.file], piece.offset)
        return found if found is not None and found.size == piece.nbytes else None

    def _record(self, piece: Piece, digest: Digest) -> None:
        if piece.data is None:
            self.tally.sources[str(self.task.files[piece.file].path), piece.offset] = digest
            self.store.sources.put(self.identities[piece.file], piece.offset, digest)

    def _read(self, reader: Reader, piece: Piece, start: int, into: memoryview) -> None:
        began = time.monotonic()
        if piece.data is None:
            reader.read_into(piece.file, piece.offset + start, into)
        else:
            into[:] = piece.data[start : start + len(into)]
        self.tally.seconds["read"] += time.monotonic() - began

    def _lock_name(self, task: TensorTask, want: Want) -> str:
        """Named by place, not by content: two builds that start cold do not know the digests yet."""
        places = tuple((str(self.task.files[p.file].path), p.offset, p.nbytes) for p in task.pieces if p.data is None)
        weights = digest_bytes(want.imatrix) if want.imatrix is not None else None
        return digest_bytes(repr((places, task.name if not places else "", want.params, weights)).encode()).hash

    def _waiting(self) -> None:
        self.emit({"event": "message", "level": "info", "text": "waiting for another build that makes the same tensor"})

    def _chunks(
        self, work: _Open, reader: Reader, hashing: ThreadPoolExecutor
    ) -> Iterator[tuple[_Chunk, Future[None]]]:
        """Chunks that were read, each with the hashing of it."""
        task, first = work.task, 0
        row_bytes = tensor.source_row_bytes(task.wants[0].params)
        step = chunk_rows(task, self.task.chunk_bytes)
        for index, piece in enumerate(task.pieces):
            hasher, total = Hasher(self.hash_threads), piece.nbytes // row_bytes
            for start in range(0, total, step):
                rows = min(step, total - start)
                began = time.monotonic()
                slot = self.free.get()
                self.tally.seconds["wait_slot"] += time.monotonic() - began
                chunk = self._carve(slot, work, first + start, rows)
                view = _bytes(chunk.raw)
                self._read(reader, piece, start * row_bytes, view)
                ends = piece if start + rows == total else None
                chunk.last = ends is not None and index == len(task.pieces) - 1
                yield chunk, hashing.submit(self._hash, work, hasher, view, ends)
            first += total

    def _hash(self, work: _Open, hasher: Hasher, view: memoryview, ends: Piece | None) -> None:
        """Chunks come in order; with the last of a piece, its digest is known."""
        began = time.monotonic()
        hasher.update(view)
        self.tally.seconds["hash"] += time.monotonic() - began
        if ends is not None:
            work.digests.append(self._checked(ends, hasher.digest()))

    def _checked(self, piece: Piece, digest: Digest) -> Digest:
        if piece.digest is not None and piece.digest != digest:
            raise changed(self.task.files[piece.file].path, piece.name)
        self._record(piece, digest)
        return digest

    def _carve(self, slot: _Slot, work: _Open, row: int, rows: int) -> _Chunk:
        width = tensor.source_row_bytes(work.task.wants[0].params)
        raw = slot.buffer[: rows * width].reshape(rows, width)
        outs, at = [], rows * width
        for want in work.wants:
            width = _out_row_bytes(want)
            outs.append(slot.buffer[at : at + rows * width].reshape(rows, width))
            at += rows * width
        return _Chunk(slot, work.task, row, rows, raw, outs, False)

    # compute ---------------------------------------------------------------------------------------------------------

    def _encode(self, chunk: _Chunk, wants: list[Want]) -> Times:
        times: Times = []
        for want, out in zip(wants, chunk.outs, strict=True):
            began = time.monotonic()
            quantize = self._quantize(want.params.type)
            try:
                for rows, weights in _weighed(want, chunk):
                    tensor.encode(chunk.raw[rows], want.params, out[rows], weights, quantize)
            except tensor.BadWeights as bad:
                at = f" in row {chunk.row + bad.row}" if bad.row is not None else ""
                raise InputError(chunk.task.pieces[0].name, bad.fact + at, bad.remedy) from None
            rate = rate_name(want.params.type, self.task.device)
            times.append((rate, chunk.rows * want.params.cols, time.monotonic() - began))
        return times

    def _quantize(self, type_: str) -> tensor.Quantize:
        """The quantizer of a type, for this thread: its own stream of the GPU, or the CPU's."""
        if self.gpu is None or not on_gpu(type_, self.task.device):
            return kernels.quantize_into
        if not hasattr(self.of_thread, "stream"):
            self.of_thread.stream = self.gpu.Stream(self.device_bytes)
        stream: Stream = self.of_thread.stream
        return stream.quantize_into

    # reuse -----------------------------------------------------------------------------------------------------------

    def _reuse(self, want: Want, digests: list[Digest]) -> bool:
        """Put a cached tensor in its places, verified byte for byte; False where it must be computed."""
        result = self.cache.get(key_of(want, digests))
        if result is None:
            return False
        digest = result.outputs[0]
        for index, offset in want.places:
            if not self._place(digest, self.outputs[index], offset):
                return False
        for index, offset in want.places:
            self.outputs[index].finish_tensor(offset, digest.size, digest)
            self.outputs[index].reused += 1
        self.tally.reused += 1
        return True

    def _place(self, digest: Digest, output: _OutputFile, offset: int) -> bool:
        """Bring the bytes of ``digest`` to ``offset`` of an output, or find them there; False where none are right."""
        at = (output.partial.path, offset)
        while (place := self.store.locate(digest, at)) is not None:
            if self._copy(place, digest, None if (place.path, place.offset) == at else output, offset):
                return True
            self.store.forget(place, digest)
        return False

    def _copy(self, place: Location, digest: Digest, output: _OutputFile | None, offset: int) -> bool:
        """Read a slice, verify it, and write it unless it is in its place already. A place that is gone is no match."""
        hasher, slot = Hasher(), self.free.get()
        try:
            view = slot.view
            for start in range(0, digest.size, len(view)):
                part = view[: min(len(view), digest.size - start)]
                if not self.store.read_slice(place, start, part):
                    return False
                hasher.update(part)
                if output is not None:
                    output.partial.write_at(offset + start, part)
                    self.tally.written_bytes += len(part)
            return hasher.digest() == digest
        finally:
            self.free.put(slot)

    # writer side -----------------------------------------------------------------------------------------------------

    def _write_all(self) -> None:
        while True:
            began = time.monotonic()
            item = self.ready.get()
            if item is None:
                return
            work, chunk, encoded, hashed = item
            using: tuple[Future[Any], ...] = (encoded, hashed)
            try:
                for rate, weights, seconds in encoded.result():
                    self.tally.encode(rate, weights, seconds)
                hashed.result()
                self.tally.seconds["wait_encode"] += time.monotonic() - began
                if self.failure is None:
                    self._write(work, chunk)
            except BaseException as error:
                self.failure = self.failure or error
            finally:
                wait(using)  # the next bytes in a buffer that is being hashed would get into its digest
                self.free.put(chunk.slot)
                if chunk.last or self.failure is not None:
                    work.locks.close()

    def _write(self, work: _Open, chunk: _Chunk) -> None:
        began = time.monotonic()
        for want, hasher, out in zip(work.wants, work.hashers, chunk.outs, strict=True):
            data = _bytes(out)
            hasher.update(data)
            for index, offset in want.places:
                self.outputs[index].write(offset + chunk.row * out.shape[1], data)
                self.tally.written_bytes += len(data)
        if chunk.last:
            self._finish(work)
        self.tally.seconds["write"] += time.monotonic() - began
        self._progress(work.task, int(chunk.last), chunk.raw.nbytes)

    def _finish(self, work: _Open) -> None:
        for want, hasher in zip(work.wants, work.hashers, strict=True):
            digest = hasher.digest()
            for index, offset in want.places:
                self.outputs[index].finish_tensor(offset, digest.size, digest)
                self.outputs[index].computed += 1
            key = key_of(want, work.digests)
            self.cache.put(key, ActionResult(tensor.KIND, (digest,)))
            self.cache.note_hint(hint_of(work.task.name, work.task.nbytes, want.params.type))
            self.tally.computed += 1

    def _progress(self, task: TensorTask, tensors: int, nbytes: int) -> None:
        self.done_tensors += tensors
        self.done_bytes += nbytes
        now = time.monotonic()
        if now - self.emitted > 0.1 or self.done_tensors == len(self.task.tensors):
            self.emitted = now
            seconds = self.tally.seconds
            self.emit({"event": "progress", "tensors": self.done_tensors, "bytes": self.done_bytes,
                       "current": task.name, "seconds": dict(seconds)})  # fmt: skip

    def _commit(self, output: _OutputFile) -> FileResult:
        slot = self.free.get()
        digest = output.commit(slot.view)
        self.free.put(slot)
        return FileResult(output.task.target, digest, output.computed, output.reused)


def key_of(want: Want, digests: list[Digest]) -> str:
    """The action key of a tensor whose source digests are known."""
    inputs = [(f"source {i}", d) for i, d in enumerate(digests)]
    if want.imatrix is not None:
        inputs.append(("imatrix", digest_bytes(want.imatrix)))
    return action_key(walk(tensor.KIND, tensor.SALT, want.params, inputs))


def _weighed(want: Want, chunk: _Chunk) -> Iterator[tuple[slice, np.ndarray | None]]:
    """Rows of a chunk with the column weights that are theirs: each expert of a stacked tensor has its own."""
    if want.imatrix is None:
        yield slice(0, chunk.rows), None
        return
    weights = np.frombuffer(want.imatrix, np.float32).reshape(-1, want.params.cols)
    width = tensor.source_row_bytes(want.params)
    each = chunk.task.nbytes // width // len(weights)
    at = 0
    while at < chunk.rows:
        expert = (chunk.row + at) // each
        stop = min(chunk.rows, (expert + 1) * each - chunk.row)
        yield slice(at, stop), weights[expert]
        at = stop


def hint_of(name: str, nbytes: int, type_: str) -> str:
    """Says that a result for a tensor of this name, size and type exists: hashing before work may spare the work."""
    return f"{name}|{nbytes}|{type_}"
