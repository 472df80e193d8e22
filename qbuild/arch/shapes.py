"""What a configuration implies: the family, its sizes as letters, and which tensors of which shape a checkpoint has."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from typing import Any

from qbuild.arch.families import FAMILIES, Family, Row
from qbuild.errors import InputError

__all__ = [
    "CONVERT_ELSEWHERE",
    "Shapes",
    "every",
    "expected_tensors",
    "family",
    "feed_forward",
    "find",
    "layer_kinds",
    "of_full_attention",
    "rotated",
    "settings",
    "text_part",
]


CONVERT_ELSEWHERE = "convert it with llama.cpp, then model.source=FILE.gguf"


def text_part(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The part of a configuration that describes the language model, where the model does more."""
    return config.get("text_config") or config.get("llm_config") or {}


def family(config: Mapping[str, Any], place: str) -> Family:
    """The row for a configuration's architecture. Unknown: InputError that names the nearest."""
    names = text_part(config).get("architectures") or config.get("architectures") or []
    found = next((FAMILIES[name] for name in names if name in FAMILIES), None)
    if found is not None:
        return found.without_experts if found.without_experts and not config.get("num_experts_per_tok") else found
    wanted = names[0] if names else str(config.get("model_type", "nothing named"))
    near = difflib.get_close_matches(wanted, FAMILIES, 3, 0.3)
    remedy = (f"nearest: {', '.join(near)}; " if near else "") + "docs/families.md lists all; " + CONVERT_ELSEWHERE
    raise InputError(place, f"architecture {wanted} is not supported", remedy)


def settings(config: Mapping[str, Any], rules: Family) -> dict[str, Any]:
    """A config.json with its text part at the root and the defaults it leaves out; null counts as left out."""
    merged = {**config, **text_part(config)}
    merged |= {ours: merged[theirs] for ours, theirs in rules.aliases.items() if theirs in merged}
    return {**rules.defaults, **{k: v for k, v in merged.items() if v is not None}}


def find(config: Mapping[str, Any], *names: str) -> Any:
    """The value of the first key that is there."""
    return next((config[name] for name in names if name in config), None)


def rotated(config: Mapping[str, Any], part: float) -> int:
    """Rotated values of a head, as the converter cuts them: the product with the width is rounded down first."""
    return int(part * config["hidden_size"]) // int(config["num_attention_heads"])


EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
SHARED = ("shared_expert_intermediate_size", "shared_intermediate_size", "moe_shared_expert_intermediate_size")
SHARED_COUNT = ("n_shared_experts", "moe_num_shared_experts", "num_shared_experts")


def layer_kinds(config: Mapping[str, Any]) -> list[str]:
    """What mixes each layer's positions: ``conv`` or ``attention``."""
    count = config["num_hidden_layers"]
    full, types = config.get("full_attn_idxs"), config.get("layer_types") or ()
    if full is not None:
        return ["attention" if i in full else "conv" for i in range(count)]
    return ["conv" if kind == "conv" else "attention" for kind in (*types, *[""] * (count - len(types)))]


def of_full_attention(config: Mapping[str, Any], name: str, old: str) -> int | None:
    """What Gemma 4 says of its layers of full attention: under a key of its own, or layer by layer."""
    if config.get(old) is not None:
        return int(config[old])
    types, layers = config["layer_types"], config.get("per_layer_config") or {}
    full = (over for i, over in layers.items() if int(i) < len(types) and types[int(i)] == "full_attention")
    return next((int(over[name]) for over in full if name in over), None)


def _layer_sizes(config: Mapping[str, Any], size: Mapping[str, int]) -> Iterator[dict[str, int]]:
    """Each layer's letters, where they differ: Gemma 4's heads by kind, and its feed-forward where keys are shared."""
    head, n = of_full_attention(config, "head_dim", "global_head_dim") or 512, size["n"]
    heads = of_full_attention(config, "num_key_value_heads", "num_global_key_value_heads")
    g = heads if heads is not None and config.get("attention_k_eq_v") else size["g"]
    full = {"d": head, "g": g, "q": n * head, "k": g * head}
    for i, kind in enumerate(config["layer_types"]):
        shares = i >= config["num_hidden_layers"] - config["num_kv_shared_layers"]
        wide = {"f": 2 * size["f"]} if shares and config.get("use_double_wide_mlp") else {}
        yield {**size, **(full if kind == "full_attention" else {}), **wide}


