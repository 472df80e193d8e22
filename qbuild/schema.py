"""Configuration as frozen values: every key, its default, what it may hold. Hydra composes it, nothing else sees Hydra.

A key that does not exist or a value that cannot be is a ConfigError that names the choices. Nothing is rewritten: a
value has one spelling.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
import shlex
import types
import typing
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from qbuild.backends.environment import BACKENDS
from qbuild.budget import parse_size
from qbuild.errors import ConfigError
from qbuild.ggml import ENCODED, FILE_TYPES

__all__ = [
    "CALIBRATED",
    "FORMATS",
    "NATIVE",
    "AwqTarget",
    "BackendConf",
    "BudgetConf",
    "CalibrationConf",
    "Config",
    "CtTarget",
    "DirectoryTarget",
    "EvaluationConf",
    "FitTarget",
    "GgufTarget",
    "GptqTarget",
    "GraphConf",
    "ImatrixTarget",
    "Model",
    "StoreConf",
    "Target",
    "backend",
    "close",
    "keys",
    "label",
    "nearest",
    "parse",
    "sections",
]

T = TypeVar("T")
Check = Callable[[Any, str], None]


def close(wrong: str, choices: Iterable[str]) -> str:
    """A remedy: the names most like ``wrong``, then all of them."""
    names = list(choices)
    near = nearest(wrong, names)
    listed = f"choices: {', '.join(names)}"
    return f"did you mean {' or '.join(near)}?\n{listed}" if near else listed


def nearest(wrong: str, names: Iterable[str]) -> list[str]:
    """Up to three names that ``wrong`` may stand for."""
    folded = {name.lower(): name for name in names}
    return [folded[name] for name in difflib.get_close_matches(wrong.lower(), folded, 3, 0.6)]


def one_of(*choices: str, what: str = "a choice") -> dict[str, Any]:
    def check(value: Any, place: str) -> None:
        if value is not None and value not in choices:
            raise ConfigError(place, f"{value!r} is not {what}", close(str(value), choices))

    return {"check": check}


def _size(value: Any, place: str) -> None:
    if value != "auto":
        parse_size(value, place)


def _count(value: Any, place: str) -> None:
    if value != "auto" and (not isinstance(value, int) or value < 1):
        raise ConfigError(place, f"{value!r} is not a number of 1 or more", f"{place}=4")


def _whole(*choices: int) -> dict[str, Any]:
    def check(value: Any, place: str) -> None:
        if value not in choices:
            raise ConfigError(place, f"{value!r} is not offered", f"choices: {', '.join(map(str, choices))}")

    return {"check": check}


def _group(value: Any, place: str) -> None:
    if value != -1 and (value < 8 or value % 8):
        raise ConfigError(place, f"{value!r} is not a group size", "32, 64 or 128; -1: one group a row")


def _damping(value: Any, place: str) -> None:
    if not 0 < value < 1:
        raise ConfigError(place, f"{value!r} is not a share of the mean diagonal", f"{place}=0.05")


def _file_part(value: Any, place: str) -> None:
    if value is not None and (not value or "/" in value or value.startswith(".")):
        raise ConfigError(place, f"{value!r} cannot be part of a file name", "leave out '/' and leading dots")


def _layers(value: Any, place: str) -> None:
    for layer in value:
        if layer < 0:
            raise ConfigError(place, f"{layer} is not the number of a layer", "they count from 0")


def _texts(value: Any, place: str) -> None:
    if "" in value:
        raise ConfigError(place, "an empty text is part of every name", "a part of a tensor's name: ffn_down")


def _override_kv(value: Any, place: str) -> None:
    """The types that llama-quantize's --override-kv can write, told by how YAML reads the value."""
    for key, item in value.items():
        where = f"{place}.{key}"
        if not isinstance(item, (bool, int, float, str)):
            raise ConfigError(
                where, f"{_shown(item)} cannot be written", "a whole number, a number, text, true or false"
            )
        if isinstance(item, int) and not 0 <= item < 1 << 32:
            raise ConfigError(where, f"{item} does not fit", "whole numbers are written as UINT32: 0 to 4294967295")
        if isinstance(item, float) and not abs(item) < FLOAT32:
            raise ConfigError(where, f"{item} does not fit", "numbers are written as FLOAT32")
        if max(len(key.encode()), len(item.encode()) if isinstance(item, str) else 0) > 127:
            raise ConfigError(where, "is longer than 127 bytes", "llama-quantize takes no more of a key or a text")


