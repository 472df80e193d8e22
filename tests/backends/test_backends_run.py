"""Backends are run by drivers, and what they wrote is looked at before it is believed."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

from qbuild.backends import run as module
from qbuild.backends.environment import Environment
from qbuild.backends.run import Output, Request, run, suit
from qbuild.checkpoint import Checkpoint, open_path
from qbuild.errors import ActionFailed, ConfigError
from qbuild.quant.directory import Directory, directory, write
from qbuild.quant.shapes import Scheme, packed, quantization_config

SCHEME = Scheme("gptq", 4, 64, True)
LINEAR = "model.layers.0.mlp.up_proj"
KINDS = {"I32": np.int32, "F16": np.float16}


@pytest.fixture
def backend(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Environment:
    """A backend whose library is this Python, and whose driver is what a test writes."""
    monkeypatch.setattr(module, "DRIVERS", tmp_path)
    (tmp_path / "scratch").mkdir()
    monkeypatch.setattr(Environment, "interpreter", Path(sys.executable))
    return Environment("gptqmodel", "3.11", (), "0" * 64, tmp_path / "environment")


def driven(backend: Environment, folder: Path, code: str) -> Mapping[str, Any]:
    """Run a driver that is ``code``; what it noted."""
    driver = "import json, os, sys\nfrom pathlib import Path\nasked = json.load(open(sys.argv[1]))\n"
    (folder / "driver.py").write_text(driver + code)
    run(
        backend, Request(folder / "model", [[1, 2], [3, 4]], SCHEME, 0.05, "cpu", 2), folder / "out", folder / "scratch"
    )
    return json.loads((folder / "scratch" / "done").read_text())


def test_a_driver_gets_the_request(backend: Environment, tmp_path: Path) -> None:
    asked = driven(backend, tmp_path, "json.dump(asked, open(asked['done'], 'w'))")
    assert json.loads(Path(asked["tokens"]).read_text()) == [[1, 2], [3, 4]]
    assert (asked["layout"], asked["bits"], asked["group_size"], asked["symmetric"]) == ("gptq", 4, 64, True)
    assert (asked["device"], asked["dtype"], asked["damping"], asked["threads"]) == ("cpu", "float16", 0.05, 2)
    assert (asked["backend"], asked["out"]) == ("gptqmodel", str(tmp_path / "out"))


def test_packages_of_ours_do_not_reach_the_backend(
    backend: Environment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", "/somewhere")
    path = driven(backend, tmp_path, "json.dump(sys.path, open(asked['done'], 'w'))")
    assert not {"/somewhere", str(tmp_path)} & set(path)


def test_temporary_files_of_a_library_go_with_the_run(backend: Environment, tmp_path: Path) -> None:
    code = "import tempfile; json.dump(tempfile.gettempdir(), open(asked['done'], 'w'))"
    assert driven(backend, tmp_path, code) == str(tmp_path / "scratch")


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


@pytest.mark.parametrize(("code", "status"), [("", 0), ("import time; time.sleep(60)", 130)])
def test_a_library_ends_with_the_process_that_started_it(tmp_path: Path, code: str, status: int) -> None:
    """Its standard input ends then. A library that is done does not wait for that."""
    shutil.copy(module.DRIVERS / "driver.py", tmp_path)
    (tmp_path / "one.py").write_text(f"def quantize(asked):\n    open('begun', 'w').close()\n    {code or 'pass'}\n")
    (tmp_path / "asked.json").write_text(json.dumps({"backend": "one", "threads": 1, "done": str(tmp_path / "done")}))
    command = [sys.executable, "-I", str(tmp_path / "driver.py"), str(tmp_path / "asked.json")]
    reads, writes = os.pipe()
    process = subprocess.Popen(command, stdin=reads, cwd=tmp_path)
    if status == 0:
        assert process.wait(60) == 0
    while not (tmp_path / "begun").exists():
        assert process.poll() is None
    os.close(writes)
    assert process.wait(60) == status
    assert (tmp_path / "done").exists() == (status == 0)


# outputs -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def model(tmp_path: Path) -> Checkpoint:
    folder = tmp_path / "model"
    folder.mkdir()
    tensors = {f"{LINEAR}.weight": np.ones((64, 128), np.float16), "model.norm.weight": np.ones(128, np.float16)}
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text("{}")
    return open_path(folder, str(folder))


def planned(model: Checkpoint, scheme: Scheme) -> Directory:
    return directory(model, scheme, [LINEAR], place="targets.t", max_shard_size=10**9)


def output(folder: Path, scheme: Scheme = SCHEME, **others: np.ndarray) -> Output:
    folder.mkdir()
    tensors = {t.name: np.ones(t.shape, KINDS[t.dtype]) for t in packed(scheme, LINEAR, 64, 128)}
    tensors["model.norm.weight"] = np.full(128, 3, np.float16)
    save_file({n: t for n, t in {**tensors, **others}.items() if t.size}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"quantization_config": quantization_config(scheme, [])}))
    return Output(folder)


@pytest.mark.parametrize("scheme", [SCHEME, Scheme("awq-gemm", 4, 64, False), Scheme("gptq_v2", 8, -1, False)])
def test_an_output_as_asked_is_believed_and_laid_out_anew(model: Checkpoint, tmp_path: Path, scheme: Scheme) -> None:
    """With all that the library changed: a norm that took scales in is its, not the source's."""
    made, wanted = output(tmp_path / "out", scheme), planned(model, scheme)
    made.check(scheme, wanted, "targets.t")
    (file,) = wanted.files
    data = bytearray(file.size)

    def put(offset: int, chunk: bytes | bytearray | memoryview) -> None:
        data[offset : offset + len(chunk)] = chunk

    write(file, put, made)
    (tmp_path / "written.safetensors").write_bytes(data)
    with safe_open(tmp_path / "written.safetensors", framework="np") as opened:
        assert opened.get_tensor("model.norm.weight").tolist() == [3] * 128
        assert opened.get_tensor(f"{LINEAR}.qweight").all()


