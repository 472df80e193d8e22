"""What a calibration of a model will take, told by the shapes of its tensors alone."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

from qbuild.calibration.families import hidden_size, layer_names, text_config

__all__ = [
    "BASE",
    "BASE_CUDA",
    "BASE_DEVICE",
    "FACTORING",
    "KEPT",
    "PROPAGATING",
    "STACKED",
    "TORCH_CUDA",
    "UNLOADED",
    "WORKSPACES",
    "Linear",
    "Step",
    "comparison_footprint",
    "device_base",
    "device_footprint",
    "forward_footprint",
    "gram_bytes",
    "held_states",
    "linears",
    "reverse_footprint",
    "shared_inputs",
    "state_bytes",
]

BASE = 448 << 20  # torch for CPUs, transformers, and a model without weights
BASE_CUDA = 900 << 20  # the same with a torch that was built for CUDA, used or not
TORCH_CUDA = 312 << 20  # more of such a torch alone, with its linear algebra (measured: 275 to load it, and 30)
BASE_DEVICE = 1516 << 20  # and with a CUDA device in use (measured: 1430 to 1504)
UNLOADED = 500 << 20  # of it: kernels that are loaded after the embedding is gone
FACTORING = 400 << 20  # of it: Triton and what factors matrices, which plain rounding does not load (measured: 421)
HALF = 112 << 20  # more for kernels of bfloat16 (measured: 113, 129)
ROUTING = 144 << 20  # more for those that choose experts (measured: 119 to 126)
PROPAGATING = 260 << 20  # more of a pass that solves (measured: 246)
CUBLAS = 192 << 20  # workspaces on the device, and how far off the sums of a pass are
WORKSPACES = 64 << 20  # of two threads, where the rest is known
TOGETHER_CUDA = 8  # windows whose inputs are summed together on a device: in the bytes, so it is no setting
STACKED = 1 << 21  # weights of linears of one input that are rounded as one matrix, at most
ITEM = {"float32": 4, "bfloat16": 2, "float16": 2}
ACTIVATIONS_HIDDEN, ACTIVATIONS_WIDE = 4, 3  # tensors of a window alive at once, of these widths
BACK_HIDDEN, BACK_WIDE = 16, 8  # the same where a layer's activations are kept for its gradients
KEPT = 64 << 20  # of what a window frees, for the next one
HEAD_ROWS, HEAD_COPIES = 64, 6  # positions whose logits are in memory at a time; logits, their shares, gradients
TOGETHER = {
    "q_proj": "qkv", "k_proj": "qkv", "v_proj": "qkv", "gate_proj": "gate_up", "up_proj": "gate_up",
    "w1": "w13", "w3": "w13",
}  # fmt: skip

# Matrices that no format quantizes and nothing measures: what chooses experts, what convolves, what shifts positions.
NOT_LINEARS = ("gate", "router", "shared_expert_gate", "wg", "conv1d", "rotary_emb", "rel_pos", "A_log")


@dataclass(frozen=True)
class Linear:
    """``name`` is the checkpoint name without ``.weight``, for one expert of a stacked tensor with ``[number]``."""

    name: str
    outputs: int
    inputs: int


def linears(prefix: str, layer: int, tensors: Mapping[str, tuple[int, ...]]) -> tuple[Linear, ...]:
    """The linears of a decoder layer, sorted by name, from the shapes of the checkpoint's tensors."""
    found: list[Linear] = []
    for name in layer_names(prefix, layer, tensors):
        shape, plain = tensors[name], name.removesuffix(".weight")
        if plain.rpartition(".")[2] in NOT_LINEARS or "norm" in plain.rpartition(".")[2]:
            continue
        if len(shape) == 2 and name.endswith(".weight"):
            found.append(Linear(plain, shape[0], shape[1]))
        elif len(shape) == 3 and ".experts." in name:
            found += [Linear(f"{plain}[{n}]", shape[1], shape[2]) for n in range(shape[0])]
    return tuple(sorted(found, key=lambda linear: linear.name))


def shared_inputs(found: tuple[Linear, ...]) -> tuple[tuple[Linear, ...], ...]:
    """Linears by the input that they read together, as far as names tell; a model may share more."""
    groups: dict[tuple[str, str], list[Linear]] = {}
    for linear in found:
        path, _, own = linear.name.rpartition(".")
        groups.setdefault((path, TOGETHER.get(own, own)), []).append(linear)
    return tuple(tuple(group) for group in groups.values())


def gram_bytes(found: tuple[Linear, ...]) -> int:
    """Bytes of the Gram matrices of a layer's inputs in memory; as an artifact they take half."""
    return sum(4 * group[0].inputs ** 2 for group in shared_inputs(found))


@dataclass(frozen=True)
class Step:
    """What one layer's turn in a calibration depends on.

    ``stored``: bytes of a weight in the checkpoint; ``base``: of the worker before it does anything.
    """

    windows: int
    length: int
    dtype: str = "float32"
    gram: bool = True
    spill: bool = False
    stored: int = 2
    threads: int = 1
    base: int = BASE


def state_bytes(config: Mapping[str, Any], step: Step) -> int:
    """The hidden states of all windows: in RAM, or on disk twice for a moment."""
    return step.windows * step.length * hidden_size(config) * ITEM[step.dtype]


def held_states(config: Mapping[str, Any], step: Step, models: int = 1) -> int:
    """The hidden states of models in RAM during a pass."""
    states = state_bytes(config, step)
    window = states // step.windows
    return models * (2 * window if step.spill else states + window)


