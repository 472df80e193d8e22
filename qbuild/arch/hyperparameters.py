"""A configuration as GGUF hyperparameters: the general list, the lists of families that have their own, the extras.

Source: convert_hf_to_gguf.py of llama.cpp (ggml 0.25). Names on the left are gguf's writer methods without ``add_``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from qbuild.arch.shapes import CONVERT_ELSEWHERE, feed_forward, find, layer_kinds, of_full_attention, rotated
from qbuild.arch.vocab import read_json
from qbuild.errors import InputError

__all__ = ["parameters"]

Values = dict[str, Any]

# A key per line; the first name that the configuration has counts, and null is not written.
COMMON = (
    ("context_length", "max_position_embeddings", "n_ctx", "n_positions", "max_length", "max_sequence_length",
     "model_max_length"),
    ("embedding_length", "hidden_size", "n_embd", "dim"),
    ("feed_forward_length", "prefix_dense_intermediate_size", "dense_intermediate_size", "intermediate_size", "n_inner",
     "hidden_dim"),
    ("head_count", "num_attention_heads", "n_head", "n_heads"),
    ("head_count_kv", "num_key_value_heads", "n_kv_heads"),
)  # fmt: skip
AFTER_ROPE = (
    ("layer_norm_rms_eps", "rms_norm_eps", "norm_eps"),
    ("layer_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_epsilon"),
    ("expert_count", "num_local_experts", "num_experts", "n_routed_experts"),
    ("expert_used_count", "num_experts_per_tok", "num_experts_per_token", "top_k_experts"),
    ("expert_group_count", "n_group"),
    ("expert_group_used_count", "topk_group"),
    ("expert_gating_func", "score_function", "scoring_func", "score_func", "moe_router_activation",
     "moe_router_activation_func", "expert_selection_fn"),
    ("key_length", "head_dim"),
    ("value_length", "head_dim"),
)  # fmt: skip
GATING = ("softmax", "sigmoid", "sqrtsoftplus")
# Families that do not use the general list: all of theirs, in order. These keys must be there.
OWN: dict[str, tuple[tuple[str, str], ...]] = {}
OWN["gemma"] = (
    ("context_length", "max_position_embeddings"),
    ("embedding_length", "hidden_size"),
    ("block_count", "num_hidden_layers"),
    ("feed_forward_length", "intermediate_size"),
    ("head_count", "num_attention_heads"),
    ("head_count_kv", "num_key_value_heads"),
    ("layer_norm_rms_eps", "rms_norm_eps"),
    ("key_length", "head_dim"),
    ("value_length", "head_dim"),
)
OWN["gemma2"] = (
    *OWN["gemma"],
    ("attn_logit_softcapping", "attn_logit_softcapping"),
    ("final_logit_softcapping", "final_logit_softcapping"),
    ("sliding_window", "sliding_window"),
)
OWN["stablelm"] = (
    ("context_length", "max_position_embeddings"),
    ("embedding_length", "hidden_size"),
    ("block_count", "num_hidden_layers"),
    ("feed_forward_length", "intermediate_size"),
    ("rope_dimension_count", "rope_dimension_count"),
    ("head_count", "num_attention_heads"),
    ("head_count_kv", "num_key_value_heads"),
    ("parallel_residual", "use_parallel_residual"),
    ("layer_norm_eps", "layer_norm_eps"),
)
OWN["gptneox"] = tuple(pair for pair in OWN["stablelm"] if pair[0] != "head_count_kv")
OWN["phi3"] = (
    ("context_length", "max_position_embeddings"),
    ("rope_scaling_orig_ctx_len", "original_max_position_embeddings"),
    ("embedding_length", "hidden_size"),
    ("feed_forward_length", "intermediate_size"),
    ("block_count", "num_hidden_layers"),
    ("head_count", "num_attention_heads"),
    ("head_count_kv", "num_key_value_heads"),
    ("layer_norm_rms_eps", "rms_norm_eps"),
    ("rope_dimension_count", "rope_dimension_count"),
    ("rope_freq_base", "rope_theta"),
    ("sliding_window", "sliding_window"),
)
OWN["gpt2"] = (
    ("block_count", "n_layer"),
    ("context_length", "n_ctx"),
    ("embedding_length", "n_embd"),
    ("feed_forward_length", "feed_forward_length"),
    ("head_count", "n_head"),
    ("layer_norm_eps", "layer_norm_epsilon"),
)
OWN["phimoe"] = (*OWN["phi3"], ("expert_used_count", "num_experts_per_tok"), ("expert_count", "num_local_experts"))
OWN["phi2"] = (
    ("context_length", "max_position_embeddings"),
    ("embedding_length", "hidden_size"),
    ("feed_forward_length", "feed_forward_length"),
    ("block_count", "num_hidden_layers"),
    ("head_count", "num_attention_heads"),
    ("head_count_kv", "num_attention_heads"),
    ("layer_norm_eps", "layer_norm_eps"),
    ("rope_dimension_count", "rope_dimension_count"),
    ("add_bos_token", "add_bos_token"),
)
GRANITE = (
    ("attention_scale", "attention_multiplier"),
    ("embedding_scale", "embedding_multiplier"),
    ("residual_scale", "residual_multiplier"),
    ("logit_scale", "logits_scaling"),
)


def parameters(arch: str, config: Values, folder: Path) -> tuple[Values, Values]:
    """(what the converter writes ahead of the general description, the hyperparameters)."""
    rope = rope_parameters(config)
    if arch in OWN:
        derived = DERIVED[arch](config, rope) if arch in DERIVED else {}
        return _longrope(config, rope) if arch in ("phi3", "phimoe") else {}, _own(OWN[arch], {**config, **derived})
    if arch in ("granite", "granitemoe"):
        config = {k: v for k, v in config.items() if k != "head_dim"}
    if arch == "deepseek2":
        config = {"rms_norm_eps": 1e-6, **config, "num_key_value_heads": 1}
    if arch == "hunyuan-dense":
        config = {k: v for k, v in config.items() if k != "num_experts"}
    if arch in ("lfm2", "lfm2moe"):
        heads = config["num_key_value_heads"]
        config = {**config, "num_key_value_heads": [heads * (kind != "conv") for kind in layer_kinds(config)]}
    values = _common(config, rope)
    if arch in EXTRAS:
        values |= EXTRAS[arch](config, rope)
    if arch in ("qwen2", "qwen3", "arcee"):
        _refuse_other_uses(arch, config, folder)
        values |= _pooling(folder)
    return {}, values


def rope_parameters(config: Values) -> Values:
    """Rope settings; those at the root of the configuration are mirrored in them, unless layers differ."""
    rope = dict(config.get("rope_parameters", config.get("rope_scaling")) or {})
    if "full_attention" in rope or "sliding_attention" in rope:
        return rope
    local = find(config, "local_rope_theta", "rope_local_theta", "rope_theta_local", "swa_rope_theta",
                 "rope_local_base_freq")  # fmt: skip
    if local is not None:
        rope["sliding_attention"] = {"rope_theta": local}
    mirrored = {
        "rope_theta": find(config, "global_rope_theta", "rope_global_theta", "rope_theta_global", "rope_theta",
                           "rotary_emb_base"),
        "rope_type": rope.get("type"),
        "partial_rotary_factor": find(config, "partial_rotary_factor", "rope_pct", "rope_percent"),
        "original_max_position_embeddings": config.get("original_max_position_embeddings"),
    }  # fmt: skip
    return {**{k: v for k, v in mirrored.items() if v is not None}, **rope}


def _listed(keys: Sequence[tuple[str, ...]], config: Values) -> Values:
    found = {name: find(config, *sources) for name, *sources in keys}
    return {name: value for name, value in found.items() if value is not None}


def _own(keys: Sequence[tuple[str, str]], config: Values) -> Values:
    return {name: config[source] for name, source in keys}


def _common(config: Values, rope: Values) -> Values:
    layers = find(config, "n_layers", "num_hidden_layers", "n_layer", "num_layers")
    values = {"block_count": layers, **_listed(COMMON, config)}
    if config.get("is_causal") is False:
        values["causal_attention"] = False
    full = rope.get("full_attention", rope)
    values |= _rope_scaling(full)
    if "mrope_section" in rope:
        values["rope_dimension_sections"] = [*rope["mrope_section"], 0, 0, 0, 0][:4]
    if full.get("rope_theta") is not None:
        values["rope_freq_base"] = full["rope_theta"]
    sliding = rope.get("sliding_attention", {}).get("rope_theta")
    if sliding is not None:
        values["rope_freq_base_swa"] = sliding
    values |= _listed(AFTER_ROPE, config)
    if "expert_gating_func" in values:
        values["expert_gating_func"] = _gating(values["expert_gating_func"])
    return values


def _gating(name: str) -> Any:
    import gguf

    if name not in GATING:
        raise InputError("config.json", f"experts are chosen by {name!r}, which llama.cpp does not convert either",
                         "one of: " + ", ".join(GATING))  # fmt: skip
    return gguf.ExpertGatingFuncType[name.upper()]


def _rope_scaling(rope: Values) -> Values:
    import gguf

    kind, factor = rope.get("rope_type"), rope.get("factor")
    if kind == "linear" and factor is not None:
        return {"rope_scaling_type": gguf.RopeScalingType.LINEAR, "rope_scaling_factor": factor}
    if kind == "yarn" and factor is not None:
        yarn = (
            ("rope_scaling_yarn_ext_factor", "extrapolation_factor"),
            ("rope_scaling_yarn_attn_factor", "attention_factor", "attn_factor"),
            ("rope_scaling_yarn_beta_fast", "beta_fast"),
            ("rope_scaling_yarn_beta_slow", "beta_slow"),
        )
        return {
            "rope_scaling_type": gguf.RopeScalingType.YARN,
            "rope_scaling_factor": factor,
            "rope_scaling_orig_ctx_len": rope["original_max_position_embeddings"],
        } | _listed(yarn, rope)
    return {"rope_scaling_type": gguf.RopeScalingType.LONGROPE} if kind in ("su", "longrope") else {}


def _llama(config: Values, _: Values) -> Values:
    dimension = config.get("head_dim")
    if dimension is None:
        dimension = config["hidden_size"] // config["num_attention_heads"]
    return {"vocab_size": config["vocab_size"], "rope_dimension_count": dimension}


def _mistral3(config: Values, rope: Values) -> Values:
    values = _llama(config, rope)
    if config.get("model_type") == "ministral3":
        values["rope_scaling_yarn_log_mul"] = rope["mscale_all_dim"]
        values["attn_temperature_scale"] = rope["llama_4_scaling_beta"]
    return values


def _granite(config: Values, rope: Values) -> Values:
    values = _llama(config, rope) | {name: config[key] for name, key in GRANITE if config.get(key)}
    if shared := config.get("shared_intermediate_size"):
        values["expert_shared_feed_forward_length"] = shared
    return values | (_granite4(config, rope) if config.get("model_type") == "granitemoehybrid" else {})


def _granite4(config: Values, _: Values) -> Values:
    """What the converter writes of state space layers for a Granite 4 that has none."""
    heads = find(config, "n_heads", "num_heads", "mamba_n_heads", "mamba_num_heads")
    inner = find(config, "expand", "num_heads", "mamba_expand", "mamba_num_heads")
    state = ("state_size", "d_state", "state_dim", "ssm_state_size", "mamba_state_size", "mamba_d_state")
    values = {
        "ssm_conv_kernel": find(config, "conv_kernel", "d_conv", "mamba_conv_kernel", "mamba_d_conv"),
        "ssm_state_size": find(config, *state),
        "ssm_group_count": find(config, "n_groups", "num_groups", "mamba_n_groups", "mamba_num_groups"),
        "ssm_inner_size": inner * find(config, "mamba_head_dim", "hidden_size", "d_model"),
        "ssm_time_step_rank": heads,
        "rope_dimension_count": config.get("attn_rotary_emb") or None,
        "head_count_kv": [config["num_key_value_heads"]] * config["num_hidden_layers"],
        "rope_scaling_finetuned": True,
    }
    return {name: value for name, value in values.items() if value is not None}


def _command_r(config: Values, _: Values) -> Values:
    import gguf

    return {
        "context_length": find(config, "model_max_length", "max_position_embeddings"),
        "logit_scale": config["logit_scale"],
        "rope_scaling_type": gguf.RopeScalingType.NONE,
    }


def _cohere2(config: Values, _: Values) -> Values:
    import gguf

    return {
        "logit_scale": config["logit_scale"],
        "sliding_window": config["sliding_window"],
        "vocab_size": config["vocab_size"],
        "rope_dimension_count": int(config["rotary_pct"] * _head(config)),
        "rope_scaling_type": gguf.RopeScalingType.NONE,
    }


def _glm4(config: Values, rope: Values) -> Values:
    return {"rope_dimension_count": int((config.get("head_dim") or _head(config)) * _part(rope, 0.5))}


def _part(rope: Values, default: float) -> float:
    """The part of a head that is rotated."""
    found = rope.get("partial_rotary_factor")
    return default if found is None else float(found)


def _exaone4(config: Values, _: Values) -> Values:
    values = {"vocab_size": config["vocab_size"]}
    if config.get("sliding_window") is None:
        return values
    values["sliding_window"] = config["sliding_window"]
    if "layer_types" in config:
        values["sliding_window_pattern"] = [kind == "sliding_attention" for kind in config["layer_types"]]
    return values


def _ernie_moe(config: Values, _: Values) -> Values:
    """The converter divides by the heads of keys and values, whatever that may mean."""
    values = {
        "expert_count": config["moe_num_experts"],
        "expert_used_count": config["moe_k"],
        "interleave_moe_layer_step": config["moe_layer_interval"],
        "leading_dense_block_count": config["moe_layer_start_index"],
        "expert_feed_forward_length": config.get("moe_intermediate_size"),
        "expert_shared_count": config.get("moe_num_shared_experts"),
    }
    if values["expert_shared_count"]:
        shared = config["intermediate_size"] // config["num_key_value_heads"]
        values["expert_shared_feed_forward_length"] = shared
    return {name: value for name, value in values.items() if value is not None}


def _minicpm(config: Values, _: Values) -> Values:
    return {
        "embedding_scale": float(config["scale_emb"]),
        "residual_scale": config["scale_depth"] / config["num_hidden_layers"] ** 0.5,
        "logit_scale": config["hidden_size"] / config["dim_model_base"],
    }


def _qwen3vl(config: Values, _: Values) -> Values:
    return {"num_deepstack_layers": len(config.get("vision_config", {}).get("deepstack_visual_indexes", []))}


def _glm4_moe(config: Values, rope: Values) -> Values:
    import gguf

    keys = (
        ("expert_count", "n_routed_experts"),
        ("expert_feed_forward_length", "moe_intermediate_size"),
        ("expert_shared_count", "n_shared_experts"),
        ("leading_dense_block_count", "first_k_dense_replace"),
        ("expert_weights_scale", "routed_scaling_factor"),
        ("expert_weights_norm", "norm_topk_prob"),
        ("nextn_predict_layers", "num_nextn_predict_layers"),
    )
    return {
        "block_count": config["num_hidden_layers"] + config.get("num_nextn_predict_layers", 0),
        **_glm4(config, rope),
        **_listed(keys[:4], config),
        "expert_gating_func": gguf.ExpertGatingFuncType.SIGMOID,
        **_listed(keys[4:], config),
    }


def _lfm2(config: Values, _: Values) -> Values:
    return {
        "vocab_size": config["vocab_size"],
        "shortconv_l_cache": config["conv_L_cache"],
        "layer_norm_rms_eps": config["norm_eps"],
        "feed_forward_length": feed_forward(config),
    }


def _lfm2_moe(config: Values, _: Values) -> Values:
    import gguf

    return {
        "expert_feed_forward_length": config["moe_intermediate_size"],
        "leading_dense_block_count": config["num_dense_layers"],
        "expert_gating_func": gguf.ExpertGatingFuncType.SIGMOID,
        "vocab_size": config["vocab_size"],
        "shortconv_l_cache": config["conv_L_cache"],
    }


def _hunyuan(config: Values, rope: Values) -> Values:
    """Rotation slowed by a factor, for a context that config.json understates."""
    import gguf

    if rope.get("rope_type") != "dynamic":
        return {}
    base, dim = rope.get("rope_theta", 10000.0), config["head_dim"]
    if base != 10000.0 or config["max_position_embeddings"] not in (32 * 1024, 256 * 1024):
        fact = f"dynamic rope with a base of {base} and {config['max_position_embeddings']} positions is not supported"
        raise InputError("config.json", fact, "llama.cpp's converter stops too")
    return {
        "rope_freq_base": base * (rope.get("alpha", 50) ** (dim / (dim - 2))),
        "rope_scaling_type": gguf.RopeScalingType.NONE,
        "rope_scaling_factor": 1,
        "rope_scaling_orig_ctx_len": 256 * 1024,
        "context_length": 256 * 1024,
    }


def _bailing(config: Values, rope: Values) -> Values:
    width, shared, more = config["moe_intermediate_size"], config["num_shared_experts"], "num_nextn_predict_layers"
    values = {
        "block_count": config["num_hidden_layers"] + (config.get(more) or 0),
        **_glm4(config, rope),
        "leading_dense_block_count": config["first_k_dense_replace"],
        "vocab_size": config["vocab_size"],
        "expert_feed_forward_length": width,
        "expert_shared_feed_forward_length": config.get("moe_shared_expert_intermediate_size", width * shared),
        "expert_weights_scale": config["routed_scaling_factor"],
        "expert_shared_count": shared,
        "expert_weights_norm": config["norm_topk_prob"],
    }
    return values | ({"nextn_predict_layers": config[more]} if config.get(more) is not None else {})


def _dots1(config: Values, rope: Values) -> Values:
    return _qwen_moe(config, rope) | {
        "leading_dense_block_count": config["first_k_dense_replace"],
        "expert_shared_count": config["n_shared_experts"],
        "expert_weights_scale": config["routed_scaling_factor"],
        "expert_weights_norm": config["norm_topk_prob"],
    }


def _nemotron(config: Values, rope: Values) -> Values:
    import gguf

    values = {
        "vocab_size": config["vocab_size"],
        "layer_norm_eps": find(config, "layer_norm_eps", "layer_norm_epsilon", "norm_epsilon", "norm_eps"),
        "rope_dimension_count": rotated(config, rope["partial_rotary_factor"]),
    }
    factor = config.get("factor") or rope.get("factor")
    if factor is None:
        return values | {"rope_scaling_type": gguf.RopeScalingType.NONE}
    return values | {"rope_scaling_type": gguf.RopeScalingType.LINEAR, "rope_scaling_factor": factor}


def _qwen_moe(config: Values, _: Values) -> Values:
    keys = (
        ("expert_feed_forward_length", "moe_intermediate_size"),
        ("expert_shared_feed_forward_length", "shared_expert_intermediate_size"),
    )
    return _listed(keys, config)


def _deepseek2(config: Values, rope: Values) -> Values:
    """Latent attention: one key-value head as wide as the ranks, and what a head is once it is unpacked."""
    rank, rotated_part = config.get("kv_lora_rank", 512), config["qk_rope_head_dim"]
    experts = config.get("n_routed_experts")
    values = {
        "leading_dense_block_count": config.get("first_k_dense_replace"),
        "vocab_size": config["vocab_size"],
        "q_lora_rank": config.get("q_lora_rank"),
        "kv_lora_rank": rank,
        "key_length": rank + rotated_part,
        "value_length": rank,
        "key_length_mla": config["qk_nope_head_dim"] + rotated_part,
        "value_length_mla": config["v_head_dim"],
        "expert_feed_forward_length": find(config, "moe_intermediate_size", "intermediate_size"),
        "expert_count": experts,
        "expert_shared_count": config.get("n_shared_experts", 0),
        "expert_weights_scale": config.get("routed_scaling_factor"),
        "expert_weights_norm": config.get("norm_topk_prob") or None,
        "rope_dimension_count": rotated_part,
    }
    if values["leading_dense_block_count"] is None:
        values["leading_dense_block_count"] = config["num_hidden_layers"] if experts is None else 0
    if rope.get("mscale_all_dim") is not None:
        values["rope_scaling_yarn_log_mul"] = 0.1 * rope["mscale_all_dim"]
    return {name: value for name, value in values.items() if value is not None}


def _gemma3(config: Values, rope: Values) -> Values:
    full = rope.get("full_attention", rope)
    values = {
        "context_length": config.get("max_position_embeddings", 131072),
        "head_count": config.get("num_attention_heads", 8),
        "layer_norm_rms_eps": config.get("rms_norm_eps", 1e-6),
        "key_length": config.get("head_dim", 256),
        "value_length": config.get("head_dim", 256),
        "rope_freq_base": full.get("rope_theta", 1_000_000.0),
    }
    if config.get("final_logit_softcapping"):
        values["final_logit_softcapping"] = config["final_logit_softcapping"]
    if config.get("sliding_window_pattern") != 1:
        values["sliding_window"] = config["sliding_window"]
    return values | {"head_count_kv": config.get("num_key_value_heads", 4)}


def _gemma4(config: Values, rope: Values) -> Values:
    head, heads = config["head_dim"], of_full_attention(config, "num_key_value_heads", "num_global_key_value_heads")
    full, kinds = of_full_attention(config, "head_dim", "global_head_dim"), config["layer_types"]
    shared, width = config["num_kv_shared_layers"], config["intermediate_size"]
    if full is None:
        raise KeyError("global_head_dim")
    values = _gemma3(config, rope) | {
        "shared_kv_layers": shared,
        "embedding_length_per_layer_input": config.get("hidden_size_per_layer_input") or 0,
        "sliding_window_pattern": [kind == "sliding_attention" for kind in kinds],
        "key_length": full,
        "value_length": full,
        "key_length_swa": head,
        "value_length_swa": head,
        "expert_feed_forward_length": find(config, "expert_intermediate_size", "moe_intermediate_size"),
    }
    if config.get("use_double_wide_mlp"):
        first = config["num_hidden_layers"] - shared
        values["feed_forward_length"] = [width * (1 + (i >= first)) for i in range(config["num_hidden_layers"])]
    if heads is not None:
        sliding = config["num_key_value_heads"]
        values["head_count_kv"] = [sliding if kind == "sliding_attention" else heads for kind in kinds]
    values["rope_dimension_count"] = full
    values["rope_dimension_count_swa"] = int(head * _part(rope, 1.0))
    return {name: value for name, value in values.items() if value is not None}


def _olmo(config: Values, _: Values) -> Values:
    clamp = config.get("clip_qkv")
    return {"layer_norm_eps": 1e-5} | ({} if clamp is None else {"clamp_kqv": clamp})


def _olmoe(_config: Values, _rope: Values) -> Values:
    return {"layer_norm_rms_eps": 1e-5}


def _olmo2(config: Values, _: Values) -> Values:
    """OLMo 3 has windows in three layers of four."""
    if "sliding_window" not in config:
        return {}
    every = ["full_attention" if (i + 1) % 4 == 0 else "sliding_attention" for i in range(config["num_hidden_layers"])]
    pattern = [kind == "sliding_attention" for kind in config.get("layer_types", every)]
    return {"sliding_window": config["sliding_window"], "sliding_window_pattern": pattern}


def _head(config: Values) -> int:
    """Width of a head where no key says it."""
    return int(config["hidden_size"] // config["num_attention_heads"])


def _stablelm(config: Values, rope: Values) -> Values:
    return {
        "rope_dimension_count": int(rope["partial_rotary_factor"] * _head(config)),
        "use_parallel_residual": config.get("use_parallel_residual", True),
        "layer_norm_eps": find(config, "layer_norm_eps", "norm_eps"),
    }


def _gptneox(config: Values, rope: Values) -> Values:
    """The converter wants rotary_pct, which transformers 5 renames: with it, it stops."""
    part = config["rotary_pct"] if "rotary_pct" in config else rope["partial_rotary_factor"]
    return {
        "rope_dimension_count": int(part * _head(config)),
        "use_parallel_residual": config.get("use_parallel_residual", True),
    }


def _gemma(config: Values, _: Values) -> Values:
    return {"num_key_value_heads": config.get("num_key_value_heads", config["num_attention_heads"])}


def _gpt2(config: Values, _: Values) -> Values:
    return {"feed_forward_length": 4 * config["n_embd"]}


def _phi2(config: Values, rope: Values) -> Values:
    """The converter takes four times the hidden size for granted, whatever intermediate_size says."""
    return {
        "max_position_embeddings": find(config, "n_positions", "max_position_embeddings"),
        "feed_forward_length": 4 * config["hidden_size"],
        "layer_norm_eps": find(config, "layer_norm_epsilon", "layer_norm_eps"),
        "rope_dimension_count": rotated(config, rope["partial_rotary_factor"]),
        "add_bos_token": False,
    }


def _phi3(config: Values, rope: Values) -> Values:
    return {
        "max_position_embeddings": find(config, "n_positions", "max_position_embeddings"),
        "original_max_position_embeddings": rope["original_max_position_embeddings"],
        "rope_dimension_count": rotated(config, rope.get("partial_rotary_factor", 1.0)),
        "rope_theta": rope.get("full_attention", rope)["rope_theta"],
        "sliding_window": config.get("sliding_window") or 0,  # zero tells Phi-4 from the others
    }


def _longrope(config: Values, rope: Values) -> Values:
    """Phi's attention factor, which the converter writes while it makes the tensors of rope factors."""
    if not rope.get("long_factor"):
        return {}
    old = rope["original_max_position_embeddings"]
    scale, kind = find(config, "n_positions", "max_position_embeddings") / old, rope.get("rope_type", "").lower()
    if kind in ("su", "longrope"):
        return {"rope_scaling_attn_factors": math.sqrt(1 + math.log(scale) / math.log(old)) if scale > 1.0 else 1.0}
    if kind == "yarn":
        return {"rope_scaling_attn_factors": 0.1 * math.log(scale) + 1.0 if scale > 1.0 else 1.0}
    raise InputError("config.json", f"rope type {kind!r} is not supported with long and short factors",
                     "llama.cpp's converter stops too")  # fmt: skip


