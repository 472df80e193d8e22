"""Calibrated targets → steps: the kinds of jobs that are missing, in order, each with its footprint in the budget."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

from qbuild.actions import backend, directory, evaluation, importance, solve, statistics, tokens
from qbuild.backends import footprint as libraries
from qbuild.budget import Budget, Remedy, refuse
from qbuild.calibrated import CalibratedTarget, Calibration
from qbuild.calibration import extent, shapes
from qbuild.evaluation import footprint
from qbuild.graph import Action, Source
from qbuild.lower import PARENT_RAM
from qbuild.recipe import Resolved

AFTER_ANOTHER = 192 << 20  # what the allocator keeps of the model measured before (measured: 151 MiB)
DOWNLOAD = 1e7  # bytes a second that pip downloads and unpacks, about
BUILTIN_BYTES = 1 << 17  # of the text that comes with qbuild, about

__all__ = ["Step", "evaluations", "missing", "steps"]


class State(Protocol):
    @property
    def state(self) -> str: ...


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
    wanted, checkpoint = resolved.config.evaluation, resolved.checkpoint
    text = footprint.Text(int(wanted.samples), int(wanted.length), wanted.dtype)
    sizes = {name: tensor.shape for name, tensor in checkpoint.tensors.items()}
    files = any(t.name in todo for t in resolved.files)
    ram = footprint.evaluation(checkpoint.config, sizes, text, dequantized=files)
    ram += AFTER_ANOTHER if len(todo) > 1 else 0
    label = f"evaluation of {len(todo)} targets"
    if ram > budget.ram - PARENT_RAM:
        needs = ram + PARENT_RAM
        raised = Remedy("the least it runs in", needs, f"budget.ram={-(-needs // (1 << 20))}MiB")
        raise refuse(label, "RAM", needs, budget.ram, [raised])
    model = resolved.calibration.model
    flops = 2.0 * model.weights * int(wanted.samples) * int(wanted.length) * (len(todo) + 1)
    kept = footprint.states_bytes(checkpoint.config, text)
    seconds = flops / rate("forward") / budget.threads + 4.0
    return (Step(evaluation.RESULT, label, len(todo), ram, seconds, kept),)


class _Planner:
    def __init__(
        self, resolved: Resolved, calibration: Calibration, budget: Budget, rate: Callable[[str], float]
    ) -> None:
        self.resolved, self.calibration, self.budget, self.rate = resolved, calibration, budget, rate
        self.room = budget.ram - PARENT_RAM
        self.model = calibration.model

    def tokens(self, todo: list[Action]) -> Step:
        text = (
            sum(i.nbytes for role, i in todo[0].inputs if isinstance(i, Source) and role.startswith("text ")) or 1 << 17
        )
        ram = tokens.ram(self.resolved.checkpoint.aux, text)
        self._check("calibration tokens", ram, [])
        return Step(tokens.KIND, "calibration tokens", 1, ram, 3.0)

    def statistics(self, todo: list[Action]) -> Step:
        """Hidden states stay in RAM where they fit, else on disk; ``calibration.spill`` decides where it is given."""
        wanted = self.resolved.config.calibration
        samples, length, detail = int(wanted.samples), int(wanted.length), self.calibration.detail
        choices = (False, True) if wanted.spill is None else (wanted.spill,)
        needs = {s: self._forward(samples, s) for s in choices}
        spill = next((s for s in choices if needs[s] <= self.room), choices[-1])
        remedies = []
        if not spill:
            remedies.append(
                Remedy("spill hidden states to disk", self._forward(samples, True), "calibration.spill=true")
            )
            fewer = self._fewer(samples)
            if fewer:
                what = f"fewer samples ({samples} → {fewer})"
                remedies.append(Remedy(what, self._forward(fewer, False), f"calibration.samples={fewer}"))
        self._check("calibration", needs[spill], remedies)
        kept = sum(self.model.layers[a.params.layer].statistics_bytes(detail) for a in todo)
        states = 2 * samples * length * self.model.hidden * 4
        last = max(a.params.layer for a in todo) + 1
        flops = sum(layer.flops(detail) for layer in self.model.layers[:last]) * samples * length
        seconds = flops / self.rate("forward") / self.budget.threads + 4.0
        label = f"calibration of {len(todo)} layers"
        return Step(statistics.KIND, label, len(todo), needs[spill], seconds, kept, states, spill=spill, work=flops)

    def _forward(self, samples: int, spill: bool) -> int:
        wanted, tensors = self.resolved.config.calibration, self.resolved.checkpoint.tensors
        gram = self.calibration.detail == "gram"
        step = shapes.Step(samples, int(wanted.length), wanted.dtype, gram, spill, threads=self.budget.threads)
        sizes = {name: tensor.shape for name, tensor in tensors.items()}
        return extent.forward_ram(self.resolved.checkpoint.config, sizes, self.model, step)

    def _fewer(self, samples: int) -> int:
        """The largest power of two of samples that fits, or 0."""
        fewer = 1 << (samples.bit_length() - 1)
        while fewer >= 8 and self._forward(fewer, False) > self.room:
            fewer //= 2
        return fewer if 8 <= fewer < samples else 0

    def solve(self, todo: list[Action]) -> Step:
        layers = [(self.model.layers[a.params.layer], a.params) for a in todo]
        ram = max(extent.solve_ram(layer) for layer, _ in layers)
        label = f"quantizing {len(todo)} layers"
        self._check(label, ram, [])
        work = sum(layer.solve_flops(params.rounding, scaled=params.scaled) for layer, params in layers)
        kept = sum(layer.code_bytes(params.bits, params.group_size) for layer, params in layers)
        seconds = work / self.rate("solve") / self.budget.threads + 3.0
        return Step(solve.KIND, label, len(todo), ram, seconds, kept, work=work)

    def matrix(self, todo: list[Action]) -> Step:
        ram = importance.RAM + 2 * max(layer.statistics_bytes(self.calibration.detail) for layer in self.model.layers)
        self._check("the importance matrix", ram, [])
        return Step(importance.KIND, "the importance matrix", len(todo), ram, 1.0)

    def directories(self, todo: list[Action]) -> Step:
        made = {a.id for a in todo}
        targets = [t for t in self.resolved.targets if isinstance(t, CalibratedTarget) and t.action in made]
        ram = directory.RAM + 3 * max(layer.weights for layer in self.model.layers)
        self._check("writing " + ", ".join(f"'{t.name}'" for t in targets), ram, [])
        seconds = sum(t.nbytes for t in targets) / self.rate("write") + 4.0
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

    def _check(self, who: str, ram: int, remedies: list[Remedy]) -> None:
        if ram > self.room:
            needs = ram + PARENT_RAM
            raised = f"budget.ram={-(-needs // (1 << 20))}MiB"
            helping = [r for r in remedies if r.needs <= self.room]
            raise refuse(who, "RAM", needs, self.budget.ram, [*helping, Remedy("the least it runs in", needs, raised)])
