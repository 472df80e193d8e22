"""What jobs are predicted to take, held against what builds took on an H100: not less, and at most 15 % more."""

from __future__ import annotations

from typing import Any

import pytest

from qbuild.arch.shapes import expected_tensors
from qbuild.calibration.extent import (
    Device,
    ModelShape,
    Way,
    device_forward,
    device_propagation,
    device_solve,
    model_shape,
)
from qbuild.calibration.shapes import Step
from qbuild.evaluation.footprint import Text, on_device
from qbuild.vram import CONTEXT

LLAMA = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 32000}
LLAMA |= {"num_attention_heads": 32, "tie_word_embeddings": False}
MIXTURE = LLAMA | {
    "model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"], "num_experts_per_tok": 8,
    "mlp_only_layers": [], "decoder_sparse_step": 1, "norm_topk_prob": True, "num_key_value_heads": 4,
}  # fmt: skip
CONFIGS = {
    "1.1b": LLAMA | {"hidden_size": 2048, "intermediate_size": 5632, "num_key_value_heads": 4},
    "7b": LLAMA | {"hidden_size": 4096, "intermediate_size": 11008, "num_key_value_heads": 32},
    "32 experts": MIXTURE | {
        "hidden_size": 1024, "intermediate_size": 2816, "num_attention_heads": 16, "head_dim": 64, "num_experts": 32,
        "moe_intermediate_size": 512,
    },
    "128 experts": MIXTURE | {
        "hidden_size": 2048, "intermediate_size": 6144, "head_dim": 128, "num_experts": 128,
        "moe_intermediate_size": 768, "vocab_size": 151936,
    },
    "vocabulary": LLAMA | {
        "hidden_size": 1024, "intermediate_size": 2816, "num_attention_heads": 16, "num_key_value_heads": 4,
        "vocab_size": 151936,
    },
}  # fmt: skip

Shapes = dict[str, tuple[int, ...]]


def shaped(name: str) -> tuple[dict[str, Any], Shapes, ModelShape]:
    """Two layers: those of a model take the same, one after the other."""
    config = CONFIGS[name] | {"num_hidden_layers": 2}
    tensors = dict(expected_tensors(config))
    return config, tensors, model_shape(config, tensors)


def near(predicted: Device, ram: int, vram: int) -> None:
    """``ram`` and ``vram``: MiB that were taken, the CUDA context included."""
    assert 1 <= predicted.ram / (ram << 20) <= 1.15
    assert 1 <= (predicted.vram + CONTEXT) / (vram << 20) <= 1.15


@pytest.mark.parametrize(
    ("model", "dtype", "stored", "ram", "vram"),
    [
        ("1.1b", "float32", 2, 1961, 1550),
        ("1.1b", "float32", 4, 2074, 1551),
        ("1.1b", "bfloat16", 4, 2004, 1552),
        ("7b", "float32", 2, 3074, 3123),
        ("7b", "float32", 4, 3503, 3124),
        ("7b", "bfloat16", 2, 2880, 2884),
        ("32 experts", "float32", 2, 1990, 1478),
        ("32 experts", "bfloat16", 2, 2046, 1479),
        ("128 experts", "float32", 2, 5795, 6561),
    ],
)
def test_64_windows_through_a_model(model: str, dtype: str, stored: int, ram: int, vram: int) -> None:
    near(device_forward(*shaped(model), Step(64, 512, dtype, stored=stored)), ram, vram)


@pytest.mark.parametrize(
    ("model", "stored", "bits", "ram", "vram"),
    [
        ("1.1b", 2, 4, 1857, 1620),
        ("1.1b", 2, 8, 1865, 1619),
        ("1.1b", 4, 4, 1989, 1703),
        ("7b", 2, 4, 3145, 4832),
        ("7b", 2, 8, 3419, 4832),
        ("7b", 4, 4, 3957, 5220),
        ("32 experts", 2, 4, 1837, 1090),
        ("32 experts", 2, 8, 1898, 1090),
        ("128 experts", 2, 4, 7122, 7420),
    ],
)
def test_a_layer_that_is_quantized(model: str, stored: int, bits: int, ram: int, vram: int) -> None:
    layer = shaped(model)[2].layers[0]
    near(device_solve(layer, Way("gptq", stored=stored), layer.code_bytes(bits, 128)), ram, vram)


def test_a_layer_that_is_rounded_plainly() -> None:
    layer = shaped("7b")[2].layers[0]
    near(device_solve(layer, Way("nearest", moved=False, stored=4), layer.code_bytes(4, 128)), 3430, 2843)


@pytest.mark.parametrize(("stored", "windows", "ram", "vram"), [(2, 16, 2259, 5519), (4, 64, 3037, 5905)])
def test_error_propagation(stored: int, windows: int, ram: int, vram: int) -> None:
    config, tensors, model = shaped("7b")
    codes = model.layers[0].code_bytes(4, 128)
    near(device_propagation(config, tensors, model, Step(windows, 512, stored=stored), codes), ram, vram)


@pytest.mark.parametrize(
    ("model", "dtype", "windows", "source", "target", "ram", "vram"),
    [
        ("1.1b", "float32", 16, "F32", "F16", 1833, 1190),
        ("1.1b", "bfloat16", 16, "BF16", "BF16", 1704, 841),
        ("1.1b", "bfloat16", 16, "BF16", "F16", 1698, 937),
        ("1.1b", "bfloat16", 16, "F32", "F16", 1827, 943),
        ("1.1b", "bfloat16", 16, "BF16", "F32", 1913, 1059),
        ("7b", "float32", 16, "F32", "F16", 2153, 1815),
        ("7b", "bfloat16", 16, "BF16", "BF16", 1903, 1463),
        ("32 experts", "float32", 16, "BF16", "BF16", 1748, 877),
        ("32 experts", "bfloat16", 16, "BF16", "F16", 1774, 746),
        ("128 experts", "bfloat16", 4, "BF16", "BF16", 2312, 1872),
        ("vocabulary", "float32", 16, "BF16", "BF16", 1799, 2077),
        ("vocabulary", "bfloat16", 16, "BF16", "F32", 2268, 1761),
    ],
)
def test_an_evaluation(model: str, dtype: str, windows: int, source: str, target: str, ram: int, vram: int) -> None:
    config, tensors, _ = shaped(model)
    near(on_device(config, tensors, Text(windows, 512, dtype), source=source, targets=[target]), ram, vram)


def test_a_large_vocabulary_is_out_of_memory_before_most_kernels_are_in_it() -> None:
    near(device_forward(*shaped("vocabulary"), Step(8, 512)), 1517, 1012)
