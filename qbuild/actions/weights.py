"""``source.weights``: many source tensors under one digest, so that a key over a whole layer, or over all layers
before it, stays one line. Nothing runs: its output is known when its inputs are."""

from __future__ import annotations

from dataclasses import dataclass

KIND = "source.weights"
SALT = 1


@dataclass(frozen=True)
class Params:
    """Nothing but the inputs, in their order."""