def feed_forward(config: Mapping[str, Any]) -> int:
    """The width of the feed-forward. LFM2 gives one that it takes two thirds of, times a factor, rounded up."""
    width: int | None = find(config, "block_ff_dim", "intermediate_size")
    if width is None and "n_embd" in config:
        return 4 * int(config["n_embd"])
    if width is None:
        raise KeyError("intermediate_size")
    if not config.get("block_auto_adjust_ff_dim"):
        return width
    factor, multiple = config.get("block_ffn_dim_multiplier"), config["block_multiple_of"]
    width = int(2 * width / 3)
    width = width if factor is None else int(factor * width)
    return int(-(-width // multiple) * multiple)


def _latent_sizes(config: Mapping[str, Any]) -> dict[str, int]:
    """The letters of multi-head latent attention."""
    n, rank, values = config["num_attention_heads"], config["kv_lora_rank"], config["v_head_dim"]
    plain, rotated_part = config["qk_nope_head_dim"], config["qk_rope_head_dim"]
    return {
        "r": rank, "t": rank + rotated_part, "u": config.get("q_lora_rank", 0), "i": n * (plain + rotated_part),
        "o": plain, "w": values, "x": n * (plain + values), "y": n * values,
    }  # fmt: skip


class Shapes:
    """Letters of the families' rows as numbers, and which rows a layer has."""

    def __init__(self, config: Mapping[str, Any], rules: Family, place: str) -> None:
        self.config, self.rules = config, rules
        self.fused = self.headless = False  # what the checkpoint shows, not the configuration
        for name in rules.refused:
            key, wanted = name.removeprefix("!"), name.startswith("!")
            if bool(config.get(key)) != wanted:
                remedy = "llama.cpp does not convert such models either"
                raise InputError(place, f"config.json sets {key}: {config.get(key)}", remedy)
        for kind in config.get("layer_types", ()) if rules.kinds else ():
            if kind not in rules.kinds:
                raise InputError(place, f"layers of {kind} are not supported", CONVERT_ELSEWHERE)
        try:
            self.last: int = config["num_hidden_layers"]
            self.size = self._sizes(config)
            dense = find(config, "first_k_dense_replace", "moe_layer_start_index", "num_dense_layers")
            self.dense: int = (0 if self.size["e"] else self.last) if dense is None else dense
            self.layers = self.last + (config.get("num_nextn_predict_layers", 0) if rules.next_layers else 0)
            self.kinds = layer_kinds(config)
            self.by_layer = [*_layer_sizes(config, self.size)] if "num_kv_shared_layers" in config else []
        except KeyError as error:
            raise InputError(place, f"config.json has no {error.args[0]}", "fetch config.json again") from None

    @staticmethod
    def _sizes(config: Mapping[str, Any]) -> dict[str, int]:
        n, hidden, ff = config["num_attention_heads"], config["hidden_size"], feed_forward(config)
        g, d = config.get("num_key_value_heads", n), config.get("head_dim", hidden // n)
        m, p = config.get("moe_intermediate_size", ff), config.get("hidden_size_per_layer_input", 0)
        shared, vocabulary = m * (find(config, *SHARED_COUNT) or 0), config["vocab_size"]
        size = {
            "h": hidden, "H": 2 * hidden, "c": 3 * hidden, "f": ff, "F": 2 * ff, "v": vocabulary, "1": 1,
            "n": n, "g": g, "d": d, "q": n * d, "k": g * d, "b": (n + 2 * g) * d,
            "e": find(config, *EXPERTS) or 0, "m": m, "M": 2 * m, "s": find(config, *SHARED) or shared or ff,
            "p": p, "P": p * config["num_hidden_layers"], "V": config.get("vocab_size_per_layer_input", vocabulary),
            "z": config.get("n_positions", 0), "l": config.get("conv_L_cache", 0),
        }  # fmt: skip
        return size | (_latent_sizes(config) if "kv_lora_rank" in config else {})

    def of(self, row: Row, layer: int) -> tuple[int, ...]:
        """The shape of a row's tensor in the GGUF file; ``layer`` as for ``names``."""
        size = self.by_layer[layer] if self.by_layer and layer >= 0 else self.size
        return tuple(size[letter] for letter in row.shape)

    def source(self, row: Row, layer: int) -> tuple[int, ...]:
        """The shape of the tensor (of each, where several are stacked) in the checkpoint."""
        if row.source:
            return tuple(self.size[letter] for letter in row.source)
        shape = list(self.of(row, layer))
        if len(shape) > 1:
            shape[-2] *= row.part[1]
        return tuple(shape[1:] if "*" in row.hf else shape)

    def expects(self, row: Row, layer: int) -> bool:
        """Whether a checkpoint of this configuration must have the row; ``layer`` as for ``names``."""
        if ("*" in row.hf and self.fused) or (row.gguf == "output.weight" and self.headless):
            return False
        return all(self._holds(word, layer) for word in row.when.split())

    def _holds(self, word: str, layer: int) -> bool:
        if word in ("dense", "sparse"):
            return (layer < self.dense) == (word == "dense")
        if word in ("attention", "conv"):
            return self.kinds[layer] == word
        if word == "next":
            return layer >= self.last
        if word == "kv":
            return layer < self.last - int(self.config["num_kv_shared_layers"])
        if word == "values":
            return not (self.config.get("attention_k_eq_v") and self.config["layer_types"][layer] == "full_attention")
        if word in ("fused", "?"):
            return word == "fused" and self.fused
        return not self.config.get(word[1:]) if word.startswith("!") else bool(self.config.get(word))

    def count(self, row: Row) -> int:
        return self.size["e"] if "*" in row.hf else 1

    def names(self, row: Row, layer: int) -> Iterator[str]:
        """The checkpoint's names of a row; ``layer`` is -1 outside the layers."""
        prefix = "" if layer < 0 else f"{self.rules.prefix}{layer}."
        return (prefix + row.hf.replace("*", str(i)) for i in range(self.count(row)))


def expected_tensors(config: Mapping[str, Any]) -> list[tuple[str, tuple[int, ...]]]:
    """HF names and shapes that a configuration implies, in the order of a checkpoint's files."""
    rules = family(config, "model.config")
    return every(Shapes(settings(config, rules), rules, "model.config"))


def every(shapes: Shapes) -> list[tuple[str, tuple[int, ...]]]:
    found: dict[str, tuple[int, ...]] = {}
    for layer, rows in ((-1, shapes.rules.outer), *((i, shapes.rules.layer) for i in range(shapes.layers))):
        for row in rows:
            if shapes.expects(row, layer):
                found |= dict.fromkeys(shapes.names(row, layer), shapes.source(row, layer))
    return sorted(found.items())
