"""Model families as rows of data: how the names, shapes and layouts of Hugging Face checkpoints become GGUF ones.

A row is one tensor of the GGUF file. Its shape is written in letters, one for each dimension:

    h hidden   f feed-forward   v vocabulary   q, k rows of the query and of the key or value projection   d head
    e experts   m feed-forward of an expert   s of the shared expert   b query, key and value rows in one
    F two times f
    p of one layer's own embedding, P of all layers, V its tokens   M two times m   H two times h
    z positions   n query heads   g key-value heads   l taps of a convolution   c rows of its input, three times h

Of multi-head latent attention:

    r rank of keys and values   t r and the rotated part of a key   u rank of queries   i query rows
    o part of a head that is not rotated   w values of a head   x rows of o and w, all heads   y of w
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

__all__ = ["FAMILIES", "Family", "Row"]


class Row(NamedTuple):
    """``hf`` is below the layer's prefix; a ``*`` in it is an expert's number: all experts are stacked.

    ``when``: empty, always there; a config key, there when it is true; ``!key``, when it is false; ``?``, welcome but
    never missed; ``fused``, with all experts of a layer in one tensor; ``dense``, in the leading layers that have no
    experts; ``sparse``, in those that follow; ``attention`` or ``conv``, in layers of that kind; ``next``, beyond the
    last; ``kv``, where a layer does not share another's keys and values; ``values``, where they are not the keys.
    Several words must all hold.
    ``change``: what happens to the values or rows, see ``convert.Transform``; ``part``: (which, of how many) rows;
    ``source``: the shape in the checkpoint, where ``shape`` does not tell.
    """

    hf: str
    gguf: str
    shape: str
    when: str = ""
    change: str = ""
    part: tuple[int, int] = (0, 1)
    source: str = ""


@dataclass(frozen=True)
class Family:
    """``defaults`` are the config class's own, where configs in the wild leave a key out that planning needs."""

    arch: str
    layer: tuple[Row, ...]
    outer: tuple[Row, ...]
    prefix: str = "model.layers."
    above: str = ""  # what some checkpoints write ahead of all names
    aliases: Mapping[str, str] = field(default_factory=dict)  # a config key as it is known here -> the family's own
    dropped: tuple[str, ...] = ()  # how names of tensors begin that are left out
    rope: str = (
        ""  # which generated tensors of rope factors it may have: llama3 (!llama3: stops there), longrope, proportional
    )
    refused: tuple[str, ...] = ()  # config keys that must not be set (!key: must be): llama.cpp stops there too
    real_rows: bool = False  # the embedding loses its rows beyond the tokenizer's vocabulary
    one_head: bool = False  # a head that is there although it is tied is left out
    spare_layers: bool = False  # layers beyond the last (they predict several tokens) are left out
    next_layers: bool = False  # or they are converted, as many as num_nextn_predict_layers says
    kinds: tuple[str, ...] = ()  # what layer_types may say, where it decides what a layer is made of
    bare: bool = False  # the converter reads config.json itself, without transformers' defaults
    without_experts: Family | None = None  # what it is when num_experts_per_tok is zero
    pools: bool = False  # may be an embedding model: names without "model.", no head, pooling that modules.json tells
    one_kv_head: bool = False  # as llama.cpp counts them: latent attention has one for all
    defaults: Mapping[str, Any] = field(default_factory=dict)


def _plus_one(*rows: Row) -> tuple[Row, ...]:
    """Gemma's norms multiply by 1 + weight; llama.cpp's by the weight."""
    return tuple(r._replace(change="add_one") if r.gguf.endswith("norm.weight") else r for r in rows)


def _attention(bias: str, out_bias: str, permuted: bool = False) -> tuple[Row, ...]:
    """Separate projections; ``permuted``: HF keeps the rows of a head in halves, llama.cpp in pairs."""
    shapes = (("q", "attn_q", "qh", "permute_q"), ("k", "attn_k", "kh", "permute_k"), ("v", "attn_v", "kh", ""))
    rows = []
    for hf, gguf, shape, change in shapes:
        done = change if permuted else ""
        rows.append(Row(f"self_attn.{hf}_proj.weight", f"{gguf}.weight", shape, "", done))
        rows.append(Row(f"self_attn.{hf}_proj.bias", f"{gguf}.bias", shape[0], bias, done))
    out = Row("self_attn.o_proj.weight", "attn_output.weight", "hq")
    return *rows, out, Row("self_attn.o_proj.bias", "attn_output.bias", "h", out_bias)


