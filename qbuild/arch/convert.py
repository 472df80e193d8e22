"""HF checkpoint → GGUF tensors: names, shapes, sources and the type the converter stores. Headers and config only."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np

from qbuild.arch.families import FAMILIES, Family
from qbuild.checkpoint import Checkpoint, SourceTensor
from qbuild.errors import ConfigError, InputError
from qbuild.gguffile import decode_kv

OUTTYPES = ("auto", "F32", "F16", "BF16")


@dataclass(frozen=True)
class Piece:
    """Rows ``start`` to ``stop`` (None: to the end) of a source tensor seen as [rows, last dimension]."""

    source: str
    start: int = 0
    stop: int | None = None


@dataclass(frozen=True)
class Transform:
    """``none``, or ``permute``: the rows of each head interleaved halves → pairs (undoes what HF did to q and k)."""

    kind: str = "none"
    unit: int = 1  # rows of one head

    def apply(self, chunk: np.ndarray) -> np.ndarray:
        """Transform whole units of rows; ``chunk`` is [rows, cols]."""
        if self.kind != "permute":
            return chunk
        if chunk.shape[0] == 1:  # a bias: its elements are its rows
            return self.apply(chunk.reshape(-1, 1)).reshape(1, -1)
        rows, cols = chunk.shape
        pairs = chunk.reshape(rows // self.unit, 2, self.unit // 2, cols).swapaxes(1, 2)
        return np.ascontiguousarray(pairs).reshape(rows, cols)


@dataclass(frozen=True)
class TensorSpec:
    name: str
    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]
    transform: Transform
    stored: str
    data: bytes | None = None

    @property
    def weights(self) -> int:
        return prod(self.shape)


@dataclass(frozen=True)
class ModelFacts:
    arch: str
    n_layer: int
    n_head: int
    n_head_kv: int
    n_expert: int
    is_70b: bool
    parameters: int


def family(config: Mapping[str, Any], place: str) -> Family:
    """The row for a configuration's architecture. Unknown: InputError that names the nearest."""
    names = config.get("architectures") or []
    for name in names:
        if name in FAMILIES:
            return FAMILIES[name]
    wanted = names[0] if names else str(config.get("model_type", "nothing named"))
    near = difflib.get_close_matches(wanted, FAMILIES, 1, 0.3)
    remedy = (f"nearest: {near[0]}; " if near else "") + "known: " + ", ".join(FAMILIES)
    raise InputError(place, f"architecture {wanted} is not supported", remedy)


def hparam(config: Mapping[str, Any], name: str, default: Any = None) -> Any:
    value = config.get(name)
    return default if value is None else value


