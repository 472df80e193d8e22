"""The content store: digest → bytes, in files that appear whole or not at all.

    blobs/ab/<hash>     finished files, read-only; a GGUF here is the output itself (reflink or hard link), and its
                        tensors are found by slice
    partial/<name>      files being written in place, resumed by the next build after a kill
    states/, backends/  folders of jobs while they run, or until they go on after a kill
    locks/              flock files, gone with their holders
    index.sqlite        where everything is: see qbuild/index.py

Bytes are reserved, written beside, hashed, synced and renamed. A blob whose time stamps moved is hashed before it is
used again; one that does not match is dropped, and what is still right in it is kept for the rebuild.
"""

from __future__ import annotations

import bisect
import contextlib
import io
import os
import re
import sqlite3
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from qbuild import links
from qbuild.digest import Digest, Hasher, digest_bytes
from qbuild.errors import StoreError
from qbuild.fsutil import FileLock, disk_error, fsync_dir, hash_range, read_exact, reserve, stat_of, write_all
from qbuild.index import Index
from qbuild.records import SourceDigests

__all__ = ["Identity", "Location", "OutputRow", "Partial", "Store", "delete_files", "identity", "reading"]

READ_ONLY = 0o444
SALVAGE = "salvage-"  # partials that were damaged blobs: their good slices still serve

_PARTIAL_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,127}")


class Identity(NamedTuple):
    """What tells that a file is unchanged without reading it."""

    path: str
    size: int
    mtime_ns: int
    ctime_ns: int
    inode: int


class Location(NamedTuple):
    """Where bytes lie. The file may be renamed while this is held; ``file`` finds it again."""

    path: Path
    offset: int
    length: int
    file: int


class OutputRow(NamedTuple):
    """An output this store placed: its stat as it was then."""

    path: Path
    digest: Digest
    target: str
    how: str
    identity: Identity


def identity(path: Path) -> Identity:
    found = path.stat()
    return Identity(str(path), found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino)


