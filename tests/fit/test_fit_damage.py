"""What a type costs a tensor: the curvature against plain autograd, the damage against NumPy on what was written."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from safetensors import safe_open

from qbuild import kernels
from qbuild.actions import damage, tensor
from qbuild.arch.convert import Transform
from qbuild.calibration.curvature import Curvature, Term
from qbuild.calibration.reverse import ROWS, Pass, measure

TINY = Path(__file__).parent.parent / "data" / "tiny-llama"
CONFIG = json.loads((TINY / "config.json").read_text())
EMBEDDING = "model.embed_tokens"


@pytest.fixture(scope="module")
def tensors() -> dict[str, torch.Tensor]:
    with safe_open(TINY / "model.safetensors", "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


@pytest.fixture
def task(tensors: dict[str, torch.Tensor], tmp_path: Path) -> Pass:
    tokens = np.random.default_rng(1).integers(0, CONFIG["vocab_size"], (3, 80)).astype(np.int32)
    return Pass(CONFIG, {n: tuple(t.shape) for n, t in tensors.items()}, tokens, tmp_path / "states")


def measured(task: Pass, tensors: dict[str, torch.Tensor]) -> Curvature:
    return measure(task, tensors.__getitem__, lambda _done, _where: None)


def by_autograd(tokens: np.ndarray) -> dict[str, list[tuple[np.ndarray, np.ndarray]]]:
    """(rows, cols) of every use of a tensor: one backward pass through the whole model of transformers."""
    model = transformers.AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32).eval()
    sums: dict[str, list[torch.Tensor]] = {}

    def add(name: str, rows: torch.Tensor, cols: torch.Tensor) -> None:
        known = sums.setdefault(name, [torch.zeros_like(rows), torch.zeros_like(cols)])
        known[0] += rows
        known[1] += cols

    def squares(x: torch.Tensor) -> torch.Tensor:
        return x.detach().reshape(-1, x.shape[-1]).double().square().sum(0)

    kept: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}

    def keep(name: str, x: torch.Tensor, y: torch.Tensor) -> None:
        y.retain_grad()
        kept[name] = (x, y)

    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_hook(lambda _m, x, y, name=name: keep(name, x[0], y))
    for number, window in enumerate(torch.from_numpy(tokens.astype(np.int64))):
        embedded = model.get_input_embeddings()(window[None]).detach().requires_grad_()
        logits = model(inputs_embeds=embedded, use_cache=False).logits[0]
        draw, drawn = torch.Generator().manual_seed(number), []
        for at in range(0, len(window), ROWS):
            drawn.append(torch.multinomial(logits[at : at + ROWS].detach().softmax(-1), 1, generator=draw)[:, 0])
        torch.nn.functional.cross_entropy(logits, torch.cat(drawn), reduction="sum").backward()
        for name, (x, y) in kept.items():
            add(name, squares(y.grad), squares(x))
        add("lookup", torch.bincount(window, minlength=CONFIG["vocab_size"]).double(), squares(embedded.grad))
    found = {n: [(r / tokens.size).numpy(), (c / tokens.size).numpy()] for n, (r, c) in sums.items()}
    ends = [found.pop("lm_head"), found.pop("lookup")]
    return {name: [value] for name, value in found.items()} | {EMBEDDING: ends}  # type: ignore[list-item, dict-item]


def test_a_pass_back_by_layers_finds_what_autograd_finds_in_the_whole_model(
    task: Pass, tensors: dict[str, torch.Tensor]
) -> None:
    found, expected = measured(task, tensors), by_autograd(task.tokens)
    assert found.terms.keys() == expected.keys()
    assert len(found.terms[EMBEDDING]) == 2  # the table is looked up, and is the head too
    for name, uses in expected.items():
        for term, (rows, cols) in zip(found.terms[name], uses, strict=True):
            np.testing.assert_allclose(term.rows, rows, rtol=2e-3, atol=1e-5 * rows.max())
            np.testing.assert_allclose(term.cols[0], cols, rtol=2e-3, atol=1e-5 * cols.max())


def test_neither_threads_nor_storing_change_a_bit_of_it(task: Pass, tensors: dict[str, torch.Tensor]) -> None:
    one, two = measured(task, tensors), measured(replace(task, threads=2), tensors)
    assert one.to_bytes() == two.to_bytes() == Curvature.from_bytes(one.to_bytes()).to_bytes()
    assert not any(task.states.iterdir())


# damage --------------------------------------------------------------------------------------------------------------


def params(
    type_: str, parts: tuple[tuple[str, int, int | None], ...], matrices: int, cols: int, **more: object
) -> damage.Params:
    made = tensor.Params(type_, "BF16", "BF16", cols, more.get("transform", Transform()))  # type: ignore[arg-type]
    return damage.Params(made, parts, matrices)


def weights(rows: int, cols: int, seed: int = 0) -> np.ndarray:
    """bfloat16 as uint16."""
    values = np.random.default_rng(seed).standard_normal((rows, cols)).astype(np.float32)
    return (values.view(np.uint32) >> 16).astype(np.uint16)


def wide(raw: np.ndarray) -> np.ndarray:
    return (raw.astype(np.uint32) << 16).view(np.float32)


def term(rows: int, matrices: int, cols: int, seed: int) -> Term:
    draw = np.random.default_rng(seed)
    return Term(draw.random(rows).astype(np.float32), draw.random((matrices, cols)).astype(np.float32))


def cost(
    raw: np.ndarray, made: list[damage.Params], imatrix: np.ndarray | None, found: list[Term], step: int
) -> list[float]:
    parts = [
        damage.losses(raw[at : at + step].view(np.uint8), at, made, [imatrix] * len(made), found)
        for at in range(0, len(raw), step)
    ]
    return [float(np.concatenate(rows).sum()) for rows in zip(*parts, strict=True)]


def by_hand(values: np.ndarray, type_: str, imatrix: np.ndarray | None, rows: np.ndarray, cols: np.ndarray) -> float:
    """½ rowsᵀ (W − Ŵ)² cols of one matrix, whose bytes come from the kernel that the file's come from."""
    lost = kernels.dequantize(kernels.quantize(values, type_, imatrix), type_).astype(np.float64) - values
    return float(0.5 * rows.astype(np.float64) @ lost**2 @ cols.astype(np.float64))


