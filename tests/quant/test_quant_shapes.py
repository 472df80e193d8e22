"""Checkpoints that no loader would read are refused before any weight is, and the sizes of the others are known."""

from __future__ import annotations

import sys
from pathlib import Path
from subprocess import run
from typing import Any

import pytest

from qbuild.errors import InputError
from qbuild.quant.shapes import LAYOUTS, LOADERS, Scheme, packed, quantization_config, refusal, rejections, scheme_of

FITS = {"q_proj": (64, 128)}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("group_size", [32, 64, 128, -1])
def test_what_loaders_read_is_not_refused(layout: str, group_size: int) -> None:
    assert refusal(Scheme(layout, 4, group_size, True), FITS) is None
    assert rejections(Scheme(layout, 4, group_size, True), FITS) == {}


@pytest.mark.parametrize(
    ("scheme", "shape", "said"),
    [
        (Scheme("gguf", 4, 64, True), (64, 128), "no layout 'gguf'"),
        (Scheme("awq-gemm", 8, 64, False), (64, 128), "awq-gemm of 8 bits"),
        (Scheme("awq-gemm", 4, 64, False, indexed=True), (64, 128), "no index of groups"),
        (Scheme("pack-quantized", 4, 64, True, indexed=True), (64, 128), "no index of groups"),
        (Scheme("gptq", 4, 64, False), (64, 128), "gptq of 4 bits, asymmetric"),
        (Scheme("gptq", 5, 64, True), (64, 128), "gptq of 5 bits"),
        (Scheme("gptq", 4, 8, True), (64, 128), "not 8"),
        (Scheme("awq-gemm", 4, 128, False), (64, 192), "group size 128"),
        (Scheme("awq-gemm", 4, 64, False), (60, 128), "multiples of 8"),
        (Scheme("gptq", 4, -1, True), (64, 124), "multiples of 8"),
        (Scheme("gptq", 3, -1, True), (48, 64), "multiples of 32"),
        (Scheme("pack-quantized", 4, -1, False), (60, 64), "multiples of 8"),
        (Scheme("pack-quantized", 8, 64, False), (64, 64), "8 bits, asymmetric"),
    ],
)
def test_what_loaders_reject_is_refused(scheme: Scheme, shape: tuple[int, int], said: str) -> None:
    assert said in (refusal(scheme, {"q_proj": shape}) or "")


def test_a_misfit_is_named_among_linears_that_fit() -> None:
    shapes = {**FITS, "down_proj": (64, 96)}
    assert (refusal(Scheme("gptq", 4, 64, True), shapes) or "").startswith("down_proj ")


@pytest.mark.parametrize(
    ("scheme", "other"),
    [
        (Scheme("gptq", 3, 64, True), "vLLM"),
        (Scheme("gptq_v2", 4, 64, False), "vLLM"),
        (Scheme("gptq", 4, 256, True), "vLLM"),
        (Scheme("pack-quantized", 4, 64, False), "transformers"),
    ],
)
def test_what_one_loader_reads_is_no_refusal_but_the_other_is_named(scheme: Scheme, other: str) -> None:
    assert refusal(scheme, {"q_proj": (64, 256)}) is None
    assert list(rejections(scheme, FITS)) == [other]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_transformers_reads_experts_of_compressed_tensors_only(layout: str) -> None:
    """Found by loading small Mixtral and Qwen2 MoE directories: of AWQ and GPTQ it leaves experts random."""
    experts = {"model.layers.0.mlp.experts.0.up_proj": (64, 128)}
    assert refusal(Scheme(layout, 4, 64, True), experts) is None
    assert ("transformers" in rejections(Scheme(layout, 4, 64, True), experts)) == (layout != "pack-quantized")


def test_names_and_shapes_are_those_of_the_loaders() -> None:
    """[out, in] = [64, 128], groups of 32: facts of AutoAWQ's, AutoGPTQ's and compressed-tensors' own modules."""
    as_text = {}
    for layout in ("awq-gemm", "gptq_v2", "pack-quantized"):
        stored = packed(Scheme(layout, 4, 32, False, dtype="BF16"), "m", 64, 128)
        as_text[layout] = [f"{t.name} {t.dtype} {list(t.shape)}" for t in stored]
    assert as_text["awq-gemm"] == ["m.qweight I32 [128, 8]", "m.qzeros I32 [4, 8]", "m.scales F16 [4, 64]"]
    assert as_text["gptq_v2"] == [
        "m.qweight I32 [16, 64]", "m.qzeros I32 [4, 8]", "m.scales F16 [4, 64]", "m.g_idx I32 [128]"
    ]  # fmt: skip
    assert as_text["pack-quantized"] == [
        "m.weight_packed I32 [64, 16]", "m.weight_scale BF16 [64, 4]", "m.weight_shape I64 [2]",
        "m.weight_zero_point I32 [8, 4]",
    ]  # fmt: skip


