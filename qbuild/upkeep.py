"""What keeps a store in order: ``verify`` hashes it again, ``gc`` frees what no output needs, ``stats`` counts."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sqlite3
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from qbuild.digest import Digest, Hasher
from qbuild.errors import StoreError
from qbuild.fsutil import FileLock, hash_range, stat_of
from qbuild.records import delete_source
from qbuild.store import Store, delete_files, reading

__all__ = ["GcItem", "GcReport", "Problem", "Stats", "gc", "stats", "verify"]

# folders of jobs: hidden states between layers, what another library writes, small files that a library opens
SCRATCH = ("states", "backends", "copies")
MEMORY_NS = 365 * 24 * 3600 * 10**9  # how long a result is known after its outputs are gone


@dataclass(frozen=True)
class Problem:
    """``kind``: ``damaged`` or ``missing``. ``where``: ``blob``, ``slice`` (of an unfinished file) or ``output``."""

    kind: str
    where: str
    path: Path
    digest: Digest
    fact: str

    def __str__(self) -> str:
        return f"{self.path}: {self.where} is {self.kind}: {self.fact}"


@dataclass(frozen=True)
class GcItem:
    """A file that goes. ``frees`` is 0 where an output is the same file (a hard link) and stays."""

    path: Path
    size: int
    frees: int
    last_used: int
    why: str


@dataclass(frozen=True)
class GcReport:
    items: tuple[GcItem, ...]
    kept: int  # bytes that stay in the store
    dry_run: bool

    @property
    def freed(self) -> int:
        return sum(item.frees for item in self.items)


@dataclass(frozen=True)
class Stats:
    blobs: int
    blob_bytes: int
    partials: int
    partial_bytes: int
    slices: int
    results: int
    outputs: int


def _choose(droppable: Iterable[GcItem], kept: int, limit: int | None) -> tuple[list[GcItem], int]:
    """What to drop, the least recently used first, and the bytes that stay. No limit: all that may go."""
    items = sorted(droppable, key=lambda item: (item.last_used, str(item.path)))
    total, chosen = kept + sum(item.size for item in items), []
    for item in items:
        if limit is not None and total <= limit:
            break
        chosen.append(item)
        total -= item.size
    return chosen, total


def stats(store: Store) -> Stats:
    with store.index.reading() as db:
        slices, results, outputs = db.execute(
            "SELECT (SELECT count(*) FROM slices), (SELECT count(*) FROM results), (SELECT count(*) FROM outputs)"
        ).fetchone()
    blobs = [found.st_size for _, found in _walk(store, "blobs/??/*")]
    partials = [found.st_size for _, found in _walk(store, "partial/*")]
    return Stats(len(blobs), sum(blobs), len(partials), sum(partials), slices, results, outputs)


def _walk(store: Store, pattern: str) -> list[tuple[Path, os.stat_result]]:
    found = ((path, stat_of(path)) for path in sorted(store.root.glob(pattern)))
    return [(path, stat) for path, stat in found if stat is not None]


def verify(store: Store, heal: bool = True, on_file: Callable[[Path, int], None] | None = None) -> Iterator[Problem]:
    """Hash everything: blobs, slices of unfinished files, outputs. Time stamps are not believed.

    With ``heal`` what is damaged is dropped from the store, so that the next build makes it again.
    ``on_file(path, size)`` is called before a file is read.
    """
    tell = on_file or (lambda _path, _size: None)
    heal = heal and not store.read_only
    right: dict[tuple[int, int], Digest] = {}  # files by inode, so that a hard-linked output is read once
    with store.in_use():
        yield from _verify_blobs(store, heal, tell, right)
        yield from _verify_partials(store, tell)
        yield from _verify_outputs(store, heal, tell, right)


def _verify_blobs(
    store: Store, heal: bool, tell: Callable[[Path, int], None], right: dict[tuple[int, int], Digest]
) -> Iterator[Problem]:
    with store.index.reading() as db:
        rows = db.execute("SELECT id, partial, blob FROM files WHERE blob IS NOT NULL ORDER BY blob").fetchall()
    for file, partial, blob in rows:
        path = store.file_path(partial, blob)
        if not path.exists():
            if heal:
                store.forget_vanished(file)
            yield Problem("missing", "blob", path, Digest.parse(blob), "the file is gone")
    sizes = {digest.hash: digest for digest in (Digest.parse(blob) for _, _, blob in rows)}
    for path, found in _walk(store, "blobs/??/*"):
        digest = sizes.get(path.name, Digest(path.name, found.st_size))
        tell(path, found.st_size)
        actual = _digest_of(path)
        if actual == digest:
            right[(found.st_dev, found.st_ino)] = digest
        elif actual is not None:
            if heal:
                store.drop_damaged(digest, found.st_ino)
            yield Problem("damaged", "blob", path, digest, _difference(digest, actual))


def _verify_partials(store: Store, tell: Callable[[Path, int], None]) -> Iterator[Problem]:
    with store.index.reading() as db:
        query = "SELECT id, partial FROM files WHERE partial IS NOT NULL AND blob IS NULL ORDER BY partial"
        rows = db.execute(query).fetchall()
    for file, name in rows:
        path = store.root / "partial" / name
        found = stat_of(path)
        held = None if store.read_only or found is None else store.try_lock(f"partial {name}")
        if found is None or held is None:  # gone, or being written
            continue
        try:
            tell(path, found.st_size)
            bad = store.check_slices(file)
        finally:
            held.release()
        for digest, offset in bad:
            yield Problem("damaged", "slice", path, digest, f"{digest.size} bytes at {offset} are not what was written")


def _verify_outputs(
    store: Store, heal: bool, tell: Callable[[Path, int], None], right: dict[tuple[int, int], Digest]
) -> Iterator[Problem]:
    for row in store.outputs():
        found = stat_of(row.path)
        if found is None:
            problem = Problem("missing", "output", row.path, row.digest, "the file is gone")
        elif right.get((found.st_dev, found.st_ino)) == row.digest:
            continue
        else:
            tell(row.path, found.st_size)
            actual = _digest_of(row.path)
            if actual == row.digest:
                continue
            fact = _difference(row.digest, actual) if actual else "the file is gone"
            problem = Problem("damaged" if actual else "missing", "output", row.path, row.digest, fact)
        if heal:
            _forget_output(store, row.path)
        yield problem


def _forget_output(store: Store, path: Path) -> None:
    with store.index.writing() as db:
        db.execute("DELETE FROM outputs WHERE path = ?", (str(path),))
    with contextlib.suppress(OSError):  # whoever remembers its time stamps as good finds others
        os.utime(path)


def gc(
    store: Store, roots: Iterable[Digest] = (), limit: int | None = None, dry_run: bool = False, timeout: float = 10.0
) -> GcReport:
    """Drop what no output needs; with ``limit`` (bytes) only the least recently used, until the store is below it.

    Needed is: ``roots``, every output that still exists, and what went into them. It waits ``timeout`` seconds for
    builds that use the store; files another process writes are left alone. ``dry_run`` only says what would go.
    """
    if dry_run:
        items, kept, _ = _plan_gc(store, roots, limit)
        return GcReport(items, kept, dry_run)
    store.index.create()
    held = FileLock(store.root / "locks" / "in-use", keep=True)
    if not held.acquire(timeout=timeout):
        remedy = "run again when it has ended (qbuild gc -n only shows what would go)"
        raise StoreError(str(store.root), "a build is using the store", remedy)
    try:
        store.flush_used()
        items, kept, temporary = _plan_gc(store, roots, limit)
        _sweep(store, {item.path for item in items}, temporary)
        return GcReport(items, kept, dry_run)
    finally:
        held.release()


def _plan_gc(store: Store, roots: Iterable[Digest], limit: int | None) -> tuple[tuple[GcItem, ...], int, list[Path]]:
    """What goes, the bytes that stay, and temporary files of killed processes."""
    needed = _needed(store, {str(digest) for digest in roots})
    with store.index.reading() as db:
        rows = db.execute("SELECT id, partial, blob, last_used FROM files ORDER BY blob IS NULL, last_used DESC")
        files = {store.file_path(p, b): (i, b, used) for i, p, b, used in rows.fetchall()}
        slices = db.execute("SELECT file, digest FROM slices").fetchall()
        results = db.execute("SELECT kind, outputs FROM results").fetchall()
    kinds = {output: kind for kind, outputs in results for output in json.loads(outputs)}
    keep = _files_to_keep(files, slices, needed)
    kept, droppable, temporary = 0, [], []
    for path, found in _walk(store, "blobs/??/*") + _walk(store, "partial/*"):
        _, _, used = files.get(path, (0, None, found.st_mtime_ns))
        partial = path.parent.name == "partial"
        if partial and path.name.startswith(".tmp-"):
            temporary.append(path)
        elif path in keep or (not partial and f"{path.name}/{found.st_size}" in needed) or _written(store, path):
            kept += found.st_size
        else:
            kind = kinds.get(f"{path.name}/{found.st_size}", "nothing known")
            why = "an unfinished file" if partial else f"{kind}, no output needs it"
            frees = found.st_blocks * 512 if found.st_nlink == 1 else 0
            droppable.append(GcItem(path, found.st_size, frees, used, why))
    chosen, kept = _choose([*droppable, *_scratch(store)], kept, limit)
    return tuple(chosen), kept, temporary


def _scratch(store: Store) -> Iterator[GcItem]:
    """Folders of jobs that were killed: hidden states, runs of other libraries. No row tells of them."""
    for folder in (path for name in SCRATCH for path in sorted((store.root / name).glob("*"))):
        with contextlib.suppress(FileNotFoundError):  # a job that ends while gc -n looks
            inside = [path.lstat() for path in folder.rglob("*")]
            size, blocks = sum(found.st_size for found in inside), sum(found.st_blocks for found in inside)
            yield GcItem(folder, size, 512 * blocks, folder.stat().st_mtime_ns, "of a job that did not end")


def _written(store: Store, path: Path) -> bool:
    """Whether a living process holds that partial."""
    if path.parent.name != "partial" or store.read_only:
        return False
    held = store.try_lock(f"partial {path.name}")
    if held is not None:
        held.release()
    return held is None


def _needed(store: Store, roots: set[str]) -> set[str]:
    """Roots, outputs that exist, the stored inputs of whatever made them, what else that made (of a directory the
    list of its files), and what is told of them, such as an evaluation."""
    needed = set(roots)
    needed.update(str(row.digest) for row in store.outputs() if row.path.exists())
    with store.index.reading() as db:
        rows = db.execute(
            "SELECT outputs, inputs, about FROM results WHERE inputs != '[]' OR outputs LIKE '%,%' OR about != '[]'"
        ).fetchall()
    with_it: dict[str, set[str]] = {}
    for outputs, inputs, about in (map(json.loads, row) for row in rows):
        for output in outputs:
            with_it.setdefault(output, set()).update(inputs, outputs)
        for digest in about:
            with_it.setdefault(digest, set()).update(outputs)
    todo = list(needed)
    while todo:
        new = with_it.get(todo.pop(), set()) - needed
        needed |= new
        todo.extend(new)
    return needed


def _sweep(store: Store, gone: set[Path], temporary: list[Path]) -> None:
    """Rows first: a kill in between leaves files without rows, which the next ``gc`` finds on the disk."""
    with store.index.writing() as db:
        rows = db.execute("SELECT id, partial, blob FROM files").fetchall()
        dead = [i for i, p, b in rows if (path := store.file_path(p, b)) in gone or not path.exists()]
        delete_files(db, dead)
        _delete_dead_rows(db, store.clock() - MEMORY_NS)
    for path in [*gone, *temporary]:
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    for path in (store.root / "locks").glob("*.lock"):  # of holders that were killed
        lock = FileLock(path)
        if lock.try_acquire():
            lock.release()


def _delete_dead_rows(db: sqlite3.Connection, before: int) -> None:
    """Results whose outputs are gone, if they were made ``before`` a time; records of source files and outputs that are
    gone. What was made of a result that is gone is still found by its digest."""
    present = {text for (text,) in db.execute("SELECT blob FROM files WHERE blob IS NOT NULL")}
    present.update(text for (text,) in db.execute("SELECT DISTINCT digest FROM slices"))
    results = db.execute("SELECT key, outputs FROM results WHERE created < ?", (before,)).fetchall()
    dead = [(key,) for key, outputs in results if not present.issuperset(json.loads(outputs))]
    db.executemany("DELETE FROM results WHERE key = ?", dead)
    for (path,) in db.execute("SELECT path FROM sources").fetchall():
        if not Path(path).exists():
            delete_source(db, path)
    for (path,) in db.execute("SELECT path FROM outputs").fetchall():
        if not Path(path).exists():
            db.execute("DELETE FROM outputs WHERE path = ?", (path,))


def _files_to_keep(
    files: dict[Path, tuple[int, str | None, int]], slices: list[tuple[int, str]], needed: set[str]
) -> set[Path]:
    """Needed blobs, then for each needed slice that is in none of them one file that has it, blobs first."""
    keep = {path for path, (_, blob, _) in files.items() if blob in needed}
    inside: dict[int, set[str]] = {}
    for file, digest in slices:
        if digest in needed:
            inside.setdefault(file, set()).add(digest)
    missing = needed - {blob for _, blob, _ in files.values() if blob}
    missing = missing.difference(*(inside.get(files[path][0], set()) for path in keep))
    for path, (file, _, _) in files.items():
        if not missing.isdisjoint(inside.get(file, set())):
            keep.add(path)
            missing -= inside[file]
    return keep


def _digest_of(path: Path) -> Digest | None:
    """The digest of a whole file, None where it is gone."""
    with reading(path) as fd:
        if fd is None:
            return None
        hasher = Hasher()
        hash_range(fd, 0, os.fstat(fd).st_size, hasher.update)
        return hasher.digest()


def _difference(wanted: Digest, found: Digest) -> str:
    if wanted.size != found.size:
        return f"it has {found.size} bytes, not {wanted.size}"
    return f"its bytes are {found.hash[:12]}…, not {wanted.hash[:12]}…"