def _optional_size(value: Any, place: str) -> None:
    if value is not None:
        parse_size(value, place)


def _encoded(value: Any, place: str) -> None:
    if value not in ENCODED:
        raise ConfigError(place, f"{value!r} is not a type of weights", close(str(value), ENCODED))


def _tensor_types(value: Any, place: str) -> None:
    for pattern, type_ in value.items():
        where = f"{place}.{pattern}"
        try:
            re.compile(pattern)
        except re.error as error:
            raise ConfigError(where, f"is not a regular expression: {error}", "e.g. attn_v: Q8_0") from None
        _encoded(type_, where)


FLOAT32 = 3.4028235677973366e38  # numbers from here on are infinite there


def _fitting(value: Any, place: str) -> None:
    for type_ in value:
        _encoded(type_, place)


def _bits(value: Any, place: str) -> None:
    if value is not None and not 0 < value <= 32:
        raise ConfigError(place, f"{value!r} is not a number of bits a weight", f"{place}=4.5")


def _words(value: Any, place: str) -> None:
    try:
        shlex.split(value or "")
    except ValueError as error:
        raise ConfigError(place, f"{value!r} cannot be told apart into words: {error}", "close the quotation") from None


def _trust(value: Any, place: str) -> None:
    if value:
        fact = "code that comes with a checkpoint is never run"
        raise ConfigError(place, fact, "leave it out; docs/families.md lists the models that need none")


SIZE, COUNT = {"check": _size}, {"check": _count}
TENSOR_TYPE = one_of(*ENCODED, what="a type of weights")
NATIVE = "native"  # quantized by qbuild itself
BACKEND = one_of(NATIVE, *BACKENDS, what="a backend")


@dataclass(frozen=True)
class Model:
    """``config`` holds a model's config.json, so that a plan needs nothing on disk."""

    source: str | None = None  # directory of safetensors, Hub id, FILE.gguf, or pkg://package/file
    name: str | None = field(default=None, metadata={"check": _file_part})  # in file names; null: the source's own
    revision: str | None = None
    trust_remote_code: bool = field(default=False, metadata={"check": _trust})  # true is an error
    allow_requantize: bool = False  # accept a source that is quantized already
    outtype: str = field(default="auto", metadata=one_of("auto", "F32", "F16", "BF16", what="a converter type"))
    config: dict[str, Any] | None = None


@dataclass(frozen=True)
class Target:
    """One output. The format decides which of the classes below it is."""

    format: str = "gguf"
    # In the file name, after the model's; null: what the settings are, in short (see ``label``).
    suffix: str | None = field(default=None, metadata={"check": _file_part}, kw_only=True)


@dataclass(frozen=True)
class GgufTarget(Target):
    """A GGUF file. The fields after ``ftype`` are llama-quantize's options of the same meaning."""

    ftype: str = field(default="Q4_K_M", metadata=one_of(*FILE_TYPES, what="a GGUF file type"))
    output_type: str | None = field(default=None, metadata=TENSOR_TYPE)
    embedding_type: str | None = field(default=None, metadata=TENSOR_TYPE)
    tensor_types: dict[str, str] = field(default_factory=dict, metadata={"check": _tensor_types})  # pattern: type
    pure: bool = False
    leave_output: bool = False
    imatrix: str | None = None  # path of an importance matrix; auto: made by calibration
    include_weights: tuple[str, ...] = field(default=(), metadata={"check": _texts})  # of the matrix: parts of names
    exclude_weights: tuple[str, ...] = field(default=(), metadata={"check": _texts})
    prune_layers: tuple[int, ...] = field(default=(), metadata={"check": _layers})
    # Key: value. 8 is written as UINT32, 8.0 as FLOAT32, true as BOOL, "8" as STRING.
    override_kv: dict[str, Any] = field(default_factory=dict, metadata={"check": _override_kv})
    # A larger file is cut as by llama-gguf-split --split-max-size: bytes of tensors, without the header.
    max_shard_size: str | int | None = field(default=None, metadata={"check": _optional_size})


