"""Calibrated builds that are killed with all their processes: what was finished stays, and nothing is left behind."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest

WORDS = "calibration.samples=4", "calibration.length=64", "budget.threads=1"
TARGETS = "target=[awq/w4_g64,gptq/w4_g64]"

# In a worker: when the result of the action numbered {number} of a kind is made and not noted yet, all of it dies.
HOOK = """
import os, sys
if any("qbuild.worker" in argument for argument in sys.orig_argv):
    from qbuild.cache import ActionCache
    put, left = ActionCache.put, [{number}]
    def dying(self, key, result):
        left[0] -= result.kind == "{kind}"
        if left[0] == 0:
            os.killpg(0, 9)
        put(self, key, result)
    ActionCache.put = dying
"""


def kill_at(space: Any, kind: str, number: int) -> None:
    hook = space.root / "hook"
    hook.mkdir(exist_ok=True)
    (hook / "sitecustomize.py").write_text(HOOK.format(kind=kind, number=number))
    before = space.env.get("PYTHONPATH", "")
    space.env["PYTHONPATH"] = os.pathsep.join(filter(None, [str(hook), before]))
    killed = space.start(*WORDS, target=TARGETS)
    killed.communicate()
    assert killed.returncode == -signal.SIGKILL
    space.env["PYTHONPATH"] = before


def still_to_do(space: Any) -> dict[str, int]:
    steps = space.run("plan", *WORDS, target=TARGETS)["steps"]
    return {step["kind"]: step["count"] for step in steps}


@pytest.mark.slow
def test_kill_9_of_all_processes_costs_the_layer_or_directory_in_work(space: Any, elsewhere: Any) -> None:
    right = elsewhere.run(*WORDS, target=TARGETS)
    once = {"calibration.tokens": 1, "calibration.statistics": 3}
    assert right["totals"]["actions"] == once | {"quant.layer": 6, "checkpoint.directory": 2}

    kill_at(space, "calibration.statistics", 2)
    assert still_to_do(space) == {"calibration.statistics": 2, "quant.layer": 6, "checkpoint.directory": 2}
    kill_at(space, "quant.layer", 4)
    assert still_to_do(space) == {"quant.layer": 3, "checkpoint.directory": 2}
    kill_at(space, "checkpoint.directory", 1)
    assert still_to_do(space) == {"checkpoint.directory": 2}

    made = space.run(*WORDS, target=TARGETS)
    assert made["totals"]["actions"] == {"checkpoint.directory": 2}
    digests = {name: target["digest"] for name, target in made["targets"].items()}
    assert digests == {name: target["digest"] for name, target in right["targets"].items()}
    assert space.run("verify")["problems"] == []
    assert leftovers(space.store) == []


def leftovers(store: Path) -> list[Path]:
    """Hidden states of a pass, files that were not finished."""
    return [path for name in ("states", "partial") for path in (store / name).rglob("*") if path.is_file()]


@pytest.mark.slow
def test_builds_of_equal_copies_run_one_pass_between_them(space: Any, elsewhere: Any) -> None:
    """Equal bytes have equal keys, and with them one folder of hidden states: the second build waits for the first."""
    elsewhere.store = space.store
    both = [one.start(*WORDS, target="target=[imatrix,gptq/w4_g64]") for one in (space, elsewhere)]
    ended = [process.communicate() for process in both]
    assert [process.returncode for process in both] == [0, 0], ended
    actions = [json.loads(out)["totals"]["actions"] for out, _ in ended]
    assert sum(made.get("calibration.statistics", 0) for made in actions) == 3
    assert leftovers(space.store) == []
