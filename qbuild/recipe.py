"""Configuration → graph: which tensors a target holds, in which type, out of which bytes.

A function of the configuration, the headers of the checkpoint and nothing else: no weights, no clock, no environment.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from qbuild import candidates, fit, schema
from qbuild.actions import choice, damage, file, metadata, tensor, tokens
from qbuild.arch import convert, mix
from qbuild.arch.convert import ModelFacts, TensorSpec
from qbuild.arch.shapes import expected_tensors
from qbuild.budget import parse_size
from qbuild.calibrated import CalibratedTarget, Calibration, Evaluation, Limit
from qbuild.checkpoint import Checkpoint, shapes
from qbuild.digest import Digest, digest_bytes
from qbuild.errors import ConfigError, InputError, Notice
from qbuild.ggml import FILE_TYPES, QTYPES, nearest_file_type
from qbuild.gguffile import Named, layout, shards, split_name
from qbuild.graph import Action, Graph, Input, Output, Source
from qbuild.imatrix import Imatrix, Noted, counts, noted
from qbuild.imatrix import load as load_imatrix
from qbuild.inputs import InputFile, folder_name
from qbuild.source import open_source

AUTO = "auto"  # the value of ``imatrix`` that asks for one made by calibration
MAX_SHARDS = 200  # of a target: each takes three open files
FIXED = ("general.architecture", "general.alignment")
COUNTS = ("block_count", "attention.head_count", "attention.head_count_kv", "expert_count")  # decide types, too
Choices = Sequence[tuple[TensorSpec, str]]
Gguf = schema.GgufTarget | schema.FitTarget

__all__ = ["AUTO", "FileTarget", "Made", "Resolved", "calibrated", "calibrates", "model_name", "open_model", "resolve"]


@dataclass(frozen=True)
class FileTarget:
    """One GGUF file, or its shards. In its order: ``named`` is what its header lists, ``choices`` every tensor of the
    model with its type, ``tensors`` the actions making them; ``shards`` says how many each of several files has."""

    name: str
    file_names: tuple[str, ...]
    named: tuple[Named, ...]
    choices: tuple[tuple[TensorSpec, str], ...]
    tensors: tuple[str, ...]
    action: str
    shards: tuple[int, ...] = ()
    awaits: bool = False  # an importance matrix that calibration will make
    fitted: str | None = None  # the action that chose its types

    @property
    def file_name(self) -> str:
        """What loaders are given: the file, or the first of its shards."""
        return self.file_names[0]


@dataclass(frozen=True)
class Resolved:
    """A configuration as a graph. ``name`` is the model's name in file names.

    ``awaited``: the action that makes the importance matrix which some target waits for. ``matrix_files``: importance
    matrices that were given. ``notices``: what of the configuration is probably not meant.
    """

    config: schema.Config
    checkpoint: Checkpoint
    facts: ModelFacts
    name: str
    graph: Graph
    targets: tuple[FileTarget | CalibratedTarget, ...]
    specs: dict[str, TensorSpec]
    imatrix_slices: dict[Digest, bytes]
    calibration: Calibration | None = None
    awaited: str | None = None
    evaluation: Evaluation | None = None
    matrix_files: Mapping[Digest, InputFile] = field(default_factory=dict)
    notices: tuple[Notice, ...] = ()

    @property
    def files(self) -> tuple[FileTarget, ...]:
        """The GGUF targets."""
        return tuple(t for t in self.targets if isinstance(t, FileTarget))


def open_model(model: schema.Model, *, fetch: bool, offline: bool) -> Checkpoint:
    """The checkpoint a model names. Without ``fetch``, headers are enough, and where there is nothing to open the
    shapes come from ``model.config``."""
    if not model.source and not model.config:
        raise ConfigError("model.source", "no model is named", "model.source=DIRECTORY, a Hub id, or FILE.gguf")
    if model.config and not fetch and not (model.source and _on_disk(model.source)):
        return shapes(model.config, expected_tensors(model.config), source=model.source or "model.config")
    if not model.source:
        raise ConfigError("model.source", "a configuration has shapes but no weights to build from", "model.source=…")
    return open_source(model.source, revision=model.revision, fetch=fetch, offline=offline)


def _on_disk(source: str) -> bool:
    return source.startswith("pkg://") or Path(source).exists()


def model_name(model: schema.Model, checkpoint: Checkpoint) -> str:
    """The name outputs carry: ``model.name``, else the source's own without a type suffix or extension."""
    if model.name:
        if "/" in model.name or model.name.startswith("."):
            raise ConfigError("model.name", f"{model.name!r} cannot be a file name", "leave out '/' and leading dots")
        return model.name
    last = _last(checkpoint)
    if checkpoint.kind != "gguf":
        return folder_name(checkpoint.root) if checkpoint.root and last in ("", ".", "..") else last
    stem = last.removesuffix(".gguf")
    for separator in (".", "-"):
        head, _, tail = stem.rpartition(separator)
        if head and tail.upper() in FILE_TYPES:
            return head
    return stem


