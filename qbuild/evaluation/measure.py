"""Numbers of two models' logits on the same text."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

import torch

from qbuild.errors import InputError
from qbuild.evaluation.footprint import EXACT_ROWS

__all__ = ["Comparison", "Result"]


@dataclass(frozen=True)
class Result:
    """A model on a text.

    ``perplexity``: of every token that has one before it in its window, as transformers' loss counts them.
    ``perplexity_llama``: of the second half of each window, as llama.cpp's llama-perplexity counts them.
    ``kl``: the mean over all positions of the Kullback-Leibler divergence D(source ‖ model), in nats.
    ``top1``: the share of positions where both models find the same token the likeliest.
    ``tokens``: positions. ``source_…``: the same of the source.
    """

    perplexity: float
    perplexity_llama: float
    source_perplexity: float
    source_perplexity_llama: float
    kl: float
    top1: float
    tokens: int

    def to_json(self) -> dict[str, float | int]:
        return asdict(self)


class Comparison:
    """Sums over positions, in float64. Windows are given one after another, each in parts of any size."""

    def __init__(self, length: int) -> None:
        self.length = length  # tokens of a window
        self._kl = 0.0
        self._model, self._source = _Loss(), _Loss()
        self._same = self._positions = 0

    def add(self, source: torch.Tensor, model: torch.Tensor, window: torch.Tensor, start: int) -> None:
        """Logits [positions, vocabulary] of both at the positions of ``window`` (int64 [length]) from ``start``.

        Raises InputError where a logit is NaN or infinite.
        """
        for at in range(0, len(model), EXACT_ROWS):
            p = source[at : at + EXACT_ROWS].double().log_softmax(-1)
            q = model[at : at + EXACT_ROWS].double().log_softmax(-1)
            self._add(p, q, window, start + at)

    def _add(self, p: torch.Tensor, q: torch.Tensor, window: torch.Tensor, start: int) -> None:
        divergence = float((p.exp() * (p - q)).sum())
        following = window[start + 1 : start + 1 + len(q)].to(q.device)
        late = max(0, self.length // 2 - start)  # the first row that llama-perplexity counts
        for loss, found in ((self._model, q), (self._source, p)):
            loss.add(-found[: len(following)].gather(-1, following[:, None])[:, 0], late)
        if not all(map(math.isfinite, (divergence, self._model.all, self._source.all))):
            fact = f"a logit is NaN or infinite among the positions {start} to {start + len(q) - 1} of a window"
            raise InputError("evaluation", fact, "the weights are damaged, or their values overflow: build them again")
        self._kl += divergence
        self._same += int((p.argmax(-1) == q.argmax(-1)).sum())
        self._positions += len(q)

    def result(self) -> Result:
        return Result(
            *self._model.perplexities,
            *self._source.perplexities,
            self._kl / self._positions,
            self._same / self._positions,
            self._positions,
        )


class _Loss:
    """Sums of what a model gave the tokens that came: of all, and of those that llama-perplexity counts."""

    def __init__(self) -> None:
        self.all = self.late = 0.0
        self.count = self.late_count = 0

    def add(self, nll: torch.Tensor, late: int) -> None:
        """Negative log-likelihoods [positions]; the late ones begin at row ``late``."""
        self.all += float(nll.sum())
        self.late += float(nll[late:].sum())
        self.count += len(nll)
        self.late_count += max(0, len(nll) - late)

    @property
    def perplexities(self) -> tuple[float, float]:
        return math.exp(self.all / self.count), math.exp(self.late / self.late_count)
