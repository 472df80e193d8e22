"""Calibrated targets → graph: tokens, one chain of statistics for all of them, solved layers, directories, imatrix.

A function of the configuration, the checkpoint's headers and the calibration file's stat; nothing heavy is loaded.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from functools import cached_property, partial
from pathlib import Path

from qbuild import device, fit, imatrix, machine, schema
from qbuild.actions import (
    backend,
    directory,
    evaluation,
    importance,
    propagate,
    sensitivity,
    solve,
    statistics,
    tokens,
    weights,
)
from qbuild.arch.convert import TensorSpec
from qbuild.backends.environment import Environment, environment
from qbuild.backends.run import suit
from qbuild.budget import parse_size
from qbuild.calibration import extent
from qbuild.calibration.families import learned_positions
from qbuild.calibration.imatrix import shapes as entry_shapes
from qbuild.calibration.texts import documents, files
from qbuild.checkpoint import Checkpoint
from qbuild.digest import Digest, digest_bytes
from qbuild.errors import ConfigError, InputError
from qbuild.graph import Action, Graph, Input, Output, Source
from qbuild.imatrix import Noted
from qbuild.quant.directory import Directory, plain_dtype
from qbuild.quant.directory import directory as plan_directory
from qbuild.quant.shapes import Scheme

__all__ = ["MATRIX", "CalibratedTarget", "Calibration", "Evaluation", "Limit"]

NEEDS = "both run the model: name a directory of safetensors with its config.json, or a Hub id"
MATRIX = "imatrix"  # id of the action that makes the importance matrix
NATIVE_ONLY = ("scaled", "rounding", "order", "propagate")  # settings of a target that no other library has


@dataclass(frozen=True)
class Limit:
    """What a fitted file is to hold, before its types are known: damages of ``tensors`` are 0 here.

    ``in_bits``: the limit was given as bits a weight; ``noted``: what the file will say of its importance matrix.
    """

    max_bytes: int
    tensors: tuple[fit.Tensor, ...]
    in_bits: bool
    noted: Noted | None

    def check(self, kv_bytes: int, place: str, more: int) -> None:
        """Raises BudgetRefused where no types are small enough. ``more``: bytes of key-value pairs not known yet."""
        fit.check(self.tensors, kv_bytes, self.max_bytes, place, in_bits=self.in_bits, more=more)


@dataclass(frozen=True)
class CalibratedTarget:
    """A directory of packed safetensors, an importance matrix, or a fitted GGUF file whose types are not known yet.

    ``tensors``: the actions that it is made of; ``action`` makes it, or chooses the types; ``environment``: of the
    library that makes it, where that is not qbuild.
    """

    name: str
    file_name: str
    tensors: tuple[str, ...]
    action: str
    nbytes: int
    exact: bool
    weights: int
    types: Mapping[str, tuple[int, int]]  # type → (tensors, bytes)
    directory: Directory | None = None
    scheme: Scheme | None = None
    environment: Environment | None = None
    limit: Limit | None = None


@dataclass(frozen=True)
class Evaluation:
    """Actions: ``tokens``, the source's ``states``, and ``results`` by target."""

    tokens: str
    states: str
    results: Mapping[str, str]


