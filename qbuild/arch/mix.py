"""Which tensor gets which type: the rules of ``llama-quantize`` (llama.cpp, ggml 0.25), as data and one walk.

Tensors are decided in llama-quantize's order, because its counters are: by layer number (-1 for those outside the
layers), then by name. A tensor that was typed by hand does not advance the counters.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass

from qbuild.arch.convert import ModelFacts, TensorSpec
from qbuild.errors import ConfigError
from qbuild.ggml import FILE_TYPES, QTYPES

__all__ = [
    "Mix", "choose", "kinds", "layers", "needs_imatrix", "order", "pruned", "quantizable", "quantized", "unmatched",
]  # fmt: skip


@dataclass(frozen=True)
class Mix:
    """A file type and what the user changed of it. ``tensor_types``: (regular expression, type), first match wins."""

    file_type: str
    output_type: str | None = None
    embedding_type: str | None = None
    tensor_types: tuple[tuple[str, str], ...] = ()
    pure: bool = False
    leave_output: bool = False
    has_imatrix: bool = False


# Parts of names whose tensors keep the type they have; names of a whole tensor stand below.
NEVER = (
    "_norm.weight", "ffn_gate_inp.weight", "ffn_gate_tid2eid.weight", "altup", "laurel", "per_layer_model_proj",
    "ssm_conv1d", "shortconv.conv.weight", "indexer.k_proj.weight", "indexer.q_proj.weight", "attn_rel_b.weight",
    *(f"time_mix_{part}.weight" for part in ("first", "decay_w1", "decay_w2", "lerp_fused")),
    *(f"time_mix_{letter}{n}.weight" for letter in "wva" for n in (0, 1, 2)),
    "time_mix_g1.weight", "time_mix_g2.weight",
    ".position_embd", "sam.pos_embd", "sam.neck.", "sam.net_", ".rel_pos", ".patch_embd", ".patch_merger",
    "a.rvq.codebook", "mm.a.code_embd",
)  # fmt: skip
NEVER_WHOLE = ("position_embd.weight", "token_types.weight")
NEVER_IN = {
    "glm5-next": (
        "hc_", "indexer.attn_q_b", "indexer.attn_k", "indexer.proj", "indexer_compressor_gate",
        "indexer_compressor_ape", "ssm_f_a.weight", "ssm_f_b.weight", "ssm_g_a.weight", "ssm_g_b.weight",
        "ssm_beta.weight", "attn_kv_a_mqa.weight", "attn_k_b.weight", "attn_v_b.weight",
    )
}  # fmt: skip
AT_LEAST_Q8 = {"glm5-next": ("attn_q_a", "attn_q_b", "nextn.eh_proj")}
CATEGORIES: tuple[
    tuple[str, Callable[[str], bool]], ...
] = (  # first match wins; the last three also hold for experts (ffn_up_exps, ffn_up_shexp)
    ("output", lambda n: n == "output.weight"),
    ("token_embd", lambda n: n in ("token_embd.weight", "per_layer_token_embd.weight")),
    ("v", lambda n: "attn_qkv.weight" in n),
    ("v", lambda n: "attn_kv_b.weight" in n),
    ("v", lambda n: "attn_v.weight" in n),
    ("k", lambda n: "attn_k.weight" in n),
    ("q", lambda n: "attn_q.weight" in n),
    ("o", lambda n: "attn_output.weight" in n),
    ("up", lambda n: "ffn_up" in n),
    ("gate", lambda n: "ffn_gate" in n),
    ("down", lambda n: "ffn_down" in n),
)
FALLBACK = {
    "Q2_K": "Q4_0", "Q3_K": "Q4_0", "TQ1_0": "Q4_0", "TQ2_0": "Q4_0", "Q2_0": "Q4_0",
    "Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0",
    **dict.fromkeys(("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ4_XS"), "IQ4_NL"),
}  # fmt: skip
NEED_IMATRIX = {"IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS"}
HARD_NEED = {"IQ1_S", "IQ2_XXS", "IQ2_XS"}
LOW = ("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ2_M")


def order(specs: Sequence[TensorSpec]) -> list[TensorSpec]:
    """llama-quantize's order of tensors."""
    return sorted(specs, key=lambda s: (_layer(s.name), s.name.encode()))


def _layer(name: str) -> int:
    match = re.match(r"blk\.(\d+)\.", name)
    return int(match[1]) if match else -1


