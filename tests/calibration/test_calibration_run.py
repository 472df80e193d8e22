"""A model run by layers computes what transformers computes, and its statistics are those of the activations."""

from __future__ import annotations

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
import transformers
from safetensors import safe_open

from qbuild.calibration import run
from qbuild.calibration.collect import Collector
from qbuild.calibration.forward import Streamed
from qbuild.calibration.run import Pass, calibrate
from qbuild.calibration.statistics import Input, Statistics
from qbuild.calibration.triangle import mirror, square
from qbuild.errors import InputError
from qbuild.overlap import Ahead, Behind

TINY = Path(__file__).parent.parent / "data" / "tiny-llama"
CONFIG = json.loads((TINY / "config.json").read_text())
PARTS = ("gram", "diagonal", "mean_abs")
LAYERS = range(CONFIG["num_hidden_layers"])


class Tensors(dict[str, torch.Tensor]):
    """A checkpoint in memory that writes down what is read."""

    def __init__(self, tensors: dict[str, torch.Tensor]) -> None:
        super().__init__(tensors)
        self.reads: list[str] = []

    def read(self, name: str) -> torch.Tensor:
        self.reads.append(name)
        return self[name]

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(tensor.shape) for name, tensor in self.items()}


@pytest.fixture
def tensors() -> Tensors:
    with safe_open(TINY / "model.safetensors", "pt") as file:
        return Tensors({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    return transformers.AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32).eval()


@pytest.fixture
def tokens() -> np.ndarray:
    return np.random.default_rng(1).integers(0, CONFIG["vocab_size"], (3, 48)).astype(np.int32)


@pytest.fixture
def task(tensors: Tensors, tokens: np.ndarray, tmp_path: Path) -> Pass:
    return Pass(CONFIG, tensors.shapes(), tokens, 0, LAYERS[-1], tmp_path / "states")


def saved(task: Pass, read: Callable[[str], torch.Tensor]) -> dict[int, bytearray]:
    """The statistics of every layer that a pass measured."""
    found: dict[int, bytearray] = {}
    calibrate(task, read, lambda layer, data: found.update({layer: data}))
    return found


def whole(found: Input) -> np.ndarray:
    """The Gram matrix [n, n]."""
    assert found.upper is not None
    return square(torch.from_numpy(found.upper), len(found.diagonal)).numpy()


def test_logits_are_those_of_the_whole_model(tensors: Tensors, model: torch.nn.Module, tokens: np.ndarray) -> None:
    ids = torch.from_numpy(tokens.astype(np.int64))
    streamed = Streamed(CONFIG, tensors, tensors.read)
    hidden = streamed.embed(ids)
    for index in LAYERS:
        with streamed.layer(index) as layer:
            hidden = layer(hidden)
    streamed.release()
    with torch.no_grad():
        wanted = model(ids).logits
    torch.testing.assert_close(streamed.logits(hidden), wanted, rtol=1e-5, atol=1e-5)


def test_one_layer_is_in_memory_at_a_time(tensors: Tensors) -> None:
    streamed = Streamed(CONFIG, tensors, tensors.read)
    real = [name for name, p in streamed.model.named_parameters() if not p.is_meta]
    with streamed.layer(2):
        inside = {name for name, p in streamed.model.named_parameters() if not p.is_meta}
    after = [name for name, p in streamed.model.named_parameters() if not p.is_meta]
    assert (real, after) == ([], [])
    assert inside == {name for name in tensors if name.startswith("model.layers.2.")}


def test_a_gram_matrix_is_that_of_the_recorded_activations(
    task: Pass, tensors: Tensors, model: torch.nn.Module, tokens: np.ndarray
) -> None:
    seen: dict[str, list[torch.Tensor]] = {}
    hooks = [
        module.register_forward_pre_hook(
            lambda _m, inputs, name=name: seen.setdefault(name, []).append(inputs[0].flatten(0, -2).double())
        )
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear)
    ]
    with torch.no_grad():
        model(torch.from_numpy(tokens.astype(np.int64)))
    for hook in hooks:
        hook.remove()
    for index, data in saved(task, tensors.read).items():
        statistics = Statistics.from_bytes(data)
        assert statistics.layer == index
        for found in statistics.inputs:
            for linear in found.shared:
                X = torch.cat(seen[linear]).numpy()
                G = X.T @ X
                gram = whole(found)
                assert found.count == len(X) == tokens.size
                assert np.abs(gram - G).max() <= 1e-5 * np.abs(G).max()
                assert np.array_equal(gram.diagonal(), found.diagonal)
                assert np.array_equal(gram, gram.T)
                np.testing.assert_allclose(found.diagonal, G.diagonal(), rtol=1e-5)
                np.testing.assert_allclose(found.mean_abs, np.abs(X).mean(0), rtol=1e-5)


