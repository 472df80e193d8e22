"""From the tensors of a checkpoint to the parameters of a transformers model, a few at a time.

transformers 5 names and shapes some parameters otherwise than files do: experts are stacked into one parameter, old
names are renamed, fused projections are cut. The rules are its own (``conversion_mapping``); here they are applied to
the parameters that are wanted, where transformers itself loads whole models.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
    rename_source_key,
)

from qbuild.errors import InputError

__all__ = ["Read", "Weights"]

Read = Callable[[str], torch.Tensor]  # a tensor of the checkpoint by its name, in the checkpoint's dtype


@dataclass(frozen=True)
class _Origin:
    """What parameters are made of: checkpoint names with the pattern that each matched, in the order of transformers.

    ``converter`` is None where one tensor is one parameter. Several parameters share one origin where a tensor is cut.
    """

    sources: tuple[tuple[str, str], ...]
    converter: WeightConverter | None

    def names(self) -> tuple[str, ...]:
        return tuple(name for _, name in self.sources)

    def by_pattern(self) -> list[list[str]]:
        found: dict[str, list[str]] = {}
        for pattern, name in self.sources:
            found.setdefault(pattern, []).append(name)
        return list(found.values())

    def stacks(self) -> bool:
        """Whether all that is done is stacking experts, their projections one after another."""
        steps = [(type(o), o.dim) for o in self.converter.operations] if self.converter else []
        return steps in ([(MergeModulelist, 0)], [(MergeModulelist, 0), (Concatenate, 1)])


class Weights:
    """The parameters of ``model``, a model on the meta device, by where in the checkpoint they come from."""

    def __init__(self, model: nn.Module, names: Iterable[str], read: Read) -> None:
        self.model, self._stored = model, read
        self._meta = dict(model.state_dict())
        self._tied = _tied(model)
        self._origins: dict[str, _Origin] = {}
        for origin, targets in _origins(model, names, self._meta):
            self._origins |= dict.fromkeys(targets, origin)

    def names(self, parameter: str) -> tuple[str, ...]:
        """The checkpoint names that a parameter is made of, in the order in which it holds them; () if unknown."""
        origin = self._origins.get(self._tied.get(parameter, parameter))
        return origin.names() if origin else ()

    def below(self, path: str) -> tuple[str, ...]:
        """The parameters and persistent buffers of the module at ``path``."""
        return tuple(name for name in self._meta if name.startswith(f"{path}."))

    def load(self, parameters: Iterable[str]) -> dict[str, torch.Tensor]:
        """Read parameters, in the checkpoint's dtype. Raises InputError where the checkpoint has no tensor for one."""
        wanted = tuple(parameters)
        found: dict[str, torch.Tensor] = {}
        for name in wanted:
            source = self._tied.get(name, name)
            if source not in found:
                found |= self._convert(source)
        return {name: found[self._tied.get(name, name)] for name in wanted}

    def _convert(self, parameter: str) -> dict[str, torch.Tensor]:
        origin = self._origins.get(parameter)
        if origin is None:
            remedy = "check that the checkpoint is whole and belongs to its config.json"
            raise InputError(type(self.model).__name__, f"the checkpoint has no tensor for {parameter}", remedy)
        if origin.converter is None:
            return {parameter: self._checked(parameter, self._read(origin.sources[0][1]))}
        converter = copy.deepcopy(origin.converter)
        for pattern, name in origin.sources:
            converter.add_tensor(parameter, name, pattern, self._read(name))
        first = next(iter(_targets(parameter, converter)))
        made = converter.convert(first, model=self.model, config=self.model.config)
        made = {name: tensor[0] if isinstance(tensor, list) else tensor for name, tensor in made.items()}
        return {name: self._checked(name, tensor) for name, tensor in made.items()}

    def _read(self, name: str) -> torch.Tensor:
        """A tensor of the checkpoint. Raises InputError where a weight is no number: all that follows would be none."""
        tensor = self._stored(name)
        if tensor.is_floating_point() and not torch.isfinite(tensor.sum()):  # in float32, without a copy
            bad = torch.nonzero(~torch.isfinite(tensor))
            if len(bad):  # a sum of large numbers may be infinite too
                fact = f"{len(bad)} of its {tensor.numel()} weights are NaN or infinite, the first at {bad[0].tolist()}"
                raise InputError(name, fact, "fetch the checkpoint again: its weights are damaged")
        return tensor

    def _checked(self, parameter: str, tensor: torch.Tensor) -> torch.Tensor:
        wanted = self._meta[parameter].shape
        if tensor.shape != wanted:
            raise self._unfit(parameter, list(tensor.shape), list(wanted))
        return tensor

    def _unfit(self, name: str, shape: list[int], wanted: list[int]) -> InputError:
        fact = f"{name} has the shape {shape}, config.json asks for {wanted}"
        return InputError(type(self.model).__name__, fact, "check that the weights belong to this config.json")

    @contextmanager
    def placed(self, parameters: Iterable[str], device: torch.device) -> Iterator[None]:
        """Parameters of the model are real inside, in the model's dtype on ``device``, and on the meta device after."""
        names = tuple(parameters)
        try:
            for name in names:
                self.place(name, device)
            yield
        finally:
            for name in names:
                _assign(self.model, name, self._meta[name])

    def place(self, parameter: str, device: torch.device) -> None:
        """Make one parameter real."""
        meta, origin = self._meta[parameter], self._origins.get(parameter)
        if origin is not None and origin.stacks() and not self._tied.get(parameter):
            tensor = self._stacked(parameter, origin, torch.empty(meta.shape, dtype=meta.dtype, device=device))
        else:
            tensor = self.load([parameter])[parameter].to(device).to(meta.dtype)  # the device widens, not the CPU
        _assign(self.model, parameter, tensor)

    def _stacked(self, parameter: str, origin: _Origin, made: torch.Tensor) -> torch.Tensor:
        """Experts read one by one to their place in the stack: made by its operations it would be in memory thrice."""
        groups = origin.by_pattern()
        experts, rows, *rest = made.shape
        shape = torch.Size([rows // len(groups), *rest])
        for number, names in enumerate(groups):
            if len(names) != experts:
                raise self._unfit(parameter, [len(names), *shape], [experts, *shape])
            for expert, name in enumerate(names):
                tensor = self._read(name)
                if tensor.shape != shape:
                    raise self._unfit(name, list(tensor.shape), list(shape))
                made[expert, number * len(tensor) :][: len(tensor)] = tensor
        return made

    def remove(self, parameters: Iterable[str]) -> None:
        """Give parameters' memory back."""
        for name in parameters:
            _assign(self.model, name, self._meta[name])


def _assign(model: nn.Module, name: str, tensor: torch.Tensor) -> None:
    path, _, leaf = name.rpartition(".")
    module = model.get_submodule(path)
    if leaf in module._buffers:
        module._buffers[leaf] = tensor
    else:
        module._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)


def _tied(model: nn.Module) -> dict[str, str]:
    """Parameters that are another one's: the head of a model with tied embeddings."""
    tied: Mapping[str, str] = getattr(model, "all_tied_weights_keys", {})
    return dict(tied)


def _origins(
    model: nn.Module, names: Iterable[str], meta: Mapping[str, Any]
) -> Iterator[tuple[_Origin, tuple[str, ...]]]:
    """Every origin with the parameters that it makes. Tensors of which the model has no parameter are passed over."""
    transforms = get_model_conversion_mapping(model)
    renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
    converters = [t for t in transforms if isinstance(t, WeightConverter)]
    of_pattern = {pattern: c for c in converters for pattern in c.source_patterns}
    prefix = model.base_model_prefix
    sources: dict[str, list[tuple[str, str]]] = {}
    made_by: dict[str, WeightConverter | None] = {}
    for name in sorted(names, key=_natural):
        target, pattern = rename_source_key(name, renamings, converters, prefix, meta)
        if target not in meta and name in meta:  # written by a transformers that already had the new names
            target, pattern = name, None
        if target not in meta:
            continue
        sources.setdefault(target, []).append((pattern or name, name))
        made_by.setdefault(target, of_pattern[pattern] if pattern else None)
    for target, found in sources.items():
        converter = made_by[target]
        if converter:  # all first projections of experts, then all second ones: as the parameter holds them
            found.sort(key=lambda source: converter.source_patterns.index(source[0]))
        yield _Origin(tuple(found), converter), _targets(target, converter) if converter else (target,)


def _targets(parameter: str, converter: WeightConverter) -> tuple[str, ...]:
    """All parameters that a converter makes together with ``parameter``, the one renamed by its first pattern first."""
    for own in converter.target_patterns:
        if own in parameter:
            return tuple(parameter.replace(own, other) for other in converter.target_patterns)
    return (parameter,)


def _natural(name: str) -> list[tuple[int, int, str]]:
    """Experts 2 and 10 in this order: a stacked parameter holds them by number."""
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in name.split(".")]