def _mlp(bias: str = "?", when: str = "", gguf: str = "", hf: str = "mlp", width: str = "f") -> tuple[Row, ...]:
    """Gate, up and down; ``gguf`` is what their names end in (_shexp)."""
    shapes = {"gate": f"{width}h", "up": f"{width}h", "down": f"h{width}"}
    weights = [Row(f"{hf}.{n}_proj.weight", f"ffn_{n}{gguf}.weight", s, when) for n, s in shapes.items()]
    biases = [Row(f"{hf}.{n}_proj.bias", f"ffn_{n}{gguf}.bias", s[0], bias) for n, s in shapes.items()]
    return *weights, *biases


def _no_bias(rows: tuple[Row, ...]) -> tuple[Row, ...]:
    return tuple(r for r in rows if not r.gguf.endswith(".bias"))


def _norms(names: Mapping[str, str], bias: str | None = None) -> tuple[Row, ...]:
    rows = [Row(f"{hf}.weight", f"{gguf}.weight", "h") for hf, gguf in names.items()]
    if bias is not None:
        rows += [Row(f"{hf}.bias", f"{gguf}.bias", "h", bias) for hf, gguf in names.items()]
    return tuple(rows)


def _granite_shared(when: str, gguf: str) -> tuple[Row, ...]:
    """The expert that all share, whose gate and up stand in one tensor; without others it is the feed-forward."""
    return (
        Row("shared_mlp.input_linear.weight", f"ffn_gate{gguf}.weight", "sh", when, "", (0, 2)),
        Row("shared_mlp.input_linear.weight", f"ffn_up{gguf}.weight", "sh", when, "", (1, 2)),
        Row("shared_mlp.output_linear.weight", f"ffn_down{gguf}.weight", "hs", when),
    )


