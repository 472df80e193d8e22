"""Environments of backends: what a lock asks is told, made once, and gone again where it cannot be made."""

from __future__ import annotations

import base64
import hashlib
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from qbuild.backends import environment as module
from qbuild.backends.environment import BACKENDS, Environment, create, environment, parse
from qbuild.errors import ActionFailed, ConfigError, InputError

PYTHON = f"{sys.version_info.major}.{sys.version_info.minor}"


def wheel(folder: Path, name: str = "backend_one", version: str = "1.0") -> Path:
    """The smallest package there is: one module that says its version."""
    about = f"{name}-{version}.dist-info"
    files = {
        f"{name}.py": f"VERSION = {version!r}\n",
        f"{about}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n",
        f"{about}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = ""
    for path, text in files.items():
        digest = base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).rstrip(b"=").decode()
        record += f"{path},sha256={digest},{len(text)}\n"
    made = folder / f"{name}-{version}-py3-none-any.whl"
    with zipfile.ZipFile(made, "w") as archive:
        for path, text in {**files, f"{about}/RECORD": record + f"{about}/RECORD,,\n"}.items():
            archive.writestr(path, text)
    return made


def lock(file: Path, name: str = "backend-one", hashed: str | None = None) -> str:
    digest = hashed or hashlib.sha256(file.read_bytes()).hexdigest()
    return f"# python {PYTHON}\n{name}==1.0 --hash=sha256:{digest}  # {file.stat().st_size} wheel\n"


@pytest.fixture
def wanted(tmp_path: Path) -> Environment:
    return parse("gptqmodel", lock(wheel(tmp_path)), tmp_path / "environments")


def offline(folder: Path) -> list[str]:
    return ["--no-index", f"--find-links={folder}"]


@pytest.mark.parametrize("backend", BACKENDS)
def test_locks_name_the_library_and_what_it_costs(backend: str, tmp_path: Path) -> None:
    found = environment(backend, tmp_path)
    names = {package.name.lower().replace("-", "_") for package in found.packages}
    assert {backend, "torch", "transformers"} <= names
    assert len(names) == len(found.packages)
    assert f"{len(found.packages)} packages" in found.announcement()
    assert "GiB to download" in found.announcement()
    assert not found.ready


def test_an_environment_is_made_once_over_what_a_killed_installation_left(wanted: Environment, tmp_path: Path) -> None:
    (wanted.path / "bin").mkdir(parents=True)
    (wanted.path / "bin" / "python").write_text("half a file")
    create(wanted, offline(tmp_path))
    code = "import backend_one; print(backend_one.VERSION)"
    done = subprocess.run([wanted.interpreter, "-c", code], capture_output=True, text=True, check=True)
    assert (wanted.ready, done.stdout.strip()) == (True, "1.0")
    before = (wanted.path / "pyvenv.cfg").stat().st_mtime_ns
    create(wanted, ["--no-index"])
    assert (wanted.path / "pyvenv.cfg").stat().st_mtime_ns == before


def test_without_a_network_the_error_says_so_and_nothing_is_left(wanted: Environment) -> None:
    with pytest.raises(ActionFailed) as failed:
        create(wanted, ["--no-index"])
    assert failed.value.place == "backend gptqmodel"
    assert "backend-one" in failed.value.fact
    assert "network" in failed.value.remedy
    assert not wanted.path.exists()


@pytest.mark.slow
def test_a_package_with_another_hash_is_not_installed(tmp_path: Path) -> None:
    wanted = parse("gptqmodel", lock(wheel(tmp_path), hashed="0" * 64), tmp_path / "environments")
    with pytest.raises(ActionFailed, match=r"(?i)hash"):
        create(wanted, offline(tmp_path))


def test_another_lock_is_another_environment(tmp_path: Path) -> None:
    file = wheel(tmp_path)
    one, other = (parse("gptqmodel", lock(file, name), tmp_path) for name in ("backend-one", "backend_one"))
    assert one.digest != other.digest
    assert one.path != other.path


def test_too_little_disk_is_said_before_anything_is_downloaded(
    wanted: Environment, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "disk_free", lambda path: 10)
    with pytest.raises(ActionFailed, match="of disk, 10 B are free"):
        create(wanted)
    assert not wanted.path.exists()


def test_a_lock_for_a_python_that_is_not_there_names_it(tmp_path: Path) -> None:
    text = lock(wheel(tmp_path)).replace(PYTHON, "3.2", 1)
    with pytest.raises(InputError, match=r"python3\.2: is not on the path"):
        create(parse("gptqmodel", text, tmp_path / "environments"))


def test_a_name_that_is_no_backend_is_refused_with_the_names(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="native, autoawq, auto_gptq, gptqmodel"):
        environment("optimum", tmp_path)


def test_a_damaged_lock_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is no lock"):
        parse("gptqmodel", "# python 3.11\ntorch\n", tmp_path)