def _last(checkpoint: Checkpoint) -> str:
    """The last part of what the user calls the source."""
    return checkpoint.source.rstrip("/").rsplit("/", 1)[-1]


@dataclass(frozen=True)
class Made:
    """What calibration made, and a graph can be told only then: the importance matrix of targets that ask for one, and
    the types of fitted files, by target and tensor."""

    matrix: Path | None = None
    types: Mapping[str, Mapping[str, str]] = field(default_factory=dict)


def resolve(
    config: schema.Config, *, fetch: bool, made: Made | None = None, checkpoint: Checkpoint | None = None
) -> Resolved:
    """The graph of a configuration. ``fetch``: the weights must be here (a build); else headers will do (a plan).

    ``made``: what it waited for, if that is made. ``checkpoint``: the model if it is open already.
    """
    if not config.targets:
        raise ConfigError("target", "nothing is asked for", "target=gguf/q4_k_m, or +recipe=NAME")
    checkpoint = checkpoint or open_model(config.model, fetch=fetch, offline=config.offline)
    builder = _Builder(config, checkpoint, made or Made(), fetch=fetch)
    targets = tuple(builder.target(name, target) for name, target in config.targets.items())
    _check_names(targets)
    evaluation = builder.evaluation(targets)
    return Resolved(
        config=config,
        checkpoint=checkpoint,
        facts=builder.facts,
        name=builder.name,
        graph=builder.graph,
        targets=targets,
        specs={s.name: s for s in builder.specs},
        imatrix_slices=builder.slices,
        calibration=builder.calibration,
        awaited=builder.awaited,
        evaluation=evaluation,
        matrix_files=builder.matrix_files,
        notices=tuple(builder.notices),
    )


def _notices(config: schema.Config) -> list[Notice]:
    """What of a configuration is probably not meant, whatever the model is."""
    found = []
    if config.unchosen:  # a name may be another's than was meant
        fact = f"set, but not chosen: {', '.join(config.unchosen)}"
        found.append(Notice("targets", fact, f"chosen: {', '.join(config.targets)}"))
    if calibrates(config) and config.calibration.source == tokens.BUILTIN:
        fact = "no text is named: the one that comes with qbuild is used"
        found.append(Notice("calibration.source", fact, "another one: calibration.source=FILE"))
    return found


def _check_names(targets: tuple[FileTarget | CalibratedTarget, ...]) -> None:
    seen: dict[str, str] = {}
    for target in targets:
        other = seen.setdefault(target.file_name, target.name)
        if other != target.name:
            fact = f"would write {target.file_name}, which targets.{other} writes too"
            raise ConfigError(f"targets.{target.name}", fact, f"targets.{target.name}.suffix=OTHER")


@dataclass(frozen=True)
class _Entries:
    """An importance matrix as an input of damages, and whether it has an entry for a tensor."""

    matrix: Digest | Output | None
    holds: candidates.Knows