def test_columns_that_are_always_large_leave_a_gram_matrix_in_bfloat16_positive() -> None:
    """Each product is rounded to 1/256 of itself, in every window alike: plain sums have an eigenvalue of -0.4."""
    torch.manual_seed(0)
    weight = torch.empty(8, 300, dtype=torch.bfloat16)
    collector, total = Collector(0, {"w": (weight, ("w.weight",))}, ["w"], True), torch.zeros(300, 300).double()
    with ThreadPoolExecutor(1) as pool:
        for tokens in (512, 512, 200, 700, 512, 512):  # experts get other numbers of tokens
            x = torch.randn(tokens, 300)
            x[:, 3], x[:, 280], x[0, 7], x[0, 270] = 30, 21, 500, 333
            with collector.watch() as watch:
                torch.nn.functional.linear(x.bfloat16(), weight)
            collector.add([watch], pool)
            total += x.bfloat16().double().T @ x.bfloat16().double()
    (found,) = collector.measured()
    assert found.gram is not None
    gram, scale = mirror(found.gram).double(), total.diagonal().rsqrt()
    assert ((gram - total) * scale * scale[:, None]).abs().max() < 5e-4
    assert torch.linalg.eigvalsh(gram).min() > -0.005 * total.diagonal().mean()


def test_linears_that_read_the_same_tensor_share_one_input(task: Pass, tensors: Tensors) -> None:
    statistics = Statistics.from_bytes(saved(replace(task, last=0), tensors.read)[0])
    names = [tuple(linear.rpartition(".")[2] for linear in found.shared) for found in statistics.inputs]
    assert names == [("down_proj",), ("gate_proj", "up_proj"), ("o_proj",), ("k_proj", "q_proj", "v_proj")]


def test_spilled_states_give_the_same_bytes(task: Pass, tensors: Tensors, tmp_path: Path) -> None:
    in_memory = saved(task, tensors.read)
    assert in_memory == saved(replace(task, spill=True, states=tmp_path / "other"), tensors.read)


@pytest.mark.parametrize(("spill", "dtype"), [(False, "float32"), (True, "float32"), (True, "bfloat16")])
def test_any_number_of_threads_gives_the_same_bytes(
    task: Pass, tensors: Tensors, tmp_path: Path, spill: bool, dtype: str
) -> None:
    task = replace(task, dtype=dtype)
    alone = saved(task, tensors.read)
    assert alone == saved(replace(task, threads=2, spill=spill, states=tmp_path / "other"), tensors.read)


