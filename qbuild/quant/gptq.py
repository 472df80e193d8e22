"""GPTQ: columns are rounded one after the other, and what each rounding loses is made good in those that follow; then
codes and scales are improved in turns until little is left to win.

Source: Frantar et al. 2022, arXiv:2210.17323. The Hessian of a linear's loss is 2XᵀX, so the Gram matrix is all of the
calibration that it needs. Columns go by falling diagonal of it ("activation"): those that matter most are rounded while
there are many left to make good. Groups stay where they are and their grids are fitted before, so that a file needs no
index of groups.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from importlib import import_module
from typing import Any

import torch

from qbuild.calibration.extent import SWEEPS
from qbuild.errors import ActionFailed
from qbuild.quant.codes import Codes
from qbuild.quant.grid import Grid
from qbuild.quant.team import Team, split

__all__ = ["ORDERS", "Curvature", "curvature", "gptq", "rounded", "toward"]

ORDERS = ("natural", "activation", "group", "indexed")
SHARE = 0.5  # of what was lost before a linear that it makes good: see ``toward``
BLOCK = 128  # columns between two updates of all that follow
UNFIT = "the Gram matrix cannot be factored", "use more calibration samples, or more damping"
RETRIES = 9  # with ten times the damping each, where the Gram matrix is not positive definite


@dataclass(frozen=True)
class Curvature:
    """What rounding needs to know of an input, float32.

    ``hessian`` [in, in]: the Gram matrix, its diagonal 1 in the mean before damping. ``columns`` int64 [in]: the order
    of rounding. ``factor`` [in, in]: upper triangular U with UᵀU the inverse of the Hessian in that order.
    """

    hessian: torch.Tensor
    columns: torch.Tensor
    factor: torch.Tensor


def curvature(gram: torch.Tensor, size: int, order: str, damping: float) -> Curvature:
    """Of inputs with ``gram`` float32 [in, in] (XᵀX, any scale) and groups of ``size`` columns.

    ``order``: natural, activation, or group (whole groups by their mean diagonal, columns inside likewise).
    ``damping`` is added to the diagonal, as a share of its mean. Raises ActionFailed when the Gram matrix cannot be
    factored, however damped.
    """
    hessian = gram / gram.diagonal().mean().clamp(min=1e-30)
    diagonal = hessian.diagonal()
    diagonal[diagonal == 0] = 1
    columns, plain = _order(diagonal, size, order), diagonal.clone()
    for _ in range(RETRIES):
        diagonal.copy_(plain + damping * plain.mean())
        factor = _factored(hessian, columns)
        if factor is not None:
            return Curvature(hessian, columns, factor)
        damping *= 10
    raise ActionFailed("gptq", *UNFIT)


def _factored(hessian: torch.Tensor, columns: torch.Tensor) -> torch.Tensor | None:
    """The factor of ``Curvature``; None where the matrix is not positive definite."""
    lower, failed = torch.linalg.cholesky_ex(hessian.index_select(0, columns).index_select(1, columns))
    if failed:
        return None
    factor, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
    return None if failed else factor


def gptq(
    weight: torch.Tensor, gram: torch.Tensor, grid: Grid, order: str, damping: float, team: Team, sweeps: int = SWEEPS
) -> Codes:
    """Codes of ``weight`` float32 [out, in] for inputs with ``gram``; see ``curvature``, and ``_descend`` for sweeps.

    ``order`` may also be indexed: columns are sorted by their diagonal and groups are made of what is adjacent then
    (desc_act), which needs the index of groups in files.
    """
    if order == "indexed":
        columns = _order(gram.diagonal(), grid.size(weight.shape[1]), "activation")
        sorted_gram = gram[columns[:, None], columns]
        return _scattered(gptq(weight[:, columns], sorted_gram, grid, "natural", damping, team, sweeps), columns)
    return rounded(weight, curvature(gram, grid.size(weight.shape[1]), order, damping), grid, team, sweeps)


def rounded(weight: torch.Tensor, seen: Curvature, grid: Grid, team: Team, sweeps: int = SWEEPS) -> Codes:
    """As ``gptq``, of an input whose curvature is known: linears that read one input share it."""
    size = grid.size(weight.shape[1])

    def solved(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        codes, scales, zeros = _solved(rows, seen, grid, size, sweeps)
        return codes.to(torch.uint8), scales.half(), zeros.to(torch.uint8)

    codes, scales, zeros = (torch.cat(part) for part in zip(*team.map(solved, split(weight)), strict=True))
    return Codes(codes, scales, zeros, grid.bits, size, grid.symmetric)


def toward(weight: torch.Tensor, gram: torch.Tensor, drift: torch.Tensor, damping: float) -> torch.Tensor:
    """``weight`` W float32 [out, in] moved toward the Ŵ that gives for inputs X what W gives for X': the least of
    ‖X Ŵᵀ − X' Wᵀ‖² + λ‖Ŵ − W‖².

    ``gram`` XᵀX and ``drift`` Xᵀ(X' − X), float32 [in, in]; λ is ``damping`` times the mean diagonal of ``gram``. It
    goes half the way: all linears of a layer are measured before any is moved, so the later ones would make good what
    the earlier ones have made good already. Raises ActionFailed as ``curvature`` does.
    """
    diagonal = gram.diagonal().mean().clamp(min=1e-30)
    for _ in range(RETRIES):
        lower, failed = torch.linalg.cholesky_ex(gram + damping * diagonal * torch.eye(len(gram), device=gram.device))
        if not failed:
            return weight + SHARE * torch.cholesky_solve(drift @ weight.T, lower).T
        damping *= 10
    raise ActionFailed("gptq", *UNFIT)


def _scattered(made: Codes, columns: torch.Tensor) -> Codes:
    """Columns in their own places again, each with the number of its group."""
    codes = torch.empty_like(made.codes)
    codes[:, columns] = made.codes
    groups_of = torch.empty(len(columns), dtype=torch.int32, device=columns.device)
    groups_of[columns] = made.columns_group.to(groups_of)
    return replace(made, codes=codes, groups_of=groups_of)


def _solved(
    weight: torch.Tensor, seen: Curvature, grid: Grid, size: int, sweeps: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes [out, in], scales and zeros [out, groups], float32."""
    loops = _loops(weight.device)
    columns, order = loops.laid_out(weight), seen.columns
    scales, zeros = loops.fit(columns, seen.hessian.diagonal(), grid)
    codes = torch.empty_like(columns)
    codes[order] = _round(columns[order], seen.factor, scales, zeros, order // size, grid.top, loops)
    _descend(columns, seen.hessian, codes, scales, zeros, grid.top, sweeps, loops)
    codes, scales, zeros = (made.T[: len(weight)] for made in (codes, scales, zeros))
    return codes, scales, zeros


def _order(diagonal: torch.Tensor, size: int, order: str) -> torch.Tensor:
    """The columns in the order of rounding."""
    if order == "natural":
        return torch.arange(len(diagonal), device=diagonal.device)
    if order == "activation":
        return torch.argsort(diagonal, descending=True, stable=True)
    blocks = diagonal.view(-1, size)
    inside = torch.argsort(blocks, dim=1, descending=True, stable=True)
    which = torch.argsort(blocks.mean(1), descending=True, stable=True)
    return (which[:, None] * size + inside[which]).reshape(-1)


def _round(
    columns: torch.Tensor,
    factor: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor,
    groups: torch.Tensor,
    top: int,
    loops: Any,
) -> torch.Tensor:
    """Codes, float32 [in, width], of ``columns`` in the order of rounding, which are used up. ``groups`` int64 [in]:
    which row of ``scales`` and ``zeros`` [groups, width] each takes."""
    codes = torch.empty_like(columns)
    for start in range(0, len(columns), BLOCK):
        own = slice(start, start + BLOCK)
        codes[own], errors = loops.round_block(columns[own], factor[own, own], scales, zeros, groups[own], top)
        columns[own.stop :].addmm_(factor[own, own.stop :].T, errors, alpha=-1)
    return codes


def _loops(device: torch.device) -> Any:
    """The loops over columns: each kind of device has its own, and loads what compiles them when it is used."""
    return import_module(f"qbuild.quant.{'triton_columns' if device.type == 'cuda' else 'columns'}")


def _descend(
    columns: torch.Tensor,
    hessian: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor,
    top: int,
    sweeps: int,
    loops: Any,
) -> None:
    """Coordinate descent on the loss tr((W-Ŵ) H (W-Ŵ)ᵀ): each column in turn takes the code that is best while all
    others stay, then each group the scale; ``sweeps`` times. No step makes the loss of a row larger.

    ``columns`` and ``codes`` [in, width], ``scales`` and ``zeros`` [groups, width], all float32; groups are of adjacent
    columns. Codes and scales are changed in place.
    """
    size = len(codes) // len(scales)
    errors = (codes.view(len(scales), size, -1) - zeros[:, None]).mul_(scales[:, None]).view_as(codes).sub_(columns)
    for _ in range(sweeps):
        for group, (scale, zero) in enumerate(zip(scales, zeros, strict=True)):
            own = slice(group * size, (group + 1) * size)
            slope = hessian[own] @ errors  # half the gradient of the loss
            loops.improve(codes[own], errors[own], slope, columns[own], hessian[own, own], scale, zero, top)
