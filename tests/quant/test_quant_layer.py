"""GPTQ and AWQ on Gram statistics: against a NumPy reference of the paper, the activations themselves, and the model
that scaling must leave as it is."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch.nn.functional import linear as apply

from qbuild.calibration.shapes import linears
from qbuild.errors import ActionFailed
from qbuild.quant.codes import Codes, Solved
from qbuild.quant.families import Group, groups
from qbuild.quant.gptq import curvature, gptq
from qbuild.quant.grid import Grid, clipped, ends, fit, nearest, quantize
from qbuild.quant.layer import Params, solve
from qbuild.quant.scaling import Seen, fold, gram_loss, search
from qbuild.quant.team import Team

Array = np.ndarray[Any, Any]


def inputs(columns: int, tokens: int = 400) -> torch.Tensor:
    """Activations with a few large columns that go together, as those of language models."""
    torch.manual_seed(columns)
    mixing = torch.eye(columns) + 0.3 * torch.randn(columns, columns) / columns**0.5
    return torch.randn(tokens, columns) @ mixing * torch.logspace(-1, 1, columns)[torch.randperm(columns)]


def weights(out: int, columns: int) -> torch.Tensor:
    torch.manual_seed(out + columns)
    return torch.randn(out, columns) * 0.05


def one(weight: torch.Tensor, gram: torch.Tensor, grid: Grid, order: str, damping: float, sweeps: int = 3) -> Codes:
    with Team(weight.device) as team:
        return gptq(weight, gram, grid, order, damping, team, sweeps)


def reference(weight: Array, hessian: Array, scale: Array, zero: Array, size: int, top: int, damping: float) -> Array:
    """Algorithm 1 of Frantar et al. without blocks, columns in their order, grids given; float64."""
    weight, columns = weight.astype(np.float64).copy(), weight.shape[1]
    hessian = hessian.astype(np.float64) + damping * np.diag(hessian).mean() * np.eye(columns)
    factor = np.linalg.cholesky(np.linalg.inv(hessian)).T
    codes = np.empty(weight.shape, np.int64)
    for column in range(columns):
        s, z = scale[:, column // size], zero[:, column // size]
        codes[:, column] = np.clip(np.round(weight[:, column] / s) + z, 0, top)
        error = (weight[:, column] - (codes[:, column] - z) * s) / factor[column, column]
        weight[:, column:] -= np.outer(error, factor[column, column:])
    return codes


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_gptq_rounds_as_the_paper_says(bits: int, symmetric: bool) -> None:
    weight, x = weights(48, 192), inputs(192)
    grid, gram = Grid(bits, 32, symmetric), x.T @ x
    made = one(weight, gram, grid, "natural", 0.05, sweeps=0)
    fitted = fit(weight, curvature(gram, 32, "natural", 0.05).hessian.diagonal(), grid)
    scale, zero = (t.numpy().astype(np.float64) for t in fitted)
    wanted = reference(weight.numpy(), (2 * gram).numpy(), scale, zero, 32, grid.top, 0.05)
    differing = (made.codes.numpy() != wanted).mean()
    assert differing < 0.002  # float32 against float64: a code next to a tie may go the other way


@pytest.mark.parametrize("symmetric", [True, False])
def test_no_sweep_of_descent_makes_any_row_worse_and_the_first_helps(symmetric: bool) -> None:
    weight, x = weights(32, 192), inputs(192)
    gram, grid = x.T @ x, Grid(3, 32, symmetric)
    hessian = curvature(gram, 32, "activation", 0.05).hessian
    losses = []
    for sweeps in range(4):
        error = weight - one(weight, gram, grid, "activation", 0.05, sweeps).dequantize()
        losses.append(((error @ hessian) * error).sum(1))
    for before, after in pairwise(losses):
        assert (after <= before * 1.0001).all()
    assert losses[1].sum() < 0.97 * losses[0].sum()


def test_descent_ends_where_no_single_code_can_be_bettered() -> None:
    weight, x = weights(4, 64), inputs(64)
    hessian = curvature(x.T @ x, 16, "natural", 0.05).hessian
    made = one(weight, x.T @ x, Grid(3, 16, False), "natural", 0.05, sweeps=60)

    def losses(codes: torch.Tensor) -> torch.Tensor:
        error = weight - replace(made, codes=codes).dequantize()
        return ((error @ hessian) * error).sum(1)

    best = losses(made.codes)
    for column in range(64):
        for step in (-1, 1):
            other = made.codes.int()
            other[:, column] = (other[:, column] + step).clamp(0, 7)
            assert (losses(other.to(torch.uint8)) >= best * 0.9999).all()


@pytest.mark.parametrize("rounding", ["gptq", "nearest"])
def test_a_symmetric_grid_turns_to_the_side_with_the_largest_weight(rounding: str) -> None:
    """Groups of all codes of a 4-bit grid, some upside down: without a negative scale no grid has them."""
    steps = torch.arange(-8.0, 8).repeat(2)
    weight = torch.stack([steps, -steps, torch.cat([steps[:16], -steps[:16]])]) / 64
    gram = torch.eye(32)
    if rounding == "gptq":
        scales, zeros = fit(weight, gram.diagonal(), Grid(4, 16, True))
    else:
        scales, zeros = clipped(weight, gram, Grid(4, 16, True))
    assert scales.sign().tolist() == [[1, 1], [-1, -1], [1, -1]]
    assert (zeros == 8).all()
    loss = (
        (weight - quantize(weight.view(3, 2, 16), scales[..., None], zeros[..., None], 15)[1].view(3, 32))
        .square()
        .sum()
    )
    turned = (weight - nearest(weight, Grid(4, 16, True))).square().sum()
    assert loss < turned / 2


def test_a_grid_with_a_zero_point_has_positive_scales() -> None:
    weight, x = weights(32, 128), inputs(128)
    assert (one(weight, x.T @ x, Grid(3, 32, False), "activation", 0.05).scales > 0).all()


def test_sorted_groups_are_told_by_their_index() -> None:
    weight, x = weights(32, 128), inputs(128)
    gram, grid = x.T @ x, Grid(4, 32, True)
    made = one(weight, gram, grid, "indexed", 0.05)
    assert made.groups_of is not None
    assert made.groups_of.bincount().tolist() == [32] * 4
    diagonal = gram.diagonal()
    assert diagonal[made.groups_of == 0].min() >= diagonal[made.groups_of == 3].max()
    assert gram_loss(weight - made.dequantize(), gram) < 0.6 * gram_loss(weight - nearest(weight, grid), gram)


@pytest.mark.parametrize("order", ["natural", "activation", "group", "indexed"])
def test_gptq_loses_less_than_plain_rounding(order: str) -> None:
    weight, x = weights(64, 256), inputs(256)
    gram, grid = x.T @ x, Grid(4, 64, True)
    made = one(weight, gram, grid, order, 0.05).dequantize()
    assert gram_loss(weight - made, gram) < 0.7 * gram_loss(weight - nearest(weight, grid), gram)


def test_columns_that_no_token_reached_do_not_stop_gptq() -> None:
    weight, x = weights(16, 64), inputs(64)
    x[:, [3, 40]] = 0
    made = one(weight, x.T @ x, Grid(4, 32, True), "activation", 0.05)
    scales = made.scales.float()
    error = (made.dequantize() - weight)[:, [3, 40]].abs()
    assert (error <= 4.1 * scales[:, [0, 1]].abs()).all()  # a code still, if clipped to a narrow range


def test_a_gram_matrix_of_few_tokens_is_damped_until_it_can_be_factored() -> None:
    x = inputs(128, tokens=3)
    made = one(weights(8, 128), x.T @ x, Grid(4, 64, True), "activation", 1e-9)
    assert torch.isfinite(made.dequantize()).all()


def test_a_group_of_zeros_and_one_of_tiny_weights_stay_finite() -> None:
    weight = weights(4, 64)
    weight[0] = 0
    weight[1] *= 1e-9
    made = one(weight, torch.eye(64), Grid(4, 32, False), "natural", 0.05)
    assert (made.dequantize()[0] == 0).all()
    assert (made.scales != 0).all()


@pytest.mark.parametrize("columns", [96, 640])  # of one block, and of blocks that are not all as wide
def test_the_gram_loss_is_the_squared_error_of_the_outputs(columns: int) -> None:
    weight, x = weights(24, columns), inputs(columns)
    difference = weight - nearest(weight, Grid(3, 32, False))
    direct = apply(x.double(), difference.double()).square().sum().item()
    assert gram_loss(difference, x.T @ x) == pytest.approx(direct, rel=1e-4)


def test_the_scale_found_has_the_least_loss_on_the_activations_themselves() -> None:
    weight, x = weights(64, 128), inputs(128)
    grid, magnitudes = Grid(4, 64, False), x.abs().mean(0)
    with Team(weight.device) as team:
        found = search([weight], [Seen(x.T @ x, magnitudes, len(x))], Group(("w",), "norm", "norm"), grid, team)
    assert found is not None

    def loss(scale: torch.Tensor) -> float:
        return float(apply(x, weight - nearest(weight * scale, grid) / scale).square().sum())

    tried = [magnitudes.pow(n / 20).clamp(min=1e-4) for n in range(20)]
    losses = [loss(s / (s.max() * s.min()).sqrt()) for s in tried]
    assert loss(found) == pytest.approx(min(losses), rel=1e-3)
    assert loss(found) < losses[0]


def test_a_clipped_range_loses_no_more_than_the_whole_one_inside_any_group() -> None:
    weight, x = weights(32, 128), inputs(128)
    grid, gram = Grid(3, 32, False), x.T @ x
    grouped = grid.grouped(weight)

    def losses(scales: torch.Tensor, zeros: torch.Tensor) -> torch.Tensor:
        error = grouped - quantize(grouped, scales[..., None], zeros[..., None], grid.top)[1]
        blocks = [gram[g * 32 : (g + 1) * 32, g * 32 : (g + 1) * 32] for g in range(4)]
        return torch.stack([((error[:, g] @ block) * error[:, g]).sum(1) for g, block in enumerate(blocks)], 1)

    cut, whole = losses(*clipped(weight, gram, grid)), losses(*grid.at(*ends(grouped, grid)))
    assert (cut <= whole * 1.0001).all()
    assert cut.sum() < 0.97 * whole.sum()


SETTINGS: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 64, "pad_token_id": 0,
    "num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32, "norm_topk_prob": False, "attn_implementation": "eager",
}  # fmt: skip
# Kind of model → groups whose scale something takes over, in a layer.
FOLDED = {
    "llama": 4, "mistral": 4, "qwen2": 4, "qwen3": 4, "granite": 4, "smollm3": 4, "stablelm": 4, "gemma": 4,
    "gemma2": 4, "gemma3_text": 4, "phi3": 4, "olmo2": 2, "gpt_neox": 2, "starcoder2": 3, "arcee": 3, "seed_oss": 4,
    "mixtral": 7, "qwen2_moe": 8, "qwen3_moe": 7, "olmoe": 7,
}  # fmt: skip


def tiny(kind: str, **settings: Any) -> tuple[Any, dict[str, torch.Tensor], dict[str, Any]]:
    """A random model, its layer's tensors as checkpoints name them, and its config."""
    torch.manual_seed(1)
    heads = {"num_key_value_heads": 4} if kind == "gpt_neox" else {}
    config = transformers.AutoConfig.for_model(kind, **(SETTINGS | heads | settings))
    model = transformers.AutoModelForCausalLM.from_config(config).eval().float()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    tensors = {n: t.float().clone() for n, t in model.state_dict().items() if ".layers.0." in n}
    return model, tensors, config.to_dict()


