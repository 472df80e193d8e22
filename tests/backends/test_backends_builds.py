"""Targets of other libraries as whole builds: planned, made by the library in its environment, stored, measured."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import Done, Run

from qbuild.backends.environment import environment

ROOT = Path(__file__).parent.parent.parent
TINY = ROOT / "tests" / "data" / "tiny-llama"
BACKEND = "targets.gptq_w4_g64.backend=gptqmodel"
OFFLINE = "backend.pip=--no-index"

# In place of an environment's Python: writes what GPTQModel would, its codes all alike, and notes what it was asked.
LIBRARY = f"""#!{sys.executable}
import json, sys
from pathlib import Path

sys.path.insert(0, {str(ROOT)!r})
from qbuild.checkpoint import Reader, open_path
from qbuild.quant.shapes import Scheme, packed, quantization_config

asked = json.loads(Path(sys.argv[-1]).read_text())
notes = Path(__file__).with_name("asked.json")
notes.write_text(json.dumps(asked | {{"windows": json.loads(Path(asked["tokens"]).read_text())}}))
scheme = Scheme(asked["layout"], asked["bits"], asked["group_size"], asked["symmetric"])
model = open_path(Path(asked["model"]), asked["model"])
tensors = {{}}
with Reader(model.files) as reader:
    for name, tensor in model.tensors.items():
        if name.endswith("proj.weight"):
            for t in packed(scheme, name.removesuffix(".weight"), *tensor.shape):
                tensors[t.name] = t.dtype, t.shape, b"\\x11" * t.nbytes
        else:
            data = bytearray(tensor.nbytes)
            reader.read_into(tensor.file, tensor.offset, memoryview(data))
            tensors[name] = tensor.dtype, tensor.shape, data
out = Path(asked["out"])
out.mkdir()
config = quantization_config(scheme, [], "gptqmodel:7.7.0") | {{"offload": asked["out"]}}
(out / "config.json").write_text(json.dumps({{"quantization_config": config}}))
if (fault := Path(__file__).with_name("fault")).exists():
    exec(fault.read_text())
header, at = {{}}, 0
for name, (dtype, shape, data) in tensors.items():
    header[name] = {{"dtype": dtype, "shape": shape, "data_offsets": [at, at + len(data)]}}
    at += len(data)
text = json.dumps(header).encode()
with (out / "model.safetensors").open("wb") as file:
    file.write(len(text).to_bytes(8, "little") + text + b"".join(data for *_, data in tensors.values()))
