"""Small random checkpoints of every family: they are the same wherever they are made.

    python tests/arch/make_families.py LLAMA_CPP OUT.json [NAME ...]     records what llama.cpp makes of each

LLAMA_CPP: its source folder with its tools built in build/. Tests import ``write`` and compare with the record.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import blake3
import numpy as np

from qbuild.arch.convert import tensor_specs
from qbuild.arch.shapes import expected_tensors
from qbuild.checkpoint import open_path
from qbuild.gguffile import GGUFType, encode_kv, header

DATA = Path(__file__).parent.parent / "data"
SENTENCEPIECE, BPE = DATA / "tiny-llama", DATA / "arch" / "bpe"
TYPES = ("Q4_K_M", "F16")
MORE_TYPES = dict.fromkeys(("mixtral-8", "qwen2moe", "qwen3moe", "qwen3moe-fused"), ("MXFP4_MOE",))
WEIGHED = {  # what is also made with an importance matrix, each expert of a stack with its own sums
    "mixtral-8": ("Q4_K_M", "IQ2_M", "Q5_1", "Q2_K", "IQ1_M", "IQ2_XXS", "IQ3_XXS", "MXFP4_MOE"),
    "qwen3moe": ("Q5_K_M", "IQ3_XXS", "MXFP4_MOE"),
    "qwen3moe-fused": ("Q4_0", "IQ3_M"),
    "granite-moe-shared": ("Q4_K_M", "IQ4_NL"),
    "deepseek2-lite": ("Q4_0",),
    "gpt2": ("Q4_1",),
}
BASE = {
    "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 2048, "max_position_embeddings": 2048, "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0, "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None,
    "torch_dtype": "bfloat16",
}  # fmt: skip
NARROW = {"hidden_size": 128, "vocab_size": 46592, "intermediate_size": 256}  # the tokens of a byte-level BPE are many
LONGROPE = {"type": "longrope", "long_factor": [1.0 + i / 7 for i in range(32)], "short_factor": [1.0] * 32}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "decoder_sparse_step": 1}
YARN = {"type": "yarn", "factor": 40, "original_max_position_embeddings": 4096, "beta_fast": 32, "beta_slow": 1}
LATENT = {
    "num_key_value_heads": 4, "kv_lora_rank": 64, "qk_nope_head_dim": 32, "qk_rope_head_dim": 16, "v_head_dim": 32,
    "num_hidden_layers": 3, "n_routed_experts": 4, "n_shared_experts": 2, "num_experts_per_tok": 2,
    "moe_intermediate_size": 64, "moe_layer_freq": 1, "first_k_dense_replace": 1,
}  # fmt: skip
GEMMA4 = {
    "num_hidden_layers": 4, "tie_word_embeddings": True, "sliding_window": 512, "rope_theta": None,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "rope_parameters": {
        "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
        "full_attention": {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1000000.0},
    },
}  # fmt: skip
MODULES = [
    {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
    {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
]
BAILING = {
    "head_dim": 32, "num_experts": 4, "num_shared_experts": 1, "num_experts_per_tok": 2, "moe_intermediate_size": 64,
    "first_k_dense_replace": 1, "num_hidden_layers": 3, "routed_scaling_factor": 2.5, "norm_topk_prob": True,
    "n_group": 2, "topk_group": 1, "score_function": "sigmoid", "partial_rotary_factor": 0.5,
}  # fmt: skip
GRANITE4 = {
    "layer_types": ["attention"] * 2, "shared_intermediate_size": 96, "attention_multiplier": 0.015625,
    "embedding_multiplier": 12.0, "residual_multiplier": 0.22, "logits_scaling": 8.0, "mamba_n_heads": 4,
    "mamba_n_groups": 1, "mamba_d_state": 16, "mamba_d_head": 64, "mamba_d_conv": 4, "mamba_expand": 2,
}  # fmt: skip
GEMMA3 = {"head_dim": 64, "sliding_window": 512, "query_pre_attn_scalar": 64, "tie_word_embeddings": True}


# The converter reads some config.json itself when transformers cannot; one family needs that, see hyperparameters.py.
BARE = """
import runpy, sys
sys.argv = sys.argv[1:]
sys.path.insert(0, ".")
import conversion.base
conversion.base.AutoConfig = None
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def family(architecture: str, model_type: str, **over: Any) -> dict[str, Any]:
    return {"architectures": [architecture], "model_type": model_type, **over}


