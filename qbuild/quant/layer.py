"""A decoder layer → codes: AWQ's scales where something can take them over, then rounding, plain or GPTQ's.

Both methods live on one statistic, so they go together: scaled weights rounded by GPTQ lose less than either alone, in
the same files (measured: docs/quality.md).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from qbuild.calibration.shapes import STACKED
from qbuild.errors import ActionFailed
from qbuild.heap import trim
from qbuild.quant.codes import Codes, Solved
from qbuild.quant.families import Group
from qbuild.quant.gptq import curvature, rounded, toward
from qbuild.quant.grid import Grid, clipped, ends, quantize
from qbuild.quant.scaling import Seen, fold, search
from qbuild.quant.team import Team, split

__all__ = ["Params", "solve"]

# Queries and keys meet in a softmax: clipping them hurts more than their own loss says (Lin et al.).
UNCLIPPED = ("q_proj", "k_proj", "qkv_proj", "query_key_value")


@dataclass(frozen=True)
class Params:
    """``scaled``: search AWQ's scales first. ``rounding``: gptq, or nearest with clipped ranges. ``order`` and
    ``damping`` are gptq's."""

    grid: Grid
    scaled: bool = True
    rounding: str = "gptq"
    order: str = "activation"
    damping: float = 0.05


@torch.no_grad()  # type: ignore[untyped-decorator]  # torch is not looked into
def solve(
    tensors: Mapping[str, torch.Tensor], seen: Callable[[str], Seen | None], groups: Sequence[Group], params: Params
) -> Solved:
    """Quantize the linears of ``groups``. ``tensors``: the layer's weights and biases by checkpoint name, any float
    dtype; ``seen`` gives what is known of a linear's input, None of an expert that no token reached. What scaling
    changed besides comes back in its dtype.
    """
    with Team(next(iter(tensors.values())).device) as team:
        return _solve(tensors, seen, groups, params, team)


def _solve(
    tensors: Mapping[str, torch.Tensor],
    seen: Callable[[str], Seen | None],
    groups: Sequence[Group],
    params: Params,
    team: Team,
) -> Solved:
    work = {name: tensor.float() for name, tensor in tensors.items()}
    for name in (name for group in groups for name in group.linears):
        known = seen(name)
        if known is not None and known.drift is not None:
            work[f"{name}.weight"] = toward(work[f"{name}.weight"], known.gram, known.drift, params.damping)
    scales = _scaled(work, tensors, seen, groups, params.grid, team) if params.scaled else {}
    trim()  # what threads have freed stays with them, and what follows is this one's
    codes: dict[str, Codes] = {}
    for group in groups:
        codes |= _coded(group, work, seen, scales.get(group.linears[0]), params, team)
    plain = sorted(name for name in tensors if name.removesuffix(".weight") not in codes)
    changed = [name for name in plain if not torch.equal(work[name], tensors[name].float())]
    return Solved(codes, {name: work[name].to(tensors[name].dtype) for name in changed})


def _scaled(
    work: dict[str, torch.Tensor],
    tensors: Mapping[str, torch.Tensor],
    seen: Callable[[str], Seen | None],
    groups: Sequence[Group],
    grid: Grid,
    team: Team,
) -> dict[str, torch.Tensor]:
    """Scale weights in ``work``; returns the scale of each linear's columns that has one."""
    scales: dict[str, torch.Tensor] = {}  # the same of all linears of a group
    dtypes = {name: tensor.dtype for name, tensor in tensors.items()}
    for group in groups:
        scale = _best_scale(group, work, seen, grid, team)
        if scale is not None:
            scales |= dict.fromkeys(group.linears, fold(work, group, scale, dtypes))
    return scales


