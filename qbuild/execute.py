"""Plan → results: runs what is missing, in workers, and writes the outputs and ``build.json``."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Collection
from contextlib import ExitStack
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import qbuild
from qbuild import measured, plan, schema, staged, worker
from qbuild.actions import directory, file, stream
from qbuild.cache import ActionCache, ActionResult
from qbuild.calibrated import MATRIX, CalibratedTarget
from qbuild.digest import Digest, digest_bytes
from qbuild.errors import ConfigError, StoreError
from qbuild.gguffile import KV, split_name
from qbuild.graph import Source
from qbuild.inputs import changed
from qbuild.lower import headed, kernels_of, pass_task, predict_ram, predict_vram
from qbuild.plan import Judge, Plan
from qbuild.progress import Sink
from qbuild.recipe import AUTO, FileTarget, calibrated
from qbuild.running import Jobs
from qbuild.staged import Stage
from qbuild.steps import missing

__all__ = ["build"]

MEASURABLE = 1 << 24  # weights: with fewer, starting up is what one measures
MOVABLE = 1 << 30  # bytes: fewer stay in the page cache


def build(config: schema.Config, sink: Sink, since: int | None = None) -> dict[str, Any]:
    """Make everything the configuration asks for; returns the content of ``build.json``.

    ``since``: with -B results count that were stored since then (nanoseconds since the epoch); None: since now.
    """
    began, now = time.monotonic(), time.time_ns()
    # A launcher may have sent the job to a machine whose clock is behind.
    planned = partial(plan.make, config, fetch=True, began=now if since is None else min(since, now))
    made = _sound_plan(planned, sink)
    for notice in made.resolved.notices if made.every else ():  # else the answer, which comes at once, has them
        sink.message("notice", str(notice))
    with ExitStack() as stack:
        stack.enter_context(made.store.in_use())
        waited, waiting = False, partial(sink.message, "info", "waiting for another build that makes the same file")
        for name in sorted(set(_lock_names(made))):
            waited |= stack.enter_context(made.store.lock(name, on_wait=waiting))
        if waited:  # the other build may have made what we wanted
            made = _sound_plan(planned, sink)
        jobs, stage, predicted = Jobs(made, sink), None, made.making
        if made.steps:
            stage = Stage(made, jobs)
            stage.run()
            made = jobs.plan = planned()
            _check_unchanged(stage.judge, made, missing(made.resolved, made.verdicts))
        run = _Build(made, sink, jobs, stage)
        run.predicted = max(predicted, made.making, key=lambda needs: needs.ram)
        run.all()
        if made.resolved.evaluation is not None:
            finished = planned()
            asked = [a for a in finished.resolved.graph.targets.values() if finished.verdicts[a].state != "hit"]
            _check_unchanged(run.judge, finished, asked + missing(finished.resolved, finished.verdicts))
            run.totals["actions"] |= measured.counts(finished)
            run.evaluation = measured.measure(finished, jobs)
        return run.report(time.monotonic() - began)


def _check_unchanged(judge: Judge, made: Plan, asked: list[str]) -> None:
    """What was made is kept under the digests that files had for ``judge``. A plan that still asks for some of it knows
    another digest: raises InputError."""
    if not asked:
        return
    for path in judge.small.keys() | made.files.keys():  # one may have come, or gone
        if judge.small.get(path) != made.files.get(path):
            raise changed(Path(path))
    before = judge.checkpoint()
    for name, tensor in before.tensors.items():
        now = made.resolved.checkpoint.tensors.get(name)
        if now is None or now.digest is None or now.digest != tensor.digest:
            raise changed(before.files[tensor.file].path, name)
    raise StoreError(str(made.store.root), f"{asked[0]} was made, and is gone", "run again: it is made anew")


def _sound_plan(planned: Callable[[], Plan], sink: Sink) -> Plan:
    """A plan whose stored files are right: one that is damaged is dropped, and planned to be made again."""
    made = planned()
    hits = [t for t in made.targets if t.verdict.state == "hit"]
    damaged = [t.name for t in hits if not all(map(made.store.check_blob, t.verdict.outputs))]
    if damaged:
        sink.message("warning", f"the stored file of {', '.join(damaged)} is damaged: it is dropped and made again")
        made = planned()
    return made


def _lock_names(made: Plan) -> list[str]:
    """Locks for the files to be made, by where their bytes come from: builds that start cold know no digests.

    Two targets may share one, such as directories that differ only in how their codes are found.
    """
    identities = tuple(f.identity() for f in made.resolved.checkpoint.files)
    names = []
    for target in made.targets:
        if target.verdict.state != "hit":
            params = made.resolved.graph.actions[made.resolved.graph.targets[target.name]].params
            names.append(digest_bytes(repr((identities, params)).encode()).hash)
    return names


class _Build:
    """One run of a plan, after its calibrated ``stage``. Each step leaves its result in the store before the next."""

    def __init__(self, made: Plan, sink: Sink, jobs: Jobs, stage: Stage | None) -> None:
        self.plan, self.sink, self.jobs, self.stage = made, sink, jobs, stage
        self.store, self.resolved = made.store, made.resolved
        self.cache = ActionCache(made.store)
        self.judge = Judge(made.resolved, made.store, files=made.files)
        self.results: dict[str, dict[str, Any]] = {}
        self.evaluation: dict[str, Any] | None = None
        self.predicted = made.making
        self.totals: dict[str, Any] = {"computed": 0, "reused": 0, "read_bytes": 0, "written_bytes": 0, "seconds": {}}
        self.totals["actions"] = stage.counts if stage else {}
        if stage:
            self.totals["read_bytes"] += stage.read_bytes
            self.totals["written_bytes"] += stage.written_bytes

    def all(self) -> None:
        self.judge.verdicts = dict(self.plan.verdicts)
        for target in self.plan.targets:
            if target.verdict.state == "hit":
                self._serve(target)
        todo = [t for t in self.resolved.files if t.name not in self.results]
        if todo:
            self._metadata()
            todo = self._hash(todo)
        if todo:
            staged.compile_kernels(self.jobs, kernels_of(self.resolved, todo, self.plan.strategy.device))
            self._pass(todo)

    def _serve(self, target: plan.TargetPlan) -> None:
        """Put a stored file in its place."""
        made = next(t for t in self.resolved.targets if t.name == target.name)
        files = self._deliver(made, target.verdict.outputs)
        counts, seconds = {"hit": sum(target.verdicts.values())}, 0.0
        if self.stage and made.action in self.stage.computed:
            ran = sum(action in self.stage.computed for action in made.tensors)
            counts, seconds = {"run": ran, "hit": counts["hit"] - ran}, sum(self.stage.seconds.values())
        self.results[target.name] = self._result(made, target.verdict.outputs, files, counts, seconds)

    def _deliver(self, made: FileTarget | CalibratedTarget, outputs: tuple[Digest, ...]) -> list[Path]:
        """Put the files of a target in their places; where there are several, the first output lists them."""
        out = self.plan.out
        if isinstance(made, CalibratedTarget) and made.directory is not None:
            listed = directory.listed(self.store, outputs[0], made.name)
            found = {out / made.file_name / inside: digest for inside, digest in listed.items()}
            self._clear(out / made.file_name, found)
        elif isinstance(made, FileTarget) and made.shards:  # a target of another name may have made them
            found = {out / name: digest for name, digest in zip(made.file_names, outputs[1:], strict=True)}
        else:
            found = {out / made.file_name: outputs[0]}
        for path, digest in found.items():
            self.store.link_out(digest, path, self.resolved.config.store.link, target=made.name)
        return list(found)

    def _clear(self, folder: Path, found: Collection[Path]) -> None:
        """What an earlier build put into a folder and this one has not goes: a loader would prefer an old
        model.safetensors to new shards."""
        for row in self.store.outputs():
            stale = row.path.parent == folder and row.path not in found
            if stale and self.store.output_current(row.path, row.digest):
                row.path.unlink(missing_ok=True)

    def _metadata(self) -> None:
        if self.resolved.checkpoint.kind != "gguf":
            self.judge.verdicts["metadata"] = staged.read_metadata(self.plan, self.jobs, self.judge)

    def _hash(self, todo: list[FileTarget]) -> list[FileTarget]:
        """Hash what changed while results for it exist; what then turns out to be stored is served, the rest returned.

        In a cold build nothing is unknown: there hashing rides on the read that quantizing needs.
        """
        actions = [self.resolved.graph.actions[a] for t in todo for a in t.tensors]
        unknown = [a for a in actions if self.judge.verdicts[a.id].state == "unknown"]
        sources = {i for a in unknown for _, i in a.inputs if isinstance(i, Source) and self.judge.digest(i) is None}
        if not sources:
            return todo
        self.totals["read_bytes"] += staged.hash_sources(self.plan, self.jobs, self.judge, sources)
        metadata_verdict = self.judge.verdicts.get("metadata")
        self.judge.all()
        if metadata_verdict is not None:
            self.judge.verdicts["metadata"] = metadata_verdict
        for target in list(todo):
            verdict = self.judge.verdicts[target.action]
            if verdict.state == "hit" and all(map(self.store.check_blob, verdict.outputs)):
                files, counts = self._deliver(target, verdict.outputs), {"hit": len(target.tensors)}
                self.results[target.name] = self._result(target, verdict.outputs, files, counts, 0.0)
                todo = [t for t in todo if t is not target]
        return todo

    def _pass(self, todo: list[FileTarget]) -> None:
        wanted = [item for target in todo for item in headed(target, self._kvs(target))]
        actions = [self.resolved.graph.actions[a] for t in todo for a in t.tensors]
        sources = {i for a in actions for _, i in a.inputs if isinstance(i, Source)}
        known = {s: d for s in sources if (d := self.judge.digest(s)) is not None}
        task = replace(pass_task(self.resolved, wanted, self.plan.strategy, known), since=self.plan.since)
        label = "gguf pass " + ", ".join(f"'{t.name}'" for t in todo)
        title = f"{self.resolved.name} → {', '.join(t.name for t in todo)}"
        with self.jobs.progress(title, len(task.tensors), sum(t.nbytes for t in task.tensors)):
            done = self.jobs.run("gguf.pass", label, task, predict_ram(task), predict_vram(task))
        files, tally = done.value
        self._finish(files, tally, done)

    def _kvs(self, target: FileTarget) -> list[KV]:
        found = self.judge.kvs(target)
        if found is None:  # without them the file would load nowhere, and be served for ever
            raise StoreError(str(self.store.root), "the model's metadata is damaged", "run again: it is made anew")
        return found

    def _finish(self, files: list[stream.FileResult], tally: stream.Tally, done: worker.Done) -> None:
        self.totals["read_bytes"] += tally.read_bytes
        self.totals["written_bytes"] += tally.written_bytes
        for name in ("computed", "reused", "seconds"):
            self.totals[name] = getattr(tally, name)
        for rate, (weights, seconds) in tally.encoded.items():
            if weights > MEASURABLE:
                self.cache.note_rate(rate, weights / max(seconds, 1e-6))
        for name, nbytes in (("read", tally.read_bytes), ("write", tally.written_bytes)):
            if nbytes > MOVABLE:
                self.cache.note_rate(name, nbytes / max(tally.seconds[name], 1e-6))
        judge = Judge(self.resolved, self.store, files=self.plan.files)
        judge.learn(self.judge.learned | tally.sources)
        judge.all()
        self.judge = judge
        for target in self.resolved.files:
            parts = [part for part in files if part.target == target.name]
            if parts:
                self._made(target, parts, done)

    def _made(self, target: FileTarget, parts: list[stream.FileResult], done: worker.Done) -> None:
        """Keep the result of a target whose files a pass has made, and deliver them."""
        verdict = self.judge.verdicts[target.action]
        if verdict.key is None:
            raise RuntimeError(f"BUG: {target.name} was made but its key is unknown: {verdict.why}")
        outputs = tuple(part.digest for part in parts)
        inputs = self.judge.verdicts["metadata"].outputs if "metadata" in self.judge.verdicts else ()
        if target.shards:
            names = (split_name("shard", number, len(outputs)) for number in range(len(outputs)))
            listed = self.store.put_bytes(directory.tree(dict(zip(names, outputs, strict=True))))
            outputs, inputs = (listed, *outputs), (*inputs, listed)  # an input: gc keeps the list with the shards
        if target.fitted:
            inputs += self.judge.verdicts[target.fitted].outputs
        if getattr(self.resolved.config.targets[target.name], "imatrix", None) == AUTO:
            inputs += self.judge.verdicts[MATRIX].outputs  # its values key the tensors
        self.cache.put(verdict.key, ActionResult(file.KIND, outputs, inputs))
        counts = {"hit": sum(part.reused for part in parts), "run": sum(part.computed for part in parts)}
        self.results[target.name] = self._result(target, outputs, self._deliver(target, outputs), counts, done.seconds)

    def _result(
        self,
        made: FileTarget | CalibratedTarget,
        outputs: tuple[Digest, ...],
        files: list[Path],
        counts: dict[str, int],
        seconds: float,
    ) -> dict[str, Any]:
        target = next(t for t in self.plan.targets if t.name == made.name)
        ran = counts.get("run", 0) > 0
        nbytes = sum(d.size for d in outputs[1:]) or outputs[0].size  # of several files the first is their list
        return {
            "path": str(target.path),
            "files": [str(path) for path in files],
            "digest": str(outputs[0]),
            "bytes": nbytes,
            "bits_per_weight": round(8 * nbytes / target.weights, 4),
            "verdicts": {k: v for k, v in counts.items() if v},
            "seconds": round(seconds, 3),
            "peak_ram": self.jobs.peak if ran else 0,
            "predicted_ram": self.predicted.ram if ran else 0,
            "peak_vram": self.jobs.peak_vram if ran else 0,
            "predicted_vram": self.predicted.vram if ran else 0,
            "calibration": self._calibration(made.name),
        }

    def _calibration(self, name: str) -> dict[str, Any] | None:
        """The text that a target was calibrated on, by the digest of its tokens; None where its bytes know none."""
        config, calibration = self.resolved.config, self.resolved.calibration
        if calibration is None or not calibrated(config.targets[name]):
            return None
        verdict = self.plan.verdicts[calibration.tokens.action]
        found = verdict.outputs or verdict.gone
        asked = {key: getattr(config.calibration, key) for key in ("source", "samples", "length", "seed", "dtype")}
        return asked | {"digest": str(found[0]) if found else None}

    # report -----------------------------------------------------------------------------------------------------------

    def report(self, seconds: float) -> dict[str, Any]:
        """The content of ``build.json``, written beside the outputs when anything about it changed."""
        resolved = self.resolved
        kinds = {action.kind for action in resolved.graph.actions.values()}
        files = {f.path.name: f.path.stat().st_size for f in resolved.checkpoint.files}
        document = {
            "model": {
                "name": resolved.name,
                "source": resolved.checkpoint.source,
                "revision": resolved.checkpoint.revision,
                "files": files,
                "inputs": self._provenance(),
            },
            "targets": {t.name: self.results[t.name] for t in self.plan.targets},
            "evaluation": self.evaluation,
            "notices": [asdict(notice) for notice in resolved.notices],
            "totals": self.totals | {"wall_seconds": round(seconds, 3)},
            "jobs": self.jobs.noted,
            "versions": {"qbuild": qbuild.__version__} | plan.versions(kinds),
        }
        path = self.plan.out / "build.json"
        if self.jobs.noted or not path.exists():
            write_json(path, document)
        return document

    def _provenance(self) -> str:
        """One digest over every source digest: equal for equal weights and side files, wherever they lie."""
        judge, texts = self.judge, []
        for action in self.resolved.graph.actions.values():
            for role, item in action.inputs:
                if isinstance(item, Source):
                    texts.append(f"{item.name} {role} {judge.digest(item)}")
        return str(digest_bytes("\n".join(sorted(set(texts))).encode()))


def write_json(path: Path, document: dict[str, Any]) -> None:
    write_text(path, json.dumps(document, indent=2) + "\n")


def write_text(path: Path, text: str) -> None:
    """Atomically: a reader sees the old text or the new one."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = path.with_name(f".{path.name}.{os.getpid()}")
        beside.write_text(text)
        beside.replace(path)
    except OSError as error:
        raise ConfigError(
            str(path), f"cannot be written: {error.strerror}", "choose another folder: out=DIRECTORY"
        ) from None