def bpe(architecture: str, model_type: str, **over: Any) -> dict[str, Any]:
    return family(architecture, model_type, **NARROW | over, _tokenizer=BPE)


GPT2: dict[str, Any] = {
    "architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "n_embd": 128, "n_layer": 2, "n_head": 4, "n_ctx": 64,
    "n_positions": 64, "vocab_size": 46592, "layer_norm_epsilon": 1e-5, "bos_token_id": 1, "eos_token_id": 1,
    "torch_dtype": "float32", "_dtypes": ("F32",), "_tokenizer": BPE, "_plain": True,
}  # fmt: skip
VARIANTS: dict[str, dict[str, Any]] = {
    "llama-mlp-bias": family("LlamaForCausalLM", "llama", mlp_bias=True, attention_bias=True),
    "llama-mixed-dtypes": family("LlamaForCausalLM", "llama", _dtypes=("F32", "F16", "BF16")),
    "llama-old-context": family("LlamaForCausalLM", "llama", rope_scaling=LLAMA3, max_position_embeddings=4096),
    "llama-hf-vocabulary": family("LlamaForCausalLM", "llama", _without=("tokenizer.model",)),
    "llama-bpe": bpe("LlamaForCausalLM", "llama", tie_word_embeddings=True),
    "llama-bpe-49152": family("LlamaForCausalLM", "llama", **NARROW | {"vocab_size": 49152}, _tokenizer=BPE),
    "codellama": family("LlamaForCausalLM", "llama", vocab_size=32016, hidden_size=64, intermediate_size=128),
    "mixtral": family("MixtralForCausalLM", "mixtral", num_local_experts=4, num_experts_per_tok=2),
    "mixtral-8": family("MixtralForCausalLM", "mixtral", num_local_experts=8, intermediate_size=256, head_dim=64),
    "mixtral-sharded": family(
        "MixtralForCausalLM", "mixtral", num_local_experts=4, tie_word_embeddings=True, _shards=3,
        rope_scaling=LLAMA3 | {"original_max_position_embeddings": 1024},
    ),
    "deepseek2-sharded": bpe(
        "DeepseekV2ForCausalLM", "deepseek_v2", **LATENT, q_lora_rank=None, scoring_func="softmax", _shards=2,
        n_group=1, topk_group=1,
    ),
    "smollm3": bpe("SmolLM3ForCausalLM", "smollm3", tie_word_embeddings=True),
    "granite": bpe(
        "GraniteForCausalLM", "granite", attention_multiplier=0.015625, embedding_multiplier=12.0,
        residual_multiplier=0.22, logits_scaling=8.0,
    ),
    "granite-moe": bpe(
        "GraniteMoeForCausalLM", "granitemoe", num_local_experts=4, num_experts_per_tok=2,
        attention_multiplier=0.015625, embedding_multiplier=12.0, residual_multiplier=0.22, logits_scaling=6.0,
        tie_word_embeddings=True,
    ),
    "granite-moe-shared": bpe(
        "GraniteMoeSharedForCausalLM", "granitemoeshared", num_local_experts=8, num_experts_per_tok=2,
        shared_intermediate_size=96, attention_multiplier=0.015625,
    ),
    "granite4": bpe(
        "GraniteMoeHybridForCausalLM", "granitemoehybrid", **GRANITE4, num_local_experts=0, num_experts_per_tok=0,
        tie_word_embeddings=True,
    ),
    "granite4-moe": bpe(
        "GraniteMoeHybridForCausalLM", "granitemoehybrid", **GRANITE4, num_local_experts=4, num_experts_per_tok=2,
    ),
    "arcee": bpe("ArceeForCausalLM", "arcee", head_dim=32, hidden_act="relu2"),
    "seed-oss": bpe(
        "SeedOssForCausalLM", "seed_oss", head_dim=64, attention_bias=True, attention_out_bias=False, mlp_bias=False
    ),
    "command-r": bpe(
        "CohereForCausalLM", "cohere", logit_scale=0.0625, layer_norm_eps=1e-5, tie_word_embeddings=True,
        model_max_length=131072,
    ),
    "command-r-plus": bpe(
        "CohereForCausalLM", "cohere", logit_scale=0.8, layer_norm_eps=1e-5, tie_word_embeddings=True, use_qk_norm=True
    ),
    "nemotron": family(
        "NemotronForCausalLM", "nemotron", norm_eps=1e-5, partial_rotary_factor=0.5, head_dim=64, hidden_act="relu2"
    ),
    "nemotron-linear-rope": family(
        "NemotronForCausalLM", "nemotron", norm_eps=1e-5, partial_rotary_factor=0.5, head_dim=64, hidden_act="relu2",
        rope_scaling={"rope_type": "linear", "factor": 2.0}, tie_word_embeddings=True,
    ),
    "arcee-pooled": bpe(
        "ArceeForCausalLM", "arcee", head_dim=32, hidden_act="relu2", rope_scaling=YARN | {"factor": 20.0},
        _files={"modules.json": MODULES, "1_Pooling/config.json": {"pooling_mode_cls_token": True}},
    ),
    "phi2": bpe(
        "PhiForCausalLM", "phi", layer_norm_eps=1e-5, partial_rotary_factor=0.4, num_key_value_heads=4,
        hidden_act="gelu_new",
    ),
    "qwen2": bpe("Qwen2ForCausalLM", "qwen2", use_sliding_window=False, sliding_window=4096, max_window_layers=2),
    "llava": {
        "architectures": ["LlavaForConditionalGeneration"],
        "model_type": "llava",
        "text_config": {**BASE, "architectures": ["LlamaForCausalLM"], "model_type": "llama"},
        "vision_config": {"hidden_size": 64, "model_type": "clip_vision_model"},
        "_prefix": "language_model.",
        "_extra": {"vision_tower.vision_model.encoder.a.weight": (8, 64), "multi_modal_projector.a.weight": (8, 64)},
    },
    "smolvlm": {
        "architectures": ["SmolVLMForConditionalGeneration"],
        "model_type": "smolvlm",
        "text_config": {
            **BASE, **NARROW, "architectures": ["VLlama3ForCausalLM"], "model_type": "llama",
            "num_attention_heads": 32, "num_key_value_heads": 8,
        },
        "vision_config": {"hidden_size": 64, "model_type": "smolvlm_vision"},
        "_tokenizer": BPE,
        "_infix": "text_model.",
        "_extra": {"model.vision_model.a.weight": (8, 64), "model.connector.modality_projection.proj.weight": (8, 64)},
    },
    "internvl": {
        "architectures": ["InternVLChatModel"],
        "model_type": "internvl_chat",
        "llm_config": {**BASE, **NARROW, "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"},
        "vision_config": {"hidden_size": 64, "model_type": "intern_vit_6b"},
        "_tokenizer": BPE,
        "_prefix": "language_model.",
        "_extra": {"vision_model.a.weight": (8, 64), "mlp1.0.weight": (64,)},
    },
    "mistral": family("MistralForCausalLM", "mistral", head_dim=32, sliding_window=1024),
    "qwen2.5vl": {
        "architectures": ["Qwen2_5_VLForConditionalGeneration"],
        "model_type": "qwen2_5_vl",
        "text_config": {
            **BASE, **NARROW, "model_type": "qwen2_5_vl_text", "tie_word_embeddings": True,
            "rope_scaling": {"type": "mrope", "mrope_section": [4, 6, 6]},
        },
        "vision_config": {"hidden_size": 64, "model_type": "qwen2_5_vl"},
        "_tokenizer": BPE,
        "_extra": {"visual.merger.ln_q.weight": (64,)},
    },
    "mistral3-multimodal": {
        "architectures": ["Mistral3ForConditionalGeneration"],
        "model_type": "mistral3",
        "text_config": {**BASE, "model_type": "mistral", "head_dim": 32, "rms_norm_eps": 1e-5},
        "vision_config": {"hidden_size": 64, "model_type": "pixtral"},
        "_prefix": "language_model.",
        "_extra": {
            "vision_tower.patch_conv.weight": (8, 64),
            "multi_modal_projector.linear_1.weight": (8, 64),
        },
    },
    "ministral3": family(
        "Ministral3ForCausalLM", "ministral3", head_dim=64, rope_theta=None,
        rope_parameters=YARN | {
            "rope_type": "yarn", "rope_theta": 1e6, "mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.1,
        },
    ),
    "cohere2": bpe(
        "Cohere2ForCausalLM", "cohere2", logit_scale=0.25, layer_norm_eps=1e-5, tie_word_embeddings=True,
        sliding_window=512, rotary_pct=1.0, num_hidden_layers=4,
    ),
    "glm4": bpe(
        "Glm4ForCausalLM", "glm4", head_dim=32, attention_bias=True, partial_rotary_factor=0.5,
        bos_token_id=None, eos_token_id=None, _tokens=("<|user|>",),
    ),
    "glm4-moe": bpe(
        "Glm4MoeForCausalLM", "glm4_moe", head_dim=32, attention_bias=True, use_qk_norm=True, n_routed_experts=4,
        n_shared_experts=1, num_experts_per_tok=2, moe_intermediate_size=64, first_k_dense_replace=1, n_group=1,
        topk_group=1, norm_topk_prob=True, routed_scaling_factor=1.5, num_nextn_predict_layers=1, num_hidden_layers=3,
        partial_rotary_factor=0.5, _tokens=("[gMASK]", "<|user|>", "<|observation|>"),
        _extra={
            "model.layers.3.embed_tokens.weight": (46592, 128),
            "model.layers.3.shared_head.head.weight": (46592, 128),
        },
    ),
    "lfm2": bpe(
        "Lfm2ForCausalLM", "lfm2", num_hidden_layers=4, full_attn_idxs=[1, 3], norm_eps=1e-5, rms_norm_eps=None,
        intermediate_size=None, block_ff_dim=384, block_auto_adjust_ff_dim=True, block_ffn_dim_multiplier=1.0,
        block_multiple_of=32, conv_L_cache=3, conv_bias=False, tie_word_embeddings=True,
    ),
    "lfm2-attention-first": bpe(
        "Lfm2ForCausalLM", "lfm2", layer_types=["full_attention", "conv"], norm_eps=1e-5, rms_norm_eps=None,
        block_auto_adjust_ff_dim=False, conv_L_cache=4, conv_bias=False, tie_word_embeddings=True,
    ),
    "lfm2-moe": bpe(
        "Lfm2MoeForCausalLM", "lfm2_moe", num_hidden_layers=3, layer_types=["conv", "full_attention", "conv"],
        norm_eps=1e-5, rms_norm_eps=None, moe_intermediate_size=64, num_experts=4, num_experts_per_tok=2,
        num_dense_layers=1, use_expert_bias=True, conv_L_cache=3, conv_bias=False, tie_word_embeddings=True,
    ),
    "hunyuan-dense": bpe(
        "HunYuanDenseV1ForCausalLM", "hunyuan_v1_dense", head_dim=32, eod_token_id=2, max_position_embeddings=32768,
        rope_scaling={"type": "dynamic", "alpha": 1000.0, "factor": 1.0, "beta_fast": 32, "beta_slow": 1,
                      "mscale": 1.0, "mscale_all_dim": 1.0},
        tie_word_embeddings=True, _extra={"lm_head.weight": (46592, 128)},
    ),
    "exaone4": bpe(
        "Exaone4ForCausalLM", "exaone4", head_dim=32, sliding_window=512, sliding_window_pattern="LLLG",
        num_hidden_layers=4, rope_scaling=LLAMA3 | {"original_max_position_embeddings": 1024},
        layer_types=["sliding_attention"] * 3 + ["full_attention"],
    ),
    "exaone4-no-window": bpe("Exaone4ForCausalLM", "exaone4", sliding_window=None, tie_word_embeddings=True),
    "ernie4.5": family("Ernie4_5ForCausalLM", "ernie4_5", head_dim=64, use_bias=False, tie_word_embeddings=True),
    "ernie4.5-moe": family(
        "Ernie4_5_MoeForCausalLM", "ernie4_5_moe", use_bias=False, moe_num_experts=4, moe_k=2,
        moe_intermediate_size=96, moe_num_shared_experts=2, moe_layer_start_index=1, moe_layer_end_index=2,
        moe_layer_interval=1, num_hidden_layers=3, _extra={"model.mtp_linear_proj.0.weight": (8, 64)},
    ),
    "minicpm": family(
        "MiniCPMForCausalLM", "minicpm", scale_emb=12, scale_depth=1.4, dim_model_base=128, tie_word_embeddings=True,
        rope_scaling=LONGROPE | {"original_max_position_embeddings": 2048},
    ),
    "qwen2vl": bpe(
        "Qwen2VLForConditionalGeneration", "qwen2_vl", rope_scaling={"type": "mrope", "mrope_section": [4, 6, 6]},
        vision_config={"hidden_size": 64, "model_type": "qwen2_vl"},
        _extra={"visual.merger.ln_q.weight": (64,)},
    ),
    "qwen3vl": {
        "architectures": ["Qwen3VLForConditionalGeneration"],
        "model_type": "qwen3_vl",
        "text_config": {
            **BASE, **NARROW, "model_type": "qwen3_vl_text", "head_dim": 32,
            "rope_scaling": {"mrope_interleaved": True, "mrope_section": [6, 5, 5], "rope_type": "default"},
        },
        "vision_config": {"hidden_size": 64, "model_type": "qwen3_vl", "deepstack_visual_indexes": [1, 2, 3]},
        "_tokenizer": BPE,
        "_infix": "language_model.",
        "_extra": {"model.visual.merger.norm.weight": (64,)},
    },
    "phimoe": family(
        "PhiMoEForCausalLM", "phimoe", num_local_experts=4, num_experts_per_tok=2, attention_bias=True,
        lm_head_bias=True, original_max_position_embeddings=2048, sliding_window=1024, intermediate_size=128,
    ),
    "bailing-moe": bpe("BailingMoeV2ForCausalLM", "bailing_moe", **BAILING, num_nextn_predict_layers=0),
    "bailing-moe-next": bpe(
        "BailingMoeV2ForCausalLM", "bailing_moe", **BAILING, num_nextn_predict_layers=1,
        moe_shared_expert_intermediate_size=96, tie_word_embeddings=True,
    ),
    "dots1": bpe(
        "Dots1ForCausalLM", "dots1", head_dim=32, n_routed_experts=4, n_shared_experts=2, num_experts_per_tok=2,
        moe_intermediate_size=64, first_k_dense_replace=1, routed_scaling_factor=2.5, norm_topk_prob=True,
        scoring_func="sigmoid", num_hidden_layers=3,
    ),
    "qwen2-embedding": bpe(
        "Qwen2ForCausalLM", "qwen2", tie_word_embeddings=True, _headless=True,
        _files={"modules.json": MODULES, "1_Pooling/config.json": {"pooling_mode": "mean"}},
    ),
    "qwen3-embedding": bpe(
        "Qwen3ForCausalLM", "qwen3", head_dim=32, _headless=True,
        _files={"modules.json": MODULES, "1_Pooling/config.json": {"pooling_mode_lasttoken": True}},
    ),
    "qwen3": bpe("Qwen3ForCausalLM", "qwen3", head_dim=64, tie_word_embeddings=True),
    "qwen2moe": bpe("Qwen2MoeForCausalLM", "qwen2_moe", **MOE, shared_expert_intermediate_size=128),
    "qwen3moe": bpe("Qwen3MoeForCausalLM", "qwen3_moe", **MOE, head_dim=32),
    "qwen3moe-fused": bpe("Qwen3MoeForCausalLM", "qwen3_moe", **MOE, head_dim=32, _fused=True),
    "deepseek2-lite": bpe(
        "DeepseekV2ForCausalLM", "deepseek_v2", **LATENT, q_lora_rank=None, norm_topk_prob=False,
        routed_scaling_factor=1.0, scoring_func="softmax", topk_method="greedy", n_group=1, topk_group=1,
        rope_scaling=YARN | {"mscale": 0.707, "mscale_all_dim": 0.707},
    ),
    "deepseek3": bpe(
        "DeepseekV3ForCausalLM", "deepseek_v3", **LATENT | {"v_head_dim": 64, "first_k_dense_replace": 2},
        q_lora_rank=96, norm_topk_prob=True, routed_scaling_factor=2.5, scoring_func="sigmoid",
        topk_method="noaux_tc", n_group=2, topk_group=1, num_nextn_predict_layers=1,
        _extra={
            "model.layers.3.self_attn.o_proj.weight": (128, 256),
            "model.layers.3.mlp.experts.0.up_proj.weight": (64, 128),
        },
    ),
    "gemma": family("GemmaForCausalLM", "gemma", head_dim=64, tie_word_embeddings=None),
    "gemma-float16": family("GemmaForCausalLM", "gemma", head_dim=64, tie_word_embeddings=None, _dtypes=("F16",)),
    "gemma2": family(
        "Gemma2ForCausalLM", "gemma2", head_dim=64, tie_word_embeddings=None, attn_logit_softcapping=50.0,
        final_logit_softcapping=30.0, sliding_window=1024, query_pre_attn_scalar=64, _extra={"lm_head.weight": (8, 64)},
    ),
    "gemma3": family("Gemma3ForCausalLM", "gemma3_text", **GEMMA3, rope_local_base_freq=10000.0),
    "gemma3-linear-rope": family(
        "Gemma3ForCausalLM", "gemma3_text", **GEMMA3, rope_scaling={"rope_type": "linear", "factor": 8.0}
    ),
    "gemma3-multimodal": {
        "architectures": ["Gemma3ForConditionalGeneration"],
        "model_type": "gemma3",
        "text_config": {**BASE, **GEMMA3, "model_type": "gemma3_text", "num_hidden_layers": 2},
        "vision_config": {"hidden_size": 64, "model_type": "siglip_vision_model"},
        "_prefix": "language_model.",
        "_extra": {
            "vision_tower.vision_model.embeddings.patch_embedding.weight": (8, 64),
            "multi_modal_projector.a.weight": (8, 64),
        },
    },
    "gemma4": family(
        "Gemma4ForCausalLM", "gemma4_text", **GEMMA4, attention_k_eq_v=True, global_head_dim=64, head_dim=32,
        num_global_key_value_heads=1, hidden_size_per_layer_input=0, _without=("tokenizer.model",),
    ),
    "gemma4-shared-keys": {
        "architectures": ["Gemma4ForConditionalGeneration"],
        "model_type": "gemma4",
        "text_config": {
            **BASE, **GEMMA4, "model_type": "gemma4_text", "hidden_size_per_layer_input": 32, "head_dim": 32,
            "global_head_dim": 64, "vocab_size_per_layer_input": 2048, "num_kv_shared_layers": 2,
            "use_double_wide_mlp": True, "tie_word_embeddings": True,
        },
        "vision_config": {"hidden_size": 64, "model_type": "gemma4_vision"},
        "_without": ("tokenizer.model",),
        "_infix": "language_model.",
        "_extra": {"model.embed_vision.embedding_projection.weight": (8, 64)},
    },
    "gemma4-moe": family(
        "Gemma4ForCausalLM", "gemma4_text", **GEMMA4, head_dim=32, global_head_dim=64, hidden_size_per_layer_input=0,
        enable_moe_block=True, num_experts=4, top_k_experts=2, moe_intermediate_size=96, final_logit_softcapping=30.0,
        _without=("tokenizer.model",),
    ),
    "phi3": family("Phi3ForCausalLM", "phi3", original_max_position_embeddings=2048, sliding_window=1024),
    "phi3-longrope": family(
        "Phi3ForCausalLM", "phi3", original_max_position_embeddings=2048, max_position_embeddings=8192,
        rope_scaling=LONGROPE,
    ),
    "phi4-bpe": bpe("Phi3ForCausalLM", "phi3", original_max_position_embeddings=2048),
    "olmo": bpe("OlmoForCausalLM", "olmo", clip_qkv=8.0),
    "olmo2": bpe("Olmo2ForCausalLM", "olmo2"),
    "olmo3": bpe("Olmo3ForCausalLM", "olmo3", sliding_window=512, num_hidden_layers=4),
    "olmoe": bpe("OlmoeForCausalLM", "olmoe", num_experts=4, num_experts_per_tok=2),
    "stablelm": bpe("StableLmForCausalLM", "stablelm", layer_norm_eps=1e-5, partial_rotary_factor=0.25),
    "stablelm-parallel": bpe(
        "StableLmForCausalLM", "stablelm", layer_norm_eps=1e-5, partial_rotary_factor=0.25, use_parallel_residual=True,
        use_qkv_bias=True,
    ),
    "gpt-neox": bpe(
        "GPTNeoXForCausalLM", "gpt_neox", num_key_value_heads=None, layer_norm_eps=1e-5, rotary_pct=0.25,
        use_parallel_residual=True, hidden_act="gelu", _bare=True,
    ),
    "gpt2": GPT2,
    "gpt2-saved-again": {**GPT2, "n_inner": 512, "_prefix": "transformer."},
    "starcoder2": bpe("Starcoder2ForCausalLM", "starcoder2", norm_epsilon=1e-5, use_bias=True, sliding_window=1024),
}  # fmt: skip


