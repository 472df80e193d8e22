"""What a plan must know of a model before it runs: its layers, their linears, and the bytes and work of each.

A function of config.json and tensor shapes alone: nothing heavy is loaded.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

from qbuild.calibration import families, shapes

__all__ = ["LayerShape", "ModelShape", "forward_ram", "model_shape", "solve_ram"]

WIDTHS = ("hidden_size", "n_embd", "d_model")
EMBEDDING = re.compile(r"(^|\.)(embed\w*|wte|wpe|word_embeddings\w*)(\.|$)")
TORCH_RAM = 330 << 20  # a worker with torch and transformers loaded, a model built without weights


@dataclass(frozen=True)
class LayerShape:
    """``tensors``: checkpoint names of a decoder layer. ``linears``: those without .weight → (out, in)."""

    index: int
    tensors: tuple[str, ...]
    linears: tuple[shapes.Linear, ...]
    weights: int

    @property
    def sizes(self) -> tuple[tuple[int, int], ...]:
        """(out, in) of each linear."""
        return tuple((linear.outputs, linear.inputs) for linear in self.linears)

    @property
    def inputs(self) -> tuple[int, ...]:
        """Widths of the different inputs, as far as names tell."""
        return tuple(group[0].inputs for group in shapes.shared_inputs(self.linears))

    def statistics_bytes(self, detail: str) -> int:
        """Of a layer's statistics as stored: float32."""
        return sum(4 * n * ((n + 1) // 2 + 2 if detail == "gram" else 2) for n in self.inputs)

    def flops(self, detail: str) -> float:
        """Of one token through the layer, with its statistics."""
        grams = sum(2.0 * n * n for n in self.inputs) if detail == "gram" else 0.0
        return 2.0 * self.weights + grams

    def solve_flops(self, rounding: str, *, scaled: bool) -> float:
        """Of quantizing the layer: GPTQ carries every column's error to all that follow, AWQ tries scales."""
        carried = sum(out * cols * cols + cols**3 for out, cols in self.sizes) if rounding == "gptq" else 0
        tried = sum(2.0 * TRIED_SCALES * out * cols * cols for out, cols in self.sizes) if scaled else 0.0
        return carried + tried

    def code_bytes(self, bits: int, group_size: int) -> int:
        """Of the layer's codes as stored, scales and zeros with them."""
        total = 0
        for out, cols in self.sizes:
            groups = 1 if group_size == -1 else -(-cols // group_size)
            total += out * cols * (bits if bits in (2, 4) else 8) // 8 + 3 * out * groups
        return total


TRIED_SCALES = 20


@dataclass(frozen=True)
class ModelShape:
    """``before``: the tensors that the input of the first layer depends on."""

    prefix: str
    layers: tuple[LayerShape, ...]
    before: tuple[str, ...]
    hidden: int
    weights: int  # in all


def model_shape(config: Mapping[str, Any], tensors: Mapping[str, tuple[int, ...]]) -> ModelShape:
    """The decoder layers of a checkpoint, by the names of its tensors. Raises InputError where there are none."""
    text = families.text_config(config)
    prefix = families.layer_prefix(config, tensors)
    layers = tuple(_layer(i, prefix, tensors) for i in range(families.layer_count(config)))
    outside = [name for name in tensors if not name.startswith(prefix)]
    before = tuple(sorted(name for name in outside if EMBEDDING.search(name)))
    hidden = next((text[key] for key in WIDTHS if key in text), 0)
    return ModelShape(prefix, layers, before, int(hidden), sum(map(prod, tensors.values())))


def _layer(index: int, prefix: str, tensors: Mapping[str, tuple[int, ...]]) -> LayerShape:
    names = families.layer_names(prefix, index, tensors)
    weights = sum(prod(tensors[name]) for name in names)
    return LayerShape(index, names, shapes.linears(prefix, index, tensors), weights)


def forward_ram(
    config: Mapping[str, Any], tensors: Mapping[str, tuple[int, ...]], model: ModelShape, step: shapes.Step
) -> int:
    """Predicted peak bytes of the worker that runs the forward pass."""
    layers = range(len(model.layers))
    return max(shapes.forward_footprint(config, tensors, model.prefix, layer, step) for layer in layers)


def solve_ram(layer: LayerShape) -> int:
    """Predicted peak bytes of the worker that quantizes a layer."""
    widest = max(cols for _, cols in layer.sizes)
    largest = max(out * cols for out, cols in layer.sizes)
    work = 4 * (4 * widest * widest + 6 * largest)
    return TORCH_RAM + 6 * layer.weights + layer.statistics_bytes("gram") + shapes.gram_bytes(layer.linears) + work