Path(asked["done"]).touch()
"""


@pytest.fixture
def library(project: Path) -> Path:
    """The folder of the Python of an environment that is there already."""
    path = environment("gptqmodel", project / "environments").path
    (path / "bin").mkdir(parents=True)
    (path / "qbuild-ready").touch()
    (path / "bin" / "python").write_text(LIBRARY)
    (path / "bin" / "python").chmod(0o755)
    return path / "bin"


@pytest.fixture
def attempt(qbuild: Run, project: Path) -> Callable[..., Done]:
    model, text = project / "tiny-llama", project / "text.txt"
    shutil.copytree(TINY, model)
    text.write_text("\n".join(f"Section {n}: how {n * n} things are told apart by size and colour." for n in range(80)))
    settings = ["calibration.samples=4", "calibration.length=64", "format=json", "backend.dir=environments"]

    def run(*words: str) -> Done:
        return qbuild(*settings, f"model.source={model}", f"calibration.source={text}", *words)

    return run


@pytest.fixture
def build(attempt: Callable[..., Done]) -> Callable[..., dict[str, Any]]:
    def run(*words: str) -> dict[str, Any]:
        done = attempt(*words)
        assert done.code == 0, done.out + done.err
        return done.document

    return run


Build = Callable[..., dict[str, Any]]


def asked(library: Path) -> dict[str, Any]:
    return json.loads((library / "asked.json").read_text())


def refused(done: Done, code: int, *words: str) -> None:
    assert done.code == code, done.out
    said = " ".join(done.error[key] for key in ("place", "fact", "remedy"))
    assert not [word for word in words if word not in said], said


def test_a_backend_gets_the_windows_of_native_targets_and_no_statistics_are_taken_for_it(
    build: Build, library: Path
) -> None:
    planned = build("plan", "target=gptq/w4_g64", BACKEND)["predicted"]
    made = build("target=gptq/w4_g64", BACKEND)
    assert made["totals"]["actions"] == {"calibration.tokens": 1, "quant.backend": 1}
    # The source is hashed before, and again when the library has read it.
    assert made["totals"]["read_bytes"] == pytest.approx(planned["read_bytes"], rel=1e-2)
    windows = asked(library)["windows"]
    assert [len(window) for window in windows] == [64] * 4

    native = build("plan", "target=gptq/w4_g64")
    assert [step["kind"] for step in native["steps"]] == [  # the windows are there
        "calibration.statistics", "quant.layer", "checkpoint.directory",
    ]  # fmt: skip
    names = [Path(document["targets"]["gptq_w4_g64"]["path"]).name for document in (native, made)]
    assert names == ["tiny-llama-GPTQ-w4-g64", "tiny-llama-GPTQ-w4-g64-gptqmodel"]


def test_what_a_library_wrote_is_laid_out_as_our_own_directories_are_and_made_once(
    build: Build, library: Path, project: Path
) -> None:
    words = ["bits=8", "symmetric=false", "layout=gptq_v2", "group_size=32", "damping=0.1", "max_shard_size=500KB"]
    settings = ["target=gptq/w4_g64", BACKEND, *(f"targets.gptq_w4_g64.{word}" for word in words)]
    made = build(*settings)["targets"]["gptq_w4_g64"]
    found = asked(library)
    names = ("bits", "symmetric", "layout", "group_size", "damping")
    assert [found[name] for name in names] == [8, False, "gptq_v2", 32, 0.1]
    folder = Path(made["path"])
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert config["meta"] == {"quantizer": ["gptqmodel:7.7.0"]}
    assert "offload" not in config  # what the library says of its run
    assert len(list(folder.glob("model-*.safetensors"))) > 2
    assert (folder / "tokenizer.json").read_bytes() == (TINY / "tokenizer.json").read_bytes()
    assert made["bytes"] == sum(path.stat().st_size for path in folder.iterdir())
    assert made["verdicts"] == {"run": 1}
    assert made["peak_ram"] > 0
    assert not list((project.parent / "cache" / "qbuild" / "store" / "backends").iterdir())

    shown = build("graph", *settings)["graph"]
    assert shown.splitlines()[1:] == [
        f"├─ {project / 'tiny-llama'} (29 tensors)", "└─ calibration tokens: hit",
    ]  # fmt: skip

    (library / "asked.json").unlink()
    assert build(*settings)["totals"]["actions"] == {}
    assert not (library / "asked.json").exists()
    anew = build("-B", *settings)
    assert anew["totals"]["actions"]["quant.backend"] == 1
    assert anew["targets"]["gptq_w4_g64"]["digest"] == made["digest"]


@pytest.mark.slow
def test_a_damaged_file_of_a_backend_is_made_again_and_gc_keeps_the_sound_ones(
    build: Build, library: Path, qbuild: Run
) -> None:
    folder = Path(build("target=gptq/w4_g64", BACKEND)["targets"]["gptq_w4_g64"]["path"])
    qbuild("gc")
    path = folder / "model.safetensors"
    good = path.read_bytes()
    assert build("target=gptq/w4_g64", BACKEND)["totals"]["actions"] == {}
    for file in (path, *Path("..", "cache", "qbuild", "store", "blobs").glob("*/*")):
        if file.stat().st_size == len(good):
            file.chmod(0o600)
            file.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    assert build("target=gptq/w4_g64", BACKEND)["totals"]["actions"]["quant.backend"] == 1
    assert path.read_bytes() == good
    assert qbuild("verify").code == 0


@pytest.mark.slow
def test_a_backend_is_measured_as_every_target_is(build: Build, library: Path, project: Path) -> None:
    words = [f"evaluation.source={project / 'text.txt'}", "evaluation.samples=2", "evaluation.length=64"]
    made = build("target=gptq/w4_g64", BACKEND, *words)
    assert made["evaluation"]["targets"]["gptq_w4_g64"]["kl"] > 0.1  # codes that are all alike


@pytest.mark.slow
@pytest.mark.parametrize(("backend", "target"), [("autoawq", "awq/w4_g64"), ("gptqmodel", "gptq/w4_g64")])
def test_a_real_library_makes_a_model_like_its_source(build: Build, project: Path, backend: str, target: str) -> None:
    """Where its environment was made before (QBUILD_TEST_BACKENDS: a backend.dir); making it takes minutes and GiBs.

    AutoAWQ as it is, without its driver's mending, destroys a model on a CPU."""
    made = environment(backend, Path(os.environ.get("QBUILD_TEST_BACKENDS", "environments")).absolute())
    if not made.ready:
        pytest.skip(f"{made.path} is not there")
    name = target.replace("/", "_")
    words = [f"evaluation.source={project / 'text.txt'}", "evaluation.samples=4", "evaluation.length=64"]
    words += [f"backend.dir={made.path.parent}", f"target={target}"]
    measured = [
        build(*words, f"targets.{name}.backend={b}")["evaluation"]["targets"][name] for b in ("native", backend)
    ]
    assert measured[1]["kl"] < 2 * measured[0]["kl"]