def configuration(name: str) -> dict[str, Any]:
    over = VARIANTS[name]
    base = {} if {"text_config", "llm_config", "_plain"} & over.keys() else BASE
    return {k: v for k, v in (base | over).items() if v is not None and not k.startswith("_")}


def shapes(name: str) -> list[tuple[str, tuple[int, ...]]]:
    """Names and shapes of a variant's tensors, in a file's order."""
    over, config = VARIANTS[name], configuration(name)
    found: Iterable[tuple[str, tuple[int, ...]]] = expected_tensors(config)
    if over.get("_fused"):
        found = fused(dict(found), config)
    if over.get("_headless"):
        return sorted((tensor.removeprefix("model."), shape) for tensor, shape in found if tensor != "lm_head.weight")
    infix = "model." + over.get("_infix", "")
    named = [(over.get("_prefix", "") + tensor.replace("model.", infix, 1), shape) for tensor, shape in found]
    return sorted([*named, *over.get("_extra", {}).items()])


def fused(tensors: dict[str, tuple[int, ...]], config: dict[str, Any]) -> list[tuple[str, tuple[int, ...]]]:
    """All experts of a layer in two tensors."""
    kept = [(n, s) for n, s in tensors.items() if ".experts." not in n]
    width, hidden, experts = config["moe_intermediate_size"], config["hidden_size"], config["num_experts"]
    for i in range(config["num_hidden_layers"]):
        at = f"model.layers.{i}.mlp.experts."
        kept += [(at + "down_proj", (experts, hidden, width)), (at + "gate_up_proj", (experts, 2 * width, hidden))]
    return kept


