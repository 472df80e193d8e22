"""Blobs, slices, files written in place, locks: what a build leans on, named after what may go wrong."""

from __future__ import annotations

import contextlib
import os
import sqlite3
import threading
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from store_kit import digest_of, flip, packed

from qbuild import upkeep
from qbuild.actions.directory import listed, tree
from qbuild.cache import ActionCache, ActionResult
from qbuild.digest import Digest, digest_bytes
from qbuild.errors import StoreError
from qbuild.index import SCHEMA_VERSION
from qbuild.store import Store, identity


def test_opening_a_store_leaves_no_trace(tmp_path: Path):
    root = tmp_path / "store"
    opened = Store(root)
    assert not opened.has(digest_of(1)[1])
    assert opened.locate(digest_of(1)[1]) is None
    assert ActionCache(opened).get("k") is None
    opened.close()
    assert not root.exists()


def test_put_then_read(store: Store):
    data, digest = digest_of(1)
    assert store.put_bytes(data) == digest
    assert store.has(digest)
    assert store.read_bytes(digest) == data
    assert store.path(digest).stat().st_mode & 0o777 == 0o444
    assert store.put_bytes(b"") == digest_bytes(b"")
    assert store.read_bytes(digest_bytes(b"")) == b""


def test_put_wrong_size(store: Store):
    data, digest = digest_of(1)
    with pytest.raises(StoreError, match="refused"):
        store.put_bytes(data, Digest(digest.hash, digest.size + 1))
    with store.partial("p", 10) as partial, pytest.raises(StoreError, match="has 10 bytes"):
        partial.commit(digest)
    assert not store.has(digest)


def test_write_outside_a_partial_is_refused(store: Store):
    with store.partial("p", 10) as partial:
        for offset, size in ((-1, 1), (10, 1), (0, 11)):
            with pytest.raises(ValueError, match="BUG"):
                partial.write_at(offset, bytes(size))


def test_corrupted_blob_is_not_served(store: Store):
    data, digest = digest_of(1)
    for keep_mtime in (False, True):
        store.put_bytes(data)
        flip(store.blob_path(digest), keep_mtime=keep_mtime)
        assert store.read_bytes(digest) is None
        assert not store.has(digest)
        assert not store.blob_path(digest).exists()


def test_truncated_blob_is_not_served(store: Store):
    data, digest = digest_of(1)
    store.put_bytes(data)
    os.chmod(store.blob_path(digest), 0o644)
    os.truncate(store.blob_path(digest), 999)
    assert store.path(digest) is None


def test_touched_blob_is_hashed_and_kept(store: Store):
    data, digest = digest_of(1)
    store.put_bytes(data)
    os.utime(store.blob_path(digest), ns=(1, 1))
    assert store.path(digest) is not None
    with store.index.reading() as db:
        assert db.execute("SELECT mtime_ns FROM files").fetchall() == [(1,)]


def test_check_blob_hashes_what_was_touched(store: Store, tmp_path: Path):
    data, digest = digest_of(1)
    store.put_bytes(data)
    assert store.check_blob(digest)
    flip(store.blob_path(digest), keep_mtime=True)  # its ctime tells
    assert not store.check_blob(digest)


def test_vanished_blob_is_forgotten(store: Store):
    whole, slices, _ = packed(store)
    store.blob_path(whole).unlink()
    assert store.path(whole) is None
    assert store.locate(slices[0]) is None
    with store.index.reading() as db:
        assert db.execute("SELECT count(*) FROM slices").fetchone() == (0,)
        assert db.execute("SELECT count(*) FROM files").fetchone() == (0,)


def test_slices_of_a_blob_are_found_and_verified(store: Store):
    whole, slices, data = packed(store)
    for i, digest in enumerate(slices):
        place = store.locate(digest)
        assert place is not None
        assert (place.path, place.offset, place.length) == (store.blob_path(whole), 1000 * i, 1000)
        assert store.read_bytes(digest) == data[1000 * i : 1000 * (i + 1)]


def test_slice_is_found_while_its_file_grows_and_after_its_rename(store: Store):
    data, digest = digest_of(1)
    into = memoryview(bytearray(1000))
    with store.partial("p", 2000) as partial:
        partial.write_at(0, data)
        partial.finished(digest, 0)
        place = store.locate(digest)
        assert place is not None
        assert place.path == partial.path
        assert store.read_slice(place, 0, into)
        assert bytes(into) == data
        partial.commit(digest_bytes(data + bytes(1000)))
    into[:] = bytes(1000)
    assert not place.path.exists()
    assert store.read_slice(place, 0, into)  # located before the rename
    assert bytes(into) == data


