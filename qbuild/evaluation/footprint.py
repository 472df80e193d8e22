"""What an evaluation will take, told by the shapes of the source's tensors alone; no torch here."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

from qbuild.calibration.extent import Device
from qbuild.calibration.families import layer_count, layer_prefix
from qbuild.calibration.shapes import (
    BASE,
    ITEM,
    WORKSPACES,
    Step,
    device_base,
    device_footprint,
    forward_footprint,
    state_bytes,
)
from qbuild.quant.shapes import ITEM_SIZES

__all__ = ["EXACT_ROWS", "ROWS", "Text", "evaluation", "on_device", "states", "states_bytes"]

KERNELS = 136 << 20  # numba, its compiled kernels, and what dequantizing takes
ROWS = 64  # positions whose logits of both models are in memory at a time
EXACT_ROWS = 16  # of them those that are widened to float64
EXACT_COPIES = 6
COMPARED = 20  # bytes a weight of a matrix of a layer, as its error is told: itself, as it is stored, and fits of it
UNPACKED = 12  # bytes a weight of a matrix on a device, while its codes become float32: beside itself in the layer
DTYPES = {"float32": "F32", "bfloat16": "BF16"}  # what is computed in, as safetensors name it


@dataclass(frozen=True)
class Text:
    """Windows of tokens, and the dtype in which they are computed."""

    windows: int
    length: int
    dtype: str = "float32"


Shapes = Mapping[str, tuple[int, ...]]


def states_bytes(config: Mapping[str, Any], text: Text) -> int:
    """What ``run.states`` gives of a model."""
    return state_bytes(config, Step(text.windows, text.length, text.dtype))


def states(config: Mapping[str, Any], tensors: Shapes, text: Text) -> int:
    """Peak RAM of a worker on a CPU that runs ``run.states``, in bytes."""
    return _layers(config, tensors, text)


def evaluation(config: Mapping[str, Any], tensors: Shapes, text: Text, *, dequantized: bool) -> int:
    """Peak RAM of a worker on a CPU that runs ``run.evaluate``, in bytes: both models' states, and then both heads,
    or a matrix of both.

    ``dequantized``: the model is a GGUF file. Measured: 0.88 to 0.98 of this for Llama shapes of 3M, 135M and 1.1B.
    """
    kept = states_bytes(config, text)
    table, vocabulary = _table(config, tensors)
    logits = vocabulary * (2 * ROWS * ITEM[text.dtype] + EXACT_COPIES * EXACT_ROWS * 8)
    heads = BASE + kept + 2 * table * ITEM[text.dtype] + 4 * table + logits
    prefix = layer_prefix(config, tensors)
    matrices = (prod(shape) for name, shape in tensors.items() if name.startswith(prefix) and len(shape) == 2)
    matrix = BASE + kept + COMPARED * max(matrices, default=0)
    return (KERNELS if dequantized else 0) + kept + max(_layers(config, tensors, text), heads, matrix)


def on_device(
    config: Mapping[str, Any], tensors: Shapes, text: Text, *, source: str, targets: Collection[str]
) -> Device:
    """Peaks of a worker that runs ``run.evaluate`` on a CUDA device. ``source`` and ``targets``: dtypes of what is not
    quantized, as safetensors name them: F32 of a target is a GGUF file, which is dequantized in RAM."""
    kept, prefix = states_bytes(config, text), layer_prefix(config, tensors)
    table, vocabulary = _table(config, tensors)
    matrices = (prod(shape) for name, shape in tensors.items() if name.startswith(prefix) and len(shape) == 2)
    widest = max(matrices, default=0)
    sent = max(ITEM_SIZES[dtype] for dtype in (source, *targets)) * max(map(prod, tensors.values()))
    if "F32" in targets:  # a matrix of a layer is there twice while its rows are put in order
        sent = KERNELS + max(sent, 8 * widest)
    step = Step(text.windows, text.length, text.dtype, gram=False, stored=UNPACKED)
    count = layer_count(config)
    layers = (device_footprint(config, tensors, prefix, layer, step, models=0) for layer in range(count))
    held = _heads(ITEM[text.dtype], DTYPES[text.dtype], source, targets)
    logits = vocabulary * (2 * ROWS * ITEM[text.dtype] + EXACT_COPIES * EXACT_ROWS * 8)
    heads, matrix = WORKSPACES + held * table + logits, WORKSPACES + COMPARED * widest
    return Device(device_base(tensors, text.dtype) + 2 * kept + sent, max(*layers, heads, matrix))


def _heads(item: int, dtype: str, source: str, targets: Collection[str]) -> int:
    """Bytes a weight of both models' heads, which are made one after the other, each first as it is stored, or of the
    head as both store it while its error is told."""
    read = {held: 0 if held == dtype else ITEM_SIZES[held] for held in (source, *targets)}
    last = max(read[held] for held in targets)
    return max(item + read[source], 2 * item + last, max(ITEM_SIZES[held] + ITEM_SIZES[source] for held in targets))


def _layers(config: Mapping[str, Any], tensors: Shapes, text: Text) -> int:
    """The way through the layers, and before it the embedding, whose table is read as float32 at most."""
    step = Step(text.windows, text.length, text.dtype, gram=False, stored=4)
    prefix = layer_prefix(config, tensors)
    layers = (forward_footprint(config, tensors, prefix, layer, step) for layer in range(layer_count(config)))
    return max(*layers, BASE + states_bytes(config, text) + 4 * _table(config, tensors)[0])


def _table(config: Mapping[str, Any], tensors: Shapes) -> tuple[int, int]:
    """Weights and rows of the largest tensor outside of the layers: the embedding, or the head."""
    prefix = layer_prefix(config, tensors)
    outside = [shape for name, shape in tensors.items() if not name.startswith(prefix)]
    largest = max(outside, key=prod)
    return prod(largest), largest[0]