class Calibration:
    """Adds to a graph what the calibrated targets of one model need; what they share is added once."""

    def __init__(
        self, config: schema.Config, checkpoint: Checkpoint, specs: list[TensorSpec], graph: Graph, *, fetch: bool
    ) -> None:
        if checkpoint.kind == "gguf":
            raise InputError(checkpoint.source, "a GGUF file cannot be calibrated on or evaluated against", NEEDS)
        self.config, self.checkpoint, self.specs, self.graph, self.fetch = config, checkpoint, specs, graph, fetch
        self.model = extent.model_shape(checkpoint.config, {n: t.shape for n, t in checkpoint.tensors.items()})
        self.device = device.for_calibration(config)
        grams = any(
            isinstance(t, schema.DirectoryTarget) and schema.backend(t) == schema.NATIVE and not t.propagate
            for t in config.targets.values()
        )
        self.detail = "gram" if grams else "diagonal"

    @property
    def rows(self) -> int:
        """Of the embedding: more tokens than these the model does not know."""
        return max((self.checkpoint.tensors[name].shape[0] for name in self.model.before), default=1 << 31)

    # sources ---------------------------------------------------------------------------------------------------------

    def source(self, name: str) -> Source:
        """A whole tensor of the checkpoint."""
        found = self.checkpoint.tensors[name]
        path = str(self.checkpoint.files[found.file].path) if self.checkpoint.files else ""
        return Source(name, path, found.offset, found.nbytes)

    def _side_file(self, name: str) -> Source:
        path = self.checkpoint.aux[name]
        return Source(name, str(path), 0, path.stat().st_size)

    # actions ---------------------------------------------------------------------------------------------------------

    @cached_property
    def tokens(self) -> Output:
        return self._tokens("tokens", self.config.calibration)

    def _tokens(self, name: str, wanted: schema.CalibrationConf | schema.EvaluationConf) -> Output:
        begin = isinstance(wanted, schema.EvaluationConf)
        params = tokens.Params(int(wanted.samples), int(wanted.length), wanted.seed, begin)
        limit = learned_positions(self.checkpoint.config)
        if limit is not None and params.length > limit:
            place = f"{'evaluation' if begin else 'calibration'}.length"
            raise ConfigError(place, f"{params.length} tokens, the model has {limit} positions", f"{place}={limit}")
        vocabulary = [(name, self._side_file(name)) for name in tokens.TOKENIZER if name in self.checkpoint.aux]
        texts = _texts(wanted.source or tokens.BUILTIN, fetch=self.fetch, offline=self.config.offline)
        return self.graph.add(Action(name, tokens.KIND, params, (*texts, *vocabulary)))

    def weights(self, layer: int) -> Output:
        """All weights that the input of layer ``layer + 1`` depends on, as a chain; -1: those before the first."""
        inputs: list[tuple[str, Input]] = []
        if layer >= 0:
            inputs.append(("before", self.weights(layer - 1)))
        names = self.model.layers[layer].tensors if layer >= 0 else self.model.before
        inputs += [(f"source {name}", self.source(name)) for name in names]
        return self.graph.add(Action(f"weights:{layer}", weights.KIND, weights.Params(), tuple(inputs)))

    @cached_property
    def every_weight(self) -> Output:
        """All weights of the model, under one digest."""
        every = [("before", self.weights(len(self.model.layers) - 1))]
        inside = {name for layer in self.model.layers for name in layer.tensors} | set(self.model.before)
        after = sorted(name for name in self.checkpoint.tensors if name not in inside)
        sources = ((f"source {name}", self.source(name)) for name in after)
        return self.graph.add(Action("weights", weights.KIND, weights.Params(), (*every, *sources)))

    @cached_property
    def model_config(self) -> Digest:
        """The configuration that decides arithmetic."""
        return digest_bytes(json.dumps(statistics.config_of(self.checkpoint), sort_keys=True).encode())

    @cached_property
    def statistics(self) -> tuple[Output, ...]:
        """By layer. Each depends on the tokens and on the weights up to it, so a change in layer 20 leaves 0 to 19."""
        made = []
        for layer in range(len(self.model.layers)):
            params = statistics.Params(layer, self.detail, self.config.calibration.dtype, self.device)
            inputs = (("tokens", self.tokens), ("config", self.model_config), ("weights", self.weights(layer)))
            made.append(self.graph.add(Action(f"statistics:{layer}", statistics.KIND, params, inputs)))
        return tuple(made)

    @cached_property
    def matrix(self) -> Output:
        """The importance matrix of the calibration data."""
        wanted = self.config.calibration
        names = digest_bytes(repr([(s.name, s.shape, s.pieces) for s in self.specs]).encode()).hash
        params = importance.Params(Path(wanted.source).name, names)
        inputs = [("tokens", self.tokens), *((f"layer {i}", s) for i, s in enumerate(self.statistics))]
        return self.graph.add(Action(MATRIX, importance.KIND, params, tuple(inputs)))

    @cached_property
    def matrix_shapes(self) -> dict[str, tuple[int, int]]:
        """(matrices, columns) of each entry of the importance matrix."""
        return entry_shapes(self.specs, {linear.name for layer in self.model.layers for linear in layer.linears})

    @property
    def matrix_bytes(self) -> int:
        return imatrix.size(self.matrix_shapes, [Path(self.config.calibration.source).name])

    @cached_property
    def sensitivity(self) -> Output:
        """What errors of every weight cost. It depends on all weights: gradients come from the model's end."""
        params = sensitivity.Params(sensitivity.WINDOWS, self.config.calibration.dtype, self.device)
        inputs = (("tokens", self.tokens), ("config", self.model_config), ("weights", self.every_weight))
        return self.graph.add(Action("sensitivity", sensitivity.KIND, params, inputs))

    # targets ---------------------------------------------------------------------------------------------------------

    def target(self, name: str, target: schema.Target, model: str) -> CalibratedTarget:
        if isinstance(target, schema.DirectoryTarget):
            return self._directory(name, target, f"{model}-{schema.label(target)}")
        made = tuple(output.action for output in self.statistics)
        shapes = self.matrix_shapes
        values = sum(matrices * (cols + 1) for matrices, cols in shapes.values())  # and a count of each matrix
        types = {"F32": (2 * len(shapes), 4 * values)}
        file_name = f"{model}-{schema.label(target)}.gguf"
        return CalibratedTarget(
            name=name,
            file_name=file_name,
            tensors=made,
            action=self.matrix.action,
            nbytes=self.matrix_bytes,
            exact=False,
            weights=self.model.weights,
            types=types,
        )

    def _directory(self, name: str, target: schema.DirectoryTarget, folder: str) -> CalibratedTarget:
        place = f"targets.{name}"
        scheme = _scheme(target, self.checkpoint)
        library = self._library(target, scheme, place)
        limit = parse_size(target.max_shard_size, f"{place}.max_shard_size")
        linears = [linear.name for layer in self.model.layers for linear in layer.linears]
        made_by = f"{library.backend}:{library.version}" if library else "qbuild"
        planned = plan_directory(self.checkpoint, scheme, linears, place=place, max_shard_size=limit, quantizer=made_by)
        copied = [(path, self._side_file(path)) for path in sorted(planned.copies)]
        make = self._native if library is None else partial(self._by_library, library)
        action, parts = make(f"file:{name}", target, scheme, planned)
        made = self.graph.add(replace(action, inputs=(*action.inputs, *copied)))
        copies = sum(path.stat().st_size for path in planned.copies.values())
        size, types = planned.size + copies, _types(planned, scheme)
        return CalibratedTarget(
            name=name,
            file_name=folder,
            tensors=parts or (made.action,),
            action=made.action,
            nbytes=size,
            exact=True,
            weights=self.model.weights,
            types=types,
            directory=planned,
            scheme=scheme,
            environment=library,
        )

    def _native(
        self, id_: str, target: schema.DirectoryTarget, scheme: Scheme, planned: Directory
    ) -> tuple[Action, tuple[str, ...]]:
        """The action that packs solved layers, and those that solve them."""
        solved = tuple(self._solved(layer, target) for layer in self.model.layers)
        inputs: list[tuple[str, Input]] = [(f"layer {i}", output) for i, output in enumerate(solved)]
        plain = [item.source for file in planned.files for item in file.items if not item.linear]
        inputs += [(f"source {source}", self.source(source)) for source in plain]
        params = directory.Params(scheme.layout, directory.planned(planned))
        return Action(id_, directory.KIND, params, tuple(inputs)), tuple(output.action for output in solved)

    def _library(self, target: schema.DirectoryTarget, scheme: Scheme, place: str) -> Environment | None:
        """The environment of the library that makes a target; None: qbuild does. ConfigError where it cannot."""
        name = schema.backend(target)
        if name == schema.NATIVE:
            return None
        suit(name, scheme, str(self.checkpoint.config.get("model_type")), self.device, place)
        defaults = {f.name: f.default for f in fields(target)}
        for setting in (*NATIVE_ONLY, *(("damping",) if name == "autoawq" else ())):
            if getattr(target, setting) != defaults[setting]:
                fact = f"is a setting of qbuild's own quantizer, {name} has none like it"
                raise ConfigError(f"{place}.{setting}", fact, f"leave it out, or {place}.backend=native")
        folder = self.config.backend.dir
        return environment(name, Path(folder).expanduser().absolute() if folder else machine.cache_dir() / "backends")

    def _by_library(
        self, library: Environment, id_: str, target: schema.DirectoryTarget, scheme: Scheme, planned: Directory
    ) -> tuple[Action, tuple[str, ...]]:
        """The action that lets another library quantize the whole model, on the same windows of tokens."""
        files = directory.planned(planned)
        params = backend.Params(library.backend, library.digest, scheme, target.damping, files, self.device)
        inputs = (("tokens", self.tokens), ("config", self.model_config), ("weights", self.every_weight))
        return Action(id_, backend.KIND, params, inputs), ()

    def _solved(self, layer: extent.LayerShape, target: schema.DirectoryTarget) -> Output:
        """A layer quantized as a target asks; targets that ask the same share it, whatever their layouts."""
        _, bits, symmetric = _stored(target)
        params = solve.Params(
            layer.index,
            bits,
            target.group_size,
            symmetric,
            target.scaled,
            target.rounding,
            target.order,
            target.damping,
            tuple(linear.name for linear in layer.linears),
            self.device,
        )
        which = digest_bytes(repr(replace(params, layer=0, linears=())).encode()).hash[:8]
        if target.propagate:
            return self._propagated(f"layer {layer.index}:{which} propagated", params)
        inputs: list[tuple[str, Input]] = [("statistics", self.statistics[layer.index])]
        inputs += [(f"source {name}", self.source(name)) for name in layer.tensors]
        return self.graph.add(Action(f"layer {layer.index}:{which}", solve.KIND, params, tuple(inputs)))

    def _propagated(self, name: str, rounding: solve.Params) -> Output:
        """A layer quantized for what the quantized layers below it give: all of those are made of the same weights."""
        params = propagate.Params(rounding, self.config.calibration.dtype)
        weights_ = self.weights(rounding.layer)
        inputs = (("tokens", self.tokens), ("config", self.model_config), ("weights", weights_))
        return self.graph.add(Action(name, propagate.KIND, params, inputs))

    def evaluation(self, targets: Mapping[str, str]) -> Evaluation:
        """How far targets (name → action) are from the source: the source is run once for all of them."""
        wanted = self.config.evaluation
        text = self._tokens("evaluation tokens", wanted)
        params = evaluation.Params(wanted.dtype, self.device)
        shared = (("tokens", text), ("config", self.model_config), ("weights", self.every_weight))
        states = self.graph.add(Action("evaluation states", evaluation.STATES, params, shared))
        results = {}
        for name, action in targets.items():
            inputs = (("target", Output(action)), *shared)  # what the states of the source depend on, they do
            results[name] = self.graph.add(Action(f"evaluation:{name}", evaluation.RESULT, params, inputs)).action
        return Evaluation(text.action, states.action, results)

    def measures(self, spec: TensorSpec) -> bool:
        """Whether curvature tells what errors of a GGUF tensor cost: one that calibration sees, embedding, head."""
        ends = spec.name in ("token_embd.weight", "output.weight")
        return bool(spec.pieces) and spec.transform.kind in ("none", "permute") and (ends or self.sees(spec))

    def sees(self, spec: TensorSpec) -> bool:
        """Whether calibration sees the input of a GGUF tensor: a linear of a decoder layer, or rows of one."""
        return any(piece.source.removesuffix(".weight") in self._linears for piece in spec.pieces)

    @cached_property
    def _linears(self) -> frozenset[str]:
        """Checkpoint names without .weight; experts of a stacked tensor by the tensor's."""
        return frozenset(linear.name.partition("[")[0] for layer in self.model.layers for linear in layer.linears)


