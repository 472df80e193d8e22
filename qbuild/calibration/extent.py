"""What a plan must know of a model before it runs: its layers, their linears, and the bytes and work of each.

A function of config.json and tensor shapes alone: nothing heavy is loaded.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import prod
from typing import Any

from qbuild.calibration import families, shapes

__all__ = [
    "Device",
    "LayerShape",
    "ModelShape",
    "Way",
    "device_forward",
    "device_propagation",
    "device_reverse",
    "device_solve",
    "forward_ram",
    "model_shape",
    "propagation_ram",
    "reverse_ram",
    "solve_ram",
]

EMBEDDING = re.compile(r"(^|\.)(embed\w*|wte|wpe|word_embeddings\w*)(\.|$)")
SMALL = 96 << 20  # of one phase's small tensors that the allocator keeps through the next
TORCH_RAM = 296 << 20  # a worker with torch, its linear algebra and what layers leave (measured: 236 to 255, and 30)
LOOPS_RAM = 96 << 20  # numba, with GPTQ's loops from its cache, and what threads keep (measured: 75 to 85)
TRIED_SCALES, TRIED_ROWS = 9, 1024  # by the search of AWQ's scales, on so many rows of a linear, evenly chosen
TRIED_AT_ONCE = 5  # of them, a thread each
SOLVED_ROWS = 320  # of a linear that a thread rounds at a time: whole vectors of rows, and no power of two
SWEEPS = 3  # of coordinate descent
TRIED_COPIES, ROUNDED_COPIES, CLIPPED_COPIES = 6, 8, 28  # float32, of the rows that threads are at, freed ones too
FACTORED_COPIES = 6  # float32, of the widest Gram matrix
PACKED = (2, 4)  # bits of codes that are stored packed into bytes


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
        grams = sum(float(n * n) for n in self.inputs) if detail == "gram" else 0.0  # a triangle
        return 2.0 * self.weights + grams

    def propagation_flops(self) -> float:
        """Of one token through the layer of the source and twice of the quantized model, with what is summed."""
        return 6.0 * self.weights + sum(3.0 * n * n for n in self.inputs)

    def solve_flops(self, rounding: str, *, scaled: bool) -> float:
        """Of quantizing the layer: AWQ tries scales on some rows; GPTQ carries every column's error to all that follow,
        each sweep of its descent multiplies with the Gram matrix, and an input's matrix is factored once."""
        carried, tried = 0.0, 0.0
        if rounding == "gptq":
            carried = sum((1.0 + 2 * SWEEPS) * out * cols * cols for out, cols in self.sizes)
            carried += sum(4 / 3 * cols**3 for cols in self.inputs)
        if scaled:
            tried = sum(2.0 * TRIED_SCALES * min(out, TRIED_ROWS) * cols * cols for out, cols in self.sizes)
        return carried + tried

    def code_bytes(self, bits: int, group_size: int) -> int:
        """Of the layer's codes as stored, scales and zeros with them."""
        total = 0
        for out, cols in self.sizes:
            groups = 1 if group_size == -1 else -(-cols // group_size)
            total += out * cols * (bits if bits in PACKED else 8) // 8 + 3 * out * groups
        return total

    def unpacking_bytes(self, bits: int, group_size: int) -> int:
        """Of reading these codes: as they were stored twice, and unpacked, with a part of the largest linear's."""
        unpacked = sum(out * cols for out, cols in self.sizes) if bits in PACKED else 0
        return 2 * self.code_bytes(bits, group_size) + unpacked + max(out * cols for out, cols in self.sizes)


@dataclass(frozen=True)
class ModelShape:
    """``before``: the tensors that the input of the first layer depends on."""

    prefix: str
    layers: tuple[LayerShape, ...]
    before: tuple[str, ...]
    hidden: int
    weights: int  # in all

    def curvature_bytes(self, tensors: Mapping[str, tuple[int, ...]]) -> int:
        """Of ``curvature.Curvature`` as stored: a row and a column of every linear, of embedding and head twice."""
        ends = [shape for name, shape in tensors.items() if not name.startswith(self.prefix) and len(shape) == 2]
        inside = sum(out + cols for layer in self.layers for out, cols in layer.sizes)
        return 4 * (inside + 2 * sum(map(sum, ends)))


def model_shape(config: Mapping[str, Any], tensors: Mapping[str, tuple[int, ...]]) -> ModelShape:
    """The decoder layers of a checkpoint, by the names of its tensors. Raises InputError where there are none."""
    prefix = families.layer_prefix(config, tensors)
    layers = tuple(_layer(i, prefix, tensors) for i in range(families.layer_count(config)))
    outside = [name for name in tensors if not name.startswith(prefix)]
    before = tuple(sorted(name for name in outside if EMBEDDING.search(name)))
    return ModelShape(prefix, layers, before, families.hidden_size(config), sum(map(prod, tensors.values())))


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


def reverse_ram(
    config: Mapping[str, Any], tensors: Mapping[str, tuple[int, ...]], model: ModelShape, step: shapes.Step
) -> int:
    """Predicted peak bytes of the worker that runs the pass back through the model."""
    return shapes.BASE + shapes.state_bytes(config, step) + _reverse(config, tensors, model, step)


def _reverse(
    config: Mapping[str, Any], tensors: Mapping[str, tuple[int, ...]], model: ModelShape, step: shapes.Step
) -> int:
    layers = range(len(model.layers))
    return max(shapes.reverse_footprint(config, tensors, model.prefix, layer, step) for layer in layers)


@dataclass(frozen=True)
class Way:
    """How a layer is quantized: ``rounding`` gptq or nearest, ``moved``: not the weights themselves but scaled ones.
    ``stored``: bytes of a weight in the checkpoint."""

    rounding: str
    moved: bool = True
    stored: int = 2

    @property
    def held(self) -> int:
        """Bytes of a weight: as it is stored, as float32 where that is not the same tensor, as a code, and one that is
        lost between them."""
        return self.stored + (4 if self.moved or self.stored != 4 else 0) + 2


def solve_ram(layer: LayerShape, way: Way, threads: int) -> int:
    """Predicted peak bytes of the worker that quantizes a layer."""
    loops = LOOPS_RAM if way.rounding == "gptq" else 0
    return TORCH_RAM + loops + layer.statistics_bytes("gram") + _solving(layer, way, threads)


def _solving(layer: LayerShape, way: Way, threads: int) -> int:
    """Weights and codes, Gram matrices, and the larger of what follows one another: scales that are tried, a thread
    each, or a matrix that is factored, and rows that threads round by it."""
    rounding = way.rounding
    scales = min(threads, TRIED_AT_ONCE)
    tried = TRIED_COPIES * scales * max(min(out, SOLVED_ROWS) * cols for out, cols in layer.sizes)
    copies = ROUNDED_COPIES if rounding == "gptq" else CLIPPED_COPIES
    stacks = [size for size in _stacked(layer) if prod(size) <= shapes.STACKED] if rounding == "gptq" else []
    rounded = copies * max(_in_hand(out, cols, threads) for out, cols in (*layer.sizes, *stacks))
    factored = FACTORED_COPIES * max(cols for _, cols in layer.sizes) ** 2 if rounding == "gptq" else 0
    return way.held * layer.weights + shapes.gram_bytes(layer.linears) + 4 * max(tried, factored + rounded)


def _stacked(layer: LayerShape) -> list[tuple[int, int]]:
    """(out, in) of all that read one input."""
    groups = shapes.shared_inputs(layer.linears)
    return [(sum(linear.outputs for linear in group), group[0].inputs) for group in groups]


def _in_hand(out: int, cols: int, threads: int) -> int:
    """Weights of a linear whose rows are rounded at the same time."""
    return min(out, threads * SOLVED_ROWS) * cols


def propagation_ram(
    config: Mapping[str, Any], tensors: Mapping[str, tuple[int, ...]], model: ModelShape, step: shapes.Step
) -> int:
    """Predicted peak bytes of the worker that quantizes layers with error propagation: a pass with two models' states
    and a second matrix for each Gram matrix, and between two layers the solving of one."""
    found = []
    for layer in model.layers:
        comparing = shapes.comparison_footprint(config, tensors, model.prefix, layer.index, step)
        solving = _solving(layer, Way("gptq", stored=step.stored), step.threads) + shapes.gram_bytes(layer.linears)
        found.append(max(comparing, solving) + min(comparing, solving, SMALL))
    return shapes.BASE + LOOPS_RAM + shapes.held_states(config, step, 2) + max(found)


@dataclass(frozen=True)
class Device:
    """Predicted peaks of a worker that computes on a CUDA device, in bytes; ``vram`` is what it allocates there."""

    ram: int
    vram: int


def device_forward(
    config: Mapping[str, Any], tensors: Mapping[str, tuple[int, ...]], model: ModelShape, step: shapes.Step
) -> Device:
    """Of the worker that runs the forward pass: its embedding is in RAM first, then a layer that is read ahead, half of
    the one that is on its way to the device (measured: up to a quarter), and the statistics that are saved."""
    ahead = 3 * step.stored * max(layer.weights for layer in model.layers) // 2
    saving = 2 * max(layer.statistics_bytes("gram" if step.gram else "diagonal") for layer in model.layers)
    reading = max(_embedding(tensors, step), ahead + saving)
    found = (shapes.device_footprint(config, tensors, model.prefix, layer.index, step) for layer in model.layers)
    return Device(shapes.device_base(tensors, step.dtype) + shapes.held_states(config, step) + reading, max(found))


def _embedding(tensors: Mapping[str, tuple[int, ...]], step: shapes.Step) -> int:
    """What the largest tensor takes more than the kernels that are loaded after it."""
    return step.stored * max(map(prod, tensors.values())) - shapes.UNLOADED


def device_reverse(
    config: Mapping[str, Any], tensors: Mapping[str, tuple[int, ...]], model: ModelShape, step: shapes.Step
) -> Device:
    """Of the worker that runs the pass back through the model, one window after another."""
    reading = step.stored * max(map(prod, tensors.values()))
    ram = shapes.device_base(tensors, step.dtype) + shapes.state_bytes(config, step) + reading
    return Device(ram, shapes.CUBLAS + _reverse(config, tensors, model, replace(step, threads=1)))


def device_solve(layer: LayerShape, way: Way, codes: int) -> Device:
    """Of the worker that quantizes a layer to so many bytes of ``codes``."""
    statistics = layer.statistics_bytes("gram")
    reading = statistics + max(statistics, way.stored * layer.weights)  # of the next layer too
    base = shapes.BASE_DEVICE - (0 if way.rounding == "gptq" else shapes.FACTORING)
    ram = base + 2 * reading + 4 * codes  # those of the layer before are being written
    return Device(ram, shapes.WORKSPACES + _solving_device(layer, way))


def device_propagation(
    config: Mapping[str, Any], tensors: Mapping[str, tuple[int, ...]], model: ModelShape, step: shapes.Step, codes: int
) -> Device:
    """Of the worker that quantizes layers with error propagation, each to so many bytes of ``codes`` at most."""
    reading = max(_embedding(tensors, step), 3 * codes)
    ram = shapes.device_base(tensors, step.dtype) + shapes.PROPAGATING + shapes.held_states(config, step, 2) + reading
    way = Way("gptq", stored=step.stored)
    found = [
        max(
            shapes.device_footprint(config, tensors, model.prefix, layer.index, step, models=2),
            shapes.CUBLAS + _solving_device(layer, way) + shapes.gram_bytes(layer.linears),
        )
        for layer in model.layers
    ]
    return Device(ram, max(found))


def _solving_device(layer: LayerShape, way: Way) -> int:
    """Codes too stay on the device. What is tried of the largest linear, and for GPTQ the factoring of the widest Gram
    matrix, which holds five and a half of its size."""
    widest = max(cols for _, cols in layer.sizes)
    tried = (26 if way.moved or way.rounding == "gptq" else 16) * max(out * cols for out, cols in layer.sizes)
    factored = 22 * widest * widest if way.rounding == "gptq" else 0
    return way.held * layer.weights + shapes.gram_bytes(layer.linears) + max(tried, factored)
