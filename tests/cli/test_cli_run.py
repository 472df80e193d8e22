"""Running commands: exit codes, one JSON document, sweeps, completion, and what a crash looks like.

The engine is replaced here; tests/faults runs it.
"""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
from conftest import Run

from qbuild import errors, schema
from qbuild.cli import multirun, verbs
from qbuild.cli.runner import Outcome
from qbuild.progress import Sink

MEASURED = {"perplexity": 8.5, "perplexity_llama": 8.0, "kl": 0.25, "top1": 0.75, "tokens": 40, "weights": {}}
MEASURED |= {"source_perplexity": 8.25, "source_perplexity_llama": 7.75}


def built(config: schema.Config) -> dict[str, Any]:
    """A build.json as the engine writes it."""
    target = {
        "bytes": 1870400,
        "bits_per_weight": 5.19,
        "seconds": 0.5,
        "peak_ram": 9 << 20,
        "predicted_ram": 9 << 20,
    } | {"verdicts": {"run": 3}}
    targets = {
        name: target | {"path": str(Path("outputs/m", f"m-{name}.gguf").absolute()), "digest": "d/1"}
        for name in config.targets
    }
    totals = {"computed": 3, "reused": 0, "read_bytes": 10, "written_bytes": 10, "seconds": {}, "wall_seconds": 0.5}
    model = {"name": "m", "source": "x", "revision": None, "files": {}, "inputs": "d/2"}
    needed = {"seconds": 1.5, "peak_ram": 7 << 20, "predicted_ram": 8 << 20, "peak_vram": 0, "predicted_vram": 0}
    needed |= {"verdicts": {"run": len(targets)}}
    measured = {"source": "t", "targets": dict.fromkeys(targets, MEASURED)} | needed
    evaluation = None if config.evaluation.source is None else measured
    jobs = {"gguf pass": {"predicted_ram": 9 << 20, "peak_ram": 9 << 20, "seconds": 0.5}}
    beside = {"evaluation": evaluation, "notices": [], "totals": totals, "jobs": jobs, "versions": {"qbuild": "0"}}
    return {"model": model, "targets": targets, **beside}


class Engine:
    """What the fake engine was asked for, and what it is to raise."""

    def __init__(self) -> None:
        self.configs: list[schema.Config] = []
        self.error: BaseException | None = None
        self.only: str | None = None  # fail for this target alone
        self.planned: list[schema.Config] = []
        self.disk = 1 << 20  # what a plan says that it needs of 3 MiB

    def build(self, config: schema.Config, sink: Sink, _since: int) -> dict[str, Any]:
        self.configs.append(config)
        sink.message("info", "building")
        print("a library that talks")
        if self.error is not None and self.only in (None, *config.targets):
            raise self.error
        return built(config)

    def plan(self, request: verbs.Request) -> verbs.Answer:
        self.planned.append(request.config)
        needs = {"ram": 5 << 20, "vram": 0, "disk": self.disk, "read_bytes": 7, "seconds": 2.0}
        return verbs.Answer(
            {"predicted": needs, "budget": {"disk": 3 << 20}, "targets": dict.fromkeys(request.config.targets)},
            "a plan\n",
        )


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> Engine:
    fake = Engine()
    monkeypatch.setattr(verbs.execute, "build", fake.build)
    monkeypatch.setattr(verbs, "planned", fake.plan)
    return fake


TARGET = ("model.source=x", "target=gguf/q4_k_m")


def test_build_is_the_default(qbuild: Run, engine: Engine) -> None:
    done = qbuild(*TARGET)
    assert done.code == 0
    assert "outputs/m/m-q4_k_m.gguf" in done.out
    assert engine.configs[0].model.source == "x"


@pytest.mark.parametrize("argv", [("build",), ()])
def test_switches_reach_the_configuration(qbuild: Run, engine: Engine, argv: tuple[str, ...]) -> None:
    qbuild(*argv, *TARGET, "-kB", "-j", "3")
    config = engine.configs[0]
    assert (config.keep_going, config.rebuild, config.budget.threads) == (True, True, 3)