class _Builder:
    """Adds the actions of one model to a graph."""

    def __init__(self, config: schema.Config, checkpoint: Checkpoint, made: Made, *, fetch: bool) -> None:
        self.config, self.checkpoint, self.made, self.fetch = config, checkpoint, made, fetch
        self.facts = convert.model_facts(checkpoint)
        self.specs = convert.tensor_specs(checkpoint, config.model.outtype)
        self.name = model_name(config.model, checkpoint)
        self.graph = Graph()
        self.matrices: dict[str, Imatrix] = {}
        self.slices: dict[Digest, bytes] = {}
        self.matrix_files: dict[Digest, InputFile] = {}
        self.kvs = self._metadata()
        self.calibration = self._calibration()
        self.awaited: str | None = None
        self.notices = _notices(config)

    def _calibration(self) -> Calibration | None:
        if not calibrates(self.config) and self.config.evaluation.source is None:
            return None
        return Calibration(self.config, self.checkpoint, self.specs, self.graph, fetch=self.fetch)

    def evaluation(self, targets: Iterable[FileTarget | CalibratedTarget]) -> Evaluation | None:
        """The measuring of every model among the targets, where it is asked for."""
        if self.calibration is None or self.config.evaluation.source is None:
            return None
        for name, target in self.config.targets.items():
            if isinstance(target, schema.GgufTarget) and target.prune_layers:
                fact = "a file with fewer layers than its source cannot be measured against it"
                raise ConfigError(f"targets.{name}.prune_layers", fact, "make it in a build without evaluation.source")
        models = [t for t in targets if isinstance(t, FileTarget) or t.directory is not None or t.limit]
        return self.calibration.evaluation({t.name: t.action for t in models})

    def target(self, name: str, target: schema.Target) -> FileTarget | CalibratedTarget:
        if isinstance(target, schema.GgufTarget):
            return self.file_target(name, target)
        if isinstance(target, schema.FitTarget):
            return self.fit_target(name, target)
        if self.calibration is None:
            raise RuntimeError(f"BUG: {target.format} needs no calibration and is no GGUF file")
        made = self.calibration.target(name, target, self.name)
        self.graph.targets[name] = made.action
        return made

    def _metadata(self) -> Input:
        """Where a file's key-value pairs come from: a GGUF source's own, else the metadata action."""
        checkpoint = self.checkpoint
        if checkpoint.kind == "gguf":
            return digest_bytes(metadata.pack(checkpoint.kvs))
        weights = digest_bytes(repr([(t.name, t.dtype, t.shape) for t in checkpoint.tensors.values()]).encode())
        folder = folder_name(checkpoint.root) if checkpoint.root else checkpoint.revision or _last(checkpoint)
        params = metadata.Params(self.config.model.name, folder, weights.hash)
        inputs = [(n, Source(n, str(p), 0, p.stat().st_size)) for n, p in sorted(checkpoint.aux.items())]
        return self.graph.add(Action("metadata", metadata.KIND, params, tuple(inputs)))

    def file_target(self, name: str, target: schema.GgufTarget) -> FileTarget:
        place = f"targets.{name}"
        self._check_overrides(target, place)
        kept = mix.pruned(self.specs, target.prune_layers, f"{place}.prune_layers")
        named = [replace(spec, name=new) for spec, new in kept]
        self._notice_patterns(target, named, place)
        types = [type_ for _, type_ in mix.choose(named, self.facts, _mix(target))]
        choices = tuple((spec, type_) for (spec, _), type_ in zip(kept, types, strict=True))
        matrix = self._imatrix(target, place) if target.imatrix else None
        if not isinstance(matrix, Output):
            _check_matrix(target, choices, matrix, place)
        tensors = tuple(self.graph.add(self.tensor(spec, type_, target, place, matrix)) for spec, type_ in choices)
        params = self._file_params(target, list(zip(named, types, strict=True)), matrix, place)
        inputs = ((spec.name, output) for spec, output in zip(named, tensors, strict=True))
        made = self.graph.add(Action(f"file:{name}", file.KIND, params, (("kvs", self.kvs), *inputs)))
        self.graph.targets[name] = made.action
        stem, count = f"{self.name}-{schema.label(target)}", len(params.shards)
        names = tuple(split_name(stem, number, count) for number in range(count)) or (f"{stem}.gguf",)
        ids = tuple(output.action for output in tensors)
        awaits = isinstance(matrix, Output)
        return FileTarget(name, names, params.tensors, choices, ids, made.action, params.shards, awaits)

    def _notice_patterns(self, target: schema.GgufTarget, named: list[TensorSpec], place: str) -> None:
        """A pattern that matches nothing is no error: a recipe may name experts, and be used for a model without."""
        names = mix.quantized(named, self.facts, _mix(target))
        kinds, fact = mix.kinds(names), "no tensor that is quantized has such a name"
        for pattern in mix.unmatched(names, _mix(target)):
            near = schema.nearest(pattern, kinds)
            remedy = f"did you mean {' or '.join(near)}?" if near else f"tensors: {', '.join(kinds) or 'none'}"
            self.notices.append(Notice(f"{place}.tensor_types.{pattern}", fact, remedy))

    def fit_target(self, name: str, target: schema.FitTarget) -> FileTarget | CalibratedTarget:
        """A file whose types damage decides: a file like any other as soon as they are known."""
        if self.calibration is None:
            raise RuntimeError("BUG: a file is to be fitted, and there is no calibration")
        place, weighed = f"targets.{name}", self._entries(target)
        weights = sum(spec.weights for spec in self.specs)
        most = candidates.limit(target, weights, place)
        offers = candidates.offers(
            self.specs, self.facts, target, place, measured=self.calibration.measures, weighed=weighed.holds
        )
        damages: list[tuple[str, Input]] = [
            (f"{spec.name} {type_}", self.graph.add(self.damage(spec, type_, target, place, weighed)))
            for spec, types in offers
            for type_ in types
            if len(types) > 1
        ]
        called = f"{self.name}-imatrix.gguf" if target.imatrix == AUTO else target.imatrix
        params = choice.Params(most, tuple((spec.name, spec.shape, types) for spec, types in offers), called)
        noted_: list[tuple[str, Input]] = [] if weighed.matrix is None else [("imatrix", weighed.matrix)]
        chosen = self.graph.add(Action(f"choice:{name}", choice.KIND, params, (("kvs", self.kvs), *noted_, *damages)))
        known = self.made.types.get(name)
        if known is not None:
            return self._fitted(name, target, tuple((spec, known[spec.name]) for spec, _ in offers), chosen.action)
        self.graph.targets[name] = chosen.action
        tensors = tuple(fit.Tensor(s.name, s.shape, dict.fromkeys(t, 0.0)) for s, t in offers)
        limit = Limit(most, tensors, target.max_bpw is not None, self._will_note(target, called))
        actions = tuple(item.action for _, item in damages if isinstance(item, Output))
        file_name = f"{self.name}-{schema.label(target)}.gguf"
        return CalibratedTarget(
            name=name,
            file_name=file_name,
            tensors=actions,
            action=chosen.action,
            nbytes=most,
            exact=False,
            weights=weights,
            types={},
            limit=limit,
        )

    def _will_note(self, target: schema.FitTarget, called: str | None) -> Noted | None:
        """What a file will say of its importance matrix, as long as it will be: numbers have one length."""
        if target.imatrix is None or called is None:
            return None
        found = self._read_imatrix(target.imatrix)
        dataset = Path(self.config.calibration.source).name
        return noted(found, called) if isinstance(found, Imatrix) else (called, dataset, 1, 1)

    def _fitted(
        self, name: str, target: schema.FitTarget, choices: tuple[tuple[TensorSpec, str], ...], chosen: str
    ) -> FileTarget:
        """A file of types that ``chosen`` chose."""
        place, sizes = f"targets.{name}", Counter[str]()
        for spec, type_ in choices:
            sizes[type_] += spec.weights
        matrix = self._read_imatrix(target.imatrix) if target.imatrix else None
        tensors = tuple(self.graph.add(self.tensor(spec, type_, target, place, matrix)) for spec, type_ in choices)
        named = tuple((spec.name, spec.shape, type_) for spec, type_ in choices)
        params = file.Params(nearest_file_type(sizes).id, named, _noted(matrix))
        inputs = ((spec.name, output) for (spec, _), output in zip(choices, tensors, strict=True))
        made = self.graph.add(Action(f"file:{name}", file.KIND, params, (("kvs", self.kvs), *inputs)))
        self.graph.targets[name] = made.action
        ids = tuple(output.action for output in tensors)
        file_names, awaits = (f"{self.name}-{schema.label(target)}.gguf",), isinstance(matrix, Output)
        return FileTarget(name, file_names, named, choices, ids, made.action, (), awaits, chosen)

    def damage(self, spec: TensorSpec, type_: str, target: schema.FitTarget, place: str, weighed: _Entries) -> Action:
        """The action that measures what storing a tensor in a type costs."""
        if self.calibration is None:
            raise RuntimeError("BUG: damage is to be measured, and there is no calibration")
        made = self.tensor(spec, type_, target, place, None)
        inputs: list[tuple[str, Input]] = [*made.inputs, ("curvature", self.calibration.sensitivity)]
        which = ""
        if weighed.matrix is not None and type_ in tensor.WEIGHED and weighed.holds(spec):
            inputs.append(("imatrix", weighed.matrix))
            which = f"+{AUTO if isinstance(weighed.matrix, Output) else weighed.matrix.hash[:8]}"
        parts = tuple((piece.source, piece.start, piece.stop) for piece in spec.pieces)
        params = damage.Params(made.params, parts, spec.shape[0] if len(spec.shape) > 2 else 1)
        return Action(f"{spec.name}:damage {type_}{which}", damage.KIND, params, tuple(inputs))

    def _entries(self, target: schema.FitTarget) -> _Entries:
        """The importance matrix of a fitted file, whole: damages are measured with all of it, made already or not."""
        if target.imatrix is None or self.calibration is None:
            return _Entries(None, lambda _spec: False)
        found = self._read_imatrix(target.imatrix)
        if target.imatrix == AUTO:
            return _Entries(self.calibration.matrix, self.calibration.sees)
        if isinstance(found, Output):
            raise RuntimeError(f"BUG: {target.imatrix} is to be made")
        self.matrix_files[found.digest] = InputFile(Path(target.imatrix).expanduser(), found.digest)
        return _Entries(found.digest, lambda spec: spec.name in found.entries)

    def _file_params(
        self, target: schema.GgufTarget, named: Choices, matrix: Imatrix | Output | None, place: str
    ) -> file.Params:
        tensors = tuple((spec.name, spec.shape, type_) for spec, type_ in named)
        return file.Params(
            FILE_TYPES[target.ftype].id,
            tensors,
            _noted(matrix),
            tuple(target.override_kv.items()),
            mix.layers(spec for spec, _ in named) if target.prune_layers else None,
            _shards(target, tensors, place),
        )

    def _check_overrides(self, target: schema.GgufTarget, place: str) -> None:
        """What describes the weights is not the user's to say: another number does not change them."""
        for key in target.override_kv:
            if key in FIXED or key.removeprefix(f"{self.facts.arch}.") in COUNTS or key.startswith("split."):
                fact = "describes the weights, which stay as they are"
                raise ConfigError(f"{place}.override_kv.{key}", fact, "leave it out")

    def _imatrix(self, target: schema.GgufTarget, place: str) -> Imatrix | Output:
        """The importance matrix that a target uses, or the action that will make it."""
        found = self._read_imatrix(target.imatrix or "")
        if isinstance(found, Output):
            return found
        return found.chosen(target.include_weights, target.exclude_weights, place)

    def _read_imatrix(self, path: str) -> Imatrix | Output:
        """An importance matrix, read once however many targets use it; or the action that will make it."""
        if path == AUTO:
            if self.calibration is None:
                raise RuntimeError("BUG: an importance matrix is to be made, and there is no calibration")
            action = self.calibration.matrix  # in the graph when it is made, too: what it was made of is told
            if self.made.matrix is None:
                self.awaited = action.action
                return action
        if path not in self.matrices:
            made = path == AUTO
            found = load_imatrix(str(self.made.matrix) if made else path)
            self.matrices[path] = replace(found, file=f"{self.name}-imatrix.gguf") if made else found
        return self.matrices[path]

    def _slice(
        self, spec: TensorSpec, type_: str, target: Gguf, place: str, matrix: Imatrix | Output | None
    ) -> Digest | Output | None:
        """The part of an importance matrix that weighs this tensor, by digest; its bytes are kept for the pass."""
        if matrix is None or type_ not in tensor.WEIGHED:
            return None
        if isinstance(matrix, Output):
            used = isinstance(target, schema.FitTarget) or counts(
                spec.name, target.include_weights, target.exclude_weights
            )
            return matrix if used and self.calibration and self.calibration.sees(spec) else None
        matrices = spec.shape[0] if len(spec.shape) > 2 else 1
        values = matrix.values(spec.name, matrices, spec.shape[-1], place)
        if values is None:
            return None
        data = np.ascontiguousarray(values, np.float32).tobytes()
        digest = digest_bytes(data)
        self.slices[digest] = data
        return digest

    def tensor(self, spec: TensorSpec, type_: str, target: Gguf, place: str, matrix: Imatrix | Output | None) -> Action:
        """The action that makes one output tensor in one type."""
        cols = spec.shape[-1]
        inputs: list[tuple[str, Input]] = []
        dtype = spec.stored
        for index, piece in enumerate(spec.pieces):
            source = self.checkpoint.tensors[piece.source]
            dtype, row = source.dtype, QTYPES[source.dtype].row_bytes(cols)
            stop = source.nbytes // row if piece.stop is None else piece.stop
            path = str(self.checkpoint.files[source.file].path) if self.checkpoint.files else ""
            start = source.offset + piece.start * row
            inputs.append((f"source {index}", Source(piece.source, path, start, (stop - piece.start) * row)))
        if spec.data is not None:
            inputs.append(("source 0", digest_bytes(spec.data)))
        if QTYPES[dtype].quantized and type_ != dtype and not self.config.model.allow_requantize:
            fact = f"{spec.name} is {dtype} already; making {type_} of it loses quality twice"
            raise InputError(place, fact, "use an F16/BF16/F32 source, or model.allow_requantize=true")
        params = tensor.Params(type_, spec.stored, dtype, cols, spec.transform)
        weights = self._slice(spec, type_, target, place, matrix)
        if weights is None:
            return Action(f"{spec.name}:{type_}", tensor.KIND, params, tuple(inputs))
        inputs.append(("imatrix", weights))
        which = weights.hash[:8] if isinstance(weights, Digest) else AUTO
        return Action(f"{spec.name}:{type_}+{which}", tensor.KIND, params, tuple(inputs))