def unstacked(tensors: dict[str, torch.Tensor], kind: str) -> dict[str, torch.Tensor]:
    """Experts one by one, as checkpoints hold them."""
    found: dict[str, torch.Tensor] = {}
    gate, up, down, block = ("w1", "w3", "w2", "block_sparse_moe") if kind == "mixtral" else (
        "gate_proj", "up_proj", "down_proj", "mlp")  # fmt: skip
    for name, tensor in tensors.items():
        path = name.replace(".mlp.", f".{block}.")
        if tensor.ndim != 3:
            found[path] = tensor
            continue
        base = path.rpartition(".")[0]
        for number, expert in enumerate(tensor):
            if name.endswith("gate_up_proj"):
                found[f"{base}.{number}.{gate}.weight"], found[f"{base}.{number}.{up}.weight"] = expert.chunk(2)
            else:
                found[f"{base}.{number}.{down}.weight"] = expert
    return found


def restacked(found: dict[str, torch.Tensor], like: dict[str, torch.Tensor], kind: str) -> dict[str, torch.Tensor]:
    gate, up, down, block = ("w1", "w3", "w2", "block_sparse_moe") if kind == "mixtral" else (
        "gate_proj", "up_proj", "down_proj", "mlp")  # fmt: skip
    made = {}
    for name, tensor in like.items():
        path = name.replace(".mlp.", f".{block}.")
        base = path.rpartition(".")[0]
        if tensor.ndim != 3:
            made[name] = found[path]
        elif name.endswith("gate_up_proj"):
            halves = [[found[f"{base}.{n}.{half}.weight"] for half in (gate, up)] for n in range(len(tensor))]
            made[name] = torch.stack([torch.cat(pair) for pair in halves])
        else:
            made[name] = torch.stack([found[f"{base}.{n}.{down}.weight"] for n in range(len(tensor))])
    return made


