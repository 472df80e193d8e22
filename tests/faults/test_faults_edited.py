"""Files that are edited while a build runs: nothing is kept under the digest of bytes that it was not made of."""

from __future__ import annotations

import json
import shutil
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from conftest import Done, Run

from qbuild import recipe, worker

DATA = Path(__file__).parent.parent / "data"
WORDS = ("calibration.samples=4", "calibration.length=64", "evaluation.samples=2", "evaluation.length=64")
FIT = ("target=gguf/fit", "targets.fit.max_size=1750000", "targets.fit.types=[Q4_K,Q8_0]")


@pytest.fixture
def folder(project: Path) -> Path:
    shutil.copytree(DATA / "tiny-llama", project / "tiny-llama")
    shutil.copy(DATA / "tiny-llama-imatrix.gguf", project / "matrix.gguf")
    (project / "text.txt").write_text("\n".join(f"Section {n}: how {n * n} things are told apart." for n in range(160)))
    return project


def build(qbuild: Run, folder: Path, *words: str) -> Done:
    text = f"calibration.source={folder}/text.txt"
    return qbuild(f"model.source={folder}/tiny-llama", text, f"store.dir={folder}/store", "format=json", *WORDS, *words)


def edit(path: Path) -> None:
    """Weights of the first layer and of the last norm, the last number of a matrix, a line more of anything else."""
    data = bytearray(path.read_bytes())
    if path.suffix == ".safetensors":
        length = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + length])
        for name in ("model.layers.0.mlp.up_proj.weight", "model.norm.weight"):
            data[8 + length + header[name]["data_offsets"][0]] ^= 1
    elif path.suffix == ".gguf":
        data[-1] ^= 1
    else:
        data += b"\n"
    path.write_bytes(data)


