"""Disks that are full, read-only, or cannot reserve. The real thing where this user may mount a tmpfs."""

from __future__ import annotations

import errno
import os
import subprocess
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
from store_kit import digest_of, packed

from qbuild import fsutil, upkeep
from qbuild.cache import ActionCache, ActionResult
from qbuild.calibration.texts import files
from qbuild.digest import Digest
from qbuild.errors import InputError, StoreError
from qbuild.source import open_source
from qbuild.store import Store

MIB = 1 << 20


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """2 MiB of tmpfs."""
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(disk)]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("this user may not mount a tmpfs")
    try:
        yield disk
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


def test_disk_full(small_disk: Path):
    """Said before the work begins, with what is needed and what is there; nothing is left behind."""
    store = Store(small_disk / "store")
    digest = store.put_bytes(b"small")
    with pytest.raises(StoreError, match=r"disk full: 3\.0 MiB are needed, 1\.\d MiB are free") as caught:
        store.partial("p", 3 * MIB)
    assert "qbuild gc -n" in caught.value.remedy
    assert list((store.root / "partial").iterdir()) == []
    with pytest.raises(StoreError, match="disk full"):
        store.put_bytes(bytes(3 * MIB))
    assert list((store.root / "partial").iterdir()) == []
    assert store.read_bytes(digest) == b"small"
    with store.partial("p", MIB):  # the lock of the refused one is free, and this fits
        pass
    store.close()


def test_reserved_blocks_cannot_be_taken_by_others(small_disk: Path):
    store = Store(small_disk / "store")
    with store.partial("p", MIB) as partial:
        with pytest.raises(OSError, match="No space"):
            (small_disk / "other").write_bytes(bytes(2 * MIB))
        for start in range(0, MIB, 1 << 16):
            partial.write_at(start, b"x" * (1 << 16))
    store.close()


def test_full_disk_keeps_what_an_interrupted_run_finished(small_disk: Path, monkeypatch: pytest.MonkeyPatch):
    store = Store(small_disk / "store")
    data, digest = digest_of(1)
    with store.partial("p", MIB) as partial:
        partial.write_at(0, data)
        partial.finished(digest, 0)
    monkeypatch.setattr(fsutil, "_fallocate", lambda fd, size: errno.ENOSPC)
    with pytest.raises(StoreError, match="disk full"):
        store.partial("p", MIB)
    assert store.read_bytes(digest) == data
    store.close()


def test_full_disk_for_an_output_leaves_the_old_one(small_disk: Path, tmp_path: Path):
    store = Store(tmp_path / "store")
    digest = store.put_bytes(bytes(3 * MIB))
    dest = small_disk / "m.gguf"
    dest.write_bytes(b"old")
    with pytest.raises(StoreError, match="disk full"):
        store.link_out(digest, dest)  # another file system: it must be a copy
    assert dest.read_bytes() == b"old"
    assert [p.name for p in small_disk.iterdir()] == ["m.gguf"]
    small = store.put_bytes(bytes(MIB))
    assert store.link_out(small, dest) == "copy"
    assert dest.stat().st_size == MIB
    store.close()


def test_read_only_store(small_disk: Path):
    """What is in it is served; a write says what to do; nothing needs SQLite's side files."""
    store = Store(small_disk / "store")
    whole, slices, data = packed(store)
    ActionCache(store).put("key", ActionResult("k", (slices[0], whole)))
    store.close()
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    store = Store(small_disk / "store")
    assert store.read_only
    assert ActionCache(store).get("key") is not None
    assert store.path(whole) is not None
    assert store.read_bytes(slices[1]) == data[1000:2000]
    assert list(upkeep.verify(store)) == []
    assert upkeep.gc(store, dry_run=True).kept == 0
    with store.in_use():
        pass
    for write in (
        lambda: store.put_bytes(b"x"),
        lambda: store.partial("p", 1),
        lambda: upkeep.gc(store),
        lambda: store.lock("a").__enter__(),
        lambda: ActionCache(store).note_hint("h"),
    ):
        with pytest.raises(StoreError, match="read-only") as caught:
            write()
        assert "store.dir" in caught.value.remedy
    store.close()


