"""Where the decoder layers of a checkpoint are, told by its config and its tensor names alone."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from qbuild.errors import InputError

__all__ = ["hidden_size", "layer_count", "layer_names", "layer_prefix", "learned_positions", "text_config"]

COUNTS = ("num_hidden_layers", "n_layer", "num_layers")  # the names that configs give to the number of decoder layers
WIDTHS = ("hidden_size", "n_embd", "d_model")  # and to the width of the hidden states
INDEXED = re.compile(r"^((?:[^.]+\.)*?)(\d+)\.")
# Lists of layers that are as long as the decoder's in some models and are not the decoder.
OTHER_TOWERS = re.compile(r"(^|\.)(vision|visual|audio|image|encoder|mtp)", re.IGNORECASE)


def text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The part of a config that describes the language model: models that also see keep it below ``text_config``."""
    found = config.get("text_config")
    return found if isinstance(found, Mapping) else config


def layer_count(config: Mapping[str, Any]) -> int:
    """The number of decoder layers. Raises InputError where the config does not say."""
    remedy = "calibration needs a plain list of decoder layers"
    return _number(config, COUNTS, "how many decoder layers there are", remedy)


def hidden_size(config: Mapping[str, Any]) -> int:
    """The width of the hidden states. Raises InputError where the config does not say."""
    return _number(config, WIDTHS, "how wide hidden states are", "calibration needs it to plan its memory")


def learned_positions(config: Mapping[str, Any]) -> int | None:
    """The tokens a window can have at most: the rows of GPT-2's table of positions. None: positions are computed."""
    found = text_config(config).get("n_positions")
    return found if isinstance(found, int) else None


def _number(config: Mapping[str, Any], keys: Sequence[str], what: str, remedy: str) -> int:
    """The first of ``keys`` that is a positive number in the language model's part of a config."""
    text = text_config(config)
    for key in keys:
        if isinstance(text.get(key), int) and text[key] > 0:
            return int(text[key])
    raise InputError(_model(config), f"config.json does not say {what}; looked for {', '.join(keys)}", remedy)


def layer_prefix(config: Mapping[str, Any], names: Iterable[str]) -> str:
    """What stands before the number of a layer in the checkpoint's names: ``model.layers.``.

    It is found by looking: the numbered list that holds every number of a layer. Of several the one with the most
    tensors, so that lists inside of layers and small towers stay out. Raises InputError where there is none.
    """
    wanted = set(range(layer_count(config)))
    numbers: dict[str, set[int]] = {}
    tensors: dict[str, int] = {}
    for name in names:
        if (match := INDEXED.match(name)) and not OTHER_TOWERS.search(match[1]):
            numbers.setdefault(match[1], set()).add(int(match[2]))
            tensors[match[1]] = tensors.get(match[1], 0) + 1
    found = [prefix for prefix, present in numbers.items() if wanted <= present]
    if found:
        return max(found, key=lambda prefix: (tensors[prefix], prefix))
    seen = ", ".join(f"{prefix}N ({len(n)})" for prefix, n in sorted(numbers.items())[:6]) or "no numbered names"
    fact = f"no list of {len(wanted)} decoder layers among the names of the weights; there are: {seen}"
    raise InputError(_model(config), fact, "calibration needs a plain list of decoder layers, such as model.layers.0")


def layer_names(prefix: str, layer: int, names: Iterable[str]) -> tuple[str, ...]:
    """The names of one layer's tensors, sorted."""
    start = f"{prefix}{layer}."
    return tuple(sorted(name for name in names if name.startswith(start)))


def _model(config: Mapping[str, Any]) -> str:
    architectures = config.get("architectures") or [config.get("model_type", "model")]
    return str(architectures[0])