def pruned(specs: Sequence[TensorSpec], layers: Collection[int], place: str) -> list[tuple[TensorSpec, str]]:
    """Every tensor that stays without ``layers``, in file order, with its name there: what follows moves up.

    Raises ConfigError for a layer that is not there, or where none would be left.
    """
    numbers = {spec.name: _NUMBER.search(spec.name) for spec in specs}
    here = sorted({int(match[1]) for match in numbers.values() if match})
    missing = sorted(set(layers).difference(here))
    if missing or (layers and len(set(layers)) == len(here)):
        fact = f"there is no layer {missing[0]}" if missing else "no layer would be left"
        raise ConfigError(place, fact, f"the model has layers 0 to {here[-1]}" if here else "the model has no layers")
    places = {layer: number for number, layer in enumerate(n for n in here if n not in layers)}
    found = []
    for spec in order(specs):
        match = numbers[spec.name]
        if match is None or not layers:
            found.append((spec, spec.name))
        elif (layer := int(match[1])) in places:
            found.append((spec, f"{spec.name[: match.start(1)]}{places[layer]}{spec.name[match.end(1) :]}"))
    return found


def layers(specs: Iterable[TensorSpec]) -> int:
    """How many layers there are."""
    return len({match[1] for spec in specs if (match := _NUMBER.search(spec.name))})


_NUMBER = re.compile(r"blk\.(\d+)\.")


def choose(specs: Sequence[TensorSpec], facts: ModelFacts, mix: Mix) -> list[tuple[TensorSpec, str]]:
    """Every tensor with its type, in file order."""
    walk = _Walk(specs, facts, mix)
    return [(spec, walk.type_of(spec)) for spec in order(specs)]


def quantized(specs: Sequence[TensorSpec], facts: ModelFacts, mix: Mix) -> list[str]:
    """Names of the tensors whose types ``mix.tensor_types`` can change: none in a file of floats."""
    every = QTYPES[FILE_TYPES[mix.file_type].base].quantized
    return [spec.name for spec in specs if every and quantizable(spec, facts)]


def unmatched(names: Sequence[str], mix: Mix) -> list[str]:
    """Patterns of ``mix.tensor_types`` that match none of ``names``: llama-quantize ignores them."""
    patterns = ((text, _pattern(text, mix.file_type)) for text, _ in mix.tensor_types)
    return [text for text, pattern in patterns if not any(map(pattern.search, names))]


def kinds(names: Iterable[str]) -> list[str]:
    """What tensors are called in every layer: ``blk.0.ffn_down.weight`` is ffn_down."""
    return list(dict.fromkeys(_NUMBER.sub("", name).rpartition(".")[0] for name in names))


def needs_imatrix(choices: Sequence[tuple[TensorSpec, str]], mix: Mix) -> str | None:
    """The first tensor whose type llama-quantize refuses to make without an importance matrix, or None.

    Embeddings and output are let through by that check, but ggml itself has no quantizer without one for three types.
    """
    for spec, type_ in choices:
        loose = category(spec.name) in ("token_embd", "output")
        if type_ in (HARD_NEED if loose else NEED_IMATRIX) and type_ != spec.stored:
            return spec.name
        if type_ == "Q2_K" and mix.file_type == "Q2_K_S" and not loose and type_ != spec.stored:
            return spec.name
    return None


def quantizable(spec: TensorSpec, facts: ModelFacts) -> bool:
    """Whether llama-quantize gives a tensor any other type than it has."""
    never = (*NEVER, *NEVER_IN.get(facts.arch, ()))
    if len(spec.shape) < 2 or not spec.name.endswith("weight") or spec.name in NEVER_WHOLE:
        return False
    return not any(part in spec.name for part in never)


def _pattern(text: str, place: str) -> re.Pattern[str]:
    """llama-quantize lower-cases patterns before it compiles them."""
    try:
        return re.compile(text.lower())
    except re.error as error:
        raise ConfigError(place, f"{text!r} is not a regular expression: {error}", "see tensor_types") from None