def test_read_only_store_with_a_writer_that_was_killed(small_disk: Path):
    """Its write-ahead log is still there, and must be read."""
    store = Store(small_disk / "store")
    digest = store.put_bytes(b"x")
    child = os.fork()
    if child == 0:
        Store(store.root).put_bytes(b"killed")
        os._exit(0)  # without closing the index
    os.waitpid(child, 0)
    store.close()
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    again = Store(small_disk / "store")
    assert again.read_bytes(digest) == b"x"
    again.close()


def test_damage_in_a_read_only_store_is_not_served(small_disk: Path):
    store = Store(small_disk / "store")
    whole, slices, _ = packed(store)
    store.blob_path(whole).chmod(0o644)
    with store.blob_path(whole).open("r+b") as file:
        file.write(b"\xff")
    store.close()
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    store = Store(small_disk / "store")
    assert store.path(whole) is None
    assert store.read_bytes(whole) is None
    assert store.read_bytes(slices[0]) is None
    assert [p.kind for p in upkeep.verify(store)] == ["damaged"]
    store.close()


def test_store_that_cannot_be_made(tmp_path: Path):
    (tmp_path / "file").write_bytes(b"")
    store = Store(tmp_path / "file" / "store")
    assert not store.has(digest_of(1)[1])
    with pytest.raises(StoreError, match="read-only"):
        store.put_bytes(b"x")


@pytest.fixture
def locked(tmp_path: Path) -> Iterator[Path]:
    """A folder that this user cannot enter."""
    folder, root = tmp_path / "locked", os.geteuid() == 0
    folder.mkdir(mode=0)
    if root:  # may enter all
        os.setresuid(65534, 65534, 0)
    try:
        yield folder
    finally:
        if root:
            os.setresuid(0, 0, 0)


def test_a_folder_that_cannot_be_entered_is_an_error_and_no_bug(locked: Path):
    with pytest.raises(StoreError, match="Permission denied") as caught:
        Store(locked / "store")
    assert "store.dir=" in caught.value.remedy
    assert not fsutil.may_write(locked / "out")
    assert fsutil.disk_free(locked / "out") > 0
    for use in (open_source, partial(files, fetch=False)):
        with pytest.raises(InputError, match="cannot be read: Permission denied"):
            use(str(locked / "model.gguf"))


@pytest.mark.parametrize("code", [errno.EOPNOTSUPP, errno.ENOSYS])
def test_file_system_without_reservation(store: Store, monkeypatch: pytest.MonkeyPatch, code: int):
    """The size is set all the same, and a file larger than the free space is refused."""
    monkeypatch.setattr(fsutil, "_fallocate", lambda fd, size: code)
    with store.partial("p", MIB) as partial:
        assert partial.path.stat().st_size == MIB
    free = fsutil.disk_free(store.root)
    with pytest.raises(StoreError, match="disk full"):
        store.partial("q", free + (1 << 40))
    assert [p.name for p in (store.root / "partial").iterdir()] == ["p"]


def test_reservation_is_real_here(store: Store):
    with store.partial("p", MIB) as partial:
        assert partial.path.stat().st_blocks * 512 >= MIB
    with store.partial("empty", 0) as partial:
        assert partial.path.stat().st_size == 0


READS: dict[str, Callable[[Store, Digest, Digest], object]] = {
    "a blob whose time stamps moved": lambda store, whole, part: store.check_blob(whole),
    "bytes": lambda store, whole, part: store.read_bytes(part),
    "everything": lambda store, whole, part: list(upkeep.verify(store)),
    "a copy": lambda store, whole, part: store.link_out(whole, store.root.parent / "out.gguf", "copy"),
}


@pytest.mark.parametrize("what", READS)
def test_a_disk_that_does_not_give_bytes_is_named(what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(tmp_path / "store")
    whole, parts, _ = packed(store)
    os.utime(store.blob_path(whole))

    def broken(*_: object) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "preadv", broken)
    with pytest.raises(StoreError, match="cannot be read: Input/output error"):
        READS[what](store, whole, parts[1])
    monkeypatch.undo()
    assert store.check_blob(whole)  # nothing was dropped for it


def test_a_slice_of_an_unfinished_file_that_the_disk_does_not_give_is_not_forgotten(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, digest = digest_of(1)
    with store.partial("unfinished", len(data)) as partial:
        partial.write_at(0, data)
        partial.finished(digest, 0)

    def broken(*_: object) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "preadv", broken)
    with pytest.raises(StoreError, match="cannot be read"):
        list(upkeep.verify(store))
    monkeypatch.undo()
    assert store.read_bytes(digest) == data
