"""The type rules against llama-quantize's own choices, recorded by tests/reference/make_mixes.py."""

from __future__ import annotations

import gzip
import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
from arch.arch_kit import type_runs

from qbuild.arch.convert import ModelFacts, Piece, TensorSpec, Transform
from qbuild.arch.mix import Mix, choose

HERE = Path(__file__).parent.parent / "reference"
RECORDED: dict[str, dict[str, str | None]] = json.loads(gzip.decompress((HERE / "mixes.json.gz").read_bytes()))["types"]
OPTIONS: dict[str, dict[str, Any]] = {
    "pure": {"pure": True},
    "output": {"output_type": "Q8_0"},
    "embedding": {"embedding_type": "Q4_0"},
    "leave": {"leave_output": True},
    "manual_v": {"tensor_types": (("blk\\.0\\.ATTN_V", "Q8_0"), ("ffn_down", "Q5_K"))},
}


def _maker() -> Any:
    spec = importlib.util.spec_from_file_location("make_mixes", HERE / "make_mixes.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


MAKER = _maker()


def specs_and_facts(name: str) -> tuple[list[TensorSpec], ModelFacts]:
    shape = MAKER.MODELS[name]
    _, tensors = MAKER.model(**shape)
    specs = [
        TensorSpec(n, s, (Piece(n),), Transform(), "F32" if len(s) == 1 or n.endswith("gate_inp.weight") else "F16")
        for n, s in tensors
    ]
    is_70b = shape["layers"] == 80 and shape["heads"] != shape["kv"]
    return specs, ModelFacts("llama", shape["layers"], shape["heads"], shape["kv"], shape.get("experts", 0), is_70b, 0)


@pytest.mark.parametrize("recorded", RECORDED)
def test_every_tensor_gets_the_type_llama_quantize_gives_it(recorded: str) -> None:
    name, _, option = recorded.partition(" ")
    specs, facts = specs_and_facts(name)
    wrong = {}
    for file_type, expected in RECORDED[recorded].items():
        mix = Mix(file_type, has_imatrix=option == "imatrix", **OPTIONS.get(option, {}))
        found = type_runs(specs, facts, mix)
        if found != expected:
            wrong[file_type] = (found, expected)
    assert wrong == {}


def test_a_pattern_that_types_by_hand_does_not_advance_the_counters() -> None:
    specs, facts = specs_and_facts("gqa")
    mix = Mix("Q4_K_S", tensor_types=(("blk\\.0\\.attn_v", "Q8_0"),))
    chosen = {s.name: t for s, t in choose(specs, facts, mix)}
    assert [chosen[f"blk.{i}.attn_v.weight"] for i in (0, 1, 2)] == ["Q8_0", "Q5_K", "Q5_K"]
    names = [n for n in (s.name for s, _ in choose(specs, facts, mix)) if n.endswith("attn_v.weight")]
    assert [n for n in names if chosen[n] == "Q5_K"] == names[1:5]


def test_order_is_by_layer_number_then_name_not_by_name_alone() -> None:
    specs, facts = specs_and_facts("gqa")
    names = [s.name for s, _ in choose(specs, facts, Mix("F16"))]
    assert names[:4] == ["output.weight", "output_norm.weight", "token_embd.weight", "blk.0.attn_k.weight"]
    assert names.index("blk.9.attn_k.weight") < names.index("blk.10.attn_k.weight")