def test_a_damaged_list_of_the_files_of_a_directory_is_told_and_dropped(store: Store):
    whole = store.put_bytes(tree({"model.safetensors": digest_of(1)[1]}))
    assert listed(store, whole, "awq") == {"model.safetensors": digest_of(1)[1]}
    flip(store.blob_path(whole), 40, keep_mtime=True)
    with pytest.raises(StoreError, match="the list of the files of awq is gone or damaged"):
        listed(store, whole, "awq")
    assert not store.has(whole)  # so that it is made again


def test_slice_that_went_bad_is_forgotten_and_the_next_place_serves(store: Store):
    first, slices, _ = packed(store, "a")
    data = digest_of(2)[0]
    with store.partial("b", 1000) as partial:
        partial.write_at(0, data)
        partial.finished(slices[2], 0)
        flip(store.blob_path(first), 2500, keep_mtime=True)
        assert store.read_bytes(slices[2]) == data
        place = store.locate(slices[2])
        assert place is not None
        assert place.path == partial.path


def test_damaged_file_keeps_its_good_slices_for_the_rebuild(store: Store):
    whole, slices, data = packed(store)
    flip(store.blob_path(whole), 1500, keep_mtime=False)
    assert store.path(whole) is None
    assert store.read_bytes(slices[1]) is None
    assert store.read_bytes(slices[0]) == data[:1000]
    assert packed(store)[0] == whole  # made again
    assert store.path(whole) is not None
    assert list((store.root / "partial").iterdir()) == []


def test_bad_slice_makes_its_blob_suspect(store: Store):
    whole, slices, _ = packed(store)
    flip(store.blob_path(whole), 1500, keep_mtime=True)
    assert store.path(whole) is not None  # its time stamps say nothing yet
    assert store.read_bytes(slices[1]) is None
    assert store.path(whole) is None


def test_interrupted_file_is_resumed(store: Store):
    data, digest = digest_of(1)
    with store.partial("p", 3000) as partial:
        partial.write_at(1000, data)
        partial.finished(digest, 1000)
    with store.partial("p", 3000) as partial:
        assert partial.journal() == [(digest, 1000)]
        into = memoryview(bytearray(1000))
        partial.read_at(1000, into)
        assert bytes(into) == data
        assert store.locate(digest, at=(partial.path, 1000)).offset == 1000


def test_journal_of_another_size_is_dropped(store: Store):
    data, digest = digest_of(1)
    with store.partial("p", 3000) as partial:
        partial.write_at(0, data)
        partial.finished(digest, 0)
    with store.partial("p", 3001) as partial:
        assert partial.journal() == []
    assert store.locate(digest) is None


def test_overwritten_slice_is_no_longer_located(store: Store):
    parts = [digest_of(seed) for seed in range(3)]
    with store.partial("p", 3000) as partial:
        for i, (data, digest) in enumerate(parts):
            partial.write_at(1000 * i, data)
            partial.finished(digest, 1000 * i)
    with store.partial("p", 3000) as partial:
        partial.write_at(1999, b"x")
        assert partial.journal() == [(parts[0][1], 0), (parts[2][1], 2000)]
        assert store.locate(parts[1][1]) is None


def test_preferred_place_wins(store: Store):
    whole, slices, data = packed(store)
    with store.partial("p", 1000) as partial:
        partial.write_at(0, data[:1000])
        partial.finished(slices[0], 0)
        assert store.locate(slices[0]).path == store.blob_path(whole)
        assert store.locate(slices[0], at=(partial.path, 0)).path == partial.path


def test_file_made_twice_keeps_one_row(store: Store):
    whole, slices, _ = packed(store, "a")
    inode = store.blob_path(whole).stat().st_ino
    assert packed(store, "b")[0] == whole
    assert store.blob_path(whole).stat().st_ino != inode
    assert store.check_blob(whole)
    with store.index.reading() as db:
        assert db.execute("SELECT count(*), count(partial) FROM files").fetchone() == (1, 0)
        assert db.execute("SELECT count(*) FROM slices").fetchone() == (len(slices),)


