"""Sums of what the linears of a layer read, taken while the layer's own forward runs."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from torch.overrides import TorchFunctionMode

from qbuild.calibration.statistics import Input, Statistics, mirrored
from qbuild.errors import InputError

__all__ = ["Collector", "Watch"]

UNFIT = "calibration cannot measure this kind of layer"
BLOCK = 256  # rows of a Gram matrix that are summed by one product


@dataclass
class _Sums:
    """The sums of one input. Long sums (the diagonal, |X|) are kept in float64, the Gram matrix in float32.

    A Gram entry is a sum of as many float32 terms as there are windows, each a product of matrices over one window.
    """

    shared: set[str]
    diagonal: torch.Tensor
    absolute: torch.Tensor
    gram: torch.Tensor | None
    count: int = 0

    def add_moments(self, windows: Sequence[torch.Tensor]) -> None:
        for x in windows:
            self.count += len(x)
            self.diagonal += x.square().sum(0)
            self.absolute += x.abs().sum(0)

    def add_rows(self, gram: torch.Tensor, start: int, windows: Sequence[torch.Tensor]) -> None:
        """Some rows of the Gram matrix, right of the diagonal: the upper triangle is enough, and half the work."""
        for x in windows:
            gram[start : start + BLOCK, start:].addmm_(x[:, start : start + BLOCK].T, x[:, start:])


@dataclass(frozen=True)
class _Seen:
    """An input that was found already. The reference tells whether memory at this place still is that tensor."""

    tensor: weakref.ref[torch.Tensor]
    version: int
    found: _Found


@dataclass
class _Found:
    """What linears of these names read, and the version of the tensor then."""

    names: list[str]
    x: torch.Tensor
    version: int


class Watch(TorchFunctionMode):  # type: ignore[misc]  # torch is not looked into
    """Notes what the linears of a layer read, while one window goes through it inside ``with watch:``.

    It looks at products with the layer's own parameters, not at modules: so experts that are slices of one stacked
    parameter count one by one, and tensors that several linears read are known by being the same tensor.
    """

    def __init__(self, names_of: Callable[[torch.Tensor], tuple[str, ...]]) -> None:
        super().__init__()
        self.found: list[_Found] = []
        self._names_of = names_of
        self._seen: dict[tuple[int, tuple[int, ...], tuple[int, ...]], _Seen] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.nn.functional.linear:
            names = self._names_of(args[1])
            if names:
                self._note(args[0], names)
        return func(*args, **(kwargs or {}))

    def _note(self, x: torch.Tensor, names: tuple[str, ...]) -> None:
        key = (x.data_ptr(), tuple(x.shape), x.stride())
        seen = self._seen.get(key)
        if seen is not None and seen.tensor() is not None and seen.version == x._version:
            seen.found.names.extend(names)
            return
        self.found.append(_Found(list(names), x, x._version))
        self._seen[key] = _Seen(weakref.ref(x), x._version, self.found[-1])


@dataclass
class Collector:
    """Sums the inputs of a layer's linears over windows.

    ``parameters`` maps the parameters of the layer, real now, to the checkpoint names that they are made of;
    ``linears`` are the checkpoint names (without ``.weight``) whose inputs are wanted.
    """

    layer: int
    parameters: Mapping[str, tuple[torch.Tensor, tuple[str, ...]]]
    linears: Collection[str]
    gram: bool
    _sums: dict[str, _Sums] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._by_storage = {
            tensor.untyped_storage().data_ptr(): (tensor, names) for tensor, names in self.parameters.values()
        }

    def watch(self) -> Watch:
        """For one window."""
        return Watch(self._names)

    def add(self, watches: Iterable[Watch], pool: Executor) -> None:
        """Add what windows gave, in their order: how many come at a time changes no bit, nor does the pool's size."""
        windows: dict[str, list[torch.Tensor]] = {}
        for found in (found for watch in watches for found in watch.found):
            name, x = found.names[0], found.x
            if x._version != found.version:
                raise InputError(f"layer {self.layer}", f"the input of {name} is overwritten after it was read", UNFIT)
            if name not in self._sums:
                self._sums[name] = self._empty(x)
            sums = self._sums[name]
            sums.shared.update(found.names)
            windows.setdefault(name, []).append(x.reshape(-1, x.shape[-1]).float())
        jobs: list[Callable[[], None]] = []
        for name, xs in windows.items():
            sums = self._sums[name]
            jobs.append(partial(sums.add_moments, xs))
            if sums.gram is not None:
                jobs += [partial(sums.add_rows, sums.gram, at, xs) for at in range(0, len(sums.gram), BLOCK)]
        for done in [pool.submit(job) for job in jobs]:
            done.result()

    def _names(self, weight: torch.Tensor) -> tuple[str, ...]:
        """The wanted linears that a weight is made of, () for anything else."""
        tensor, sources = self._by_storage.get(weight.untyped_storage().data_ptr(), (None, ()))
        if tensor is None:
            return ()
        names = self._slices(tensor, sources)
        if weight.dim() == 2 and tensor.dim() == 3:
            expert = (weight.storage_offset() - tensor.storage_offset()) // tensor.stride(0)
            names = names[expert :: tensor.shape[0]]
        return tuple(name for name in names if name in self.linears)

    @staticmethod
    def _slices(tensor: torch.Tensor, sources: tuple[str, ...]) -> list[str]:
        """The linears in a parameter: of experts all the first projections by number, then all the second."""
        plain = [name.removesuffix(".weight") for name in sources]
        if tensor.dim() == 3 and len(plain) < tensor.shape[0]:
            return [f"{name}[{expert}]" for name in plain for expert in range(tensor.shape[0])]
        return plain

    def _empty(self, x: torch.Tensor) -> _Sums:
        n = x.shape[-1]
        long = [torch.zeros(n, dtype=torch.float64, device=x.device) for _ in range(2)]
        gram = torch.zeros(n, n, dtype=torch.float32, device=x.device) if self.gram else None
        return _Sums(set(), long[0], long[1], gram)

    def statistics(self) -> Statistics:
        """What was summed. Raises InputError where an input was NaN or infinite, or where a linear is never multiplied
        in a way that is looked for."""
        inputs = [self._input(name, sums) for name, sums in sorted(self._sums.items())]
        unreached = set(self.linears).difference(*(found.shared for found in inputs))
        lost = [name for name in unreached if not self._has_siblings(name, unreached)]
        if lost:
            fact = f"the inputs of {min(lost)} were not seen: its product is not a plain linear one"
            raise InputError(f"layer {self.layer}", fact, UNFIT)
        return Statistics(self.layer, tuple(inputs), tuple(sorted(unreached)))

    def _has_siblings(self, linear: str, unreached: Collection[str]) -> bool:
        """Whether a linear is one of a parameter's experts, some of which were reached."""
        for tensor, sources in self.parameters.values():
            names = self._slices(tensor, sources)
            if tensor.dim() == 3 and linear in names:
                return any(name not in unreached for name in names)
        return False

    def _input(self, name: str, sums: _Sums) -> Input:
        diagonal = sums.diagonal.float().cpu().numpy()
        if not np.isfinite(diagonal).all():
            bad = np.flatnonzero(~np.isfinite(diagonal))
            fact = f"the inputs of {name} are NaN or infinite in {len(bad)} of {len(diagonal)} columns, first {bad[0]}"
            remedy = "check the weights of the layers before it, or compute in float32: calibration.dtype=float32"
            raise InputError(f"layer {self.layer}", fact, remedy)
        gram = None
        if sums.gram is not None:
            gram = mirrored(sums.gram.cpu().numpy())
            np.fill_diagonal(gram, diagonal)
        return Input(
            name, tuple(sorted(sums.shared)), sums.count, gram, diagonal,
            (sums.absolute / sums.count).float().cpu().numpy(),
        )  # fmt: skip
