"""Importance matrices from statistics: llama-imatrix's own names, counts and values.

tests/data/llama-imatrix/tiny-llama.gguf was written by llama-imatrix of llama.cpp as in llama-cpp-python 0.3.36 from
tests/data/tiny-llama converted with --outtype f32: llama-imatrix -m tiny.gguf -f text.txt -c 64 -t 1 --chunks 8
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch

from qbuild.arch.convert import tensor_specs
from qbuild.arch.shapes import expected_tensors
from qbuild.calibration.imatrix import entries
from qbuild.calibration.imatrix import shapes as entry_shapes
from qbuild.calibration.run import Pass, calibrate
from qbuild.calibration.shapes import linears
from qbuild.calibration.statistics import Input, Statistics
from qbuild.calibration.texts import documents
from qbuild.calibration.tokens import Shape, begin_token, load_tokenizer, windows
from qbuild.checkpoint import Checkpoint, open_path, shapes
from qbuild.gguffile import read_header
from qbuild.imatrix import dump, load, size

DATA = Path(__file__).parent.parent / "data"
REFERENCE = DATA / "llama-imatrix" / "tiny-llama.gguf"

SMALL = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 64, "head_dim": 8, "num_local_experts": 3, "num_experts": 3,
    "num_experts_per_tok": 2, "moe_intermediate_size": 16, "n_routed_experts": 3, "n_shared_experts": 1,
    "shared_expert_intermediate_size": 48, "first_k_dense_replace": 1, "q_lora_rank": 24, "kv_lora_rank": 16,
    "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 8, "max_position_embeddings": 64,
}  # fmt: skip


def model(architecture: str, **more: Any) -> Checkpoint:
    config = {"architectures": [architecture], **SMALL, **more}
    return shapes(config, expected_tensors(config), source="small")


def sizes(checkpoint: Checkpoint) -> dict[str, tuple[int, ...]]:
    return {name: tensor.shape for name, tensor in checkpoint.tensors.items()}


def measured(checkpoint: Checkpoint, prefix: str = "model.layers.") -> list[Statistics]:
    """Statistics that say for each linear what they are of: its number, in the count and in every column."""
    layers, number = [], 0
    for layer in range(2):
        inputs = []
        for linear in linears(prefix, layer, sizes(checkpoint)):
            number += 1
            column = np.full(linear.inputs, number, np.float32)
            inputs.append(Input(linear.name, (linear.name,), number, None, column, column))
        layers.append(Statistics(layer, tuple(inputs)))
    return layers


def numbers(checkpoint: Checkpoint, layers: list[Statistics]) -> dict[str, list[str]]:
    """By GGUF name, the checkpoint's linear of every matrix."""
    names = {read.count: read.name for layer in layers for read in layer.inputs}
    found = entries(tensor_specs(checkpoint), layers)
    for sums, counts in found.values():
        assert (sums == counts[:, None]).all()
    planned = entry_shapes(tensor_specs(checkpoint), set(names.values()))
    assert planned == {weight: sums.shape for weight, (sums, _) in found.items()}
    return {weight: [names[int(count)] for count in counts] for weight, (_, counts) in found.items()}


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    tiny = open_path(DATA / "tiny-llama", "tiny")
    tokenizer = load_tokenizer(tiny.aux, "tiny")
    text = documents(str(REFERENCE.with_name("text.txt")))
    ids = windows(text, tokenizer, Shape(7, 64), begin_token(tokenizer)).ids
    layers: list[Statistics] = []
    task = Pass(tiny.config, sizes(tiny), ids, 0, 2, tmp_path_factory.mktemp("states"), gram=False)
    weights = safetensors.torch.load_file(DATA / "tiny-llama" / "model.safetensors")
    calibrate(task, weights.__getitem__, lambda _layer, data: layers.append(Statistics.from_bytes(data)))
    return dump(entries(tensor_specs(tiny), layers), ["text.txt"], len(ids), 64)


def test_the_file_is_llama_imatrix_s_but_for_rounding(ours: bytes, tmp_path: Path) -> None:
    path = tmp_path / "ours.gguf"
    path.write_bytes(ours)
    mine, theirs = load(str(path)).entries, load(str(REFERENCE)).entries
    assert set(mine) == set(theirs)
    for name, values in theirs.items():
        assert np.corrcoef(mine[name], values)[0, 1] > 0.9999, name
        assert mine[name].sum() == pytest.approx(values.sum(), rel=1e-3), name
    start = read_header(REFERENCE).data_offset
    assert ours[:start] == REFERENCE.read_bytes()[:start]
    tiny = open_path(DATA / "tiny-llama", "tiny")
    known = {linear.name for layer in range(3) for linear in linears("model.layers.", layer, sizes(tiny))}
    planned = entry_shapes(tensor_specs(tiny), known)
    assert size(planned, ["text.txt"]) == len(ours) == REFERENCE.stat().st_size


def test_without_the_begin_token_the_windows_are_others(ours: bytes) -> None:
    tiny = open_path(DATA / "tiny-llama", "tiny")
    tokenizer = load_tokenizer(tiny.aux, "tiny")
    text = documents(str(REFERENCE.with_name("text.txt")))
    plain = windows(text, tokenizer, Shape(7, 64)).ids
    begun = windows(text, tokenizer, Shape(7, 64), begin_token(tokenizer)).ids
    assert np.array_equal(plain.reshape(-1)[:63], begun[0, 1:])
    assert not np.array_equal(plain, begun)