def _best_scale(
    group: Group, work: Mapping[str, torch.Tensor], seen: Callable[[str], Seen | None], grid: Grid, team: Team
) -> torch.Tensor | None:
    known = [(work[f"{name}.weight"], found) for name in group.linears if (found := seen(name)) is not None]
    if group.producer is None or not known:
        return None
    weights, inputs = zip(*known, strict=True)
    return search(weights, inputs, group, grid, team)


def _coded(
    group: Group,
    work: Mapping[str, torch.Tensor],
    seen: Callable[[str], Seen | None],
    scale: torch.Tensor | None,
    params: Params,
    team: Team,
) -> dict[str, Codes]:
    """The linears of a group, whose columns were scaled by ``scale``. What their input's Gram matrix costs is paid once
    for those that share it."""
    codes: dict[str, Codes] = {}
    of: Seen | None = None
    how: Callable[[torch.Tensor, str], Codes] | None = None
    gptq = params.rounding == "gptq"  # plain rounding clips each linear in its own way
    for names in _stacks(group.linears, work, seen) if gptq else zip(group.linears):
        weights, known = [work[f"{name}.weight"] for name in names], seen(names[0])
        if how is None or known is None or known is not of:
            how, of = _way(weights[0], known, scale, params, team), known
        made = how(torch.cat(weights) if len(weights) > 1 else weights[0], names[0])
        parts = made.split([len(weight) for weight in weights])
        for name, weight, part in zip(names, weights, parts, strict=True):
            codes[name] = _held(name, weight, part)
    return codes


def _held(name: str, weight: torch.Tensor, made: Codes) -> Codes:
    """Codes whose scales float16 can hold. Raises ActionFailed."""
    if made.scales.isfinite().all() and made.scales.all():
        return made
    fact = f"has weights up to {weight.abs().max().item():g}, and a group's scale is outside float16's range"
    raise ActionFailed(name, fact, "choose a file that holds them as they are: target=gguf/bf16")


def _stacks(
    linears: Sequence[str], work: Mapping[str, torch.Tensor], seen: Callable[[str], Seen | None]
) -> list[tuple[str, ...]]:
    """Linears of one input that are rounded as one matrix, where all are small: each of thousands of operations on a
    column takes microseconds whatever its rows."""
    stacks: list[tuple[str, ...]] = []
    of, weights = None, 0
    for name in linears:
        known, size = seen(name), work[f"{name}.weight"].numel()
        if known is not None and known is of and weights + size <= STACKED:
            stacks[-1] += (name,)
            weights += size
        else:
            stacks.append((name,))
            of, weights = known, size
    return stacks


def _way(
    weight: torch.Tensor, known: Seen | None, scale: torch.Tensor | None, params: Params, team: Team
) -> Callable[[torch.Tensor, str], Codes]:
    """How linears of the input of ``weight`` are rounded: weight and name → codes."""
    gram = torch.eye(weight.shape[1], device=weight.device) if known is None else known.gram
    if scale is not None:
        gram = gram / scale[:, None] / scale
    grid = params.grid
    if params.rounding == "gptq":
        bent = curvature(gram, grid.size(weight.shape[1]), params.order, params.damping)
        return lambda one, _name: rounded(one, bent, grid, team)
    return lambda one, name: _nearest(one, gram, grid, team, clip=not name.endswith(UNCLIPPED))


def _nearest(weight: torch.Tensor, gram: torch.Tensor, grid: Grid, team: Team, *, clip: bool) -> Codes:
    def plain(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        grouped = grid.grouped(rows)
        scales, zeros = clipped(rows, gram, grid) if clip else grid.at(*ends(grouped, grid))
        codes, _ = quantize(grouped, scales[..., None], zeros[..., None], grid.top)
        return codes.view_as(rows).to(torch.uint8), scales.half(), zeros.to(torch.uint8)

    codes, scales, zeros = (torch.cat(part) for part in zip(*team.map(plain, split(weight)), strict=True))
    return Codes(codes, scales, zeros, grid.bits, grid.size(weight.shape[1]), grid.symmetric)
