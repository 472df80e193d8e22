"""The memory of a CUDA device: predicted by plans, refused with remedies, told when a worker goes over. No GPU here."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
import torch
from conftest import Run

from qbuild import machine, vram, worker
from qbuild.machine import Gpu

GIB = 1 << 30
WORDS = ["plan", "model=llama7b", "target=[awq/w4_g128,gptq/w4_g128]", "format=json", "budget.ram=64GiB"]
WORDS += ["budget.disk=1TB", "calibration.samples=64"]


@pytest.fixture(autouse=True)
def card(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "gpus", lambda: (Gpu("NVIDIA H100", 80 * GIB, 79 * GIB),))


def test_a_plan_for_a_gpu_predicts_its_memory(qbuild: Run) -> None:
    planned = qbuild(*WORDS, "device=cuda").document
    steps = {step["kind"]: step["vram"] for step in planned["steps"]}
    # measured in builds on an H100, the context included: 64 windows through a layer, and to solve it
    for kind, measured in (("calibration.statistics", 3127), ("quant.layer", 4836)):
        assert 1 <= steps[kind] / (measured << 20) <= 1.15
    assert planned["predicted"]["vram"] == steps["quant.layer"]
    assert steps["checkpoint.directory"] == 0
    assert planned["budget"]["vram"] == int(79 * GIB * 0.9)


def test_bfloat16_takes_less_of_the_device_and_not_less_than_was_measured(qbuild: Run) -> None:
    planned = qbuild(*WORDS, "device=cuda", "calibration.dtype=bfloat16").document
    (found,) = (step["vram"] for step in planned["steps"] if step["kind"] == "calibration.statistics")
    assert 1 <= (found - vram.CONTEXT) / (2423 << 20) <= 1.15


def test_plain_rounding_takes_less_of_the_device(qbuild: Run) -> None:
    plain = [f"targets.{name}.rounding=nearest" for name in ("awq_w4_g128", "gptq_w4_g128")]
    planned = qbuild(*WORDS, "device=cuda", *plain).document
    (found,) = (step["vram"] for step in planned["steps"] if step["kind"] == "quant.layer")
    assert 1 <= (found - vram.CONTEXT) / (3233 << 20) <= 1.15


def test_calibration_on_the_cpu_takes_no_device_memory(qbuild: Run) -> None:
    planned = qbuild(*WORDS, "device=auto", "budget.vram=1MiB").document
    assert planned["predicted"]["vram"] == 0


def test_a_torch_that_was_built_for_cuda_takes_more_ram_on_the_cpu_too(
    qbuild: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    needs = []
    for built in (False, True):
        monkeypatch.setattr(machine, "has_torch", lambda built=built: built)
        needs.append({step["kind"]: step["ram"] for step in qbuild(*WORDS, "device=cpu").document["steps"]})
    more = {"calibration.statistics": 452, "quant.layer": 312, "checkpoint.directory": 280}  # MiB
    for kind, expected in more.items():
        assert needs[1][kind] - needs[0][kind] == expected << 20


@pytest.mark.parametrize(
    ("words", "who", "remedies"),
    [
        (["budget.vram=3GiB"], "calibration", ["calibration.length=256", "calibration.dtype=bfloat16", "device=cpu"]),
        (["budget.vram=5GiB"], "quantizing 64 layers", ["budget.vram=", "device=cpu"]),
        (
            ["budget.vram=5GiB", "targets.awq_w4_g128.propagate=true", "targets.gptq_w4_g128.propagate=true"],
            "error propagation",
            ["budget.vram=", "device=cpu"],
        ),
    ],
)
def test_what_cannot_fit_a_gpu_is_refused_with_what_helps(
    qbuild: Run, words: list[str], who: str, remedies: list[str]
) -> None:
    done = qbuild(*WORDS, "device=cuda", *words)
    assert done.code == 3
    assert who in done.error["fact"]
    assert "of VRAM" in done.error["fact"]
    assert not [remedy for remedy in remedies if remedy not in done.error["remedy"]]


def test_the_least_that_a_refusal_names_is_enough(qbuild: Run) -> None:
    refused = qbuild(*WORDS, "device=cuda", "budget.vram=5GiB")
    (least,) = (word for word in refused.error["remedy"].split() if word.startswith("budget.vram="))
    assert qbuild(*WORDS, "device=cuda", least).code == 0


def test_what_torch_takes_of_a_device_comes_in_pieces() -> None:
    mib = 1 << 20  # kSmallSize, kSmallBuffer, kMinLargeAlloc, kLargeBuffer and kRoundLarge of its allocator
    sizes = {1: 2, mib: 2, mib + 1: 20, 10 * mib - 1: 20, 10 * mib: 10, 10 * mib + 1: 12}
    assert {nbytes: vram.reserved(nbytes) // mib for nbytes in sizes} == sizes


@pytest.mark.parametrize(("looks", "peak", "stopped"), [((90, 180, 91, 95), 91, False), ((90, 180, 170), 170, True)])
def test_a_compiler_that_a_worker_starts_is_not_counted_with_the_memory_it_is_forked_with(
    looks: tuple[int, ...], peak: int, stopped: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = iter(looks)
    monkeypatch.setattr(machine, "tree_rss", lambda _: next(seen))
    process = subprocess.Popen(["sleep", "60"])
    watch = worker._Watch(worker.Job("", "", None, Path(), 0, limit=120), process, lambda _: None)
    for _ in looks:
        watch.look()
    process.kill()
    process.wait()
    assert (watch.peak, watch.stopped) == (peak, stopped)


def test_a_worker_over_its_device_budget_says_what_was_predicted_and_what_helps() -> None:
    assert vram.ran_out(torch.OutOfMemoryError())
    assert not vram.ran_out(RuntimeError())
    job = worker.Job("quant.layer", "quantizing", None, Path(), 0, 0, vram=2 * GIB, vram_limit=3 * GIB)
    error = worker._over_budget(job, 3 * GIB)
    assert "VRAM budget of 3.0 GiB (predicted peak 2.0 GiB, observed 3.0 GiB)" in error.fact
    assert "device=cpu" in error.remedy