def test_three_bits_fill_words_without_holes() -> None:
    shapes = {t.name: t.shape for t in packed(Scheme("gptq", 3, -1, True), "m", 64, 128)}
    assert shapes == {"m.qweight": (12, 64), "m.qzeros": (1, 6), "m.scales": (1, 64), "m.g_idx": (128,)}


def test_the_size_of_four_bits_in_groups_of_128() -> None:
    """Codes of half a byte; a group adds a scale of two bytes and half a byte of zero point."""
    stored = packed(Scheme("awq-gemm", 4, 128, False), "m", 4096, 4096)
    assert sum(t.nbytes for t in stored) == 4096 * 4096 // 2 + 4096 * 32 * 2 + 4096 * 32 // 2


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_head_is_never_quantized_and_routers_are_named_in_full(layout: str) -> None:
    router = "model.layers.0.mlp.gate"
    config = quantization_config(Scheme(layout, 4, 64, True), [router, "lm_head"])
    match config["quant_method"]:
        case "awq":
            assert config["modules_to_not_convert"] == ["lm_head", router]
        case "gptq":
            assert config["lm_head"] is False
            assert config["dynamic"] == {r"-:^model\.layers\.0\.mlp\.gate$": {}}
        case _:
            assert config["ignore"] == ["lm_head", router]


def test_a_whole_row_is_a_channel_in_compressed_tensors() -> None:
    config = quantization_config(Scheme("pack-quantized", 8, -1, True), [])
    weights = config["config_groups"]["group_0"]["weights"]
    assert (weights["strategy"], weights["group_size"]) == ("channel", None)


@pytest.mark.parametrize(
    "scheme",
    [
        Scheme("awq-gemm", 4, 64, False), Scheme("gptq", 3, 128, True), Scheme("gptq_v2", 4, 32, False, indexed=True),
        Scheme("pack-quantized", 8, -1, True), Scheme("pack-quantized", 4, 32, False, dtype="BF16"),
    ],
)  # fmt: skip
def test_a_scheme_is_told_by_its_config(scheme: Scheme) -> None:
    assert scheme_of(quantization_config(scheme, []), scheme.dtype, "m") == scheme


def grouped_by_index() -> dict[str, Any]:
    config = quantization_config(Scheme("pack-quantized", 4, 64, True), [])
    config["config_groups"]["group_0"]["weights"]["actorder"] = "group"
    return config


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"quant_method": "awq", "version": "gemv", "bits": 4, "group_size": 64}, "not known here"),
        ({"quant_method": "gptq", "checkpoint_format": "marlin"}, "not known here"),
        ({"quant_method": "gptq", "bits": 4}, "not complete"),
        ({"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {}}, "not complete"),
        ({"quant_method": "bitsandbytes"}, "'bitsandbytes'"),
        (grouped_by_index(), "not complete"),
    ],
)
def test_other_configs_are_refused(config: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        scheme_of(config, "F16", "a model")


def test_planning_loads_neither_torch_nor_numpy() -> None:
    code = "import qbuild.quant.shapes, sys; print(*{'torch', 'numpy'} & set(sys.modules))"
    assert run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == ""


ROWS = {
    "AWQ": (Scheme("awq-gemm", 4, 64, False), False),
    "AWQ, experts": (Scheme("awq-gemm", 4, 64, False), True),
    "GPTQ, 4 or 8 bits": (Scheme("gptq", 8, 64, True), False),
    "GPTQ, 2 or 3 bits": (Scheme("gptq", 3, 64, True), False),
    "GPTQ, experts": (Scheme("gptq", 4, 64, True), True),
    "gptq_v2, asymmetric": (Scheme("gptq_v2", 4, 64, False), False),
    "compressed-tensors, 4 or 8 bits": (Scheme("pack-quantized", 8, 64, True), False),
    "compressed-tensors, experts": (Scheme("pack-quantized", 4, 64, True), True),
    "compressed-tensors, 4 bits, asymmetric": (Scheme("pack-quantized", 4, 64, False), False),
}


def test_the_table_of_loaders_is_what_the_plan_goes_by() -> None:
    text = (Path(__file__).parents[2] / "docs" / "checkpoints.md").read_text()
    for title, (scheme, experts) in ROWS.items():
        names = ["model.layers.0.mlp.experts.0.up_proj" if experts else "model.layers.0.mlp.up_proj"]
        known = {loader.name for loader in LOADERS if scheme.layout in loader.layouts}
        read = known - set(rejections(scheme, names))
        cells = ["yes" if n in read else "no" if n in known else "–" for n in ("GPTQModel", "transformers", "vLLM")]
        assert f"| {title} | {' | '.join(cells)} |\n" in text
