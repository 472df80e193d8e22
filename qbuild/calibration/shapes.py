"""What a calibration of a model will take, told by the shapes of its tensors alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from qbuild.calibration.families import layer_names

__all__ = ["Linear", "linears"]

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