class _Walk:
    """One pass over the tensors: the counters of each category are its state."""

    def __init__(self, specs: Sequence[TensorSpec], facts: ModelFacts, mix: Mix) -> None:
        self.facts, self.mix = facts, mix
        self.name, self.base = mix.file_type, FILE_TYPES[mix.file_type].base
        names = [s.name for s in specs]
        self.n_v = sum(category(n) == "v" for n in names)
        self.tied = "output.weight" not in names
        self.seen: Counter[str] = Counter()
        self.patterns = [(_pattern(p, mix.file_type), t) for p, t in mix.tensor_types]

    def type_of(self, spec: TensorSpec) -> str:
        name, mix, quantized = spec.name, self.mix, QTYPES[self.base].quantized
        if not self._allowed(spec):
            return spec.stored
        kind = category(name)
        manual = next((t for pattern, t in self.patterns if pattern.search(name)), None) if quantized else None
        if kind == "token_embd" and mix.embedding_type and not (manual and name.startswith("per_layer")):
            return self._exactly(spec, mix.embedding_type)
        if kind == "output" and mix.output_type:
            return self._exactly(spec, mix.output_type)
        if not quantized:
            return self.base
        return self._fit(spec, manual or (self.base if mix.pure else self._mixed(spec, kind)))

    def _allowed(self, spec: TensorSpec) -> bool:
        return quantizable(spec, self.facts) and not (self.mix.leave_output and spec.name == "output.weight")

    def _fit(self, spec: TensorSpec, wanted: str) -> str:
        cols = spec.shape[-1]
        if cols % QTYPES[wanted].block == 0:
            chosen = wanted
        elif wanted in FALLBACK:
            chosen = FALLBACK[wanted] if cols % QTYPES[FALLBACK[wanted]].block == 0 else "F16"
        elif QTYPES[wanted].block == 32:
            chosen = "F16"
        else:
            raise self._misfit(spec, wanted, "tensor_types")
        return chosen

    def _exactly(self, spec: TensorSpec, wanted: str) -> str:
        """A type asked for by option has no fallback: llama-quantize stops at an assertion there."""
        if spec.shape[-1] % QTYPES[wanted].block:
            raise self._misfit(spec, wanted, "output_type" if spec.name == "output.weight" else "embedding_type")
        return wanted

    def _misfit(self, spec: TensorSpec, wanted: str, option: str) -> ConfigError:
        rows = f"takes rows of a multiple of {QTYPES[wanted].block} weights, it has {spec.shape[-1]}"
        return ConfigError(self.name, f"{spec.name}: {wanted} {rows}", f"choose another type: targets.<name>.{option}")

    # the mix ---------------------------------------------------------------------------------------------------------

    def _mixed(self, spec: TensorSpec, kind: str) -> str:
        if any(part in spec.name for part in AT_LEAST_Q8.get(self.facts.arch, ())):
            return "Q8_0"
        if kind == "output" or (kind == "token_embd" and self.tied):
            if kind == "token_embd" and self.mix.output_type:
                return self.mix.output_type
            return self._head(spec)
        if self.name == "MXFP4_MOE":
            experts = len(spec.shape) > 2 and (self.facts.arch != "bailingmoe3" or kind in ("up", "gate", "down"))
            return "MXFP4" if experts else "Q8_0"
        if kind == "token_embd":
            return self._embedding()
        low = self._low(kind) if self.name in LOW else None
        rule = RULES.get(kind)
        chosen = low or (rule(self, self._index(spec, kind)) if rule else None) or self.base
        if kind == "v" and self.name not in LOW:
            chosen = self._v_after(chosen)
        if kind in ("v", "k", "down", "up", "gate"):
            self.seen[kind] += 1
        return chosen

    def _index(self, spec: TensorSpec, kind: str) -> int:
        if kind in ("down", "up", "gate") and self.facts.n_expert > 1:
            return _layer(spec.name)
        return self.seen[kind]

    def _head(self, spec: TensorSpec) -> str:
        if self.name == "MXFP4_MOE" or self.facts.arch == "falcon" or spec.shape[-1] % QTYPES[self.base].block:
            return "Q8_0"
        if self.name in (*LOW, "IQ3_XXS"):
            return "Q5_K"
        return "Q8_0" if self.base == "Q8_0" else "Q6_K"

    def _embedding(self) -> str:
        if self.name in ("IQ2_XXS", "IQ2_XS", "IQ1_S", "IQ1_M"):
            return "Q2_K"
        if self.name in ("IQ2_S", "IQ2_M", "IQ3_XXS"):
            return "IQ3_S"
        return "Q4_K" if self.name in ("TQ1_0", "TQ2_0", "Q2_0") else self.base

    def _low(self, kind: str) -> str | None:
        """The 1 and 2 bit file types have rules of their own."""
        better = "IQ3_S" if self.name in ("IQ2_S", "IQ2_M") else "Q2_K"
        if kind == "v":
            return "Q4_K" if self.gqa >= 4 or self.facts.n_expert >= 4 else better
        if kind == "k" and self.facts.n_expert == 8:
            return "Q4_K"
        if kind == "down" and self.seen[kind] < self.eighth:
            return better
        if kind == "o":
            if self.facts.n_expert == 8:
                return "Q5_K"
            return {"IQ1_S": "IQ2_XXS", "IQ1_M": "IQ2_XXS", "IQ2_S": "IQ3_S", "IQ2_M": "IQ3_S"}.get(self.name)
        return self.base

    @property
    def gqa(self) -> int:
        return self.facts.n_head // self.facts.n_head_kv if self.facts.n_head_kv else 0

    @property
    def eighth(self) -> int:
        return self.facts.n_layer // 8

    @property
    def experts(self) -> bool:
        return self.facts.n_expert == 8

    def more(self, index: int, total: int) -> bool:
        return index < total // 8 or index >= 7 * total // 8 or (index - total // 8) % 3 == 2

    def _v_after(self, chosen: str) -> str:
        if self.facts.is_70b and chosen in ("Q3_K", "Q4_K"):
            chosen = "Q5_K"
        return "Q8_0" if self.experts else chosen


