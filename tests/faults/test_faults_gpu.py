"""Builds on a GPU that is not there: the driver, torch and the kernels are replaced, all else is a real build.

tests/kernels/test_kernels_gpu.py runs the real ones.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

# In every process: a driver that shows a GPU. In workers: kernels that are the CPU's, and note what they made.
HOOK = """
import os, sys, types
if any("qbuild" in word for word in sys.orig_argv):
    from qbuild import kernels, machine, vram
    from qbuild.actions import warm
    from qbuild.errors import ActionFailed
    version = warm.version
    warm.version = lambda name: "3" if name == "triton" else version(name)
    machine.gpus = lambda: (machine.Gpu("pretended", 8 << 30, 7 << 30),)
    machine.has_torch = machine.has_triton = lambda: True
    if os.environ["FAULT"] != "torch":
        vram.hold = lambda limit: vram.Hold(vram.CONTEXT)
        vram.Hold.peak = lambda self: self.context

    class Stream:
        def __init__(self, nbytes):
            if os.environ["FAULT"] == "full":
                raise ActionFailed("device", "the GPU has no memory left", "budget.vram=SIZE for less, or device=cpu")

        def quantize_into(self, x, out, name, imatrix=None):
            with open(os.environ["NOTES"], "a") as notes:
                notes.write(name + "\\n")
            kernels.quantize_into(x, out, name, imatrix)
            if os.environ["FAULT"] == "wrong":
                out[:] = 255

    encode = types.ModuleType("qbuild.kernels.gpu.encode")
    encode.Stream, encode.pin = Stream, lambda buffer: None
    sys.modules[encode.__name__] = encode
"""


@pytest.fixture
def gpu(space: Any) -> Any:
    """The space of the other fault tests, on a machine with a GPU of 8 GiB."""
    hook = space.root / "hook"
    hook.mkdir()
    (hook / "sitecustomize.py").write_text(HOOK)
    space.env |= {"PYTHONPATH": f"{hook}:{space.env.get('PYTHONPATH', '')}", "FAULT": "", "NOTES": str(hook / "notes")}
    return space


def encoded(space: Any) -> set[str]:
    """Types of the tensors that the GPU made."""
    notes = Path(space.env["NOTES"])
    return set(notes.read_text().split()) if notes.exists() else set()


def test_a_build_on_a_gpu_makes_the_same_file_and_leaves_other_types_to_the_cpu(gpu: Any, elsewhere: Any) -> None:
    words = ("targets.q4_k_m.tensor_types={attn_q: IQ4_NL}",)
    plan = gpu.run("plan", *words, "device=cuda")
    assert plan["strategy"]["device"] == "cuda"
    assert 0 < plan["predicted"]["vram"] <= plan["budget"]["vram"]
    made, expected = gpu.run(*words, "device=cuda"), elsewhere.run(*words, "device=cpu")
    assert made["targets"]["q4_k_m"]["predicted_vram"] == plan["predicted"]["vram"]
    assert made["targets"]["q4_k_m"]["digest"] == expected["targets"]["q4_k_m"]["digest"]
    assert made["totals"]["computed"] == 29
    assert {"Q4_K", "Q6_K"} <= encoded(gpu)
    assert "IQ4_NL" not in encoded(gpu)
    assert gpu.run(*words, "device=cpu")["totals"]["computed"] == 0  # the device is in no key


def test_a_small_model_is_not_worth_the_start_of_a_gpu(gpu: Any) -> None:
    plan = gpu.run("plan", "device=auto")
    assert (plan["strategy"]["device"], plan["predicted"]["vram"]) == ("cpu", 0)


def test_a_gpu_without_the_memory_for_a_chunk_is_refused_before_anything_runs(gpu: Any) -> None:
    error = gpu.run("device=cuda", "budget.vram=100MiB", code=3)["error"]
    assert "of VRAM, the budget is 100.0 MiB" in error["fact"]
    assert "device=cpu" in error["remedy"]
    assert not encoded(gpu)


@pytest.mark.slow
def test_a_gpu_that_is_full_when_the_work_begins_is_reported_and_the_cpu_goes_on(gpu: Any) -> None:
    gpu.env["FAULT"] = "full"
    error = gpu.run("device=cuda", code=1)["error"]
    assert (error["place"], error["fact"]) == ("device", "the GPU has no memory left")
    assert "device=cpu" in error["remedy"]
    assert gpu.run("device=cpu")["targets"]["q4_k_m"]["bytes"] == gpu.output().stat().st_size


@pytest.mark.slow
def test_a_torch_that_cannot_use_the_gpu_is_reported(gpu: Any) -> None:
    gpu.env |= {"FAULT": "torch", "CUDA_VISIBLE_DEVICES": ""}
    error = gpu.run("device=cuda", code=1)["error"]
    assert (error["place"], error["remedy"]) == ("device", "device=cpu")
    assert "torch cannot use the GPU" in error["fact"]


def test_a_gpu_that_makes_other_bytes_is_found_out_before_its_first_use(gpu: Any) -> None:
    gpu.env["FAULT"] = "wrong"
    error = gpu.run("device=cuda", code=1)["error"]
    assert "blocks are not those of the CPU" in error["fact"]
    assert not gpu.output().exists()


@pytest.mark.slow
def test_blocks_of_a_gpu_that_no_file_may_hold_stop_the_build(gpu: Any) -> None:
    gpu.run("device=cuda")
    gpu.env["FAULT"] = "wrong"
    error = gpu.run("-B", "device=cuda", code=4)["error"]
    assert "block scale is outside float16's range" in error["fact"]
    assert gpu.run("verify")["problems"] == []
