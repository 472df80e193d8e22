"""The type rules on every family, at depth, against llama-quantize's dry run (recorded by make_types.py)."""

from __future__ import annotations

import gzip
import json

import pytest
from arch.arch_kit import DATA, maker, type_runs

from qbuild.arch import mix
from qbuild.arch.convert import ModelFacts, Piece, TensorSpec, Transform
from qbuild.errors import ConfigError

RECORDED: dict[str, dict[str, str | None]] = json.loads(gzip.decompress((DATA / "arch/types.json.gz").read_bytes()))[
    "types"
]
FACTS = ModelFacts("llama", 2, 4, 4, 0, False, 0)


def spec(name: str, shape: tuple[int, ...], stored: str = "F16") -> TensorSpec:
    return TensorSpec(name, shape, (Piece(name),), Transform(), stored)


@pytest.mark.parametrize("recorded", RECORDED)
def test_every_family_gets_the_types_llama_quantize_gives_it(recorded: str) -> None:
    name, _, option = recorded.partition(" ")
    specs, facts = maker("make_types").specs_and_facts(name)
    wrong = {}
    for file_type, expected in RECORDED[recorded].items():
        found = type_runs(specs, facts, mix.Mix(file_type, has_imatrix=option == "imatrix"))
        if found != expected:
            wrong[file_type] = (found, expected)
    assert wrong == {}


def test_a_type_asked_for_by_option_does_not_fall_back() -> None:
    specs = [spec("output.weight", (64, 96)), spec("token_embd.weight", (64, 96))]
    with pytest.raises(ConfigError, match=r"output.weight: Q4_K takes rows of a multiple of 256 weights, it has 96"):
        mix.choose(specs, FACTS, mix.Mix("Q4_K_M", output_type="Q4_K"))
    with pytest.raises(ConfigError, match=r"token_embd\.weight"):
        mix.choose(specs, FACTS, mix.Mix("F16", embedding_type="Q6_K"))


def test_a_pattern_that_is_no_regular_expression_is_a_usage_error() -> None:
    with pytest.raises(ConfigError, match=r"'blk\.\(' is not a regular expression"):
        mix.choose([], FACTS, mix.Mix("Q4_K_M", tensor_types=(("blk.(", "Q8_0"),)))


@pytest.mark.parametrize(
    ("file_type", "name", "needs"),
    [
        ("IQ2_XXS", "blk.0.attn_q.weight", True),
        ("IQ3_XXS", "blk.0.attn_q.weight", True),
        ("Q2_K_S", "blk.0.ffn_up.weight", True),
        ("Q2_K", "blk.0.ffn_up.weight", False),
        ("IQ4_XS", "blk.0.ffn_up.weight", False),
        ("IQ3_S", "blk.0.ffn_up.weight", False),
    ],
)
def test_which_files_need_an_importance_matrix(file_type: str, name: str, needs: bool) -> None:
    choices = mix.choose([spec(name, (256, 256)), spec("output.weight", (256, 256))], FACTS, mix.Mix(file_type))
    assert mix.needs_imatrix(choices, mix.Mix(file_type)) == (name if needs else None)
