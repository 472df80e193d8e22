"""The calibrated part of a build: its steps in order, each leaving its results in the store before the next begins.

Afterwards every calibrated target is a hit, and a GGUF target that waits for an importance matrix has one.
"""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from qbuild.actions import (
    backend,
    choice,
    damage,
    directory,
    hashing,
    importance,
    metadata,
    propagate,
    sensitivity,
    solve,
    statistics,
    stream,
    tokens,
    warm,
)
from qbuild.backends import environment
from qbuild.cache import ActionCache, ActionResult
from qbuild.calibrated import CalibratedTarget
from qbuild.digest import Digest
from qbuild.errors import ActionFailed
from qbuild.graph import Action, Output, Source
from qbuild.inputs import InputFile
from qbuild.manifest import action_key
from qbuild.plan import Judge, Plan, Verdict, check_limits, manifest_parts
from qbuild.quant.directory import Directory
from qbuild.running import Jobs
from qbuild.steps import Step, hashed, missing, rate_name, rounds
from qbuild.vram import CONTEXT

MEASURABLE = 1e12  # operations: with fewer, starting up is what one measures

__all__ = ["Stage", "compile_kernels", "hash_sources", "read_metadata"]


def hash_sources(made: Plan, jobs: Jobs, judge: Judge, sources: Iterable[Source]) -> int:
    """Hash those of ``sources`` whose digests are not known; ``judge`` learns them. Returns the bytes read."""
    files = made.resolved.checkpoint.files
    numbers = {str(f.path): n for n, f in enumerate(files)}
    unknown = {s for s in sources if judge.digest(s) is None}
    ordered = sorted(unknown, key=lambda s: (numbers[s.file], s.offset))
    ranges = tuple(hashing.Range(s.name, numbers[s.file], s.offset, s.nbytes) for s in ordered)
    total = sum(r.nbytes for r in ranges)
    if ranges:
        with jobs.progress(f"{made.resolved.name}: hashing what changed", len(ranges), total):
            done = jobs.run("source.hash", "hashing", hashing.Task(files, ranges), hashing.RAM)
        judge.learn(judge.learned | done.value)
    return total


def read_metadata(made: Plan, jobs: Jobs, judge: Judge) -> Verdict:
    """The verdict of the metadata action, which is run where no result of it is stored."""
    known = judge.verdicts["metadata"]
    if known.outputs and made.store.check_blob(known.outputs[0]):
        return known
    action, cache = made.resolved.graph.actions["metadata"], ActionCache(made.store, made.since)
    digests, _ = judge.inputs(action)
    key = action_key(manifest_parts(action, digests))
    with made.store.lock(key):
        result = cache.get(key)
        if result is None:
            jobs.sink.message("info", "reading the tokenizer and the model's metadata")
            checkpoint = made.resolved.checkpoint
            task = metadata.Task(checkpoint, made.resolved.config.model.name, judge.files(action))
            done = jobs.run(metadata.KIND, "metadata", task, metadata.ram(checkpoint.aux))
            result = ActionResult(metadata.KIND, (made.store.put_bytes(done.value),))
            cache.put(key, result)
    return Verdict("run", "made", key, result.outputs)


def compile_kernels(jobs: Jobs, task: warm.Task) -> None:
    """Compile what has not been compiled on this machine, in a process of its own."""
    todo = warm.left(task)
    if todo.names:
        jobs.sink.message("info", f"compiling kernels for {', '.join(todo.names)} (once per machine)")
        held = CONTEXT + warm.VRAM if todo.on_gpu else 0
        jobs.run("kernels.warm", "compiling kernels", todo, warm.ram(todo), held)


