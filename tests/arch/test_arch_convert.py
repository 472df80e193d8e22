"""From a checkpoint's headers to GGUF tensors: what is refused, what is stacked, and chunks that equal the whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from arch.arch_kit import maker

from qbuild.arch.convert import Transform, model_facts, tensor_specs
from qbuild.arch.families import FAMILIES
from qbuild.arch.shapes import expected_tensors
from qbuild.checkpoint import Checkpoint, SourceTensor, open_path, shapes
from qbuild.errors import InputError
from qbuild.gguffile import GGUFType, encode_kv, header, layout

MAKER = maker("make_families")


def planned(name: str, **over: Any) -> Checkpoint:
    config = MAKER.configuration(name) | over
    return shapes(config, expected_tensors(config), source=name)


def without(checkpoint: Checkpoint, name: str) -> Checkpoint:
    tensors = {n: t for n, t in checkpoint.tensors.items() if n != name}
    return Checkpoint("shapes", checkpoint.source, None, (), tensors, checkpoint.config)


def with_tensor(checkpoint: Checkpoint, name: str, shape: tuple[int, ...], dtype: str = "BF16") -> Checkpoint:
    tensors = {**checkpoint.tensors, name: SourceTensor(name, dtype, shape, 0, 0, 2)}
    return Checkpoint("shapes", checkpoint.source, None, (), tensors, checkpoint.config)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.uint16])
@pytest.mark.parametrize("kind", ["none", "permute", "add_one"])
def test_chunks_of_whole_units_give_what_the_whole_gives(kind: str, dtype: type) -> None:
    whole = np.random.default_rng(0).integers(0, 60000, (48, 20)).astype(dtype)
    transform = Transform(kind, 8)
    for rows in (8, 16, 24):
        parts = [transform.apply(whole[at : at + rows]) for at in range(0, 48, rows)]
        assert np.array_equal(np.concatenate(parts), transform.apply(whole), equal_nan=True)


def test_a_transposed_matrix_of_a_head_comes_out_by_its_columns() -> None:
    """Two heads, [2, 3] each in the source, seen as rows of two: what stands in a column becomes a row."""
    source = np.arange(12, dtype=np.float32)
    found = Transform("transpose", 3).apply(source.reshape(6, 2))
    assert found.tolist() == [[0, 3], [1, 4], [2, 5], [6, 9], [7, 10], [8, 11]]


def test_heads_that_no_row_begins_with_are_refused() -> None:
    with pytest.raises(InputError, match="heads of 48 and 32 with a rank of 64 are not supported"):
        tensor_specs(planned("deepseek2-lite", qk_nope_head_dim=48))


def test_permute_turns_halves_of_a_head_into_pairs() -> None:
    column = np.arange(12, dtype=np.float32).reshape(-1, 1)
    assert Transform("permute", 6).apply(column).ravel().tolist() == [0, 3, 1, 4, 2, 5, 6, 9, 7, 10, 8, 11]
    bias = column.reshape(1, -1)
    assert Transform("permute", 6).apply(bias).tolist() == [[0, 3, 1, 4, 2, 5, 6, 9, 7, 10, 8, 11]]


def test_one_is_added_in_the_sources_arithmetic() -> None:
    half = np.array([[0.0004]], np.float16)
    assert Transform("add_one").apply(half).dtype == np.float16
    assert Transform("add_one").apply(half)[0, 0] == 1  # lost, as in the converter
    widened = Transform("add_one").apply((half.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16))
    assert widened.dtype == np.float32
    assert widened[0, 0] > 1


def test_an_unknown_architecture_names_the_nearest_and_exits_with_4() -> None:
    config = MAKER.configuration("llama-bpe") | {"architectures": ["LlamaForCausalLN"]}
    with pytest.raises(InputError, match="architecture LlamaForCausalLN is not supported") as caught:
        expected_tensors(config)
    assert caught.value.exit_code == 4
    assert "nearest: LlamaForCausalLM" in caught.value.remedy


def test_a_missing_tensor_is_named() -> None:
    name = "model.layers.1.block_sparse_moe.experts.3.w2.weight"
    with pytest.raises(InputError, match=r"experts\.3\.w2\.weight is missing"):
        tensor_specs(without(planned("mixtral"), name))


def test_a_shape_that_is_not_the_configs_is_told_apart() -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    with pytest.raises(InputError, match=r"has shape \[512, 128\], the config says \[512, 256\]"):
        tensor_specs(with_tensor(planned("gemma2"), name, (512, 128)))


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.mlp.up_proj.weight_scale_inv",
        "model.layers.2.mlp.up_proj.weight",  # a layer more than the config says
        "model.layers.01.mlp.up_proj.weight",
        "score.weight",
    ],
)
def test_a_tensor_that_belongs_to_nothing_is_refused_not_dropped(name: str) -> None:
    with pytest.raises(InputError, match="does not belong to llama"):
        tensor_specs(with_tensor(planned("llama-mixed-dtypes"), name, (512, 256)))


def test_an_expert_more_than_the_config_says_is_refused() -> None:
    name = "model.layers.0.block_sparse_moe.experts.4.w2.weight"
    with pytest.raises(InputError, match="does not belong to llama"):
        tensor_specs(with_tensor(planned("mixtral"), name, (256, 512)))


def test_experts_of_several_types_are_refused() -> None:
    name = "model.layers.0.block_sparse_moe.experts.1.w2.weight"
    with pytest.raises(InputError, match="stored in different types"):
        tensor_specs(with_tensor(planned("mixtral"), name, (256, 512), "F32"))


def test_a_config_that_llama_cpp_does_not_convert_is_refused_at_plan_time() -> None:
    with pytest.raises(InputError, match=r"sets mlp_only_layers: \[1\]"):
        tensor_specs(planned("qwen3moe", mlp_only_layers=[1]))


def test_a_granite_moe_without_experts_is_refused_and_a_granite_4_without_them_is_none() -> None:
    with pytest.raises(InputError, match="sets num_local_experts: 0"):
        tensor_specs(planned("granite-moe-shared", num_local_experts=0))
    assert model_facts(planned("granite4")).arch == "granite"


@pytest.mark.parametrize("variant", ["granite", "granite-moe", "granite4"])
def test_a_granite_with_llama_3_rope_is_refused_and_not_made_without_its_factors(variant: str) -> None:
    with pytest.raises(InputError, match=r"granite(moe)? with a rope scaling of Llama 3 is not supported"):
        tensor_specs(planned(variant, rope_scaling=MAKER.LLAMA3))


def test_a_granite_4_with_state_space_layers_is_refused() -> None:
    with pytest.raises(InputError, match="layers of mamba are not supported"):
        tensor_specs(planned("granite4", layer_types=["attention", "mamba"]))


def test_a_config_without_a_size_is_told_which() -> None:
    config = MAKER.configuration("gemma2")
    del config["hidden_size"]
    with pytest.raises(InputError, match=r"config\.json has no hidden_size"):
        expected_tensors(config)


def test_buffers_and_the_seeing_part_are_left_out() -> None:
    plain = planned("gpt-neox")
    more = with_tensor(plain, "gpt_neox.layers.0.attention.rotary_emb.inv_freq", (8,))
    more = with_tensor(more, "gpt_neox.layers.0.attention.masked_bias", (1,))
    assert tensor_specs(more) == tensor_specs(plain)


def test_the_masks_in_the_first_gpt2_files_are_left_out() -> None:
    plain = planned("gpt2")
    masked = with_tensor(plain, "h.0.attn.bias", (1, 1, 64, 64), "F32")
    assert tensor_specs(masked) == tensor_specs(plain)


def test_experts_are_stacked_in_their_numbers_order_however_names_sort() -> None:
    specs = {s.name: s for s in tensor_specs(planned("mixtral", num_local_experts=12))}
    pieces = [piece.source for piece in specs["blk.1.ffn_down_exps.weight"].pieces]
    assert pieces == [f"model.layers.1.block_sparse_moe.experts.{i}.w2.weight" for i in range(12)]
    assert specs["blk.1.ffn_down_exps.weight"].shape == (12, 256, 512)


def test_fused_experts_are_cut_in_halves_by_rows() -> None:
    config = MAKER.configuration("qwen3moe-fused")
    checkpoint = shapes(config, MAKER.shapes("qwen3moe-fused"), source="fused")
    specs = {s.name: s for s in tensor_specs(checkpoint)}
    rows = [(p.start, p.stop) for p in specs["blk.0.ffn_up_exps.weight"].pieces]
    assert rows == [(64, 128), (192, 256), (320, 384), (448, 512)]


def test_outer_dimensions_of_one_are_dropped_as_ggml_drops_them() -> None:
    specs = {s.name: s for s in tensor_specs(planned("qwen2moe"))}
    assert specs["blk.0.ffn_gate_inp_shexp.weight"].shape == (128,)


def test_the_first_half_precision_matrix_decides_the_type_of_all() -> None:
    plain = planned("llama-mixed-dtypes")
    first = next(name for name, tensor in plain.tensors.items() if len(tensor.shape) > 1)
    as_f32 = with_tensor(plain, first, plain.tensors[first].shape, "F32")
    assert {s.stored for s in tensor_specs(as_f32)} == {"BF16", "F32"}
    only_f32 = {n: SourceTensor(n, "F32", t.shape, 0, 0, 4) for n, t in plain.tensors.items()}
    assert {s.stored for s in tensor_specs(Checkpoint("shapes", "x", None, (), only_f32, plain.config))} == {
        "F16",
        "F32",
    }


@pytest.mark.parametrize("variant", MAKER.VARIANTS)
def test_a_plan_from_the_config_alone_is_that_of_the_checkpoint(variant: str) -> None:
    """Names and shapes; what a checkpoint need not have is not planned."""
    over = MAKER.VARIANTS[variant]
    checkpoint = planned(variant)
    found = shapes(MAKER.configuration(variant), MAKER.shapes(variant), source=variant)
    names, expected = ({(s.name, s.shape) for s in tensor_specs(c)} for c in (checkpoint, found))
    if {"_extra", "_headless"} & over.keys():
        assert names <= expected or expected <= names
    else:
        assert names == expected
        assert model_facts(found) == model_facts(checkpoint)


def test_every_row_of_a_family_gives_a_name_of_its_own() -> None:
    for name, rules in FAMILIES.items():
        for rows in (rules.layer, rules.outer):
            alone = [row.gguf for row in rows if row.when != "fused"]
            assert len(set(alone)) == len(alone), name


def test_a_gguf_source_is_taken_as_it_is(tmp_path: Path) -> None:
    pairs = [encode_kv("general.architecture", "anything", GGUFType.STRING), *(
        encode_kv(f"anything.{key}", value, GGUFType.UINT32)
        for key, value in (("block_count", 3), ("attention.head_count", 4), ("expert_count", 6))
    )]  # fmt: skip
    tensors = [("token_embd.weight", (4, 256), "Q4_K"), ("blk.0.ffn_gate_inp_shexp.weight", (1, 256), "F32")]
    data = header(pairs, tensors)
    path = tmp_path / "model.gguf"
    path.write_bytes(data + bytes(layout(tensors)[1]))
    checkpoint = open_path(path, "model.gguf")
    assert [(s.name, s.shape, s.stored) for s in tensor_specs(checkpoint)] == [
        ("token_embd.weight", (4, 256), "Q4_K"),
        ("blk.0.ffn_gate_inp_shexp.weight", (256,), "F32"),
    ]
    facts = model_facts(checkpoint)
    assert (facts.arch, facts.n_layer, facts.n_head, facts.n_head_kv, facts.n_expert) == ("anything", 3, 4, 4, 6)
