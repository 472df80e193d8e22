"""Model families, as rows of data: how HF names, shapes and configs become GGUF ones."""

from __future__ import annotations

from dataclasses import dataclass

LAYER_NORMS = {"input_layernorm.weight": "attn_norm.weight", "post_attention_layernorm.weight": "ffn_norm.weight"}
ATTENTION = {
    f"self_attn.{hf}_proj.{part}": f"{gguf}.{part}"
    for hf, gguf in (("q", "attn_q"), ("k", "attn_k"), ("v", "attn_v"), ("o", "attn_output"))
    for part in ("weight", "bias")
}
MLP = {f"mlp.{hf}_proj.{part}": f"ffn_{hf}.{part}" for hf in ("gate", "up", "down") for part in ("weight", "bias")}
OUTER = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}


@dataclass(frozen=True)
class Family:
    """``layer`` maps names below ``model.layers.N.``; ``permuted`` are those whose rows HF keeps in halves."""

    arch: str
    layer: dict[str, str]
    outer: dict[str, str]
    permuted: tuple[str, ...] = ()


LLAMA = Family("llama", LAYER_NORMS | ATTENTION | MLP, OUTER, ("q_proj", "k_proj"))

FAMILIES: dict[str, Family] = {
    "LlamaForCausalLM": LLAMA,
    "MistralForCausalLM": LLAMA,
}