def write(name: str, root: Path) -> Path:
    """Write a variant below ``root``; its folder's name feeds the converter's metadata heuristics."""
    over = VARIANTS[name]
    folder = root / f"Tiny-{name}-Base"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(configuration(name)))
    for path in over.get("_tokenizer", SENTENCEPIECE).glob("*token*"):
        if path.name not in over.get("_without", ()):
            shutil.copy(path, folder)
    for path, content in over.get("_files", {}).items():
        (folder / path).parent.mkdir(exist_ok=True)
        (folder / path).write_text(json.dumps(content))
    if "_tokens" in over:
        add_tokens(folder / "tokenizer.json", over["_tokens"])
    rng = np.random.default_rng(sum(name.encode()))
    shards: list[dict[str, tuple[str, tuple[int, ...], bytes]]] = [{} for _ in range(over.get("_shards", 1))]
    for number, (tensor, shape) in enumerate(shapes(name)):
        dtypes = over.get("_dtypes", ("BF16",))
        dtype = dtypes[number % len(dtypes)]
        blob = encode(rng.standard_normal(shape, np.float32) * np.float32(0.05), dtype)
        shards[number % len(shards)][tensor] = (dtype, shape, blob)
    write_shards(folder, shards)
    return folder


def write_shards(folder: Path, shards: list[dict[str, tuple[str, tuple[int, ...], bytes]]]) -> None:
    """One safetensors file, or several and their index; of each tensor its dtype, shape and bytes."""
    names = ["model.safetensors"]
    if len(shards) > 1:
        names = [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
        index = {tensor: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    for name, shard in zip(names, shards, strict=True):
        entries, at = {}, 0
        for tensor, (dtype, shape, blob) in shard.items():
            entries[tensor] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + len(blob)]}
            at += len(blob)
        text = json.dumps(entries).encode()
        body = b"".join(blob for _, _, blob in shard.values())
        (folder / name).write_bytes(len(text).to_bytes(8, "little") + text + body)


