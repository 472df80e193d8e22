"""Calibrated builds on a CUDA device: the same bytes again, near to the CPU's, within what was predicted. Skipped
where there is none. Run one after another: what a process takes of a device is told by how much less is free there."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import Done, Run

from qbuild import machine
from qbuild.calibration import extent

pytestmark = pytest.mark.skipif(
    not (machine.gpus() and machine.has_torch() and machine.has_triton()), reason="no CUDA device, torch and triton"
)
TINY = Path(__file__).parent.parent / "data" / "tiny-llama"
PROPAGATED = ("+targets.chained.format=gptq", "+targets.chained.group_size=32", "+targets.chained.propagate=true")

Attempt = Callable[..., Done]


@pytest.fixture
def attempt(qbuild: Run, project: Path) -> Attempt:
    text = project / "text.txt"
    text.write_text("\n".join(f"Section {n}: how {n * n} things are told apart by size and colour." for n in range(80)))
    settings = ["calibration.samples=12", "calibration.length=64", "evaluation.samples=4", "evaluation.length=64"]
    words = [f"model.source={TINY}", f"calibration.source={text}", "format=json", *settings]

    def run(*more: str) -> Done:
        return qbuild(*words, *(word.replace("TEXT", str(text)) for word in more))

    return run


def made(attempt: Attempt, *words: str) -> dict[str, Any]:
    done = attempt(*words)
    assert done.code == 0, done.out + done.err
    return done.document


def test_a_build_on_a_gpu_takes_what_was_predicted_and_makes_the_same_bytes_again(attempt: Attempt) -> None:
    words = ("target=[awq/w4_g64,gptq/w4_g64,ct/w4a16_g64,imatrix]", *PROPAGATED, "device=cuda")
    one, two = (made(attempt, *words, f"store.dir=store{number}", f"out=out{number}") for number in (1, 2))
    assert [t["digest"] for t in one["targets"].values()] == [t["digest"] for t in two["targets"].values()]
    on_device = [job for job in one["jobs"].values() if "peak_vram" in job]
    assert len(on_device) == 3  # statistics, codes, codes for a quantized model
    for label, job in one["jobs"].items():
        assert job["peak_ram"] <= job["predicted_ram"], label
        assert job.get("peak_vram", 0) <= job.get("predicted_vram", 0), label


def test_both_devices_measure_the_same_of_a_file_and_nearly_of_what_they_calibrated(attempt: Attempt) -> None:
    words = ("target=[gguf/q4_k_m,awq/w4_g64]", "evaluation.source=TEXT")
    found = []
    for device in ("cpu", "cuda"):
        document = made(attempt, *words, f"device={device}", f"store.dir={device}", f"out={device}-out")
        found.append(document["evaluation"]["targets"])
        for label, job in document["jobs"].items():
            assert job.get("peak_vram", 0) <= job.get("predicted_vram", 0), label
    cpu, cuda = found
    assert cuda["q4_k_m"]["kl"] == pytest.approx(cpu["q4_k_m"]["kl"], rel=2e-3)
    assert cuda["q4_k_m"]["weights"] == pytest.approx(cpu["q4_k_m"]["weights"], rel=1e-4)
    assert cuda["awq_w4_g64"]["kl"] == pytest.approx(cpu["awq_w4_g64"]["kl"], rel=0.1)


def test_a_job_that_takes_more_of_a_gpu_than_its_budget_ends_with_both_numbers(
    attempt: Attempt, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(extent, "device_forward", lambda *_: extent.Device(2 << 30, 1 << 20))
    done = attempt("target=imatrix", "device=cuda", "budget.vram=563MiB")
    assert done.code == 1
    assert "went over its VRAM budget of 563.0 MiB (predicted peak 561.0 MiB" in done.error["fact"]
    assert "device=cpu" in done.error["remedy"]


def test_files_in_little_memory_of_a_gpu_have_the_same_bytes(attempt: Attempt) -> None:
    words = ("target=gguf/q4_k_m", "device=cuda")
    wide = made(attempt, *words, "store.dir=wide", "out=wide-out")
    narrow = made(attempt, *words, "store.dir=narrow", "out=narrow-out", "budget.vram=564MiB")
    assert narrow["targets"]["q4_k_m"]["digest"] == wide["targets"]["q4_k_m"]["digest"]
    assert narrow["targets"]["q4_k_m"]["predicted_vram"] == 564 << 20 < wide["targets"]["q4_k_m"]["predicted_vram"]
