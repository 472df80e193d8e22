"""The engine from Python: on the real model that the suite carries."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import qbuild
from qbuild.errors import ConfigError, InputError

TINY = Path(__file__).parent.parent / "data" / "tiny-llama"


def test_a_build_gives_paths_and_numbers_and_a_second_one_computes_nothing(tmp_path: Path) -> None:
    words = (f"model.source={TINY}", "target=gguf/q8_0", f"out={tmp_path / 'out'}", f"store.dir={tmp_path / 'store'}")
    config = qbuild.configure(*words, folder=tmp_path)
    first, second = qbuild.build(config, quiet=True), qbuild.build(config, quiet=True)
    made = first.targets["q8_0"]
    assert made.path.stat().st_size == made.bytes
    assert made.verdicts.keys() == {"run"}
    assert made.peak_ram > 0
    assert made.calibration is made.evaluation is None
    assert second.targets["q8_0"].verdicts.keys() == {"hit"}
    assert second.targets["q8_0"].digest == made.digest == first.document["targets"]["q8_0"]["digest"]


@pytest.mark.slow
def test_an_evaluated_build_gives_its_numbers(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("How things are told apart by size and colour. " * 40)
    words = [f"model.source={TINY}", "target=gguf/q8_0", f"out={tmp_path / 'out'}", f"store.dir={tmp_path / 'store'}"]
    asked = [f"evaluation.source={text}", "evaluation.samples=2", "evaluation.length=64"]
    made = qbuild.build(qbuild.configure(*words, *asked, folder=tmp_path), quiet=True)
    found = made.targets["q8_0"].evaluation
    assert found is not None
    assert (found.tokens, found.kl < 0.01, found.top1 > 0.9) == (128, True, True)
    assert found.weights["model.layers.0.mlp.up_proj.weight"] < 1e-4
    assert found.perplexity == made.document["evaluation"]["targets"]["q8_0"]["perplexity"]


def test_a_mapping_is_a_configuration(tmp_path: Path) -> None:
    store, out = {"dir": str(tmp_path / "store")}, str(tmp_path / "out")
    targets = {"small": {"format": "gguf", "ftype": "Q4_0"}}
    found = qbuild.build({"model": {"source": str(TINY)}, "targets": targets, "store": store, "out": out}, quiet=True)
    assert found.targets["small"].path.name == "tiny-llama-Q4_0.gguf"


def test_what_is_wrong_is_an_error_of_ours(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such key"):
        qbuild.build({"modle": {}})
    with pytest.raises(ConfigError, match="no target has this name"):
        qbuild.build({"model": {"source": str(TINY)}, "targets": {"q5_k_m": {"pure": True}}})
    with pytest.raises(ConfigError) as raised:
        qbuild.configure("target=gguf/q4_k_x", folder=tmp_path)
    assert max(map(len, str(raised.value).splitlines())) <= 80
    with pytest.raises(InputError):
        qbuild.build({"model": {"source": str(tmp_path / "none")}, "targets": {"a": {"ftype": "Q4_0"}}})


def test_importing_qbuild_loads_none_of_it() -> None:
    code = "import sys, qbuild; print([m for m in sys.modules if m.startswith(('qbuild.', 'numpy', 'hydra'))])"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"


def test_a_name_that_is_not_there_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="nothing"):
        _ = qbuild.nothing
