"""What a calibration of a model will take, told by the shapes of its tensors alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

from qbuild.calibration.families import layer_names, text_config

__all__ = [
    "BASE",
    "BASE_CUDA",
    "BASE_DEVICE",
    "Linear",
    "Step",
    "device_footprint",
    "forward_footprint",
    "gram_bytes",
    "linears",
    "shared_inputs",
    "state_bytes",
]

BASE = 440 << 20  # torch for CPUs, transformers, and a model without weights
BASE_CUDA = 860 << 20  # the same with a torch that was built for CUDA, used or not
BASE_DEVICE = 1560 << 20  # and with a CUDA device in use
CUBLAS = 128 << 20  # workspaces on the device
ITEM = {"float32": 4, "bfloat16": 2, "float16": 2}
ACTIVATIONS_HIDDEN, ACTIVATIONS_WIDE = 4, 3  # tensors of a window alive at once, of these widths
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
    return step.windows * step.length * int(text_config(config)["hidden_size"]) * ITEM[step.dtype]


def forward_footprint(
    config: Mapping[str, Any], tensors: Mapping[str, tuple[int, ...]], prefix: str, layer: int, step: Step
) -> int:
    """Peak RAM of a worker on a CPU that measures this layer, in bytes.

    The constants are fitted to measured peaks of Llama shapes from 135M to 8B: benchmarks/bench_calibration.py.
    """
    parts = _parts(config, tensors, prefix, layer, step)
    states = state_bytes(config, step)
    window = states // step.windows
    held = 2 * window if step.spill else states + window
    embedding = step.stored * max((prod(s) for name, s in tensors.items() if not name.startswith(prefix)), default=0)
    alive = min(step.threads, step.windows) * parts.alive  # a window a thread
    working = parts.weights + max(alive, parts.reading) + parts.grams
    return step.base + held + max(working, parts.saving, embedding)


def device_footprint(
    config: Mapping[str, Any], tensors: Mapping[str, tuple[int, ...]], prefix: str, layer: int, step: Step
) -> tuple[int, int]:
    """Peak RAM of a worker that measures this layer on a CUDA device, and what it allocates there, in bytes.

    Fitted to a few measured peaks on one H100; the CUDA context itself takes some hundred MiB of the device more.
    """
    parts = _parts(config, tensors, prefix, layer, step)
    states = 0 if step.spill else state_bytes(config, step)
    embedding = step.stored * max((prod(s) for name, s in tensors.items() if not name.startswith(prefix)), default=0)
    ram = BASE_DEVICE + states + max(parts.reading, parts.saving, embedding)
    return ram, CUBLAS + parts.weights + max(parts.alive, parts.reading) + parts.grams


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
    hidden = int(text_config(config)["hidden_size"])
    widest = max((linear.inputs for linear in found), default=hidden)
    alive = item * step.length * (ACTIVATIONS_HIDDEN * hidden + ACTIVATIONS_WIDE * widest)
    if item != 4:
        alive += 4 * step.length * (ACTIVATIONS_HIDDEN * hidden + widest)  # what is summed is widened first
    grams = gram_bytes(found) if step.gram else 0
    reading = step.stored * max(map(prod, shapes), default=0)
    return _Parts(item * sum(map(prod, shapes)), alive, grams, reading, grams + grams // 2)