def test_slices_of_the_first_copy_stay_found_when_the_file_is_made_again(store: Store):
    whole, slices, data = packed(store, "a")
    with store.partial("b", len(data)) as partial:  # nothing journalled this time
        partial.write_at(0, data)
        partial.commit(whole)
    assert [store.locate(digest).offset for digest in slices] == [0, 1000, 2000, 3000]


def test_a_file_that_was_only_renamed_is_not_forgotten(store: Store):
    """A reader that lost the race against the rename reports the old name as gone."""
    _, slices, _ = packed(store)
    place = store.locate(slices[0])
    store.forget_vanished(place.file)
    assert store.locate(slices[0]) == place


def test_discarded_file_leaves_nothing(store: Store):
    data, digest = digest_of(1)
    with store.partial("p", 1000) as partial:
        partial.write_at(0, data)
        partial.finished(digest, 0)
        partial.discard()
    assert store.locate(digest) is None
    assert list((store.root / "partial").iterdir()) == []


def test_two_partials_are_locked_in_one_order(store: Store, monkeypatch: pytest.MonkeyPatch):
    """Two builds that want the same files in opposite orders must not hold one each and wait for the other."""
    order, taken = [("a", 10), ("b", 20)], []
    real = Store.partial
    monkeypatch.setattr(Store, "partial", lambda self, name, *rest: taken.append(name) or real(self, name, *rest))
    for wanted in (order, order[::-1]):
        with store.partials(wanted) as partials:
            assert [(p.name, p.size) for p in partials] == wanted
    assert taken == ["a", "b", "a", "b"]


def test_distinct_keyspaces(store: Store):
    """One text as blob name, action key, hint and partial name: nothing is mixed up."""
    data, digest = digest_of(1)
    cache = ActionCache(store)
    store.put_bytes(data)
    assert cache.get(digest.hash) is None
    assert not cache.has_hint(digest.hash)
    other = digest_of(2)
    store.put_bytes(other[0])
    cache.put(digest.hash, ActionResult("kind", (other[1],)))
    assert cache.get(digest.hash).outputs == (other[1],)
    with store.partial(digest.hash, 5):
        assert store.read_bytes(digest) == data


def test_result_is_served_only_while_its_outputs_are_there(store: Store):
    cache = ActionCache(store)
    whole, slices, _ = packed(store)
    result = ActionResult("k", (slices[0], whole), (slices[1],), (slices[2],))
    cache.put("key", result)
    cache.put("key", result)
    assert cache.get("key") == result
    store.blob_path(whole).unlink()
    assert cache.get("key") is None


def test_result_of_a_slice_in_an_interrupted_file_is_served(store: Store):
    data, digest = digest_of(1)
    with store.partial("p", 1000) as partial:
        partial.write_at(0, data)
        partial.finished(digest, 0)
    ActionCache(store).put("key", ActionResult("k", (digest,)))
    assert ActionCache(store).get("key") is not None


def test_result_without_outputs_is_a_bug(store: Store):
    with pytest.raises(ValueError, match="BUG"):
        ActionCache(store).put("key", ActionResult("k", ()))


def test_notes_keep_the_newest(store: Store):
    cache = ActionCache(store)
    assert cache.rate("x") is None
    for i in range(40):
        cache.note_rate("x", float(i))
    assert cache.rate("x") == 32.0
    cache.note_hint("h")
    cache.note_hint("h")
    assert cache.has_hint("h")
    assert not cache.has_hint("g")


def test_changed_source_file_has_no_digests(store: Store, tmp_path: Path):
    path = tmp_path / "w.safetensors"
    path.write_bytes(b"1" * 100)
    os.utime(path, ns=(10**18, 10**18 + 1))
    before = identity(path)
    later = Store(store.root, clock=lambda: before.ctime_ns + 10**9)
    digest = digest_of(1)[1]
    later.sources.put(before, 8, digest)
    later.sources.put(before, 9000, digest)
    assert store.sources.all(before) == {8: digest, 9000: digest}
    os.utime(path, ns=(10**18, 10**18 + 2))
    assert store.sources.all(identity(path)) is None
    later.sources.put(identity(path)._replace(ctime_ns=before.ctime_ns), 8, digest)
    assert store.sources.all(before) is None
    later.close()