def category(name: str) -> str:
    return next((kind for kind, test in CATEGORIES if test(name)), "")


def _v(w: _Walk, i: int) -> str | None:
    gqa4 = w.gqa >= 4
    match w.name:
        case "Q2_K":
            return "Q4_K" if gqa4 else "Q3_K"
        case "Q2_K_S" | "IQ3_XS" | "IQ3_S":
            return "Q4_K" if gqa4 else None
        case "IQ3_XXS":
            return "Q4_K" if gqa4 else ("IQ3_XXS" if w.mix.has_imatrix else "IQ3_S")
        case "IQ3_M":
            return "Q4_K"
        case "Q3_K_M":
            return "Q5_K" if i < 2 else "Q4_K"
        case "Q3_K_L":
            return "Q5_K"
        case "IQ4_NL" | "IQ4_XS":
            return "Q5_K" if gqa4 else None
        case "Q4_K_M" | "Q5_K_M":
            return "Q6_K" if w.more(i, w.n_v) else None
        case "Q4_K_S":
            return "Q5_K" if i < 4 else None
    return None


def _qk(w: _Walk, _: int) -> str | None:
    return {"IQ3_XS": "IQ3_XXS", "IQ3_XXS": "IQ2_S"}.get(w.name)


def _k(w: _Walk, i: int) -> str | None:
    return "Q8_0" if w.experts else _qk(w, i)


def _down(w: _Walk, i: int) -> str | None:
    n, falcon, early = w.facts.n_layer, w.facts.arch == "falcon", i < w.eighth
    match w.name:
        case "Q2_K":
            return "Q3_K"
        case "Q2_K_S":
            return "Q4_K" if early else None
        case "IQ3_XXS":
            return None if w.mix.has_imatrix else ("Q4_K" if early else "Q3_K")
        case "Q3_K_M":
            if i < n // 16:
                return "Q5_K"
            return "Q4_K" if not falcon or w.more(i, n) else "Q3_K"
        case "IQ3_M":
            return "Q4_K" if early or (w.experts and w.more(i, n)) else None
        case "Q3_K_L":
            return "Q4_K" if falcon else "Q5_K"
        case "Q4_K_M":
            if falcon:
                return "Q6_K" if i < n // 16 else ("Q5_K" if w.more(i, n) else None)
            return "Q6_K" if w.more(i, n) else None
        case "IQ4_NL" | "IQ4_XS":
            return "Q5_K" if early and not w.mix.has_imatrix else None
        case "Q5_K_M":
            return "Q6_K" if w.more(i, n) else None
        case "Q4_K_S":
            return "Q5_K" if early and not falcon else None
        case "Q4_0" | "Q5_0":
            return {"Q4_0": "Q4_1", "Q5_0": "Q5_1"}[w.name] if early and w.mix.has_imatrix else None
    return None


def _o(w: _Walk, _: int) -> str | None:
    if w.facts.arch == "falcon":
        return "Q4_K" if w.name == "Q3_K_L" else None
    five = ("Q2_K", "IQ3_XS", "IQ3_XXS", "Q3_K_S", "Q3_K_M", "IQ4_NL", "Q4_K_S", "Q4_K_M", "IQ3_S", "IQ3_M", "IQ4_XS")
    if w.experts:
        return "Q5_K" if w.name in five else None
    return {"Q2_K": "Q3_K", "IQ3_XXS": "IQ3_S", "Q3_K_M": "Q4_K", "Q3_K_L": "Q5_K", "IQ3_M": "Q4_K"}.get(w.name)


def _gate_up(w: _Walk, i: int) -> str | None:
    return "IQ3_XXS" if w.name == "IQ3_XS" and w.eighth <= i < 7 * w.facts.n_layer // 8 else None


RULES: dict[str, Callable[[_Walk, int], str | None]] = {
    "v": _v, "k": _k, "q": _qk, "down": _down, "o": _o, "gate": _gate_up, "up": _gate_up,
}  # fmt: skip