def test_json_is_one_document_even_where_a_library_prints(qbuild: Run, engine: Engine) -> None:
    done = qbuild(*TARGET, "format=json")
    assert done.document["targets"]["q4_k_m"]["bytes"] == 1870400
    assert "a library that talks" in done.err


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (errors.ActionFailed("a", "b", "c"), 1),
        (errors.StoreError("a", "b", "c"), 1),
        (errors.ConfigError("a", "b", "c"), 2),
        (errors.BudgetRefused("a", "b", "c"), 3),
        (errors.InputError("a", "b", "c"), 4),
        (errors.Interrupted("a", "b", "c"), 130),
        (KeyboardInterrupt(), 130),
    ],
)
def test_each_error_has_its_exit_code_in_text_and_json(
    qbuild: Run, engine: Engine, error: BaseException, code: int
) -> None:
    engine.error = error
    text, document = qbuild(*TARGET), qbuild(*TARGET, "format=json")
    assert text.code == document.code == document.error["exit_code"] == code
    assert "Traceback" not in text.err
    assert "qbuild: " in text.err
    assert "a library" in text.out


def test_a_bug_says_so_and_shows_where(qbuild: Run, engine: Engine) -> None:
    engine.error = ZeroDivisionError("division by zero")
    done = qbuild(*TARGET, "format=json")
    assert done.code == 1
    assert done.error["place"] == "BUG"
    assert "Traceback" in done.err
    assert "in build" in done.err


