"""Layouts of quantized linears: names, dtypes and shapes of every stored tensor, and what today's loaders read.

A planner asks here before a weight is read, so there is no torch and no numpy. Layouts: ``awq-gemm`` (AutoAWQ's
``WQLinear_GEMM``), ``gptq`` and ``gptq_v2`` (AutoGPTQ's ``QuantLinear`` and GPTQModel's; v1 stores zero points minus
one), ``pack-quantized`` (compressed-tensors).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, NamedTuple

from qbuild.errors import InputError

__all__ = [
    "ITEM_SIZES",
    "LAYOUTS",
    "LOADERS",
    "Loader",
    "Scheme",
    "Stored",
    "groups",
    "packed",
    "quantization_config",
    "refusal",
    "rejections",
    "scheme_of",
    "words",
]

LAYOUTS = ("awq-gemm", "gptq", "gptq_v2", "pack-quantized")
ITEM_SIZES = {"I64": 8, "F32": 4, "I32": 4, "F16": 2, "BF16": 2}
WORD = 32


@dataclass(frozen=True)
class Scheme:
    """How linears are stored. ``group_size``: columns that share a scale, -1 for a whole row.

    ``indexed``: columns belong to groups by an index instead of in order (GPTQ's desc_act without static groups).
    ``dtype``: safetensors name of the dtype of what is not quantized, and of compressed-tensors' scales.
    """

    layout: str
    bits: int
    group_size: int
    symmetric: bool
    indexed: bool = False
    dtype: str = "F16"


class Stored(NamedTuple):
    """A tensor of a safetensors file."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * ITEM_SIZES[self.dtype]


def groups(scheme: Scheme, columns: int) -> int:
    """Groups of a row of ``columns`` weights."""
    return 1 if scheme.group_size == -1 else columns // scheme.group_size


def packed(scheme: Scheme, linear: str, rows: int, columns: int) -> tuple[Stored, ...]:
    """The tensors that stand for ``linear.weight`` [rows (out), columns (in)]; its bias is a plain tensor."""
    many = groups(scheme, columns)
    rows_packed, columns_packed = words(rows, scheme.bits), words(columns, scheme.bits)
    if scheme.layout == "pack-quantized":
        found = (
            Stored(f"{linear}.weight_packed", "I32", (rows, columns_packed)),
            Stored(f"{linear}.weight_scale", scheme.dtype, (rows, many)),
            Stored(f"{linear}.weight_shape", "I64", (2,)),
        )
        zeros = Stored(f"{linear}.weight_zero_point", "I32", (rows_packed, many))
        return found if scheme.symmetric else (*found, zeros)
    awq = scheme.layout == "awq-gemm"
    found = (
        Stored(f"{linear}.qweight", "I32", (columns, rows_packed) if awq else (columns_packed, rows)),
        Stored(f"{linear}.qzeros", "I32", (many, rows_packed)),
        Stored(f"{linear}.scales", "F16", (many, rows)),
    )
    return found if awq else (*found, Stored(f"{linear}.g_idx", "I32", (columns,)))


def words(codes: int, bits: int) -> int:
    """Words of 32 bits that hold ``codes`` side by side; 3-bit codes run over from one word into the next."""
    return -(-codes * bits // WORD)


# what loaders read ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Loader:
    """What a loader accepts of a layout."""

    name: str
    layouts: tuple[str, ...]
    kinds: frozenset[tuple[int, bool]]  # bits, symmetric
    group_sizes: frozenset[int] | None = None  # None: any
    experts: bool = True


def _kinds(*bits: int, asymmetric: bool = True) -> frozenset[tuple[int, bool]]:
    return frozenset((b, s) for b in bits for s in ((True, False) if asymmetric else (True,)))


GPTQ_BITS, GPTQ_GROUPS = (2, 3, 4, 8), frozenset({-1, 16, 32, 64, 128, 256, 512, 1024})
AWQ_GROUPS, MARLIN_GROUPS = frozenset({-1, 16, 32, 64, 128}), frozenset({-1, 32, 64, 128})

# GPTQModel 7.7: SUPPORTS_* of qlinear/torch.py, torch_awq.py. It adds one to whole words of v1's zero points, and one
# that wraps spoils its neighbours, so it refuses v1 that is not symmetric. transformers 5.23 reads AWQ and GPTQ through
# it, but stacks experts and so finds no place for quantized ones: they stay random, with a warning. It reads
# pack-quantized through compressed-tensors 0.20, which expects zero points unpacked (llm-compressor#1618), so that
# asymmetric ones need CompressedTensorsConfig(dequantize=True). vLLM: auto_awq.py, auto_gptq.py (TYPE_MAP; zero points
# are not read), compressed_tensors_wNa16.py, whose Marlin kernel has zero points for 4 bits only.
LOADERS = (
    Loader("GPTQModel", ("awq-gemm",), _kinds(4), AWQ_GROUPS),
    Loader("GPTQModel", ("gptq",), _kinds(*GPTQ_BITS, asymmetric=False), GPTQ_GROUPS),
    Loader("GPTQModel", ("gptq_v2",), _kinds(*GPTQ_BITS), GPTQ_GROUPS),
    Loader("transformers", ("awq-gemm",), _kinds(4), AWQ_GROUPS, experts=False),
    Loader("transformers", ("gptq",), _kinds(*GPTQ_BITS, asymmetric=False), GPTQ_GROUPS, experts=False),
    Loader("transformers", ("gptq_v2",), _kinds(*GPTQ_BITS), GPTQ_GROUPS, experts=False),
    Loader("transformers", ("pack-quantized",), _kinds(2, 3, 4, 5, 6, 7, 8, asymmetric=False)),
    Loader("vLLM", ("awq-gemm",), _kinds(4)),
    Loader("vLLM", ("gptq", "gptq_v2"), _kinds(4, 8, asymmetric=False), MARLIN_GROUPS),
    Loader("vLLM", ("pack-quantized",), _kinds(4) | _kinds(8, asymmetric=False), MARLIN_GROUPS),
)


def rejections(scheme: Scheme, linears: Iterable[str]) -> dict[str, str]:
    """Loaders that do not read such a checkpoint, and why, by the name of the loader; ``linears`` are the quantized."""
    kind = f"{scheme.bits} bits, {'symmetric' if scheme.symmetric else 'asymmetric'}"
    experts = any(".experts." in name for name in linears)
    found = {}
    for loader in _loaders(scheme):
        if (scheme.bits, scheme.symmetric) not in loader.kinds:
            found[loader.name] = f"does not read {scheme.layout} of {kind}"
        elif loader.group_sizes is not None and scheme.group_size not in loader.group_sizes:
            sizes = ", ".join(map(str, sorted(loader.group_sizes)))
            found[loader.name] = f"reads {scheme.layout} in groups of {sizes}, not {scheme.group_size}"
        elif experts and not loader.experts:
            found[loader.name] = f"does not read experts of {scheme.layout}"
    return found


def _loaders(scheme: Scheme) -> list[Loader]:
    return [loader for loader in LOADERS if scheme.layout in loader.layouts]


def refusal(scheme: Scheme, shapes: Mapping[str, tuple[int, int]]) -> str | None:
    """Why no loader reads such a checkpoint, or None; ``shapes`` holds [out, in] of each linear by name."""
    if scheme.layout not in LAYOUTS:
        return f"there is no layout {scheme.layout!r}; layouts: {', '.join(LAYOUTS)}"
    if scheme.indexed and not scheme.layout.startswith("gptq"):
        return f"{scheme.layout} holds no index of groups, which this order of columns needs"
    rejected = rejections(scheme, shapes)
    if len(rejected) == len(_loaders(scheme)):
        return "; ".join(f"{name} {why}" for name, why in rejected.items())
    misfits = (_misfit(scheme, *shape) for shape in shapes.values())
    return next((f"{name} {why}" for name, why in zip(shapes, misfits, strict=True) if why), None)


def _misfit(scheme: Scheme, rows: int, columns: int) -> str | None:
    if scheme.group_size != -1 and columns % scheme.group_size:
        return f"has {columns} columns, no multiple of the group size {scheme.group_size}"
    lane = WORD // scheme.bits if WORD % scheme.bits == 0 else WORD  # codes that fill whole words
    by_rows = scheme.layout != "pack-quantized" or not scheme.symmetric
    if (by_rows and rows % lane) or (scheme.layout != "awq-gemm" and columns % lane):
        return f"is [{rows}, {columns}]: packed dimensions must be multiples of {lane}"
    return None


# quantization_config of config.json ----------------------------------------------------------------------------------


def quantization_config(scheme: Scheme, skipped: Sequence[str], quantizer: str = "qbuild") -> dict[str, Any]:
    """What loaders look for in ``config.json``; ``skipped``: linears that stay as they are, by full name;
    ``quantizer``: noted in GPTQ's layouts.

    The head is never quantized. Full names matter: loaders match parts of names, and ``gate`` is in ``gate_proj``.
    """
    kept = ["lm_head", *(name for name in skipped if name != "lm_head")]
    if scheme.layout == "pack-quantized":
        return _compressed_tensors(scheme, kept)
    shared = {"bits": scheme.bits, "group_size": scheme.group_size}
    if scheme.layout == "awq-gemm":
        extra = {"zero_point": True, "version": "gemm", "modules_to_not_convert": kept}
        return {"quant_method": "awq", **shared, **extra}
    return {
        "quant_method": "gptq", **shared, "desc_act": scheme.indexed, "sym": scheme.symmetric, "lm_head": False,
        "checkpoint_format": scheme.layout, "pack_dtype": "int32", "static_groups": False, "true_sequential": False,
        "dynamic": {f"-:^{re.escape(name)}$": {} for name in kept[1:]},
        "meta": {"quantizer": [quantizer]},
    }  # fmt: skip


def _compressed_tensors(scheme: Scheme, ignored: list[str]) -> dict[str, Any]:
    grouped = scheme.group_size != -1
    weights = {
        "num_bits": scheme.bits, "type": "int", "symmetric": scheme.symmetric, "dynamic": False, "actorder": None,
        "strategy": "group" if grouped else "channel", "group_size": scheme.group_size if grouped else None,
    }  # fmt: skip
    return {
        "quant_method": "compressed-tensors", "format": "pack-quantized", "quantization_status": "compressed",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights, "input_activations": None}},
        "ignore": ignored, "kv_cache_scheme": None, "global_compression_ratio": None,
    }  # fmt: skip


