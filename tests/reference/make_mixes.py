"""Record which type llama-quantize gives each tensor: its dry run over synthetic models, for tests of the type rules.

    python tests/reference/make_mixes.py LLAMA_CPP OUT.json.gz

The models are GGUF headers over sparse data; the result keeps, for each model and file type, the types in file order,
run-length coded, so that a difference can be read.
"""

from __future__ import annotations

import gzip
import json
import re
import subprocess
import sys
import tempfile
from itertools import groupby
from pathlib import Path

import numpy as np
from gguf import GGUFWriter

from qbuild.ggml import FILE_TYPES
from qbuild.gguffile import GGUFType, encode_kv, header, header_size, layout

U32 = GGUFType.UINT32


def model(
    layers: int, hidden: int, ff: int, heads: int, kv: int, experts: int = 0, tied: bool = False, fused: bool = False
):
    """(key-value pairs, [(name, shape)]) of a Llama-like model."""
    head = hidden // heads
    tensors = [("token_embd.weight", (512, hidden)), ("output_norm.weight", (hidden,))]
    if not tied:
        tensors.append(("output.weight", (512, hidden)))
    for i in range(layers):
        at = f"blk.{i}."
        tensors += [(at + "attn_norm.weight", (hidden,)), (at + "ffn_norm.weight", (hidden,))]
        if fused:
            tensors.append((at + "attn_qkv.weight", (hidden + 2 * kv * head, hidden)))
        else:
            tensors += [(at + f"attn_{n}.weight", (r * head, hidden)) for n, r in (("q", heads), ("k", kv), ("v", kv))]
        tensors.append((at + "attn_output.weight", (hidden, hidden)))
        if experts:
            tensors.append((at + "ffn_gate_inp.weight", (experts, hidden)))
            tensors += [(at + f"ffn_{n}_exps.weight", (experts, ff, hidden)) for n in ("gate", "up")]
            tensors.append((at + "ffn_down_exps.weight", (experts, hidden, ff)))
        else:
            tensors += [(at + f"ffn_{n}.weight", (ff, hidden)) for n in ("gate", "up")]
            tensors.append((at + "ffn_down.weight", (hidden, ff)))
    numbers = {"block_count": layers, "context_length": 512, "embedding_length": hidden, "feed_forward_length": ff,
               "attention.head_count": heads, "attention.head_count_kv": kv, "rope.dimension_count": head}  # fmt: skip
    if experts:
        numbers |= {"expert_count": experts, "expert_used_count": 2}
    kvs = [encode_kv("general.architecture", "llama", GGUFType.STRING)]
    kvs += [encode_kv(f"llama.{k}", v, U32) for k, v in numbers.items()]
    kvs.append(encode_kv("llama.attention.layer_norm_rms_epsilon", 1e-5, GGUFType.FLOAT32))
    return kvs, tensors


MODELS = {
    "mha": dict(layers=32, hidden=1024, ff=2816, heads=16, kv=16),
    "gqa": dict(layers=22, hidden=1024, ff=2816, heads=16, kv=4),
    "70b": dict(layers=80, hidden=1024, ff=2816, heads=16, kv=2),
    "tied": dict(layers=12, hidden=512, ff=1536, heads=8, kv=8, tied=True),
    "mixtral": dict(layers=32, hidden=512, ff=1024, heads=8, kv=2, experts=8),
    "many_experts": dict(layers=13, hidden=512, ff=256, heads=8, kv=4, experts=60, tied=True),
    "fused": dict(layers=16, hidden=512, ff=1024, heads=8, kv=8, fused=True),
    "narrow": dict(layers=9, hidden=288, ff=768, heads=6, kv=6),
    "odd": dict(layers=3, hidden=100, ff=300, heads=5, kv=5, tied=True),
}
OPTIONS = {
    "pure": ["--pure"],
    "output": ["--output-tensor-type", "Q8_0"],
    "embedding": ["--token-embedding-type", "Q4_0"],
    "leave": ["--leave-output-tensor"],
    "manual_v": ["--tensor-type", "blk\\.0\\.ATTN_V=q8_0", "--tensor-type", "ffn_down=q5_k"],
}


KEPT = ("gate_inp.weight", "shortconv.conv.weight")  # matrices that the converter keeps in F32


def write(path: Path, kvs, tensors) -> None:
    typed = [(n, s, "F32" if len(s) == 1 or n.endswith(KEPT) else "F16") for n, s in tensors]
    size = header_size(sum(len(kv.raw) for kv in kvs), typed) + layout(typed)[1]
    with path.open("wb") as file:
        file.write(header(kvs, typed))
        file.truncate(size)


def write_imatrix(path: Path, tensors) -> None:
    """An importance matrix of ones for every matrix."""
    writer = GGUFWriter(path, "imatrix")
    writer.kv_data[0].pop("general.architecture")
    writer.add_type("imatrix")
    writer.add_array("imatrix.datasets", ["ones"])
    writer.add_uint32("imatrix.chunk_count", 1)
    writer.add_uint32("imatrix.chunk_size", 512)
    for name, shape in tensors:
        if len(shape) > 1:
            experts = shape[0] if len(shape) > 2 else 1
            writer.add_tensor(f"{name}.in_sum2", np.ones((experts, shape[-1]), np.float32))
            writer.add_tensor(f"{name}.counts", np.ones((experts, 1), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def choices(llama: Path, path: Path, file_type: str, options: list[str]) -> str | None:
    command = [llama / "build/bin/llama-quantize", "--dry-run", *options, path, "/dev/null", file_type]
    done = subprocess.run(command, capture_output=True, text=True)
    found = []
    for line in (done.stdout + done.stderr).splitlines():
        match = re.match(r"\[\s*\d+/\s*\d+\]\s+(\S+)\s+- \[.*?\], type =\s+(\S+), (.*)", line)
        if match:
            to = re.search(r"-> .*\((\w+)\)", match[3])
            found.append((to[1] if to else match[2]).upper())
    if done.returncode or not found:
        return None
    return " ".join(f"{kind}*{len(list(group))}" for kind, group in groupby(found))


def main(llama: Path, out: Path) -> None:
    result: dict[str, dict[str, str | None]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, shape in MODELS.items():
            path = Path(folder) / f"{name}.gguf"
            write(path, *model(**shape))
            result[name] = {t: choices(llama, path, t, []) for t in FILE_TYPES}
            imatrix = Path(folder) / "imatrix.gguf"
            write_imatrix(imatrix, model(**shape)[1])
            result[f"{name} imatrix"] = {t: choices(llama, path, t, ["--imatrix", str(imatrix)]) for t in FILE_TYPES}
            path.unlink()
        path = Path(folder) / "gqa.gguf"
        write(path, *model(**MODELS["gqa"]))
        for option, words in OPTIONS.items():
            result[f"gqa {option}"] = {
                t: choices(llama, path, t, words) for t in ("Q4_K_M", "Q4_K_S", "Q2_K", "Q5_0", "F16")
            }
    document = {
        "llama.cpp": "the source in llama-cpp-python 0.3.36",
        "command": "llama-quantize --dry-run",
        "types": result,
    }
    out.write_bytes(gzip.compress(json.dumps(document, indent=1).encode(), mtime=0))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
