"""Killed, crowded and damaged builds. Each ends with the same file that an undisturbed build makes."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import sqlite3
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest


def digest_of(result: dict, target: str = "q4_k_m") -> str:
    return result["targets"][target]["digest"]


@pytest.fixture
def right(elsewhere: Any) -> str:
    """The digest an undisturbed build gives."""
    return digest_of(elsewhere.run())


def test_killed_builds_leave_nothing_wrong_and_the_next_one_goes_on(space: Any, right: str) -> None:
    rng = random.Random(7)
    for _ in range(4):
        space.kill_after(rng.uniform(0.4, 2.0))
        assert not space.output().exists() or digest_of(space.run()) == right
    result = space.run()
    assert digest_of(result) == right
    assert space.run("verify")["problems"] == []


@pytest.mark.slow
def test_kill_9_at_many_random_moments_then_one_build_is_byte_equal(space: Any, right: str) -> None:
    """A build that came through is checked and its store thrown away, so that every kill meets work to do."""
    rng = random.Random(11)
    killed = 0
    while killed < 20:
        if space.kill_after(rng.uniform(0.2, 1.8)):
            killed += 1
            continue
        assert digest_of(space.run()) == right
        shutil.rmtree(space.store)
        shutil.rmtree(space.out)
    assert digest_of(space.run()) == right
    assert space.run("verify")["problems"] == []


@pytest.mark.parametrize("builds", [2, 4])
def test_builds_at_once_on_one_store_do_each_action_once(space: Any, right: str, builds: int) -> None:
    processes = [space.start() for _ in range(builds)]
    results = [json.loads(p.communicate()[0]) for p in processes]
    assert [p.returncode for p in processes] == [0] * builds
    assert {digest_of(r) for r in results} == {right}
    assert sum(r["totals"]["computed"] for r in results) == 29


def test_builds_of_different_targets_at_once_share_their_tensors(space: Any, elsewhere: Any) -> None:
    processes = [space.start(target=t) for t in ("q4_k_m", "q4_k_s")]
    results = [json.loads(p.communicate()[0]) for p in processes]
    assert [p.returncode for p in processes] == [0, 0]
    expected = elsewhere.run(target="target=[gguf/q4_k_m,gguf/q4_k_s]")
    assert sum(r["totals"]["computed"] for r in results) == expected["totals"]["computed"]


def test_a_killed_worker_is_reported_with_predicted_and_observed_memory(space: Any, right: str) -> None:
    source = "import os; from qbuild.actions import stream; stream.Pass.run = lambda self: os.kill(os.getpid(), 9)"
    hook = space.root / "hook"
    hook.mkdir()
    (hook / "sitecustomize.py").write_text(
        f"import sys\nif any('qbuild.worker' in a for a in sys.orig_argv):\n    {source}\n"
    )
    space.env["PYTHONPATH"] = str(hook)
    error = space.run(code=1)["error"]
    assert "SIGKILL" in error["fact"]
    assert "predicted" in error["fact"]
    assert "observed" in error["fact"]
    del space.env["PYTHONPATH"]
    assert digest_of(space.run()) == right


def flip(path: Path, at: int) -> None:
    """Change a byte and put the time stamps back: what a bad disk or a careless editor does."""
    before = path.stat()
    mode = before.st_mode
    path.chmod(0o644)
    with path.open("r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 0x40]))
    path.chmod(mode)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


@pytest.mark.parametrize("link", ["hardlink", "copy"])
def test_flipped_byte_in_the_store_is_found_and_never_served(space: Any, right: str, link: str) -> None:
    space.run(f"store.link={link}")
    blob = max((space.store / "blobs").rglob("*"), key=lambda p: p.stat().st_size if p.is_file() else 0)
    flip(blob, blob.stat().st_size // 2)
    assert space.run("verify", code=1)["problems"]
    space.output().unlink()
    assert digest_of(space.run(f"store.link={link}")) == right
    assert space.run("verify")["problems"] == []


@pytest.mark.parametrize("link", ["hardlink", "copy"])
def test_flipped_byte_in_an_output_is_found_and_mended(space: Any, right: str, link: str) -> None:
    space.run(f"store.link={link}")
    flip(space.output(), space.output().stat().st_size // 2)
    assert space.run("verify", code=1)["problems"]
    assert digest_of(space.run(f"store.link={link}")) == right
    import blake3

    assert blake3.blake3(space.output().read_bytes()).hexdigest() == right.split("/")[0]


def test_damaged_tensor_slice_is_computed_again_not_copied(space: Any, right: str) -> None:
    space.run(target="q4_k_s")
    flip(space.output("Q4_K_S"), space.output("Q4_K_S").stat().st_size // 2)
    assert digest_of(space.run()) == right


def test_metadata_that_is_damaged_in_the_store_is_made_again_not_left_out(space: Any, right: str) -> None:
    space.run(target="q4_k_s")
    with contextlib.closing(sqlite3.connect(space.store / "index.sqlite")) as db:
        query = "SELECT outputs FROM results WHERE kind = 'gguf.metadata'"
        (digest,) = json.loads(db.execute(query).fetchone()[0])
    flip(next(path for path in (space.store / "blobs").glob("*/*") if path.name in digest), 20)
    assert digest_of(space.run()) == right


def small_tmpfs(folder: Path, size: str) -> bool:
    folder.mkdir()
    return (
        subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], capture_output=True
        ).returncode
        == 0
    )


@pytest.fixture
def mounted(tmp_path: Path):
    folders: list[Path] = []

    def mount(size: str) -> Path:
        folder = tmp_path / f"mount{len(folders)}"
        if sys.platform != "linux" or not small_tmpfs(folder, size):
            pytest.skip("mounting a tmpfs needs root")
        folders.append(folder)
        return folder

    yield mount
    for folder in folders:
        subprocess.run(["umount", "-l", str(folder)], check=False)


def test_disk_too_small_is_refused_before_anything_is_written(space: Any, mounted) -> None:
    space.store = mounted("1m") / "store"
    error = space.run(code=3)["error"]
    assert "disk" in error["fact"]
    assert not list(space.store.rglob("*.gguf"))


def test_disk_that_fills_up_fails_clearly_and_the_next_run_goes_on(space: Any, mounted, right: str) -> None:
    folder = mounted("6m")
    space.store, ballast = folder / "store", folder / "ballast"
    ballast.write_bytes(bytes(5 << 20))
    error = space.run("budget.disk=1GiB", code=1)["error"]
    assert "full" in error["fact"]
    ballast.unlink()
    assert digest_of(space.run()) == right


def test_read_only_store_says_what_to_do(space: Any, mounted) -> None:
    folder = mounted("16m")
    space.store = folder / "store"
    space.run(target="q8_0")
    subprocess.run(["mount", "-o", "remount,ro", str(folder)], check=True)
    error = space.run(code=1)["error"]
    assert "store.dir=" in error["remedy"]


def test_out_that_cannot_be_written_says_what_to_do(space: Any) -> None:
    space.out = space.root / "file"
    space.out.write_text("not a folder")
    error = space.run(code=2)["error"]
    assert (error["place"], error["fact"]) == (str(space.out), "is no folder that can be written")
    assert "out=" in error["remedy"]
    assert not space.store.exists()  # before any work
    space.out = space.root / "fine"
    space.run()
    space.out = space.root / "file" / "below"
    assert "cannot be written" in space.run(code=2)["error"]["fact"]  # all is stored, and cannot be placed


@pytest.mark.skipif(os.geteuid() != 0, reason="to others /proc is a folder that cannot be written")
@pytest.mark.parametrize("place", ["out", "store"])
def test_a_place_without_a_free_byte_is_named(space: Any, place: str) -> None:
    setattr(space, place, Path("/proc/qbuild"))
    error = space.run(code=3)["error"]
    assert (error["place"], error["fact"]) == ("/proc/qbuild", "nothing is free on its file system")
    assert {"out": "out=", "store": "store.dir="}[place] in error["remedy"]