@pytest.mark.parametrize("kind", FOLDED)
def test_scaling_alone_leaves_the_model_as_it_was(kind: str) -> None:
    model, state, config = tiny(kind)
    ids = torch.randint(1, 64, (2, 12))
    before = model(input_ids=ids).logits
    work = unstacked(state, kind)
    prefix = next(iter(work)).partition(".layers.0.")[0] + ".layers.0."
    shapes = {name: tuple(tensor.shape) for name, tensor in work.items()}
    wanted = [linear.name for linear in linears(prefix.removesuffix("0."), 0, shapes)]
    found = groups(config, prefix, work, wanted)
    assert sorted(name for group in found for name in group.linears) == sorted(wanted)
    scaled = [group for group in found if group.producer is not None]
    for group in scaled:
        scale = torch.logspace(-0.5, 0.5, work[f"{group.linears[0]}.weight"].shape[1])
        if group.repeats != 1:
            heads = scale.view(-1, group.repeats, group.head)
            scale = heads[:, :1].expand_as(heads).reshape(-1)
        fold(work, group, scale, dict.fromkeys(work, torch.float32))
    assert len(scaled) == FOLDED[kind]
    model.load_state_dict(restacked(work, state, kind), strict=False)
    torch.testing.assert_close(model(input_ids=ids).logits, before, rtol=1e-3, atol=1e-3)


