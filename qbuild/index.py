"""The store's index: SQLite in WAL mode, short transactions, safe between threads and processes.

It holds no truth about bytes: whatever it points at is checked against a digest before it is used, so an index that
lost its last transactions in a power failure, or all of them, costs work and never a wrong result.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import sqlite3
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from qbuild.errors import StoreError
from qbuild.fsutil import FileLock, disk_error, may_write

__all__ = ["SCHEMA_VERSION", "Index"]

SCHEMA_VERSION = 3
BUSY_SECONDS = 60.0

# files: a blob, or a partial (a file that is still written, named by its plan), or for a moment both: `blob` is set
# before the rename and `partial` cleared after it, so wherever a crash falls the row finds the file.
# results.about: digests of what a result tells something of.
# mtime_ns, ctime_ns, inode: the stat when the bytes were last known to be right; NULL = to be hashed before use.
SCHEMA = """
CREATE TABLE files (
  id INTEGER PRIMARY KEY, partial TEXT UNIQUE, blob TEXT UNIQUE, size INTEGER NOT NULL,
  mtime_ns INTEGER, ctime_ns INTEGER, inode INTEGER, last_used INTEGER NOT NULL
);
CREATE TABLE slices (
  digest TEXT NOT NULL, file INTEGER NOT NULL, offset INTEGER NOT NULL, PRIMARY KEY (digest, file, offset)
) WITHOUT ROWID;
CREATE INDEX slices_by_file ON slices (file, offset);
CREATE TABLE sources (
  id INTEGER PRIMARY KEY, path TEXT UNIQUE NOT NULL, size INTEGER NOT NULL, mtime_ns INTEGER NOT NULL,
  ctime_ns INTEGER NOT NULL, inode INTEGER NOT NULL
);
CREATE TABLE source_digests (
  source INTEGER NOT NULL, offset INTEGER NOT NULL, digest TEXT NOT NULL, recorded_ns INTEGER NOT NULL,
  PRIMARY KEY (source, offset)
) WITHOUT ROWID;
CREATE TABLE results (
  key TEXT PRIMARY KEY, kind TEXT NOT NULL, outputs TEXT NOT NULL, inputs TEXT NOT NULL, about TEXT NOT NULL,
  created INTEGER NOT NULL
) WITHOUT ROWID;
CREATE TABLE hints (key TEXT PRIMARY KEY) WITHOUT ROWID;
CREATE TABLE rates (id INTEGER PRIMARY KEY, name TEXT NOT NULL, per_second REAL NOT NULL);
CREATE INDEX rates_by_name ON rates (name);
CREATE TABLE outputs (
  path TEXT PRIMARY KEY, digest TEXT NOT NULL, target TEXT NOT NULL, how TEXT NOT NULL, size INTEGER NOT NULL,
  mtime_ns INTEGER NOT NULL, ctime_ns INTEGER NOT NULL, inode INTEGER NOT NULL, created INTEGER NOT NULL
) WITHOUT ROWID;
"""

# By version, the statements that make an index one of the next version. SQLite before 3.35 drops no columns.
UPGRADES = {
    1: (
        "ALTER TABLE results RENAME TO before",
        """CREATE TABLE results (
          key TEXT PRIMARY KEY, kind TEXT NOT NULL, outputs TEXT NOT NULL, inputs TEXT NOT NULL, seconds REAL NOT NULL,
          peak_rss INTEGER NOT NULL, about TEXT NOT NULL, created INTEGER NOT NULL
        ) WITHOUT ROWID""",
        """INSERT INTO results
          SELECT key, kind, outputs, inputs, seconds, peak_rss, replace(meta, '{}', '[]'), created FROM before""",
        "DROP TABLE before",
        "DROP TABLE peaks",
    ),
    2: (
        "ALTER TABLE results RENAME TO before",
        """CREATE TABLE results (
          key TEXT PRIMARY KEY, kind TEXT NOT NULL, outputs TEXT NOT NULL, inputs TEXT NOT NULL, about TEXT NOT NULL,
          created INTEGER NOT NULL
        ) WITHOUT ROWID""",
        "INSERT INTO results SELECT key, kind, outputs, inputs, about, created FROM before",
        "DROP TABLE before",
    ),
}

_ABANDONED: list[sqlite3.Connection] = []
_READONLY = {sqlite3.SQLITE_READONLY, sqlite3.SQLITE_PERM, sqlite3.SQLITE_CANTOPEN}
_BUSY = {sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED}


class Index:
    """``reading()`` and ``writing()`` lend a connection. A thread inside ``writing()`` gets the same one again, so
    transactions nest into the outermost. Nothing exists on disk before the first write."""

    def __init__(self, root: Path) -> None:
        self.root, self.path = root, root / "index.sqlite"
        try:
            self.path.exists()
        except OSError as error:  # in a folder that we cannot enter
            raise disk_error(error, root) from None
        self.writable = may_write(root)
        self._ready = False
        self._pid = os.getpid()
        self._free: list[sqlite3.Connection] = []
        self._blank: list[sqlite3.Connection] = []  # stand in while there is no index
        self._write_lock = threading.RLock()
        self._local = threading.local()
        self._finalizer = weakref.finalize(self, _close_all, self._free, self._blank)

    def close(self) -> None:
        _close_all(self._free, self._blank)

    @contextmanager
    def reading(self) -> Iterator[sqlite3.Connection]:
        current: sqlite3.Connection | None = getattr(self._local, "connection", None)
        if current is not None:
            yield current
            return
        with self._errors():
            connection, pool = self._take()
            try:
                self._begin(connection, "BEGIN")
                yield connection
            finally:
                _end(connection)
                pool.append(connection)

    @contextmanager
    def writing(self) -> Iterator[sqlite3.Connection]:
        """One transaction: all of it, or (an exception, a kill) nothing."""
        current: sqlite3.Connection | None = getattr(self._local, "connection", None)
        if current is not None:
            yield current
            return
        with self._write_lock, self._errors():
            self.create()
            connection, _ = self._take()
            try:
                self._begin(connection, "BEGIN IMMEDIATE")
                self._local.connection = connection
                try:
                    yield connection
                except BaseException:
                    connection.execute("ROLLBACK")
                    raise
                connection.execute("COMMIT")
            finally:
                self._local.connection = None
                _end(connection)  # COMMIT failed: the disk is full
                self._free.append(connection)

    def _begin(self, connection: sqlite3.Connection, how: str) -> None:
        """Begin a transaction, unless a newer qbuild has upgraded the index since it was opened."""
        connection.execute(how)
        if (found := _version(connection)) > SCHEMA_VERSION:
            raise self._newer(found)

    def create(self) -> None:
        """Make the store's folders and an empty index where there is none."""
        if not self.writable:
            raise self.read_only()
        if self._ready:
            return
        try:
            for name in ("blobs", "partial", "locks"):
                (self.root / name).mkdir(parents=True, exist_ok=True)
            lock = FileLock(self.root / "locks" / "index.lock")
            lock.acquire()
            try:
                if not self.path.exists():
                    self._write_index()
            finally:
                lock.release()
        except OSError as error:
            raise disk_error(error, self.root) from None
        self._check()
        self._ready = True

    def read_only(self) -> StoreError:
        fact = "the store is read-only: nothing can be built into it"
        return StoreError(str(self.root), fact, "use a store you may write: store.dir=DIRECTORY")

    def _write_index(self) -> None:
        """Written beside and renamed: another process sees no index or a whole one.

        Blobs that are there already (the index was lost) are adopted; their bytes are hashed before their first use.
        """
        beside = self.path.with_name(f"index.{os.getpid()}.new")
        beside.unlink(missing_ok=True)
        with contextlib.closing(sqlite3.connect(beside, isolation_level=None)) as connection:
            connection.execute("PRAGMA journal_mode=WAL")
            connection.executescript(f"BEGIN; {SCHEMA} PRAGMA user_version={SCHEMA_VERSION}; COMMIT;")
            connection.execute("BEGIN")
            connection.executemany("INSERT INTO files (blob, size, last_used) VALUES (?, ?, ?)", self._found_blobs())
            connection.execute("COMMIT")
        beside.rename(self.path)

    def _found_blobs(self) -> Iterator[tuple[str, int, int]]:
        for path in sorted((self.root / "blobs").glob("??/*")):
            if len(path.name) == 64:
                found = path.stat()
                yield f"{path.name}/{found.st_size}", found.st_size, found.st_mtime_ns

    def _take(self) -> tuple[sqlite3.Connection, list[sqlite3.Connection]]:
        """A connection, and the pool it goes back to. An index that is not there yet reads as empty."""
        if self._pid != os.getpid():
            self._forked()
        with contextlib.suppress(IndexError):
            return self._free.pop(), self._free
        if not self.path.exists():
            if self.writable and _has_entries(self.root / "blobs"):
                self.create()
            else:
                return self._blank.pop() if self._blank else _empty(), self._blank
        if not self._ready:
            self._check()
            self._ready = True
        return self._open(), self._free

    def _forked(self) -> None:
        """SQLite's connections do not survive a fork: a child leaves its parent's alone, unclosed, and opens others."""
        _ABANDONED.extend(self._free)
        self._free[:], self._pid = [], os.getpid()

    def _open(self) -> sqlite3.Connection:
        if self.writable:
            connection = _connect(f"{self.path.absolute().as_uri()}?mode=rw")
            connection.execute("PRAGMA synchronous=NORMAL")
            return connection
        connection = _connect(f"{self.path.absolute().as_uri()}?mode=ro")
        try:
            connection.execute("SELECT 1 FROM sqlite_schema").fetchone()
        except sqlite3.OperationalError:  # WAL wants to make its -shm file; without writers none is needed
            connection.close()
            connection = _connect(f"{self.path.absolute().as_uri()}?immutable=1")
        return connection

    def _check(self) -> None:
        with self._errors(), contextlib.closing(self._open()) as connection:
            found = _version(connection)
            tables = connection.execute("SELECT count(*) FROM sqlite_schema WHERE type='table'").fetchone()[0]
            if found in UPGRADES and self.writable:
                found = _upgraded(connection)
        if found in UPGRADES:
            fact = f"written by an older qbuild (schema {found}), and read-only"
            raise StoreError(str(self.path), fact, "use it once where it can be written, or store.dir=DIRECTORY")
        if found > SCHEMA_VERSION:
            raise self._newer(found)
        if found != SCHEMA_VERSION or not tables:
            raise self._corrupt(f"not an index of qbuild (schema {found})")

    def _newer(self, found: int) -> StoreError:
        fact = f"written by a newer qbuild (schema {found}, this one knows {SCHEMA_VERSION})"
        return StoreError(str(self.path), fact, "upgrade qbuild, or use another store: store.dir=DIRECTORY")

    def _corrupt(self, fact: str) -> StoreError:
        remedy = f"remove it, finished files are found again:\n  rm {shlex.quote(str(self.path))}*"
        return StoreError(str(self.path), f"the index is damaged: {fact}", remedy)

    @contextmanager
    def _errors(self) -> Iterator[None]:
        """SQLite's errors as ours."""
        try:
            yield
        except sqlite3.Error as error:
            code = getattr(error, "sqlite_errorcode", 0) & 0xFF
            if code in _BUSY:
                fact = f"another process has held the index for {BUSY_SECONDS:.0f} seconds"
                raise StoreError(str(self.path), fact, "run again when it has ended") from error
            if code == sqlite3.SQLITE_FULL:
                raise disk_error(OSError(28, "disk full"), self.root) from error
            if code in _READONLY:
                raise self.read_only() from error
            if code in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB):
                raise self._corrupt(str(error)) from error
            if code == sqlite3.SQLITE_IOERR:
                remedy = "check the disk; SQLite needs a local one: store.dir=DIRECTORY"
                raise StoreError(str(self.path), f"the index cannot be read or written: {error}", remedy) from error
            raise


