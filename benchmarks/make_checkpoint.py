"""Write a checkpoint of random bf16 weights, sharded: something of a real size to build from. Llama-shaped, with a
large vocabulary too ("vocabulary"), and a mixture of experts ("experts", as Qwen3's).

    python benchmarks/make_checkpoint.py 7b DIRECTORY --tokenizer tests/data/tiny-llama

The values are heavy-tailed, as trained weights are; each tensor starts at another place of one pool: no two are equal.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import numpy as np

from qbuild.arch.shapes import expected_tensors

SHARD = 5 << 30
POOL = 1 << 25
SHAPES = {  # layers, hidden, intermediate, heads, key-value heads, vocabulary
    "100m": (8, 768, 2048, 12, 4, 32000),
    "1.1b": (22, 2048, 5632, 32, 4, 32000),
    "3b": (26, 3200, 8640, 32, 32, 32000),
    "7b": (32, 4096, 11008, 32, 32, 32000),
    "13b": (40, 5120, 13824, 40, 40, 32000),
    "vocabulary": (2, 1024, 2816, 16, 4, 151936),
    "experts": (2, 1024, 2816, 16, 4, 32000),
}
EXPERTS = {
    "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "num_experts": 32, "num_experts_per_tok": 8,
    "moe_intermediate_size": 512, "head_dim": 64, "decoder_sparse_step": 1, "mlp_only_layers": [],
    "norm_topk_prob": True,
}  # fmt: skip


def configuration(shape: str) -> dict:
    layers, hidden, ff, heads, kv, vocab = SHAPES[shape]
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": "bfloat16", "hidden_act": "silu",
        "num_hidden_layers": layers, "hidden_size": hidden, "intermediate_size": ff, "num_attention_heads": heads,
        "num_key_value_heads": kv, "vocab_size": vocab, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0, "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    return config | (EXPERTS if shape == "experts" else {})


def pool(rng: np.random.Generator) -> np.ndarray:
    values = (rng.standard_t(5, POOL) * 0.02).astype(np.float32)
    return (values.view(np.uint32) >> 16).astype(np.uint16)


def write_shard(
    path: Path, tensors: list[tuple[str, tuple[int, ...]]], values: np.ndarray, rng: np.random.Generator
) -> None:
    header, at = {}, 0
    for name, shape in tensors:
        nbytes = 2 * int(np.prod(shape))
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [at, at + nbytes]}
        at += nbytes
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for _, shape in tensors:
            left, start = int(np.prod(shape)), int(rng.integers(0, POOL))
            while left:
                part = values[start : start + left]
                file.write(part.data)
                left, start = left - len(part), 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("out", type=Path)
    parser.add_argument("--layers", type=int, help="so many of the shape's own")
    parser.add_argument("--tokenizer", type=Path, required=True, help="a model directory to copy the tokenizer from")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    config = configuration(args.shape)
    config["num_hidden_layers"] = args.layers or config["num_hidden_layers"]
    (args.out / "config.json").write_text(json.dumps(config, indent=1))
    for path in args.tokenizer.glob("*token*"):
        shutil.copy(path, args.out)
    rng = np.random.default_rng(0)
    values, shards, size = pool(rng), [[]], 0
    for name, shape in expected_tensors(config):
        nbytes = 2 * int(np.prod(shape))
        if size + nbytes > SHARD:
            shards.append([])
            size = 0
        shards[-1].append((name, shape))
        size += nbytes
    index = {}
    for number, tensors in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        write_shard(args.out / file, tensors, values, rng)
        index |= {name: file for name, _ in tensors}
    document = {"metadata": {}, "weight_map": index}
    (args.out / "model.safetensors.index.json").write_text(json.dumps(document))


if __name__ == "__main__":
    main()
