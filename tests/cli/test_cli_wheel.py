"""A wheel carries what a clone has: configuration and recipes are found from any folder."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent


@pytest.mark.slow
def test_a_wheel_carries_conf_and_recipes_and_no_tests(tmp_path: Path) -> None:
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(tmp_path), str(ROOT)]
    subprocess.run(pip, check=True)
    names = set(zipfile.ZipFile(next(tmp_path.glob("*.whl"))).namelist())
    for source, inside in (("conf", "qbuild/_conf"), ("recipes", "qbuild/_recipes")):
        for path in (ROOT / source).rglob("*.yaml"):
            assert f"{inside}/{path.relative_to(ROOT / source).as_posix()}" in names
    assert {"qbuild/py.typed", "hydra_plugins/qbuild_recipes.py"} <= names
    assert not [name for name in names if name.startswith(("tests/", "conf/", "hydra_plugins/__init__"))]