@dataclass(frozen=True)
class FitTarget(Target):
    """A GGUF file of at most ``max_size``, or of at most ``max_bpw`` bits a weight, whose tensors get the types that do
    the least damage. ``types``: those that a tensor can get; none: see ``candidates``."""

    format: str = "fit"
    max_size: str | int | None = field(default=None, metadata={"check": _optional_size})
    max_bpw: float | None = field(default=None, metadata={"check": _bits})
    types: tuple[str, ...] = field(default=(), metadata={"check": _fitting})
    imatrix: str | None = None  # path of an importance matrix; auto: made by calibration


@dataclass(frozen=True)
class ImatrixTarget(Target):
    """An importance matrix in llama.cpp's format, of the calibration data."""

    format: str = "imatrix"


@dataclass(frozen=True)
class DirectoryTarget(Target):
    """A directory of safetensors whose linears are codes in groups of columns.

    ``scaled``: AWQ's scales are searched and folded into what stands before a linear. ``rounding``: gptq makes good in
    later columns what rounding loses in one, ``nearest`` does not. All layouts may have either. ``propagate``: a layer
    is quantized for what the quantized layers below it give, which takes forward passes of the target's own.
    """

    group_size: int = field(default=128, metadata={"check": _group})
    scaled: bool = True
    rounding: str = field(default="gptq", metadata=one_of("gptq", "nearest", what="a way of rounding"))
    order: str = field(default="activation", metadata=one_of("natural", "activation", "group", what="an order"))
    damping: float = field(default=0.05, metadata={"check": _damping})
    propagate: bool = False
    max_shard_size: str | int = field(default="5GB", metadata={"check": parse_size})


@dataclass(frozen=True)
class AwqTarget(DirectoryTarget):
    """AutoAWQ's gemm layout: 4 bits, asymmetric."""

    format: str = "awq"
    backend: str = field(default=NATIVE, metadata=BACKEND)


@dataclass(frozen=True)
class GptqTarget(DirectoryTarget):
    """GPTQ's layout."""

    format: str = "gptq"
    bits: int = field(default=4, metadata=_whole(2, 3, 4, 8))
    symmetric: bool = True
    layout: str = field(default="gptq", metadata=one_of("gptq", "gptq_v2", what="a layout"))
    backend: str = field(default=NATIVE, metadata=BACKEND)


@dataclass(frozen=True)
class CtTarget(DirectoryTarget):
    """compressed-tensors' pack-quantized layout."""

    format: str = "ct"
    bits: int = field(default=4, metadata=_whole(4, 8))
    symmetric: bool = True


@dataclass(frozen=True)
class CalibrationConf:
    source: str = "builtin"  # text or JSONL file, or builtin
    samples: int = field(default=128, metadata=COUNT)  # windows of text
    length: int = field(default=512, metadata=COUNT)  # tokens of a window
    seed: int = 0
    dtype: str = field(default="float32", metadata=one_of("float32", "bfloat16", what="a type to compute in"))
    spill: bool | None = None  # hidden states go to disk; null: where they do not fit in RAM


@dataclass(frozen=True)
class EvaluationConf:
    """Perplexity, KL divergence to the source and first choices of every target."""

    source: str | None = None  # as calibration.source; null: targets are not measured
    samples: int = field(default=20, metadata=COUNT)  # windows of text
    length: int = field(default=512, metadata=COUNT)  # tokens of a window
    seed: int = 0
    dtype: str = field(default="float32", metadata=one_of("float32", "bfloat16", what="a type to compute in"))


@dataclass(frozen=True)
class BudgetConf:
    """A size (16GiB, 500MB, bytes) or ``auto``: what this machine has."""

    ram: str | int = field(default="auto", metadata=SIZE)
    vram: str | int = field(default="auto", metadata=SIZE)
    disk: str | int = field(default="auto", metadata=SIZE)
    threads: str | int = field(default="auto", metadata=COUNT)


@dataclass(frozen=True)
class StoreConf:
    dir: str | None = None  # null: in the user's cache folder
    link: str = field(default="auto", metadata=one_of("auto", "reflink", "hardlink", "copy", what="a way to link"))
    limit: str | int | None = None  # size that `qbuild gc` shrinks the store to


