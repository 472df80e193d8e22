"""Other processes: killed ones, waiting ones, ones that make the same thing at the same time."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from store_kit import digest_of, packed

from qbuild import fsutil, upkeep
from qbuild import store as store_module
from qbuild.cache import ActionCache, ActionResult
from qbuild.digest import Digest, digest_bytes
from qbuild.fsutil import FileLock
from qbuild.store import Store

ROOT = Path(__file__).parents[2]
START = "import sys; from pathlib import Path; from qbuild.store import Store; store = Store(Path(sys.argv[1]));"

WRITER = """
import itertools, random
from qbuild.cache import ActionCache, ActionResult
from qbuild.digest import digest_bytes
rng = random.Random(int(sys.argv[2]))
cache = ActionCache(store)
print("ready", flush=True)
for i in itertools.count():
    parts = [rng.randbytes(20_000) for _ in range(6)]
    whole = b"".join(parts)
    with store.partial(f"file-{sys.argv[2]}-{i}", len(whole)) as partial:
        for j, part in enumerate(parts):
            partial.write_at(20_000 * j, part)
            partial.finished(digest_bytes(part), 20_000 * j)
            cache.put(f"{sys.argv[2]} {i} {j}", ActionResult("tensor", (digest_bytes(part),)))
        partial.commit(digest_bytes(whole))
    cache.put(f"{sys.argv[2]} {i}", ActionResult("file", (store.put_bytes(rng.randbytes(9_000)),)))
"""


def start(store: Store, script: str, *args: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", START + script, str(store.root), *args]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT)


def ready(process: subprocess.Popen[str]) -> None:
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"


def kill(process: subprocess.Popen[str]) -> None:
    process.send_signal(signal.SIGKILL)
    process.communicate()


def sound(store: Store) -> None:
    """Every file under blobs/ is what its name says, every row points at the right bytes."""
    for path in (store.root / "blobs").glob("??/*"):
        assert digest_bytes(path.read_bytes()).hash == path.name
        assert path.stat().st_mode & 0o222 == 0
    with store.index.reading() as db:
        assert db.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        slices = [Digest.parse(text) for (text,) in db.execute("SELECT digest FROM slices")]
        keys = [key for (key,) in db.execute("SELECT key FROM results")]
    assert all(store.read_bytes(digest) is not None for digest in slices)
    assert all(ActionCache(store).get(key) is not None for key in keys)
    assert [p for p in upkeep.verify(store, heal=False) if p.kind == "damaged"] == []


def test_killed_writer_leaves_no_blob(store: Store):
    """SIGKILL at random moments, over and over on one store: all of a file is there, or nothing of it."""
    rng = random.Random(7)
    for round_ in range(8):
        process = start(store, WRITER, str(round_))
        ready(process)
        time.sleep(rng.uniform(0.0, 0.12))
        kill(process)
        sound(store)
    assert upkeep.stats(store).results > 8  # work had been done before the kills
    upkeep.gc(store)
    assert upkeep.stats(store).blobs == 0
    assert list((store.root / "partial").iterdir()) == []
    assert [p.name for p in (store.root / "locks").iterdir()] == ["in-use"]


STEPS = ["fsync", "_intend", "rename", "fsync_dir", "_stamp", "_drop_salvage"]


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("after", [False, True])
def test_crash_at_every_step_of_a_commit(store: Store, monkeypatch: pytest.MonkeyPatch, step: str, after: bool):
    """Whatever the step, the slices stay found, and the next run ends with one blob and nothing else."""
    owner = {"fsync": store_module.os, "rename": Path, "fsync_dir": store_module}.get(step, Store)
    real = getattr(owner, step)

    def crash(*args: object) -> None:
        if after:
            real(*args)
        raise SystemExit

    with store.index.reading():  # the store exists before
        pass
    store.index.create()
    with monkeypatch.context() as patch:
        patch.setattr(owner, step, crash)
        with pytest.raises(SystemExit):
            packed(store)
    again = Store(store.root)
    with again.partial("out", 4000):  # the next run takes the file, and is killed before it writes
        pass
    whole = b"".join(digest_of(seed)[0] for seed in range(4))
    for seed in range(4):
        assert again.read_bytes(digest_of(seed)[1]) == digest_of(seed)[0]
    assert packed(again)[0] == digest_bytes(whole)
    assert again.check_blob(digest_bytes(whole))
    assert list(upkeep.verify(again)) == []
    with again.index.reading() as db:
        assert db.execute("SELECT count(*), count(blob), count(partial) FROM files").fetchone() == (1, 1, 0)
        assert db.execute("SELECT count(*) FROM slices").fetchone() == (4,)
    assert list((again.root / "partial").iterdir()) == []
    again.close()


def test_killed_holder_frees_its_locks(store: Store):
    process = start(
        store,
        'p = store.partial("p", 10); lock = store.try_lock("a"); use = store.in_use(); use.__enter__()\n'
        'print("ready", flush=True); import time; time.sleep(60)',
    )
    ready(process)
    assert store.try_lock("a") is None
    assert upkeep.gc(store, dry_run=True).items == ()  # its file is being written
    kill(process)
    held = store.try_lock("a")
    assert held is not None
    held.release()
    with store.partial("p", 10):
        pass
    assert [item.path.name for item in upkeep.gc(store, timeout=1.0).items] == ["p"]


def test_two_processes_one_lock(store: Store):
    """Read, wait, write without the lock loses counts; four processes with it lose none."""
    counter = store.root / "counter"
    script = (
        "counter = store.root / 'counter'\n"
        "import time\n"
        "for _ in range(25):\n"
        "    with store.lock('counter'):\n"
        "        n = int(counter.read_text()); time.sleep(0.0005); counter.write_text(str(n + 1))\n"
    )
    store.index.create()
    counter.write_text("0")
    processes = [start(store, script) for _ in range(4)]
    assert [process.wait(60) for process in processes] == [0] * 4
    for process in processes:
        process.communicate()
    assert counter.read_text() == "100"


def test_waiter_does_not_lock_a_file_its_holder_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Between its open and its flock the holder lets go (and removes the file) and a third one locks a new file."""
    holder, waiter, third = (FileLock(tmp_path / "a.lock") for _ in range(3))
    assert holder.try_acquire()
    real = fsutil.fcntl.flock

    def flock(fd: int, how: int) -> None:
        monkeypatch.undo()
        holder.release()
        assert third.try_acquire()
        real(fd, how)

    monkeypatch.setattr(fsutil.fcntl, "flock", flock)
    assert not waiter.try_acquire()
    third.release()
    assert waiter.try_acquire()
    waiter.release()


