"""Sums of what the linears of a layer read, taken while the layer's own forward runs."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from qbuild.calibration.statistics import Input, Statistics
from qbuild.calibration.triangle import upper
from qbuild.errors import InputError

__all__ = ["Collector", "Measured", "Watch"]

UNFIT = "calibration cannot measure this kind of layer"
BLOCK, BLOCK_CUDA = 256, 2048  # rows of a Gram matrix that are summed by one product


@dataclass
class _Sums:
    """The sums of one input. Long sums (the diagonal, |X|) are kept in float64, the Gram matrix in float32.

    A Gram entry is a sum of as many float32 terms as there are windows, each a product of matrices over one window.
    ``drift`` is Xᵀ(X' − X), X' what the source reads in the same place.

    Products in bfloat16, twice as fast on a CPU that has them, are also rounded to it. So what is summed is by how much
    each window differs from the first one, a token's mean of which is in ``usual``, by rows from a start on: columns
    that are always large together would not be a positive definite matrix any more (tests/calibration).
    """

    shared: set[str]
    diagonal: torch.Tensor
    absolute: torch.Tensor
    gram: torch.Tensor | None
    drift: torch.Tensor | None = None
    count: int = 0
    usual: dict[int, torch.Tensor] = field(default_factory=dict)

    def add_moments(self, windows: Sequence[torch.Tensor]) -> None:
        for x in map(torch.Tensor.float, windows):
            self.count += len(x)
            self.diagonal += x.square().sum(0)
            self.absolute += x.abs().sum(0)

    def add_rows(self, gram: torch.Tensor, start: int, windows: Sequence[torch.Tensor]) -> None:
        """Some rows of the Gram matrix, right of the diagonal: the upper triangle is enough, and half the work."""
        for x in windows:
            some, rest = x[:, start : start + _block(x)].T, x[:, start:]
            into = gram[start : start + len(some), start:]
            if x.dtype == gram.dtype:
                into.addmm_(some, rest)
                continue
            if start not in self.usual:
                self.usual[start] = (some.float() @ rest.float()).div_(len(x)).to(x.dtype)
            into.add_(torch.addmm(self.usual[start], some, rest, beta=-len(x)))

    def add_usual(self, gram: torch.Tensor) -> None:
        """What all windows have in common, which the sum lacks."""
        for start, usual in self.usual.items():
            gram[start : start + len(usual), start:].add_(usual.float(), alpha=self.count)

    def add_drift(
        self, drift: torch.Tensor, start: int, windows: Sequence[torch.Tensor], moved: Sequence[torch.Tensor]
    ) -> None:
        """Some rows of the drift; ``moved``: X' − X of each window."""
        for x, difference in zip(windows, moved, strict=True):
            rows = _block(x)
            drift[start : start + rows].addmm_(x[:, start : start + rows].T, difference)

    @property
    def starts(self) -> range:
        """Of the blocks of rows."""
        return range(0, len(self.diagonal), _block(self.diagonal))


def _joined(windows: list[torch.Tensor]) -> list[torch.Tensor]:
    """On a device few large products are faster; on a CPU windows stay apart, so that sums do not depend on threads."""
    return [torch.cat(windows)] if windows and windows[0].device.type != "cpu" else windows


def _block(x: torch.Tensor) -> int:
    return BLOCK if x.device.type == "cpu" else BLOCK_CUDA


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


@dataclass(frozen=True)
class Measured:
    """An input where it was summed, float32: the diagonal and right of it is ``gram`` [n, n] the Gram matrix.

    ``drift`` [n, n] is Xᵀ(X' − X), X' what the source reads for the same tokens; None where it was not asked for, or
    where the two did not read the same tokens: of an expert.
    """

    name: str
    shared: tuple[str, ...]
    count: int
    gram: torch.Tensor | None
    diagonal: torch.Tensor
    mean_abs: torch.Tensor
    drift: torch.Tensor | None = None


@dataclass
class Collector:
    """Sums the inputs of a layer's linears over windows.

    ``parameters`` maps the parameters of the layer, real now, to the checkpoint names that they are made of;
    ``linears`` are the checkpoint names (without ``.weight``) whose inputs are wanted. ``length``: tokens of a window
    where inputs are compared with the source's, else 0.
    """

    layer: int
    parameters: Mapping[str, tuple[torch.Tensor, tuple[str, ...]]]
    linears: Collection[str]
    gram: bool
    length: int = 0
    _sums: dict[str, _Sums] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._by_storage = {
            tensor.untyped_storage().data_ptr(): (tensor, names) for tensor, names in self.parameters.values()
        }

    def watch(self) -> Watch:
        """For one window."""
        return Watch(self.names)

    def add(self, watches: Sequence[Watch], pool: Executor, beside: Sequence[Watch] = ()) -> None:
        """Add what windows gave, in their order: on a CPU it changes no bit how many come at a time, nor does the
        pool's size.

        ``beside``: what the same windows gave in the source, where drift is summed.
        """
        windows, jobs = self._windows(watches), []
        drifts = self._drifts(windows, self._windows(beside)) if self.length else {}
        for name, xs in windows.items():
            sums = self._sums[name]
            xs, moved = _joined(xs), _joined(drifts.get(name, []))
            jobs.append(partial(sums.add_moments, xs))
            if sums.gram is not None:
                jobs += [partial(sums.add_rows, sums.gram, at, xs) for at in sums.starts]
            if sums.drift is not None:
                jobs += [partial(sums.add_drift, sums.drift, at, xs, moved) for at in sums.starts]
        for done in [pool.submit(job) for job in jobs]:
            done.result()

    def _windows(self, watches: Sequence[Watch]) -> dict[str, list[torch.Tensor]]:
        """[tokens, n] of each window by the input's name: bfloat16 in a pass of that kind on a CPU, else float32."""
        windows: dict[str, list[torch.Tensor]] = {}
        for found in (found for watch in watches for found in watch.found):
            name = found.names[0]
            if found.x._version != found.version:
                raise InputError(f"layer {self.layer}", f"the input of {name} is overwritten after it was read", UNFIT)
            x = found.x.reshape(-1, found.x.shape[-1])
            if self.length or x.device.type != "cpu":
                x = x.float()
            if name not in self._sums:
                self._sums[name] = self._empty(x)
            self._sums[name].shared.update(found.names)
            windows.setdefault(name, []).append(x)
        return windows

    def _drifts(
        self, windows: Mapping[str, list[torch.Tensor]], source: Mapping[str, list[torch.Tensor]]
    ) -> dict[str, list[torch.Tensor]]:
        """How far what the source reads is from what is read here, by window. It is that of all tokens or of none:
        experts may get others than in the source."""
        found = {}
        for name, xs in windows.items():
            others = source.get(name, [])
            if len(xs) == len(others) and all(len(x) == self.length for x in (*xs, *others)):
                found[name] = [other - x for x, other in zip(xs, others, strict=True)]
            else:
                self._sums[name].drift = None
        return found

    def names(self, weight: torch.Tensor) -> tuple[str, ...]:
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
        return _Sums(set(), long[0], long[1], gram, None if gram is None or not self.length else torch.zeros_like(gram))

    def statistics(self) -> Statistics:
        """What was summed, as an artifact. Raises as ``unreached`` and ``measured`` do."""
        unreached = self.unreached()
        return Statistics(self.layer, tuple(map(_stored, self.measured())), unreached)

    def unreached(self) -> tuple[str, ...]:
        """The linears whose inputs were not seen: of experts that no token was sent to. Raises InputError where a
        linear is never multiplied in a way that is looked for."""
        unreached = set(self.linears).difference(*(found.shared for found in self._sums.values()))
        lost = [name for name in unreached if not self._has_siblings(name, unreached)]
        if lost:
            fact = f"the inputs of {min(lost)} were not seen: its product is not a plain linear one"
            raise InputError(f"layer {self.layer}", fact, UNFIT)
        return tuple(sorted(unreached))

    def measured(self) -> Iterator[Measured]:
        """By name; what was taken is not held here any more, nor is the layer. Raises InputError where an input was NaN
        or infinite."""
        self.parameters, self._by_storage = {}, {}
        for name in sorted(self._sums):
            yield self._measured(name, self._sums.pop(name))

    def _has_siblings(self, linear: str, unreached: Collection[str]) -> bool:
        """Whether a linear is one of a parameter's experts, some of which were reached."""
        for tensor, sources in self.parameters.values():
            names = self._slices(tensor, sources)
            if tensor.dim() == 3 and linear in names:
                return any(name not in unreached for name in names)
        return False

    def _measured(self, name: str, sums: _Sums) -> Measured:
        diagonal = sums.diagonal.float()
        bad = torch.nonzero(~torch.isfinite(diagonal))
        if len(bad):
            columns = f"{len(bad)} of {len(diagonal)} columns, first {int(bad[0])}"
            fact = f"the inputs of {name} are NaN or infinite in {columns}"
            remedy = "values overflow in this layer or one before: check that the weights belong to this config.json"
            raise InputError(f"layer {self.layer}", fact, remedy)
        if sums.gram is not None:
            sums.add_usual(sums.gram)
            sums.gram.diagonal().copy_(diagonal)
        mean_abs = (sums.absolute / sums.count).float()
        return Measured(name, tuple(sorted(sums.shared)), sums.count, sums.gram, diagonal, mean_abs, sums.drift)


def _stored(found: Measured) -> Input:
    packed = None if found.gram is None else upper(found.gram).cpu().numpy()
    return Input(
        found.name, found.shared, found.count, packed, found.diagonal.cpu().numpy(), found.mean_abs.cpu().numpy()
    )
