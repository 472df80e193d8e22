"""The recorded null build: answered without Hydra or numpy, and never when anything could have changed."""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from qbuild import fastpath, schema
from qbuild.cli import nullbuild

ARGV = ["model.source=m", "target=gguf/q4_k_m"]
TINY = Path(__file__).parent.parent / "data" / "tiny-llama"
LATER = 10**19  # began after everything had settled


@pytest.fixture
def recorded(project: Path) -> Path:
    for name in ("model.safetensors", "output.gguf"):
        (project / name).write_bytes(b"bytes")
    assert record(project)
    return project


def record(project: Path, began: int = LATER) -> bool:
    inputs = [str(project / "model.safetensors"), *fastpath.tree(str(project / "conf"))]
    return fastpath.record(ARGV, str(project), inputs, [str(project / "output.gguf")], "nothing to do\n", began)


def test_an_untouched_build_is_answered(recorded: Path) -> None:
    assert fastpath.answer(ARGV, str(recorded)) == "nothing to do\n"


def test_another_command_or_folder_is_not(recorded: Path) -> None:
    assert fastpath.answer([*ARGV, "-B"], str(recorded)) is None
    assert fastpath.answer(ARGV, str(recorded / "elsewhere")) is None


def test_another_python_or_version_is_not(recorded: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fastpath, "__version__", "99")
    assert fastpath.answer(ARGV, str(recorded)) is None


@pytest.mark.parametrize("name", ["model.safetensors", "output.gguf"])
@pytest.mark.parametrize("how", ["rewritten", "touched", "replaced", "removed", "same size and time"])
def test_a_file_that_changed_in_any_way_is_noticed(recorded: Path, name: str, how: str) -> None:
    path = recorded / name
    before = path.stat()
    if how == "rewritten":
        path.write_bytes(b"other bytes")
    elif how == "touched":
        os.utime(path)
    elif how == "replaced":
        other = recorded / "other"
        other.write_bytes(b"bytes")
        other.replace(path)
    elif how == "removed":
        path.unlink()
    else:
        time.sleep(0.02)
        path.write_bytes(b"BYTES")
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert fastpath.answer(ARGV, str(recorded)) is None


def test_a_new_configuration_folder_is_noticed(recorded: Path) -> None:
    (recorded / "conf").mkdir()
    assert fastpath.answer(ARGV, str(recorded)) is None


def test_a_file_added_to_a_configuration_folder_is_noticed(recorded: Path) -> None:
    (recorded / "conf" / "target").mkdir(parents=True)
    assert record(recorded)
    (recorded / "conf" / "target" / "new.yaml").touch()
    assert fastpath.answer(ARGV, str(recorded)) is None


def test_an_input_that_may_still_be_changing_is_not_recorded(recorded: Path) -> None:
    assert not record(recorded, began=time.time_ns())


def test_a_missing_output_is_not_recorded(recorded: Path) -> None:
    (recorded / "output.gguf").unlink()
    assert not record(recorded)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"asked": 1}'])
def test_a_damaged_record_is_ignored(recorded: Path, tmp_path: Path, text: str) -> None:
    for path in (tmp_path / "cache").rglob("*.json"):
        path.write_text(text)
    assert fastpath.answer(ARGV, str(recorded)) is None