def test_sigterm_ends_a_build_like_ctrl_c(qbuild: Run, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verbs.execute, "build", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    assert qbuild(*TARGET).code == 130


def test_a_sweep_is_one_build_for_each_model(qbuild: Run, engine: Engine) -> None:
    done = qbuild("-m", "model.source=x,y", "target=gguf/q4_k_m,gguf/q8_0")
    assert done.code == 0
    assert [(*c.targets, c.model.source) for c in engine.configs] == [
        ("q4_k_m", "q8_0", "x"), ("q4_k_m", "q8_0", "y"),
    ]  # fmt: skip
    assert engine.planned == engine.configs  # all of it is priced before the first one starts
    assert "4 of 4 jobs done" in done.out


def test_jobs_that_differ_in_calibration_are_builds_with_names_of_their_own(qbuild: Run, engine: Engine) -> None:
    argv = ("-m", "model.source=x", "target=awq/w4_g64,gguf/q8_0", "calibration.samples=8,16", "format=json")
    done = qbuild(*argv).document
    named = {"awq_w4_g64-samples-8": "AWQ-w4-g64-samples-8", "awq_w4_g64-samples-16": "AWQ-w4-g64-samples-16"}
    # What does not depend on the calibration is one target, in the first of the builds.
    assert [list(c.targets) for c in engine.configs] == [["awq_w4_g64-samples-8", "q8_0"], ["awq_w4_g64-samples-16"]]
    assert {n: t.suffix for c in engine.configs for n, t in c.targets.items()} == named | {"q8_0": None}
    assert [c.calibration.samples for c in engine.configs] == [8, 16]
    assert [list(job["result"]["targets"]) for job in done["jobs"]] == [["awq_w4_g64"]] * 2 + [["q8_0"]] * 2


def test_a_model_converted_in_two_ways_gets_two_files(qbuild: Run, engine: Engine) -> None:
    qbuild("-m", "model.source=x", "target=gguf/q8_0", "model.outtype=auto,F16")
    assert [list(c.targets) for c in engine.configs] == [["q8_0-outtype-auto"], ["q8_0-outtype-F16"]]


def test_two_models_in_one_folder_are_refused(qbuild: Run, engine: Engine) -> None:
    done = qbuild("-m", "model.source=x,y", "target=gguf/q8_0", "out=made", "format=json")
    assert done.code == 2
    assert "different models" in done.error["fact"]
    assert engine.configs == []


def test_a_sweep_that_the_disk_cannot_hold_is_refused_before_it_starts(qbuild: Run, engine: Engine) -> None:
    engine.disk = 2 << 20  # each build fits, both do not
    done = qbuild("-m", "model.source=x,y", "target=gguf/q8_0", "format=json")
    assert done.code == 3
    assert "4.0 MiB of disk, the budget is 3.0 MiB" in done.error["fact"]
    assert engine.configs == []


def test_a_plan_of_a_sweep_ends_with_what_all_of_it_needs(qbuild: Run, engine: Engine) -> None:
    argv = ("-n", "-m", "model.source=x,y", "target=gguf/q8_0,gguf/q4_k_m")
    total = qbuild(*argv, "format=json").document["total"]
    assert total == {
        "ram": 5 << 20, "vram": 0, "disk": 2 << 20, "read_bytes": 14, "seconds": 4.0, "jobs": 4, "failed": 0,
    }  # fmt: skip
    assert qbuild(*argv).out.endswith("RAM 5.0 MiB at most, disk 2.0 MiB, reads 14 B, about 4.0 s\n")


def test_builds_of_a_sweep_in_one_folder_leave_one_record(qbuild: Run, engine: Engine, project: Path) -> None:
    argv = ("-m", "model.source=x", "target=awq/w4_g64", "calibration.samples=8,16", "evaluation.source=t")
    assert qbuild(*argv, "format=json").code == 0
    record = json.loads((project / "outputs" / "m" / "build.json").read_text())
    names = ["awq_w4_g64-samples-8", "awq_w4_g64-samples-16"]
    assert list(record["targets"]) == list(record["evaluation"]["targets"]) == names
    assert record["totals"]["computed"] == 6
    told = {key: record["evaluation"][key] for key in ("verdicts", "seconds", "peak_ram")}
    assert told == {"verdicts": {"run": 2}, "seconds": 3.0, "peak_ram": 7 << 20}
    assert list(record["jobs"]) == ["gguf pass", "2: gguf pass"]


def test_a_sweep_over_a_setting_gives_each_value_a_file_of_its_own(qbuild: Run, engine: Engine) -> None:
    argv = ("-m", "model.source=x", "target=gguf/q4_k_m", "targets.q4_k_m.pure=true,false", "format=json")
    jobs = qbuild(*argv).document["jobs"]
    assert [list(c.targets) for c in engine.configs] == [["q4_k_m-pure-True", "q4_k_m-pure-False"]]
    assert [t.suffix for t in engine.configs[0].targets.values()] == ["Q4_K_M-pure-True", "Q4_K_M-pure-False"]
    paths = [job["result"]["targets"]["q4_k_m"]["path"] for job in jobs]
    assert len(set(paths)) == 2


def test_a_target_that_several_jobs_want_is_made_once(qbuild: Run, engine: Engine) -> None:
    argv = ("-m", "model.source=x", "target=gguf/q4_k_m,[gguf/q4_k_m,gguf/q8_0]", "format=json")
    jobs = qbuild(*argv).document["jobs"]
    assert [list(c.targets) for c in engine.configs] == [["q4_k_m", "q8_0"]]
    assert [list(job["result"]["targets"]) for job in jobs] == [["q4_k_m"], ["q4_k_m", "q8_0"]]


def test_a_target_that_fails_leaves_the_others_of_its_build_where_told_to_go_on(qbuild: Run, engine: Engine) -> None:
    engine.error, engine.only = errors.ActionFailed("worker", "was killed"), "q8_0"
    argv = ("-k", "model.source=x", "target=[gguf/q8_0,gguf/q4_k_m]")
    done = qbuild(*argv, "format=json")
    assert done.code == 1
    assert list(done.document["targets"]) == ["q4_k_m"]
    assert done.document["failed"]["q8_0"]["fact"] == "was killed"
    assert "\nq8_0 failed: worker: was killed\n" in qbuild(*argv).out
    assert qbuild(*argv[1:], "format=json").error["fact"] == "was killed"  # and one alone without -k


def test_where_all_targets_fail_each_error_is_told(
    qbuild: Run, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(config: schema.Config, *_: Any) -> None:
        name = next(iter(config.targets))
        raise errors.InputError(f"targets.{name}", f"{name} is bad", "mend it")

    monkeypatch.setattr("qbuild.execute.build", fail)
    done = qbuild("-k", "model.source=x", "target=[gguf/q8_0,gguf/q4_k_m]", "format=json")
    assert done.code == 4
    assert {name: found["fact"] for name, found in done.document["failed"].items()} == {
        "q8_0": "q8_0 is bad", "q4_k_m": "q4_k_m is bad",
    }  # fmt: skip
    said = qbuild("-k", "model.source=x", "target=[gguf/q8_0,gguf/q4_k_m]").err
    assert "q8_0 is bad" in said
    assert "q4_k_m is bad" in said


@pytest.mark.parametrize(
    "argv", [("-k", "target=[gguf/q8_0,gguf/q4_k_m]"), ("-k", "-m", "target=gguf/q8_0,gguf/q4_k_m")]
)
def test_an_interrupt_after_a_failure_is_told_as_an_interrupt(
    qbuild: Run, engine: Engine, monkeypatch: pytest.MonkeyPatch, argv: tuple[str, ...]
) -> None:
    def stop(config: schema.Config, *_: Any) -> None:
        if list(config.targets) == ["q4_k_m"]:
            raise KeyboardInterrupt
        raise errors.ActionFailed("targets.q8_0", "was killed")

    monkeypatch.setattr("qbuild.execute.build", stop)
    assert qbuild("model.source=x", *argv).code == 130


def launched(*digests: str) -> Any:
    """What a launcher brought back of as many jobs that wrote one file."""
    config = schema.Config(targets={"q8_0": schema.GgufTarget()})
    documents = [built(config) for _ in digests]
    for document, digest in zip(documents, digests, strict=True):
        document["targets"]["q8_0"]["digest"] = digest
    return multirun._launched([(("x",), Outcome(document, "", 0)) for document in documents])


def test_a_launchers_job_whose_file_another_overwrote_has_failed(project: Path) -> None:
    assert [job["exit_code"] for job in launched("a/1", "b/1", "b/1").document["jobs"]] == [2, 0, 0]
    assert launched("a/1", "b/1").code == 2
    assert launched("a/1", "a/1").text == "2 of 2 jobs done\nall of it: read 20 B, wrote 20 B\n"


def test_a_sweep_is_one_json_document(qbuild: Run, engine: Engine) -> None:
    engine.error, engine.only = errors.InputError("targets.q8_0", "b"), "q8_0"
    argv = ("-m", "-k", "model.source=x", "target=gguf/q8_0,gguf/q4_k_m,gguf/q6_k", "format=json")
    done = qbuild(*argv)
    jobs = done.document["jobs"]
    assert done.code == 4
    assert [job["exit_code"] for job in jobs] == [4, 0, 0]
    assert jobs[0]["error"]["fact"] == "b"
    assert "target=gguf/q8_0" in jobs[0]["overrides"]
    assert jobs[1]["result"]["targets"].keys() == {"q4_k_m"}
    assert [list(c.targets) for c in engine.configs] == [["q8_0", "q4_k_m", "q6_k"], ["q4_k_m", "q6_k"]]
    assert done.document["total"] | {"jobs": 3, "failed": 1, "computed": 3} == done.document["total"]
    said = " ".join(qbuild(*argv[:-1]).out.split())
    assert "2 of 3 jobs done [1/3] model.source=x target=gguf/q8_0 keep_going=True: targets.q8_0: b (exit" in said


def test_a_failure_that_names_no_target_is_found_by_trying_the_jobs_alone(qbuild: Run, engine: Engine) -> None:
    engine.error, engine.only = errors.ActionFailed("worker", "was killed"), "q8_0"
    done = qbuild("-m", "-k", "model.source=x", "target=gguf/q8_0,gguf/q4_k_m", "format=json")
    assert done.code == 1
    assert [job["exit_code"] for job in done.document["jobs"]] == [1, 0]
    assert [list(c.targets) for c in engine.configs] == [["q8_0", "q4_k_m"], ["q8_0"], ["q4_k_m"]]


def test_a_sweep_stops_at_the_first_failure_unless_told_to_go_on(qbuild: Run, engine: Engine) -> None:
    engine.error = errors.InputError("a", "b")
    assert qbuild("-m", "model.source=x,y", "target=gguf/q8_0,gguf/q4_k_m").code == 4
    assert len(engine.configs) == 1


def test_an_interrupted_sweep_stops_even_if_told_to_go_on(qbuild: Run, engine: Engine) -> None:
    engine.error = KeyboardInterrupt()
    assert qbuild("-m", "-k", "model.source=x,y", "target=gguf/q8_0,gguf/q4_k_m").code == 130
    assert len(engine.configs) == 1


def test_no_command_leaves_litter(qbuild: Run, engine: Engine, project: Path) -> None:
    qbuild(*TARGET)
    qbuild("-m", "model.source=x", "target=gguf/q8_0,gguf/q4_k_m")
    qbuild("--cfg", "job")
    assert list(project.iterdir()) == []


def test_a_build_with_dry_run_is_a_plan(qbuild: Run, engine: Engine) -> None:
    assert qbuild("-n", *TARGET).out == "a plan\n"
    assert [list(config.targets) for config in engine.planned] == [["q4_k_m"]]
    assert engine.configs == []


def test_views_of_the_configuration(qbuild: Run) -> None:
    assert "ftype: Q4_K_M" in qbuild("--cfg", "job", "target=gguf/q4_k_m").out
    assert qbuild("--cfg", "job", "-p", "budget").out.startswith("# @package budget\nram: auto\n")
    assert "recipes://" in qbuild("--info", "searchpath").out
    assert qbuild("--cfg", "job", "-p", "nope").code == 2


@pytest.mark.parametrize("argv", [["--help"], ["--version"], ["plan", "-h"], ["--version", "format=json"]])
def test_help_and_version(qbuild: Run, argv: list[str]) -> None:
    done = qbuild(*argv)
    assert done.code == 0
    assert "qbuild" in done.out or "version" in done.document
    assert max(map(len, done.out.splitlines())) <= 100


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("qbuild pl", ["plan"]),
        ("qbuild plan target=gguf/q4_k", ["target=gguf/q4_k_m", "target=gguf/q4_k_s"]),
        ("qbuild +recipe=tiny", ["+recipe=tiny_q4"]),
        ("qbuild plan +recipe=tiny_q4 budget.thr", ["budget.threads="]),
        ("qbuild plan model.so", ["model.source="]),
        ("qbuild -m model=llama7", ["model=llama70b", "model=llama7b"]),
    ],
)
def test_completion(qbuild: Run, monkeypatch: pytest.MonkeyPatch, line: str, expected: list[str]) -> None:
    monkeypatch.setenv("COMP_LINE", line)
    assert qbuild("-sc", "query=bash").out.split() == expected


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_can_be_installed(qbuild: Run, shell: str) -> None:
    done = qbuild("-sc", f"install={shell}")
    assert done.code == 0
    assert "complete" in done.out