EMBEDDING = Row("model.embed_tokens.weight", "token_embd.weight", "vh")
HEAD = Row("lm_head.weight", "output.weight", "vh", "!tie_word_embeddings")
NORM = Row("model.norm.weight", "output_norm.weight", "h")
OUTER = (EMBEDDING, NORM, HEAD)
LLAMA_NORMS = _norms({"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"})
FOUR_NORMS = _norms(
    {
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "post_attention_norm",
        "pre_feedforward_layernorm": "ffn_norm",
        "post_feedforward_layernorm": "post_ffw_norm",
    }
)
OLMO_NORMS = _norms({"post_attention_layernorm": "post_attention_norm", "post_feedforward_layernorm": "post_ffw_norm"})
LAYER_NORMS = _norms({"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}, "")
HEAD_NORMS = (
    Row("self_attn.q_norm.weight", "attn_q_norm.weight", "d"),
    Row("self_attn.k_norm.weight", "attn_k_norm.weight", "d"),
)
WIDE_NORMS = (
    Row("self_attn.q_norm.weight", "attn_q_norm.weight", "q"),
    Row("self_attn.k_norm.weight", "attn_k_norm.weight", "k"),
)
MIXTRAL_EXPERTS = (  # stacks are written in the order of their rows
    Row("block_sparse_moe.gate.weight", "ffn_gate_inp.weight", "eh"),
    Row("block_sparse_moe.experts.*.w1.weight", "ffn_gate_exps.weight", "efh"),
    Row("block_sparse_moe.experts.*.w2.weight", "ffn_down_exps.weight", "ehf"),
    Row("block_sparse_moe.experts.*.w3.weight", "ffn_up_exps.weight", "efh"),
)
QWEN_EXPERTS = (
    Row("mlp.gate.weight", "ffn_gate_inp.weight", "eh"),
    Row("mlp.experts.*.down_proj.weight", "ffn_down_exps.weight", "ehm"),
    Row("mlp.experts.*.gate_proj.weight", "ffn_gate_exps.weight", "emh"),
    Row("mlp.experts.*.up_proj.weight", "ffn_up_exps.weight", "emh"),
    # Or all experts in one tensor, as newer transformers may save them.
    Row("mlp.experts.down_proj", "ffn_down_exps.weight", "ehm", "fused"),
    Row("mlp.experts.gate_up_proj", "ffn_gate_exps.weight", "emh", "fused", "", (0, 2)),
    Row("mlp.experts.gate_up_proj", "ffn_up_exps.weight", "emh", "fused", "", (1, 2)),
)
DEEPSEEK_EXPERTS = (
    *(row._replace(when="sparse") for row in QWEN_EXPERTS[:4]),
    *(row for row in _mlp("", "sparse", "_shexp", "mlp.shared_experts", "s") if row.gguf.endswith("weight")),
)
EXPERT_BIAS = Row("mlp.gate.e_score_correction_bias", "exp_probs_b.bias", "e", "sparse")
LATENT_ATTENTION = (
    Row("self_attn.q_proj.weight", "attn_q.weight", "ih", "!q_lora_rank"),
    Row("self_attn.q_a_proj.weight", "attn_q_a.weight", "uh", "q_lora_rank"),
    Row("self_attn.q_a_layernorm.weight", "attn_q_a_norm.weight", "u", "q_lora_rank"),
    Row("self_attn.q_b_proj.weight", "attn_q_b.weight", "iu", "q_lora_rank"),
    Row("self_attn.kv_a_proj_with_mqa.weight", "attn_kv_a_mqa.weight", "th"),
    Row("self_attn.kv_a_layernorm.weight", "attn_kv_a_norm.weight", "r"),
    Row("self_attn.kv_b_proj.weight", "attn_k_b.weight", "nro", "", "k_b", source="xr"),
    Row("self_attn.kv_b_proj.weight", "attn_v_b.weight", "nwr", "", "v_b", source="xr"),
    Row("self_attn.o_proj.weight", "attn_output.weight", "hy"),
)
SHARED_EXPERT = (
    *_mlp("?", "", "_shexp", "mlp.shared_expert", "s"),
    Row("mlp.shared_expert_gate.weight", "ffn_gate_inp_shexp.weight", "1h"),
)
NEOX = (
    *LAYER_NORMS,
    Row("attention.query_key_value.weight", "attn_qkv.weight", "bh", "", "qkv"),
    Row("attention.query_key_value.bias", "attn_qkv.bias", "b", "attention_bias", "qkv"),
    Row("attention.dense.weight", "attn_output.weight", "hq"),
    Row("attention.dense.bias", "attn_output.bias", "h", "attention_bias"),
    Row("mlp.dense_h_to_4h.weight", "ffn_up.weight", "fh"),
    Row("mlp.dense_h_to_4h.bias", "ffn_up.bias", "f"),
    Row("mlp.dense_4h_to_h.weight", "ffn_down.weight", "hf"),
    Row("mlp.dense_4h_to_h.bias", "ffn_down.bias", "h"),
)
NEOX_OUTER = (
    Row("gpt_neox.embed_in.weight", "token_embd.weight", "vh"),
    Row("gpt_neox.final_layer_norm.weight", "output_norm.weight", "h"),
    Row("gpt_neox.final_layer_norm.bias", "output_norm.bias", "h"),
    Row("embed_out.weight", "output.weight", "vh", "!tie_word_embeddings"),
)
PHI3_LAYER = (
    *LLAMA_NORMS,
    Row("self_attn.qkv_proj.weight", "attn_qkv.weight", "bh"),
    Row("self_attn.o_proj.weight", "attn_output.weight", "hq"),
    Row("mlp.gate_up_proj.weight", "ffn_up.weight", "Fh"),
    Row("mlp.down_proj.weight", "ffn_down.weight", "hf"),
)
STARCODER_MLP = (
    Row("mlp.c_fc.weight", "ffn_up.weight", "fh"),
    Row("mlp.c_fc.bias", "ffn_up.bias", "f", "use_bias"),
    Row("mlp.c_proj.weight", "ffn_down.weight", "hf"),
    Row("mlp.c_proj.bias", "ffn_down.bias", "h", "use_bias"),
)
STABLE_NORMS = (
    *_norms({"input_layernorm": "attn_norm"}, ""),
    Row("post_attention_layernorm.weight", "ffn_norm.weight", "h", "!use_parallel_residual"),
    Row("post_attention_layernorm.bias", "ffn_norm.bias", "h", "!use_parallel_residual"),
)
NORM_BIAS = Row("model.norm.bias", "output_norm.bias", "h")
GRANITE_EXPERTS = (  # the router, and experts whose gate and up stand in one tensor
    Row("block_sparse_moe.router.layer.weight", "ffn_gate_inp.weight", "eh", "num_local_experts"),
    Row("block_sparse_moe.input_linear.weight", "ffn_gate_exps.weight", "efh", "num_local_experts", "", (0, 2)),
    Row("block_sparse_moe.input_linear.weight", "ffn_up_exps.weight", "efh", "num_local_experts", "", (1, 2)),
    Row("block_sparse_moe.output_linear.weight", "ffn_down_exps.weight", "ehf", "num_local_experts"),
    *_granite_shared("num_local_experts shared_intermediate_size", "_shexp"),
    *_granite_shared("!num_local_experts shared_intermediate_size", ""),
)
NEXT = (  # of a layer that predicts one token more
    Row("eh_proj.weight", "nextn.eh_proj.weight", "hH", "next"),
    Row("enorm.weight", "nextn.enorm.weight", "h", "next"),
    Row("hnorm.weight", "nextn.hnorm.weight", "h", "next"),
    Row("shared_head.norm.weight", "nextn.shared_head_norm.weight", "h", "next"),
    Row("shared_head.head.weight", "nextn.shared_head_head.weight", "vh", "?"),
    Row("embed_tokens.weight", "nextn.embed_tokens.weight", "vh", "?"),
)
LFM2_MIXER = (
    *_norms({"operator_norm": "attn_norm", "ffn_norm": "ffn_norm"}),
    Row("conv.conv.weight", "shortconv.conv.weight", "hl", "conv", source="h1l"),
    Row("conv.in_proj.weight", "shortconv.in_proj.weight", "ch", "conv"),
    Row("conv.out_proj.weight", "shortconv.out_proj.weight", "hh", "conv"),
    Row("self_attn.q_proj.weight", "attn_q.weight", "qh", "attention"),
    Row("self_attn.k_proj.weight", "attn_k.weight", "kh", "attention"),
    Row("self_attn.v_proj.weight", "attn_v.weight", "kh", "attention"),
    Row("self_attn.out_proj.weight", "attn_output.weight", "hq", "attention"),
    Row("self_attn.q_layernorm.weight", "attn_q_norm.weight", "d", "attention"),
    Row("self_attn.k_layernorm.weight", "attn_k_norm.weight", "d", "attention"),
)
LFM2_FEED_FORWARD = (
    Row("feed_forward.w1.weight", "ffn_gate.weight", "fh", "dense"),
    Row("feed_forward.w2.weight", "ffn_down.weight", "hf", "dense"),
    Row("feed_forward.w3.weight", "ffn_up.weight", "fh", "dense"),
)
LFM2_EXPERTS = (
    Row("feed_forward.gate.weight", "ffn_gate_inp.weight", "eh", "sparse"),
    Row("feed_forward.expert_bias", "exp_probs_b.bias", "e", "sparse use_expert_bias"),
    Row("feed_forward.experts.*.w1.weight", "ffn_gate_exps.weight", "emh", "sparse"),
    Row("feed_forward.experts.*.w2.weight", "ffn_down_exps.weight", "ehm", "sparse"),
    Row("feed_forward.experts.*.w3.weight", "ffn_up_exps.weight", "emh", "sparse"),
)
LFM2_OUTER = (EMBEDDING, Row("model.embedding_norm.weight", "token_embd_norm.weight", "h"), HEAD)
GLM4_NORMS = _norms(
    {
        "input_layernorm": "attn_norm",
        "post_self_attn_layernorm": "post_attention_norm",
        "post_attention_layernorm": "ffn_norm",
        "post_mlp_layernorm": "post_ffw_norm",
    }
)
ERNIE_EXPERTS = (
    *(row._replace(when="sparse") for row in QWEN_EXPERTS[:4]),
    Row("mlp.moe_statics.e_score_correction_bias", "exp_probs_b.bias", "1e", "sparse"),
    *_no_bias(_mlp("", "sparse moe_num_shared_experts", "_shexp", "mlp.shared_experts", "s")),
)
COHERE_NORMS = (
    Row("input_layernorm.weight", "attn_norm.weight", "h"),
    Row("self_attn.q_norm.weight", "attn_q_norm.weight", "nd", "use_qk_norm"),
    Row("self_attn.k_norm.weight", "attn_k_norm.weight", "gd", "use_qk_norm"),
)
SEED_NORMS = _norms({"input_layernorm": "attn_norm", "post_attention_layernorm": "post_attention_norm"})
PHI2_LAYER = (
    *_norms({"input_layernorm": "attn_norm"}, ""),
    *_attention("", "")[:-2],
    Row("self_attn.dense.weight", "attn_output.weight", "hq"),
    Row("self_attn.dense.bias", "attn_output.bias", "h"),
    Row("mlp.fc1.weight", "ffn_up.weight", "fh"),
    Row("mlp.fc1.bias", "ffn_up.bias", "f"),
    Row("mlp.fc2.weight", "ffn_down.weight", "hf"),
    Row("mlp.fc2.bias", "ffn_down.bias", "h"),
)
PHI2_OUTER = (
    EMBEDDING,
    Row("model.final_layernorm.weight", "output_norm.weight", "h"),
    Row("model.final_layernorm.bias", "output_norm.bias", "h"),
    HEAD,
    Row("lm_head.bias", "output.bias", "v", "!tie_word_embeddings"),
)

BAILING_LAYER = (
    *LLAMA_NORMS,
    Row("attention.query_key_value.weight", "attn_qkv.weight", "bh"),
    Row("attention.query_key_value.bias", "attn_qkv.bias", "b", "use_qkv_bias"),
    Row("attention.query_layernorm.weight", "attn_q_norm.weight", "d", "use_qk_norm"),
    Row("attention.key_layernorm.weight", "attn_k_norm.weight", "d", "use_qk_norm"),
    Row("attention.dense.weight", "attn_output.weight", "hq"),
    *_no_bias(_mlp("", "dense")),
    *DEEPSEEK_EXPERTS,
    Row("mlp.gate.expert_bias", "exp_probs_b.bias", "e", "sparse moe_router_enable_expert_bias"),
    *NEXT[:3],
    Row("final_layernorm.weight", "layer_output_norm.weight", "h", "next"),
)
GPT2_LAYER = (  # its matrices are [inputs, outputs]
    *_norms({"ln_1": "attn_norm", "ln_2": "ffn_norm"}, ""),
    Row("attn.c_attn.weight", "attn_qkv.weight", "ch", "", "transpose", source="hc"),
    Row("attn.c_attn.bias", "attn_qkv.bias", "c"),
    Row("attn.c_proj.weight", "attn_output.weight", "hh", "", "transpose", source="hh"),
    Row("attn.c_proj.bias", "attn_output.bias", "h"),
    Row("mlp.c_fc.weight", "ffn_up.weight", "fh", "", "transpose", source="hf"),
    Row("mlp.c_fc.bias", "ffn_up.bias", "f"),
    Row("mlp.c_proj.weight", "ffn_down.weight", "hf", "", "transpose", source="fh"),
    Row("mlp.c_proj.bias", "ffn_down.bias", "h"),
)
GPT2_OUTER = (
    Row("wte.weight", "token_embd.weight", "vh"),
    Row("wpe.weight", "position_embd.weight", "zh"),
    Row("ln_f.weight", "output_norm.weight", "h"),
    Row("ln_f.bias", "output_norm.bias", "h"),
    HEAD,
)
GEMMA4_LAYER = (
    *FOUR_NORMS,
    Row("self_attn.q_proj.weight", "attn_q.weight", "qh"),
    Row("self_attn.q_norm.weight", "attn_q_norm.weight", "d"),
    Row("self_attn.k_proj.weight", "attn_k.weight", "kh", "kv"),
    Row("self_attn.k_norm.weight", "attn_k_norm.weight", "d", "kv"),
    Row("self_attn.v_proj.weight", "attn_v.weight", "kh", "kv values"),
    Row("self_attn.o_proj.weight", "attn_output.weight", "hq"),
    *_no_bias(_mlp()),
    Row("layer_scalar", "layer_output_scale.weight", "1"),
    Row("per_layer_input_gate.weight", "inp_gate.weight", "ph", "hidden_size_per_layer_input"),
    Row("per_layer_projection.weight", "proj.weight", "hp", "hidden_size_per_layer_input"),
    Row("post_per_layer_input_norm.weight", "post_norm.weight", "h", "hidden_size_per_layer_input"),
    Row("router.proj.weight", "ffn_gate_inp.weight", "eh", "enable_moe_block"),
    Row("router.scale", "ffn_gate_inp.scale", "h", "enable_moe_block"),
    Row("router.per_expert_scale", "ffn_down_exps.scale", "e", "enable_moe_block"),
    Row("experts.gate_up_proj", "ffn_gate_up_exps.weight", "eMh", "enable_moe_block"),
    Row("experts.down_proj", "ffn_down_exps.weight", "ehm", "enable_moe_block"),
    Row("pre_feedforward_layernorm_2.weight", "pre_ffw_norm_2.weight", "h", "enable_moe_block"),
    Row("post_feedforward_layernorm_1.weight", "post_ffw_norm_1.weight", "h", "enable_moe_block"),
    Row("post_feedforward_layernorm_2.weight", "post_ffw_norm_2.weight", "h", "enable_moe_block"),
)
GEMMA4_EMBEDDING = (
    Row("model.embed_tokens_per_layer.weight", "per_layer_token_embd.weight", "VP", "hidden_size_per_layer_input"),
    Row("model.per_layer_model_projection.weight", "per_layer_model_proj.weight", "Ph", "hidden_size_per_layer_input"),
    Row("model.per_layer_projection_norm.weight", "per_layer_proj_norm.weight", "p", "hidden_size_per_layer_input"),
)
LLAMA_LAYER = (*LLAMA_NORMS, *_attention("attention_bias", "attention_bias", True), *_mlp("mlp_bias"))
GEMMA_OUTER = _plus_one(EMBEDDING, NORM)
GEMMA = {"tie_word_embeddings": True, "head_dim": 256}
GEMMA3_TEXT = {**GEMMA, "num_attention_heads": 8, "num_key_value_heads": 4, "vocab_size": 262208}
NOT_USED = ("lm_head.weight",)  # autoawq saves Gemma's tied head

NO_GATE = tuple(row for row in _mlp("mlp_bias") if "gate" not in row.gguf)
GRANITE_MOE = Family(
    "granitemoe",
    (*LLAMA_NORMS, *_attention("attention_bias", "attention_bias", True), *GRANITE_EXPERTS),
    OUTER,
    rope="!llama3",
    refused=("!num_local_experts",),
    defaults={"num_local_experts": 8},
)

LLAMA = Family("llama", LLAMA_LAYER, OUTER, rope="llama3")
MISTRAL3 = replace(LLAMA, arch="mistral3")
QWEN2_LAYER = (*LLAMA_NORMS, *_attention("", "?"), *_mlp())
QWEN3_LAYER = (*LLAMA_NORMS, *_attention("attention_bias", "attention_bias"), *HEAD_NORMS)
GRANITE4 = replace(GRANITE_MOE, kinds=("attention",), bare=True)
QWEN2VL = Family("qwen2vl", QWEN2_LAYER, OUTER)
ERNIE_ATTENTION = (*LLAMA_NORMS, *_attention("use_bias", "use_bias"))
QWEN2MOE_LAYER = (*LLAMA_NORMS, *_attention("qkv_bias", "?"), *QWEN_EXPERTS, *SHARED_EXPERT)
GEMMA3 = Family(
    "gemma3",
    _plus_one(*FOUR_NORMS, *HEAD_NORMS, *_attention("attention_bias", "attention_bias"), *_mlp()),
    (*GEMMA_OUTER, HEAD),
    real_rows=True,
    defaults=GEMMA3_TEXT,
)
DEEPSEEK2 = Family(
    "deepseek2",
    (*LLAMA_NORMS, *LATENT_ATTENTION, *_no_bias(_mlp("", "dense")), *DEEPSEEK_EXPERTS),
    OUTER,
    one_head=True,
    spare_layers=True,
    one_kv_head=True,
)
DEEPSEEK3 = replace(DEEPSEEK2, layer=(*DEEPSEEK2.layer, EXPERT_BIAS))
GEMMA4 = Family(
    "gemma4",
    GEMMA4_LAYER,
    (*OUTER, *GEMMA4_EMBEDDING),
    rope="proportional",
    real_rows=True,
    defaults={"tie_word_embeddings": True, "head_dim": 256, "num_kv_shared_layers": 0},
)
OLMO2 = Family("olmo2", (*OLMO_NORMS, *_attention("attention_bias", "attention_bias"), *WIDE_NORMS, *_mlp()), OUTER)

FAMILIES: dict[str, Family] = {
    "LlamaForCausalLM": LLAMA,
    "MistralForCausalLM": LLAMA,
    "VLlama3ForCausalLM": replace(LLAMA, defaults={"num_attention_heads": 32}),
    "Mistral3ForConditionalGeneration": MISTRAL3,
    "Ministral3ForCausalLM": MISTRAL3,
    "MixtralForCausalLM": Family(
        "llama", (*LLAMA_NORMS, *_attention("?", "?", True), *MIXTRAL_EXPERTS), OUTER, rope="llama3"
    ),
    "SmolLM3ForCausalLM": Family("smollm3", LLAMA_LAYER, OUTER, rope="llama3", defaults={"tie_word_embeddings": True}),
    "GraniteForCausalLM": Family("granite", LLAMA_LAYER, OUTER, rope="!llama3"),
    "GraniteMoeForCausalLM": GRANITE_MOE,
    "GraniteMoeSharedForCausalLM": GRANITE_MOE,
    "GraniteMoeHybridForCausalLM": replace(GRANITE4, without_experts=replace(GRANITE4, arch="granite", refused=())),
    "ArceeForCausalLM": Family(
        "arcee", (*LLAMA_NORMS, *_attention("attention_bias", "attention_bias", True), *NO_GATE), OUTER, rope="llama3"
    ),
    "SeedOssForCausalLM": Family(
        "seed_oss",
        (*SEED_NORMS, *_attention("attention_bias", "attention_out_bias"), *_mlp("mlp_bias")),
        OUTER,
        defaults={"attention_bias": True},
    ),
    "CohereForCausalLM": Family(
        "command-r",
        (*COHERE_NORMS, *_attention("attention_bias", "attention_bias"), *_no_bias(_mlp())),
        (EMBEDDING, NORM),
        defaults={"tie_word_embeddings": True},
    ),
    "Cohere2ForCausalLM": Family(
        "cohere2",
        (*COHERE_NORMS[:1], *_no_bias(_attention("", "")), *_no_bias(_mlp())),
        (EMBEDDING, NORM),
        defaults={"tie_word_embeddings": True},
    ),
    "Glm4ForCausalLM": Family(
        "glm4",
        (*GLM4_NORMS, *_attention("attention_bias", "?"), *PHI3_LAYER[-2:]),
        OUTER,
    ),
    "Glm4MoeForCausalLM": Family(
        "glm4moe",
        (
            *SEED_NORMS,
            *_attention("attention_bias", "?"),
            *(row._replace(when="use_qk_norm") for row in HEAD_NORMS),
            *_no_bias(_mlp("", "dense")),
            *DEEPSEEK_EXPERTS,
            EXPERT_BIAS,
            *NEXT,
        ),
        OUTER,
        next_layers=True,
    ),
    "Lfm2ForCausalLM": Family(
        "lfm2",
        (*LFM2_MIXER, *LFM2_FEED_FORWARD),
        LFM2_OUTER,
        kinds=("conv", "full_attention"),
        defaults={"tie_word_embeddings": True},
    ),
    "Lfm2MoeForCausalLM": Family(
        "lfm2moe",
        (*LFM2_MIXER, *LFM2_FEED_FORWARD, *LFM2_EXPERTS),
        LFM2_OUTER,
        kinds=("conv", "full_attention"),
        defaults={"tie_word_embeddings": True},
    ),
    "HunYuanDenseV1ForCausalLM": Family(
        "hunyuan-dense",
        (
            *LLAMA_NORMS,
            *_attention("attention_bias", "attention_bias"),
            Row("self_attn.query_layernorm.weight", "attn_q_norm.weight", "d"),
            Row("self_attn.key_layernorm.weight", "attn_k_norm.weight", "d"),
            *_no_bias(_mlp()),
        ),
        OUTER,
        one_head=True,
    ),
    "Exaone4ForCausalLM": Family(
        "exaone4", (*OLMO_NORMS, *_no_bias(_attention("", "")), *HEAD_NORMS, *_no_bias(_mlp())), OUTER, rope="llama3"
    ),
    "Ernie4_5ForCausalLM": Family(
        "ernie4_5", (*ERNIE_ATTENTION, *_mlp("use_bias")), OUTER, defaults={"tie_word_embeddings": True}
    ),
    "Ernie4_5_MoeForCausalLM": Family(
        "ernie4_5-moe",
        (*ERNIE_ATTENTION, *_no_bias(_mlp("", "dense")), *ERNIE_EXPERTS),
        OUTER,
        dropped=("model.mtp_",),
        defaults={"tie_word_embeddings": True},
    ),
    "MiniCPMForCausalLM": Family(
        "minicpm",
        (*LLAMA_NORMS, *_no_bias(_attention("", "", True)), *_no_bias(_mlp())),
        OUTER,
        rope="longrope",
        defaults={"tie_word_embeddings": True},
    ),
    "NemotronForCausalLM": Family(
        "nemotron",
        _plus_one(*LAYER_NORMS, *_attention("attention_bias", "attention_bias"), *NO_GATE),
        (*_plus_one(NORM), EMBEDDING, NORM_BIAS, HEAD),
    ),
    "Qwen2ForCausalLM": Family("qwen2", QWEN2_LAYER, OUTER, pools=True),
    "Qwen3ForCausalLM": Family("qwen3", (*QWEN3_LAYER, *_mlp()), OUTER, pools=True),
    "Qwen2VLForConditionalGeneration": QWEN2VL,
    "Qwen2_5_VLForConditionalGeneration": QWEN2VL,
    "Qwen3VLForConditionalGeneration": Family("qwen3vl", (*QWEN3_LAYER, *_mlp()), OUTER),
    "Qwen2MoeForCausalLM": Family(
        "qwen2moe", QWEN2MOE_LAYER, OUTER, refused=("mlp_only_layers",), defaults={"qkv_bias": True}
    ),
    "Qwen3MoeForCausalLM": Family("qwen3moe", (*QWEN3_LAYER, *QWEN_EXPERTS), OUTER, refused=("mlp_only_layers",)),
    "Dots1ForCausalLM": Family(
        "dots1",
        (*QWEN3_LAYER, *_no_bias(_mlp("", "dense")), *DEEPSEEK_EXPERTS, EXPERT_BIAS),
        OUTER,
    ),
    "BailingMoeV2ForCausalLM": Family(
        "bailingmoe2",
        BAILING_LAYER,
        (Row("model.word_embeddings.weight", "token_embd.weight", "vh"), NORM, HEAD),
        next_layers=True,
        defaults={"use_qk_norm": True, "moe_router_enable_expert_bias": True},
    ),
    "DeepseekV2ForCausalLM": DEEPSEEK2,
    "DeepseekV3ForCausalLM": DEEPSEEK3,
    "GemmaForCausalLM": Family(
        "gemma",
        _plus_one(*LLAMA_NORMS, *_attention("attention_bias", "attention_bias"), *_mlp()),
        GEMMA_OUTER,
        dropped=NOT_USED,
        defaults=GEMMA,
    ),
    "Gemma2ForCausalLM": Family(
        "gemma2",
        _plus_one(*FOUR_NORMS, *_attention("attention_bias", "attention_bias"), *_mlp()),
        GEMMA_OUTER,
        dropped=NOT_USED,
        defaults=GEMMA,
    ),
    "Gemma3ForCausalLM": GEMMA3,
    "Gemma3ForConditionalGeneration": GEMMA3,
    "Gemma4ForCausalLM": GEMMA4,
    "Gemma4ForConditionalGeneration": GEMMA4,
    "Phi3ForCausalLM": Family("phi3", PHI3_LAYER, OUTER, rope="longrope"),
    "PhiMoEForCausalLM": Family(
        "phimoe",
        (*LAYER_NORMS, *_attention("attention_bias", "attention_bias"), *MIXTRAL_EXPERTS),
        (*OUTER, NORM_BIAS, Row("lm_head.bias", "output.bias", "v", "lm_head_bias")),
        rope="longrope",
    ),
    "PhiForCausalLM": Family("phi2", PHI2_LAYER, PHI2_OUTER, refused=("qk_layernorm",)),
    "OlmoForCausalLM": Family("olmo", (*_no_bias(_attention("?", "?", True)), *_mlp()), (EMBEDDING, HEAD)),
    "Olmo2ForCausalLM": OLMO2,
    "Olmo3ForCausalLM": OLMO2,
    "OlmoeForCausalLM": Family(
        "olmoe", (*LLAMA_NORMS, *_no_bias(_attention("", "")), *WIDE_NORMS, *QWEN_EXPERTS[:4]), OUTER
    ),
    "StableLmForCausalLM": Family(
        "stablelm",
        (*STABLE_NORMS, *_attention("use_qkv_bias", "?"), *_mlp()),
        (*OUTER, NORM_BIAS),
        refused=("qk_layernorm",),
    ),
    "GPT2LMHeadModel": Family(
        "gpt2",
        GPT2_LAYER,
        GPT2_OUTER,
        prefix="h.",
        above="transformer.",
        aliases={
            "hidden_size": "n_embd",
            "num_hidden_layers": "n_layer",
            "num_attention_heads": "n_head",
            "intermediate_size": "n_inner",
        },
        defaults={"tie_word_embeddings": True},
    ),
    "GPTNeoXForCausalLM": Family(
        "gptneox", NEOX, NEOX_OUTER, prefix="gpt_neox.layers.", defaults={"attention_bias": True}
    ),
    "Starcoder2ForCausalLM": Family(
        "starcoder2",
        (*LAYER_NORMS, *_attention("use_bias", "use_bias"), *STARCODER_MLP),
        (*OUTER, NORM_BIAS),
        defaults={"tie_word_embeddings": True, "use_bias": True},
    ),
}