Extra = Callable[[Values, Values], Values]
EXTRAS: dict[str, Extra] = {
    "llama": _llama,
    "smollm3": _llama,
    "granite": _granite,
    "granitemoe": _granite,
    "arcee": _llama,
    "mistral3": _mistral3,
    "command-r": _command_r,
    "cohere2": _cohere2,
    "glm4": _glm4,
    "glm4moe": _glm4_moe,
    "lfm2": _lfm2,
    "lfm2moe": _lfm2_moe,
    "hunyuan-dense": _hunyuan,
    "exaone4": _exaone4,
    "ernie4_5-moe": _ernie_moe,
    "minicpm": _minicpm,
    "qwen3vl": _qwen3vl,
    "bailingmoe2": _bailing,
    "dots1": _dots1,
    "nemotron": _nemotron,
    "qwen2moe": _qwen_moe,
    "qwen3moe": _qwen_moe,
    "deepseek2": _deepseek2,
    "gemma3": _gemma3,
    "gemma4": _gemma4,
    "olmo": _olmo,
    "olmo2": _olmo2,
    "olmoe": _olmoe,
}
DERIVED: dict[str, Extra] = {
    "gemma": _gemma,
    "gemma2": _gemma,
    "stablelm": _stablelm,
    "gptneox": _gptneox,
    "gpt2": _gpt2,
    "phi2": _phi2,
    "phi3": _phi3,
    "phimoe": _phi3,
}


