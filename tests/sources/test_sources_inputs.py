"""Small input files, read as what they were when they were hashed."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from conftest import TINY

import qbuild
from qbuild import recipe
from qbuild.errors import InputError
from qbuild.inputs import InputFile, copies


@pytest.fixture
def file(tmp_path: Path) -> InputFile:
    path = tmp_path / "model" / "tokenizer.json"
    path.parent.mkdir()
    path.write_text("{}")
    return InputFile.taken(path)


def test_a_file_that_changed_is_not_read(file: InputFile) -> None:
    assert file.read() == b"{}"
    file.path.write_text("{ }")
    with pytest.raises(InputError, match="changed after it was hashed"):
        file.read()
    file.path.unlink()
    with pytest.raises(InputError, match="cannot be read"):
        file.read()


@pytest.mark.parametrize("like", ["", "there/..", "/"])
def test_copies_have_the_name_of_the_folder_and_nothing_that_was_not_hashed(file: InputFile, like: str) -> None:
    (file.path.parent / "there").mkdir()
    (file.path.parent / "merges.txt").touch()
    folder = file.path.parent / like
    with copies({"a/tokenizer.json": file}, folder, file.path.parent.parent) as copied:
        assert copied.is_relative_to(file.path.parent.parent / "copies")  # gc finds them after a kill
        assert copied.name == folder.resolve().name or like == "/"
        assert [path.relative_to(copied).as_posix() for path in copied.rglob("*") if path.is_file()] == [
            "a/tokenizer.json"
        ]
        kept = copied
    assert not kept.exists()


def test_an_error_about_a_copy_names_the_file_itself(file: InputFile) -> None:
    files = {"tokenizer.json": file}
    with pytest.raises(InputError) as raised, copies(files, file.path.parent, file.path.parent.parent) as folder:
        raise InputError(str(folder / "tokenizer.json"), f"{folder} is bad", "mend it")
    assert raised.value.place == str(file.path)
    assert raised.value.fact == f"{file.path.parent} is bad"


def test_a_model_that_is_called_by_where_one_stands_has_the_name_of_its_folder(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The converter makes general.name of it, so two of one content must not share a result."""
    found = []
    for place, source in (
        ("alpha", "."),
        ("beta", "."),
        ("gamma", "."),
        ("gamma/inside", ".."),
        (".", "gamma/inside/.."),
    ):
        folder = project / place
        if source == ".":
            shutil.copytree(TINY, folder)
        folder.mkdir(exist_ok=True)
        monkeypatch.chdir(folder)
        config = qbuild.configure(f"model.source={source}", "target=gguf/bf16")
        resolved = recipe.resolve(config, fetch=False)
        found.append((resolved.name, resolved.graph.actions["metadata"].params.folder))
    assert found == [(name, name) for name in ("alpha", "beta", "gamma", "gamma", "gamma")]
