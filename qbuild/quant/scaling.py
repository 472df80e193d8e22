"""AWQ's scales: columns that carry large activations are scaled up before rounding, and what makes their input is
scaled down, so that the model computes what it did and rounding hurts less where it matters.

Source: Lin et al. 2023, arXiv:2306.00978. The loss of a rounded weight over all calibration tokens is
tr((W-Ŵ) G (W-Ŵ)ᵀ) with the Gram matrix G = XᵀX: the same number as over the activations, for one product.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from qbuild.calibration.extent import TRIED_ROWS
from qbuild.quant.families import Group
from qbuild.quant.grid import Grid, nearest
from qbuild.quant.team import Team, split

__all__ = ["Seen", "fold", "gram_loss", "search"]

EXPONENTS = 20  # powers of the mean magnitude to choose from: 0, 0.05, …
STRIDES = 4, 2, 1  # between those that are tried, first of all, then around the best
LEAST = 1e-4
BLOCK, BLOCKS = 256, 16  # columns of a product in a loss, and how many there are at most


@dataclass(frozen=True)
class Seen:
    """What is known of an input: ``gram`` float32 [in, in] over all tokens, ``magnitudes`` float32 [in], mean |x|, and
    how many tokens there were; ``drift`` float32 [in, in] is Xᵀ(X' − X) where X' is what the source reads there."""

    gram: torch.Tensor
    magnitudes: torch.Tensor
    count: int
    drift: torch.Tensor | None = None


def gram_loss(difference: torch.Tensor, gram: torch.Tensor) -> float:
    """tr(D G Dᵀ) of D [out, in]: the squared error of the outputs, summed over outputs and tokens.

    G [in, in] is symmetric: its blocks below the diagonal count twice, and those above need no product.
    """
    columns = len(gram)
    size = max(BLOCK, -(-columns // BLOCKS))
    lost = []
    for start in range(0, columns, size):
        own = slice(start, start + size)
        outputs = difference[:, own] @ gram[own, own]
        if start + size < columns:
            outputs.addmm_(difference[:, start + size :], gram[start + size :, own], alpha=2)
        lost.append(outputs.mul_(difference[:, own]).sum())
    return float(sum(lost))


def search(
    weights: Sequence[torch.Tensor], seen: Sequence[Seen], group: Group, grid: Grid, team: Team
) -> torch.Tensor | None:
    """The scale [in] with the least loss over all linears of a group; None where no scale helps.

    ``seen``: the input of each; experts read one input's tokens in parts.
    """
    tokens = sum(one.count for one in seen)
    magnitudes = _shared(sum((one.magnitudes * (one.count / tokens) for one in seen), torch.tensor(0.0)), group)
    some = [weight[:: -(-len(weight) // TRIED_ROWS)] for weight in weights]

    def lost(some: torch.Tensor, gram: torch.Tensor, scale: torch.Tensor) -> float:
        return sum(gram_loss(rows - nearest(rows * scale, grid) / scale, gram) for rows in split(some))

    def loss(scale: torch.Tensor) -> float:
        tried = zip(weights, some, seen, strict=True)
        return sum(lost(few, one.gram, scale) * len(weight) / len(few) for weight, few, one in tried)

    def scale(step: int) -> torch.Tensor:
        if not step:
            return torch.ones_like(magnitudes)
        power = magnitudes.pow(step / EXPONENTS).clamp(min=LEAST)
        return power / (power.max() * power.min()).sqrt()

    with _tensor_cores():
        best = _least(lambda steps: team.map(loss, map(scale, steps)))
    return scale(best) if best else None


def _least(losses: Callable[[Sequence[int]], Sequence[float]]) -> int:
    """The exponent's number with the least loss: of a coarse choice, then of the best one's neighbours."""
    known: dict[int, float] = {}
    best = 0
    for stride in STRIDES:
        tried = range(0, EXPONENTS, stride) if not known else (best - stride, best + stride)
        fresh = [step for step in tried if 0 <= step < EXPONENTS and step not in known]
        known |= zip(fresh, losses(fresh), strict=True)
        best = min(known, key=lambda step: (known[step], step))
    return best


@contextmanager
def _tensor_cores() -> Iterator[None]:
    """Products of a device with mantissas of 10 bits: sums of many squares that are compared need no more."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def _shared(magnitudes: torch.Tensor, group: Group) -> torch.Tensor:
    """One value for columns that one row of the producer feeds: with grouped queries, a value head feeds several."""
    if group.repeats == 1:
        return magnitudes
    heads = magnitudes.view(-1, group.repeats, group.head)
    return heads.mean(1, keepdim=True).expand_as(heads).reshape(-1)


def fold(
    work: dict[str, torch.Tensor], group: Group, scale: torch.Tensor, dtypes: Mapping[str, torch.dtype]
) -> torch.Tensor:
    """Multiply the columns of all that reads an input by ``scale`` [in], and divide what makes it, in ``work``.

    A norm's weights are rounded to their dtype first, and the readers make up for it: the scale that they got, which is
    returned, differs by that rounding.
    """
    weight, bias = f"{group.producer}.weight", f"{group.producer}.bias"
    if group.kind == "linear":
        own = scale if group.repeats == 1 else scale.view(-1, group.repeats, group.head)[:, 0].reshape(-1)
        divisor = torch.ones(len(work[weight]), device=scale.device)
        divisor[group.rows : group.rows + len(own)] = own
        work[weight] = work[weight] / divisor[:, None]
    else:
        plus = 1 if group.kind == "norm+1" else 0
        before = work[weight] + plus
        work[weight] = (before / scale - plus).to(dtypes[weight]).float()
        after = work[weight] + plus
        divisor = scale = torch.where((before != 0) & (after != 0), before / after, scale)
    if bias in work:
        work[bias] = work[bias] / divisor
    for name in (*group.linears, *group.also):
        work[f"{name}.weight"] = work[f"{name}.weight"] * scale
    return scale