class Store:
    """One store, usable from any thread; every process opens its own. ``clock`` gives nanoseconds since the epoch."""

    def __init__(self, root: Path, link: str = "auto", clock: Callable[[], int] = time.time_ns) -> None:
        self.root, self.link, self.clock = Path(root).absolute(), link, clock
        links.check_mode(link)
        self.index = Index(self.root)
        self.sources = SourceDigests(self.index, self.clock)
        self._used: set[str] = set()

    def close(self) -> None:
        self.flush_used()
        self.index.close()

    @property
    def read_only(self) -> bool:
        return not self.index.writable

    # blobs -----------------------------------------------------------------------------------------------------------

    def blob_path(self, digest: Digest) -> Path:
        """Where the blob is or would be."""
        return self.root / "blobs" / digest.hash[:2] / digest.hash

    def has(self, digest: Digest) -> bool:
        return self.locate(digest) is not None

    def path(self, digest: Digest) -> Path | None:
        """The finished file of that content, or None. A wrong size or moved time stamps are looked into."""
        path = self.blob_path(digest)
        found = stat_of(path)
        if found is None:
            return None
        with self.index.reading() as db:
            row = db.execute("SELECT size, mtime_ns FROM files WHERE blob = ?", (str(digest),)).fetchone()
        stamps = (found.st_size, found.st_mtime_ns)
        if (found.st_size != digest.size or row != stamps) and not self._rehash(digest):
            return None
        self._used.add(str(digest))
        return path

    def check_blob(self, digest: Digest) -> bool:
        """Whether the blob is there and right: hashed, unless nothing touched it since it was known to be right."""
        found = stat_of(self.blob_path(digest))
        if found is None:
            return False
        with self.index.reading() as db:
            query = "SELECT size, mtime_ns, ctime_ns, inode FROM files WHERE blob = ?"
            row = db.execute(query, (str(digest),)).fetchone()
        stamps = (found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino)
        return row == stamps or self._rehash(digest)

    def put_bytes(self, data: bytes | bytearray | memoryview, expect: Digest | None = None) -> Digest:
        """Store bytes. ``expect`` is what the caller believes them to be: other bytes are refused."""
        digest = digest_bytes(data)
        if expect is not None and digest != expect:
            raise StoreError(str(self.root), f"refused bytes that are {digest}, announced as {expect}", "run again")
        if self.check_blob(digest):
            return digest
        self.index.create()
        beside = self.root / "partial" / f".tmp-{os.getpid()}-{os.urandom(6).hex()}"
        with self.in_use():
            try:
                fd = os.open(beside, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
                try:
                    write_all(fd, data, 0)
                    self._publish(fd, beside, digest, None)
                finally:
                    os.close(fd)
            except OSError as error:
                raise disk_error(error, self.root, digest.size) from None
            finally:
                beside.unlink(missing_ok=True)
        return digest

    def read_bytes(self, digest: Digest) -> bytes | None:
        """The bytes, verified, wherever they lie. None where they are missing, or damaged (and then forgotten)."""
        data = io.BytesIO()  # what it gives is its own buffer: a bytearray would be copied whole

        def keep(start: int, part: memoryview) -> None:
            data.seek(start)
            data.write(part)

        return data.getvalue() if self.copy_slice(digest, keep) else None

    def _publish(self, fd: int, beside: Path, digest: Digest, partial: int | None) -> Path:
        """Make a complete file the blob: sync, tell the index, rename, sync the folder. A crash at any point leaves
        the old name or the new one, and a row that finds either."""
        os.fchmod(fd, READ_ONLY)
        os.fsync(fd)
        path = self.blob_path(digest)
        path.parent.mkdir(exist_ok=True)
        found = os.fstat(fd)
        with self._blob_lock(digest):
            with self.index.writing() as db:
                self._intend(db, digest, partial, found)
            beside.rename(path)
            fsync_dir(path.parent)
            found = os.fstat(fd)
            with self.index.writing() as db:
                self._stamp(db, digest, found)
                db.execute("UPDATE files SET partial = NULL WHERE blob = ?", (str(digest),))
        self._drop_salvage(digest)
        return path

    def _intend(self, db: sqlite3.Connection, digest: Digest, partial: int | None, found: os.stat_result) -> None:
        old = db.execute("SELECT id FROM files WHERE blob = ? AND id IS NOT ?", (str(digest), partial)).fetchone()
        if partial is None:
            if old is None:
                row = (str(digest), found.st_size, self.clock())
                db.execute("INSERT INTO files (blob, size, last_used) VALUES (?, ?, ?)", row)
            return
        if old is not None:  # made a second time: the slices of the first are the same bytes
            db.execute("UPDATE OR IGNORE slices SET file = ? WHERE file = ?", (partial, old[0]))
            delete_files(db, [old[0]])
        db.execute("UPDATE files SET blob = ?, last_used = ? WHERE id = ?", (str(digest), self.clock(), partial))

    def _stamp(self, db: sqlite3.Connection, digest: Digest, found: os.stat_result) -> None:
        """Record the stat of bytes that are known to be right."""
        stamps = (found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino)
        query = "UPDATE files SET size = ?, mtime_ns = ?, ctime_ns = ?, inode = ? WHERE blob = ?"
        if db.execute(query, (*stamps, str(digest))).rowcount == 0:
            query = "INSERT INTO files (size, mtime_ns, ctime_ns, inode, blob, last_used) VALUES (?, ?, ?, ?, ?, ?)"
            db.execute(query, (*stamps, str(digest), self.clock()))

    def _rehash(self, digest: Digest) -> bool:
        """Hash a blob. Right: its stamps are taken again. Wrong: it is dropped."""
        with reading(self.blob_path(digest)) as fd:
            if fd is None:
                return False
            before, hasher = os.fstat(fd), Hasher()
            hash_range(fd, 0, before.st_size, hasher.update)
            if hasher.digest() != digest:
                self.drop_damaged(digest, before.st_ino)
                return False
            if not self.read_only:
                with self.index.writing() as db:
                    self._stamp(db, digest, before)
            return True

    def drop_damaged(self, digest: Digest, inode: int) -> None:
        """A blob whose bytes are wrong stops being one. Slices that are still right stay usable from a partial."""
        if self.read_only:
            return
        path, salvage = self.blob_path(digest), SALVAGE + digest.hash
        with self._blob_lock(digest):
            found = stat_of(path)
            if found is None or found.st_ino != inode:
                return  # made again meanwhile
            with self.index.writing() as db:
                row = db.execute("SELECT id FROM files WHERE blob = ?", (str(digest),)).fetchone()
                slices = row and db.execute("SELECT 1 FROM slices WHERE file = ? LIMIT 1", row).fetchone()
                if row and slices:
                    old = db.execute("SELECT id FROM files WHERE partial = ?", (salvage,)).fetchall()
                    delete_files(db, [i for (i,) in old])
                    db.execute("UPDATE files SET partial = ?, blob = NULL WHERE id = ?", (salvage, row[0]))
                elif row:
                    delete_files(db, [row[0]])
            if row and slices:
                path.rename(self.root / "partial" / salvage)
            else:
                path.unlink()
        if row and slices:
            self.check_slices(row[0])

    def check_slices(self, file: int) -> list[tuple[Digest, int]]:
        """Hash every slice of a file and forget the wrong ones; they are returned with their offsets."""
        with self.index.reading() as db:
            rows = db.execute("SELECT digest, offset FROM slices WHERE file = ? ORDER BY offset", (file,)).fetchall()
            path = self.file_path(*db.execute("SELECT partial, blob FROM files WHERE id = ?", (file,)).fetchone())
        bad = []
        for text, offset in rows:
            digest = Digest.parse(text)
            if not _slice_is(path, offset, digest):
                bad.append((digest, offset))
        if bad and not self.read_only:
            with self.index.writing() as db:
                query = "DELETE FROM slices WHERE digest = ? AND file = ? AND offset = ?"
                db.executemany(query, [(str(d), file, o) for d, o in bad])
        return bad

    def _drop_salvage(self, digest: Digest) -> None:
        path = self.root / "partial" / (SALVAGE + digest.hash)
        with self.index.writing() as db:
            rows = db.execute("SELECT id FROM files WHERE partial = ?", (path.name,)).fetchall()
            delete_files(db, [i for (i,) in rows])
        path.unlink(missing_ok=True)

    # slices ----------------------------------------------------------------------------------------------------------

    def locate(self, digest: Digest, at: tuple[Path, int] | None = None) -> Location | None:
        """Where those bytes lie: ``at`` (file, offset) if they are there already, else a blob, a slice of a blob, or a
        slice of a file that is being written or was left by a killed build. Verify what is read."""
        if at is None and self.blob_path(digest).exists():
            path = self.path(digest)
            return Location(path, 0, digest.size, 0) if path else self._locate_slice(digest, at)
        return self._locate_slice(digest, at)

    def _locate_slice(self, digest: Digest, at: tuple[Path, int] | None) -> Location | None:
        places = self._slices(digest)
        if at is not None:
            places.sort(key=lambda p: (p.path, p.offset) != at)
        for place in places:
            found = stat_of(place.path)
            if found is None:
                place = place._replace(path=self._renamed(place))
                found = stat_of(place.path)
            if found is not None and found.st_size >= place.offset + place.length:
                return place
            self.forget_vanished(place.file)
        if at is None or not self.blob_path(digest).exists():
            return None
        path = self.path(digest)
        return Location(path, 0, digest.size, 0) if path else None

    def _slices(self, digest: Digest) -> list[Location]:
        query = (
            "SELECT f.id, f.partial, f.blob, s.offset FROM slices s JOIN files f ON f.id = s.file"
            " WHERE s.digest = ? ORDER BY f.blob IS NULL, f.id, s.offset"
        )
        with self.index.reading() as db:
            rows = db.execute(query, (str(digest),)).fetchall()
        self._used.update(blob for _, _, blob, _ in rows[:1] if blob)
        return [Location(self.file_path(p, b), offset, digest.size, i) for i, p, b, offset in rows]

    def _renamed(self, place: Location) -> Path:
        """Where the file of a place lies now: another process may have committed it since it was located."""
        with self.index.reading() as db:
            row = db.execute("SELECT partial, blob FROM files WHERE id = ?", (place.file,)).fetchone()
        return place.path if row is None else self.file_path(*row)

    def file_path(self, partial: str | None, blob: str | None) -> Path:
        """While a file changes its name both are set: it is the blob once the partial is gone."""
        if partial is not None:
            path = self.root / "partial" / partial
            if blob is None or path.exists():
                return path
        if blob is None:
            raise ValueError("BUG: a file without a name")
        return self.blob_path(Digest.parse(blob))

    def forget_vanished(self, file: int) -> None:
        """Drop the rows of a file that is gone, unless it only changed its name."""
        if self.read_only or file == 0:
            return
        with self.index.writing() as db:
            row = db.execute("SELECT partial, blob FROM files WHERE id = ?", (file,)).fetchone()
            if row is not None and not self.file_path(*row).exists():
                delete_files(db, [file])

    def read_slice(self, place: Location, start: int, into: memoryview) -> bool:
        """Fill ``into`` from ``start`` of a located slice. False where it is gone: then it is no longer located."""
        fd = self._open(place)
        if fd is None:
            return False
        try:
            return read_exact(fd, into, place.offset + start)
        except OSError as error:
            raise _unreadable(error, place.path) from None
        finally:
            os.close(fd)

    def _open(self, place: Location) -> int | None:
        with contextlib.suppress(FileNotFoundError):
            return os.open(place.path, os.O_RDONLY | os.O_CLOEXEC)
        with contextlib.suppress(FileNotFoundError):
            return os.open(self._renamed(place), os.O_RDONLY | os.O_CLOEXEC)
        self.forget_vanished(place.file)
        return None

    def copy_slice(self, digest: Digest, sink: Callable[[int, memoryview], None]) -> bool:
        """Stream bytes to ``sink(start, part)`` in constant memory, verified. False where no place holds them: then
        what ``sink`` got is worth nothing. A place that turns out wrong is forgotten and the next one is tried."""
        while (place := self.locate(digest)) is not None:
            fd = self._open(place)
            if fd is None:
                continue
            hasher = Hasher()

            def feed(part: memoryview, hasher: Hasher = hasher) -> None:
                sink(hasher.size, part)
                hasher.update(part)

            try:
                hash_range(fd, place.offset, place.length, feed)
            except OSError as error:
                raise _unreadable(error, place.path) from None
            finally:
                os.close(fd)
            if hasher.digest() == digest:
                return True
            if self.read_only:
                return False
            self.forget(place, digest)
        return False

    def forget(self, place: Location, digest: Digest) -> None:
        """Bytes at ``place`` turned out not to be ``digest``: they are not served again."""
        if self.read_only:
            return
        if place.file == 0:
            found = stat_of(place.path)
            if found is not None:
                self.drop_damaged(digest, found.st_ino)
            return
        with self.index.writing() as db:
            row = (str(digest), place.file, place.offset)
            db.execute("DELETE FROM slices WHERE digest = ? AND file = ? AND offset = ?", row)
            # A blob with a wrong slice is wrong as a whole: it is hashed before it is used as one.
            db.execute("UPDATE files SET mtime_ns = NULL WHERE id = ? AND blob IS NOT NULL", (place.file,))

    # files written in place ------------------------------------------------------------------------------------------

    def partial(self, name: str, size: int, on_wait: Callable[[], None] | None = None) -> Partial:
        """Take the file called ``name`` (an id of the wanted output, stable between runs), with its blocks reserved.

        Only one process holds it; another waits. Use it as a context manager: what is not committed stays for resuming.
        """
        if not _PARTIAL_NAME.fullmatch(name) or name.startswith(SALVAGE):
            raise ValueError(f"BUG: {name!r} cannot name a partial file")
        self.index.create()
        return Partial(self, name, size, on_wait)

    @contextmanager
    def partials(
        self, wanted: Iterable[tuple[str, int]], on_wait: Callable[[], None] | None = None
    ) -> Iterator[list[Partial]]:
        """Several files at once, in the order given. They are locked in one order, so two builds cannot deadlock."""
        wanted = list(wanted)
        with contextlib.ExitStack() as stack:
            taken = {n: stack.enter_context(self.partial(n, size, on_wait)) for n, size in sorted(set(wanted))}
            yield [taken[name] for name, _ in wanted]

    # outputs ---------------------------------------------------------------------------------------------------------

    def link_out(self, digest: Digest, dest: Path, mode: str | None = None, target: str = "") -> str:
        """Put a blob at ``dest``, atomically: a reflink where the file system can, else a hard link (read-only: it is
        the store's own file), else a copy. ``mode`` is one of these to allow nothing else. Returns what it became."""
        mode = links.check_mode(mode or self.link)
        dest = Path(dest).absolute()
        if self.output_current(dest, digest, mode):
            return self.output(dest).how  # type: ignore[union-attr]
        with self.in_use():
            if not self.check_blob(digest):
                fact = "its bytes are missing from the store, or damaged"
                raise StoreError(str(dest), fact, "run again: they are made again")
            how = links.place(self.blob_path(digest), dest, mode, digest)
            self._record_output(digest, dest, how, target)
        return how

    def _record_output(self, digest: Digest, dest: Path, how: str, target: str) -> None:
        if self.read_only:
            return
        with self.index.writing() as db:
            row = (*identity(dest), str(digest), target, how, self.clock())
            query = (
                "INSERT OR REPLACE INTO outputs (path, size, mtime_ns, ctime_ns, inode, digest, target, how, created)"
                " VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)"
            )
            db.execute(query, row)
            blob = stat_of(self.blob_path(digest))
            if blob is not None:  # a hard link moved its ctime
                self._stamp(db, digest, blob)
        self._used.add(str(digest))

    def output_current(self, dest: Path, digest: Digest, mode: str = "auto") -> bool:
        """Whether ``dest`` is that output as this store placed it, by its stat; ``verify`` looks at the bytes."""
        row = self.output(Path(dest).absolute())
        if row is None or row.digest != digest or mode not in ("auto", row.how):
            return False
        found = stat_of(row.path)
        if found is None:
            return False
        if row.how == "hardlink":  # ctime moves whenever another link is made
            blob = stat_of(self.blob_path(digest))
            same = blob is not None and (blob.st_dev, blob.st_ino) == (found.st_dev, found.st_ino)
            return same and (found.st_size, found.st_mtime_ns) == (row.identity.size, row.identity.mtime_ns)
        return row.identity == identity(row.path)

    def output(self, dest: Path) -> OutputRow | None:
        with self.index.reading() as db:
            row = db.execute(_OUTPUT, (str(dest),)).fetchone()
        return _output_row(row) if row else None

    def outputs(self) -> list[OutputRow]:
        """Every output this store placed and has not found missing."""
        with self.index.reading() as db:
            return [_output_row(row) for row in db.execute(_OUTPUTS)]

    # locks and use ---------------------------------------------------------------------------------------------------

    @contextmanager
    def lock(self, name: str, on_wait: Callable[[], None] | None = None) -> Iterator[bool]:
        """Hold the lock called ``name`` against every other thread and process. It dies with its holder. Yields
        whether another held it first."""
        held = self._lock_file(name)
        waited = not held.try_acquire()
        if waited:
            held.acquire(on_wait)
        try:
            yield waited
        finally:
            held.release()

    def try_lock(self, name: str) -> FileLock | None:
        """The lock, held (call its ``release``), or None where another has it."""
        held = self._lock_file(name)
        return held if held.try_acquire() else None

    def _lock_file(self, name: str) -> FileLock:
        self.index.create()
        return FileLock(self.root / "locks" / f"{digest_bytes(name.encode()).hash[:40]}.lock")

    def _blob_lock(self, digest: Digest) -> contextlib.AbstractContextManager[bool]:
        return self.lock(f"blob {digest}")

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """While held (by any number of builds), ``gc`` of another process does not start."""
        if self.read_only:
            yield
            return
        self.index.create()
        held = FileLock(self.root / "locks" / "in-use", shared=True)
        held.acquire()
        try:
            yield
        finally:
            held.release()
            self.flush_used()

    def batch(self) -> contextlib.AbstractContextManager[sqlite3.Connection]:
        """Group many small writes of this thread into one transaction. Keep it short: other writers wait."""
        return self.index.writing()

    def flush_used(self) -> None:
        """Write down what was used, for the order in which ``gc`` drops things."""
        if self._used and not self.read_only:
            used, self._used = self._used, set()
            with contextlib.suppress(StoreError), self.index.writing() as db:  # a build does not fail for this
                now = self.clock()
                db.executemany("UPDATE files SET last_used = ? WHERE blob = ?", [(now, text) for text in sorted(used)])


class Partial:
    """A file of known size being written in place, from any thread. ``finished`` journals what stands in it."""

    def __init__(self, store: Store, name: str, size: int, on_wait: Callable[[], None] | None) -> None:
        self.store, self.name, self.size = store, name, size
        self.path = store.root / "partial" / name
        self.fd = -1
        self._lock = store._lock_file(f"partial {name}")
        self._use = contextlib.ExitStack()
        self._use.enter_context(store.in_use())
        self._lock.acquire(on_wait)
        try:
            self._file, self._spans = self._take()
        except OSError as error:
            self.close()
            raise disk_error(error, store.root, size) from None
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Partial:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _take(self) -> tuple[int, list[tuple[int, int, str]]]:
        """The row and the file; what an earlier run journalled, as (offset, end, digest), unless the size differs."""
        found = stat_of(self.path)
        with self.store.index.writing() as db:
            row = db.execute("SELECT id, size, blob FROM files WHERE partial = ?", (self.name,)).fetchone()
            if row is not None and found is None and row[2] and self.store.blob_path(Digest.parse(row[2])).exists():
                # a kill after the rename: that file is done
                db.execute("UPDATE files SET partial = NULL WHERE id = ?", (row[0],))
                row = None
            if row is not None and (found is None or found.st_size != self.size or row[1] != self.size):
                delete_files(db, [row[0]])
                row = None
            if row is None:
                query = "INSERT INTO files (partial, size, last_used) VALUES (?, ?, ?)"
                row = (db.execute(query, (self.name, self.size, self.store.clock())).lastrowid,)
            else:  # a rename that was announced did not happen
                db.execute("UPDATE files SET blob = NULL WHERE id = ?", (row[0],))
            journal = db.execute(
                "SELECT offset, digest FROM slices WHERE file = ? ORDER BY offset", (row[0],)
            ).fetchall()
        self.fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        os.fchmod(self.fd, 0o600)
        try:
            reserve(self.fd, self.size)
        except OSError:
            if not journal:  # what an earlier run finished is worth its blocks
                self.path.unlink()
            raise
        return row[0], [(offset, offset + Digest.parse(text).size, text) for offset, text in journal]

    def journal(self) -> list[tuple[Digest, int]]:
        """What stands finished, by offset. Rows of an earlier run are to be verified: a power failure may have lost
        bytes that the rows remember."""
        query = "SELECT digest, offset FROM slices WHERE file = ? ORDER BY offset"
        with self.store.index.reading() as db:
            return [(Digest.parse(text), offset) for text, offset in db.execute(query, (self._file,))]

    def write_at(self, offset: int, data: bytes | bytearray | memoryview) -> None:
        nbytes = memoryview(data).nbytes
        if offset < 0 or offset + nbytes > self.size:
            raise ValueError(f"BUG: {nbytes} bytes at {offset} of {self.name}, which has {self.size}")
        if self._spans:
            self._overwrite(offset, offset + nbytes)
        try:
            write_all(self.fd, data, offset)
        except OSError as error:
            raise disk_error(error, self.path, nbytes) from None

    def _overwrite(self, start: int, end: int) -> None:
        """Rows of an earlier run stop pointing at bytes that are about to change."""
        first = max(0, bisect.bisect_left(self._spans, (start,)) - 1)
        gone = []
        for span in self._spans[first:]:
            if span[0] >= end:
                break
            if span[1] > start:
                gone.append(span)
        if gone:
            with self.store.index.writing() as db:
                query = "DELETE FROM slices WHERE digest = ? AND file = ? AND offset = ?"
                db.executemany(query, [(text, self._file, offset) for offset, _, text in gone])
            self._spans = [span for span in self._spans if span not in gone]

    def read_at(self, offset: int, into: memoryview) -> None:
        try:
            whole = read_exact(self.fd, into, offset)
        except OSError as error:
            raise _unreadable(error, self.path) from None
        if not whole:
            raise StoreError(str(self.path), "shorter than it was reserved", "run again: it is made anew")

    def finished(self, digest: Digest, offset: int) -> None:
        """The bytes at ``offset`` are written and are ``digest``: from now on they can be found there."""
        self.finished_many([(digest, offset)])

    def finished_many(self, found: Iterable[tuple[Digest, int]]) -> None:
        rows = [(str(digest), self._file, offset) for digest, offset in found]
        with self.store.index.writing() as db:
            db.executemany("INSERT OR IGNORE INTO slices VALUES (?, ?, ?)", rows)

    def commit(self, digest: Digest) -> Path:
        """The file is complete and is ``digest``: it becomes a blob, synced and read-only."""
        if digest.size != self.size:
            fact = f"refused as {digest}: it has {self.size} bytes"
            raise StoreError(str(self.path), fact, "run again: it is made anew")
        try:
            self.path = self.store._publish(self.fd, self.path, digest, self._file)
        except OSError as error:
            raise disk_error(error, self.store.root) from None
        self.close()
        return self.path

    def discard(self) -> None:
        """Drop the file and what was journalled of it."""
        with self.store.index.writing() as db:
            delete_files(db, [self._file])
        self.path.unlink(missing_ok=True)
        self.close()

    def close(self) -> None:
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)
        self._lock.release()
        self._use.close()


