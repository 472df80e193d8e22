"""Configuration as a user meets it: recipes, targets, overrides, and what is said when one is wrong."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import yaml
from conftest import Run

from qbuild import schema
from qbuild.cli import compose
from qbuild.cli.args import read
from qbuild.cli.compose import Job
from qbuild.cli.verbs import VERBS
from qbuild.errors import ConfigError
from qbuild.ggml import FILE_TYPES

CONF, RECIPES = compose.packaged()


def composed(*argv: str) -> Job:
    with compose.opened(read(list(argv), {name: verb.words for name, verb in VERBS.items()}), Path.cwd()) as composer:
        return composer.job()


def test_every_file_type_is_a_target() -> None:
    paths = [path for path in (CONF / "target" / "gguf").iterdir() if path.stem != "fit"]  # types of its own
    files = {path.stem: yaml.safe_load(path.read_text())["ftype"] for path in paths}
    assert files == {name.lower(): name for name in FILE_TYPES}


@pytest.mark.parametrize("name", sorted(path.stem for path in RECIPES.iterdir()))
def test_every_packaged_recipe_composes(project: Path, name: str) -> None:
    config = composed(f"+recipe={name}").config
    assert config.model.source
    assert config.targets


@pytest.mark.parametrize("name", sorted(path.stem for path in (CONF / "model").iterdir()))
def test_every_packaged_model_can_be_planned_with_nothing_downloaded(project: Path, name: str) -> None:
    config = composed(f"model={name}").config.model.config
    assert config is not None
    assert config["architectures"]
    assert {type(config[key]) for key in ("hidden_size", "num_hidden_layers", "vocab_size")} == {int}
    assert type(config["rms_norm_eps"]) is float


def test_nothing_packaged_reads_the_environment() -> None:
    for path in [*CONF.rglob("*.yaml"), *RECIPES.rglob("*.yaml")]:
        assert "oc.env" not in path.read_text(), path


def test_targets_land_under_their_names_and_can_be_overridden(project: Path) -> None:
    config = composed("target=[gguf/q4_k_m,gguf/q8_0]", "targets.q8_0.output_type=F16").config
    assert list(config.targets) == ["q4_k_m", "q8_0"]
    assert config.targets["q4_k_m"] == schema.GgufTarget(ftype="Q4_K_M")
    assert config.targets["q8_0"] == schema.GgufTarget(ftype="Q8_0", output_type="F16")


def test_a_command_line_overrides_the_target_of_a_recipe(project: Path) -> None:
    assert list(composed("+recipe=llama7b_q4", "target=gguf/q8_0").config.targets) == ["q8_0"]


def test_what_a_recipe_sets_of_a_target_that_is_not_chosen_makes_no_target(project: Path) -> None:
    assert list(composed("+recipe=llama7b_release", "target=gguf/q2_k").config.targets) == ["q2_k"]
    assert composed("+recipe=llama7b_release", "target=gguf/q2_k").config.targets["q2_k"].imatrix == "auto"
    write(project / "recipes" / "own.yaml", "targets:\n  q6_k: {output_type: Q8_0}\n  small: {ftype: Q4_0}\n")
    own = composed("+recipe=own", "target=awq/w4_g64")
    assert list(own.config.targets) == ["awq_w4_g64", "small"]
    assert own.config.unchosen == ("q6_k",)


def test_what_is_set_and_does_nothing_is_told_and_stops_nothing(project: Path, qbuild: Run) -> None:
    types = "{ffn_dwn: Q8_0, ffn_down: Q6_K, zz: Q6_K, attn_norm: Q8_0}"
    text = f"targets:\n  q4_k_m: {{tensor_types: {types}}}\n  q5_k_m: {{pure: true}}\n  q6_k: {{pure: true}}\n"
    write(project / "recipes" / "own.yaml", f"defaults:\n  - override /model: tinyllama1b\n{text}")
    planned = qbuild("plan", "-m", "+recipe=own", "target=gguf/q4_k_m,gguf/q5_k_m", "format=json")
    aside, first, second, norms = planned.document["builds"][0]["notices"]
    assert aside == {"place": "targets", "fact": "set, but not chosen: q6_k", "remedy": "chosen: q4_k_m, q5_k_m"}
    assert first["place"] == "targets.q4_k_m.tensor_types.ffn_dwn"
    assert first["remedy"] == "did you mean ffn_down or ffn_up?"
    assert (second["place"], second["remedy"][:8]) == ("targets.q4_k_m.tensor_types.zz", "tensors:")
    assert (norms["place"], norms["fact"]) == (
        "targets.q4_k_m.tensor_types.attn_norm",
        "no tensor that is quantized has such a name",
    )
    types = "targets.f16.tensor_types={ffn_down: Q8_0}"
    floats = qbuild("plan", "model=tinyllama1b", "target=gguf/f16", types, "format=json")
    assert [notice["remedy"] for notice in floats.document["notices"]] == ["tensors: none"]
    told = qbuild("plan", "+recipe=own", "target=gguf/q4_k_m")
    assert told.err == ""
    assert (
        "\n\nnotice: targets: set, but not chosen: q5_k_m, q6_k\n  chosen: q4_k_m\n"
        "notice: targets.q4_k_m.tensor_types.ffn_dwn: no tensor that is quantized has such a name\n  did you mean"
        in told.out
    )


def test_calibration_without_a_text_of_ones_own_is_told(project: Path, qbuild: Run, text: Path) -> None:
    words = "plan", "model=tinyllama1b", "format=json"
    (notice,) = qbuild(*words, "target=imatrix").document["notices"]
    assert (notice["place"], notice["remedy"]) == ("calibration.source", "another one: calibration.source=FILE")
    assert (
        qbuild(*words, "target=imatrix", "calibration.length=64", f"calibration.source={text}").document["notices"]
        == []
    )
    assert qbuild(*words, "target=gguf/q4_k_m").document["notices"] == []


@pytest.mark.parametrize(
    ("word", "fact", "remedy"),
    [
        ("calibration.samples=many", "'many' is not a whole number", "write a whole number: 8"),
        ("calibration.seed=1.5", "'1.5' is not a whole number", "write a whole number: 8"),
        ("rebuild=perhaps", "'perhaps' is not true or false", "write true or false"),
        ("targets=gguf/q8_0", "is a group of keys, not a value", "to choose targets: target=NAME"),
    ],
)
def test_a_value_of_another_kind_is_told_with_what_is_right(
    project: Path, qbuild: Run, word: str, fact: str, remedy: str
) -> None:
    done = qbuild("plan", "model=tinyllama1b", "target=gguf/q8_0", word, "format=json")
    assert (done.code, done.error["place"]) == (2, word.partition("=")[0])
    assert (done.error["fact"], done.error["remedy"]) == (fact, remedy)


def test_what_the_parser_finds_is_no_key(project: Path, qbuild: Run) -> None:
    done = qbuild("plan", "model=tinyllama1b", "target=gguf/q8_0", "+unchosen=[q4_k_m]", "format=json")
    assert done.error["fact"] == "there is no such key"
    assert "unchosen" not in qbuild("--cfg", "job").out


def test_tensor_types_keep_their_order_and_may_hold_dots(project: Path) -> None:
    types = r"targets.q4_k_m.tensor_types={blk\.0\.ffn: Q6_K, attn_v: Q8_0}"
    target = composed("target=gguf/q4_k_m", types).config.targets["q4_k_m"]
    assert isinstance(target, schema.GgufTarget)
    assert list(target.tensor_types.items()) == [(r"blk\.0\.ffn", "Q6_K"), ("attn_v", "Q8_0")]


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_a_recipe_of_the_project_needs_no_header_and_shadows_a_packaged_one(project: Path) -> None:
    write(project / "recipes" / "llama7b_q4.yaml", "model:\n  source: mine\n")
    write(project / "recipes" / "deep" / "er.yaml", "defaults:\n  - override /target: gguf/q8_0\n")
    assert composed("+recipe=llama7b_q4").config.model.source == "mine"
    assert list(composed("+recipe=deep/er").config.targets) == ["q8_0"]


def test_a_target_and_a_model_of_the_project(project: Path) -> None:
    write(project / "conf" / "target" / "gguf" / "mine.yaml", "# @package targets.mine\nftype: Q4_K_S\nsuffix: mine\n")
    write(project / "conf" / "model" / "own.yaml", "source: ./own\n")
    config = composed("target=gguf/mine", "model=own").config
    assert config.targets == {"mine": schema.GgufTarget(ftype="Q4_K_S", suffix="mine")}
    assert config.model.source == "./own"


def test_the_conf_of_another_hydra_program_is_no_obstacle(project: Path) -> None:
    write(project / "conf" / "config.yaml", "defaults:\n  - optimizer: adam\nlr: 0.1\n")
    assert composed("model.source=x").config.model.source == "x"


def test_values_from_outside_are_noticed(project: Path) -> None:
    write(project / "recipes" / "env.yaml", "model:\n  source: ${oc.env:HOME}\n")
    assert composed("+recipe=env").volatile
    assert not composed("+recipe=llama7b_q4", "out=${model.name}").volatile


def test_nothing_of_a_configuration_can_be_changed(project: Path) -> None:
    config = composed("+recipe=llama7b_q4").config
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.out = "elsewhere"  # type: ignore[misc]


BROKEN = {
    "typo": ("modle:\n  source: x\n", "did you mean model?"),
    "nested": ("model:\n  sorce: x\n", "did you mean source?"),
    "target": ("targets:\n  q4_km:\n    pure: true\n", "did you mean q4_k_m"),
    "bits": (
        "defaults:\n  - override /target: awq/w4_g64\ntargets:\n  awq_w4_g64: {bits: 3}\n",
        "choices: format, suffix, group",
    ),
    "field": ("targets:\n  x:\n    ftpe: Q8_0\n", "did you mean ftype?"),
    "value": ("targets:\n  x:\n    ftype: q8_0\n", "did you mean Q8_0"),
    "format": ("targets:\n  x:\n    format: ggfu\n", "did you mean gguf?"),
    "choice": ("defaults:\n  - override /model: llama7c\n", "did you mean llama7b"),
    "boolean": ("keep_going: maybe\n", ""),
    "section": ("budget: 16GiB\n", "budget.ram"),
    "size": ("budget:\n  ram: 16 gigs\n", "16GiB"),
    "pattern": ("targets:\n  x:\n    tensor_types:\n      '(': Q8_0\n", "attn_v: Q8_0"),
    "syntax": ("model: [\n", "indentation"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_mistake_in_a_file_is_an_error_with_a_way_out(project: Path, qbuild: Run, name: str) -> None:
    text, hint = BROKEN[name]
    write(project / "recipes" / f"{name}.yaml", text)
    done = qbuild("plan", f"+recipe={name}", "format=json")
    assert done.code == done.error["exit_code"] == 2
    assert done.error["place"]
    assert hint in done.error["remedy"]
    assert "Traceback" not in done.err


@pytest.mark.parametrize(
    ("override", "hint"),
    [
        ("modle.source=x", "did you mean model?"),
        ("model.sorce=x", "did you mean source?"),
        ("tagret=gguf/q4_k_m", "did you mean target"),
        ("target=gguf/q4_k_x", "gguf/q4_k_m"),
        ("target=q4_k_m", "did you mean gguf/q4_k_m?"),
        ("target=gguf/q4_k_m,gguf/q8_0", "target=[gguf/q4_k_m,gguf/q8_0]"),
        ("recipe=llama7b_q4", "+recipe=llama7b_q4"),
        ("+recipe=llama7b_q5", "did you mean llama7b_q4"),
        ("+recipe=", "llama7b_q4"),
        ("model=llama7c", "did you mean llama7b"),
        ("calibration.samples=abc", ""),
        ("store.link=symlink", "hardlink"),
        ("budget.ram=[", "target=["),
        ("+nope=1", "choices"),
        ("=3", ""),
        ("out=${nope}", ""),
        ('backend.pip="--find-links=\'x"', "quotation"),
        ("target=awq/w4_g128 targets.w4_g128.group_size=64", "did you mean targets.awq_w4_g128.group_size?"),
        ("target=[gguf/q4_k_m,gptq/w4_g64] targets.q4_km.pure=true", "did you mean targets.q4_k_m.pure?"),
        ("target=awq/w4_g64 targets.awq_w4_g64.bits=3", "with 3 bits: gptq/w3_g128, gptq/w3_g32, gptq/w3_g64"),
        (
            "target=awq/w4_g64 targets.awq_w4_g64.grup_size=64",
            "did you mean group_size?\nchoices: format, suffix, group_",
        ),
        ("target=gguf/q4_k_m targets.q4_km=3", "did you mean targets.q4_k_m?"),
        ("target=[imatrix,gguf/q8_0] max_shard_size=5GB", "ct targets: targets.q8_0.max_shard_size=5GB"),
        ("target=awq/w4_g64 pure=true", "it is a setting of gguf targets: targets.NAME.pure=true"),
        ("target=awq/w4_g64 targets.q4_k_m.pure=true", "chosen: awq_w4_g64"),
        ("target=[awq/w4_g64,gguf/q4_k_m] targets.w4_g64.pure=true", "did you mean targets.q4_k_m.pure?"),
        ("target=gguf/q4_k_m targets.q4_k_m.output_type=I8", "IQ2_S, IQ4_XS, IQ1_M, BF16"),
        ("target=gguf/q4_k_m targets.q4_k_m.tensor_types={ffn_down:F64}", "IQ2_S, IQ4_XS, IQ1_M, BF16"),
        ("model.trust_remote_code=true", "docs/families.md"),
    ],
)
def test_a_mistake_on_the_command_line_is_an_error_with_a_way_out(qbuild: Run, override: str, hint: str) -> None:
    done = qbuild("plan", *override.split(), "format=json")
    assert done.code == done.error["exit_code"] == 2
    assert done.error["fact"]
    assert hint in done.error["remedy"]
    assert "Traceback" not in done.err


def test_the_schema_and_the_keys_of_hydra_are_the_same(project: Path) -> None:
    config = composed("target=gguf/q4_k_m").config
    assert config == schema.Config(targets={"q4_k_m": schema.GgufTarget()})


def test_a_value_has_one_spelling() -> None:
    with pytest.raises(ConfigError):
        schema.parse({"targets": {"x": {"ftype": "q4_k_m"}}})
    with pytest.raises(ConfigError):
        schema.parse({"keep_going": "true"})