def test_a_family_that_is_not_known_is_not_scaled() -> None:
    names = [f"model.layers.0.{n}.weight" for n in ("self_attn.q_proj", "mlp.odd", "mlp.up_proj", "input_layernorm")]
    wanted = [n.removesuffix(".weight") for n in names[:3]]
    found = groups({"model_type": "unheard_of"}, "model.layers.0.", names, wanted)
    assert sorted(n for g in found for n in g.linears) == sorted(wanted)
    assert all(group.producer is None for group in found)


def test_attention_and_feed_forward_that_share_a_norm_are_not_scaled() -> None:
    _, state, config = tiny("stablelm", use_parallel_residual=True)
    wanted = [f"model.layers.0.{n}" for n in ("self_attn.q_proj", "mlp.up_proj")]
    assert all(g.producer is None for g in groups(config, "model.layers.0.", state, wanted))


def test_readers_make_up_for_the_rounding_of_a_norm() -> None:
    torch.manual_seed(3)
    norm, weight, scale = torch.randn(64).bfloat16().float(), weights(8, 64), torch.rand(64) + 0.5
    for kind, plus in (("norm", 0), ("norm+1", 1)):
        work = {"n.weight": norm, "l.weight": weight}
        got = fold(work, Group(("l",), "n", kind), scale, {"n.weight": torch.bfloat16})
        assert torch.equal(work["n.weight"].bfloat16().float(), work["n.weight"])
        torch.testing.assert_close(got, scale, rtol=0.02, atol=0)
        torch.testing.assert_close(work["l.weight"] * (work["n.weight"] + plus), weight * (norm + plus))