@pytest.mark.parametrize("step", [12, 4])
def test_damage_is_the_weighted_square_of_what_was_lost_however_it_is_read(step: int) -> None:
    raw, imatrix = weights(12, 256), np.random.default_rng(5).random((1, 256)).astype(np.float32)
    uses = [term(12, 1, 256, 1), term(12, 1, 256, 2)]
    types = ["Q4_K", "Q3_K", "IQ4_XS", "Q8_0", "BF16"]
    made = [params(t, (("w", 0, None),), 1, 256) for t in types]
    found = cost(raw, made, imatrix, uses, step)
    for type_, value in zip(types[:3], found, strict=False):
        assert value == pytest.approx(
            sum(by_hand(wide(raw), type_, imatrix[0], use.rows, use.cols[0]) for use in uses), rel=1e-9
        )
    assert found[-1] == 0.0
    assert found[3] < found[0] < found[1]


def test_heads_that_are_reordered_take_their_rows_curvature_along() -> None:
    transform = Transform("permute", 8)
    raw, curvature = weights(16, 256), Curvature({"q": (term(16, 1, 256, 3),)})
    made = params("Q4_0", (("q.weight", 0, None),), 1, 256, transform=transform)
    found = damage.terms(made, curvature)
    plain = curvature.terms["q"][0]
    assert cost(raw, [made], None, found, 8)[0] == pytest.approx(
        by_hand(wide(raw), "Q4_0", None, plain.rows, plain.cols[0]), rel=1e-9
    )


def test_each_expert_of_a_stack_has_its_own_columns_and_one_that_saw_no_token_costs_nothing() -> None:
    raw = weights(12, 256)
    curvature = Curvature({"e.0": (term(4, 1, 256, 4),), "e.2": (term(4, 1, 256, 6),)})
    made = params("Q4_0", tuple((f"e.{n}.weight", 0, None) for n in range(3)), 3, 256)
    found = damage.terms(made, curvature)
    expected = sum(
        by_hand(wide(raw[4 * n : 4 * n + 4]), "Q4_0", None, t.rows, t.cols[0])
        for n, t in ((0, curvature.terms["e.0"][0]), (2, curvature.terms["e.2"][0]))
    )
    assert cost(raw, [made], None, found, 5)[0] == pytest.approx(expected, rel=1e-9)


def test_parts_of_a_fused_tensor_and_of_a_stored_stack_find_their_rows() -> None:
    fused = Curvature({"qkv": (term(24, 1, 256, 7),)})
    (own,) = damage.terms(params("Q4_0", (("qkv.weight", 8, 16),), 1, 256), fused)
    np.testing.assert_array_equal(own.rows, fused.terms["qkv"][0].rows[8:16])
    stack = Curvature({"experts.gate_up": (term(24, 3, 256, 8),)})  # three experts of 8 rows: 4 of gate, 4 of up
    parts = tuple(("experts.gate_up", at, at + 4) for at in (4, 12, 20))
    (ups,) = damage.terms(params("Q4_0", parts, 3, 256), stack)
    np.testing.assert_array_equal(ups.rows, stack.terms["experts.gate_up"][0].rows.reshape(3, 2, 4)[:, 1].reshape(-1))
    np.testing.assert_array_equal(ups.cols, stack.terms["experts.gate_up"][0].cols)
