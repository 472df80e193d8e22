"""Record which type llama-quantize gives each tensor of every family: its dry run over deep, sparse models.

    python tests/arch/make_types.py LLAMA_CPP OUT.json.gz [MODEL ...]

Tensors come from a configuration alone, as in a plan with nothing on disk.
"""

from __future__ import annotations

import gzip
import importlib.util
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import gguf

from qbuild.arch.convert import ModelFacts, Piece, TensorSpec, Transform, model_facts, tensor_specs
from qbuild.arch.hyperparameters import parameters
from qbuild.arch.metadata import _kv, load_config
from qbuild.arch.shapes import expected_tensors
from qbuild.checkpoint import shapes
from qbuild.ggml import FILE_TYPES

HERE = Path(__file__).parent
DEEP = {
    "num_hidden_layers": 26, "hidden_size": 512, "intermediate_size": 1024, "num_attention_heads": 8,
    "num_key_value_heads": 4, "vocab_size": 640, "head_dim": 64, "moe_intermediate_size": 256,
    "shared_expert_intermediate_size": 512, "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5, "layer_norm_eps": 1e-5, "norm_epsilon": 1e-5, "sliding_window": 1024, "rope_theta": 10000.0,
    "original_max_position_embeddings": 4096, "rotary_pct": 0.25, "partial_rotary_factor": 0.25,
    "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0, "pad_token_id": 0, "eos_token_id": 1,
    "bos_token_id": 2,
}  # fmt: skip
LATENT = {
    "num_key_value_heads": 8, "kv_lora_rank": 256, "qk_nope_head_dim": 64, "qk_rope_head_dim": 32, "v_head_dim": 64,
    "n_routed_experts": 6, "n_shared_experts": 2, "num_experts_per_tok": 2, "first_k_dense_replace": 1,
    "scoring_func": "softmax",
}  # fmt: skip
GEMMA4 = {
    "num_hidden_layers": 24, "layer_types": (["sliding_attention"] * 5 + ["full_attention"]) * 4, "head_dim": 64,
    "global_head_dim": 128, "vocab_size_per_layer_input": 640, "tie_word_embeddings": True, "rope_theta": None,
    "attn_logit_softcapping": None, "partial_rotary_factor": None, "original_max_position_embeddings": None,
    "rope_parameters": {
        "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
        "full_attention": {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1000000.0},
    },
}  # fmt: skip
LFM2 = {"norm_eps": 1e-5, "block_auto_adjust_ff_dim": False, "conv_L_cache": 3, "tie_word_embeddings": True}
# Names that exist in some architecture or other; llama-quantize goes by name alone.
NAMES = (
    "position_embd.weight", "token_types.weight", "blk.0.attn_rel_b.weight", "blk.0.time_mix_w1.weight",
    "blk.0.time_mix_g2.weight", "blk.0.time_mix_lerp_fused.weight", "blk.0.time_mix_key.weight",
    "blk.0.ssm_conv1d.weight", "blk.0.ssm_in.weight", "blk.0.shortconv.conv.weight", "blk.0.laurel_l.weight",
    "blk.0.altup_router.weight", "per_layer_model_proj.weight", "per_layer_token_embd.weight",
    "blk.0.indexer.k_proj.weight", "blk.0.indexer.attn_k.weight", "blk.0.ffn_gate_inp_shexp.weight",
    "blk.0.ffn_gate_inp.weight", "blk.1.attn_kv_b.weight", "blk.1.attn_qkv.weight", "blk.1.attn_gate.weight",
    "v.patch_embd.weight", "v.blk.0.attn_out.weight", "blk.0.ffn_down_shexp.weight", "output_norm.weight",
    "cls.weight", "blk.0.attn_k_b.weight", "a.position_embd.weight", "blk.0.attn_q.bias",
)  # fmt: skip


def config(architecture: str, model_type: str, **over: Any) -> dict[str, Any]:
    found = {**DEEP, "architectures": [architecture], "model_type": model_type, **over}
    return {key: value for key, value in found.items() if value is not None}


