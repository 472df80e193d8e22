"""Calibrated targets as plans: how often the model is run, what each step takes, and what a budget changes about it."""

from __future__ import annotations

from typing import Any

import pytest
from conftest import Run

from qbuild import machine
from qbuild.calibration.extent import forward_ram, model_shape
from qbuild.calibration.shapes import BASE, Step
from qbuild.errors import InputError
from qbuild.machine import Gpu

GIB = 1 << 30


@pytest.fixture
def plan(qbuild: Run) -> Any:
    def run(*words: str) -> dict[str, Any]:
        done = qbuild("plan", "budget.disk=200GiB", "budget.threads=16", "format=json", *words)
        assert done.code == 0, done.out
        return done.document

    return run


def steps(document: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """By kind, each of which there is once."""
    found = {step["kind"]: step for step in document["steps"]}
    assert len(found) == len(document["steps"])
    return found


def test_a_model_of_one_layer_is_planned(plan: Any) -> None:
    found = steps(plan("+recipe=llama7b_release", "model.config.num_hidden_layers=1", "budget.ram=8GiB"))
    assert found["calibration.statistics"]["count"] == found["calibration.imatrix"]["count"] == 1


def test_a_release_of_fourteen_outputs_runs_the_model_once(plan: Any) -> None:
    found = steps(plan("+recipe=llama7b_release", "budget.ram=8GiB"))
    counts = {kind: step["count"] for kind, step in found.items()}
    assert counts.pop("source.hash") == 291
    assert counts == {
        "calibration.tokens": 1, "calibration.statistics": 32, "quant.layer": 64, "calibration.imatrix": 1,
        "checkpoint.directory": 2, "gguf.pass": 12,
    }  # fmt: skip
    layers = 2 * 32 * (4 * 4096**2 + 3 * 4096 * 11008 + 2 * 4096)
    assert found["calibration.statistics"]["read"] == layers + 2 * 32000 * 4096
    assert found["quant.layer"]["read"] == 2 * layers


@pytest.mark.parametrize(("ram", "spilled"), [(8, True), (16, False), (32, False)])
def test_hidden_states_go_to_disk_where_they_do_not_fit(plan: Any, ram: int, spilled: bool) -> None:
    document = plan("model=llama7b", "target=awq/w4_g128", "calibration.samples=1024", f"budget.ram={ram}GiB")
    found = steps(document)["calibration.statistics"]
    assert found["spill"] is spilled
    assert found["temporary"] == 2 * 1024 * 512 * 4096 * 4
    assert all(step["ram"] < document["predicted"]["ram"] <= ram * GIB for step in document["steps"])


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_weights_of_a_float32_checkpoint_are_counted_as_they_are_read(
    plan: Any, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "gpus", lambda: (Gpu("NVIDIA H100", 80 * GIB, 79 * GIB),))
    words = ["model=llama7b", "target=gptq/w4_g128", "budget.ram=32GiB", "budget.threads=1", f"device={device}"]
    half, whole = (steps(plan(*words, f"model.config.torch_dtype={dtype}")) for dtype in ("float16", "float32"))
    more = {kind: step["ram"] - half[kind]["ram"] for kind, step in whole.items()}
    layer = 2 * (4 * 4096**2 + 3 * 4096 * 11008 + 2 * 4096)  # bytes that it is larger by
    # On a device a layer is read ahead of each: of a pass half of another is still there, of solving all.
    assert more["quant.layer"] == (2 * layer if device == "cuda" else layer)
    if device == "cuda":
        assert more["calibration.statistics"] == 3 * layer // 2
    assert more["checkpoint.directory"] == 0


def test_fewer_windows_are_run_at_once_where_even_that_does_not_fit(plan: Any) -> None:
    words = "model=llama7b", "target=imatrix", "calibration.samples=1024"
    roomy, tight = (steps(plan(*words, f"budget.ram={ram}"))["calibration.statistics"] for ram in ("8GiB", "2GiB"))
    assert (roomy["threads"], tight["spill"]) == (16, True)
    assert 1 < tight["threads"] < 16


def test_fewer_rows_are_quantized_at_once_where_that_fits(plan: Any) -> None:
    words = "model=llama7b", "target=awq/w4_g128"
    roomy, tight = (steps(plan(*words, f"budget.ram={ram}"))["quant.layer"] for ram in ("8GiB", "6GiB"))
    assert (roomy["threads"], tight["ram"] < 6 * GIB) == (16, True)
    assert 1 < tight["threads"] < 16
    assert tight["seconds"] > roomy["seconds"]


def test_a_refusal_names_the_step_that_needs_most_and_its_remedies_work(qbuild: Run) -> None:
    words = ["plan", "model=llama7b", "target=imatrix", "calibration.samples=1024", "calibration.spill=false"]
    words += ["budget.ram=3GiB", "budget.disk=200GiB", "budget.threads=2", "format=json"]
    refused = qbuild(*words)
    assert refused.code == 3
    assert "calibration of 32 layers needs" in refused.error["fact"]
    overrides = [line.rpartition("→ ")[2] for line in refused.error["remedy"].splitlines()]
    assert [override.partition("=")[0] for override in overrides] == [
        "calibration.spill", "calibration.samples", "budget.ram",
    ]  # fmt: skip
    for override in overrides:
        kept = [word for word in words if word.partition("=")[0] != override.partition("=")[0]]
        assert qbuild(*kept, override).code == 0


def test_a_window_that_a_table_of_positions_does_not_hold_is_refused(qbuild: Run) -> None:
    words = (
        "plan",
        "model=llama7b",
        "target=imatrix",
        "budget.disk=200GiB",
        "format=json",
        "+model.config.n_positions=256",
    )
    refused = qbuild(*words)
    assert refused.code == 2
    assert (refused.error["place"], refused.error["remedy"]) == ("calibration.length", "calibration.length=256")
    assert qbuild(*words, "calibration.length=256").code == 0
    measured = qbuild(*words, "calibration.length=256", "evaluation.source=builtin", "evaluation.length=257")
    assert measured.error["place"] == "evaluation.length"


def test_a_model_whose_config_names_its_width_otherwise_is_planned() -> None:
    config = {"model_type": "gpt2", "n_embd": 64, "n_layer": 2}
    tensors = {"wte.weight": (128, 64)} | {f"h.{n}.mlp.c_fc.weight": (64, 256) for n in range(2)}
    shape = model_shape(config, tensors)
    step = Step(windows=4, length=32)
    assert shape.hidden == 64
    assert forward_ram(config, tensors, shape, step) > BASE + 4 * 32 * 64 * 4
    with pytest.raises(InputError, match="does not say how wide"):
        model_shape({"model_type": "gpt2", "n_layer": 2}, tensors)
