"""The pass that measures curvature: through the model forwards, keeping what each layer gets, and then backwards, with
one layer in memory at a time in both directions."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from qbuild.calibration.collect import Collector
from qbuild.calibration.curvature import Curvature, Term
from qbuild.calibration.forward import Layer, Streamed
from qbuild.calibration.shapes import Linear, linears
from qbuild.calibration.weights import Read
from qbuild.errors import InputError, StoreError
from qbuild.fsutil import disk_error, read_exact, write_all
from qbuild.heap import settle, trim

__all__ = ["Pass", "measure"]

ROWS = 64  # positions whose logits and their gradients are in memory at a time

Progress = Callable[[int, str], None]  # layers done, of twice as many as the model has; where it is


@dataclass(frozen=True)
class Pass:
    """``config``: the checkpoint's config.json, ``tensors`` the shapes of its tensors, ``tokens`` int32 [windows,
    length]. ``states`` is a folder for what each layer gets; ``threads`` changes no bit."""

    config: Mapping[str, Any]
    tensors: Mapping[str, tuple[int, ...]]
    tokens: np.ndarray
    states: Path
    dtype: str = "float32"
    device: str = "cpu"
    threads: int = 1


@dataclass
class _Sums:
    """Of one use of a tensor: squares of inputs and of gradients, float64, over ``count`` tokens that it saw."""

    cols: torch.Tensor
    rows: torch.Tensor
    count: int

    def add(self, other: _Sums) -> None:
        self.cols += other.cols
        self.rows += other.rows
        self.count += other.count


@dataclass
class _Found:
    """The sums of a model by linear and use, of ``tokens`` in all."""

    tokens: int
    sums: dict[tuple[str, str], _Sums] = field(default_factory=dict)

    def add(self, name: str, use: str, part: _Sums) -> None:
        if (name, use) in self.sums:
            self.sums[name, use].add(part)
        else:
            self.sums[name, use] = part

    def curvature(self, tensors: Mapping[str, tuple[int, ...]]) -> Curvature:
        """Raises InputError where a gradient was NaN or infinite."""
        uses: dict[tuple[str, str], dict[int, Term]] = {}
        for (name, use), sums in self.sums.items():
            plain, matrix = _matrix(name)
            uses.setdefault((plain, use), {})[matrix] = self._term(name, sums)
        found: dict[str, list[Term]] = {}
        for (plain, _), parts in uses.items():
            shape = tensors.get(plain) or tensors[f"{plain}.weight"]
            found.setdefault(plain, []).append(_stacked(parts, shape))
        return Curvature({name: tuple(terms) for name, terms in found.items()})

    def _term(self, name: str, sums: _Sums) -> Term:
        rows, cols = (sums.rows / self.tokens).float().cpu().numpy(), (sums.cols / sums.count).float().cpu().numpy()
        if not (np.isfinite(rows).all() and np.isfinite(cols).all()):
            remedy = "check the weights, or compute in float32: calibration.dtype=float32"
            raise InputError(name, "gradients or inputs are NaN or infinite", remedy)
        return Term(rows, cols[None])


def _matrix(name: str) -> tuple[str, int]:
    """``experts.up_proj[3]`` is the fourth matrix of a stacked tensor."""
    match = re.fullmatch(r"(.*)\[(\d+)\]", name)
    return (match[1], int(match[2])) if match else (name, 0)


def _stacked(parts: Mapping[int, Term], shape: Sequence[int]) -> Term:
    """The matrices of a tensor of this shape as one term."""
    if len(shape) == 2:
        return parts[0]
    rows, cols = np.zeros((shape[0], shape[1]), np.float32), np.zeros((shape[0], shape[2]), np.float32)
    for matrix, term in parts.items():
        rows[matrix], cols[matrix] = term.rows, term.cols[0]
    return Term(rows.reshape(-1), cols)


def measure(task: Pass, read: Read, progress: Progress) -> Curvature:
    """Run the pass. Raises InputError for a model that cannot be run or whose gradients cannot be used."""
    torch.set_num_threads(1)  # as in a calibration: windows are split over threads, sums are not
    settle()
    model = Streamed(task.config, task.tensors, read, device=task.device, dtype=task.dtype)
    windows = torch.from_numpy(task.tokens.astype(np.int64))
    found = _Found(windows.numel())
    threads = task.threads if task.device == "cpu" else 1
    with ThreadPoolExecutor(threads) as pool, _kept(task, model) as kept:
        _forwards(model, windows, kept, pool, progress)
        gradients = _head(model, kept, windows, found)
        model.release()
        for index in reversed(range(model.count)):
            wanted = linears(model.prefix, index, task.tensors)
            with model.layer(index) as layer:
                names_of = Collector(index, model.parameters(index), [w.name for w in wanted], gram=False).names
                _backwards(layer, _Linears(wanted, names_of), kept, gradients, found, pool)
            trim()
            progress(2 * model.count - index, f"layer {index}, backwards")
        _embedding(model, windows, gradients, found)
    return found.curvature(task.tensors)


# hidden states -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Kept:
    """What each layer gets of each window, in a file: [layers + 1, windows, length, width]."""

    descriptor: int
    folder: Path
    windows: int
    shape: tuple[int, int, int]
    dtype: torch.dtype

    @property
    def size(self) -> int:
        return self.shape[1] * self.shape[2] * int(self.dtype.itemsize)

    def put(self, layer: int, window: int, hidden: torch.Tensor) -> None:
        data = hidden.contiguous().cpu().view(torch.uint8).numpy()
        try:
            write_all(self.descriptor, memoryview(data).cast("B"), (layer * self.windows + window) * self.size)
        except OSError as error:
            raise disk_error(error, self.folder, self.size) from None

    def get(self, layer: int, window: int) -> torch.Tensor:
        """[1, length, width]"""
        buffer = bytearray(self.size)
        if not read_exact(self.descriptor, memoryview(buffer), (layer * self.windows + window) * self.size):
            raise StoreError(str(self.folder), "a file of hidden states became shorter", "start the build again")
        return torch.frombuffer(buffer, dtype=self.dtype).view(self.shape)


@contextmanager
def _kept(task: Pass, model: Streamed) -> Iterator[_Kept]:
    task.states.mkdir(parents=True, exist_ok=True)
    path = task.states / "layers.hidden"
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
    try:
        windows, length = task.tokens.shape
        yield _Kept(descriptor, task.states, windows, (1, length, model.width), model.dtype)
    finally:
        os.close(descriptor)
        path.unlink(missing_ok=True)


# the way ------------------------------------------------------------------------------------------------------------


def _forwards(model: Streamed, windows: torch.Tensor, kept: _Kept, pool: Executor, progress: Progress) -> None:
    for number, window in enumerate(windows):
        kept.put(0, number, model.embed(window[None]))
    model.release()
    model.prepare(windows.shape[1])
    for index in range(model.count):
        with model.layer(index) as layer:

            def through(number: int, layer: Layer = layer, index: int = index) -> None:
                kept.put(index + 1, number, layer(kept.get(index, number)))

            list(pool.map(through, range(len(windows))))
        progress(index + 1, f"layer {index}")


def _head(model: Streamed, kept: _Kept, windows: torch.Tensor, found: _Found) -> torch.Tensor:
    """The gradients by what the last layer gives: [windows, length, width], of tokens that the model itself draws."""
    head, name = model.head()
    gradients = torch.empty(len(windows), *kept.shape[1:], dtype=kept.dtype)

    def note(_module: nn.Module, inputs: tuple[torch.Tensor, ...], made: torch.Tensor) -> None:
        cols = _squares(inputs[0].detach())
        made.register_hook(lambda g: found.add(name, "output", _Sums(cols, _squares(g), g[..., 0].numel())))

    hook = head.register_forward_hook(note)
    for number in range(len(windows)):
        hidden, draw = kept.get(model.count, number), torch.Generator(model.device).manual_seed(number)
        for at in range(0, hidden.shape[1], ROWS):
            part = hidden[:, at : at + ROWS].to(model.device).requires_grad_()
            logits = model.logits(part, grad=True)[0].float()
            drawn = torch.multinomial(logits.detach().softmax(-1), 1, generator=draw)[:, 0]
            loss = nn.functional.cross_entropy(logits, drawn, reduction="sum")
            gradients[number, at : at + ROWS] = torch.autograd.grad(loss, part)[0][0].cpu()
    hook.remove()
    return gradients


def _backwards(
    layer: Layer, wanted: _Linears, kept: _Kept, gradients: torch.Tensor, found: _Found, pool: Executor
) -> None:
    """One layer for all windows. Sums are added in the order of the windows, so no bit depends on the threads."""

    def through(number: int) -> _Watch:
        watch = _Watch(wanted)
        with watch:
            made = layer.pull(kept.get(layer.index, number), gradients[number][None])
        gradients[number] = made[0].cpu()
        return watch

    for watch in pool.map(through, range(len(gradients))):
        for name, part in watch.sums.items():
            found.add(name, "output", part)


def _embedding(model: Streamed, windows: torch.Tensor, gradients: torch.Tensor, found: _Found) -> None:
    """A row that is looked up is read as often as its token occurs, and what it gives is what its columns give."""
    module, name = model.embedding()
    given: list[torch.Tensor] = []
    hook = module.register_forward_hook(lambda _module, _inputs, made: given.append(made.requires_grad_()))
    for window, gradient in zip(windows, gradients, strict=True):
        given.clear()
        hidden = model.embed(window[None], grad=True)
        by_rows = torch.autograd.grad(hidden, given[0], gradient[None].to(model.device))[0]
        seen = torch.bincount(window, minlength=model.vocabulary).double().to(model.device)
        found.add(name, "lookup", _Sums(_squares(by_rows), seen, window.numel()))
    hook.remove()


def _squares(x: torch.Tensor) -> torch.Tensor:
    return x.reshape(-1, x.shape[-1]).float().square().sum(0, dtype=torch.float64)


# a layer's linears --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Linears:
    """``names_of``: the linears that a weight is made of, () for anything else."""

    linears: tuple[Linear, ...]
    names_of: Callable[[torch.Tensor], tuple[str, ...]]

    def rows(self, weight: torch.Tensor) -> list[tuple[str, slice]]:
        """The linears of a weight with their rows of it: one after another where it is made of several."""
        sizes, at, found = {linear.name: linear.outputs for linear in self.linears}, 0, []
        for name in self.names_of(weight):
            found.append((name, slice(at, at + sizes[name])))
            at += sizes[name]
        return found


class _Watch(TorchFunctionMode):  # type: ignore[misc]  # torch is not looked into
    """Sums of what the linears of a layer read and of the gradients by what they give, for one window."""

    def __init__(self, wanted: _Linears) -> None:
        super().__init__()
        self.sums: dict[str, _Sums] = {}
        self._wanted = wanted

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if func is nn.functional.linear and made.requires_grad:
            rows = self._wanted.rows(args[1])
            if rows:
                made.register_hook(partial(self._note, rows, _squares(args[0].detach())))
        return made

    def _note(self, rows: list[tuple[str, slice]], cols: torch.Tensor, gradient: torch.Tensor) -> None:
        squares, tokens = _squares(gradient), gradient[..., 0].numel()
        for name, part in rows:
            made = _Sums(cols.clone(), squares[part].clone(), tokens)
            if name in self.sums:
                self.sums[name].add(made)
            else:
                self.sums[name] = made
