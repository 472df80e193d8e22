"""Scale and zero of a group of weights. Scales are rounded to float16, which is what files hold, before codes are
chosen."""

from __future__ import annotations

from dataclasses import dataclass

import torch

__all__ = ["SHARES", "TINY", "Grid", "clipped", "ends", "fit", "nearest", "quantize"]

TINY = 2.0**-24  # the least positive float16
SHARES = tuple(1.07 - (1.07 - 0.4) * step / 15 for step in range(16))  # of a whole range, that are tried
CACHED = 1 << 18  # weights
CLIPS, CLIP_STEP = 10, 0.05


@dataclass(frozen=True)
class Grid:
    """``group_size`` columns share a scale; -1: all of a row."""

    bits: int
    group_size: int
    symmetric: bool

    @property
    def top(self) -> int:
        """The largest code."""
        return int(2**self.bits - 1)

    def size(self, columns: int) -> int:
        """Columns of a group in a weight of so many."""
        return columns if self.group_size == -1 else self.group_size

    def grouped(self, weight: torch.Tensor) -> torch.Tensor:
        """[out, groups, columns of a group]."""
        return weight.view(weight.shape[0], -1, self.size(weight.shape[1]))

    def at(self, high: torch.Tensor, low: torch.Tensor, share: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
        """Scale and zero, float32, of what ``ends`` gave, taken ``share`` as wide."""
        scale = ((high - low) * share / self.top).half().float()
        scale = torch.where(scale.abs() < TINY, TINY, scale)
        if self.symmetric:
            return scale, torch.full_like(scale, (self.top + 1) // 2)
        return scale, (-low * share / scale).round().clamp(0, self.top)


def ends(grouped: torch.Tensor, grid: Grid) -> tuple[torch.Tensor, torch.Tensor]:
    """The range of each group, [out, groups]: its largest and smallest weight and 0.

    If symmetric, the weight of the largest size comes last and its negative first: there is one code more below the
    middle, and where that weight is positive, a negative scale turns the grid around.
    """
    high, low = grouped.amax(-1).clamp(min=0), grouped.amin(-1).clamp(max=0)
    if not grid.symmetric:
        return high, low
    largest = torch.where(high > -low, high, low)
    return -largest, largest


def quantize(
    weights: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor, top: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and the values they stand for, both float32, in the shape of ``weights``; the others broadcast."""
    codes = (weights / scales).round_().add_(zeros).clamp_(0, top)
    return codes, (codes - zeros) * scales


def nearest(weight: torch.Tensor, grid: Grid) -> torch.Tensor:
    """The values [out, in] of plain rounding."""
    grouped = grid.grouped(weight)
    scale, zero = grid.at(*ends(grouped, grid))
    return quantize(grouped, scale[..., None], zero[..., None], grid.top)[1].view_as(weight)


def fit(weight: torch.Tensor, cost: torch.Tensor, grid: Grid) -> tuple[torch.Tensor, torch.Tensor]:
    """Scales and zeros, float32 [out, groups]: of ever narrower ranges the one with the least weighted squared error.

    ``cost`` [in]: what an error in a column costs. With a zero point, its neighbours are tried too.
    """
    parts = [_fit(grid.grouped(rows), grid.grouped(cost[None]), grid) for rows in weight.split(_rows(weight))]
    scales, zeros = zip(*parts, strict=True)
    return torch.cat(scales), torch.cat(zeros)


def _rows(weight: torch.Tensor) -> int:
    """So many rows stay in a processor's cache while they are tried again and again."""
    return max(1, CACHED // weight.shape[1]) if weight.device.type == "cpu" else len(weight)


def _fit(grouped: torch.Tensor, cost: torch.Tensor, grid: Grid) -> tuple[torch.Tensor, torch.Tensor]:
    high, low = ends(grouped, grid)
    best = torch.full_like(high, float("inf"))
    scales, zeros = torch.zeros_like(high), torch.zeros_like(high)  # where no range has a finite loss

    def attempt(scale: torch.Tensor, zero: torch.Tensor) -> None:
        values = quantize(grouped, scale[..., None], zero[..., None], grid.top)[1]
        error = values.sub_(grouped).square_().mul_(cost).sum(-1)
        better = error < best
        for kept, tried in ((best, error), (scales, scale), (zeros, zero)):
            torch.where(better, tried, kept, out=kept)

    for share in SHARES:
        attempt(*grid.at(high, low, share))
    if not grid.symmetric:
        found = scales.clone(), zeros.clone()
        for step in (-1, 1):
            attempt(found[0], (found[1] + step).clamp(0, grid.top))
    return scales, zeros


def clipped(weight: torch.Tensor, gram: torch.Tensor, grid: Grid) -> tuple[torch.Tensor, torch.Tensor]:
    """Scales and zeros, float32 [out, groups]: of ranges cut on both sides the one with the least loss inside the
    group, which the blocks of the Gram matrix on its diagonal tell (AWQ's clipping)."""
    grouped = grid.grouped(weight)
    _, count, size = grouped.shape
    blocks = torch.stack([gram[g * size : (g + 1) * size, g * size : (g + 1) * size] for g in range(count)])
    widest, (high, low) = grouped.abs().amax(-1), ends(grouped, grid)
    best = torch.full_like(high, float("inf"))
    scales, zeros = torch.zeros_like(high), torch.zeros_like(high)  # where no range has a finite loss
    for step in range(CLIPS):
        limit = widest * (1 - CLIP_STEP * step)
        scale, zero = grid.at(high.clamp(-limit, limit), low.clamp(-limit, limit))
        error = grouped - quantize(grouped, scale[..., None], zero[..., None], grid.top)[1]
        loss = (torch.einsum("ogi,gij->ogj", error, blocks) * error).sum(-1)
        better = loss < best
        best = torch.where(better, loss, best)
        scales, zeros = torch.where(better, scale, scales), torch.where(better, zero, zeros)
    return scales, zeros
