"""Seconds and peak memory of a calibration pass, for Llama shapes with made-up weights; nothing is read from disk.

usage: bench_calibration.py [SHAPE ...] [--windows 16] [--length 512] [--layers 2] [--spill] [--diagonal]
                            [--dtype float32] [--device cpu] [--threads 1] [--plain] [--digest]

Every case runs in a process of its own. Peaks are the whole process's; ``predicted`` is what a plan says. With --plain
the same work in the plain way stands beside it: the whole model in memory and XᵀX of every linear's input in hooks.
With --digest the digest of the statistics is shown: the same for any number of threads, spilled or not.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path

import numpy as np

# hidden, intermediate, layers, heads, heads of keys and values, vocabulary
SHAPES = {
    "135m": (576, 1536, 30, 9, 3, 49152),
    "1.1b": (2048, 5632, 22, 32, 4, 32000),
    "7b": (4096, 11008, 32, 32, 32, 32000),
    "8b": (4096, 14336, 32, 32, 8, 128256),
}


def model_of(shape: str, layers: int) -> tuple[dict[str, object], dict[str, tuple[int, ...]]]:
    """A config and the shapes of its tensors."""
    hidden, wide, _, heads, kv_heads, vocabulary = SHAPES[shape]
    config = {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": hidden, "intermediate_size": wide,
        "num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": kv_heads,
        "vocab_size": vocabulary, "max_position_embeddings": 8192, "tie_word_embeddings": True,
    }  # fmt: skip
    kv = hidden // heads * kv_heads
    tensors: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (vocabulary, hidden),
        "model.norm.weight": (hidden,),
    }
    of_layer = {
        "self_attn.q_proj": (hidden, hidden), "self_attn.k_proj": (kv, hidden), "self_attn.v_proj": (kv, hidden),
        "self_attn.o_proj": (hidden, hidden), "mlp.gate_proj": (wide, hidden), "mlp.up_proj": (wide, hidden),
        "mlp.down_proj": (hidden, wide), "input_layernorm": (hidden,), "post_attention_layernorm": (hidden,),
    }  # fmt: skip
    for layer in range(layers):
        tensors |= {f"model.layers.{layer}.{name}.weight": size for name, size in of_layer.items()}
    return config, tensors


def peak() -> int:
    """Peak of this process, bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) * 1024


def one(options: argparse.Namespace, shape: str) -> dict[str, object]:
    import torch

    from qbuild.calibration.extent import device_forward, model_shape
    from qbuild.calibration.run import Pass, calibrate
    from qbuild.calibration.shapes import BASE, BASE_CUDA, Step, forward_footprint

    config, tensors = model_of(shape, options.layers)
    noise = torch.randn(1 << 20, generator=torch.Generator().manual_seed(0)).mul_(0.02).bfloat16()

    def read(name: str) -> torch.Tensor:  # as fast as memory: what is timed is the pass
        if len(tensors[name]) == 1:
            return torch.ones(tensors[name], dtype=torch.bfloat16)
        made = torch.empty(tensors[name], dtype=torch.bfloat16)
        for part in made.view(-1).split(len(noise)):
            part.copy_(noise[: len(part)])
        return made

    tokens = np.random.default_rng(0).integers(0, config["vocab_size"], (options.windows, options.length), np.int32)
    if options.plain:
        return plain(options, config, tensors, read, tokens)
    digest, saved = hashlib.sha256(), [time.monotonic()]

    def save(_layer: int, data: bytearray) -> None:
        saved.append(time.monotonic())
        digest.update(data)

    with tempfile.TemporaryDirectory() as folder:
        task = Pass(
            config, tensors, tokens, 0, options.layers - 1, Path(folder), not options.diagonal, options.dtype,
            options.device, options.spill, options.threads,
        )  # fmt: skip
        calibrate(task, read, save)
    step = Step(
        options.windows, options.length, options.dtype, not options.diagonal, options.spill, threads=options.threads,
        base=BASE_CUDA if torch.version.cuda else BASE,
    )  # fmt: skip
    found: dict[str, object] = {
        "seconds a layer": round(min(end - start for start, end in pairwise(saved)), 2),
        "peak MiB": peak() >> 20,
    }
    if options.device == "cpu":
        predicted = forward_footprint(config, tensors, "model.layers.", 0, step)
    else:
        device = device_forward(config, tensors, model_shape(config, tensors), step)
        predicted, used = device.ram, torch.cuda.max_memory_allocated()
        found |= {"VRAM MiB": used >> 20, "predicted VRAM / used": round(device.vram / used, 3)}
    found |= {"predicted MiB": predicted >> 20, "predicted / peak": round(predicted / peak(), 3)}
    return found | ({"digest": digest.hexdigest()[:16]} if options.digest else {})


def plain(options, config, tensors, read, tokens) -> dict[str, object]:  # type: ignore[no-untyped-def]
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    torch.set_num_threads(options.threads)
    model = AutoModelForCausalLM.from_config(LlamaConfig.from_dict(config), dtype=getattr(torch, options.dtype))
    model.load_state_dict({name: read(name) for name in tensors}, strict=False)
    model.eval().to(options.device)
    grams: dict[str, torch.Tensor] = {}

    def hook(name: str, inputs: tuple[torch.Tensor, ...]) -> None:
        x = inputs[0].flatten(0, -2).float()
        grams[name] = grams.get(name, 0) + x.T @ x

    for name, module in model.named_modules():
        if name.endswith(("q_proj", "o_proj", "gate_proj", "down_proj")):
            module.register_forward_pre_hook(lambda _m, inputs, name=name: hook(name, inputs))
    began = time.monotonic()
    with torch.no_grad():
        for start in range(0, len(tokens), 8):
            model.model(
                torch.from_numpy(tokens[start : start + 8].astype(np.int64)).to(options.device), use_cache=False
            )
    if options.device != "cpu":
        torch.cuda.synchronize()
    spent = (time.monotonic() - began) / options.layers
    return {"plain: seconds a layer": round(spent, 2), "peak MiB": peak() >> 20}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("shapes", nargs="*", default=["135m", "1.1b"])
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cpu")
    for flag in ("spill", "diagonal", "plain", "digest", "inside"):
        parser.add_argument(f"--{flag}", action="store_true")
    options = parser.parse_args()
    if options.inside:
        print(json.dumps(one(options, options.shapes[0])))
        return
    flags = [argument for argument in sys.argv[1:] if argument not in options.shapes]
    for shape in options.shapes:
        for extra in [[], ["--plain"]] if options.plain else [[]]:
            arguments = [a for a in flags if a != "--plain"] + extra + ["--inside", shape]
            done = subprocess.run([sys.executable, __file__, *arguments], capture_output=True, text=True)
            line = done.stdout.strip().splitlines()[-1] if done.returncode == 0 else done.stderr[-2000:]
            print(f"{shape}  {line}", flush=True)


if __name__ == "__main__":
    main()