def heads(config: Mapping[str, Any]) -> tuple[int, int, int]:
    """(query heads, key-value heads, head dimension)."""
    n_head = config["num_attention_heads"]
    n_kv = hparam(config, "num_key_value_heads", n_head)
    return n_head, n_kv, hparam(config, "head_dim", config["hidden_size"] // n_head)


def tensor_specs(checkpoint: Checkpoint, outtype: str = "auto") -> list[TensorSpec]:
    """Every tensor of the converter's file, in its order."""
    if checkpoint.kind == "gguf":
        return [
            TensorSpec(t.name, t.shape, (Piece(t.name),), Transform(), t.dtype) for t in checkpoint.tensors.values()
        ]
    rules, config = family(checkpoint.config, checkpoint.source), checkpoint.config
    matrix = _matrix_type(checkpoint, outtype)
    specs = [*_rope_factors(config)]
    for source in checkpoint.tensors.values():
        if source.name.endswith((".attention.masked_bias", ".attention.bias", ".rotary_emb.inv_freq")):
            continue
        name = _gguf_name(rules, source, checkpoint.source)
        stored = (
            "F32" if len(source.shape) < 2 or name.endswith("_norm.weight") or not name.endswith("weight") else matrix
        )
        specs.append(
            TensorSpec(name, source.shape, (Piece(source.name),), _transform(rules, source.name, config), stored)
        )
    _check_complete(checkpoint)
    return specs


def _gguf_name(rules: Family, source: SourceTensor, place: str) -> str:
    if source.name in rules.outer:
        return rules.outer[source.name]
    match = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", source.name)
    if match and match[2] in rules.layer:
        return f"blk.{match[1]}.{rules.layer[match[2]]}"
    raise InputError(
        place, f"tensor {source.name} does not belong to {rules.arch}", "check config.json's architectures"
    )


def _transform(rules: Family, name: str, config: Mapping[str, Any]) -> Transform:
    if not any(f".{part}." in name for part in rules.permuted):
        return Transform()
    _, _, head_dim = heads(config)
    return Transform("permute", head_dim)


def _matrix_type(checkpoint: Checkpoint, outtype: str) -> str:
    """The converter's --outtype: auto is the type of the first matrix if that is bf16 or f16, else f16."""
    if outtype not in OUTTYPES:
        raise ConfigError("model.outtype", f"{outtype!r} is not a type", "one of: " + ", ".join(OUTTYPES))
    if outtype != "auto":
        return outtype
    first = next((t.dtype for t in checkpoint.tensors.values() if len(t.shape) >= 2), "F16")
    return first if first in ("BF16", "F16") else "F16"


def _rope_factors(config: Mapping[str, Any]) -> list[TensorSpec]:
    """Llama 3's frequency factors, in float32 as PyTorch computes them (rope_freqs.weight)."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if (rope.get("rope_type") or rope.get("type")) != "llama3":
        return []
    _, _, dim = heads(config)
    base = rope.get("rope_theta") or hparam(config, "rope_theta", 10000.0)
    # PyTorch's float32 power is the rounded exact one here; NumPy's is not, in one value of five.
    exponents = (np.arange(0, dim, 2, dtype=np.float32) / np.float32(dim)).astype(np.float64)
    f32 = np.float32
    freqs = f32(1) / np.power(np.float64(base), exponents).astype(np.float32)
    factor, low, high = rope.get("factor", 8.0), rope.get("low_freq_factor", 1.0), rope.get("high_freq_factor", 4.0)
    old = rope.get("original_max_position_embeddings", 8192)
    factors = []
    for freq in freqs:
        wavelen = f32(1) / freq * f32(2 * np.pi)  # PyTorch divides a number by a tensor that way: two roundings
        if wavelen < old / high:
            factors.append(1.0)
        elif wavelen > old / low:
            factors.append(factor)
        else:
            smooth = (f32(1) / wavelen * f32(old) - f32(low)) / f32(high - low)
            factors.append(f32(1) / ((f32(1) - smooth) / f32(factor) + smooth))
    data = np.array(factors, np.float32).tobytes()
    return [TensorSpec("rope_freqs.weight", (len(factors),), (), Transform(), "F32", data)]


def expected_tensors(config: Mapping[str, Any]) -> list[tuple[str, tuple[int, ...]]]:
    """HF names and shapes that a configuration implies, in the order of a checkpoint's files."""
    family(config, "model.config")
    hidden, ff, vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    n_head, n_kv, dim = heads(config)
    found: list[tuple[str, tuple[int, ...]]] = [
        ("model.embed_tokens.weight", (vocab, hidden)),
        ("model.norm.weight", (hidden,)),
    ]
    if not config.get("tie_word_embeddings"):
        found.append(("lm_head.weight", (vocab, hidden)))
    for i in range(config["num_hidden_layers"]):
        at = f"model.layers.{i}."
        found += [(at + "input_layernorm.weight", (hidden,)), (at + "post_attention_layernorm.weight", (hidden,))]
        found += [(at + f"mlp.{n}_proj.weight", (ff, hidden)) for n in ("gate", "up")]
        found.append((at + "mlp.down_proj.weight", (hidden, ff)))
        rows = {"q": n_head * dim, "k": n_kv * dim, "v": n_kv * dim}
        found += [(at + f"self_attn.{n}_proj.weight", (r, hidden)) for n, r in rows.items()]
        found.append((at + "self_attn.o_proj.weight", (hidden, n_head * dim)))
        if config.get("attention_bias"):
            found += [(at + f"self_attn.{n}_proj.bias", (r,)) for n, r in rows.items()]
            found.append((at + "self_attn.o_proj.bias", (hidden,)))
    return sorted(found)


def _check_complete(checkpoint: Checkpoint) -> None:
    for name, shape in expected_tensors(checkpoint.config):
        found = checkpoint.tensors.get(name)
        if found is None:
            raise InputError(
                checkpoint.source, f"tensor {name} is missing", "the checkpoint is incomplete: fetch it again"
            )
        if found.shape != shape:
            fact = f"tensor {name} has shape {list(found.shape)}, the config says {list(shape)}"
            raise InputError(checkpoint.source, fact, "config.json and weights do not belong together")


def model_facts(checkpoint: Checkpoint) -> ModelFacts:
    parameters = sum(prod(t.shape) for t in checkpoint.tensors.values())
    if checkpoint.kind == "gguf":
        kvs = {kv.key: kv for kv in checkpoint.kvs}
        arch = decode_kv(kvs["general.architecture"])

        def read(name: str, default: int) -> int:
            kv = kvs.get(f"{arch}.{name}")
            value = default if kv is None else decode_kv(kv)
            return value[0] if isinstance(value, list) else value

        n_head = read("attention.head_count", 1)
        n_kv = read("attention.head_count_kv", n_head)
        n_layer, n_expert = read("block_count", 0), read("expert_count", 0)
    else:
        arch = family(checkpoint.config, checkpoint.source).arch
        n_head, n_kv, _ = heads(checkpoint.config)
        n_layer, n_expert = checkpoint.config["num_hidden_layers"], 0
    is_70b = arch == "llama" and n_layer == 80 and n_head != n_kv
    return ModelFacts(arch, n_layer, n_head, n_kv, n_expert, is_70b, parameters)
