"""Backends are run by drivers, and what they wrote is looked at before it is believed."""

from __future__ import annotations

import json
import signal
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from qbuild.backends import run as module
from qbuild.backends.environment import Environment
from qbuild.backends.run import Request, check, run, suit
from qbuild.errors import ActionFailed, ConfigError
from qbuild.quant.shapes import Scheme, packed, quantization_config

SCHEME = Scheme("gptq", 4, 64, True)
SHAPES = {"model.layers.0.mlp.up_proj": (64, 128)}
KINDS = {"I32": np.int32, "F16": np.float16}


@pytest.fixture
def backend(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Environment:
    """A backend whose library is this Python, and whose driver is what a test writes."""
    monkeypatch.setattr(module, "DRIVERS", tmp_path)
    (tmp_path / "scratch").mkdir()
    monkeypatch.setattr(Environment, "interpreter", Path(sys.executable))
    return Environment("gptqmodel", "3.11", (), "0" * 64, tmp_path / "environment")


def driven(backend: Environment, folder: Path, code: str) -> module.Made:
    driver = "import json, os, sys\nasked = json.load(open(sys.argv[1]))\n" + code
    (folder / "gptqmodel_driver.py").write_text(driver)
    request = Request(folder / "model", [[1, 2], [3, 4]], SCHEME, 0.05, "cpu")
    return run(backend, request, folder / "out", folder / "scratch")


def test_a_driver_gets_the_request_and_tells_its_version(backend: Environment, tmp_path: Path) -> None:
    made = driven(backend, tmp_path, "json.dump({'version': '7.7', **asked}, open(asked['done'], 'w'))")
    asked = json.loads((tmp_path / "scratch" / "done.json").read_text())
    assert made.version == "7.7"
    assert 1_000_000 < made.peak_ram < 1_000_000_000
    assert json.loads(Path(asked["tokens"]).read_text()) == [[1, 2], [3, 4]]
    assert (asked["layout"], asked["bits"], asked["group_size"], asked["symmetric"]) == ("gptq", 4, 64, True)
    assert (asked["device"], asked["damping"], asked["out"]) == ("cpu", 0.05, str(tmp_path / "out"))


def test_packages_of_ours_do_not_reach_the_backend(
    backend: Environment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", "/somewhere")
    driven(backend, tmp_path, "json.dump({'version': '1', 'path': sys.path}, open(asked['done'], 'w'))")
    path = json.loads((tmp_path / "scratch" / "done.json").read_text())["path"]
    assert not {"/somewhere", str(tmp_path)} & set(path)


def test_a_library_that_fails_is_told_by_its_last_words(backend: Environment, tmp_path: Path) -> None:
    with pytest.raises(ActionFailed) as failed:
        driven(backend, tmp_path, "print('loading'); raise RuntimeError('no kernel for this')")
    assert failed.value.place == "backend gptqmodel"
    assert "ended with 1" in failed.value.fact
    assert failed.value.fact.endswith("RuntimeError: no kernel for this")


def test_a_library_that_is_killed_is_told_by_the_signal(backend: Environment, tmp_path: Path) -> None:
    with pytest.raises(ActionFailed, match=f"signal {int(signal.SIGKILL)}"):
        driven(backend, tmp_path, f"os.kill(os.getpid(), {int(signal.SIGKILL)})")


def test_a_library_that_ends_early_without_an_error_is_not_believed(backend: Environment, tmp_path: Path) -> None:
    with pytest.raises(ActionFailed, match="ended with 0"):
        driven(backend, tmp_path, "sys.exit(0)")


def output(folder: Path, scheme: Scheme = SCHEME) -> Path:
    folder.mkdir()
    tensors = {t.name: np.zeros(t.shape, KINDS[t.dtype]) for n, s in SHAPES.items() for t in packed(scheme, n, *s)}
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"quantization_config": quantization_config(scheme, [])}))
    return folder


@pytest.mark.parametrize("scheme", [SCHEME, Scheme("awq-gemm", 4, 64, False), Scheme("gptq_v2", 8, -1, False)])
def test_an_output_as_asked_is_believed(tmp_path: Path, scheme: Scheme) -> None:
    check(output(tmp_path / "out", scheme), scheme, SHAPES, "targets.t")


def test_an_output_in_other_groups_is_not_believed(tmp_path: Path) -> None:
    out = output(tmp_path / "out")
    with pytest.raises(ActionFailed, match="says that it is"):
        check(out, replace(SCHEME, group_size=32), SHAPES, "targets.t")


def test_an_output_that_left_a_linear_out_is_not_believed(tmp_path: Path) -> None:
    out = output(tmp_path / "out")
    with pytest.raises(ActionFailed, match=r"has no tensor model\.layers\.1\.mlp\.up_proj\.qweight"):
        check(out, SCHEME, {**SHAPES, "model.layers.1.mlp.up_proj": (64, 128)}, "targets.t")


def test_an_output_of_another_shape_is_not_believed(tmp_path: Path) -> None:
    out = output(tmp_path / "out")
    with pytest.raises(ActionFailed, match=r"qweight as I32 \[16, 64\], not I32 \[32, 64\]"):
        check(out, SCHEME, {"model.layers.0.mlp.up_proj": (64, 256)}, "targets.t")


@pytest.mark.parametrize(
    ("backend_name", "layout", "device", "said", "remedy"),
    [
        ("autoawq", "gptq", "cuda", "does not make gptq", "backend=native or auto_gptq or gptqmodel"),
        ("gptqmodel", "pack-quantized", "cuda", "does not make pack-quantized", "backend=native"),
        ("auto_gptq", "gptq", "cpu", "on CUDA only", "device=cuda, or backend=native"),
    ],
)
def test_what_a_backend_cannot_make_is_refused_before_it_is_installed(
    backend_name: str, layout: str, device: str, said: str, remedy: str
) -> None:
    with pytest.raises(ConfigError, match=said) as refused:
        suit(backend_name, Scheme(layout, 4, 64, True), device, "targets.t")
    assert (refused.value.place, refused.value.remedy) == ("targets.t", remedy)


def test_what_a_backend_makes_is_not_refused() -> None:
    suit("gptqmodel", Scheme("gptq_v2", 4, 64, False), "cpu", "targets.t")
    suit("auto_gptq", SCHEME, "cuda", "targets.t")