@pytest.fixture
def overlapping(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers are read ahead and saved behind, as where a device computes."""
    monkeypatch.setattr(run, "Ahead", lambda read, _device: Ahead(read, "cuda"))
    monkeypatch.setattr(run, "Behind", lambda _device: Behind("cuda"))


def test_layers_read_ahead_and_saved_behind_give_the_same_bytes(
    task: Pass, tensors: Tensors, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    plain = saved(task, tensors.read)
    reads = sorted(tensors.reads)
    tensors.reads.clear()
    request.getfixturevalue("overlapping")
    assert saved(replace(task, states=tmp_path / "other"), tensors.read) == plain
    assert sorted(tensors.reads) == reads


@pytest.mark.parametrize(("spill", "beside"), [(False, False), (True, False), (False, True), (True, True)])
def test_a_pass_cut_off_goes_on_with_the_same_bytes(
    task: Pass, tensors: Tensors, spill: bool, beside: bool, monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
) -> None:  # fmt: skip
    monkeypatch.setattr("qbuild.calibration.states.KEEP_EVERY", 0.0)
    task = replace(task, spill=spill)
    whole = saved(replace(task, states=task.states / "whole"), tensors.read)
    if beside:
        request.getfixturevalue("overlapping")
    cut: dict[int, bytearray] = {}

    def die_in_layer_2(layer: int, data: bytearray) -> None:
        if layer == 2:
            raise KeyboardInterrupt
        cut[layer] = data

    with pytest.raises(KeyboardInterrupt):
        calibrate(task, tensors.read, die_in_layer_2)
    tensors.reads.clear()
    rest = saved(replace(task, first=2), tensors.read)
    assert cut | rest == whole
    assert not [name for name in tensors.reads if ".layers.0." in name or ".layers.1." in name]
    assert [path.name for path in task.states.glob("*.hidden")] == [f"before-{len(LAYERS):04d}.hidden"]


def test_states_of_another_size_are_not_taken_up(task: Pass, tensors: Tensors) -> None:
    whole = saved(replace(task, states=task.states / "whole"), tensors.read)
    (task.states / "before-0002.hidden").write_bytes(b"short")
    assert saved(replace(task, first=2), tensors.read) == {layer: whole[layer] for layer in LAYERS[2:]}


def test_a_diagonal_alone_is_the_same_diagonal(task: Pass, tensors: Tensors, tmp_path: Path) -> None:
    full = Statistics.from_bytes(saved(replace(task, last=0), tensors.read)[0])
    alone = Statistics.from_bytes(saved(replace(task, last=0, gram=False, states=tmp_path / "o"), tensors.read)[0])
    for one, other in zip(full.inputs, alone.inputs, strict=True):
        assert other.upper is None
        assert one.diagonal.tobytes() == other.diagonal.tobytes()
        assert one.mean_abs.tobytes() == other.mean_abs.tobytes()


def test_bytes_of_statistics_are_canonical(task: Pass, tensors: Tensors) -> None:
    for data in saved(replace(task, last=1), tensors.read).values():
        assert Statistics.from_bytes(data).to_bytes() == data
        names = {f"{found.name}.{kind}" for found in Statistics.from_bytes(data).inputs for kind in PARTS}
        assert safetensors.torch.load(bytes(data)).keys() == names


def test_weights_that_are_nan_are_named(task: Pass, tensors: Tensors) -> None:
    tensors["model.layers.1.mlp.up_proj.weight"] = tensors["model.layers.1.mlp.up_proj.weight"] * float("nan")
    with pytest.raises(
        InputError, match=r"model.layers.1.mlp.up_proj.weight: .* NaN or infinite, the first at \[0, 0\]"
    ):
        saved(task, tensors.read)


def test_activations_that_overflow_are_named_with_their_layer(task: Pass, tensors: Tensors) -> None:
    tensors["model.layers.1.mlp.up_proj.weight"] = torch.full_like(tensors["model.layers.1.mlp.up_proj.weight"], 1e38)
    with pytest.raises(InputError, match=r"layer 1: the inputs of model.layers.1.mlp.down_proj are NaN") as caught:
        saved(task, tensors.read)
    assert "overflow" in caught.value.remedy


def test_a_checkpoint_without_decoder_layers_is_refused(tensors: Tensors) -> None:
    names = [name.replace("layers.2", "layers.two") for name in tensors]
    with pytest.raises(InputError, match=r"no list of 3 decoder layers.*there are: model.layers.N \(2\)"):
        Streamed(CONFIG, names, tensors.read)


def test_a_model_that_transformers_does_not_know_is_refused(tensors: Tensors) -> None:
    with pytest.raises(InputError, match=r"model type 'nonesuch': transformers .* has no causal language model"):
        Streamed(CONFIG | {"model_type": "nonesuch"}, tensors, tensors.read)


def test_a_missing_tensor_is_named(task: Pass, tensors: Tensors) -> None:
    del tensors["model.layers.1.mlp.up_proj.weight"]
    with pytest.raises(InputError, match=r"no tensor for model.layers.1.mlp.up_proj.weight"):
        saved(replace(task, tensors=tensors.shapes()), tensors.read)


def test_an_input_that_is_overwritten_after_it_was_read_is_refused() -> None:
    """Windows are summed after they went through a layer, so what was read must still be there."""
    weight, x = torch.ones(3, 4), torch.ones(2, 4)
    collector = Collector(0, {"a.weight": (weight, ("a.weight",))}, ["a"], gram=True)
    with collector.watch() as watch:
        torch.nn.functional.linear(x, weight)
    x += 1
    with ThreadPoolExecutor(1) as pool, pytest.raises(InputError, match="layer 0: the input of a is overwritten"):
        collector.add([watch], pool)