def _texts(source: str, *, fetch: bool, offline: bool) -> tuple[tuple[str, Input], ...]:
    """A text by content: its files, or the documents that come with qbuild."""
    if source == tokens.BUILTIN:
        return (("text", digest_bytes(repr(documents(None)).encode())),)
    paths = files(source, fetch=fetch, offline=offline)
    if not paths:  # of the Hub, not fetched by a plan
        return (("text", digest_bytes(source.encode())),)
    return tuple((f"text {p.name}", Source(p.name, str(p.absolute()), 0, p.stat().st_size)) for p in paths)


def _stored(target: schema.DirectoryTarget) -> tuple[str, int, bool]:
    """Layout, bits, and whether codes are symmetric."""
    match target:
        case schema.GptqTarget():
            return target.layout, target.bits, target.symmetric
        case schema.CtTarget():
            return "pack-quantized", target.bits, target.symmetric
        case _:
            return "awq-gemm", 4, False


def _scheme(target: schema.DirectoryTarget, checkpoint: Checkpoint) -> Scheme:
    layout, bits, symmetric = _stored(target)
    return Scheme(layout, bits, target.group_size, symmetric, dtype=plain_dtype(checkpoint, layout))


def _types(planned: Directory, scheme: Scheme) -> dict[str, tuple[int, int]]:
    """Kind of tensor → (how many, bytes)."""
    found: dict[str, tuple[int, int]] = {}
    for file in planned.files:
        for item in file.items:
            kind = f"W{scheme.bits}" if item.linear else item.tensors[0].dtype
            count, nbytes = found.get(kind, (0, 0))
            found[kind] = count + 1, nbytes + sum(tensor.nbytes for tensor in item.tensors)
    return found