def test_a_cache_that_cannot_be_written_is_no_error(project: Path, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file where a folder should be")
    (project / "model.safetensors").touch()
    (project / "output.gguf").touch()
    assert not record(project)
    assert fastpath.answer(ARGV, str(project)) is None


@pytest.mark.parametrize(
    "config",
    [
        schema.Config(model=schema.Model(source="org/model")),  # the Hub: it may have moved on
        schema.Config(model=schema.Model(source="pkg://no_such_package_here/x.gguf")),
        schema.Config(model=schema.Model(source="."), rebuild=True),
        schema.Config(),
    ],
)
def test_what_stats_cannot_tell_is_not_recorded(project: Path, config: schema.Config) -> None:
    assert nullbuild.inputs(config, ()) is None


def test_the_files_of_a_model_folder_and_the_shards_of_a_split_gguf_are_watched(project: Path) -> None:
    for name in ("m-00001-of-00002.gguf", "m-00002-of-00002.gguf", "other.gguf"):
        (project / name).touch()
    folder = nullbuild.inputs(schema.Config(model=schema.Model(source=".")), ())
    split = nullbuild.inputs(schema.Config(model=schema.Model(source="m-00001-of-00002.gguf")), ())
    assert folder is not None
    assert len(folder) == 4
    assert split == ["m-00001-of-00002.gguf", "m-00002-of-00002.gguf"]


def test_the_texts_of_a_folder_are_watched_one_by_one(project: Path) -> None:
    (project / "texts").mkdir()
    (project / "texts" / "a.txt").write_text("A text.")
    texts = schema.CalibrationConf(source="texts")
    model = schema.Model(source=".")
    config = schema.Config(model=model, targets={"imatrix": schema.ImatrixTarget()}, calibration=texts)
    found = nullbuild.inputs(config, ())
    assert found is not None
    assert {"texts", "texts/a.txt"}.issubset(found)


def test_the_recorded_document_says_that_nothing_ran() -> None:
    needs = {"peak_ram": 7, "predicted_ram": 8, "peak_vram": 5, "predicted_vram": 6}
    target = {"verdicts": {"run": 20, "hit": 9}, "seconds": 3.0, "digest": "d/1"} | needs
    measured = {"a": {"kl": 0.5}}
    evaluation = needs | {"verdicts": {"run": 1}, "seconds": 2.0, "targets": measured}
    document = {"targets": {"a": target}, "evaluation": evaluation, "jobs": {"gguf pass": needs}}
    document |= {"totals": {"computed": 20, "seconds": {"read": 1.0}}}
    null = nullbuild.as_null(document)
    idle = {"seconds": 0.0} | dict.fromkeys(needs, 0)
    assert null["targets"]["a"] == target | idle | {"verdicts": {"hit": 29}}
    assert null["evaluation"] == idle | {"verdicts": {"hit": 1}, "targets": measured}
    assert null["totals"] == {"computed": 0, "seconds": {}}
    assert null["jobs"] == {}


def test_it_is_answered_before_anything_heavy_is_imported(recorded: Path, record_property: Any) -> None:
    """In a process of its own, as a user runs it. The CPU time is shown, not judged: machines differ."""
    code = (
        "import json, sys; sys.argv[1:] = json.loads(sys.argv[1]); from qbuild.__main__ import main; code = main();"
        "print(json.dumps(sorted(sys.modules)), file=sys.stderr); sys.exit(code)"
    )
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, "-c", code, json.dumps(ARGV)], capture_output=True, text=True, check=True, cwd=recorded
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = 1000 * (after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    print(f"null build: {cpu:.0f} ms of CPU")
    assert done.stdout == "nothing to do\n"
    modules = {name.partition(".")[0] for name in json.loads(done.stderr)}
    assert modules.isdisjoint({"hydra", "omegaconf", "numpy", "numba", "torch", "transformers", "rich", "yaml"})


def run(folder: Path, *argv: str) -> subprocess.CompletedProcess[str]:
    command = [
        sys.executable,
        "-m",
        "qbuild",
        "model.source=model",
        "target=gguf/q8_0",
        "+targets.q4_0.pure=true",
        *argv,
    ]
    return subprocess.run(command, capture_output=True, check=True, cwd=folder, text=True)


def test_the_answer_of_a_record_is_that_of_a_real_null_build(project: Path, tmp_path: Path) -> None:
    """The whole way: a build, its record, and the same command on the long way."""
    shutil.copytree(TINY, project / "model", copy_function=shutil.copyfile)
    settled = time.time() - 60
    for path in [*(project / "model").iterdir(), project / "model"]:
        os.utime(path, (settled, settled))
    begun = run(project, "format=json")
    first = json.loads(begun.stdout)
    if not (records := list((tmp_path / "cache" / "qbuild" / "null").glob("*.json"))):
        time.sleep(2.5)  # the change times of the copies had not settled: the second build is recorded
        run(project, "format=json")
        records = list((tmp_path / "cache" / "qbuild" / "null").glob("*.json"))
    assert len(records) == 1
    answered = json.loads(run(project, "format=json").stdout)
    records[0].unlink()
    long_way = json.loads(run(project, "format=json").stdout)
    for document in (first, answered, long_way):
        document["totals"].pop("wall_seconds")
    assert answered == long_way == nullbuild.as_null(first)
    told = "notice: targets: set, but not chosen: q4_0\n  chosen: q8_0\n"
    assert begun.stderr.startswith(told)  # before it begins; where nothing has to, in the answer
    null = run(project)
    assert null.stdout.endswith(f"nothing to do\n\n{told}")
    assert null.stderr == ""


def test_an_input_below_a_file_counts_as_missing(project: Path) -> None:
    (project / "file").write_bytes(b"")
    assert fastpath.record(ARGV, str(project), [str(project / "file" / "inside")], [], "text", LATER)
