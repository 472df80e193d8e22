"""What a run of another library needs: from what it holds at its peak, and as far as runs of it were measured.

Nobody promises these: a library may hold more than it did, and what is said of CUDA was not measured.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from qbuild.calibration.extent import ModelShape
from qbuild.calibration.shapes import gram_bytes

__all__ = ["Needs", "needs"]

# A torch that was built for CUDA with the library on it, and the worker beside it, of some 100 MiB.
BASE = {"autoawq": 980 << 20, "auto_gptq": 700 << 20, "gptqmodel": 1150 << 20}
CONTEXT = 1 << 30  # of a CUDA device in use
SAMPLED = 512  # tokens that AutoAWQ's search for clips looks at, at least
CLIPPED = 256  # rows that it looks at together
TRIED = 21  # scales that AutoAWQ tries of each linear, and the plain pass
SHRINKS = 11
OPERATIONS = {"cpu": 1e11, "cuda": 1e13}  # floating-point operations a second, of one core or of a device
ELEMENTS = {"cpu": 4e8, "cuda": 1e11}  # products of the search for clips a second
COLUMN = 1e-3  # seconds of GPTQ's loop over columns, for each
START = 15.0  # seconds to load a library


@dataclass(frozen=True)
class Needs:
    """``ram`` and ``vram``: peak bytes; ``seconds`` of one core, or of a device."""

    ram: int
    vram: int
    seconds: float


def needs(backend: str, model: ModelShape, tokens: int, device: str) -> Needs:
    """Of one target of ``backend``, calibrated on ``tokens`` tokens."""
    held, seconds = LIBRARIES[backend](model, tokens, device)
    if device == "cpu":
        return Needs(BASE[backend] + held, 0, START + seconds)
    return Needs(BASE[backend] + 2 * model.weights, CONTEXT + held, START + seconds)


def _awq(model: ModelShape, tokens: int, device: str) -> tuple[int, float]:
    """The whole model, float32 on a CPU; the inputs of each linear of a layer; then either the outputs of a trial of
    scales, or the products of some tokens with some rows."""
    item = 4 if device == "cpu" else 2
    layer = max(model.layers, key=lambda layer: layer.weights)
    widths = [linear.inputs for linear in layer.linears]
    widest = max(max(shape) for shape in layer.sizes)
    trial = tokens * (4 * model.hidden + 3 * widest) * item
    clip = CLIPPED * _sampled(tokens) * max(widths) * item
    held = item * (model.weights + 2 * layer.weights + tokens * (sum(widths) + model.hidden)) + max(trial, clip)
    work = 2.0 * TRIED * tokens / OPERATIONS[device] + SHRINKS * _sampled(tokens) / ELEMENTS[device]
    return held, work * sum(layer.weights for layer in model.layers)


def _sampled(tokens: int) -> int:
    return -(-tokens // max(1, tokens // SAMPLED))


def _gptq(model: ModelShape, tokens: int, device: str) -> tuple[int, float]:
    """Six bytes a weight (measured: maps of files read and written are among them), hidden states before and after a
    layer, and the layer's Hessians."""
    layer = max(model.layers, key=lambda layer: layer.weights)
    held = 6 * model.weights + 6 * layer.weights + 6 * tokens * model.hidden + 3 * gram_bytes(layer.linears)
    inside = sum(layer.weights for layer in model.layers)
    columns = sum(linear.inputs for layer in model.layers for linear in layer.linears)
    return held, 4.0 * inside * tokens / OPERATIONS[device] + COLUMN * columns


LIBRARIES: dict[str, Callable[[ModelShape, int, str], tuple[int, float]]] = {
    "autoawq": _awq,
    "auto_gptq": _gptq,
    "gptqmodel": _gptq,
}