MODELS: dict[str, dict[str, Any]] = {
    "llama": config("LlamaForCausalLM", "llama"),
    "mixtral": config(
        "MixtralForCausalLM", "mixtral", num_local_experts=8, num_experts_per_tok=2, num_key_value_heads=2
    ),
    "mixtral-16": config(
        "MixtralForCausalLM", "mixtral", num_local_experts=16, num_experts_per_tok=2, num_hidden_layers=17
    ),
    "smollm3": config("SmolLM3ForCausalLM", "smollm3"),
    "granite": config("GraniteForCausalLM", "granite", tie_word_embeddings=True),
    "qwen2": config("Qwen2ForCausalLM", "qwen2", tie_word_embeddings=False),
    "qwen2-72b": config("Qwen2ForCausalLM", "qwen2", num_hidden_layers=80, num_key_value_heads=1),
    "qwen3": config("Qwen3ForCausalLM", "qwen3", head_dim=128),
    "qwen2moe": config("Qwen2MoeForCausalLM", "qwen2_moe", num_experts=6, num_experts_per_tok=2),
    "qwen3moe": config("Qwen3MoeForCausalLM", "qwen3_moe", num_experts=12, num_experts_per_tok=2, num_hidden_layers=24),
    "gemma": config("GemmaForCausalLM", "gemma"),
    "gemma2": config("Gemma2ForCausalLM", "gemma2"),
    "gemma3": config("Gemma3ForCausalLM", "gemma3_text", attn_logit_softcapping=None),
    "phi3": config("Phi3ForCausalLM", "phi3", partial_rotary_factor=None),
    "olmo-80": config("OlmoForCausalLM", "olmo", num_hidden_layers=80),
    "olmo2": config("Olmo2ForCausalLM", "olmo2", sliding_window=None),
    "stablelm": config("StableLmForCausalLM", "stablelm"),
    "gpt-neox": config("GPTNeoXForCausalLM", "gpt_neox", num_key_value_heads=None),
    "starcoder2": config("Starcoder2ForCausalLM", "starcoder2"),
    "deepseek2": config("DeepseekV2ForCausalLM", "deepseek_v2", **LATENT, head_dim=None),
    "deepseek3": config(
        "DeepseekV3ForCausalLM",
        "deepseek_v3",
        **LATENT | {"n_routed_experts": 8},
        q_lora_rank=256,
        head_dim=None,
        n_group=2,
        topk_group=1,
    ),
    "glm4-moe": config(
        "Glm4MoeForCausalLM",
        "glm4_moe",
        n_routed_experts=6,
        n_shared_experts=1,
        num_experts_per_tok=2,
        first_k_dense_replace=1,
        num_nextn_predict_layers=1,
        num_hidden_layers=23,
    ),
    "glm4": config("Glm4ForCausalLM", "glm4"),
    "lfm2": config("Lfm2ForCausalLM", "lfm2", full_attn_idxs=[2, 5, 8, 11, 14, 20], **LFM2),
    "lfm2-moe": config(
        "Lfm2MoeForCausalLM",
        "lfm2_moe",
        **LFM2,
        layer_types=["full_attention", "conv"] * 13,
        num_experts=8,
        num_experts_per_tok=2,
        num_dense_layers=2,
        use_expert_bias=True,
    ),
    "ernie4.5-moe": config(
        "Ernie4_5_MoeForCausalLM",
        "ernie4_5_moe",
        moe_num_experts=6,
        moe_k=2,
        moe_num_shared_experts=2,
        moe_layer_start_index=1,
        moe_layer_interval=1,
    ),
    "granite-moe": config("GraniteMoeForCausalLM", "granitemoe", num_local_experts=8, num_experts_per_tok=2),
    "phimoe": config("PhiMoEForCausalLM", "phimoe", num_local_experts=16, num_experts_per_tok=2, attention_bias=True),
    "command-r": config("CohereForCausalLM", "cohere", logit_scale=0.0625),
    "mistral3": config("Ministral3ForCausalLM", "ministral3", num_key_value_heads=2),
    "gemma4": config(
        "Gemma4ForCausalLM",
        "gemma4_text",
        **GEMMA4,
        hidden_size_per_layer_input=256,
        num_kv_shared_layers=10,
        use_double_wide_mlp=True,
        num_key_value_heads=1,
    ),
    "gemma4-moe": config(
        "Gemma4ForCausalLM",
        "gemma4_text",
        **GEMMA4,
        hidden_size_per_layer_input=0,
        attention_k_eq_v=True,
        num_global_key_value_heads=1,
        enable_moe_block=True,
        num_experts=8,
        top_k_experts=2,
    ),
    "qwen2vl": config(
        "Qwen2VLForConditionalGeneration",
        "qwen2_vl_text",
        num_key_value_heads=2,
        num_hidden_layers=28,
        rope_scaling={"type": "mrope", "mrope_section": [8, 12, 12]},
    ),
}


def specs_and_facts(name: str) -> tuple[list[TensorSpec], ModelFacts]:
    if name == "names":
        stored = {name: "F32" if name.endswith("gate_inp.weight") else "F16" for name in NAMES}
        specs = [TensorSpec(n, (512, 512), (Piece(n),), Transform(), stored[n]) for n in NAMES]
        return specs, ModelFacts("llama", 26, 8, 4, 0, False, 0)
    checkpoint = shapes(MODELS[name], expected_tensors(MODELS[name]), source=name)
    return tensor_specs(checkpoint, "F16"), model_facts(checkpoint)


def pairs(name: str, folder: Path) -> list[Any]:
    """The hyperparameters llama-quantize reads."""
    found = MODELS.get(name, MODELS["llama"])
    (folder / "config.json").write_text(json.dumps(found))
    arch = specs_and_facts(name)[1].arch
    writer = gguf.GGUFWriter(None, arch)
    for method, value in parameters(arch, load_config(folder), folder)[1].items():
        getattr(writer, f"add_{method}")(value)
    return [_kv(key, item) for key, item in writer.kv_data[0].items()]


def main(llama: Path, out: Path, names: list[str]) -> None:
    spec = importlib.util.spec_from_file_location("make_mixes", HERE.parent / "reference" / "make_mixes.py")
    mixes: Any = importlib.util.module_from_spec(spec)  # type: ignore[arg-type]
    spec.loader.exec_module(mixes)  # type: ignore[union-attr]
    known = json.loads(gzip.decompress(out.read_bytes()))["types"] if names else {}
    result: dict[str, dict[str, str | None]] = known
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for model in names or (*MODELS, "names"):
            tensors = [(s.name, s.shape) for s in specs_and_facts(model)[0]]
            path, matrix = folder / "model.gguf", folder / "imatrix.gguf"
            mixes.write(path, pairs(model, folder), tensors)
            mixes.write_imatrix(matrix, tensors)
            result[model] = {t: mixes.choices(llama, path, t, []) for t in FILE_TYPES}
            words = ["--imatrix", str(matrix)]
            result[f"{model} imatrix"] = {t: mixes.choices(llama, path, t, words) for t in FILE_TYPES}
            print(model, sum(types is None for types in result[model].values()), "refused", flush=True)
    document = {
        "llama.cpp": "llama-cpp-python 0.3.36",
        "command": "llama-quantize --dry-run [--imatrix ONES] MODEL /dev/null TYPE",
        "types": result,
    }
    out.write_bytes(gzip.compress(json.dumps(document, indent=1).encode(), mtime=0))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:])