def test_digest_taken_in_the_tick_of_a_change_is_not_trusted(store: Store):
    """A second write within the kernel's clock tick leaves size, mtime and ctime as they are."""
    at = 1_700_000_000_123_456_789
    source = ("/w", 10, at, at, 7)
    digest = digest_of(1)[1]
    for age, trusted in ((1_000_000, False), (1_000_000_000, True)):
        racing = Store(store.root, clock=lambda age=age: at + age)
        racing.sources.put(source, 0, digest)
        assert (racing.sources.all(source) is not None) == trusted
        racing.close()
    whole_seconds = ("/c", 10, 10**18, 10**18, 7)
    coarse = Store(store.root, clock=lambda: 10**18 + 10**9)
    coarse.sources.put(whole_seconds, 0, digest)
    assert coarse.sources.all(whole_seconds) is None
    coarse.close()


def test_digest_of_a_file_from_a_time_to_come_is_trusted(store: Store, tmp_path: Path):
    """An archive may hold any mtime; ctime tells when the file was last touched."""
    path = tmp_path / "w.safetensors"
    path.write_bytes(b"1" * 100)
    os.utime(path, ns=(2 * 10**18, 2 * 10**18))
    source = identity(path)
    later = Store(store.root, clock=lambda: source.ctime_ns + 10**9)
    later.sources.put(source, 8, digest_of(1)[1])
    assert store.sources.all(source) == {8: digest_of(1)[1]}
    later.close()


def test_forgotten_source_has_no_digests(store: Store):
    source = ("/w", 10, 1, 1, 7)
    store.sources.put(source, 0, digest_of(1)[1])
    store.sources.forget("/w")
    assert store.sources.all(source) is None
    store.sources.forget("/w")


def test_batch_is_all_or_nothing(store: Store):
    cache = ActionCache(store)
    with contextlib.suppress(RuntimeError), store.batch():
        cache.note_hint("a")
        assert cache.has_hint("a")  # its own thread sees it
        raise RuntimeError
    assert not cache.has_hint("a")
    with store.batch():
        cache.note_hint("a")
    assert cache.has_hint("a")


def test_threads_share_a_store(store: Store):
    failures = []

    def work(seed: int) -> None:
        try:
            for i in range(20):
                data, digest = digest_of(seed * 100 + i, 100 + i)
                store.put_bytes(data)
                assert store.read_bytes(digest) == data
                ActionCache(store).put(f"{seed} {i}", ActionResult("k", (digest,)))
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert all(ActionCache(store).get(f"{s} {i}") for s in range(8) for i in range(20))


def test_lock_is_exclusive_and_leaves_no_file(store: Store):
    waits = []
    with store.lock("a", on_wait=lambda: waits.append(1)):
        assert store.try_lock("a") is None
        other = store.try_lock("b")
        other.release()
    assert waits == []
    held = store.try_lock("a")
    assert held is not None
    thread = threading.Timer(0.05, held.release)  # released by another thread than the one that took it
    thread.start()
    with store.lock("a", on_wait=lambda: waits.append(1)):
        assert waits == [1]
    thread.join()
    assert list((store.root / "locks").glob("*.lock")) == []


def test_index_of_a_newer_version_is_refused(store: Store):
    store.put_bytes(b"x")
    store.close()
    with sqlite3.connect(store.root / "index.sqlite") as db:
        db.execute(f"PRAGMA user_version={SCHEMA_VERSION + 1}")
    db.close()
    with pytest.raises(StoreError, match="newer qbuild") as caught:
        Store(store.root).has(digest_bytes(b"x"))
    assert "store.dir" in caught.value.remedy


def test_an_index_that_a_newer_version_upgrades_meanwhile_is_refused_from_then_on(store: Store):
    cache, result = ActionCache(store), ActionResult("k", (store.put_bytes(b"x"),))
    cache.put("key", result)
    assert cache.get("key") == result
    with sqlite3.connect(store.root / "index.sqlite") as db:
        db.executescript(f"ALTER TABLE results ADD COLUMN more TEXT; PRAGMA user_version={SCHEMA_VERSION + 1}")
    db.close()
    for use in (lambda: cache.get("key"), lambda: cache.put("other", result), lambda: store.put_bytes(b"y")):
        with pytest.raises(StoreError, match="newer qbuild"):
            use()


