"""The evaluation of a model against its source: each goes through its layers once, then their logits are compared."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from qbuild.calibration.forward import Streamed
from qbuild.errors import InputError
from qbuild.evaluation.footprint import ROWS
from qbuild.evaluation.measure import Comparison, Result
from qbuild.evaluation.readers import Tensors

__all__ = ["Errors", "Task", "evaluate", "states", "weight_errors"]

CHUNK = 1 << 20  # weights that are compared at a time
FITS = 3  # of rows and columns; each leaves a thousandth of what their scales add to an error

Errors = dict[str, float]  # by name of a tensor


@dataclass(frozen=True)
class Task:
    """``config``: the source's config.json; ``tokens`` int32 [windows, length]. ``threads`` changes no result beyond
    the order in which sums of products are rounded."""

    config: Mapping[str, Any]
    tokens: np.ndarray
    dtype: str = "float32"
    device: str = "cpu"
    threads: int = 1

    @property
    def windows(self) -> torch.Tensor:
        """int64 [windows, length]. Raises InputError where a window is too short to be measured in halves."""
        windows, length = self.tokens.shape
        if windows < 1 or length < 4:
            fact = f"{windows} windows of {length} tokens cannot be evaluated"
            raise InputError("evaluation", fact, "give more text, and windows of at least 4 tokens")
        return torch.from_numpy(self.tokens.astype(np.int64))


def states(task: Task, model: Tensors) -> torch.Tensor:
    """What the last layer gives: [windows, length, width] in the dtype that is computed in, on the CPU."""
    return _states(task, _streamed(task, model))


def evaluate(task: Task, source: Tensors, source_states: torch.Tensor, model: Tensors) -> Result:
    """``model`` against its source, whose layers are not run again: ``source_states`` is what ``states`` gave of it."""
    streamed = _streamed(task, model)
    own = _states(task, streamed)
    head = _streamed(task, source)
    compared = Comparison(task.tokens.shape[1])
    for window, one, other in zip(task.windows, source_states, own, strict=True):
        for at in range(0, len(window), ROWS):
            rows = slice(at, at + ROWS)
            compared.add(head.logits(one[None, rows])[0], streamed.logits(other[None, rows])[0], window, at)
    for done in (head, streamed):
        done.release()  # not when they are collected: hooks of a model are in cycles
    return compared.result()


def _streamed(task: Task, model: Tensors) -> Streamed:
    torch.set_num_threads(task.threads)
    return Streamed(task.config, model.names, model.read, device=task.device, dtype=task.dtype)


def _states(task: Task, model: Streamed) -> torch.Tensor:
    windows = task.windows
    hidden = torch.empty(*windows.shape, model.width, dtype=model.dtype)
    for number, window in enumerate(windows):
        hidden[number] = model.embed(window[None])[0].cpu()
    model.release()
    for index in range(model.count):
        with model.layer(index) as layer:
            for number in range(len(windows)):
                hidden[number] = layer(hidden[number : number + 1])[0].cpu()
    return hidden


def weight_errors(source: Tensors, model: Tensors, names: Iterable[str], *, scaled: str | None = None) -> Errors:
    """‖W - Ŵ‖² / ‖W‖² of each of ``names``, summed in float64; 0 where both are zero. Experts of a layer count as one.

    ``scaled``: what the names of matrices begin with that AWQ's scales may have changed. The scales are taken out: the
    difference is the least that any scale of each row and each column leaves.
    """
    sums: dict[str, tuple[float, float]] = {}
    for name in names:
        of = re.sub(r"\.experts\.\d+\.", ".experts.", name)
        lost, whole = sums.get(of, (0.0, 0.0))
        more, all_of_it = _compared(source, model, name, scaled=scaled is not None and name.startswith(scaled))
        sums[of] = lost + more, whole + all_of_it
    return {name: lost / whole if lost else 0.0 for name, (lost, whole) in sums.items()}


def _compared(source: Tensors, model: Tensors, name: str, *, scaled: bool) -> tuple[float, float]:
    """‖W - Ŵ‖² and ‖W‖² of one tensor, which is in memory here alone."""
    before, after = (one.read(name).flatten(0, -2) for one in (source, model))
    if scaled:
        after = _unscaled(before.float(), after.float())
    return _squares(before, after)


def _squares(before: torch.Tensor, after: torch.Tensor) -> tuple[float, float]:
    """‖W - Ŵ‖² and ‖W‖² of matrices, a few rows of them widened at a time."""
    rows, lost, whole = max(1, CHUNK // before.shape[1]), 0.0, 0.0
    for at in range(0, len(before), rows):
        wanted = before[at : at + rows].float()
        lost += float((wanted - after[at : at + rows]).square().sum(dtype=torch.float64))
        whole += float(wanted.square().sum(dtype=torch.float64))
    return lost, whole


def _unscaled(before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
    """``after`` with its rows and columns scaled to be as near to ``before`` as they can: alternating least squares."""
    after = after.clone()
    for _ in range(FITS):
        for axis in (0, 1):
            energy = torch.linalg.vecdot(after, after, dim=axis)
            fit = torch.linalg.vecdot(before, after, dim=axis) / torch.where(energy > 0, energy, 1)
            after.mul_(fit.unsqueeze(axis))
    return after
