"""Files that are fitted to a size, as whole builds of a real model: what runs, what is shared, what is refused."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Build, Run
from gguf import GGUFReader
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from qbuild import kernels
from qbuild.arch.convert import tensor_specs
from qbuild.arch.mix import order
from qbuild.calibration.curvature import Curvature, Term
from qbuild.digest import Digest
from qbuild.fit import Tensor, choose, damage
from qbuild.plan import store_dir
from qbuild.schema import Config
from qbuild.source import open_source
from qbuild.store import Store

IMATRIX = Path(__file__).parent.parent / "data" / "tiny-llama-imatrix.gguf"
TYPES = ("Q3_K", "Q4_K", "Q6_K", "Q8_0")
ALL = "targets.fit.types=[" + ",".join(TYPES) + "]"
SIZE = 1_750_000


def actions(document: dict[str, Any]) -> dict[str, int]:
    return {kind: count for kind, count in document["totals"]["actions"].items() if not kind.startswith("calibration.")}


def types_of(document: dict[str, Any], target: str = "fit") -> dict[str, str]:
    reader = GGUFReader(document["targets"][target]["path"])
    return {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}


def tensor_bytes(document: dict[str, Any], target: str, name: str) -> bytes:
    reader = GGUFReader(document["targets"][target]["path"])
    return next(bytes(tensor.data) for tensor in reader.tensors if tensor.name == name)


def choices(explained: dict[str, Any], model: Path) -> list[Tensor]:
    """Every tensor of the file with the damage of its types: by NumPy, on dequantized bytes, with the stored curvature.

    Rows of q and k are in the checkpoint's order here, which their damage does not depend on.
    """
    digest = Digest.parse(explained["actions"][0]["outputs"][0])
    curvature = Curvature.from_bytes(Store(store_dir(Config())).read_bytes(digest) or b"")
    checkpoint = open_source(str(model), revision=None, fetch=True, offline=True)
    found = []
    with safe_open(model / "model.safetensors", "pt") as file:
        for spec in order(tensor_specs(checkpoint)):
            source = spec.pieces[0].source
            uses = curvature.terms.get(source.removesuffix(".weight"))
            damages = {spec.stored: 0.0}
            if uses is not None:
                values = file.get_tensor(source).float().numpy()
                damages = {type_: sum(cost(values, type_, use) for use in uses) for type_ in TYPES}
            found.append(Tensor(spec.name, spec.shape, damages))
    return found


def cost(values: np.ndarray, type_: str, use: Term) -> float:
    lost = kernels.dequantize(kernels.quantize(values, type_), type_).astype(np.float64) - values
    return float(0.5 * use.rows.astype(np.float64) @ lost**2 @ use.cols[0].astype(np.float64))


def test_a_fitted_file_does_the_least_damage_of_its_size_and_another_size_only_chooses(
    build: Build, attempt: Run, model: Path
) -> None:
    words = ["target=[gguf/fit,gguf/q4_k_m]", ALL]
    planned = attempt("plan", *words, f"targets.fit.max_size={SIZE}").document["targets"]["fit"]
    assert (planned["bytes"], planned["at_most"], planned["exact"]) == (SIZE, True, False)

    made = build(*words, f"targets.fit.max_size={SIZE}")
    assert made["totals"]["actions"]["calibration.sensitivity"] == 1
    assert actions(made) == {"gguf.damage": 22 * len(TYPES), "gguf.choice": 1, "gguf.metadata": 1}
    size = made["targets"]["fit"]["bytes"]
    assert SIZE - 16384 < size <= SIZE
    assert Path(made["targets"]["fit"]["path"]).stat().st_size == size

    explained = attempt("explain", "sensitivity", *words, f"targets.fit.max_size={SIZE}").document
    tensors, types = choices(explained, model), types_of(made)
    header = size - sum(n for n, _ in (t.choice.types[types[t.name]] for t in tensors))
    fixed = [t.choice for t in tensors]
    best = choose(fixed, SIZE - header)
    assert damage(fixed, types) == pytest.approx(damage(fixed, best), rel=1e-9)
    mix = types_of(made, "q4_k_m")
    shared = [name for name, type_ in types.items() if mix[name] == type_]
    assert {types[name] for name in shared} > {"F32"}
    assert all(tensor_bytes(made, "fit", name) == tensor_bytes(made, "q4_k_m", name) for name in shared)

    again = build(*words, f"targets.fit.max_size={SIZE}")
    assert (again["totals"]["computed"], again["totals"]["actions"]) == (0, {})
    smaller = build(*words, "targets.fit.max_bpw=4.6")
    assert smaller["totals"]["actions"] == {"gguf.choice": 1}
    assert smaller["targets"]["fit"]["bits_per_weight"] <= 4.6


@pytest.mark.slow
@pytest.mark.parametrize("matrix", ["auto", str(IMATRIX)])
def test_damage_is_measured_with_the_importance_matrix_that_the_file_is_made_with(build: Build, matrix: str) -> None:
    words = ["target=[gguf/fit,gguf/q4_k_m]", f"targets.fit.imatrix={matrix}", f"targets.q4_k_m.imatrix={matrix}"]
    made = build(*words, "targets.fit.types=[IQ2_XS,Q4_K,Q6_K]", f"targets.fit.max_size={SIZE}")
    # Neither embedding nor head is in the matrix: IQ2_XS is no choice for the table that is both.
    assert made["totals"]["actions"]["gguf.damage"] == 21 * 3 + 2
    types, mix = types_of(made), types_of(made, "q4_k_m")
    assert made["targets"]["fit"]["bytes"] <= SIZE
    shared = [name for name, type_ in types.items() if mix[name] == type_ == "Q4_K"]
    assert shared
    assert all(tensor_bytes(made, "fit", name) == tensor_bytes(made, "q4_k_m", name) for name in shared)
    bare = build("target=gguf/fit", "targets.fit.types=[Q4_K,Q6_K]", f"targets.fit.max_size={SIZE}")
    assert actions(bare) == {"gguf.damage": 44 - 2, "gguf.choice": 1}  # the table's are those of before


@pytest.mark.slow
def test_everything_again_measures_again_and_a_changed_tensor_too(build: Build, model: Path) -> None:
    words = ["target=gguf/fit", "targets.fit.types=[Q4_K,Q6_K]", "targets.fit.max_bpw=5"]
    first = build(*words)
    again = build(*words, "-B")
    assert again["totals"]["actions"] == first["totals"]["actions"]
    assert again["targets"]["fit"]["digest"] == first["targets"]["fit"]["digest"]
    weights = load_file(model / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"] *= 2
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    changed = build(*words)
    assert changed["totals"]["actions"]["calibration.sensitivity"] == 1
    assert "calibration.tokens" not in changed["totals"]["actions"]


REFUSED = {
    "neither": ((), 2, "neither max_size nor max_bpw"),
    "both": (("targets.fit.max_size=2MB", "targets.fit.max_bpw=4"), 2, "both max_size and max_bpw"),
    "type": (("targets.fit.max_bpw=4", "targets.fit.types=[Q4_K,Q7_K]"), 2, "'Q7_K' is not a type of weights"),
    "bare": (("targets.fit.max_bpw=4", "targets.fit.types=[IQ2_XS]"), 2, "IQ2_XS needs an importance matrix"),
    "size": (("targets.fit.max_size=much",), 2, "'much' is not a size"),
    "bits": (("targets.fit.max_bpw=0",), 2, "not a number of bits"),
    "small": (("targets.fit.max_size=900KB",), 3, "the smallest file of these types takes"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_fitted_is_refused_before_anything_runs(attempt: Run, case: str) -> None:
    words, code, fact = REFUSED[case]
    done = attempt("plan", "target=gguf/fit", *words)
    assert done.code == code
    assert fact in done.error["fact"]


def test_a_size_that_is_too_small_is_refused_with_one_that_is_enough(build: Build, attempt: Run) -> None:
    def remedy(given: str) -> str:
        """The setting that a refusal names, of the kind that was given."""
        name = given.partition("=")[0]
        return re.search(rf"{name}=[\d.]+", attempt("plan", "target=gguf/fit", given).error["remedy"])[0]

    guessed = remedy("targets.fit.max_size=900KB"), remedy("targets.fit.max_bpw=1")  # the vocabulary is not known yet
    build("target=gguf/bf16")
    known = remedy("targets.fit.max_size=900KB"), remedy("targets.fit.max_bpw=1")  # sizes are exact
    for setting in (*guessed, *known):
        assert attempt("plan", "target=gguf/fit", setting).code == 0
    least, bits = (setting.partition("=")[2] for setting in known)
    assert attempt("plan", "target=gguf/fit", f"targets.fit.max_bpw={float(bits) - 0.01}").code == 3
    assert attempt("plan", "target=gguf/fit", f"targets.fit.max_size={int(least) - 1}").code == 3


def test_a_gguf_file_cannot_be_fitted(qbuild: Run, build: Build) -> None:
    path = build("target=gguf/bf16")["targets"]["bf16"]["path"]
    done = qbuild("plan", f"model.source={path}", "target=gguf/fit", "targets.fit.max_bpw=5", "format=json")
    assert done.code == 4
    assert "cannot be calibrated on" in done.error["fact"]
