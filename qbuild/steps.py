"""Calibrated targets → steps: the kinds of jobs that are missing, in order, each with its footprint in the budget."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Protocol

from qbuild import machine
from qbuild.actions import (
    backend,
    choice,
    damage,
    directory,
    evaluation,
    hashing,
    importance,
    metadata,
    propagate,
    sensitivity,
    solve,
    statistics,
    tokens,
    warm,
    weights,
)
from qbuild.backends import footprint as libraries
from qbuild.budget import Budget, Remedy, refuse
from qbuild.calibrated import CalibratedTarget, Calibration
from qbuild.calibration import extent, shapes
from qbuild.calibration.texts import check
from qbuild.digest import Digest
from qbuild.evaluation import footprint
from qbuild.graph import Action, Source
from qbuild.lower import PARENT_RAM, WORKER_RAM, tables_ram
from qbuild.recipe import Resolved
from qbuild.vram import CONTEXT

AFTER_ANOTHER = 48 << 20  # what the allocator keeps of the model measured before (measured: 7 to 39 MiB)
DOWNLOAD = 1e7  # bytes a second that pip downloads and unpacks, about
BUILTIN_BYTES = 1 << 17  # of the text that comes with qbuild, about
STARTING = 4.0  # seconds of a worker that loads torch
LEAST_SAMPLES = 8  # that are worth proposing

RATES = {
    statistics.KIND: "forward", sensitivity.KIND: "forward", solve.KIND: "solve", propagate.KIND: "propagate"
}  # fmt: skip

__all__ = ["RATES", "Step", "evaluations", "hashed", "missing", "rate_name", "steps"]


class State(Protocol):
    @property
    def state(self) -> str: ...

    @property
    def outputs(self) -> tuple[Digest, ...]: ...


class Judged(Protocol):
    """What is stored, what is known of the source, and how fast this machine is."""

    @property
    def verdicts(self) -> Mapping[str, State]: ...

    def digest(self, source: Source) -> Digest | None: ...

    def rate(self, name: str) -> float: ...


def rate_name(kind: str, device: str) -> str:
    """The name under which the operations a second of a kind of job are noted: of one thread, or of a device."""
    return f"{RATES[kind]} cuda" if device == "cuda" else RATES[kind]


@dataclass(frozen=True)
class Step:
    """One kind of job, ``count`` actions. In bytes: ``ram`` and ``vram``, the peak of its worker; ``read``, of the
    source; ``disk``, what stays of it; ``temporary``, what is gone when it ends. ``notes``: how it runs, and what to
    know before it begins."""

    kind: str
    label: str
    count: int
    ram: int
    seconds: float
    disk: int = 0
    temporary: int = 0
    vram: int = 0
    read: int = 0
    threads: int = 1
    spill: bool = False
    work: float = 0.0  # floating-point operations, where a rate of this machine tells the seconds
    notes: tuple[str, ...] = ()


def missing(resolved: Resolved, verdicts: Mapping[str, State]) -> list[str]:
    """Ids of the calibrated actions that must run, in dependency order: what a stored result rests on need not."""
    want: set[str] = set()
    stack = [t.action for t in resolved.targets if isinstance(t, CalibratedTarget)]
    stack += [resolved.awaited] if resolved.awaited else []
    if (asked := resolved.evaluation) and any(verdicts[a].state != "hit" for a in asked.results.values()):
        stack.append(asked.tokens)
    while stack:
        action = stack.pop()
        if action not in want and verdicts[action].state != "hit":
            want.add(action)
            stack.extend(resolved.graph.reads(action))
    return [action for action in resolved.graph.actions if action in want]


def rounds(actions: Iterable[Action]) -> bool:
    """Whether GPTQ's loops over columns run on the CPU for these."""
    kinds = (solve.KIND, propagate.KIND)
    found = (a.params if a.kind == solve.KIND else a.params.rounding for a in actions if a.kind in kinds)
    return any(params.rounding == "gptq" and params.device == "cpu" for params in found)


def hashed(resolved: Resolved, todo: Iterable[str]) -> Iterator[Source]:
    """The sources whose digests must be known before the actions ``todo`` have keys: their own, and all weights."""
    chain = (action.id for action in resolved.graph.actions.values() if action.kind == weights.KIND)
    for action in dict.fromkeys((*todo, *chain)):
        yield from _sources(resolved.graph.actions[action])


