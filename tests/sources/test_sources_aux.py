"""The small files beside the weights: whatever the metadata is made of is an input of it, and so in its key."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import qbuild.arch
from qbuild.checkpoint import AUX, TEMPLATES, open_path
from qbuild.cli.nullbuild import inputs
from qbuild.schema import parse

TINY = Path(__file__).parents[1] / "data" / "tiny-llama"
PACKAGED = {"pretokenizers.json"}  # a table of qbuild's own


@pytest.fixture
def model(tmp_path: Path) -> Path:
    for file in TINY.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


def test_every_file_name_that_the_metadata_code_mentions_is_an_input() -> None:
    code = "".join(path.read_text() for path in Path(qbuild.arch.__path__[0]).glob("*.py"))
    named = set(re.findall(r'"([\w.-]+\.(?:json|model|jinja|txt))"', code)) - PACKAGED
    assert {"tokenizer.json", "tekken.json", "modules.json", "chat_template.jinja"} <= named
    assert named <= set(AUX)


@pytest.mark.parametrize("name", [*AUX, TEMPLATES.replace("*", "tool_use")])
def test_a_small_file_is_an_input_and_watched_by_the_null_build(model: Path, name: str) -> None:
    path = model / name
    path.parent.mkdir(exist_ok=True)
    if not path.exists():
        path.write_text("{}")
    assert open_path(model, "m").aux[name] == path
    watched = inputs(parse({"model": {"source": str(model)}}), ())
    assert watched is not None
    assert str(path) in watched


def test_an_imatrix_in_the_home_folder_is_watched_by_the_null_build(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(model))
    targets = {"a": {"format": "gguf", "ftype": "Q4_0", "imatrix": "~/m.imatrix"}}
    watched = inputs(parse({"model": {"source": str(model)}, "targets": targets}), ())
    assert watched is not None
    assert str(model / "m.imatrix") in watched