def add_tokens(path: Path, texts: Iterable[str]) -> None:
    """Special tokens that a family's converter looks for, in ids that the vocabulary leaves free."""
    document = json.loads(path.read_text())
    taken = {*document["model"]["vocab"].values(), *(entry["id"] for entry in document["added_tokens"])}
    free = (i for i in range(NARROW["vocab_size"]) if i not in taken)
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    document["added_tokens"] += [{"id": i, "content": text, **plain} for i, text in zip(free, texts, strict=False)]
    path.write_text(json.dumps(document))


def encode(values: np.ndarray, dtype: str) -> bytes:
    if dtype == "BF16":
        return (values.view(np.uint32) >> 16).astype(np.uint16).tobytes()
    return values.astype({"F32": np.float32, "F16": np.float16}[dtype]).tobytes()


def write_matrix(folder: Path, path: Path) -> Path:
    """An importance matrix for a written variant. One weight has no entry, and one expert of each stack was never used.

    A weight [experts or 1, rows, cols] has float32 sums of squares [experts or 1, cols] and counts [experts or 1, 1].
    """
    rng, tensors = np.random.default_rng(7), {}
    specs = [spec for spec in tensor_specs(open_path(folder, str(folder))) if len(spec.shape) > 1]
    for spec in specs[:1] + specs[2:]:
        matrices = spec.shape[0] if len(spec.shape) > 2 else 1
        counts = np.full((matrices, 1), 16, np.float32)
        counts[1:2] = 0
        sums = (10.0 ** rng.uniform(-3, 3, (matrices, spec.shape[-1]))).astype(np.float32)
        tensors |= {f"{spec.name}.in_sum2": sums * (counts > 0), f"{spec.name}.counts": counts}
    kvs = [
        encode_kv("general.type", "imatrix", GGUFType.STRING),
        encode_kv("imatrix.datasets", ["random.txt"], GGUFType.ARRAY, GGUFType.STRING),
        encode_kv("imatrix.chunk_count", 3, GGUFType.UINT32),
        encode_kv("imatrix.chunk_size", 512, GGUFType.UINT32),
    ]
    body = b"".join(data.tobytes() + bytes(-data.nbytes % 32) for data in tensors.values())
    path.write_bytes(header(kvs, [(name, data.shape, "F32") for name, data in tensors.items()]) + body)
    return path