def _sources(action: Action) -> Iterator[Source]:
    return (item for _, item in action.inputs if isinstance(item, Source))


def steps(resolved: Resolved, judge: Judged, budget: Budget) -> tuple[Step, ...]:
    """What a build must run before its GGUF pass. Raises BudgetRefused when a step can never fit."""
    if resolved.calibration is None:
        return ()
    todo: dict[str, list[Action]] = {}
    ids = missing(resolved, judge.verdicts)
    for action_id in ids:
        action = resolved.graph.actions[action_id]
        todo.setdefault(action.kind, []).append(action)
    planner = _Planner(resolved, resolved.calibration, budget, judge)
    makers = {
        tokens.KIND: planner.tokens,
        statistics.KIND: planner.statistics,
        solve.KIND: planner.solve,
        propagate.KIND: planner.propagate,
        importance.KIND: planner.matrix,
        sensitivity.KIND: planner.sensitivity,
        damage.KIND: planner.damages,
        choice.KIND: planner.choices,
        directory.KIND: planner.directories,
        backend.KIND: planner.backends,
    }
    made = [make(todo[kind]) for kind, make in makers.items() if kind in todo]
    planner.check(made)
    unknown = {s for s in hashed(resolved, ids) if judge.digest(s) is None} if made else set()
    if unknown:  # behind the text, which takes no time and may be wrong
        made.insert(1 if tokens.KIND in todo else 0, planner.hashing(unknown))
    return tuple(made)


def evaluations(resolved: Resolved, judge: Judged, budget: Budget) -> tuple[Step, ...]:
    """What measuring the targets takes, after they are made. Raises BudgetRefused when it can never fit."""
    asked = resolved.evaluation
    todo = [] if asked is None else [name for name, a in asked.results.items() if judge.verdicts[a].state != "hit"]
    if not todo or resolved.calibration is None:
        return ()
    planner = _Planner(resolved, resolved.calibration, budget, judge)
    made = (planner.evaluation(todo),)
    planner.check(made)
    return made