def test_an_output_in_other_groups_is_not_believed(model: Checkpoint, tmp_path: Path) -> None:
    other = replace(SCHEME, group_size=32)
    with pytest.raises(ActionFailed, match="says that it is"):
        output(tmp_path / "out").check(other, planned(model, other), "targets.t")


@pytest.mark.parametrize(
    ("name", "tensor", "said"),
    [
        (f"{LINEAR}.scales", np.ones(0), r"has no tensor model\.layers\.0\.mlp\.up_proj\.scales"),
        (f"{LINEAR}.qweight", np.ones((32, 64), np.int32), r"qweight as I32 \[32, 64\], not I32 \[16, 64\]"),
        ("model.norm.weight", np.ones(128, np.float32), r"norm\.weight as F32 \[128\], not F16 \[128\]"),
        ("model.layers.0.mlp.act.scales", np.ones(64, np.float16), r"act\.scales that no loader would know"),
    ],
)
def test_an_output_with_other_tensors_is_not_believed(
    model: Checkpoint, tmp_path: Path, name: str, tensor: np.ndarray, said: str
) -> None:
    made = output(tmp_path / "out", SCHEME, **{name: tensor})
    with pytest.raises(ActionFailed, match=said):
        made.check(SCHEME, planned(model, SCHEME), "targets.t")


def test_a_head_that_is_the_embedding_may_stand_in_an_output_and_is_left_out(model: Checkpoint, tmp_path: Path) -> None:
    made = output(tmp_path / "out", SCHEME, **{"lm_head.weight": np.ones((8, 128), np.float16)})
    made.check(SCHEME, planned(model, SCHEME), "targets.t")


@pytest.mark.parametrize(
    ("backend_name", "layout", "family", "device", "said", "remedy"),
    [
        ("autoawq", "gptq", "llama", "cuda", "does not make gptq", "backend=native or auto_gptq or gptqmodel"),
        ("gptqmodel", "pack-quantized", "llama", "cuda", "does not make pack-quantized", "backend=native"),
        ("autoawq", "awq-gemm", "olmo2", "cpu", "autoawq knows no olmo2", "backend=native\nit knows aquila, baichuan"),
        ("auto_gptq", "gptq", "qwen3", "cuda", "auto_gptq knows no qwen3", "backend=native\nit knows baichuan"),
        ("auto_gptq", "gptq", "llama", "cpu", "on CUDA only", "device=cuda, or targets.t.backend=native"),
    ],
)
def test_what_a_backend_cannot_make_is_refused_before_it_is_installed(
    backend_name: str, layout: str, family: str, device: str, said: str, remedy: str
) -> None:
    with pytest.raises(ConfigError, match=said) as refused:
        suit(backend_name, Scheme(layout, 4, 64, True), family, device, "targets.t")
    assert refused.value.place == "targets.t"
    assert remedy in refused.value.remedy


def test_what_a_backend_makes_is_not_refused() -> None:
    suit("gptqmodel", Scheme("gptq_v2", 4, 64, False), "olmo2", "cpu", "targets.t")
    suit("autoawq", Scheme("awq-gemm", 4, 64, False), "llama", "cpu", "targets.t")
    suit("auto_gptq", SCHEME, "llama", "cuda", "targets.t")