def test_second_builder_waits_and_finds_the_result(store: Store):
    whole = b"".join(digest_of(seed)[0] for seed in range(4))
    script = (
        "from qbuild.digest import digest_bytes\n"
        "with store.partial('p', 4000) as partial:\n"
        "    print('ready', flush=True)\n"
        "    data = sys.stdin.buffer.read()\n"
        "    partial.write_at(0, data); partial.commit(digest_bytes(data))\n"
    )
    command = [sys.executable, "-c", START + script, str(store.root)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"

        def go_on() -> None:
            assert not store.has(digest_bytes(whole))
            process.stdin.write(whole)
            process.stdin.close()

        with store.partial("p", 4000, on_wait=go_on) as partial:
            assert store.read_bytes(digest_bytes(whole)) == whole
            assert partial.journal() == []
    assert process.returncode == 0


def test_processes_make_one_store_at_once(tmp_path: Path):
    """All see no store, all create it, all write the same and different things."""
    store = Store(tmp_path / "store")
    script = (
        "from qbuild.cache import ActionCache, ActionResult\n"
        "for i in range(30):\n"
        "    d = store.put_bytes(b'x%d' % (i // 2 * 2 + i % 2 * int(sys.argv[2])))\n"
        "    ActionCache(store).put(f'{sys.argv[2]} {i}', ActionResult('k', (d,)))\n"
    )
    processes = [start(store, script, str(n)) for n in range(5)]
    assert [process.wait(60) for process in processes] == [0] * 5
    for process in processes:
        process.communicate()
    sound(store)
    assert upkeep.stats(store).results == 150
    store.close()


def test_gc_beside_builds_loses_nothing_in_use(store: Store):
    """Two builders, and gc again and again: what a builder made while it holds the store is there until it lets go."""
    script = (
        "import random\n"
        "for i in range(40):\n"
        "    with store.in_use():\n"
        "        made = [store.put_bytes(random.randbytes(100)) for _ in range(3)]\n"
        "        assert all(store.read_bytes(d) for d in made), i\n"
    )
    processes = [start(store, script) for _ in range(2)]
    collected = 0
    while any(process.poll() is None for process in processes):
        collected += len(upkeep.gc(store, timeout=30).items)
    assert [process.wait() for process in processes] == [0, 0]
    for process in processes:
        process.communicate()
    assert collected > 0


def test_reader_survives_the_rename(store: Store):
    """A slice is read by another process, again and again, while its file is committed."""
    data, digest = digest_of(1)
    script = (
        "from qbuild.digest import Digest\n"
        "d = Digest.parse(sys.argv[2]); print('ready', flush=True)\n"
        "for _ in range(1500): assert store.read_bytes(d) is not None\n"
    )
    with store.partial("p", 2000) as partial:
        partial.write_at(0, data)
        partial.finished(digest, 0)
        process = start(store, script, str(digest))
        ready(process)
        time.sleep(0.05)
        partial.commit(digest_bytes(data + bytes(1000)))
    process.communicate(timeout=60)
    assert process.returncode == 0


def test_a_file_that_is_renamed_while_it_is_located_is_found(store: Store, monkeypatch: pytest.MonkeyPatch):
    data, digest = digest_of(1)
    with store.partial("p", 2000) as partial:
        partial.write_at(0, data)
        partial.finished(digest, 0)
        located = store._slices(digest)
        blob = partial.commit(digest_bytes(data + bytes(1000)))
    monkeypatch.setattr(store, "_slices", lambda _digest: located)
    found = store.locate(digest)
    assert found is not None
    assert found.path == blob


def test_store_is_usable_after_a_fork(store: Store):
    """A child gets connections of its own: SQLite's do not survive a fork."""
    digest = store.put_bytes(b"parent")
    parents = {id(db) for db in store.index._free}
    assert parents
    child = os.fork()
    if child == 0:
        try:
            ok = store.read_bytes(digest) == b"parent" and store.put_bytes(b"child") is not None
            with store.index.reading() as db:
                ok = ok and id(db) not in parents
            os._exit(0 if ok else 1)
        finally:
            os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert store.read_bytes(digest_bytes(b"child")) == b"child"
    ActionCache(store).put("k", ActionResult("k", (digest,)))
