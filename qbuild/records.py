"""Digests of parts of files that lie outside of the store, remembered by what tells that a file is unchanged."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterable

from qbuild.digest import Digest
from qbuild.index import Index

__all__ = ["SourceDigests", "Stamps", "delete_source"]

RACY_NS = 20_000_000  # a change within one clock tick of the kernel (10 ms at most) leaves the time stamps as they are
RACY_COARSE_NS = 2_000_000_000  # where the file system counts whole seconds

Stamps = tuple[str, int, int, int, int]  # path, size, mtime_ns, ctime_ns, inode


class SourceDigests:
    """``clock`` gives nanoseconds since the epoch."""

    def __init__(self, index: Index, clock: Callable[[], int]) -> None:
        self.index, self.clock = index, clock

    def put(self, source: Stamps, offset: int, digest: Digest) -> None:
        """Remember the digest of bytes at ``offset`` of a file that had this identity before it was read."""
        self.put_many(source, [(offset, digest)])

    def put_many(self, source: Stamps, found: Iterable[tuple[int, Digest]]) -> None:
        path, *stamps = source
        with self.index.writing() as db:
            query = "SELECT id, size, mtime_ns, ctime_ns, inode FROM sources WHERE path = ?"
            row = db.execute(query, (path,)).fetchone()
            if row is not None and list(row[1:]) != stamps:
                delete_source(db, path)
                row = None
            if row is None:
                query = "INSERT INTO sources (path, size, mtime_ns, ctime_ns, inode) VALUES (?, ?, ?, ?, ?)"
                row = (db.execute(query, (path, *stamps)).lastrowid,)
            rows = [(row[0], offset, str(digest), self.clock()) for offset, digest in found]
            db.executemany("INSERT OR REPLACE INTO source_digests VALUES (?, ?, ?, ?)", rows)

    def all(self, source: Stamps) -> dict[int, Digest] | None:
        """Digests by offset of a file with this identity, or None where nothing is known of it.

        A digest taken within a clock tick of the file's last change is left out: a second change in that tick would
        not show in the time stamps. ctime tells when that was: mtime may be set, to a time to come too.
        """
        return self._found(source, "", ()) or None

    def _found(self, source: Stamps, also: str, values: tuple[int, ...]) -> dict[int, Digest]:
        path, size, mtime_ns, ctime_ns, inode = source
        settled = ctime_ns + (RACY_NS if ctime_ns % 1_000_000_000 else RACY_COARSE_NS)
        query = (
            "SELECT d.offset, d.digest FROM sources s JOIN source_digests d ON d.source = s.id"
            " WHERE s.path = ? AND s.size = ? AND s.mtime_ns = ? AND s.ctime_ns = ? AND s.inode = ?"
            " AND d.recorded_ns > ?"
        )
        with self.index.reading() as db:
            rows = db.execute(query + also, (path, size, mtime_ns, ctime_ns, inode, settled, *values)).fetchall()
        return {offset: Digest.parse(text) for offset, text in rows}

    def get(self, source: Stamps, offset: int) -> Digest | None:
        """The digest of one range, if it is known: for asking again after waiting for another build."""
        known = self._found(source, " AND d.offset = ?", (offset,))
        return known.get(offset)

    def forget(self, path: str) -> None:
        with self.index.writing() as db:
            delete_source(db, path)


def delete_source(db: sqlite3.Connection, path: str) -> None:
    db.execute("DELETE FROM source_digests WHERE source IN (SELECT id FROM sources WHERE path = ?)", (path,))
    db.execute("DELETE FROM sources WHERE path = ?", (path,))
