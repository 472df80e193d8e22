"""AWQ's groups of linears as data: which read one input, and what can take over the scale of their columns.

A scale on the columns of linears is undone where their input is made: in a norm's weights, or in the rows of a linear
before them. That is right only if nothing else reads that input, so a family is scaled only if it stands here; the
linears of others are quantized without a scale.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

__all__ = ["Group", "groups"]


@dataclass(frozen=True)
class Group:
    """``linears`` read one input, which ``producer`` makes: a norm (kind ``norm``, or ``norm+1`` where it multiplies by
    one plus its weight), or rows of a linear from ``rows`` on (kind ``linear``); None: nothing can take a scale.

    ``also`` read the input too and stay plain: a router. ``repeats``: heads of the input per head of the producer, in
    grouped-query attention, and ``head`` their width. Names are those of the checkpoint, without .weight.
    """

    linears: tuple[str, ...]
    producer: str | None
    kind: str
    rows: int = 0
    repeats: int = 1
    head: int = 0
    also: tuple[str, ...] = ()


@dataclass(frozen=True)
class Rule:
    """``readers`` of what ``producer`` makes, by their names in a layer; ``*``: of each expert.

    ``part`` says which rows of a fused producer: ``value`` of queries, keys and values, or ``up``, the second half.
    """

    readers: tuple[str, ...]
    producer: str
    part: str = ""


def _attention(norm: str) -> tuple[Rule, ...]:
    values = Rule(("self_attn.o_proj",), "self_attn.v_proj", "value")
    return Rule(("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), norm), values


def _gated(norm: str) -> tuple[Rule, ...]:
    return Rule(("mlp.gate_proj", "mlp.up_proj"), norm), Rule(("mlp.down_proj",), "mlp.up_proj")


FIRST, SECOND = "input_layernorm", "post_attention_layernorm"
EXPERTS = (
    Rule(
        ("mlp.gate_proj", "mlp.up_proj", "mlp.experts.*.gate_proj", "mlp.experts.*.up_proj", "mlp.gate",
         "mlp.shared_expert.gate_proj", "mlp.shared_expert.up_proj", "mlp.shared_expert_gate"),
        SECOND,
    ),
    Rule(("mlp.down_proj",), "mlp.up_proj"),
    Rule(("mlp.experts.*.down_proj",), "mlp.experts.*.up_proj"),
    Rule(("mlp.shared_expert.down_proj",), "mlp.shared_expert.up_proj"),
)  # fmt: skip
MIXTRAL = (
    Rule(("block_sparse_moe.gate", "block_sparse_moe.experts.*.w1", "block_sparse_moe.experts.*.w3"), SECOND),
    Rule(("block_sparse_moe.experts.*.w2",), "block_sparse_moe.experts.*.w3"),
)
FUSED = (
    Rule(("self_attn.qkv_proj",), FIRST),
    Rule(("self_attn.o_proj",), "self_attn.qkv_proj", "value"),
    Rule(("mlp.gate_up_proj",), SECOND),
    Rule(("mlp.down_proj",), "mlp.gate_up_proj", "up"),
)
NEOX = (Rule(("attention.query_key_value",), FIRST), Rule(("mlp.dense_h_to_4h",), SECOND))

LLAMA = _attention(FIRST) + _gated(SECOND)
GEMMA2 = _attention(FIRST) + _gated("pre_feedforward_layernorm")
RULES: dict[str, tuple[Rule, ...]] = {
    **dict.fromkeys(("llama", "mistral", "ministral", "qwen2", "qwen3", "granite", "smollm3", "gemma"), LLAMA),
    **dict.fromkeys(("qwen2_vl", "qwen2_vl_text", "qwen2_5_vl", "qwen2_5_vl_text", "qwen3_vl_text"), LLAMA),
    **dict.fromkeys(("stablelm", "seed_oss"), LLAMA),
    **dict.fromkeys(("gemma2", "gemma3", "gemma3_text"), GEMMA2),
    # Their norms stand behind attention and feed-forward and make no input: there is no such tensor as these two name.
    **dict.fromkeys(("olmo2", "olmo3"), _attention(FIRST) + _gated("pre_feedforward_layernorm")),
    **dict.fromkeys(("qwen2_moe", "qwen3_moe", "olmoe"), _attention(FIRST) + EXPERTS),
    "mixtral": _attention(FIRST) + MIXTRAL,
    "starcoder2": (*_attention(FIRST), Rule(("mlp.c_fc",), SECOND)),
    "arcee": (*_attention(FIRST), Rule(("mlp.up_proj",), SECOND)),
    "phi3": FUSED,
    "gpt_neox": NEOX,
}
ONE_PLUS = frozenset(("gemma", "gemma2", "gemma3", "gemma3_text"))


def groups(config: Mapping[str, Any], prefix: str, names: Iterable[str], quantized: Iterable[str]) -> tuple[Group, ...]:
    """The groups of one layer. ``prefix``: ``model.layers.3.``; ``names``: the checkpoint tensors of the layer;
    ``quantized``: its linears that will be, without .weight; each of them is in one group."""
    text = config.get("text_config") or config
    present, wanted = frozenset(names), sorted(quantized)
    found: list[Group] = []
    for rule in () if _one_norm_for_both(text) else RULES.get(str(text.get("model_type", "")), ()):
        found += _applied(rule, text, prefix, present, frozenset(wanted))
    seen = {name for group in found for name in group.linears}
    rest = tuple(Group((name,), None, "norm") for name in wanted if name not in seen)
    return (*found, *rest)


def _one_norm_for_both(text: Mapping[str, Any]) -> bool:
    """StableLM's parallel form: attention and feed-forward read one input. GPT-NeoX's has a norm for each."""
    return bool(text.get("use_parallel_residual")) and text.get("model_type") == "stablelm"


def _applied(
    rule: Rule, text: Mapping[str, Any], prefix: str, present: frozenset[str], quantized: frozenset[str]
) -> list[Group]:
    """The groups that a rule makes of what is present: one, or one for each expert where its producer has a number."""
    pattern = "|".join(re.escape(reader).replace(r"\*", r"(?:\d+)") for reader in rule.readers)
    whole = re.compile(rf"{re.escape(prefix)}(?:{pattern})\.weight")
    readers: dict[str, list[str]] = {}
    for name in sorted(present):
        if whole.fullmatch(name):
            number = re.search(r"\.experts\.(\d+)\.", name)
            producer = rule.producer.replace("*", number[1] if number else "*")
            readers.setdefault(f"{prefix}{producer}", []).append(name.removesuffix(".weight"))
    made = []
    for producer, linears in readers.items():
        own = tuple(name for name in linears if name in quantized)
        also = tuple(name for name in linears if name not in quantized)
        if own and f"{producer}.weight" in present:
            made.append(_group(rule, own, also, producer, text))
    return made


def _group(
    rule: Rule, linears: tuple[str, ...], also: tuple[str, ...], producer: str, text: Mapping[str, Any]
) -> Group:
    if "norm" in rule.producer:
        kind = "norm+1" if text.get("model_type") in ONE_PLUS else "norm"
        return Group(linears, producer, kind, also=also)
    if rule.part == "up":
        return Group(linears, producer, "linear", int(text["intermediate_size"]), also=also)
    if rule.part != "value":
        return Group(linears, producer, "linear", also=also)
    heads, kv = int(text["num_attention_heads"]), int(text.get("num_key_value_heads") or text["num_attention_heads"])
    head = int(text.get("head_dim") or text["hidden_size"] // heads)
    first = (heads + kv) * head if producer.endswith("qkv_proj") else 0
    return Group(linears, producer, "linear", first, heads // kv, head, also)