def test_weights_that_are_laid_out_anew_before_the_pass_are_not_read_where_they_were(
    qbuild: Run, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two matrices of one shape change places: without a look at the header, they would change names."""
    path, run = folder / "tiny-llama" / "model.safetensors", worker.run

    def replacing(job: worker.Job, on_event: worker.Emit) -> worker.Done:
        if job.kind == "gguf.pass":
            up, gate, other = b"layers.0.mlp.up_proj", b"layers.0.mlp.gate_proj", b"for a moment"
            path.write_bytes(path.read_bytes().replace(up, other).replace(gate, up).replace(other, gate))
        return run(job, on_event)

    monkeypatch.setattr(worker, "run", replacing)
    done = build(qbuild, folder, "target=gguf/bf16")
    assert done.code == 4
    assert done.error["fact"] == "its header changed after it was hashed"


@contextmanager
def edited_before(monkeypatch: pytest.MonkeyPatch, kind: str, path: Path) -> Iterator[None]:
    """``path`` changes when a job of ``kind`` is about to begin, and is what it was again afterwards."""
    run, kept = worker.run, path.read_bytes()

    def editing(job: worker.Job, on_event: worker.Emit) -> worker.Done:
        if job.kind == kind:
            edit(path)
        return run(job, on_event)

    with monkeypatch.context() as patch:
        patch.setattr(worker, "run", editing)
        yield
    assert path.read_bytes() != kept, f"no job of {kind} ran"
    path.write_bytes(kept)


def forget(folder: Path, *kinds: str) -> None:
    with sqlite3.connect(folder / "store" / "index.sqlite") as db:
        for kind in kinds:
            assert db.execute("DELETE FROM results WHERE kind = ?", (kind,)).rowcount, f"nothing of {kind} was stored"


def results(folder: Path, kind: str) -> int:
    with sqlite3.connect(folder / "store" / "index.sqlite") as db:
        return int(db.execute("SELECT count(*) FROM results WHERE kind = ?", (kind,)).fetchone()[0])


def refused(done: Done, path: Path) -> None:
    assert done.code == 4, done.out + done.err
    assert done.error["place"] == str(path)
    assert "changed after it was hashed" in done.error["fact"]


@pytest.mark.parametrize(
    ("kind", "name", "words"),
    [
        ("gguf.metadata", "tiny-llama/tokenizer.json", ["target=gguf/bf16"]),
        ("calibration.tokens", "text.txt", ["target=imatrix"]),
    ],
)
def test_a_file_that_changes_between_its_digest_and_its_use_stores_nothing(
    qbuild: Run, folder: Path, monkeypatch: pytest.MonkeyPatch, kind: str, name: str, words: list[str]
) -> None:
    with edited_before(monkeypatch, kind, folder / name):
        done = build(qbuild, folder, *words)
    refused(done, folder / name)
    assert results(folder, kind) == 0


def test_a_config_that_changes_before_it_is_hashed_is_not_taken_for_the_one_that_was_read(
    qbuild: Run, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, opened = folder / "tiny-llama" / "config.json", recipe.open_model

    def editing(*words: Any, **more: Any) -> Any:
        found = opened(*words, **more)
        edit(path)
        return found

    monkeypatch.setattr(recipe, "open_model", editing)
    refused(build(qbuild, folder, "target=gguf/bf16"), path)
    assert results(folder, "gguf.file") == 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "kinds", "words"),
    [
        ("tiny-llama/tokenizer_config.json", ["calibration.tokens", "calibration.imatrix"], ["target=imatrix"]),
        ("tiny-llama/model.safetensors", ["calibration.statistics", "calibration.imatrix"], ["target=imatrix"]),
        ("tiny-llama/model.safetensors", ["quant.layer", "checkpoint.directory"], ["target=awq/w4_g64"]),
        ("tiny-llama/model.safetensors", ["checkpoint.directory"], ["target=awq/w4_g64"]),
        ("tiny-llama/tokenizer_config.json", ["checkpoint.directory"], ["target=awq/w4_g64"]),
        ("tiny-llama/model.safetensors", ["quant.propagated", "checkpoint.directory"],
         ["target=awq/w4_g64", "targets.awq_w4_g64.propagate=true"]),
        ("tiny-llama/model.safetensors", ["evaluation.result"], ["target=gguf/q4_0", "evaluation.source=text.txt"]),
        ("tiny-llama/model.safetensors", ["calibration.sensitivity", "gguf.damage", "gguf.choice", "gguf.file"], FIT),
        ("matrix.gguf", ["gguf.damage", "gguf.choice", "gguf.file"], [*FIT, "targets.fit.imatrix=matrix.gguf"]),
        ("matrix.gguf", ["gguf.choice", "gguf.file"], [*FIT, "targets.fit.imatrix=matrix.gguf"]),
    ],
)  # fmt: skip
def test_every_job_looks_at_what_it_reads(
    qbuild: Run, folder: Path, monkeypatch: pytest.MonkeyPatch, name: str, kinds: list[str], words: list[str]
) -> None:
    right = build(qbuild, folder, *words)
    assert right.code == 0, right.out + right.err
    forget(folder, *kinds)
    with edited_before(monkeypatch, kinds[0], folder / name):
        done = build(qbuild, folder, *words, "keep_going=true")  # another command line: not the null build
    refused(done, folder / name if "/" in name else Path(name))
    assert results(folder, kinds[0]) == 0
    again = build(qbuild, folder, *words, "keep_going=true")
    assert again.code == 0, again.out + again.err
    made, anew = (next(iter(done.document["targets"].values())) for done in (right, again))
    assert made["digest"] == anew["digest"]


@pytest.mark.slow
def test_a_text_that_is_edited_before_targets_are_measured_on_it_is_told(
    qbuild: Run, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with edited_before(monkeypatch, "gguf.pass", folder / "text.txt"):
        done = build(qbuild, folder, "target=gguf/bf16", "evaluation.source=text.txt")
    refused(done, folder / "text.txt")


@pytest.mark.slow
def test_weights_that_changed_and_kept_their_time_stamps_are_refused_once(qbuild: Run, folder: Path) -> None:
    words, path = ["target=imatrix"], folder / "tiny-llama" / "model.safetensors"
    assert build(qbuild, folder, *words).code == 0
    forget(folder, "calibration.statistics", "calibration.imatrix")
    edit(path)
    with sqlite3.connect(folder / "store" / "index.sqlite") as db:  # as if the disk, not a program, had changed them
        found = path.stat()
        now = (found.st_mtime_ns, found.st_ctime_ns, found.st_ino)
        assert db.execute("UPDATE sources SET mtime_ns = ?, ctime_ns = ?, inode = ?", now).rowcount == 1
        db.execute("UPDATE source_digests SET recorded_ns = ?", (found.st_ctime_ns + 10**9,))
    refused(build(qbuild, folder, *words, "keep_going=true"), path)  # another command line: not the null build
    again = build(qbuild, folder, *words, "keep_going=true")
    assert again.code == 0, again.out + again.err
    assert again.document["totals"]["actions"]["calibration.statistics"] == 3


@pytest.mark.slow
def test_a_text_that_joins_a_folder_during_the_pass_is_told(
    qbuild: Run, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts, run = folder / "texts", worker.run
    texts.mkdir()
    (folder / "text.txt").rename(texts / "a.txt")

    def adding(job: worker.Job, on_event: worker.Emit) -> worker.Done:
        (texts / "b.txt").write_text("one more")
        return run(job, on_event)

    monkeypatch.setattr(worker, "run", adding)
    refused(build(qbuild, folder, "target=imatrix", f"calibration.source={texts}"), texts / "b.txt")


@pytest.mark.parametrize("name", ["text.txt", pytest.param("tiny-llama/model.safetensors", marks=pytest.mark.slow)])
def test_a_file_that_is_edited_when_it_is_not_read_any_more_ends_the_build_with_an_error_and_loses_nothing(
    qbuild: Run, folder: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    with edited_before(monkeypatch, "calibration.imatrix", folder / name):
        done = build(qbuild, folder, "target=imatrix")
    refused(done, folder / name)
    again = build(qbuild, folder, "target=imatrix")
    assert again.code == 0
    assert again.document["totals"]["actions"] == {}