def scheme_of(config: Mapping[str, Any], dtype: str, place: str) -> Scheme:
    """The scheme that a ``quantization_config`` describes, ours or another program's: the way back.

    ``dtype`` is that of the plain tensors, a safetensors name. InputError, which names ``place``, for anything else.
    """
    method = config.get("quant_method")
    try:
        if method == "awq" and str(config.get("version", "gemm")).lower() == "gemm":
            return Scheme("awq-gemm", config["bits"], config["group_size"], False, dtype=dtype)
        layout = config.get("checkpoint_format", config.get("format", "gptq"))
        if method == "gptq" and layout in ("gptq", "gptq_v2"):
            kind = config["bits"], config["group_size"], config["sym"], config["desc_act"]
            return Scheme(layout, *kind, dtype=dtype)
        if method == "compressed-tensors" and config.get("format") == "pack-quantized":
            (group,) = config["config_groups"].values()
            weights = group["weights"]
            if weights.get("actorder") in ("group", "dynamic"):  # deprecated there; columns have an index of groups
                raise ValueError
            return Scheme(
                "pack-quantized",
                weights["num_bits"],
                weights.get("group_size") or -1,
                weights["symmetric"],
                dtype=dtype,
            )
    except (KeyError, TypeError, ValueError, AttributeError):
        fact = f"its quantization_config of {method} is not complete, or of several kinds of linears"
        raise InputError(place, fact, "give a checkpoint of one kind of linears") from None
    fact = f"is quantized by {method!r} in a layout that is not known here"
    raise InputError(place, fact, f"layouts: {', '.join(LAYOUTS)}")
