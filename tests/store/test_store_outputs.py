"""Outputs in the user's folder: how they are placed, when they are current, what verify and gc make of them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from store_kit import digest_of, flip, packed

from qbuild import fsutil, links, upkeep
from qbuild.cache import ActionCache, ActionResult
from qbuild.digest import Digest
from qbuild.errors import ConfigError, StoreError
from qbuild.store import Store


def no_reflink(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(links, "clone", lambda source, target: False)


def no_hard_link(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(links.os, "link", refuse)


def test_reflink_unsupported_falls_back(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The real ioctl on this file system, whatever it answers, then a file system that has neither."""
    whole, _, data = packed(store)
    dest = tmp_path / "out" / "m.gguf"
    how = store.link_out(whole, dest)
    assert how in ("reflink", "hardlink")
    assert dest.read_bytes() == data
    no_reflink(monkeypatch)
    assert store.link_out(whole, tmp_path / "h.gguf") == "hardlink"
    no_hard_link(monkeypatch)
    assert store.link_out(whole, tmp_path / "c.gguf") == "copy"
    assert (tmp_path / "c.gguf").read_bytes() == data
    assert sorted(p.name for p in tmp_path.iterdir()) == ["c.gguf", "h.gguf", "out", "store"]


def test_reflink_shares_blocks_where_the_ioctl_works(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    whole, _, data = packed(store)

    def cloned(source: int, target: int) -> bool:
        os.write(target, os.pread(source, 1 << 20, 0))
        return True

    monkeypatch.setattr(links, "clone", cloned)
    dest = tmp_path / "m.gguf"
    assert store.link_out(whole, dest) == "reflink"
    assert dest.read_bytes() == data
    assert dest.stat().st_mode & 0o200  # its own file: the user may edit it
    assert store.output_current(dest, whole)


def test_an_error_of_the_reflink_ioctl_is_not_swallowed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def broken(*_: object) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(fsutil.fcntl, "ioctl", broken)
    with (tmp_path / "a").open("wb") as file, pytest.raises(OSError, match="Input/output"):
        fsutil.clone(file.fileno(), file.fileno())


def test_hard_linked_output_is_read_only_and_written_once(store: Store, tmp_path: Path):
    whole, _, _ = packed(store)
    dest = tmp_path / "m.gguf"
    assert store.link_out(whole, dest, "hardlink") == "hardlink"
    assert dest.stat().st_ino == store.blob_path(whole).stat().st_ino
    assert dest.stat().st_mode & 0o222 == 0


def test_mode_that_is_impossible_is_refused_with_the_way_out(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    whole, _, _ = packed(store)
    no_reflink(monkeypatch)
    no_hard_link(monkeypatch)
    for mode in ("reflink", "hardlink"):
        with pytest.raises(ConfigError, match=f"store.link={mode}") as caught:
            store.link_out(whole, tmp_path / "m.gguf", mode)
        assert "store.link=auto" in caught.value.remedy
    with pytest.raises(ConfigError, match="one of: auto"):
        store.link_out(whole, tmp_path / "m.gguf", "symlink")
    assert not (tmp_path / "m.gguf").exists()


@pytest.mark.parametrize("mode", ["hardlink", "copy"])
def test_second_link_out_does_nothing(store: Store, tmp_path: Path, mode: str):
    whole, _, _ = packed(store)
    dest = tmp_path / "m.gguf"
    store.link_out(whole, dest, mode)
    before = dest.stat()
    store.link_out(whole, tmp_path / "other.gguf", mode)  # moves the ctime of a hard link
    assert store.output_current(dest, whole)
    assert store.link_out(whole, dest, mode) == mode
    after = dest.stat()
    assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)


def test_linking_twice_hashes_nothing(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A hard link moves the ctime of the blob; that is our own doing and no reason to read it."""
    whole, _, _ = packed(store)
    monkeypatch.setattr(Store, "_rehash", lambda self, digest: pytest.fail("was read"))
    for name in ("a", "b", "c"):
        assert store.link_out(whole, tmp_path / name, "hardlink") == "hardlink"


@pytest.mark.parametrize("mode", ["hardlink", "copy"])
def test_edited_output_is_replaced(store: Store, tmp_path: Path, mode: str):
    whole, _, data = packed(store)
    dest = tmp_path / "m.gguf"
    store.link_out(whole, dest, mode)
    dest.unlink()
    dest.write_bytes(b"mine")
    assert not store.output_current(dest, whole)
    store.link_out(whole, dest, mode)
    assert dest.read_bytes() == data


def test_other_mode_replaces_the_link(store: Store, tmp_path: Path):
    whole, _, data = packed(store)
    dest = tmp_path / "m.gguf"
    store.link_out(whole, dest, "hardlink")
    assert store.link_out(whole, dest, "copy") == "copy"
    assert dest.stat().st_ino != store.blob_path(whole).stat().st_ino
    assert store.link_out(whole, dest) == "copy"  # auto takes what is there
    assert store.link_out(whole, dest, "hardlink") == "hardlink"
    assert dest.read_bytes() == data


def test_new_digest_replaces_the_old_output(store: Store, tmp_path: Path):
    first, _, _ = packed(store, "a", 3)
    second, _, data = packed(store, "b", 4)
    dest = tmp_path / "m.gguf"
    store.link_out(first, dest)
    store.link_out(second, dest, target="gguf/q4_k_m")
    assert dest.read_bytes() == data
    assert [(r.digest, r.target) for r in store.outputs()] == [(second, "gguf/q4_k_m")]


def test_damaged_blob_is_never_linked(store: Store, tmp_path: Path):
    """Its mtime is restored; the ctime is not, so the bytes are looked at."""
    whole, _, _ = packed(store)
    flip(store.blob_path(whole), 100, keep_mtime=True)
    with pytest.raises(StoreError, match="damaged"):
        store.link_out(whole, tmp_path / "m.gguf")
    assert not (tmp_path / "m.gguf").exists()
    assert not store.blob_path(whole).exists()


def test_copy_verifies_what_it_copies(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    whole, _, _ = packed(store)
    flip(store.blob_path(whole), 100, keep_mtime=True)
    monkeypatch.setattr(Store, "check_blob", lambda self, digest: True)  # a disk that rots leaves no trace in any stat
    with pytest.raises(StoreError, match="damaged"):
        store.link_out(whole, tmp_path / "m.gguf", "copy")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["store"]


def test_output_folder_that_cannot_be_made(store: Store, tmp_path: Path):
    whole, _, _ = packed(store)
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(ConfigError, match="cannot be written") as caught:
        store.link_out(whole, tmp_path / "file" / "m.gguf")
    assert "out=" in caught.value.remedy
    (tmp_path / "folder").mkdir()
    with pytest.raises(ConfigError, match="is a folder"):
        store.link_out(whole, tmp_path / "folder")


def test_symlink_at_the_output_is_replaced_not_followed(store: Store, tmp_path: Path):
    whole, _, data = packed(store)
    (tmp_path / "precious").write_bytes(b"precious")
    (tmp_path / "m.gguf").symlink_to("precious")
    store.link_out(whole, tmp_path / "m.gguf")
    assert (tmp_path / "precious").read_bytes() == b"precious"
    assert (tmp_path / "m.gguf").read_bytes() == data


# verify --------------------------------------------------------------------------------------------------------------


def problems(store: Store) -> list[tuple[str, str, str]]:
    return [(p.kind, p.where, p.path.name) for p in upkeep.verify(store)]


def test_verify_finds_nothing_in_a_sound_store(store: Store, tmp_path: Path):
    whole, _, _ = packed(store)
    store.put_bytes(b"x")
    for mode in ("hardlink", "copy"):
        store.link_out(whole, tmp_path / mode, mode)
    with store.partial("p", 1000) as partial:
        partial.write_at(0, digest_of(1)[0])
        partial.finished(digest_of(1)[1], 0)
    read = []
    assert list(upkeep.verify(store, on_file=lambda path, size: read.append(path.name))) == []
    assert len(read) == 4  # two blobs, the unfinished file, the copy; the hard link is not read twice


@pytest.mark.parametrize("mode", ["hardlink", "copy"])
def test_flipped_byte_found_by_verify_with_mtime_restored(store: Store, tmp_path: Path, mode: str):
    """In the output: with a hard link that is the store's own file, and both are reported."""
    whole, slices, data = packed(store)
    dest = tmp_path / "m.gguf"
    store.link_out(whole, dest, mode)
    flip(dest, 1500, keep_mtime=True)
    expected = [("damaged", "output", "m.gguf")]
    if mode == "hardlink":
        expected.insert(0, ("damaged", "blob", whole.hash))
    stamp = dest.stat().st_mtime_ns
    assert problems(store) == expected
    assert dest.stat().st_mtime_ns != stamp  # a remembered stat no longer says that it is good
    assert not store.output_current(dest, whole)
    if mode == "hardlink":
        assert not store.has(whole)
        assert store.read_bytes(slices[0]) == data[:1000]
        assert store.read_bytes(slices[1]) is None
        packed(store)
    assert store.link_out(whole, dest, mode) == mode
    assert dest.read_bytes() == data
    assert problems(store) == []


def test_flipped_byte_in_the_store_found_by_verify_with_mtime_restored(store: Store, tmp_path: Path):
    whole, _, data = packed(store)
    dest = tmp_path / "m.gguf"
    store.link_out(whole, dest, "copy")
    flip(store.blob_path(whole), 3999, keep_mtime=True)
    assert problems(store) == [("damaged", "blob", whole.hash)]
    assert dest.read_bytes() == data


def test_verify_without_healing_changes_nothing(store: Store, tmp_path: Path):
    whole, _, _ = packed(store)
    flip(store.blob_path(whole), keep_mtime=True)
    for _ in range(2):
        found = [(p.kind, p.where, p.digest) for p in upkeep.verify(store, heal=False)]
        assert found == [("damaged", "blob", whole)]


def test_verify_finds_what_is_missing(store: Store, tmp_path: Path):
    whole, _, _ = packed(store)
    store.link_out(whole, tmp_path / "m.gguf", "copy")
    store.blob_path(whole).unlink()
    (tmp_path / "m.gguf").unlink()
    assert problems(store) == [("missing", "blob", whole.hash), ("missing", "output", "m.gguf")]
    assert problems(store) == []


def test_verify_drops_bad_slices_of_an_unfinished_file(store: Store):
    data, digest = digest_of(1)
    with store.partial("p", 2000) as partial:
        partial.write_at(0, data)
        partial.finished(digest, 0)
        assert problems(store) == []  # being written: left alone
        path = partial.path
    flip(path, 5, keep_mtime=True)
    assert problems(store) == [("damaged", "slice", "p")]
    assert store.locate(digest) is None


def test_wrong_size_is_said(store: Store):
    data, digest = digest_of(1)
    store.put_bytes(data)
    os.truncate(store.blob_path(digest), 900)
    assert [p.fact for p in upkeep.verify(store)] == ["it has 900 bytes, not 1000"]


# gc ------------------------------------------------------------------------------------------------------------------


def clocked(root: Path) -> tuple[Store, list[int]]:
    now = [10**18]

    def clock() -> int:
        now[0] += 1
        return now[0]

    return Store(root, clock=clock), now


def test_gc_keeps_roots(store: Store, tmp_path: Path):
    """An existing output, a digest that is asked for, what went into an output, what is told of it; the rest goes."""
    cache = ActionCache(store)
    whole, slices, _data = packed(store)
    root, meta, deep, told, useless = map(store.put_bytes, (b"root", b"meta", b"deep", b"told", b"useless"))
    cache.put("file", ActionResult("gguf.file", (whole,), inputs=(meta, slices[0])))
    cache.put("meta", ActionResult("gguf.metadata", (meta,), inputs=(deep,)))
    cache.put("useless", ActionResult("k", (useless,)))
    cache.put("told", ActionResult("evaluation.result", (told,), about=(whole,)))
    store.link_out(whole, tmp_path / "m.gguf", "copy")
    report = upkeep.gc(store, [root])
    assert [(i.path, i.size, i.why) for i in report.items] == [(store.blob_path(useless), 7, "k, no output needs it")]
    assert report.freed > 0
    assert report.kept == 4000 + 4 + 4 + 4 + 4
    assert all(store.has(d) for d in (whole, root, meta, deep, told, *slices))
    assert cache.get("file") is not None
    assert cache.get("useless") is None
    assert cache.find("useless") == ActionResult("k", (useless,))  # what was made of it is keyed by it
    (tmp_path / "m.gguf").unlink()  # nobody wants it any more
    upkeep.gc(store, [root])
    assert [store.has(d) for d in (whole, root, meta, deep, told)] == [False, True, False, False, False]
    assert store.outputs() == []


def test_gc_frees_the_folders_that_killed_jobs_left(store: Store, tmp_path: Path):
    """Hidden states of gigabytes; a library's scratch has links to the model, which are none of the store's."""
    model = tmp_path / "model.safetensors"
    model.write_bytes(b"w" * 5000)
    for name in ("states/a", "backends/b/model", "copies/c"):
        (store.root / name).mkdir(parents=True)
    (store.root / "states/a/layers.hidden").write_bytes(b"h" * 3000)
    (store.root / "backends/b/model/model.safetensors").symlink_to(model)
    assert len(upkeep.gc(store, dry_run=True).items) == 3
    sizes = {item.path: item.size for item in upkeep.gc(store).items}
    assert set(sizes) == {store.root / "states/a", store.root / "backends/b", store.root / "copies/c"}
    assert sizes[store.root / "states/a"] == 3000
    assert not any(path.exists() for path in sizes)
    assert model.stat().st_size == 5000


def test_gc_forgets_in_the_end_what_it_freed(tmp_path: Path):
    store, now = clocked(tmp_path)
    cache = ActionCache(store)
    cache.put("a", ActionResult("k", (store.put_bytes(b"a"),)))
    upkeep.gc(store)
    assert cache.find("a") is not None
    now[0] += 366 * 24 * 3600 * 10**9
    upkeep.gc(store)
    assert cache.find("a") is None


def test_gc_keeps_the_file_that_holds_a_needed_slice(store: Store):
    whole, slices, data = packed(store, "a", 2)
    other, _more, _ = packed(store, "b", 4)  # has the same two slices and two more
    upkeep.gc(store, [slices[0]])
    assert sum(store.path(d) is not None for d in (whole, other)) == 1
    assert store.read_bytes(slices[0]) == data[:1000]
    upkeep.gc(store, [other, slices[0]])
    assert store.path(whole) is None or store.path(other) is None


def test_gc_dry_run_frees_nothing(store: Store):
    whole, _, _ = packed(store)
    (store.root / "partial" / ".tmp-1-dead").write_bytes(b"x")
    with store.partial("p", 10):
        pass
    before = sorted(str(p) for p in store.root.rglob("*") if p.is_file() and "index" not in p.name)
    report = upkeep.gc(store, dry_run=True)
    assert sorted(i.path.name for i in report.items) == sorted([whole.hash, "p"])
    assert report.dry_run
    assert sorted(str(p) for p in store.root.rglob("*") if p.is_file() and "index" not in p.name) == before
    again = upkeep.gc(store)
    assert (again.items, again.kept) == (report.items, report.kept)  # what was shown is what goes
    assert not store.has(whole)
    assert list((store.root / "partial").iterdir()) == []


def test_gc_drops_the_least_recently_used_beyond_the_limit(tmp_path: Path):
    store, _ = clocked(tmp_path / "store")
    made = [store.put_bytes(digest_of(seed)[0]) for seed in range(4)]
    store.close()
    store, now = clocked(tmp_path / "store")
    now[0] += 1000
    with store.in_use():
        assert store.path(made[0])  # the oldest, used again
    report = upkeep.gc(store, limit=2000)
    assert [i.path.name for i in report.items] == [made[1].hash, made[2].hash]
    assert report.kept == 2000
    assert [store.has(d) for d in made] == [True, False, False, True]
    assert upkeep.gc(store, limit=2000).items == ()
    store.close()


def test_gc_never_goes_below_the_roots_for_a_limit(store: Store):
    digest = store.put_bytes(bytes(1000))
    assert upkeep.gc(store, [digest], limit=10).items == ()
    assert store.has(digest)


def test_gc_says_that_a_hard_linked_file_frees_nothing(store: Store, tmp_path: Path):
    whole, _, _ = packed(store)
    os.link(store.blob_path(whole), tmp_path / "moved.gguf")  # an output the user renamed
    report = upkeep.gc(store)
    assert [i.size for i in report.items] == [4000]
    assert report.freed == 0


def test_gc_waits_for_builds_and_says_so(store: Store):
    digest = store.put_bytes(b"x")
    other = Store(store.root)
    with other.in_use(), other.in_use(), pytest.raises(StoreError, match="a build is using the store"):
        upkeep.gc(store, timeout=0.05)
    assert store.has(digest)
    assert len(upkeep.gc(store, timeout=0.05).items) == 1
    other.close()


def test_gc_cleans_up_after_killed_processes(store: Store):
    store.put_bytes(b"x")
    (store.root / "locks" / "dead.lock").write_bytes(b"")
    (store.root / "partial" / ".tmp-1-dead").write_bytes(b"x")
    (store.root / "blobs" / "ff").mkdir(exist_ok=True)
    (store.root / "blobs" / "ff" / ("f" * 64)).write_bytes(b"a file without a row")
    gone = Digest("0" * 64, 5)
    store.sources.put(("/nonexistent/w", 1, 1, 1, 1), 0, gone)
    with store.lock("held"):
        upkeep.gc(store)
        assert len(list((store.root / "locks").glob("*.lock"))) == 1
    assert [p for p in (store.root / "blobs").rglob("*") if p.is_file()] == []
    assert list((store.root / "partial").iterdir()) == []
    assert store.sources.all(("/nonexistent/w", 1, 1, 1, 1)) is None


def test_stats_count(store: Store, tmp_path: Path):
    assert upkeep.stats(store).blobs == 0
    whole, slices, _ = packed(store)
    store.link_out(whole, tmp_path / "m.gguf")
    with store.partial("p", 10):
        stats = upkeep.stats(store)
    assert (stats.blobs, stats.blob_bytes, stats.partials, stats.partial_bytes) == (1, 4000, 1, 10)
    assert (stats.slices, stats.results, stats.outputs) == (len(slices), 0, 1)


@pytest.mark.parametrize("name", ["模" * 83 + ".gguf", "n" * 250 + ".gguf"])
def test_a_name_as_long_as_the_file_system_takes(store: Store, tmp_path: Path, name: str):
    whole, _, data = packed(store)
    store.link_out(whole, tmp_path / name)
    assert (tmp_path / name).read_bytes() == data
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == [name]
