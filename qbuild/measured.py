"""The last part of a build: how far each target is from its source, on text that ``evaluation.source`` names."""

from __future__ import annotations

import json
import os
from typing import Any

from qbuild import machine, worker
from qbuild.actions import directory, evaluation
from qbuild.calibrated import CalibratedTarget
from qbuild.errors import StoreError
from qbuild.lower import PARENT_RAM
from qbuild.plan import Plan
from qbuild.recipe import FileTarget
from qbuild.running import IDLE, Jobs
from qbuild.steps import Step
from qbuild.store import Store

__all__ = ["counts", "measure"]


def counts(made: Plan) -> dict[str, int]:
    """How many actions of each kind ``measure`` will run."""
    asked = made.resolved.evaluation
    missing = [a for a in asked.results.values() if made.verdicts[a].state != "hit"] if asked else []
    if asked is None or not missing:
        return {}
    states = {} if made.verdicts[asked.states].state == "hit" else {evaluation.STATES: 1}
    return states | {evaluation.RESULT: len(missing)}


def measure(made: Plan, jobs: Jobs) -> dict[str, Any] | None:
    """The part of ``build.json`` called evaluation; None where none is asked for. What is stored is not run again.

    ``made`` is a plan whose targets are stored.
    """
    asked = made.resolved.evaluation
    if asked is None:
        return None
    todo = {name: action for name, action in asked.results.items() if made.verdicts[action].state != "hit"}
    if todo:
        states = made.verdicts[asked.states]
        targets = tuple(_target(made, name, action) for name, action in todo.items())
        params = made.resolved.graph.actions[asked.states].params
        task = evaluation.Task(
            checkpoint=made.resolved.checkpoint,
            tokens=made.verdicts[asked.tokens].outputs[0],
            params=params,
            states=states.outputs[0] if states.state == "hit" else None,
            key=_key(made, asked.states),
            targets=targets,
            threads=made.budget.threads,
        )
        step = next(step for step in made.after if step.kind == evaluation.RESULT)
        count = len(targets) + 1
        with jobs.progress(f"{made.resolved.name}: evaluation", count, count, "models"):
            done = jobs.run(evaluation.RESULT, step.label, task, step.ram, step.vram)
        found, needed = done.value, _needed(done, step)
    else:
        found, needed = {}, IDLE
    digests = {n: found.get(n) or made.verdicts[a].outputs[0] for n, a in asked.results.items()}
    conf = made.resolved.config.evaluation
    results = {name: _read(made.store, digest) for name, digest in digests.items()}
    text = {key: getattr(conf, key) for key in ("source", "samples", "length", "dtype")}
    tokens = made.verdicts[asked.tokens]
    counts = {"run": len(todo), "hit": len(results) - len(todo)}
    made_of = {"digest": str((tokens.outputs or tokens.gone)[0]), "verdicts": {k: v for k, v in counts.items() if v}}
    return text | made_of | needed | {"targets": results}


def _needed(done: worker.Done, step: Step) -> dict[str, Any]:
    """What the evaluation took and was predicted to take, this process counted."""
    rams = {"peak_ram": done.peak + machine.process_rss(os.getpid()), "predicted_ram": step.ram + PARENT_RAM}
    return rams | {"seconds": round(done.seconds, 3), "peak_vram": done.vram, "predicted_vram": step.vram}


def _key(made: Plan, action: str) -> str:
    key = made.verdicts[action].key
    if key is None:
        raise RuntimeError(f"BUG: {action} is to run but its key is unknown: {made.verdicts[action].why}")
    return key


def _target(made: Plan, name: str, action: str) -> evaluation.Target:
    target = next(t for t in made.resolved.targets if t.name == name)
    digests = made.verdicts[target.action].outputs[:1]
    scheme = target.scheme if isinstance(target, CalibratedTarget) else None
    if scheme is not None or (isinstance(target, FileTarget) and target.shards):
        files = directory.listed(made.store, digests[0], name)
        digests = tuple(d for n, d in sorted(files.items()) if n.endswith((".safetensors", ".gguf")))
    specs = tuple(made.resolved.specs.values()) if scheme is None else ()
    scaled = getattr(made.resolved.config.targets[name], "scaled", False)
    return evaluation.Target(name, _key(made, action), digests, specs, scheme, scaled)


def _read(store: Store, digest: Any) -> dict[str, Any]:
    data = store.read_bytes(digest)
    if data is None:
        raise StoreError(
            str(store.root), f"the evaluation {digest} is gone or damaged", "run again: it is measured anew"
        )
    return dict(json.loads(data))
