"""Error propagation against whole models with hooks, in NumPy and float64; cut off, spilled, and with experts."""

from __future__ import annotations

import json
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from safetensors import safe_open

from qbuild.calibration.collect import Collector
from qbuild.calibration.run import Pass
from qbuild.quant.gptq import SHARE, toward
from qbuild.quant.grid import Grid, nearest
from qbuild.quant.propagation import propagate, seen

TINY = Path(__file__).parent.parent / "data" / "tiny-llama"
CONFIG = json.loads((TINY / "config.json").read_text())
LAYERS = range(CONFIG["num_hidden_layers"])
DAMPING = 0.05


class Rounding:
    """A way of quantizing that tells what it was given: drift made good, then plain rounding to 3 bits."""

    def __init__(self, read: Mapping[str, torch.Tensor], dies_in: int | None = None) -> None:
        self.source, self.dies_in = read, dies_in
        self.reads: list[str] = []
        self.wanted: dict[str, torch.Tensor] = {}
        self.made: dict[int, dict[str, torch.Tensor]] = {}

    def read(self, name: str) -> torch.Tensor:
        self.reads.append(name)
        return self.source[name]

    def solve(self, layer: int, collector: Collector) -> dict[str, torch.Tensor]:
        if layer == self.dies_in:
            raise KeyboardInterrupt
        made = {}
        for found in collector.measured():
            known = seen(found)
            assert known.drift is not None
            for linear in found.shared:
                weight = toward(self.source[f"{linear}.weight"].float(), known.gram, known.drift, DAMPING)
                self.wanted[linear] = weight
                made[f"{linear}.weight"] = nearest(weight, Grid(3, 32, False))
        self.made[layer] = made
        return made


@pytest.fixture
def tensors() -> dict[str, torch.Tensor]:
    with safe_open(TINY / "model.safetensors", "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


@pytest.fixture
def task(tensors: dict[str, torch.Tensor], tmp_path: Path) -> Pass:
    tokens = np.random.default_rng(1).integers(0, CONFIG["vocab_size"], (6, 48)).astype(np.int32)
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    return Pass(CONFIG, shapes, tokens, 0, LAYERS[-1], tmp_path / "states")


def run(task: Pass, rounding: Rounding, done: Rounding | None = None) -> Rounding:
    """``done``: what an earlier process left of the layers before ``task.first``."""
    wanted = range(task.first, task.last + 1)
    propagate(task, rounding.read, wanted, lambda n: done.made[n] if done else {}, rounding.solve)
    return rounding


def hooked(model: torch.nn.Module, tokens: np.ndarray) -> dict[str, np.ndarray]:
    """float64 [tokens, in]: what each linear reads."""
    found: dict[str, np.ndarray] = {}
    hooks = [
        module.register_forward_pre_hook(
            lambda _m, inputs, name=name: found.update({name: inputs[0].flatten(0, -2).double().numpy()})
        )
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear)
    ]
    with torch.no_grad():
        model(torch.from_numpy(tokens.astype(np.int64)))
    for hook in hooks:
        hook.remove()
    return found


def test_each_layer_is_rounded_toward_the_source_from_what_the_layers_below_give(
    task: Pass, tensors: dict[str, torch.Tensor]
) -> None:
    made = run(task, Rounding(tensors))
    source = transformers.AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32).eval()
    own = transformers.AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32).eval()
    theirs = hooked(source, task.tokens)
    for layer in LAYERS:
        ours = hooked(own, task.tokens)  # the layers below are quantized
        for linear in (name for name in made.wanted if f".layers.{layer}." in name):
            X, other, W = ours[linear], theirs[linear], tensors[f"{linear}.weight"].double().numpy()
            G = X.T @ X
            damped = G + DAMPING * G.diagonal().mean() * np.eye(len(G))
            wanted = W + SHARE * np.linalg.solve(damped, X.T @ (other - X) @ W.T).T
            assert np.abs(made.wanted[linear].numpy() - wanted).max() < 1e-4 * np.abs(wanted).max()
            assert layer == 0 or np.abs(wanted - W).max() > 0.01 * np.abs(W).max()  # there is something to make good
        own.load_state_dict(made.made[layer], strict=False)


@pytest.mark.parametrize("spill", [False, True])
def test_a_chain_cut_off_goes_on_with_the_same_bytes(
    task: Pass, tensors: dict[str, torch.Tensor], spill: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qbuild.calibration.states.KEEP_EVERY", 0.0)
    whole = run(replace(task, states=task.states / "whole"), Rounding(tensors))
    cut = Rounding(tensors, dies_in=2)
    with pytest.raises(KeyboardInterrupt):
        run(replace(task, spill=spill), cut)
    rest = run(replace(task, spill=spill, first=2), Rounding(tensors), done=cut)
    assert sorted(cut.made | rest.made) == list(LAYERS)
    for layer, made in (cut.made | rest.made).items():
        assert all(torch.equal(weight, whole.made[layer][name]) for name, weight in made.items())
    assert not [name for name in rest.reads if ".layers.0." in name or ".layers.1." in name]


def test_states_that_were_lost_are_made_again_from_what_is_known(task: Pass, tensors: dict[str, torch.Tensor]) -> None:
    whole = run(replace(task, states=task.states / "whole"), Rounding(tensors))
    rest = run(replace(task, first=2), Rounding(tensors), done=whole)
    assert all(torch.equal(weight, whole.made[2][name]) for name, weight in rest.made[2].items())


def test_drift_of_experts_that_saw_other_tokens_than_in_the_source_is_not_summed() -> None:
    weights = {f"e{n}.weight": (torch.ones(3, 4), (f"e{n}.weight",)) for n in range(2)}
    collector = Collector(0, weights, ["e0", "e1"], gram=True, length=5)
    x = torch.randn(5, 4)

    def watched(rows: int) -> object:
        with collector.watch() as watch:
            torch.nn.functional.linear(x * 2, weights["e0.weight"][0])
            torch.nn.functional.linear(x[:rows].clone(), weights["e1.weight"][0])
        return watch

    with ThreadPoolExecutor(1) as pool:
        collector.add([watched(3)], pool, [watched(2)])  # type: ignore[list-item]
    found = {one.name: one for one in collector.measured()}
    assert found["e0"].drift is not None
    assert found["e1"].drift is None
    assert found["e1"].gram is not None
