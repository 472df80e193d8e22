"""A forward pass with one decoder layer in memory: transformers' own modelling code, fed with weights when needed.

The model is built without weights. What it gives to its decoder layers besides the hidden states (masks, rotary
embeddings, positions) is not worked out here but recorded from its own forward, run with layers that only write down
what they get. So every family's own code decides, and a layer that is run alone computes what it computes in the model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import transformers
from accelerate import init_empty_weights
from torch import nn

from qbuild.calibration.families import layer_count, layer_prefix
from qbuild.calibration.weights import Read, Weights
from qbuild.errors import InputError

__all__ = ["Layer", "Streamed"]

UNFIT = "calibration needs a plain list of decoder layers that pass hidden states on"


_Beside = tuple[tuple[Any, ...], dict[str, Any]]  # what a layer gets beside the hidden states
_StandIn = Callable[[int, torch.Tensor, _Beside], torch.Tensor]


class Layer:
    """A decoder layer with its weights in memory. Called with hidden states [batch, length, width] of the model."""

    def __init__(
        self, index: int, module: nn.Module, device: torch.device, arguments: Callable[[int], list[_Beside]]
    ) -> None:
        self.index, self.module, self._device, self._arguments = index, module, device, arguments

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():  # it is a thread's own
            return self._run(hidden.to(self._device, non_blocking=True))

    def pull(self, hidden: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
        """The gradient by ``hidden`` of something whose gradient by what the layer makes of it is ``gradient``."""
        with torch.enable_grad():
            hidden = hidden.detach().to(self._device).requires_grad_()
            made = self._run(hidden)
        return torch.autograd.grad(made, hidden, gradient.to(self._device))[0]

    def _run(self, hidden: torch.Tensor) -> torch.Tensor:
        positional, named = self._arguments(hidden.shape[1])[self.index]
        made = self.module(hidden, *positional, **named)
        return made[0] if isinstance(made, tuple) else made


class _ReachedError(Exception):
    """The forward pass came to where it was wanted."""


class Streamed:
    """A causal language model whose weights are read layer by layer.

    ``config`` is the checkpoint's config.json, ``names`` the names of its tensors, ``read`` gives a tensor by its name
    in the checkpoint's dtype. Everything is computed in ``dtype`` on ``device``. Raises InputError for a model that
    transformers does not know, whose layers are not found, or whose layers take other inputs than hidden states.
    """

    def __init__(
        self, config: Mapping[str, Any], names: Iterable[str], read: Read, *, device: str = "cpu",
        dtype: str = "float32",
    ) -> None:  # fmt: skip
        self.device = torch.device(device)
        self.names = tuple(names)
        self.model = _without_weights(config, dtype)
        self.dtype: torch.dtype = getattr(torch, dtype)
        self.weights = Weights(self.model, self.names, read)
        self.count = layer_count(config)
        self.width = int(self.model.config.get_text_config().hidden_size)
        self.prefix = layer_prefix(config, self.names)
        self._path, self._layers = self._find_layers(self.prefix)
        self._known: dict[int, list[_Beside]] = {}
        self._outside: set[str] = set()
        self._tables: dict[str, torch.Tensor] = {}
        self._tuples = False  # whether the layers of this family answer with a tuple
        for name, buffer in self.model.named_buffers():
            if not buffer.is_meta:
                _set_buffer(self.model, name, buffer.to(self.device))
        for path, module in self.model.named_modules():
            if not f"{path}.".startswith(f"{self._path}."):
                self._fill_when_used(path, module)

    # the model's ends ------------------------------------------------------------------------------------------------

    def embed(self, ids: torch.Tensor, *, grad: bool = False) -> torch.Tensor:
        """The hidden states [batch, length, width] that the first layer gets for token ids [batch, length]."""
        got: list[torch.Tensor] = []

        def first(_index: int, hidden: torch.Tensor, _arguments: _Beside) -> torch.Tensor:
            got.append(hidden)
            raise _ReachedError

        self._run(first, grad=grad, input_ids=ids.to(self.device))
        self._arguments(ids.shape[1])  # now that the embedding is in memory
        return got[0]

    def logits(self, hidden: torch.Tensor, *, grad: bool = False) -> torch.Tensor:
        """[batch, length, vocabulary] from what the last layer gave."""
        hidden = hidden.to(self.device)

        def last(index: int, given: torch.Tensor, _: _Beside) -> torch.Tensor:
            return hidden if index == self.count - 1 else given

        return self._run(last, grad=grad, inputs_embeds=hidden).logits

    def embedding(self) -> tuple[nn.Module, str]:
        """The module that looks tokens up, and the checkpoint name of its table without ``.weight``."""
        return self._named(self.model.get_input_embeddings())

    def head(self) -> tuple[nn.Module, str]:
        """The module that makes logits, and the checkpoint name of its weight without ``.weight``."""
        return self._named(self.model.get_output_embeddings())

    def _named(self, module: nn.Module) -> tuple[nn.Module, str]:
        path = next(path for path, found in self.model.named_modules() if found is module)
        return module, self.weights.names(f"{path}.weight")[0].removesuffix(".weight")

    @property
    def vocabulary(self) -> int:
        """Rows of the embedding."""
        return int(self.model.get_input_embeddings().num_embeddings)

    def release(self) -> None:
        """Give back the memory of what is outside of the layers: embeddings, norm and head. They are read anew."""
        self.weights.remove(self._outside)
        self._outside.clear()
        self._tables.clear()

    def prepare(self, length: int) -> None:
        """Work out once what windows of this length need, so that several threads may call a layer."""
        self._arguments(length)

    # layers ----------------------------------------------------------------------------------------------------------

    @contextmanager
    def layer(self, index: int) -> Iterator[Layer]:
        """One decoder layer, its weights in memory inside of the ``with``."""
        path = f"{self._path}.{index}"
        with self.weights.placed(self.weights.below(path), self.device):
            yield Layer(index, self._layers[index], self.device, self._arguments)

    def layer_tensors(self, index: int) -> tuple[str, ...]:
        """The checkpoint names of a layer's tensors."""
        parameters = self.weights.below(f"{self._path}.{index}")
        return tuple(sorted({name for p in parameters for name in self.weights.names(p)}))

    def parameters(self, index: int) -> dict[str, tuple[torch.Tensor, tuple[str, ...]]]:
        """The parameters of a layer that is in memory, each with the checkpoint names that it is made of."""
        below = self.weights.below(f"{self._path}.{index}")
        return {name: (_tensor(self.model, name), self.weights.names(name)) for name in below}

    def _find_layers(self, prefix: str) -> tuple[str, nn.ModuleList]:
        """The decoder's list in the model: the one that the tensors of layer 0 belong to."""
        for path, module in self.model.named_modules():
            if not isinstance(module, nn.ModuleList) or len(module) != self.count:
                continue
            made_of = {name for p in self.weights.below(f"{path}.0") for name in self.weights.names(p)}
            if any(name.startswith(f"{prefix}0.") for name in made_of):
                return path, module
        fact = f"{type(self.model).__name__} has no list of {self.count} layers that {prefix}0 belongs to"
        raise InputError(self.model.config.model_type, fact, UNFIT)

    def _arguments(self, length: int) -> list[_Beside]:
        """What the layers get beside the hidden states for a window of ``length`` tokens."""
        if length not in self._known:
            before = bool(self._outside)
            one, other = (self._recorded(torch.full((1, length), token)) for token in (0, 1))
            if not before:
                self.release()
            if not _equal(one, other):
                fact = "its layers take inputs that depend on the tokens themselves, beside the hidden states"
                raise InputError(self.model.config.model_type, fact, UNFIT)
            self._known = {length: one}  # a mask is length² large: one length at a time
        return self._known[length]

    def _recorded(self, ids: torch.Tensor) -> list[_Beside]:
        got: list[_Beside] = []

        def record(index: int, hidden: torch.Tensor, arguments: _Beside) -> torch.Tensor:
            if hidden.shape != (*ids.shape, self.width):  # the model took the first of what it holds for a tuple
                self._tuples = True
                raise _ReachedError
            got.append(arguments)
            if index == self.count - 1:
                raise _ReachedError
            return hidden

        self._run(record, input_ids=ids.to(self.device))
        if self._tuples and len(got) < self.count:
            got.clear()
            self._run(record, input_ids=ids.to(self.device))
        if len(got) < self.count:
            fact = f"the hidden states of its layers are not [batch, length, {self.width}]"
            raise InputError(self.model.config.model_type, fact, UNFIT)
        return got

    def _run(self, stand_in: _StandIn, *, grad: bool = False, **inputs: torch.Tensor) -> Any:
        """The model's forward with ``stand_in(index, hidden, other arguments)`` in place of every decoder layer."""
        for index, layer in enumerate(self._layers):
            layer.forward = self._forward(stand_in, index)
        try:
            with torch.set_grad_enabled(grad):
                return self.model(**inputs, use_cache=False)
        except _ReachedError:
            return None
        finally:
            for layer in self._layers:
                del layer.forward

    def _forward(self, stand_in: _StandIn, index: int) -> Callable[..., Any]:
        def forward(*positional: Any, **named: Any) -> Any:
            if not positional:
                positional = (named.pop("hidden_states"),)
            made = stand_in(index, positional[0], (positional[1:], named))
            return (made,) if self._tuples else made

        return forward

    # what is outside of the layers -----------------------------------------------------------------------------------

    def _fill_when_used(self, path: str, module: nn.Module) -> None:
        """Read a module's own parameters when it is first called, so that only what a pass needs is ever in memory."""
        own = [f"{path}.{name}" if path else name for name in module.state_dict() if "." not in name]
        if not own:
            return
        if isinstance(module, nn.Embedding):
            module.register_forward_pre_hook(lambda m, inputs: self._rows(f"{path}.weight", m, inputs))
            return

        def fill(_module: nn.Module, _inputs: Any) -> None:
            for name in own:
                if name not in self._outside:
                    self.weights.place(name, self.device)
                    self._outside.add(name)

        module.register_forward_pre_hook(fill)

    def _rows(self, name: str, module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        """Only the rows of an embedding that are looked up are widened: a table can be larger than a layer."""
        if name not in self._tables:
            self._tables |= self.weights.load([name])
            self._outside.add(name)
        table = self._tables[name]
        rows, ids = torch.unique(inputs[0], return_inverse=True)
        weight = table[rows.to(table.device)].to(self.device, self.dtype)
        module._parameters["weight"] = nn.Parameter(weight, requires_grad=False)
        return (ids, *inputs[1:])


def _tensor(model: nn.Module, name: str) -> torch.Tensor:
    path, _, leaf = name.rpartition(".")
    return getattr(model.get_submodule(path), leaf)


def _set_buffer(model: nn.Module, name: str, tensor: torch.Tensor) -> None:
    path, _, leaf = name.rpartition(".")
    model.get_submodule(path)._buffers[leaf] = tensor


def _without_weights(config: Mapping[str, Any], dtype: str) -> Any:
    """The model of a config: parameters on the meta device, buffers (rotary frequencies) real."""
    kind = str(config.get("model_type"))
    try:
        known = transformers.CONFIG_MAPPING[kind].from_dict(dict(config))
        with init_empty_weights(include_buffers=False):
            # Experts one after another: the faster grouped form hides the inputs of single experts.
            model = transformers.AutoModelForCausalLM.from_config(
                known, dtype=dtype, experts_implementation="eager", trust_remote_code=False
            )
    except (KeyError, ValueError) as error:
        fact = f"transformers {transformers.__version__} has no causal language model for it: {error}"
        raise InputError(f"model type {kind!r}", fact, "calibration needs a model that transformers knows") from None
    return model.eval()


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and torch.equal(one, other)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(_equal(a, b) for a, b in zip(one, other, strict=True))
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(_equal(value, other[key]) for key, value in one.items())
    return True
