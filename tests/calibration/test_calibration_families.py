"""Families that differ in their layers: run by layers, each computes what its whole model computes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors import safe_open

from qbuild.calibration.forward import Streamed
from qbuild.calibration.run import Pass, calibrate
from qbuild.calibration.statistics import Statistics, notices
from qbuild.calibration.triangle import square
from qbuild.errors import InputError

LENGTH = 24
SMALL: dict[str, Any] = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip
MOE: dict[str, Any] = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
# What makes a family special is switched on, where small defaults would leave it off.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0,
                                  "high_freq_factor": 4.0, "original_max_position_embeddings": 32}},
    "qwen2": {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
    "qwen3": {"tie_word_embeddings": True},
    "mistral": {"sliding_window": 8},
    "gemma2": {"sliding_window": 8, "query_pre_attn_scalar": 8, "final_logit_softcapping": 3.0},
    "gemma3_text": {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
    "phi3": {"sliding_window": 8},
    "mixtral": {"num_local_experts": 6, "num_experts_per_tok": 2},
    "qwen2_moe": MOE | {"shared_expert_intermediate_size": 16, "mlp_only_layers": [1]},
    "qwen3_moe": MOE,
    "gpt_neox": {"rotary_pct": 0.5},
    "olmo2": {},
    "stablelm": {"partial_rotary_factor": 0.5, "use_qkv_bias": True},
    "starcoder2": {"sliding_window": 8},
    "granite": {"residual_multiplier": 0.3, "embedding_multiplier": 5.0, "logits_scaling": 4.0,
                "attention_multiplier": 0.2},
    "smollm3": {"no_rope_layers": [1, 0, 1]},
    "falcon": {"alibi": False, "parallel_attn": True},
    "phi": {"partial_rotary_factor": 0.5},
    "cohere2": {"sliding_window": 8, "logit_scale": 0.5},
    "olmoe": MOE,
}  # fmt: skip


def checkpoint(kind: str, folder: Path) -> torch.nn.Module:
    """A small random model as transformers saves it, and itself."""
    torch.manual_seed(sum(map(ord, kind)))
    settings = {name: value for name, value in SMALL.items() if (kind, name) != ("falcon", "head_dim")}
    config = transformers.CONFIG_MAPPING[kind].from_dict(settings | FAMILIES[kind])
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    for parameter in model.parameters():  # norms of one and biases of zero would hide which of them is read
        parameter.data += 0.05 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    return model


def opened(folder: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    with safe_open(folder / "model.safetensors", "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return json.loads((folder / "config.json").read_text()), tensors


@pytest.mark.parametrize("kind", FAMILIES)
def test_logits_are_those_of_the_whole_model(kind: str, tmp_path: Path) -> None:
    model = checkpoint(kind, tmp_path)
    config, tensors = opened(tmp_path)
    ids = torch.randint(3, 96, (2, LENGTH), generator=torch.Generator().manual_seed(0))
    streamed = Streamed(config, tensors, tensors.__getitem__)
    hidden = streamed.embed(ids)
    for index in range(streamed.count):
        with streamed.layer(index) as layer:
            hidden = layer(hidden)
    with torch.no_grad():
        wanted = model(ids).logits
    torch.testing.assert_close(streamed.logits(hidden), wanted, rtol=1e-5, atol=1e-5)
    whole = {name for name in tensors if name.startswith(streamed.prefix)}
    assert whole == {name for index in range(streamed.count) for name in streamed.layer_tensors(index)}


def statistics_of(folder: Path, tokens: np.ndarray, **settings: Any) -> list[Statistics]:
    config, tensors = opened(folder)
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    found: list[Statistics] = []
    task = Pass(config, shapes, tokens, 0, config["num_hidden_layers"] - 1, folder / "states", **settings)
    calibrate(task, tensors.__getitem__, lambda _layer, data: found.append(Statistics.from_bytes(data)))
    return found


def routed(model: torch.nn.Module, tokens: np.ndarray) -> list[dict[tuple[int, str], torch.Tensor]]:
    """Per layer with experts, what every expert's two products read, by the plain model's own routing."""
    layers: list[dict[tuple[int, str], torch.Tensor]] = []

    def note(experts: Any, inputs: tuple[torch.Tensor, ...]) -> None:
        hidden, chosen, _weights = inputs
        seen = {}
        for expert in range(experts.num_experts):
            x = hidden[(chosen == expert).any(-1)]
            gate, up = (x @ experts.gate_up_proj[expert].T).chunk(2, dim=-1)
            seen[expert, "gate"], seen[expert, "down"] = x.double(), (experts.act_fn(gate) * up).double()
        layers.append(seen)

    hooks = [
        module.register_forward_pre_hook(note) for name, module in model.named_modules() if name.endswith(".experts")
    ]
    with torch.no_grad():
        model(torch.from_numpy(tokens.astype(np.int64)))
    for hook in hooks:
        hook.remove()
    return layers


@pytest.mark.parametrize(
    ("kind", "block", "names"),
    [
        ("mixtral", "block_sparse_moe", ("w1", "w3", "w2")),
        ("qwen3_moe", "mlp", ("gate_proj", "up_proj", "down_proj")),
        ("qwen2_moe", "mlp", ("gate_proj", "up_proj", "down_proj")),
    ],
)
def test_experts_are_measured_on_the_tokens_routed_to_them(
    kind: str, block: str, names: tuple[str, str, str], tmp_path: Path
) -> None:
    model = checkpoint(kind, tmp_path)
    tokens = np.random.default_rng(0).integers(3, 96, (1, LENGTH)).astype(np.int32)
    wanted = routed(model, tokens)
    with_experts = [s for s in statistics_of(tmp_path, tokens) if any(".experts." in found.name for found in s.inputs)]
    assert len(with_experts) == len(wanted)
    for statistics, seen in zip(with_experts, wanted, strict=True):
        for (expert, which), X in seen.items():
            path = f"model.layers.{statistics.layer}.{block}.experts.{expert}"
            linears = {f"{path}.{name}" for name in (names[:2] if which == "gate" else names[2:])}
            if not len(X):
                assert linears <= set(statistics.unreached)
                continue
            found = statistics.of(min(linears))
            assert found.count == len(X)
            assert set(found.shared) == linears
            gram = square(torch.from_numpy(found.upper), X.shape[1])
            torch.testing.assert_close(gram.double(), X.T @ X, rtol=1e-4, atol=1e-4)


def test_starved_experts_are_told(tmp_path: Path) -> None:
    checkpoint("qwen3_moe", tmp_path)
    tokens = np.full((1, 4), 7, np.int32)  # one token over and over goes to two experts of six
    first = statistics_of(tmp_path, tokens)[0]
    assert len(first.unreached) == 12
    assert notices(0, first.inputs, first.unreached) == (
        "layer 0: 22 of 22 linears saw fewer than 128 tokens, 12 of them none; more samples reach more experts",
    )


@pytest.mark.parametrize("damage", ["shape", "missing expert"])
def test_damaged_experts_are_named(damage: str, tmp_path: Path) -> None:
    checkpoint("qwen3_moe", tmp_path)
    config, tensors = opened(tmp_path)
    name = "model.layers.0.mlp.experts.5.up_proj.weight"
    if damage == "shape":
        tensors[name] = tensors[name][:3]
        wanted = rf"{name} has the shape \[3, 32\], config.json asks for \[16, 32\]"
    else:
        del tensors[name]
        wanted = r"gate_up_proj has the shape \[5, 16, 32\], config.json asks for \[6, 16, 32\]"
    with pytest.raises(InputError, match=wanted), Streamed(config, tensors, tensors.__getitem__).layer(0):
        pass
