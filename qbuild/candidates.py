"""Which types a tensor of a fitted file can get: a function of shapes and of the settings of the target."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from qbuild import schema
from qbuild.arch import mix
from qbuild.arch.convert import ModelFacts, TensorSpec
from qbuild.budget import parse_size
from qbuild.errors import ConfigError
from qbuild.ggml import QTYPES

__all__ = ["Knows", "limit", "offers"]

USUAL = ("Q2_K", "Q3_K", "IQ4_XS", "Q4_K", "Q5_K", "Q6_K", "Q8_0")  # quick on every CPU
LOW = ("IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S")  # slower to run, and to make
LOW_BITS = 3.5  # bits a weight below which they are worth it

Knows = Callable[[TensorSpec], bool]


def limit(target: schema.FitTarget, weights: int, place: str) -> int:
    """Bytes that the file may have."""
    if target.max_bpw is not None:
        return int(target.max_bpw * weights / 8)
    return parse_size(str(target.max_size), f"{place}.max_size")


def offers(
    specs: Sequence[TensorSpec], facts: ModelFacts, target: schema.FitTarget, place: str, *, measured: Knows,
    weighed: Knows,
) -> list[tuple[TensorSpec, tuple[str, ...]]]:  # fmt: skip
    """Every tensor with its types, in file order. ``measured``: whether damage to it can be told; ``weighed``: whether
    an importance matrix has an entry for it."""
    wanted = _wanted(target, sum(spec.weights for spec in specs), place)
    found = []
    for spec in mix.order(specs):
        if not mix.quantizable(spec, facts):
            types: tuple[str, ...] = (spec.stored,)
        elif not measured(spec):
            types = (_fitting(spec, "Q8_0"),)
        else:
            usable = [t for t in wanted if t not in mix.NEED_IMATRIX or weighed(spec)]
            types = tuple(dict.fromkeys(_fitting(spec, type_) for type_ in usable or ["Q8_0"]))
        found.append((spec, types))
    return found


def _wanted(target: schema.FitTarget, weights: int, place: str) -> list[str]:
    if target.types:
        bare = [t for t in target.types if t in mix.NEED_IMATRIX] if target.imatrix is None else []
        if bare:
            remedy = f"{place}.imatrix=auto makes one by calibration; or {place}.imatrix=FILE"
            raise ConfigError(f"{place}.types", f"{bare[0]} needs an importance matrix", remedy)
        return list(target.types)
    low = target.imatrix is not None and 8 * limit(target, weights, place) < LOW_BITS * weights
    return [*(LOW if low else ()), *USUAL]


def _fitting(spec: TensorSpec, type_: str) -> str:
    """The type, or what llama-quantize puts in its place where its blocks do not fill the rows."""
    cols = spec.shape[-1]
    for found in (type_, mix.FALLBACK.get(type_, "F16")):
        if cols % QTYPES[found].block == 0:
            return found
    return "F16"
