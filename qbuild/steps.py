"""Calibrated targets → steps: the kinds of jobs that are missing, in order, each with its footprint in the budget."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Protocol

from qbuild import machine
from qbuild.actions import backend, directory, evaluation, importance, propagate, solve, statistics, tokens
from qbuild.backends import footprint as libraries
from qbuild.budget import Budget, Remedy, refuse
from qbuild.calibrated import CalibratedTarget, Calibration
from qbuild.calibration import extent, shapes
from qbuild.evaluation import footprint
from qbuild.graph import Action, Source
from qbuild.lower import PARENT_RAM
from qbuild.recipe import Resolved
from qbuild.vram import CONTEXT

AFTER_ANOTHER = 192 << 20  # what the allocator keeps of the model measured before (measured: 151 MiB)
DOWNLOAD = 1e7  # bytes a second that pip downloads and unpacks, about
BUILTIN_BYTES = 1 << 17  # of the text that comes with qbuild, about

RATES = {statistics.KIND: "forward", solve.KIND: "solve", propagate.KIND: "propagate"}

__all__ = ["RATES", "Step", "evaluations", "missing", "rate_name", "steps"]


class State(Protocol):
    @property
    def state(self) -> str: ...


def rate_name(kind: str, device: str) -> str:
    """The name under which the operations a second of a kind of job are noted: of one thread, or of a device."""
    return f"{RATES[kind]} cuda" if device == "cuda" else RATES[kind]


@dataclass(frozen=True)
class Step:
    """One kind of job. ``ram`` and ``vram`` are the peak of its worker in bytes, ``disk`` what stays of it in the
    store, ``temporary`` what is gone when it ends; ``count`` actions will run. ``notes``: what a user should know
    before it begins."""

    kind: str
    label: str
    count: int
    ram: int
    seconds: float
    disk: int = 0
    temporary: int = 0
    vram: int = 0
    spill: bool = False
    work: float = 0.0  # floating-point operations, where a rate of this machine tells the seconds
    notes: tuple[str, ...] = ()


def missing(resolved: Resolved, verdicts: Mapping[str, State]) -> list[str]:
    """Ids of the calibrated actions that must run, in dependency order: what a stored result rests on need not."""
    want: set[str] = set()
    stack = [t.action for t in resolved.targets if isinstance(t, CalibratedTarget)]
    stack += [resolved.awaited] if resolved.awaited else []
    stack += [resolved.evaluation.tokens] if resolved.evaluation else []
    while stack:
        action = stack.pop()
        if action not in want and verdicts[action].state != "hit":
            want.add(action)
            stack.extend(resolved.graph.reads(action))
    return [action for action in resolved.graph.actions if action in want]


def steps(
    resolved: Resolved, verdicts: Mapping[str, State], budget: Budget, rate: Callable[[str], float]
) -> tuple[Step, ...]:
    """What a build must run before its GGUF pass. Raises BudgetRefused when a step can never fit."""
    if resolved.calibration is None:
        return ()
    todo: dict[str, list[Action]] = {}
    for action_id in missing(resolved, verdicts):
        action = resolved.graph.actions[action_id]
        todo.setdefault(action.kind, []).append(action)
    planner = _Planner(resolved, resolved.calibration, budget, rate)
    makers = {
        tokens.KIND: planner.tokens,
        statistics.KIND: planner.statistics,
        solve.KIND: planner.solve,
        propagate.KIND: planner.propagate,
        importance.KIND: planner.matrix,
        directory.KIND: planner.directories,
        backend.KIND: planner.backends,
    }
    return tuple(make(todo[kind]) for kind, make in makers.items() if kind in todo)


def evaluations(
    resolved: Resolved, verdicts: Mapping[str, State], budget: Budget, rate: Callable[[str], float]
) -> tuple[Step, ...]:
    """What measuring the targets takes, after they are made. Raises BudgetRefused when it can never fit."""
    asked = resolved.evaluation
    todo = [] if asked is None else [name for name, a in asked.results.items() if verdicts[a].state != "hit"]
    if not todo or resolved.calibration is None:
        return ()
    planner = _Planner(resolved, resolved.calibration, budget, rate)
    return (planner.evaluation(todo),)


class _Planner:
    def __init__(
        self, resolved: Resolved, calibration: Calibration, budget: Budget, rate: Callable[[str], float]
    ) -> None:
        self.resolved, self.calibration, self.budget = resolved, calibration, budget
        self.room, self.vram = budget.ram - PARENT_RAM, budget.vram - CONTEXT
        self.model, self.cuda = calibration.model, calibration.device == "cuda"
        self.shapes = {name: tensor.shape for name, tensor in resolved.checkpoint.tensors.items()}
        self._rate = rate
        self.torch = shapes.BASE_CUDA - shapes.BASE if machine.has_torch() else 0  # more to load, on a CPU too

    def rate(self, kind: str) -> float:
        """Operations a second of what computes: all threads, or the device."""
        name = rate_name(kind, self.calibration.device)
        return self._rate(name) * (1 if self.cuda else self.budget.threads)

    def tokens(self, todo: list[Action]) -> Step:
        text = (
            sum(i.nbytes for role, i in todo[0].inputs if isinstance(i, Source) and role.startswith("text ")) or 1 << 17
        )
        ram = tokens.ram(self.resolved.checkpoint.aux, text)
        self._check("calibration tokens", ram, [])
        return Step(tokens.KIND, "calibration tokens", 1, ram, 3.0)

    def statistics(self, todo: list[Action]) -> Step:
        spill, needs = self._pass("calibration", self._forward)
        kept = sum(self.model.layers[a.params.layer].statistics_bytes(self.calibration.detail) for a in todo)
        last = max(a.params.layer for a in todo) + 1
        flops = sum(layer.flops(self.calibration.detail) for layer in self.model.layers[:last]) * self.positions
        seconds = flops / self.rate(statistics.KIND) + 4.0
        label = f"calibration of {len(todo)} layers"
        held = self._held(needs)
        return Step(statistics.KIND, label, len(todo), needs.ram, seconds, kept, self.states, held, spill, flops)

    def propagate(self, todo: list[Action]) -> Step:
        """Targets one after another: each runs the layers up to its last missing one."""
        spill, needs = self._pass("quantizing with error propagation", self._propagation)
        last: dict[solve.Params, int] = {}
        work, kept = 0.0, 0
        for asked in (a.params.rounding for a in todo):
            target, layer = replace(asked, layer=0, linears=()), self.model.layers[asked.layer]
            last[target] = max(last.get(target, 0), asked.layer + 1)
            work += layer.solve_flops(asked.rounding, scaled=asked.scaled)
            kept += layer.code_bytes(asked.bits, asked.group_size)
        for until in last.values():
            work += sum(layer.propagation_flops() for layer in self.model.layers[:until]) * self.positions
        seconds = work / self.rate(propagate.KIND) + 4.0 * len(last)
        label = f"quantizing {len(todo)} layers with error propagation"
        held = self._held(needs)
        return Step(propagate.KIND, label, len(todo), needs.ram, seconds, kept, 2 * self.states, held, spill, work)

    @property
    def positions(self) -> int:
        """Tokens of the calibration."""
        return int(self.resolved.config.calibration.samples) * int(self.resolved.config.calibration.length)

    @property
    def states(self) -> int:
        """Bytes on disk of a model's hidden states, old and new."""
        return 2 * self.positions * self.model.hidden * 4

    def _pass(self, who: str, needs: Callable[[shapes.Step], extent.Device]) -> tuple[bool, extent.Device]:
        """Hidden states stay in RAM where they fit, else on disk; ``calibration.spill`` decides where it is given."""
        wanted = self.resolved.config.calibration
        samples = int(wanted.samples)
        choices = (False, True) if wanted.spill is None else (wanted.spill,)
        found = {spill: needs(self._step(samples, spill)) for spill in choices}
        spill = next((s for s in choices if found[s].ram <= self.room), choices[-1])
        remedies = []
        if not spill:
            spilled = needs(self._step(samples, True)).ram
            remedies.append(Remedy("spill hidden states to disk", spilled, "calibration.spill=true"))
            fewer = self._fewer(samples, needs)
            if fewer:
                less = needs(self._step(fewer, False)).ram
                remedies.append(Remedy(f"fewer samples ({samples} → {fewer})", less, f"calibration.samples={fewer}"))
        self._check(who, found[spill].ram, remedies)
        step = self._step(samples, spill)
        shorter = replace(step, length=max(1, step.length // 2))
        smaller = {f"calibration.length={shorter.length}": needs(shorter)}
        if step.dtype == "float32":
            smaller["calibration.dtype=bfloat16"] = needs(replace(step, dtype="bfloat16"))
        self._check_device(who, found[spill], smaller)
        return spill, found[spill]

    def _forward(self, step: shapes.Step) -> extent.Device:
        config = self.resolved.checkpoint.config
        if self.cuda:
            return extent.device_forward(config, self.shapes, self.model, step)
        return extent.Device(self.torch + extent.forward_ram(config, self.shapes, self.model, step), 0)

    def _propagation(self, step: shapes.Step) -> extent.Device:
        config = self.resolved.checkpoint.config
        if self.cuda:
            return extent.device_propagation(config, self.shapes, self.model, step)
        return extent.Device(self.torch + extent.propagation_ram(config, self.shapes, self.model, step), 0)

    def _solving(self, layer: extent.LayerShape, rounding: str) -> extent.Device:
        if self.cuda:
            return extent.device_solve(layer, rounding)
        return extent.Device(self.torch + extent.solve_ram(layer), 0)

    def _step(self, samples: int, spill: bool) -> shapes.Step:
        wanted, gram = self.resolved.config.calibration, self.calibration.detail == "gram"
        return shapes.Step(samples, int(wanted.length), wanted.dtype, gram, spill, threads=self.budget.threads)

    def _fewer(self, samples: int, needs: Callable[[shapes.Step], extent.Device]) -> int:
        """The largest power of two of samples that fits, or 0."""
        fewer = 1 << (samples.bit_length() - 1)
        while fewer >= 8 and needs(self._step(fewer, False)).ram > self.room:
            fewer //= 2
        return fewer if 8 <= fewer < samples else 0

    def solve(self, todo: list[Action]) -> Step:
        layers = [(self.model.layers[a.params.layer], a.params) for a in todo]
        needs = max(
            (self._solving(layer, params.rounding) for layer, params in layers),
            key=lambda found: (found.vram, found.ram),
        )
        label = f"quantizing {len(todo)} layers"
        self._check(label, needs.ram, [])
        self._check_device(label, needs, {})
        work = sum(layer.solve_flops(params.rounding, scaled=params.scaled) for layer, params in layers)
        kept = sum(layer.code_bytes(params.bits, params.group_size) for layer, params in layers)
        seconds = work / self.rate(solve.KIND) + 3.0
        return Step(solve.KIND, label, len(todo), needs.ram, seconds, kept, vram=self._held(needs), work=work)

    def matrix(self, todo: list[Action]) -> Step:
        ram = importance.RAM + 2 * max(layer.statistics_bytes(self.calibration.detail) for layer in self.model.layers)
        self._check("the importance matrix", ram, [])
        return Step(importance.KIND, "the importance matrix", len(todo), ram, 1.0)

    def directories(self, todo: list[Action]) -> Step:
        made = {a.id for a in todo}
        targets = [t for t in self.resolved.targets if isinstance(t, CalibratedTarget) and t.action in made]
        ram = self.torch + directory.RAM + 3 * max(layer.weights for layer in self.model.layers)
        self._check("writing " + ", ".join(f"'{t.name}'" for t in targets), ram, [])
        seconds = sum(t.nbytes for t in targets) / self._rate("write") + 4.0
        return Step(directory.KIND, "writing", len(todo), ram, seconds)

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
        self._check(names, ram, [])
        if vram > self.budget.vram:
            raised = Remedy("a larger device", vram, f"budget.vram={-(-vram // (1 << 20))}MiB")
            raise refuse(names, "VRAM", vram, self.budget.vram, [raised])
        threads = self.budget.threads if self.calibration.device == "cpu" else 1
        seconds = sum(need.seconds / threads for need in needs) + sum(e.download / DOWNLOAD for e in lacking)
        return Step(
            backend.KIND,
            names,
            len(todo),
            ram,
            seconds,
            sum(e.disk for e in lacking),
            max(t.nbytes for t in targets),
            vram,
            notes=tuple(sorted(e.announcement() for e in lacking)),
        )

    def evaluation(self, todo: list[str]) -> Step:
        wanted, checkpoint = self.resolved.config.evaluation, self.resolved.checkpoint
        text = footprint.Text(int(wanted.samples), int(wanted.length), wanted.dtype)
        files = any(t.name in todo for t in self.resolved.files)

        def needs(text: footprint.Text) -> extent.Device:
            if self.cuda:
                return footprint.on_device(checkpoint.config, self.shapes, text, dequantized=files)
            ram = footprint.evaluation(checkpoint.config, self.shapes, text, dequantized=files)
            return extent.Device(self.torch + ram, 0)

        label, found = f"evaluation of {len(todo)} targets", needs(text)
        ram = found.ram + (AFTER_ANOTHER if len(todo) > 1 else 0)
        self._check(label, ram, [])
        shorter = replace(text, length=max(4, text.length // 2))
        smaller = {f"evaluation.length={shorter.length}": needs(shorter)}
        if text.dtype == "float32":
            smaller["evaluation.dtype=bfloat16"] = needs(replace(text, dtype="bfloat16"))
        self._check_device(label, found, smaller)
        flops = 2.0 * self.model.weights * text.windows * text.length * (len(todo) + 1)
        kept = footprint.states_bytes(checkpoint.config, text)
        seconds = flops / self.rate(statistics.KIND) + 4.0
        return Step(evaluation.RESULT, label, len(todo), ram, seconds, kept, vram=self._held(found))

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

    def _check(self, who: str, ram: int, remedies: list[Remedy]) -> None:
        if ram > self.room:
            needs = ram + PARENT_RAM
            raised = f"budget.ram={-(-needs // (1 << 20))}MiB"
            helping = [r for r in remedies if r.needs <= self.room]
            raise refuse(who, "RAM", needs, self.budget.ram, [*helping, Remedy("the least it runs in", needs, raised)])
