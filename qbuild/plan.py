"""Graph → plan: every action with a verdict and the reason, footprints against the budget, and what it will cost.

The plan reads the store's index and small files beside the weights. It loads no kernels, no transformers, no torch.
"""

from __future__ import annotations

import contextlib
import json
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from math import prod
from pathlib import Path
from typing import Any

from qbuild import device, machine, schema
from qbuild.actions import (
    backend,
    choice,
    damage,
    directory,
    evaluation,
    file,
    importance,
    metadata,
    propagate,
    sensitivity,
    solve,
    statistics,
    stream,
    tensor,
    tokens,
    warm,
    weights,
)
from qbuild.arch.metadata import check_overrides, quantized_kvs
from qbuild.budget import Budget, Footprint, Remedy, parse_size, refuse
from qbuild.cache import ActionCache, ActionResult
from qbuild.calibrated import CalibratedTarget
from qbuild.checkpoint import Checkpoint
from qbuild.digest import Digest, digest_bytes
from qbuild.errors import BudgetRefused, ConfigError, InputError
from qbuild.fsutil import disk_free, may_write
from qbuild.ggml import QTYPES
from qbuild.gguffile import KV
from qbuild.graph import Action, Input, Source
from qbuild.inputs import InputFile
from qbuild.kernels.gpu.table import TYPES as ON_GPU
from qbuild.lower import CHUNKS, PARENT_RAM, Strategy, Wanted, choose_strategy, kernels_of, outputs, pass_task
from qbuild.manifest import action_key, walk
from qbuild.recipe import FileTarget, Made, Resolved, resolve
from qbuild.steps import Step, evaluations, missing, rounds, steps
from qbuild.store import Store

__all__ = ["Judge", "Plan", "TargetPlan", "Verdict", "check_limits", "make", "manifest_parts", "versions"]

MISSING = "not installed"
NEVER = 1 << 62  # nothing was stored since then

# Weights a second of one core, and bytes a second of a disk; replaced by this machine's own after its first build.
TYPICAL_RATE = {"read": 1e9, "write": 4e8, "forward": 5e10, "solve": 8e10, "propagate": 4e10, "compare": 2e8}
TYPICAL_RATE |= {"forward cuda": 1e13, "solve cuda": 2e13, "propagate cuda": 1e13}
TYPICAL_RATE |= {
    f"encode {name}": rate
    for name, rate in (
        *(("F32", 2e9), ("F16", 4e9), ("BF16", 4e9), ("Q8_0", 2e9), ("Q4_0", 2e9), ("Q4_1", 2e9), ("Q5_0", 2e9)),
        *(("Q5_1", 2e9), ("Q2_K", 3e8), ("Q3_K", 5e8), ("Q4_K", 3e8), ("Q5_K", 3e8), ("Q6_K", 4e8)),
        *(("IQ1_S", 1e8), ("IQ1_M", 1e8), ("IQ2_XXS", 5e7), ("IQ2_XS", 3e7), ("IQ2_S", 5e7), ("IQ3_XXS", 1.6e7)),
        *(("IQ3_S", 3e7), ("IQ4_NL", 2e8), ("IQ4_XS", 2e8), ("MXFP4", 2e9), ("NVFP4", 2e9), ("TQ1_0", 4e9)),
        *(("TQ2_0", 4e9), ("Q1_0", 4e9), ("Q2_0", 4e9)),
    )
}

TYPICAL_RATE |= {stream.rate_name(name, "cuda"): 5e9 for name in ON_GPU}
STARTING = {"cpu": 0.0, "cuda": 6.0}  # seconds until a worker with torch and a CUDA context encodes

KINDS = (
    *(tensor, file, metadata, tokens, weights, statistics, solve, propagate, importance, directory, backend),
    *(sensitivity, damage, choice),
)
SALTS = {module.KIND: module.SALT for module in KINDS}
SALTS |= dict.fromkeys((evaluation.STATES, evaluation.RESULT), evaluation.SALT)
VERSIONS: dict[str, tuple[str, ...]] = {
    module.KIND: module.VERSIONS for module in (metadata, tokens, statistics, solve, propagate, sensitivity, choice)
}  # packages whose release can change an action's bytes
VERSIONS |= dict.fromkeys((evaluation.STATES, evaluation.RESULT), evaluation.VERSIONS)