def test_report_writes_a_page_a_card_and_data_of_what_builds_left(qbuild: Run, project: Path) -> None:
    folder = project / "outputs" / "m"
    folder.mkdir(parents=True)
    document = built(schema.Config(targets={"q8_0": schema.GgufTarget()}))
    (folder / "build.json").write_text(json.dumps(document))
    told = qbuild("report", "format=json").document["builds"]["outputs/m"]
    assert told["targets"]["q8_0"].items() >= document["targets"]["q8_0"].items()
    assert json.loads((folder / "report.json").read_text()) == told
    text = qbuild("report").out
    assert "m-q8_0.gguf" in text
    assert "outputs/m/report.html" in text
    assert (folder / "report.html").read_text().startswith("<!doctype html>")
    assert "m-q8_0.gguf" in (folder / "report.md").read_text().replace("\\", "")
    assert qbuild("report", "out=elsewhere").code == 4


@pytest.mark.parametrize("text", ["{", "[]", '{"model": {}}'])
def test_a_report_of_what_is_no_record_of_a_build_is_refused(qbuild: Run, project: Path, text: str) -> None:
    (project / "build.json").write_text(text)
    done = qbuild("report", "out=.", "format=json")
    assert done.code == 4
    assert done.error["place"] == "build.json"


def test_status_verify_and_gc_of_an_empty_store(qbuild: Run) -> None:
    assert qbuild("status", "format=json").document["outputs"] == []
    assert qbuild("verify", "format=json").document["problems"] == []
    assert qbuild("gc", "-n", "format=json").document["freed"] == 0
    assert qbuild("gc", "store.limit=lots").code == 2


def test_a_working_folder_that_is_gone(qbuild: Run, project: Path) -> None:
    project.rmdir()
    assert qbuild("plan", "format=json").code == 4