def digest(path: Path) -> str:
    return f"{blake3.blake3(path.read_bytes()).hexdigest()}/{path.stat().st_size}"


def converted(llama: Path, variant: str, folder: Path, out: Path) -> bool:
    """Have llama.cpp convert a variant; False, and why, where it does not."""
    bare = ["-c", BARE] if VARIANTS[variant].get("_bare") else []
    command = [sys.executable, *bare, "convert_hf_to_gguf.py", str(folder), "--outfile", str(out)]
    done = subprocess.run(command, cwd=llama, capture_output=True, text=True)
    if done.returncode:
        print(f"{variant}: the converter stopped: {done.stderr.strip().splitlines()[-1]}")
    return not done.returncode


def quantized(llama: Path, source: Path, types: Iterable[str], words: Iterable[str] = ()) -> dict[str, str]:
    """What llama-quantize makes of a file, by type. It runs beside the matrix, so that the name it notes is short."""
    found = {}
    for type_ in types:
        made = source.parent / "made.gguf"
        command = [llama / "build/bin/llama-quantize", *words, source, made, type_]
        subprocess.run(command, check=True, capture_output=True, cwd=source.parent)
        found[type_] = digest(made)
    return found


def main(llama: Path, out: Path, names: list[str]) -> None:
    record = json.loads(out.read_text()) if out.is_file() else {"files": {}, "with matrix.gguf": {}}
    plain, weighed = record["files"], record["with matrix.gguf"]
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        for variant in names or VARIANTS:
            folder, source = write(variant, root), root / "converted.gguf"
            if not converted(llama, variant, folder, source):
                continue
            plain[variant] = quantized(llama, source, (*TYPES, *MORE_TYPES.get(variant, ())))
            if variant in WEIGHED:
                write_matrix(folder, root / "matrix.gguf")
                weighed[variant] = quantized(llama, source, WEIGHED[variant], ("--imatrix", "matrix.gguf"))
            shutil.rmtree(folder)
    document = {
        "llama.cpp": "llama-cpp-python 0.3.36",
        "command": "convert_hf_to_gguf.py MODEL; llama-quantize [--imatrix matrix.gguf] CONVERTED OUT TYPE",
        "files": {name: plain[name] for name in VARIANTS if name in plain},
        "with matrix.gguf": {name: weighed[name] for name in WEIGHED if name in weighed},
    }
    out.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve(), Path(sys.argv[2]), sys.argv[3:])