@dataclass(frozen=True)
class Verdict:
    """``hit``: a result is stored. ``run``: it will be made. ``unknown``: the source must be hashed first.

    ``gone``: digests of outputs that ``gc`` freed. What was made of them is keyed by them, and needs them no more.
    """

    state: str
    why: str
    key: str | None = None
    outputs: tuple[Digest, ...] = ()
    gone: tuple[Digest, ...] = ()


@dataclass(frozen=True)
class TargetPlan:
    name: str
    path: Path
    verdict: Verdict
    bytes: int
    exact: bool  # False: the metadata has not been read yet, its size is estimated
    weights: int
    types: dict[str, tuple[int, int]]  # type -> (tensors, bytes)
    verdicts: dict[str, int]  # of its tensors
    at_most: bool = False  # a fitted file whose types are not known yet: ``bytes`` is its limit

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.bytes / self.weights

    def to_json(self) -> dict[str, Any]:
        verdict = {"state": self.verdict.state, "why": self.verdict.why}
        return asdict(self) | {"path": str(self.path), "verdict": verdict, "bits_per_weight": self.bits_per_weight}


@dataclass(frozen=True)
class Plan:
    """What a build would do. ``verdicts`` is by action id."""

    resolved: Resolved
    store: Store
    budget: Budget
    out: Path
    verdicts: dict[str, Verdict]
    targets: tuple[TargetPlan, ...]
    strategy: Strategy
    steps: tuple[Step, ...]  # of calibrated targets, before the GGUF pass
    gguf_pass: tuple[Step, ...]  # one, or none
    after: tuple[Step, ...]  # of the evaluation, when all targets are made
    footprint: Footprint
    read_bytes: int
    seconds: float  # estimated, by this machine's own rates once it has built something
    since: int  # results that were stored before do not count
    kernels: tuple[str, ...]  # types that this machine has no kernels of yet: the time to compile them is not counted
    files: Mapping[str, InputFile]  # small files by path, as they were when the verdicts were given

    @property
    def making(self) -> Footprint:
        """Peaks while the targets are made; measuring them comes after."""
        return _peaks((*self.steps, *self.gguf_pass))

    @property
    def every(self) -> tuple[Step, ...]:
        """All that will run, in order; nothing where everything is there."""
        return (*self.steps, *self.gguf_pass, *self.after)

    def to_json(self) -> dict[str, Any]:
        return {
            "model": {"name": self.resolved.name, "source": self.resolved.checkpoint.source},
            "out": str(self.out),
            "budget": asdict(self.budget),
            "predicted": asdict(self.footprint) | {"read_bytes": self.read_bytes, "seconds": self.seconds},
            "strategy": asdict(self.strategy),
            "to_compile": list(self.kernels),
            "steps": [asdict(step) for step in self.every],
            "notices": [asdict(notice) for notice in self.resolved.notices],
            "targets": {t.name: t.to_json() for t in self.targets},
        }


def manifest_parts(action: Action, digests: list[tuple[str, Digest]]) -> Iterator[tuple[str, str]]:
    """The walk of an action whose input digests are known: its key, and its explanation."""
    return walk(action.kind, SALTS[action.kind], action.params, digests, _versions(action.kind))


def _versions(kind: str) -> list[tuple[str, str]]:
    return [(package, _version(package)) for package in VERSIONS.get(kind, ())]


@lru_cache
def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        if package == "torch":
            return MISSING  # a plan can be made without it, and says what a build will ask for
        raise InputError("environment", f"the package {package} is missing", f"pip install {package}") from None


def versions(kinds: Iterable[str]) -> dict[str, str]:
    """Versions of the packages whose release can change bytes of these kinds of actions."""
    return {package: found for kind in kinds for package, found in _versions(kind) if found != MISSING}


