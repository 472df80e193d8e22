"""The compiled loops over columns against plain ones: rows that do not fill a vector, both kinds of grids."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from qbuild.quant import columns
from qbuild.quant.grid import Grid, fit, quantize


def scene(size: int, rows: int, top: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """W [size, rows] of one group, its Hessian, scales and zeros."""
    torch.manual_seed(size + rows)
    x = torch.randn(300, size) * torch.logspace(-0.5, 0.5, size)
    return (
        torch.randn(size, rows) * 0.3, x.T @ x / 300 + 0.05 * torch.eye(size),
        (torch.rand(rows) * 0.1 + 0.05).half().float(), torch.randint(0, top, (rows,)).float(),
    )  # fmt: skip


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("bits", "rows"), [(2, 3), (4, 70), (8, 64)])
def test_the_grid_of_a_group_is_the_one_that_plain_trial_finds(bits: int, rows: int, symmetric: bool) -> None:
    torch.manual_seed(rows)
    weight, cost, grid = torch.randn(rows, 96) * 0.1, torch.rand(96) + 0.1, Grid(bits, 32, symmetric)
    weight[0, :32], weight[-1, 32:64] = 0, 1e-9  # no range, and one below the least float16

    def lost(scales: torch.Tensor, zeros: torch.Tensor) -> torch.Tensor:
        values = quantize(grid.grouped(weight), scales[..., None], zeros[..., None], grid.top)[1]
        return (grid.grouped(cost[None]) * (values - grid.grouped(weight)).square()).sum(-1)

    wanted, found = fit(weight, cost, grid), columns.fit(columns.laid_out(weight), cost, grid)
    ours = tuple(part.T[:rows] for part in found)
    torch.testing.assert_close(lost(*ours), lost(*wanted), rtol=1e-5, atol=1e-12)
    same = [(a == b).float().mean() for a, b in zip(ours, wanted, strict=True)]
    assert min(same) > 0.99  # two ranges may lose the same but for the last bit


def plainly(
    codes: np.ndarray, slope: np.ndarray, own: np.ndarray, scale: np.ndarray, zero: np.ndarray, top: int
) -> tuple[np.ndarray, np.ndarray]:
    """Codes and the unrounded best scale after one turn, in float64: by the loss's own definition."""
    codes, before = codes.copy(), (codes - zero) * scale
    for at in range(len(codes)):
        now = slope[at] + own[at] @ ((codes - zero) * scale - before)
        best = (codes[at] - zero) * scale - now / own[at, at]
        codes[at] = np.clip(np.round(best / scale) + zero, 0, top)
    steps = codes - zero
    now = slope + own @ (steps * scale - before)
    return codes, scale - (now * steps).sum(0) / ((own @ steps) * steps).sum(0)


@pytest.mark.parametrize(("size", "rows"), [(64, 70), (24, 7), (1, 1)])
def test_a_turn_of_descent_takes_the_best_code_of_each_column_then_the_best_scale(size: int, rows: int) -> None:
    weight, own, scale, zero = scene(size, rows, 15)
    width = columns.laid_out(weight.T).shape[1]

    def filled(part: torch.Tensor, value: float = 1.0) -> torch.Tensor:
        return torch.nn.functional.pad(part, (0, width - rows), value=value)

    codes = (weight / scale + zero).round().clamp(0, 15)
    errors = (codes - zero) * scale - weight
    slope = own @ errors + 0.1 * torch.randn(size, rows)  # what other groups have lost
    given = [part.double().numpy() for part in (codes, slope, own, scale, zero)]
    wanted, best = plainly(*given, 15)
    mine, lost, fitted = filled(codes), filled(errors), filled(scale)
    columns.improve(mine, lost, filled(slope), filled(weight), own, fitted, filled(zero), 15)
    mine, lost, fitted = mine[:, :rows], lost[:, :rows], fitted[:rows]
    assert (mine.numpy() != codes.numpy()).mean() > 0.1 or size == 1  # there was something to do
    assert (mine.numpy() != wanted).mean() < 0.002
    assert torch.equal(fitted, fitted.half().float())
    share = best / scale.numpy()
    kept = (share < 0.5) | (share > 2)
    rest = (np.abs(fitted.numpy() - best) < 1e-3 * np.abs(best)) | (mine.numpy() != wanted).any(0)
    assert np.where(kept, fitted.numpy() == scale.numpy(), rest).all()
    torch.testing.assert_close(lost, (mine - zero) * fitted - weight, rtol=0, atol=1e-6)
