"""AWQ's scales: columns that carry large activations are scaled up before rounding, and what makes their input is
scaled down, so that the model computes what it did and rounding hurts less where it matters.

Source: Lin et al. 2023, arXiv:2306.00978. The loss of a rounded weight over all calibration tokens is
tr((W-Ŵ) G (W-Ŵ)ᵀ) with the Gram matrix G = XᵀX: the same number as over the activations, for one product.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from qbuild.quant.families import Group
from qbuild.quant.grid import Grid, nearest

__all__ = ["Seen", "gram_loss", "search", "undo"]

EXPONENTS = 20  # tried powers of the mean magnitude: 0, 0.05, …
LEAST = 1e-4


@dataclass(frozen=True)
class Seen:
    """What is known of an input: ``gram`` float32 [in, in] over all tokens, ``magnitudes`` float32 [in], mean |x|."""

    gram: torch.Tensor
    magnitudes: torch.Tensor


def gram_loss(difference: torch.Tensor, gram: torch.Tensor) -> float:
    """tr(D G Dᵀ) of D [out, in]: the squared error of the outputs, summed over outputs and tokens."""
    return float(((difference @ gram) * difference).sum())


def search(weights: Sequence[torch.Tensor], seen: Seen, group: Group, grid: Grid) -> torch.Tensor | None:
    """The scale [in] with the least loss over all linears of a group; None where no scale helps."""
    magnitudes = _shared(seen.magnitudes, group)
    best, found = sum(gram_loss(w - nearest(w, grid), seen.gram) for w in weights), None
    for step in range(1, EXPONENTS):
        scale = magnitudes.pow(step / EXPONENTS).clamp(min=LEAST)
        scale = scale / (scale.max() * scale.min()).sqrt()
        loss = sum(gram_loss(w - nearest(w * scale, grid) / scale, seen.gram) for w in weights)
        if loss < best:
            best, found = loss, scale
    return found


def _shared(magnitudes: torch.Tensor, group: Group) -> torch.Tensor:
    """One value for columns that one row of the producer feeds: with grouped queries, a value head feeds several."""
    if group.repeats == 1:
        return magnitudes
    heads = magnitudes.view(-1, group.repeats, group.head)
    return heads.mean(1, keepdim=True).expand_as(heads).reshape(-1)


def undo(work: dict[str, torch.Tensor], group: Group, scale: torch.Tensor) -> list[str]:
    """Divide what makes the input by ``scale``. Returns the names of the tensors of ``work`` that changed."""
    weight, bias = f"{group.producer}.weight", f"{group.producer}.bias"
    if group.kind == "norm+1":
        work[weight] = (work[weight] + 1) / scale - 1
    elif group.kind == "norm":
        work[weight] = work[weight] / scale
    else:
        if group.repeats != 1:
            scale = scale.view(-1, group.repeats, group.head)[:, 0].reshape(-1)
        work[weight] = work[weight] / scale[:, None]
    if bias not in work:
        return [weight]
    work[bias] = work[bias] / scale
    return [weight, bias]