def comparison_footprint(
    config: Mapping[str, Any], tensors: Mapping[str, tuple[int, ...]], prefix: str, layer: int, step: Step
) -> int:
    """What a worker on a CPU needs beside the hidden states, to sum a layer's inputs in the source and in a quantized
    model, in bytes."""
    parts = _parts(config, tensors, prefix, layer, step)
    alive = 3 * min(step.threads, step.windows) * parts.alive  # two windows a thread, and how far they are apart
    return parts.weights + max(alive, parts.reading) + 2 * parts.grams


def forward_footprint(
    config: Mapping[str, Any], tensors: Mapping[str, tuple[int, ...]], prefix: str, layer: int, step: Step
) -> int:
    """Peak RAM of a worker on a CPU that measures this layer, in bytes.

    The constants are fitted to measured peaks of Llama shapes from 135M to 8B: benchmarks/bench_calibration.py.
    """
    parts = _parts(config, tensors, prefix, layer, step)
    embedding = step.stored * max((prod(s) for name, s in tensors.items() if not name.startswith(prefix)), default=0)
    alive = min(step.threads, step.windows) * parts.alive  # a window a thread
    kept = min(KEPT, alive, parts.reading)  # while the next layer is read
    working = parts.weights + max(alive, parts.reading) + kept + parts.grams
    usual = 0 if step.dtype == "float32" else parts.grams * 3 // 8  # half of a matrix in bfloat16, and whole blocks
    return step.base + held_states(config, step) + max(working + usual, parts.saving + usual, embedding)


def device_base(tensors: Mapping[str, tuple[int, ...]], dtype: str) -> int:
    """RAM of a worker that has run a model's layers on a CUDA device, in bytes, without anything of the model."""
    half = HALF if dtype != "float32" else 0
    return BASE_DEVICE + half + (ROUTING if any(".experts." in name for name in tensors) else 0)


def reverse_footprint(
    config: Mapping[str, Any], tensors: Mapping[str, tuple[int, ...]], prefix: str, layer: int, step: Step
) -> int:
    """What a worker needs that goes back through this layer, or through the head, beside the gradients, in bytes."""
    parts, item = _parts(config, tensors, prefix, layer, step), ITEM[step.dtype]
    hidden = int(text_config(config)["hidden_size"])
    widest = max((linear.inputs for linear in linears(prefix, layer, tensors)), default=hidden)
    window = item * step.length * (BACK_HIDDEN * hidden + BACK_WIDE * widest)
    layers = parts.weights + max(min(step.threads, step.windows) * window, parts.reading)
    largest = max((shape for name, shape in tensors.items() if not name.startswith(prefix)), key=prod, default=(0, 0))
    head = (item + step.stored) * prod(largest) + HEAD_COPIES * HEAD_ROWS * largest[0] * 4
    return max(layers, head)


def device_footprint(
    config: Mapping[str, Any],
    tensors: Mapping[str, tuple[int, ...]],
    prefix: str,
    layer: int,
    step: Step,
    models: int = 1,
) -> int:
    """What a worker that measures this layer allocates on a CUDA device, in bytes: in one model, compared in two, or
    in none, where windows only go through.

    Fitted to measured peaks of a 7B shape on an H100: 1.03 of them in float32, 1.02 in bfloat16. The CUDA context
    itself takes some hundred MiB of the device more (``vram.CONTEXT``).
    """
    parts = _parts(config, tensors, prefix, layer, step)
    item, hidden = ITEM[step.dtype], hidden_size(config)
    tokens = min(TOGETHER_CUDA, step.windows) * step.length
    widths = _read_widths(config, linears(prefix, layer, tensors))
    noted = (item if item == 4 else item + 4) + (4 if step.gram else 0)  # as they were read, widened, side by side
    squares = 4 * max(widths, default=0)
    summed = tokens * (noted * sum(widths) + squares)
    states = 2 * tokens * hidden * item
    window = 4 * step.length * (ACTIVATIONS_HIDDEN * hidden + ACTIVATIONS_WIDE * max(widths, default=hidden))
    working = parts.weights + models * (summed + states) + window + models * parts.grams
    workspaces = CUBLAS if models else WORKSPACES
    return workspaces + max(working, parts.weights + parts.reading, parts.grams + parts.grams // 2)


def _read_widths(config: Mapping[str, Any], found: tuple[Linear, ...]) -> list[int]:
    """Values that linears read for one token: of experts those that it is sent to."""
    groups = [group[0] for group in shared_inputs(found)]
    chosen = int(text_config(config).get("num_experts_per_tok") or 1)
    experts = {re.sub(r"\d+", "*", linear.name): linear.inputs for linear in groups if ".experts." in linear.name}
    return [linear.inputs for linear in groups if ".experts." not in linear.name] + [*experts.values()] * chosen


@dataclass(frozen=True)
class _Parts:
    """Bytes: a layer in memory, what a window needs, Gram matrices, the largest read, what is alive while saving."""

    weights: int
    alive: int
    grams: int
    reading: int
    saving: int


def _parts(
    config: Mapping[str, Any], tensors: Mapping[str, tuple[int, ...]], prefix: str, layer: int, step: Step
) -> _Parts:
    item = ITEM[step.dtype]
    shapes = [tensors[name] for name in layer_names(prefix, layer, tensors)]
    found = linears(prefix, layer, tensors)
    hidden = hidden_size(config)
    widest = max((linear.inputs for linear in found), default=hidden)
    alive = item * step.length * (ACTIVATIONS_HIDDEN * hidden + ACTIVATIONS_WIDE * widest)
    if item != 4:
        alive += 4 * step.length * (ACTIVATIONS_HIDDEN * hidden + widest)  # what is summed is widened first
    grams = gram_bytes(found) if step.gram else 0
    reading = step.stored * max(map(prod, shapes), default=0)
    return _Parts(item * sum(map(prod, shapes)), alive, grams, reading, grams + grams // 2)