# what goes wrong -----------------------------------------------------------------------------------------------------


def test_a_library_that_fails_leaves_nothing_and_the_next_build_succeeds(
    attempt: Callable[..., Done], library: Path
) -> None:
    faults = {
        "sys.exit(0)": "ended with 0",
        "tensors.pop('model.norm.weight')": "no tensor model.norm.weight",
        "(out / 'config.json').write_text('{}')": "in a layout that is not known here",
    }
    for fault, said in faults.items():
        (library / "fault").write_text(fault)
        refused(attempt("target=gptq/w4_g64", BACKEND), 1, said, "backend=native")
    (library / "fault").unlink()
    made = attempt("target=gptq/w4_g64", BACKEND).document
    assert made["totals"]["actions"] == {"quant.backend": 1}


def test_a_plan_says_what_will_be_installed_where_and_how_large_it_is(
    attempt: Callable[..., Done], project: Path
) -> None:
    done = attempt("plan", "target=gptq/w4_g64", BACKEND)
    steps = {step["kind"]: step for step in done.document["steps"]}
    (note,) = steps["quant.backend"]["notes"]
    for word in ("gptqmodel 7.7.0", "83 packages", "2.9 GiB to download", str(project / "environments" / "gptqmodel-")):
        assert word in note
    assert done.document["predicted"]["disk"] > 5 << 30
    assert not (project / "environments").exists()
    text = attempt("plan", "target=gptq/w4_g64", BACKEND, "format=text").out
    assert "".join(note.split()) in "".join(text.split())


def test_an_environment_that_is_there_costs_a_plan_no_disk(attempt: Callable[..., Done], library: Path) -> None:
    done = attempt("plan", "target=gptq/w4_g64", BACKEND)
    assert done.document["steps"][-1]["notes"] == []
    assert done.document["predicted"]["disk"] < 1 << 30


@pytest.mark.slow
def test_a_library_over_the_memory_budget_is_stopped(attempt: Callable[..., Done], library: Path) -> None:
    (library / "fault").write_text("held = b'1' * (2 << 30); import time; time.sleep(20)")
    done = attempt("target=gptq/w4_g64", BACKEND, "budget.ram=1400MiB")
    refused(done, 1, "stopped: it went over its RAM budget")


@pytest.mark.slow
def test_an_environment_that_cannot_be_made_is_said_before_anything_runs(
    attempt: Callable[..., Done], project: Path
) -> None:
    done = attempt("target=gptq/w4_g64", BACKEND, OFFLINE)
    refused(done, 1, "backend gptqmodel", "cannot be installed", "network", "backend.pip=")
    assert "2.9 GiB to download" in done.err
    assert not [path for path in (project / "environments").iterdir() if path.is_dir()]
    assert not list((project / "outputs").glob("**/*"))


def test_offline_an_environment_is_not_made(attempt: Callable[..., Done], project: Path) -> None:
    done = attempt("target=gptq/w4_g64", BACKEND, "offline=true")
    refused(done, 1, "backend gptqmodel", "offline=true", "backend.pip=")
    assert not (project / "environments").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["target=gptq/w4_g64", "targets.gptq_w4_g64.backend=autoawq"], "autoawq does not make gptq"),
        (["target=awq/w4_g64", "targets.awq_w4_g64.backend=gptqmodel"], "gptqmodel does not make awq-gemm"),
        (["target=gptq/w4_g64", "targets.gptq_w4_g64.backend=auto_gptq"], "on CUDA only"),
        (["target=gptq/w4_g64", BACKEND, "targets.gptq_w4_g64.order=group"], "qbuild's own quantizer"),
        (["target=awq/w4_g64", "targets.awq_w4_g64.backend=autoawq", "targets.awq_w4_g64.damping=0.1"], "none like it"),
        (["target=gptq/w4_g64", "targets.gptq_w4_g64.backend=optimum"], "choices: native, autoawq"),
    ],
)
def test_what_a_backend_cannot_make_is_refused_by_the_plan(
    attempt: Callable[..., Done], words: list[str], said: str
) -> None:
    refused(attempt("plan", *words), 2, said, "backend")