def test_experts_stand_in_their_order_and_routers_have_no_entry() -> None:
    mixtral = model("MixtralForCausalLM")
    found = numbers(mixtral, measured(mixtral))
    experts = "model.layers.1.block_sparse_moe.experts"
    assert found["blk.1.ffn_gate_exps.weight"] == [f"{experts}.{n}.w1" for n in range(3)]
    assert found["blk.1.ffn_down_exps.weight"] == [f"{experts}.{n}.w2" for n in range(3)]
    assert found["blk.1.ffn_up_exps.weight"] == [f"{experts}.{n}.w3" for n in range(3)]
    assert found["blk.0.attn_q.weight"] == ["model.layers.0.self_attn.q_proj"]
    assert len(found) == 2 * 7
    assert not any("gate_inp" in name or "norm" in name for name in found)


def test_more_than_ten_experts_are_not_sorted_as_words() -> None:
    qwen = model("Qwen3MoeForCausalLM", num_local_experts=12)
    found = numbers(qwen, measured(qwen))
    assert found["blk.0.ffn_up_exps.weight"] == [f"model.layers.0.mlp.experts.{n}.up_proj" for n in range(12)]


def test_experts_in_one_tensor_are_taken_apart() -> None:
    plain = model("Qwen3MoeForCausalLM")
    tensors = {name: shape for name, shape in sizes(plain).items() if ".experts." not in name}
    for layer in range(2):
        tensors |= {
            f"model.layers.{layer}.mlp.experts.gate_up_proj": (3, 32, 32),
            f"model.layers.{layer}.mlp.experts.down_proj": (3, 32, 16),
        }
    fused = shapes(plain.config, sorted(tensors.items()), source="fused")
    found = numbers(fused, measured(fused))
    both = [f"model.layers.0.mlp.experts.gate_up_proj[{n}]" for n in range(3)]
    assert found["blk.0.ffn_gate_exps.weight"] == found["blk.0.ffn_up_exps.weight"] == both
    assert found["blk.0.ffn_down_exps.weight"] == [f"model.layers.0.mlp.experts.down_proj[{n}]" for n in range(3)]


@pytest.mark.parametrize(
    ("architecture", "prefix", "expected"),
    [
        ("Phi3ForCausalLM", "model.layers.", {"attn_qkv": "self_attn.qkv_proj", "ffn_up": "mlp.gate_up_proj"}),
        ("GPTNeoXForCausalLM", "gpt_neox.layers.", {"attn_qkv": "attention.query_key_value"}),
        ("Gemma3ForCausalLM", "model.layers.", {"attn_output": "self_attn.o_proj", "ffn_down": "mlp.down_proj"}),
        ("Qwen2MoeForCausalLM", "model.layers.", {"ffn_down_shexp": "mlp.shared_expert.down_proj"}),
    ],
)
def test_fused_and_shared_linears(architecture: str, prefix: str, expected: Mapping[str, str]) -> None:
    checkpoint = model(architecture)
    found = numbers(checkpoint, measured(checkpoint, prefix))
    for weight, linear in expected.items():
        assert found[f"blk.1.{weight}.weight"] == [f"{prefix}1.{linear}"]


def test_the_halves_of_latent_attention_are_left_out() -> None:
    deepseek = model("DeepseekV2ForCausalLM", num_key_value_heads=4)
    found = numbers(deepseek, measured(deepseek))
    assert found["blk.0.attn_kv_a_mqa.weight"] == ["model.layers.0.self_attn.kv_a_proj_with_mqa"]
    assert {"blk.0.ffn_up.weight", "blk.1.ffn_up_exps.weight", "blk.1.ffn_up_shexp.weight"} <= set(found)
    assert not any("attn_k_b" in name or "attn_v_b" in name for name in found)


def test_an_expert_without_tokens_counts_none_and_its_columns_are_equal(tmp_path: Path) -> None:
    mixtral = model("MixtralForCausalLM")
    lost = "model.layers.0.block_sparse_moe.experts.1."
    first, second = measured(mixtral)
    reached = tuple(read for read in first.inputs if not read.name.startswith(lost))
    first = replace(first, inputs=reached, unreached=(f"{lost}w1", f"{lost}w2", f"{lost}w3"))
    found = entries(tensor_specs(mixtral), [first, second])
    sums, counts = found["blk.0.ffn_down_exps.weight"]
    assert counts[1] == 0
    assert counts[0] > 0 < counts[2]
    assert not sums[1].any()
    path = tmp_path / "i.gguf"
    path.write_bytes(dump(found, ["t"], 1, 8))
    values = load(str(path)).values("blk.0.ffn_down_exps.weight", 3, 48, "here")
    assert values is not None
    assert (values == 1).all()  # counts are the numbers in every column here, and the lost one is read as 1


def test_a_weight_that_nothing_was_measured_for_has_no_entry() -> None:
    llama = model("LlamaForCausalLM")
    first = measured(llama)[:1]
    found = entries(tensor_specs(llama), first)
    assert len(found) == 7
    assert all(name.startswith("blk.0.") for name in found)