class _Planner:
    def __init__(self, resolved: Resolved, calibration: Calibration, budget: Budget, judge: Judged) -> None:
        self.resolved, self.calibration, self.budget, self.judge = resolved, calibration, budget, judge
        self.room, self.vram = budget.ram - PARENT_RAM, budget.vram - CONTEXT
        self.model, self.cuda = calibration.model, calibration.device == "cuda"
        self.shapes = {name: tensor.shape for name, tensor in resolved.checkpoint.tensors.items()}
        largest = max(resolved.checkpoint.tensors.values(), key=lambda tensor: tensor.nbytes)
        self.dtype, self.stored = largest.dtype, largest.nbytes // prod(largest.shape)
        self.torch = shapes.BASE_CUDA - shapes.BASE if machine.has_torch() else 0  # more to load, on a CPU too

    def check(self, made: Sequence[Step]) -> None:
        """Raises BudgetRefused where a step can never fit: for the largest, so that what helps it helps all."""
        worst = max(made, key=lambda step: step.ram, default=None)
        if worst is not None and worst.ram > self.room:
            passes = {statistics.KIND: self._forward, propagate.KIND: self._propagation}
            smaller = (
                [] if worst.spill or worst.kind not in passes else self._smaller(passes[worst.kind], worst.threads)
            )
            needs = worst.ram + PARENT_RAM
            least = Remedy("the least it runs in", needs, f"budget.ram={-(-needs // (1 << 20))}MiB")
            helping = [remedy for remedy in smaller if remedy.needs <= self.budget.ram]
            raise refuse(worst.label, "RAM", needs, self.budget.ram, [*helping, least])

    def rate(self, kind: str, threads: int) -> float:
        """Operations a second of what computes: of ``threads``, or of the device."""
        return self.judge.rate(rate_name(kind, self.calibration.device)) * (1 if self.cuda else threads)

    def hashing(self, unknown: set[Source]) -> Step:
        """Every key of a calibrated build rests on the source's bytes, so those that are not known are read first."""
        nbytes = sum(source.nbytes for source in unknown)
        seconds = nbytes / self.judge.rate("read")
        return Step("source.hash", "hashing", count=len(unknown), ram=hashing.RAM, seconds=seconds, read=nbytes)

    def _bytes(self, names: Iterable[str]) -> int:
        return sum(self.resolved.checkpoint.tensors[name].nbytes for name in names)

    def _layers_bytes(self, until: int) -> int:
        """What a pass through the layers before ``until`` reads."""
        names = (name for layer in self.model.layers[:until] for name in layer.tensors)
        return self._bytes(names) + self._bytes(self.model.before)

    def tokens(self, todo: list[Action]) -> Step:
        """Of the calibration and of the evaluation, one after the other. Raises InputError for a text of no use."""
        config = self.resolved.config
        for use, conf in (("calibration", config.calibration), ("evaluation", config.evaluation)):
            if conf.source not in (None, tokens.BUILTIN):
                check(conf.source, int(conf.length), use)
        aux = self.resolved.checkpoint.aux
        sizes = [sum(s.nbytes for s in _sources(a) if s.name not in aux) or BUILTIN_BYTES for a in todo]
        ram = max(tokens.ram(aux, nbytes) for nbytes in sizes)
        return Step(tokens.KIND, "calibration tokens", count=len(todo), ram=ram, seconds=STARTING * len(todo))

    def statistics(self, todo: list[Action]) -> Step:
        step, needs = self._pass("calibration", self._forward)
        kept = sum(self.model.layers[a.params.layer].statistics_bytes(self.calibration.detail) for a in todo)
        last = max(a.params.layer for a in todo) + 1
        flops = sum(layer.flops(self.calibration.detail) for layer in self.model.layers[:last]) * self.positions
        return Step(
            statistics.KIND,
            f"calibration of {len(todo)} layers",
            count=len(todo),
            ram=needs.ram,
            seconds=STARTING + flops / self.rate(statistics.KIND, step.threads),
            disk=kept,
            temporary=self.states,
            vram=self._held(needs),
            read=self._layers_bytes(last),
            threads=step.threads,
            spill=step.spill,
            work=flops,
            notes=(f"one pass over {_how(step)}",),
        )

    def propagate(self, todo: list[Action]) -> Step:
        """Targets one after another: each runs the layers up to its last missing one."""
        step, needs = self._pass("quantizing with error propagation", self._propagation)
        last: dict[solve.Params, int] = {}
        work, kept = 0.0, 0
        for asked in (a.params.rounding for a in todo):
            target, layer = replace(asked, layer=0, linears=()), self.model.layers[asked.layer]
            last[target] = max(last.get(target, 0), asked.layer + 1)
            work += layer.solve_flops(asked.rounding, scaled=asked.scaled)
            kept += layer.code_bytes(asked.bits, asked.group_size)
        for until in last.values():
            work += sum(layer.propagation_flops() for layer in self.model.layers[:until]) * self.positions
        return Step(
            propagate.KIND,
            f"quantizing {len(todo)} layers with error propagation",
            count=len(todo),
            ram=needs.ram,
            seconds=STARTING * len(last) + work / self.rate(propagate.KIND, step.threads),
            disk=kept,
            temporary=2 * self.states,
            vram=self._held(needs),
            read=sum(self._layers_bytes(until) for until in last.values()),
            threads=step.threads,
            spill=step.spill,
            work=work,
            notes=(f"three forward passes for each target over {_how(step)}",),
        )

    @property
    def positions(self) -> int:
        """Tokens of the calibration."""
        return int(self.resolved.config.calibration.samples) * int(self.resolved.config.calibration.length)

    @property
    def states(self) -> int:
        """Bytes on disk of a model's hidden states, old and new."""
        return 2 * self.positions * self.model.hidden * shapes.ITEM[self.resolved.config.calibration.dtype]

    def _pass(self, who: str, needs: Callable[[shapes.Step], extent.Device]) -> tuple[shapes.Step, extent.Device]:
        """Hidden states stay in RAM where they fit, else on disk, and fewer windows are run at once where that does not
        fit either; ``calibration.spill`` decides the first where it is given."""
        wanted = self.resolved.config.calibration
        choices = (False, True) if wanted.spill is None else (wanted.spill,)
        ways = [self._step(int(wanted.samples), t, s) for t in _halved(self._threads) for s in choices]
        step = next((way for way in ways if needs(way).ram <= self.room), ways[-1])
        shorter = replace(step, length=max(1, step.length // 2))
        smaller = {f"calibration.length={shorter.length}": needs(shorter)}
        if step.dtype == "float32":
            smaller["calibration.dtype=bfloat16"] = needs(replace(step, dtype="bfloat16"))
        self._check_device(who, needs(step), smaller)
        return step, needs(step)

    @property
    def _threads(self) -> int:
        return 1 if self.cuda else self.budget.threads

    def _smaller(self, needs: Callable[[shapes.Step], extent.Device], threads: int) -> list[Remedy]:
        """What helps where hidden states must stay in RAM and do not fit."""
        samples = int(self.resolved.config.calibration.samples)

        def whole(samples: int, spill: bool) -> int:
            return needs(self._step(samples, threads, spill)).ram + PARENT_RAM

        found = [Remedy("spill hidden states to disk", whole(samples, True), "calibration.spill=true")]
        fewer = next((n for n in _halved(samples) if whole(n, False) <= self.budget.ram), 0)
        if fewer >= LEAST_SAMPLES:
            what = f"fewer samples ({samples} → {fewer})"
            found.append(Remedy(what, whole(fewer, False), f"calibration.samples={fewer}"))
        return found

    def _forward(self, step: shapes.Step) -> extent.Device:
        config = self.resolved.checkpoint.config
        if self.cuda:
            return extent.device_forward(config, self.shapes, self.model, step)
        return extent.Device(self.torch + extent.forward_ram(config, self.shapes, self.model, step), 0)

    def _propagation(self, step: shapes.Step) -> extent.Device:
        config = self.resolved.checkpoint.config
        if self.cuda:
            return extent.device_propagation(config, self.shapes, self.model, step, self._propagated_codes)
        return extent.Device(self.torch + extent.propagation_ram(config, self.shapes, self.model, step), 0)

    @property
    def _propagated_codes(self) -> int:
        """Bytes of the largest layer that is quantized with error propagation."""
        asked = (a.params.rounding for a in self.resolved.graph.actions.values() if a.kind == propagate.KIND)
        sizes: list[int] = [self.model.layers[one.layer].code_bytes(one.bits, one.group_size) for one in asked]
        return max(sizes)

    def _solving(self, layer: extent.LayerShape, params: solve.Params, threads: int) -> extent.Device:
        way = extent.Way(params.rounding, params.scaled, self.stored)
        if self.cuda:
            return extent.device_solve(layer, way, layer.code_bytes(params.bits, params.group_size))
        more = shapes.TORCH_CUDA if machine.has_torch() else 0
        return extent.Device(more + extent.solve_ram(layer, way, threads), 0)

    def _step(self, samples: int, threads: int, spill: bool) -> shapes.Step:
        wanted, gram = self.resolved.config.calibration, self.calibration.detail == "gram"
        return shapes.Step(samples, int(wanted.length), wanted.dtype, gram, spill, self.stored, threads)

    def solve(self, todo: list[Action]) -> Step:
        layers = [(self.model.layers[a.params.layer], a.params) for a in todo]

        def needed(threads: int) -> extent.Device:
            found = (self._solving(layer, params, threads) for layer, params in layers)
            return max(found, key=lambda one: (one.vram, one.ram))

        ways = [*_halved(self._threads)]
        threads = next((way for way in ways if needed(way).ram <= self.room), ways[-1])
        needs = needed(threads)
        label = f"quantizing {len(todo)} layers"
        self._check_device(label, needs, {})
        work = sum(layer.solve_flops(params.rounding, scaled=params.scaled) for layer, params in layers)
        return Step(
            solve.KIND,
            label,
            count=len(todo),
            ram=needs.ram,
            seconds=STARTING + work / self.rate(solve.KIND, threads),
            disk=sum(layer.code_bytes(params.bits, params.group_size) for layer, params in layers),
            vram=self._held(needs),
            read=sum(self._bytes(layer.tensors) for layer, _ in layers),
            threads=threads,
            work=work,
        )

    def matrix(self, todo: list[Action]) -> Step:
        planned = [layer.statistics_bytes(self.calibration.detail) for layer in self.model.layers]
        made = [self.judge.verdicts[output.action].outputs for output in self.calibration.statistics]
        stored = [digest.size for outputs in made for digest in outputs]  # may hold more: Gram matrices
        ram = importance.RAM + 2 * max(planned + stored)
        size = self.calibration.matrix_bytes
        return Step(importance.KIND, "the importance matrix", count=len(todo), ram=ram, seconds=1.0, disk=size)

    def sensitivity(self, todo: list[Action]) -> Step:
        wanted, layers = self.resolved.config.calibration, self.model.layers
        windows = min(todo[0].params.windows, int(wanted.samples))
        ways = [replace(self._step(windows, threads, True), gram=False) for threads in _halved(self._threads)]
        step = next((way for way in ways if self._reverse(way).ram <= self.room), ways[-1])
        label, needs = "sensitivity of the weights", self._reverse(step)
        self._check_device(label, needs, {})
        flops = 3 * 2.0 * self.model.weights * step.windows * step.length
        return Step(
            sensitivity.KIND,
            label,
            count=len(todo),
            ram=needs.ram,
            seconds=STARTING + flops / self.rate(sensitivity.KIND, step.threads),
            disk=self.model.curvature_bytes(self.shapes),
            temporary=(len(layers) + 1) * shapes.state_bytes(self.resolved.checkpoint.config, step),
            vram=self._held(needs),
            read=2 * self._bytes(self.shapes),
            threads=step.threads,
            work=flops,
            notes=(f"forwards and backwards over {_how(step)}",),
        )

    def _reverse(self, step: shapes.Step) -> extent.Device:
        config = self.resolved.checkpoint.config
        if self.cuda:
            return extent.device_reverse(config, self.shapes, self.model, step)
        return extent.Device(self.torch + extent.reverse_ram(config, self.shapes, self.model, step), 0)

    def damages(self, todo: list[Action]) -> Step:
        specs = {action.id: self.resolved.specs[action.id.partition(":")[0]] for action in todo}
        chunk = max(max(damage.CHUNK, spec.shape[-1] * spec.transform.unit) for spec in specs.values())
        buffers = (self.budget.threads + 1) * chunk * damage.WEIGHT_RAM
        base = WORKER_RAM + tables_ram(action.params.made.type for action in todo)
        ram = max(base + 2 * self.model.curvature_bytes(self.shapes) + buffers, warm.RAM)
        seconds = sum(
            specs[a.id].weights * (1 / self.judge.rate(f"encode {a.params.made.type}") + 1 / self.judge.rate("compare"))
            for a in todo
        )
        read = self._bytes({piece.source for spec in specs.values() for piece in spec.pieces})
        tensors = len({spec.name for spec in specs.values()})
        label, threads = f"{len(todo)} damages to {tensors} tensors", self.budget.threads
        return Step(
            damage.KIND, label, count=len(todo), ram=ram, seconds=1.0 + seconds / threads, read=read, threads=threads
        )

    def choices(self, todo: list[Action]) -> Step:
        """The files that are then written are in the price: they are planned when their types are known."""
        made = {a.id for a in todo}
        targets = [t for t in self.resolved.targets if isinstance(t, CalibratedTarget) and t.action in made]
        size = sum(t.nbytes for t in targets)
        encode = sum(t.weights for t in targets) / self.judge.rate("encode Q4_K") / self.budget.threads
        return Step(
            choice.KIND,
            "the choice of types",
            count=len(todo),
            ram=max(choice.RAM, metadata.ram(self.resolved.checkpoint.aux)),
            seconds=2.0 * len(todo) + encode + size / self.judge.rate("write"),
            disk=size,
            read=self._bytes(self.shapes),
        )

    def directories(self, todo: list[Action]) -> Step:
        made = {a.id for a in todo}
        targets = [t for t in self.resolved.targets if isinstance(t, CalibratedTarget) and t.action in made]
        schemes = {t.scheme for t in targets if t.scheme is not None}
        held = max(one.unpacking_bytes(s.bits, s.group_size) for one in self.model.layers for s in schemes)
        ram = held + (directory.RAM_CUDA if machine.has_torch() else directory.RAM)
        size = sum(t.nbytes for t in targets)
        planned = [t.directory for t in targets if t.directory is not None]
        read = sum(self._bytes(i.source for file in one.files for i in file.items if not i.linear) for one in planned)
        seconds = STARTING * len(todo) + size / self.judge.rate("write")
        return Step(
            directory.KIND, "writing directories", count=len(todo), ram=ram, seconds=seconds, disk=size, read=read
        )

    def backends(self, todo: list[Action]) -> Step:
        """Other libraries, one target after the other; their environments are made where they are not there yet."""
        made = {a.id: a.params for a in todo}
        targets = [t for t in self.resolved.targets if isinstance(t, CalibratedTarget) and t.action in made]
        lacking = {t.environment for t in targets if t.environment is not None and not t.environment.ready}
        names = ", ".join(f"'{t.name}' by {made[t.action].backend}" for t in targets)
        wanted = self.resolved.config.calibration
        tokens_ = int(wanted.samples) * int(wanted.length)
        needs = [libraries.needs(params.backend, self.model, tokens_, params.device) for params in made.values()]
        ram, vram = max(need.ram for need in needs), max(need.vram for need in needs)
        if vram > self.budget.vram:
            raised = Remedy("a larger device", vram, f"budget.vram={-(-vram // (1 << 20))}MiB")
            raise refuse(names, "VRAM", vram, self.budget.vram, [raised])
        seconds = sum(need.seconds / self._threads for need in needs) + sum(e.download / DOWNLOAD for e in lacking)
        read = len(todo) * self._bytes(self.shapes)  # hashed again: a library reads by itself
        return Step(
            backend.KIND,
            names,
            count=len(todo),
            ram=ram,
            seconds=seconds + read / self.judge.rate("read"),
            disk=sum(e.disk for e in lacking) + sum(t.nbytes for t in targets),
            temporary=max(t.nbytes for t in targets),
            vram=vram,
            read=read,
            notes=tuple(sorted(e.announcement() for e in lacking)),
        )

    def evaluation(self, todo: list[str]) -> Step:
        wanted, checkpoint = self.resolved.config.evaluation, self.resolved.checkpoint
        text = footprint.Text(int(wanted.samples), int(wanted.length), wanted.dtype)
        fitted = {t.name for t in self.resolved.targets if isinstance(t, CalibratedTarget) and t.limit is not None}
        files = not fitted.union(t.name for t in self.resolved.files).isdisjoint(todo)
        made = [t.scheme for t in self.resolved.targets if isinstance(t, CalibratedTarget) and t.name in todo]
        held = {scheme.dtype for scheme in made if scheme is not None} | ({"F32"} if files else set())

        def needs(text: footprint.Text) -> extent.Device:
            if self.cuda:
                args = checkpoint.config, self.shapes, text
                return footprint.on_device(*args, source=self.dtype, targets=held)
            ram = footprint.evaluation(checkpoint.config, self.shapes, text, dequantized=files)
            return extent.Device(self.torch + ram, 0)

        label, found = f"evaluation of {len(todo)} targets", needs(text)
        ram = found.ram + (AFTER_ANOTHER if len(todo) > 1 else 0)
        shorter = replace(text, length=max(4, text.length // 2))
        smaller = {f"evaluation.length={shorter.length}": needs(shorter)}
        if text.dtype == "float32":
            smaller["evaluation.dtype=bfloat16"] = needs(replace(text, dtype="bfloat16"))
        self._check_device(label, found, smaller)
        flops = 2.0 * self.model.weights * text.windows * text.length * (len(todo) + 1)
        kept = footprint.states_bytes(checkpoint.config, text)
        seconds = STARTING + flops / self.rate(statistics.KIND, self._threads)
        note = f"{text.windows} windows of {text.length} tokens; the source once, each target once"
        return Step(
            evaluation.RESULT,
            label,
            count=len(todo),
            ram=ram,
            seconds=seconds,
            disk=kept,
            vram=self._held(found),
            notes=(note,),
        )

    def _held(self, needs: extent.Device) -> int:
        """Of the device's memory, with what a process takes before it allocates."""
        return needs.vram + CONTEXT if self.cuda else 0

    def _check_device(self, who: str, needs: extent.Device, smaller: Mapping[str, extent.Device]) -> None:
        """``smaller``: what would be needed with an override."""
        if not self.cuda or needs.vram <= self.vram:
            return
        whole = needs.vram + CONTEXT
        helping = [
            Remedy("smaller windows" if "length" in override else "half the width of numbers", held, override)
            for override, found in smaller.items()
            if (held := found.vram + CONTEXT) <= self.budget.vram
        ]
        raised = Remedy("the least it runs in", whole, f"budget.vram={-(-whole // (1 << 20))}MiB")
        remedies = [*helping, raised, Remedy("compute on the CPU", 0, "device=cpu")]
        raise refuse(who, "VRAM", whole, self.budget.vram, remedies)


def _how(step: shapes.Step) -> str:
    """A pass in words."""
    where = "on disk" if step.spill else "in RAM"
    return f"{step.windows} windows of {step.length} tokens, hidden states {where}"


def _halved(number: int) -> Iterator[int]:
    """The number, its half, and so on to 1."""
    while number:
        yield number
        number //= 2