def _connect(target: str) -> sqlite3.Connection:
    return sqlite3.connect(target, timeout=BUSY_SECONDS, isolation_level=None, check_same_thread=False, uri=True)


def _version(connection: sqlite3.Connection) -> int:
    return int(connection.execute("PRAGMA user_version").fetchone()[0])


def _end(connection: sqlite3.Connection) -> None:
    """Leave a transaction that was not committed."""
    if connection.in_transaction:
        with contextlib.suppress(sqlite3.Error):
            connection.execute("ROLLBACK")


def _upgraded(connection: sqlite3.Connection) -> int:
    """The version of an older index that was brought to today's schema, by us or by another process."""
    connection.execute("BEGIN IMMEDIATE")
    while (found := _version(connection)) in UPGRADES:
        for statement in UPGRADES[found]:
            connection.execute(statement)
        connection.execute(f"PRAGMA user_version={found + 1}")
    connection.execute("COMMIT")
    return found


def _empty() -> sqlite3.Connection:
    connection = sqlite3.connect(":memory:", isolation_level=None, check_same_thread=False)
    connection.executescript(SCHEMA)
    return connection


def _close_all(*pools: list[sqlite3.Connection]) -> None:
    for pool in pools:
        while pool:
            pool.pop().close()


def _has_entries(folder: Path) -> bool:
    try:
        with os.scandir(folder) as entries:
            return next(entries, None) is not None
    except OSError:
        return False