# How version 1 kept results, and a table that nothing used.
VERSION_1 = """
CREATE TABLE results (
  key TEXT PRIMARY KEY, kind TEXT NOT NULL, outputs TEXT NOT NULL, inputs TEXT NOT NULL, seconds REAL NOT NULL,
  peak_rss INTEGER NOT NULL, versions TEXT NOT NULL, meta TEXT NOT NULL, created INTEGER NOT NULL
) WITHOUT ROWID;
INSERT INTO results SELECT key, kind, outputs, inputs, 1.5, 7, '{}', about, created FROM now;
DROP TABLE now;
UPDATE results SET meta = '{}' WHERE key = 'old';
CREATE TABLE peaks (
  id INTEGER PRIMARY KEY, kind TEXT NOT NULL, shape TEXT NOT NULL, predicted INTEGER NOT NULL, measured INTEGER NOT NULL
);
CREATE INDEX peaks_by_shape ON peaks (kind, shape);
PRAGMA user_version=1;
"""


class OldSqlite(sqlite3.Connection):
    """As SQLite 3.34, which enterprise distributions have."""

    def execute(self, sql: str, *values: Any) -> sqlite3.Cursor:
        if "DROP COLUMN" in sql:
            raise sqlite3.OperationalError('near "DROP": syntax error')
        return super().execute(sql, *values)


def test_an_index_of_an_older_version_is_brought_up_to_date_and_keeps_all(
    store: Store, monkeypatch: pytest.MonkeyPatch
):
    whole, told = store.put_bytes(b"x"), store.put_bytes(b"told")
    old, about = ActionResult("k", (whole,)), ActionResult("e", (told,), about=(whole,))
    ActionCache(store).put_many([("old", old), ("about", about)])
    store.close()
    with sqlite3.connect(store.root / "index.sqlite") as db:
        db.executescript(f"ALTER TABLE results RENAME TO now; {VERSION_1}")
    db.close()
    with monkeypatch.context() as patched:
        patched.setattr("qbuild.index.may_write", lambda _root: False)
        with pytest.raises(StoreError, match="older qbuild"):
            ActionCache(Store(store.root)).get("old")
    monkeypatch.setattr("qbuild.index.sqlite3.connect", partial(sqlite3.connect, factory=OldSqlite))
    found = ActionCache(Store(store.root))
    assert (found.get("old"), found.get("about")) == (old, about)
    found.put("new", about)
    assert ActionCache(Store(store.root)).get("new") == about


@pytest.mark.parametrize("content", [b"not a database" * 100, b""])
def test_corrupt_index_is_reported_with_the_way_out(store: Store, content: bytes):
    store.put_bytes(b"x")
    store.close()
    (store.root / "index.sqlite").write_bytes(content)
    with pytest.raises(StoreError, match="damaged") as caught:
        Store(store.root).has(digest_bytes(b"x"))
    assert f"rm {store.root}/index.sqlite*" in caught.value.remedy


def test_lost_index_is_rebuilt_from_blobs(store: Store):
    whole, _, data = packed(store)
    store.put_bytes(b"x")
    bad = store.put_bytes(b"bad")
    store.close()
    for path in store.root.glob("index.sqlite*"):
        path.unlink()
    flip(store.blob_path(bad), keep_mtime=True)
    again = Store(store.root)
    assert again.read_bytes(whole) == data
    assert again.read_bytes(digest_bytes(b"x")) == b"x"
    assert again.path(bad) is None  # nothing is known of it: it was hashed
    again.close()


def test_3000_rows_cost_under_a_second(store: Store):
    cache = ActionCache(store)
    with store.partial("p", 3000) as partial:
        digests = [digest_bytes(i.to_bytes(2, "little")) for i in range(1500)]
        began = time.process_time()
        for i, digest in enumerate(digests):
            partial.finished(digest, 2 * i)
            cache.put(str(i), ActionResult("k", (digest,)))
        assert time.process_time() - began < 1.0
        began = time.process_time()
        assert all(cache.get(str(i)) for i in range(1500))
        assert time.process_time() - began < 1.0


def test_verify_lets_go_of_an_unfinished_file_that_was_removed(store: Store) -> None:
    with store.partial("name", 64) as partial:
        partial.finished(digest_bytes(bytes(64)), 0)
    partial.path.unlink()
    assert list(upkeep.verify(store)) == []
    held = store.try_lock("partial name")
    assert held is not None
    held.release()
