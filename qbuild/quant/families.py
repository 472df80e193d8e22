"""AWQ's groups of linears as data: which share an input, and what can take over the scale of their columns.

A scale on the columns of linears is undone where their input is made: in a norm's weights, or in the rows of a linear
before them. Families differ in names; where a pattern does not fit, its linears are quantized without a scale.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

__all__ = ["Group", "groups"]

# (parent, linears that share an input, what makes it): names inside a decoder layer, {e} is an expert's number.
PATTERNS: tuple[tuple[str, tuple[str, ...], str], ...] = (
    ("", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), "input_layernorm"),
    ("", ("self_attn.qkv_proj",), "input_layernorm"),
    ("", ("self_attn.o_proj",), "self_attn.v_proj"),
    ("", ("mlp.gate_proj", "mlp.up_proj"), "post_attention_layernorm"),
    ("", ("mlp.gate_up_proj",), "post_attention_layernorm"),
    ("", ("mlp.down_proj",), "mlp.up_proj"),
    ("", ("mlp.c_fc",), "post_attention_layernorm"),
    ("", ("attention.query_key_value",), "input_layernorm"),
    ("", ("mlp.dense_h_to_4h",), "post_attention_layernorm"),
)
"""Norms by the kind of model. Gemma's norms multiply by 1 + w and it has one more before the feed-forward; OLMo 2 has
norms behind its linears only, so nothing can take over a scale there."""
PRE_FEEDFORWARD = frozenset(("gemma2", "gemma3", "gemma3_text"))
ONE_PLUS = frozenset(("gemma", "gemma2", "gemma3", "gemma3_text"))
POST_NORM = frozenset(("olmo2", "olmo3"))
PARALLEL = frozenset(("gpt_neox",))  # both halves may read one residual: their norms are their own, and stay right
EXPERT = re.compile(r"\.experts\.\d+\.")


@dataclass(frozen=True)
class Group:
    """``linears`` read one input, which ``producer`` makes: a norm (kind ``norm``, or ``norm+1`` where it multiplies by
    one plus its weight), or the rows of a linear (kind ``linear``); None: nothing can take a scale.

    ``repeats``: heads of the input per head of the producer, in grouped-query attention. Names are those of the
    checkpoint, without .weight.
    """

    linears: tuple[str, ...]
    producer: str | None
    kind: str
    repeats: int = 1
    head: int = 0  # width of a head, where ``repeats`` is not 1


def groups(config: Mapping[str, Any], prefix: str, names: Iterable[str]) -> tuple[Group, ...]:
    """The groups of one layer. ``prefix``: ``model.layers.3.``; ``names``: the checkpoint tensors of the layer."""
    text = config.get("text_config") or config
    family, present = str(text.get("model_type", "")), frozenset(names)
    linears = {n.removesuffix(".weight") for n in present if n.endswith(".weight") and "norm" not in n}
    found: list[Group] = []
    seen: set[str] = set()
    for _, members, producer in PATTERNS:
        inside = tuple(f"{prefix}{m}" for m in members if f"{prefix}{m}" in linears)
        if inside and len(inside) == len(members):
            found.append(_group(inside, producer, family, text, prefix, present))
            seen.update(inside)
    found += [Group((name,), None, "norm") for name in sorted(linears - seen)]
    return tuple(found)


def _group(
    linears: tuple[str, ...], producer: str, family: str, text: Mapping[str, Any], prefix: str, present: frozenset[str]
) -> Group:
    if "norm" in producer:
        if producer.startswith("post_attention") and family in PRE_FEEDFORWARD:
            producer = "pre_feedforward_layernorm"
        if family in POST_NORM or f"{prefix}{producer}.weight" not in present:
            return Group(linears, None, "norm")
        return Group(linears, f"{prefix}{producer}", "norm+1" if family in ONE_PLUS else "norm")
    if f"{prefix}{producer}.weight" not in present:
        return Group(linears, None, "linear")
    if not producer.endswith("v_proj"):
        return Group(linears, f"{prefix}{producer}", "linear")
    heads, kv = int(text["num_attention_heads"]), int(text.get("num_key_value_heads") or text["num_attention_heads"])
    head = int(text.get("head_dim") or text["hidden_size"] // heads)
    return Group(linears, f"{prefix}{producer}", "linear", heads // kv, head)