class Judge:
    """Gives verdicts. Digests of source bytes come from the records of unchanged files, small files are hashed here."""

    def __init__(
        self, resolved: Resolved, store: Store, since: int = 0, files: Mapping[str, InputFile] | None = None
    ) -> None:
        """``since``: results that were stored before do not count; ``files``: small files that were hashed already."""
        self.resolved, self.store = resolved, store
        self.cache = ActionCache(store, since)
        self.records: dict[str, dict[int, Digest] | None] = {}
        self.learned: dict[tuple[str, int], Digest] = {}
        self.verdicts: dict[str, Verdict] = {}
        read = resolved.checkpoint.config_file
        self.small = {str(read.path): read} if read else {}  # side files and calibration text, hashed here
        self.small |= files or {}
        self.identities = {str(f.path): f.identity for f in resolved.checkpoint.files}

    def all(self, made: Mapping[str, Verdict] | None = None) -> dict[str, Verdict]:
        """A verdict for every action; those in ``made`` have theirs."""
        for action in self.resolved.graph.actions.values():
            self.verdicts[action.id] = (made or {}).get(action.id) or self._judge(action)
        return self.verdicts

    def digest(self, source: Source) -> Digest | None:
        """The digest of source bytes, if it is known without reading weights."""
        if source.file and source.file not in self.identities:
            if source.file not in self.small:
                self.small[source.file] = InputFile.taken(Path(source.file))
            return self.small[source.file].digest
        learned = self.learned.get((source.file, source.offset))
        if learned is not None:
            return learned
        if source.file not in self.records:
            self.records[source.file] = self._record(source.file)
        record = self.records[source.file]
        found = record.get(source.offset) if record else None
        return found if found is not None and found.size == source.nbytes else None

    def files(self, action: Action) -> dict[str, InputFile]:
        """The small files that an action reads, by role, as they were when its key was made of them."""
        read = ((role, item) for role, item in action.inputs if isinstance(item, Source))
        return {role: self.small[item.file] for role, item in read if item.file in self.small}

    def checkpoint(self) -> Checkpoint:
        """The source with the digests of its tensors, as far as they are known."""
        found, digests = self.resolved.checkpoint, {}
        for one in found.tensors.values() if found.files else ():
            path = str(found.files[one.file].path)
            digests[one.name] = self.digest(Source(one.name, path, one.offset, one.nbytes))
        tensors = {name: replace(one, digest=digests.get(name)) for name, one in found.tensors.items()}
        return replace(found, tensors=tensors)

    def _record(self, path: str) -> dict[int, Digest] | None:
        identity = self.identities.get(path)
        if identity is None:
            return None
        with contextlib.suppress(OSError):
            return self.store.sources.all(identity())
        return None

    def inputs(self, action: Action) -> tuple[list[tuple[str, Digest]], dict[str, str]]:
        """Known input digests by role, and why the others are missing."""
        found: list[tuple[str, Digest]] = []
        missing: dict[str, str] = {}
        for role, item in action.inputs:
            digest, why = self._input(item)
            if digest is None:
                missing[role] = why
            else:
                found.append((role, digest))
        return found, missing

    def _input(self, item: Input) -> tuple[Digest | None, str]:
        if isinstance(item, Digest):
            return item, ""
        if isinstance(item, Source):
            return self.digest(item), f"{item.name} is hashed first"
        before = self.verdicts[item.action]
        known = before.outputs or before.gone
        if known:
            return known[0], ""
        return None, f"{item.action} is made first" if before.state == "run" else before.why

    def _judge(self, action: Action) -> Verdict:
        digests, missing = self.inputs(action)
        if missing:
            return Verdict("unknown" if self._hinted(action) else "run", next(iter(missing.values())))
        key = action_key(manifest_parts(action, digests))
        if action.kind == weights.KIND:
            return Verdict("hit", "known", key, (digest_bytes(key.encode()),))
        known = [found for found in (self.cache.find(key), self._fuller(action, digests)) if found is not None]
        result = next(filter(self.cache.stored, known), None)
        if result is not None:
            return Verdict("hit", "stored", key, result.outputs)
        if known:
            return Verdict("run", "its result is no longer stored", key, gone=known[0].outputs)
        return Verdict("run", "all again (-B)" if self.cache.since else "no result is stored under its key", key)

    def _fuller(self, action: Action, digests: list[tuple[str, Digest]]) -> ActionResult | None:
        """A result that holds more than is asked for: with a Gram matrix its diagonal is kept, the same numbers."""
        if action.kind != statistics.KIND or action.params.detail != "diagonal":
            return None
        whole = replace(action, params=replace(action.params, detail="gram"))
        return self.cache.find(action_key(manifest_parts(whole, digests)))

    def kv_bytes(self, target: FileTarget) -> tuple[int, bool]:
        """Bytes of a file's key-value pairs, and whether that is exact or an estimate."""
        kvs = self.kvs(target)
        if kvs is not None:
            return sum(len(kv.raw) for kv in kvs), not target.awaits
        return self.vocabulary() // 2 + 4096, False

    def vocabulary(self) -> int:
        """Bytes of the tokenizer: it and its merges make nearly all key-value pairs, without quotes and ids."""
        aux = self.resolved.checkpoint.aux
        return next((aux[n].stat().st_size for n in ("tokenizer.json", "tokenizer.model") if n in aux), 2 << 20)

    def ram_before(self, todo: list[FileTarget], device: str) -> int:
        """What must run before the pass, at its largest."""
        verdict = self.verdicts.get("metadata")
        reading = 0 if verdict is None or verdict.outputs else metadata.ram(self.resolved.checkpoint.aux)
        kernels = warm.left(kernels_of(self.resolved, todo, device))
        return max(reading, warm.ram(kernels) if kernels.names else 0)

    def learn(self, sources: Mapping[tuple[str, int], Digest]) -> None:
        """Digests that a pass took, by file and offset: they hold for what it made, whatever the files are now."""
        self.learned = dict(sources)

    def kvs(self, target: FileTarget) -> list[KV] | None:
        """The key-value pairs of a file, if they are known without running anything."""
        if self.resolved.checkpoint.kind == "gguf":
            kvs = list(self.resolved.checkpoint.kvs)
        else:
            made = self.verdicts["metadata"].outputs
            blob = self.store.read_bytes(made[0]) if made else None
            if blob is None:
                return None
            kvs = metadata.unpack(blob)
        params = self.resolved.graph.actions[target.action].params
        check_overrides(kvs, params.overrides, f"targets.{target.name}.override_kv")
        return quantized_kvs(kvs, params.file_type, params.imatrix, params.overrides, params.blocks)

    def target_plan(self, target: FileTarget, size: int, exact: bool, out: Path) -> TargetPlan:
        types: dict[str, tuple[int, int]] = {}
        weights = 0
        for spec, type_ in target.choices:
            count = prod(spec.shape)
            tensors, nbytes = types.get(type_, (0, 0))
            types[type_] = (tensors + 1, nbytes + count // QTYPES[type_].block * QTYPES[type_].nbytes)
            weights += count
        states = Counter(self.verdicts[a].state for a in target.tensors)
        path = out / target.file_name
        verdict = self.verdicts[target.action]
        return TargetPlan(target.name, path, verdict, size, exact, weights, types, dict(states))

    def calibrated_plan(self, target: CalibratedTarget, out: Path) -> TargetPlan:
        states = Counter(self.verdicts[a].state for a in target.tensors)
        path, verdict = out / target.file_name, self.verdicts[target.action]
        size, exact = target.nbytes, target.exact
        if verdict.outputs and target.directory is None and target.limit is None:
            size, exact = verdict.outputs[0].size, True
        types, most = dict(target.types), target.limit is not None
        return TargetPlan(target.name, path, verdict, size, exact, target.weights, types, dict(states), most)

    def seconds(self, todo: list[FileTarget], read: int, written: int, strategy: Strategy) -> float:
        """Estimated time of a pass: encoding on its threads, or moving the bytes, whichever is longer."""
        wanted = {a: spec for t in todo for (spec, _), a in zip(t.choices, t.tensors, strict=True)}
        types = ((spec, self.resolved.graph.actions[action].params.type, action) for action, spec in wanted.items())
        encode = sum(
            spec.weights / self.rate(stream.rate_name(type_, strategy.device))
            for spec, type_, action in types
            if self.verdicts[action].state != "hit"
        )
        moving = read / self.rate("read") + written / self.rate("write")
        return STARTING[strategy.device] + max(encode / strategy.threads, moving)

    def rate(self, name: str) -> float:
        """Weights or bytes a second: measured on this machine, else typical."""
        return self.cache.rate(name) or TYPICAL_RATE.get(name, 100e6)

    def _hinted(self, action: Action) -> bool:
        """Results exist that hashing may turn into hits."""
        if self.cache.since:
            return False
        if action.kind == tensor.KIND:
            name, type_ = action.id.rpartition(":")[0], action.params.type
            nbytes = sum(i.nbytes for _, i in action.inputs if isinstance(i, Source))
            return self.cache.has_hint(stream.hint_of(name, nbytes, type_))
        return any(self.verdicts[before].state == "unknown" for before in self.resolved.graph.reads(action.id))


def store_dir(config: schema.Config) -> Path:
    return Path(config.store.dir).expanduser().absolute() if config.store.dir else machine.cache_dir() / "store"


def out_dir(resolved: Resolved) -> Path:
    return Path(resolved.config.out or f"outputs/{resolved.name}").expanduser().absolute()


def make(config: schema.Config, *, fetch: bool, began: int = NEVER) -> Plan:
    """The plan of a configuration. Raises BudgetRefused when it can never fit.

    ``began``: when the command did, in nanoseconds since the epoch: with -B what was stored before does not count.
    """
    store = Store(store_dir(config))
    resolved, judge = _judged(config, store, fetch, began if config.rebuild else 0)
    out = out_dir(resolved)
    verdicts = judge.verdicts
    gpu = device.gpu(config)
    budget = resolve_budget(config, store.root, out, gpu)
    kv_bytes = [judge.kv_bytes(t) for t in resolved.files]
    outs = [outputs(t, size) for t, (size, _) in zip(resolved.files, kv_bytes, strict=True)]
    todo = [item for files in outs for item in files if verdicts[item.target.action].state != "hit"]
    files = {
        t.name: judge.target_plan(t, sum(item.layout.size for item in made), exact, out)
        for t, made, (_, exact) in zip(resolved.files, outs, kv_bytes, strict=True)
    }
    check_limits(resolved, judge)
    resolved = replace(resolved, checkpoint=judge.checkpoint())  # a worker finds out when it changed since
    calibrated = {t.name: judge.calibrated_plan(t, out) for t in resolved.targets if isinstance(t, CalibratedTarget)}
    targets = tuple((files | calibrated)[t.name] for t in resolved.targets)
    strategy, passing = _gguf_pass(config, judge, todo, budget, gpu)
    ahead, after = steps(resolved, judge, budget), evaluations(resolved, judge, budget)
    every = (*ahead, *passing, *after)
    if every:
        _check_places(config, store.root, out)
    copied = sum(t.bytes for t in targets if t.verdict.state != "hit") if config.store.link == "copy" else 0
    disk = copied + sum(s.disk for s in every) + max((s.temporary for s in every), default=0)
    _check_disk(disk, budget, targets, files, copied)
    footprint = replace(_peaks(every), disk=disk)
    read, seconds = sum(s.read for s in every), sum(s.seconds for s in every)
    return Plan(
        resolved=resolved,
        store=store,
        budget=budget,
        out=out,
        verdicts=verdicts,
        targets=targets,
        strategy=strategy,
        steps=ahead,
        gguf_pass=passing,
        after=after,
        footprint=footprint,
        read_bytes=read,
        seconds=seconds,
        since=judge.cache.since,
        kernels=_to_compile(judge, [wanted.target for wanted in todo], strategy.device),
        files=judge.small,
    )


def _to_compile(judge: Judge, files: list[FileTarget], device: str) -> tuple[str, ...]:
    """Types whose kernels the files, or damages that are still to be measured, will need first; GPTQ's loops too."""
    ids = missing(judge.resolved, judge.verdicts)
    todo = [judge.resolved.graph.actions[action] for action in ids]
    types = {a.params.made.type for a in todo if a.kind == damage.KIND}
    asked = kernels_of(judge.resolved, files, device)
    return warm.left(replace(asked, measured=tuple(types), columns=rounds(todo))).names


def _peaks(steps: Collection[Step]) -> Footprint:
    """Of jobs that run one after the other, with the process that starts them beside."""
    ram = max((PARENT_RAM + step.ram for step in steps), default=0)
    return Footprint(ram, max((step.vram for step in steps), default=0))


def _gguf_pass(
    config: schema.Config, judge: Judge, todo: list[Wanted], budget: Budget, gpu: machine.Gpu | None
) -> tuple[Strategy, tuple[Step, ...]]:
    """How the files ``todo`` are made in one pass, on the device that is done first, and what that takes. Raises
    BudgetRefused where it fits on none."""
    first = Strategy(CHUNKS["cpu"][0], budget.threads)
    if not todo:
        return first, ()
    files, size = [wanted.target for wanted in todo], sum(wanted.layout.size for wanted in todo)
    read = sum(t.nbytes for t in pass_task(judge.resolved, todo, first, {}).tensors)
    found: list[tuple[float, Strategy, Footprint]] = []
    devices = device.for_gguf(config, gpu)
    for name in devices:
        try:
            strategy, needs = choose_strategy(judge.resolved, todo, budget, judge.ram_before(files, name), name)
        except BudgetRefused:
            if name == devices[-1] and not found:
                raise
        else:
            found.append((judge.seconds(files, read, size, strategy), strategy, needs))
    seconds, strategy, needs = min(found, key=lambda item: item[0])
    step = Step(
        "gguf.pass", "writing GGUF files", count=len(todo), ram=needs.ram - PARENT_RAM, seconds=seconds, disk=size,
        read=read, vram=needs.vram, threads=strategy.threads,
    )  # fmt: skip
    return strategy, (step,)


def _judged(config: schema.Config, store: Store, fetch: bool, since: int) -> tuple[Resolved, Judge]:
    """The graph with verdicts. What calibration has made already takes part in the graph."""
    resolved = resolve(config, fetch=fetch)
    judge = Judge(resolved, store, since)
    judge.all()
    made = _made(resolved, judge)
    if made != Made():
        resolved = resolve(config, fetch=fetch, made=made, checkpoint=resolved.checkpoint)
        judge = Judge(resolved, store, since, judge.small)
        judge.all()
    return resolved, judge


def _made(resolved: Resolved, judge: Judge) -> Made:
    """What is stored of what the graph waits for."""

    def stored(action: str) -> Digest | None:
        return judge.verdicts[action].outputs[0] if judge.verdicts[action].state == "hit" else None

    matrix = stored(resolved.awaited) if resolved.awaited else None
    path = judge.store.path(matrix) if matrix else None
    if resolved.awaited and path is None:
        return Made()
    fitted = [t for t in resolved.targets if isinstance(t, CalibratedTarget) and t.limit is not None]
    chosen = {t.name: judge.store.read_bytes(digest) for t in fitted if (digest := stored(t.action)) is not None}
    return Made(path, {name: json.loads(data) for name, data in chosen.items() if data is not None})


def check_limits(resolved: Resolved, judge: Judge) -> None:
    """Refuse fitted files that no types make small enough. Until its metadata is known, a file has none here."""
    for target in resolved.targets:
        if isinstance(target, CalibratedTarget) and target.limit is not None:
            made = judge.verdicts["metadata"].outputs
            blob = judge.store.read_bytes(made[0]) if made else None
            kvs = [] if blob is None else quantized_kvs(metadata.unpack(blob), 0, target.limit.noted)
            more = judge.vocabulary() + 4096 if blob is None else 0
            target.limit.check(sum(len(kv.raw) for kv in kvs), f"targets.{target.name}", more)


def resolve_budget(config: schema.Config, store: Path, out: Path, gpu: machine.Gpu | None) -> Budget:
    """``auto`` becomes what this machine has: the least of physical, cgroup and available memory; free disk; cores; the
    free memory of the GPU that may be used."""
    wanted, here = config.budget, machine.inspect()

    def size(name: str, value: str | int, auto: int) -> int:
        return auto if value == "auto" else parse_size(value, f"budget.{name}")

    ram, vram = size("ram", wanted.ram, here.memory), device.vram(config, gpu)
    disk = size("disk", wanted.disk, min(disk_free(store), disk_free(out)))
    return Budget(ram, vram, disk, here.cores if wanted.threads == "auto" else int(wanted.threads))


def _check_places(config: schema.Config, store: Path, out: Path) -> None:
    """Refuse where nothing can be written, before it reads as a budget of nothing. A store says itself that it is
    read-only: it still serves."""
    if not may_write(out):
        raise ConfigError(str(out), "is no folder that can be written", "choose another folder: out=DIRECTORY")
    for place, setting in ((store, "store.dir"), (out, "out")):
        if config.budget.disk == "auto" and disk_free(place) == 0:
            remedy = f"choose another folder: {setting}=DIRECTORY"
            raise BudgetRefused(str(place), "nothing is free on its file system", remedy)


def _check_disk(
    needs: int, budget: Budget, targets: tuple[TargetPlan, ...], files: Collection[str], copied: int
) -> None:
    """``files``: names of the targets that are single files; ``copied``: bytes of outputs beside the store's own."""
    if needs <= budget.disk:
        return
    todo = [t for t in targets if t.verdict.state != "hit"]
    remedies = []
    if copied:
        remedies.append(Remedy("link outputs to the store", needs - copied, "store.link=auto"))
    sizes = {t.name: t.bytes * (2 if copied else 1) for t in todo if t.name in files}
    if len(targets) > 1 and sizes and min(sizes.values()) <= budget.disk:
        smallest = min(sizes, key=sizes.__getitem__)
        remedies.append(Remedy(f"only {smallest}", sizes[smallest], f"target=gguf/{smallest}"))
    remedies.append(Remedy("another disk", needs, "store.dir=/BIG/DISK/store out=/BIG/DISK/out"))
    who = f"writing {', '.join(t.name for t in todo)}" if todo else "the evaluation"
    raise refuse(who, "disk", needs, budget.disk, remedies)