_OUTPUT = "SELECT path, digest, target, how, size, mtime_ns, ctime_ns, inode FROM outputs WHERE path = ?"
_OUTPUTS = "SELECT path, digest, target, how, size, mtime_ns, ctime_ns, inode FROM outputs ORDER BY path"


def _output_row(row: tuple[Any, ...]) -> OutputRow:
    path, digest, target, how, *stamps = row
    return OutputRow(Path(path), Digest.parse(digest), target, how, Identity(path, *stamps))


def delete_files(db: sqlite3.Connection, ids: list[int]) -> None:
    db.executemany("DELETE FROM slices WHERE file = ?", [(i,) for i in ids])
    db.executemany("DELETE FROM files WHERE id = ?", [(i,) for i in ids])


@contextmanager
def reading(path: Path) -> Iterator[int | None]:
    """A file open for reading, None where it is gone. What its disk does not give is a StoreError."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        yield None
        return
    except OSError as error:
        raise _unreadable(error, path) from None
    try:
        yield fd
    except OSError as error:
        raise _unreadable(error, path) from None
    finally:
        os.close(fd)


def _unreadable(error: OSError, path: Path) -> StoreError:
    return StoreError(str(path), f"cannot be read: {error.strerror}", "check the disk, then qbuild verify")


def _slice_is(path: Path, offset: int, digest: Digest) -> bool:
    with reading(path) as fd:
        hasher = Hasher()
        whole = fd is not None and hash_range(fd, offset, digest.size, hasher.update)
    return whole and hasher.digest() == digest
