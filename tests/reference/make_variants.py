"""Small random checkpoints, one for each thing that can differ in a Llama: they are the same wherever they are made.

    python tests/reference/make_variants.py LLAMA_CPP OUT.json     records what llama.cpp makes of each

Tests import ``write`` and compare with the record.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import blake3
import numpy as np

from qbuild.arch.shapes import expected_tensors

TINY = Path(__file__).parent.parent / "data" / "tiny-llama"
TYPES = ("Q4_K_M", "Q5_0", "F16")
BASE = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 256, "intermediate_size": 512,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 2048,
    "max_position_embeddings": 2048, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "tie_word_embeddings": False,
    "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu", "torch_dtype": "bfloat16",
}  # fmt: skip
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 512}  # fmt: skip
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512, "beta_fast": 32, "beta_slow": 1}
CARD = """---
license: apache-2.0
language:
- en
- de
base_model: meta-llama/Llama-3.2-1B
tags:
- chat
datasets:
- a/b
---
# A model
"""
VARIANTS: dict[str, dict] = {
    "plain": {},
    "tied": {"tie_word_embeddings": True},
    "llama3-rope": {"rope_scaling": LLAMA3, "rope_theta": 500000.0, "max_position_embeddings": 8192},
    "llama3-rope-new-keys": {"rope_parameters": LLAMA3 | {"rope_theta": 500000.0}, "rope_theta": None},
    "linear-rope": {"rope_scaling": {"type": "linear", "factor": 4.0}},
    "yarn": {"rope_scaling": YARN},
    "attention-bias": {"attention_bias": True},
    "mha": {"num_key_value_heads": 4},
    "mistral": {
        "architectures": ["MistralForCausalLM"],
        "model_type": "mistral",
        "head_dim": 32,
        "sliding_window": 1024,
    },
    "wide-heads": {"head_dim": 128},
    "width-288": {"hidden_size": 288, "num_attention_heads": 6, "num_key_value_heads": 3, "intermediate_size": 768},
    "width-96": {"hidden_size": 96, "intermediate_size": 160},
    "float32": {"dtype": "F32", "torch_dtype": "float32"},
    "float16": {"dtype": "F16", "torch_dtype": "float16"},
    "card": {"card": True},
}


def write(name: str, root: Path) -> Path:
    """Write a variant below ``root``; its folder's name feeds the converter's metadata heuristics."""
    over = VARIANTS[name]
    config = {k: v for k, v in (BASE | over).items() if v is not None and k not in ("dtype", "card")}
    folder = root / f"My-Test-{name}-1.5B-Instruct-v2"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    for path in TINY.glob("*token*"):
        shutil.copy(path, folder)
    if over.get("card"):
        (folder / "README.md").write_text(CARD)
        sampling = {"temperature": 0.6, "top_p": 0.9, "do_sample": True, "repetition_penalty": 1.1}
        (folder / "generation_config.json").write_text(json.dumps(sampling))
    rng = np.random.default_rng(sum(name.encode()))
    header, blobs, at = {}, [], 0
    for tensor, shape in expected_tensors(config):
        blob = encode(rng.standard_normal(shape).astype(np.float32) * np.float32(0.05), over.get("dtype", "BF16"))
        entry = {"dtype": over.get("dtype", "BF16"), "shape": shape, "data_offsets": [at, at + len(blob)]}
        header[tensor], at = entry, at + len(blob)
        blobs.append(blob)
    text = json.dumps(header).encode()
    (folder / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + b"".join(blobs))
    return folder


def encode(values: np.ndarray, dtype: str) -> bytes:
    if dtype == "BF16":
        return (values.view(np.uint32) >> 16).astype(np.uint16).tobytes()
    return values.astype({"F32": np.float32, "F16": np.float16}[dtype]).tobytes()


def main(llama: Path, out: Path) -> None:
    record: dict[str, dict[str, str]] = {}
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        for variant in VARIANTS:
            folder, converted = write(variant, root), root / "converted.gguf"
            convert = [sys.executable, "convert_hf_to_gguf.py", str(folder), "--outfile", str(converted)]
            subprocess.run(convert, cwd=llama, check=True, capture_output=True)
            record[variant] = {}
            for type_ in TYPES:
                made = root / "made.gguf"
                subprocess.run(
                    [llama / "build/bin/llama-quantize", converted, made, type_], check=True, capture_output=True
                )
                record[variant][type_] = f"{blake3.blake3(made.read_bytes()).hexdigest()}/{made.stat().st_size}"
    out.write_text(json.dumps({"llama.cpp": "llama-cpp-python 0.3.36", "files": record}, indent=1) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