POOLING = {"mean": "MEAN", "cls": "CLS", "lasttoken": "LAST"}


def _pooling(folder: Path) -> Values:
    """How an embedding model makes one vector of a text's, as sentence-transformers keeps it."""
    import gguf

    modules = read_json(folder / "modules.json") or []
    where = next((module["path"] for module in modules if module["type"].endswith("Pooling")), None)
    if where is None:
        return {}
    if where != "1_Pooling" or (found := read_json(folder / where / "config.json")) is None:
        raise InputError(str(folder), f"modules.json names {where}, which is not there", "fetch 1_Pooling/config.json")
    keys = {"pooling_mode_mean_tokens": "mean", "pooling_mode_cls_token": "cls", "pooling_mode_lasttoken": "lasttoken"}
    mode = next((mode for key, mode in keys.items() if found.get(key)), found.get("pooling_mode"))
    if mode not in POOLING:
        raise InputError(str(folder), f"pooling {mode!r} is not supported", "llama.cpp's converter stops too")
    return {"pooling_type": gguf.PoolingType[POOLING[mode]]}


def _refuse_other_uses(arch: str, config: Values, folder: Path) -> None:
    """Rerankers of this family get other metadata, and other tensors."""
    readme = folder / "README.md"
    hints = [folder.name, config.get("_name_or_path", ""), *(config.get("architectures") or [])]
    text = readme.read_text(encoding="utf-8").lower() if readme.is_file() else ""
    reranks = "# qwen3-reranker" in text or any("qwen3-reranker" in str(hint).lower() for hint in hints)
    if arch == "qwen3" and reranks:
        fact = "a reranking model, which qbuild does not convert yet"
        raise InputError(str(folder), fact, CONVERT_ELSEWHERE)