class Stage:
    """Runs the plan's steps. ``computed`` holds the ids of the actions that ran, ``seconds`` is by step kind."""

    def __init__(self, made: Plan, jobs: Jobs) -> None:
        self.plan, self.jobs, self.store = made, jobs, made.store
        self.resolved, self.cache = made.resolved, ActionCache(made.store)
        if made.resolved.calibration is None:
            raise RuntimeError("BUG: a plan without calibration has no steps")
        self.calibration = made.resolved.calibration
        self.judge = Judge(made.resolved, made.store, made.since, made.files)
        self.made: dict[str, Verdict] = {}
        self.read_bytes = self.written_bytes = 0
        self.seconds: dict[str, float] = {}
        self.whole = True  # whether all that the plan counted of a step was done here: else it tells no rate

    @property
    def computed(self) -> frozenset[str]:
        return frozenset(self.made)

    @property
    def counts(self) -> dict[str, int]:
        """How many actions of each kind ran."""
        return dict(Counter(self.resolved.graph.actions[action].kind for action in self.made))

    def run(self) -> None:
        self._settle()
        actions = self.resolved.graph.actions
        runners = {
            tokens.KIND: self._tokens,
            statistics.KIND: self._statistics,
            solve.KIND: self._solve,
            propagate.KIND: self._propagate,
            importance.KIND: self._matrix,
            sensitivity.KIND: self._sensitivity,
            damage.KIND: self._damages,
            choice.KIND: self._choices,
            directory.KIND: self._directories,
            backend.KIND: self._backends,
        }
        self._environments()
        self._limits()
        for step in self.plan.steps:
            if step.kind == "source.hash":
                sources = hashed(self.resolved, self._missing())
                self.read_bytes += hash_sources(self.plan, self.jobs, self.judge, sources)
                self._settle()
            todo = [actions[a] for a in self._missing() if actions[a].kind == step.kind]
            if todo:
                self.whole = len(todo) == step.count
                self.seconds[step.kind] = seconds = runners[step.kind](step, todo)
                if self.whole and step.work > MEASURABLE and seconds:
                    name = rate_name(step.kind, self.calibration.device)
                    self.cache.note_rate(name, step.work / seconds / step.threads)
                self._settle()

    def _limits(self) -> None:
        """Refuse a file that cannot be made small enough before its damages are measured, now with its metadata."""
        if not any(step.kind == choice.KIND for step in self.plan.steps):
            return
        made = read_metadata(self.plan, self.jobs, self.judge)
        if self.judge.verdicts["metadata"].state != "hit":
            self.made["metadata"] = made
            self._settle()
        check_limits(self.resolved, self.judge)

    def _environments(self) -> None:
        """Make the environments that a step will need, before anything else is done: it is the part that may fail."""
        config, missing_ = self.resolved.config, set(self._missing())
        for target in self.resolved.targets:
            wanted = target.environment if isinstance(target, CalibratedTarget) else None
            if wanted is None or wanted.ready or target.action not in missing_:
                continue
            if config.offline and not config.backend.pip:
                fact = f"its environment is not there and offline=true: {wanted.path}"
                remedy = "make it with a network once, or name a folder of packages: backend.pip='--no-index …'"
                raise ActionFailed(f"backend {wanted.backend}", fact, remedy)
            self.jobs.sink.message("info", wanted.announcement())
            environment.create(wanted, shlex.split(config.backend.pip or ""))

    def _settle(self) -> None:
        """Verdicts again: what was made has outputs now, so what reads it has a key."""
        self.judge.all(self.made)

    def _missing(self) -> list[str]:
        return missing(self.resolved, self.judge.verdicts)

    def _output(self, action_id: str) -> Digest:
        return self.judge.verdicts[action_id].outputs[0]

    def _key(self, action: Action) -> str:
        key = self.judge.verdicts[action.id].key
        if key is None:
            raise RuntimeError(
                f"BUG: {action.id} is to run but its key is unknown: {self.judge.verdicts[action.id].why}"
            )
        return key

    def _alone(self, folder: str, key: str, todo: list[Action], run: Callable[[Path, list[Action]], float]) -> float:
        """``run`` in a folder of its own, which the next build goes on in after a kill. Builds of equal copies of a
        model have equal keys, and with them one folder: the second waits, and runs what the first has left."""
        waiting = partial(self.jobs.sink.message, "info", "waiting for another build that makes the same")
        own, asked = self.store.root / folder / key[:32], len(todo)
        with self.store.lock(f"{folder} {key}", on_wait=waiting) as waited:
            if waited:
                self._settle()
                todo = [action for action in todo if self.judge.verdicts[action.id].state != "hit"]
            self.whole &= len(todo) == asked and not own.exists()
            return run(own, todo) if todo else 0.0

    def _note(self, action_id: str, *outputs: Digest) -> None:
        self.made[action_id] = Verdict("hit", "made", self.judge.verdicts[action_id].key, outputs)

    # steps -----------------------------------------------------------------------------------------------------------

    def _tokens(self, step: Step, todo: list[Action]) -> float:
        config, checkpoint, seconds = self.resolved.config, self.resolved.checkpoint, 0.0
        if checkpoint.root is None:
            raise RuntimeError("BUG: tokens for a checkpoint that is not on disk")
        for action in todo:
            conf = config.calibration if action.id == "tokens" else config.evaluation
            use = "calibration" if action.id == "tokens" else "evaluation"
            files = self.judge.files(action)
            task = tokens.Task(
                use=use,
                source=conf.source or tokens.BUILTIN,
                texts=tuple(file for role, file in files.items() if role not in tokens.TOKENIZER),
                model=checkpoint.source,
                folder=checkpoint.root,
                tokenizer={role: file for role, file in files.items() if role in tokens.TOKENIZER},
                params=action.params,
                rows=self.calibration.rows,
            )
            done = self.jobs.run(step.kind, action.id, task, step.ram, step.vram)
            self.cache.put(self._key(action), ActionResult(step.kind, (done.value,)))
            self._note(action.id, done.value)
            seconds += done.seconds
        return seconds

    def _statistics(self, step: Step, todo: list[Action]) -> float:
        every = [self.resolved.graph.actions[o.action] for o in self.calibration.statistics]
        keys = {a.params.layer: self._key(a) for a in every}

        def run(states: Path, todo: list[Action]) -> float:
            wanted = frozenset(a.params.layer for a in todo)
            tokens_, source = self._output(self.calibration.tokens.action), self.judge.checkpoint()
            task = statistics.Task(source, tokens_, every[0].params, keys, wanted, states, step.spill, step.threads)
            last = max(wanted) + 1
            with self.jobs.progress(f"{self.resolved.name}: calibration", last, last, "layers"):
                done = self.jobs.run(step.kind, step.label, task, step.ram, step.vram)
            for layer, digest in done.value.digests.items():
                self._note(f"statistics:{layer}", digest)
            self.read_bytes += done.value.read_bytes
            return done.seconds

        return self._alone("states", keys[max(a.params.layer for a in todo)], todo, run)

    def _solve(self, step: Step, todo: list[Action]) -> float:
        compile_kernels(self.jobs, warm.Task(columns=rounds(todo)))
        items = tuple(self._item(action) for action in sorted(todo, key=lambda a: a.params.layer))
        task = solve.Task(self.judge.checkpoint(), items, step.threads)
        with self.jobs.progress(f"{self.resolved.name}: {step.label}", len(items), len(items), "layers"):
            done = self.jobs.run(step.kind, step.label, task, step.ram, step.vram)
        for action_id, digest in done.value.outputs.items():
            self._note(action_id, digest)
        self.read_bytes += done.value.read_bytes
        return done.seconds

    def _item(self, action: Action) -> solve.Item:
        tensors = tuple(i.name for _, i in action.inputs if isinstance(i, Source))
        below = next(i.action for _, i in action.inputs if isinstance(i, Output))
        return solve.Item(action.id, self._key(action), action.params, self._output(below), tensors)

    def _propagate(self, step: Step, todo: list[Action]) -> float:
        """One target's layers after another's; targets that ask the same share them."""
        compile_kernels(self.jobs, warm.Task(columns=rounds(todo)))
        seconds, wanted = 0.0, {action.id for action in todo}
        chains = {t.tensors: t.name for t in self.resolved.targets if isinstance(t, CalibratedTarget)}
        for chain, name in chains.items():
            lacking = [self.resolved.graph.actions[action] for action in chain if action in wanted]
            if lacking:
                run = partial(self._chain, step, chain[: chain.index(lacking[-1].id) + 1], name)
                seconds += self._alone("states", self._key(lacking[-1]), lacking, run)
        return seconds

    def _chain(self, step: Step, chain: tuple[str, ...], name: str, states: Path, todo: list[Action]) -> float:
        """The layers of a target up to the last of ``todo``."""
        actions = [self.resolved.graph.actions[action] for action in chain[: chain.index(todo[-1].id) + 1]]
        layers = self.calibration.model.layers
        made = [next(iter(self.judge.verdicts[action.id].outputs), None) for action in actions]
        items = tuple(
            propagate.Item(a.id, self._key(a), a.params, layers[a.params.rounding.layer].tensors, output)
            for a, output in zip(actions, made, strict=True)
        )
        tokens_ = self._output(self.calibration.tokens.action)
        task = propagate.Task(self.judge.checkpoint(), tokens_, items, states, step.spill, step.threads)
        with self.jobs.progress(f"{self.resolved.name} → {name}", len(items), len(items), "layers"):
            done = self.jobs.run(step.kind, f"{step.label} '{name}'", task, step.ram, step.vram)
        for action_id, digest in done.value.outputs.items():
            self._note(action_id, digest)
        self.read_bytes += done.value.read_bytes
        return done.seconds

    def _matrix(self, step: Step, todo: list[Action]) -> float:
        layers = tuple(self._output(o.action) for o in self.calibration.statistics)
        tokens_ = self._output(self.calibration.tokens.action)
        specs = tuple(self.resolved.specs.values())
        task = importance.Task(self._key(todo[0]), todo[0].params, tokens_, layers, specs)
        done = self.jobs.run(step.kind, step.label, task, step.ram, step.vram)
        self._note(todo[0].id, done.value)
        return done.seconds

    def _sensitivity(self, step: Step, todo: list[Action]) -> float:
        action = todo[0]
        key, tokens_ = self._key(action), self._output(self.calibration.tokens.action)

        def run(states: Path, _todo: list[Action]) -> float:
            task = sensitivity.Task(key, action.params, self.judge.checkpoint(), tokens_, states, step.threads)
            layers = 2 * len(self.calibration.model.layers)
            with self.jobs.progress(f"{self.resolved.name}: {step.label}", layers, layers, "layers"):
                done = self.jobs.run(step.kind, step.label, task, step.ram, step.vram)
            self._note(action.id, done.value)
            return done.seconds

        return self._alone("states", key, todo, run)

    def _damages(self, step: Step, todo: list[Action]) -> float:
        by_tensor: dict[str, list[Action]] = {}
        for action in todo:
            by_tensor.setdefault(action.id.partition(":")[0], []).append(action)
        items = tuple(self._measured(name, actions) for name, actions in by_tensor.items())
        types = tuple(sorted({action.params.made.type for action in todo}))
        compile_kernels(self.jobs, warm.Task((*types, "F32"), measured=types))
        curvature = self._output(self.calibration.sensitivity.action)
        task = damage.Task(self.resolved.checkpoint.files, items, curvature, step.threads)
        nbytes = sum(piece.nbytes for item in items for piece in item.pieces)
        with self.jobs.progress(f"{self.resolved.name}: {step.label}", len(items), nbytes):
            done = self.jobs.run(step.kind, step.label, task, step.ram)
        for action_id, digest in done.value.items():
            self._note(action_id, digest)
        self.read_bytes += nbytes
        return done.seconds

    def _measured(self, name: str, actions: list[Action]) -> damage.Item:
        numbers = {str(f.path): n for n, f in enumerate(self.resolved.checkpoint.files)}
        sources = [item for role, item in actions[0].inputs if isinstance(item, Source)]
        pieces = tuple(stream.Piece(s.name, numbers[s.file], s.offset, s.nbytes, self.judge.digest(s)) for s in sources)
        wants = tuple(damage.Want(a.id, self._key(a), a.params, self._weighed_by(a)) for a in actions)
        return damage.Item(name, pieces, wants)

    def _weighed_by(self, action: Action) -> InputFile | Digest | None:
        """The importance matrix that an action reads: one that was given, or the one that was made."""
        found = next((item for role, item in action.inputs if role == "imatrix"), None)
        if isinstance(found, Output):
            return self._output(found.action)
        return self.resolved.matrix_files[found] if isinstance(found, Digest) else None

    def _choices(self, step: Step, todo: list[Action]) -> float:
        seconds = 0.0
        for action in todo:
            below = [self.resolved.graph.actions[name] for name in self.resolved.graph.reads(action.id)]
            damages = tuple(
                (made.id.partition(":")[0], made.params.made.type, self._output(made.id))
                for made in below
                if made.kind == damage.KIND
            )
            target, matrix = action.id.partition(":")[2], self._weighed_by(action)
            kvs = self._output("metadata")
            task = choice.Task(target, self._key(action), action.params, kvs, damages, matrix)
            done = self.jobs.run(step.kind, f"{step.label} of '{target}'", task, step.ram)
            self._note(action.id, done.value)
            seconds += done.seconds
        return seconds

    def _directories(self, step: Step, todo: list[Action]) -> float:
        seconds = 0.0
        for action, target, planned in self._laid_out(todo):
            if target.scheme is None:
                raise RuntimeError(f"BUG: {target.name} has no scheme")
            solved = tuple(self._output(a) for a in target.tensors)
            task = directory.Task(
                key=self._key(action),
                checkpoint=self.judge.checkpoint(),
                directory=planned,
                copies=self.judge.files(action),
                scheme=target.scheme,
                solved=solved,
            )
            seconds += self._write(step, f"writing '{target.name}'", target, planned, task)
        return seconds

    def _backends(self, step: Step, todo: list[Action]) -> float:
        seconds = 0.0
        for action, target, planned in self._laid_out(todo):
            run = partial(self._library, step, target, planned)
            seconds += self._alone("backends", self._key(action), [action], run)
        return seconds

    def _library(
        self, step: Step, target: CalibratedTarget, planned: Directory, scratch: Path, todo: list[Action]
    ) -> float:
        (action,) = todo
        if target.environment is None:
            raise RuntimeError(f"BUG: {target.name} has no environment")
        task = backend.Task(
            key=self._key(action),
            place=f"targets.{target.name}",
            checkpoint=self.judge.checkpoint(),
            environment=target.environment,
            tokens=self._output(self.calibration.tokens.action),
            params=action.params,
            directory=planned,
            copies=self.judge.files(action),
            scratch=scratch,
            threads=self.plan.budget.threads,
        )
        by = f" by {action.params.backend} {target.environment.version}"
        held = replace(step, vram=0)  # a device's memory is held by the library, in a process of its own
        return self._write(held, f"{action.params.backend} '{target.name}'", target, planned, task, by)

    def _laid_out(self, todo: list[Action]) -> Iterator[tuple[Action, CalibratedTarget, Directory]]:
        """The targets that ``todo`` makes, each with what is planned of its directory."""
        wanted = {action.id: action for action in todo}
        for target in self.resolved.targets:
            if isinstance(target, CalibratedTarget) and target.action in wanted:
                if target.directory is None:
                    raise RuntimeError(f"BUG: {target.name} is no directory")
                yield wanted[target.action], target, target.directory

    def _write(
        self, step: Step, label: str, target: CalibratedTarget, planned: Directory, task: Any, by: str = ""
    ) -> float:
        """Run a job that makes a directory."""
        title = f"{self.resolved.name} → {target.name}{by}"
        with self.jobs.progress(title, len(planned.files), planned.size, "files"):
            done = self.jobs.run(step.kind, label, task, step.ram, step.vram)
        self._note(target.action, done.value.tree)
        self.read_bytes += done.value.read_bytes
        self.written_bytes += done.value.written_bytes
        return done.seconds