@dataclass(frozen=True)
class BackendConf:
    """Where the environments of other quantizers lie, and how pip makes them."""

    dir: str | None = None  # null: in the user's cache folder
    # Further options of pip install: --no-index --find-links=DIR
    pip: str | None = field(default=None, metadata={"check": _words})


@dataclass(frozen=True)
class GraphConf:
    format: str = field(default="text", metadata=one_of("text", "dot", "mermaid", what="a graph format"))


@dataclass(frozen=True)
class Config:
    """All of it. ``targets`` is by name, in the order given; ``unchosen``, which is no key, names those that have
    settings and that nothing chose."""

    model: Model = Model()
    targets: dict[str, Target] = field(default_factory=dict)
    calibration: CalibrationConf = CalibrationConf()
    evaluation: EvaluationConf = EvaluationConf()
    budget: BudgetConf = BudgetConf()
    store: StoreConf = StoreConf()
    backend: BackendConf = BackendConf()
    graph: GraphConf = GraphConf()
    out: str | None = None  # null: outputs/<model name>
    device: str = field(default="auto", metadata=one_of("auto", "cpu", "cuda", what="a device"))
    format: str = field(default="text", metadata=one_of("text", "json", what="an output format"))
    keep_going: bool = False
    rebuild: bool = False
    offline: bool = False
    unchosen: tuple[str, ...] = field(default=(), metadata={"key": False})


# Target formats. A new format is a dataclass above and a row here.
FORMATS: dict[str, type[Target]] = {
    "gguf": GgufTarget,
    "fit": FitTarget,
    "imatrix": ImatrixTarget,
    "awq": AwqTarget,
    "gptq": GptqTarget,
    "ct": CtTarget,
}
CALIBRATED = (FitTarget, ImatrixTarget, DirectoryTarget)  # and GGUF files with imatrix: auto


def label(target: Target) -> str:
    """What tells a target's file name from its model's: ``suffix``, else its settings in short."""
    match target:
        case Target(suffix=str(given)):
            return given
        case GgufTarget():
            return f"{target.ftype}-pruned" if target.prune_layers else target.ftype
        case FitTarget():
            return f"FIT-{target.max_bpw:g}bpw" if target.max_bpw else f"FIT-{target.max_size}".replace(" ", "")
        case AwqTarget():
            return f"AWQ-w4-{_grouped(target.group_size)}{_made_by(target.backend)}"
        case GptqTarget():
            asymmetric = "" if target.symmetric else "-asym"
            return f"GPTQ-w{target.bits}-{_grouped(target.group_size)}{asymmetric}{_made_by(target.backend)}"
        case CtTarget():
            return f"CT-w{target.bits}a16-{_grouped(target.group_size)}{'' if target.symmetric else '-asym'}"
        case _:
            return target.format


def backend(target: Target) -> str:
    """What quantizes a target."""
    return target.backend if isinstance(target, AwqTarget | GptqTarget) else NATIVE


def _grouped(size: int) -> str:
    return "channel" if size == -1 else f"g{size}"


def _made_by(backend: str) -> str:
    return "" if backend == NATIVE else f"-{backend}"


def parse(data: Mapping[str, Any], known: Collection[str] = ()) -> Config:
    """The configuration a plain mapping holds (what OmegaConf.to_container gives). ``known``: names of targets that can
    be chosen. Settings of one that was not make no target; a name that is none of them may stand for one."""
    config = _parse(Config, {k: v for k, v in data.items() if k != "targets"}, "")
    targets = data.get("targets") or {}
    if not isinstance(targets, Mapping):
        raise ConfigError("targets", f"is {_shown(targets)}, not a mapping", "target=gguf/q4_k_m fills it")
    if config.store.limit is not None:
        parse_size(config.store.limit, "store.limit")
    unchosen = sorted(name for name, t in targets.items() if name in known and not _says_what_it_makes(t))
    chosen = {str(name): _target(str(name), t, known) for name, t in targets.items() if name not in unchosen}
    return dataclasses.replace(config, targets=chosen, unchosen=tuple(unchosen))


def _says_what_it_makes(target: Any) -> bool:
    """Whether settings are a target's: else they are of one that ``target=…`` has to choose."""
    return not isinstance(target, Mapping) or "ftype" in target or "format" in target


