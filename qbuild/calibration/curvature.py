"""What an error of a weight costs where the model ends, in the nats by which its answers differ from the source's.

To second order in the errors, KL(source ‖ quantized) is ½ Σ ΔWᵢⱼ² E[gᵢ²] E[xⱼ²] over the weights of every linear, where
x is what the linear reads and g the gradient by what it gives of the log-likelihood of tokens drawn from the model
itself: the diagonal of the Fisher information, with inputs and gradients taken as independent (Martens and Grosse 2015,
arXiv:1503.05671). So it is one number for errors anywhere in the model, which errors of a layer's outputs are not.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

__all__ = ["Curvature", "Term"]


@dataclass(frozen=True)
class Term:
    """One use of a tensor: an error ΔW of row i and column j costs ½ ΔW² rows[i] cols[m, j] nats a token.

    float32: ``rows`` [matrices * outputs], ``cols`` [matrices, inputs], m the matrix that row i is of. A tensor that is
    no stack of experts is one matrix. Of an expert that no token reached all is 0.
    """

    rows: np.ndarray
    cols: np.ndarray


@dataclass(frozen=True)
class Curvature:
    """By the checkpoint's tensor names without ``.weight``. An embedding that is the head too has two terms."""

    terms: Mapping[str, tuple[Term, ...]]

    def to_bytes(self) -> bytes:
        """Canonical: the length of a JSON header, the header, float32 arrays in its order."""
        ordered = sorted(self.terms.items())
        header = json.dumps([[name, [[*t.cols.shape, t.rows.size] for t in terms]] for name, terms in ordered]).encode()
        arrays = [part for _, terms in ordered for t in terms for part in (t.cols, t.rows)]
        return b"".join([len(header).to_bytes(8, "little"), header, *(a.astype("<f4").tobytes() for a in arrays)])

    @staticmethod
    def from_bytes(data: bytes) -> Curvature:
        start = 8 + int.from_bytes(data[:8], "little")
        values, at = np.frombuffer(data[start:], "<f4"), 0
        terms: dict[str, tuple[Term, ...]] = {}
        for name, sizes in json.loads(data[8:start]):
            found = []
            for matrices, inputs, rows in sizes:
                middle, end = at + matrices * inputs, at + matrices * inputs + rows
                found.append(Term(values[middle:end], values[at:middle].reshape(matrices, inputs)))
                at = end
            terms[name] = tuple(found)
        return Curvature(terms)