def calibrates(config: schema.Config) -> bool:
    """Whether a target needs the model to be run over calibration text."""
    return any(map(calibrated, config.targets.values()))


def calibrated(target: schema.Target) -> bool:
    """Whether the bytes of a target depend on calibration."""
    return isinstance(target, schema.CALIBRATED) or getattr(target, "imatrix", None) == AUTO


def _check_matrix(target: schema.GgufTarget, choices: Choices, matrix: Imatrix | None, place: str) -> None:
    """A type that cannot be made without importances has them for every tensor."""
    bare = choices if matrix is None else tuple(c for c in choices if c[0].name not in matrix.entries)
    lacking = mix.needs_imatrix(list(bare), _mix(target))
    if lacking and matrix is None:
        fact = f"{target.ftype} needs an importance matrix (for {lacking})"
        raise ConfigError(place, fact, f"{place}.imatrix=auto makes one by calibration; or {place}.imatrix=FILE")
    if lacking:
        fact = f"{target.imatrix} has no entry for {lacking}, which cannot be made without one"
        raise InputError(place, fact, "make an importance matrix of this very model: llama-imatrix")


def _shards(target: schema.GgufTarget, tensors: Sequence[Named], place: str) -> tuple[int, ...]:
    """How many tensors each shard has; empty for a file that stays whole."""
    if target.max_shard_size is None:
        return ()
    counts = shards(tensors, parse_size(target.max_shard_size, f"{place}.max_shard_size"))
    if not counts[0]:
        fact = f"the first tensor, {tensors[0][0]}, is larger than {target.max_shard_size}"
        raise ConfigError(f"{place}.max_shard_size", fact, f"at least {layout(tensors[:1])[1]} bytes")
    if len(counts) > MAX_SHARDS:
        fact = f"{target.max_shard_size} makes {len(counts)} files, which are open at once"
        raise ConfigError(f"{place}.max_shard_size", fact, f"a size that makes {MAX_SHARDS} at most")
    return tuple(counts) if len(counts) > 1 else ()


def _noted(matrix: Imatrix | Output | None) -> Noted | None:
    """What the file says of its importance matrix."""
    if isinstance(matrix, Imatrix):
        return noted(matrix, matrix.file)
    return None if matrix is None else ("", None, 0, 0)


def _mix(target: schema.GgufTarget) -> mix.Mix:
    return mix.Mix(
        file_type=target.ftype,
        output_type=target.output_type,
        embedding_type=target.embedding_type,
        tensor_types=tuple(target.tensor_types.items()),
        pure=target.pure,
        leave_output=target.leave_output,
        has_imatrix=target.imatrix is not None,
    )
