"""Jobs of a sweep that go wrong: the others finish, what failed is named, the next run makes only what is missing."""

from __future__ import annotations

from typing import Any

import pytest

# A worker whose pass makes Q8_0 is killed, as the kernel kills what takes too much memory.
KILLED = """
import os, sys
if any("qbuild.worker" in word for word in sys.orig_argv):
    from qbuild.actions import stream
    whole = stream.Pass.run
    def run(self):
        if any(output.target == "q8_0" for output in self.task.outputs):
            os.kill(os.getpid(), 9)
        return whole(self)
    stream.Pass.run = run
"""
TYPES = "target=gguf/q4_0,gguf/q8_0,gguf/q6_k"


def test_a_killed_worker_costs_its_own_job_and_the_next_run_makes_only_that(space: Any) -> None:
    hook = space.root / "hook"
    hook.mkdir()
    (hook / "sitecustomize.py").write_text(KILLED)
    before = space.env.get("PYTHONPATH", "")
    space.env["PYTHONPATH"] = f"{hook}:{before}"
    done = space.run("-m", "-k", "-B", target=TYPES, code=1)
    assert [job["exit_code"] for job in done["jobs"]] == [0, 1, 0]
    assert "SIGKILL" in done["jobs"][1]["error"]["fact"]
    assert (done["total"]["jobs"], done["total"]["failed"]) == (3, 1)
    assert done["total"]["reused"] > 0  # -B makes everything again once, not for each job that is tried alone
    assert {path.name for path in space.out.glob("*.gguf")} == {"tiny-llama-Q4_0.gguf", "tiny-llama-Q6_K.gguf"}

    space.env["PYTHONPATH"] = before
    again = space.run("-m", "-k", target=TYPES)
    made = {name: t["verdicts"] for job in again["jobs"] for name, t in job["result"]["targets"].items()}
    assert [made[name].keys() for name in ("q4_0", "q6_k")] == [{"hit"}, {"hit"}]
    assert 0 < again["total"]["computed"] == made["q8_0"]["run"]


@pytest.mark.slow
def test_a_group_size_that_does_not_fit_the_model_costs_its_own_job(space: Any) -> None:
    words = ("-m", "-k", "calibration.samples=4", "calibration.length=64", "target=awq/w4_g64")
    done = space.run(*words, target="targets.awq_w4_g64.group_size=32,80,64", code=2)
    assert [job["exit_code"] for job in done["jobs"]] == [0, 2, 0]
    assert "80" in done["jobs"][1]["error"]["fact"]
    actions = {"calibration.tokens": 1, "calibration.statistics": 3, "quant.layer": 6, "checkpoint.directory": 2}
    assert done["total"]["actions"] == actions
    again = space.run(*words, target="targets.awq_w4_g64.group_size=32,128,64")
    assert again["total"]["actions"] == {"quant.layer": 3, "checkpoint.directory": 1}


@pytest.mark.slow
def test_calibrations_of_one_model_read_it_once_each_and_hash_it_once(space: Any) -> None:
    """The digests of the source are known after the first: what is read again is what the passes run on."""
    words = ("-m", "target=awq/w4_g64", "calibration.length=64")
    done = space.run(*words, target="calibration.samples=4,8,12")
    assert [len(build["targets"]) for build in done["builds"]] == [1, 1, 1]
    hashed = ["hashing" in build["jobs"] for build in done["builds"]]
    assert hashed == [True, False, False]
    assert done["total"]["actions"]["calibration.statistics"] == 9
    again = space.run(*words, target="calibration.samples=4,8,12")
    assert (again["total"]["actions"], again["total"]["read_bytes"]) == ({}, 0)


@pytest.mark.slow
def test_one_forward_pass_serves_a_sweep_over_formats(space: Any) -> None:
    words = ("-m", "calibration.samples=4", "calibration.length=64")
    done = space.run(*words, target="target=gguf/q4_k_m,gguf/iq3_m,awq/w4_g64,gptq/w4_g64")
    assert len(done["builds"]) == 1
    actions = {"calibration.tokens": 1, "calibration.statistics": 3, "quant.layer": 6, "checkpoint.directory": 2}
    assert done["total"]["actions"] == actions