def layer(params: Params) -> Solved:
    prefix = "model.layers.0."
    shapes = {"q": (64, 64), "k": (32, 64), "v": (32, 64), "o": (64, 64)}
    tensors = {f"{prefix}self_attn.{n}_proj.weight": weights(*s).bfloat16() for n, s in shapes.items()}
    tensors[f"{prefix}input_layernorm.weight"] = torch.ones(64, dtype=torch.bfloat16)
    x = inputs(64)
    seen = Seen(x.T @ x, x.abs().mean(0), len(x))
    config = {"model_type": "llama", "num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 64}
    wanted = [f"{prefix}self_attn.{n}_proj" for n in shapes]
    return solve(tensors, lambda _: seen, groups(config, prefix, tensors, wanted), params)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("rounding", ["gptq", "nearest"])
def test_weights_whose_scale_is_beyond_float16_are_refused_and_named(rounding: str, symmetric: bool) -> None:
    name, weight = "model.layers.0.mlp.down_proj", weights(8, 64)
    seen, params = Seen(torch.eye(64), torch.ones(64), 64), Params(Grid(4, 32, symmetric), False, rounding)

    def made() -> Solved:
        return solve({f"{name}.weight": weight}, lambda _: seen, [Group((name,), None, "norm")], params)

    weight[3, 40] = 60000 * 7.0  # just within
    assert made().codes[name].dequantize()[3, 40] == pytest.approx(60000 * 7, rel=0.1)
    weight[3, 40] = 3e6  # too large for the narrowest range that is tried
    with pytest.raises(ActionFailed, match=r"weights up to 3e\+06, and .* outside float16") as caught:
        made()
    assert caught.value.place == name


def test_what_scaling_changed_comes_back_in_its_own_type() -> None:
    made = layer(Params(Grid(4, 32, False)))
    assert sorted(made.codes) == [f"model.layers.0.self_attn.{n}_proj" for n in "koqv"]
    assert list(made.tensors) == ["model.layers.0.input_layernorm.weight"]
    assert made.tensors["model.layers.0.input_layernorm.weight"].dtype == torch.bfloat16
    assert not layer(Params(Grid(4, 32, False), scaled=False)).tensors


def test_the_number_of_threads_changes_no_byte_and_rows_need_no_others(monkeypatch: pytest.MonkeyPatch) -> None:
    params, before, made = Params(Grid(4, 32, False)), torch.get_num_threads(), []
    whole = layer(params)
    monkeypatch.setattr("qbuild.quant.layer.STACKED", 0)  # each linear alone, not with those that share its input
    monkeypatch.setattr("qbuild.quant.team.SOLVED_ROWS", 16)
    for threads in (1, 3):
        torch.set_num_threads(threads)
        made.append(layer(params))
        assert torch.get_num_threads() == threads
    torch.set_num_threads(before)
    assert made[0].to_bytes() == made[1].to_bytes()
    for name, codes in whole.codes.items():
        differing = codes.codes != made[0].codes[name].codes
        assert differing.float().mean() < 0.002  # products of other shapes have other last bits


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_results_come_back_from_their_bytes(bits: int) -> None:
    made = layer(Params(Grid(bits, 32, bits != 4)))
    data = made.to_bytes()
    again = Solved.from_bytes(data)
    assert again.to_bytes() == data
    for name, codes in made.codes.items():
        assert torch.equal(again.codes[name].dequantize(), codes.dequantize())


def test_a_column_index_takes_the_place_of_consecutive_groups() -> None:
    codes = torch.tensor([[1, 2, 3, 4]], dtype=torch.uint8)
    scales, zeros = torch.tensor([[1.0, 10.0]]).half(), torch.tensor([[0, 1]], dtype=torch.uint8)
    shuffled = Codes(codes, scales, zeros, 4, 2, False, torch.tensor([0, 1, 0, 1], dtype=torch.int32))
    assert shuffled.dequantize().tolist() == [[1, 10, 3, 30]]
    assert Codes(codes, scales, zeros, 4, 2, False).dequantize().tolist() == [[1, 2, 20, 30]]


def test_clipping_is_not_for_queries_and_keys() -> None:
    made = layer(Params(Grid(3, 32, False), scaled=False, rounding="nearest"))
    grid = Grid(3, 32, False)
    for name, whole in (("q", True), ("v", False)):
        codes = made.codes[f"model.layers.0.self_attn.{name}_proj"]
        weight = weights(*codes.codes.shape).bfloat16().float()
        plain = grid.at(*ends(grid.grouped(weight), grid))[0].half()
        assert torch.equal(codes.scales, plain) is whole


def test_codes_of_a_symmetric_grid_lie_around_the_zero_that_loaders_take() -> None:
    for bits, zero in ((2, 2), (3, 4), (4, 8), (8, 128)):
        assert Grid(bits, 32, True).at(torch.ones(1), -torch.ones(1))[1].tolist() == [zero]