def _target(name: str, data: Any, known: Collection[str]) -> Target:
    place = f"targets.{name}"
    if not isinstance(data, Mapping):
        raise ConfigError(place, f"is {_shown(data)}, not a mapping", f"{place}: {{format: gguf, ftype: Q4_K_M}}")
    format_ = data.get("format", "gguf")
    if format_ not in FORMATS:
        raise ConfigError(f"{place}.format", f"{format_!r} is not a target format", close(str(format_), FORMATS))
    target = _parse(FORMATS[format_], data, place)
    if not _says_what_it_makes(data):
        near = [f"did you mean {' or '.join(found)}?"] if (found := nearest(name, known)) else []
        own = f"a target of your own says what it makes: {place}.ftype=Q4_K_M"
        raise ConfigError(place, "no target has this name", "\n".join([*near, own]))
    if isinstance(target, GgufTarget):
        _check_weights(target, place)
    if isinstance(target, FitTarget) and (target.max_size is None) == (target.max_bpw is None):
        given = "neither max_size nor max_bpw" if target.max_size is None else "both max_size and max_bpw"
        raise ConfigError(place, f"has {given}", f"give one of them: {place}.max_size=4.2GiB or {place}.max_bpw=4.5")
    return target


def _check_weights(target: GgufTarget, place: str) -> None:
    """Entries of an importance matrix are chosen in one way, and only where there is one."""
    if target.include_weights and target.exclude_weights:
        raise ConfigError(place, "has both include_weights and exclude_weights", "leave one of them out")
    given = next((name for name in ("include_weights", "exclude_weights") if getattr(target, name)), None)
    if given and target.imatrix is None:
        raise ConfigError(f"{place}.{given}", "there is no importance matrix to take from", f"{place}.imatrix=FILE")


def _parse(cls: type[T], data: Any, place: str) -> T:
    if not isinstance(data, Mapping):
        raise ConfigError(place, f"is {_shown(data)}, not a mapping", f"keys: {', '.join(keys(cls))}")
    hints = typing.get_type_hints(cls)
    values = {}
    for key, value in data.items():
        where = f"{place}.{key}" if place else str(key)
        if key not in keys(cls):
            raise ConfigError(where, "there is no such key", close(str(key), keys(cls)))
        if value is None and typing.get_origin(hints[key]) in (dict, tuple):
            continue  # OmegaConf holds an empty mapping as null: one that is there could not be replaced
        values[key] = _value(value, hints[key], where)
        for check in [f.metadata["check"] for f in dataclasses.fields(cls) if f.name == key and "check" in f.metadata]:  # type: ignore[arg-type]
            check(values[key], where)
    return cls(**values)


def keys(cls: type) -> list[str]:
    return [f.name for f in dataclasses.fields(cls) if f.metadata.get("key", True)]


def sections() -> dict[str, type]:
    """The keys of Config that hold keys themselves, with their dataclasses."""
    hints: dict[str, type] = typing.get_type_hints(Config)
    return {name: hint for name, hint in hints.items() if dataclasses.is_dataclass(hint)}


def _value(value: Any, hint: Any, place: str) -> Any:
    if dataclasses.is_dataclass(hint):
        return _parse(typing.cast(type, hint), value, place)
    allowed = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    plain = tuple(typing.get_origin(a) or a for a in allowed)
    if plain == (tuple,) and isinstance(value, (list, tuple)):
        return tuple(_value(item, typing.get_args(hint)[0], f"{place}[{n}]") for n, item in enumerate(value))
    if float in plain and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if isinstance(value, plain) and (bool in plain or not isinstance(value, bool)):
        return dict(value) if isinstance(value, Mapping) else value
    names = " or ".join("null" if p is types.NoneType else _KINDS[p] for p in plain)
    raise ConfigError(place, f"is {_shown(value)}, which is not {names}", _EXAMPLES.get(plain[0], ""))


_KINDS = {
    str: "text",
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    dict: "a mapping",
    tuple: "a list",
}
_EXAMPLES = {
    bool: "write true or false",
    int: "write a whole number: 8",
    float: "write a number: 0.1",
    str: "quote it if it must be text",
    tuple: "write a list: [1, 2]",
}


def _shown(value: Any) -> str:
    return "null" if value is None else repr(value)
