"""HF checkpoint → GGUF tensors: names, shapes, sources and the type the converter stores. Headers and config only."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np

from qbuild.arch.families import Family, Row
from qbuild.arch.shapes import CONVERT_ELSEWHERE, Shapes, every, family, of_full_attention, rotated, settings
from qbuild.checkpoint import Checkpoint, SourceTensor
from qbuild.errors import ConfigError, InputError
from qbuild.gguffile import decode_kv

OUTTYPES = ("auto", "F32", "F16", "BF16")


@dataclass(frozen=True)
class Piece:
    """Rows ``start`` to ``stop`` (None: to the end) of a source tensor seen as [rows, columns of what it becomes]."""

    source: str
    start: int = 0
    stop: int | None = None


@dataclass(frozen=True)
class Transform:
    """What happens to rows on their way: ``none``, or

    ``permute``: the rows of each head go from halves to pairs, which undoes what HF did to q and k;
    ``qkv``: a bias whose heads hold q, k and v in turn becomes all q, all k, all v;
    ``transpose``: each matrix of ``unit`` rows comes from one of ``unit`` columns;
    ``add_one``: in the arithmetic of the source's type, except that bfloat16 is widened first.
    """

    kind: str = "none"
    unit: int = 1  # rows that belong together: those of one head, or one matrix

    def apply(self, chunk: np.ndarray) -> np.ndarray:
        """Transform whole units of rows; ``chunk`` is [rows, cols], bfloat16 as uint16."""
        if self.kind == "add_one":
            if chunk.dtype == np.uint16:
                chunk = (chunk.astype(np.uint32) << 16).view(np.float32)
            more: np.ndarray = chunk + chunk.dtype.type(1)
            return more
        if self.kind == "transpose":
            matrices = chunk.reshape(-1, chunk.shape[1], self.unit).swapaxes(1, 2)
            return np.ascontiguousarray(matrices).reshape(chunk.shape)
        if self.kind == "qkv":
            return np.ascontiguousarray(chunk.reshape(-1, 3, self.unit).swapaxes(0, 1)).reshape(chunk.shape)
        if self.kind != "permute":
            return chunk
        if chunk.shape[0] == 1:  # a bias: its elements are its rows
            return self.apply(chunk.reshape(-1, 1)).reshape(1, -1)
        rows, cols = chunk.shape
        pairs = chunk.reshape(rows // self.unit, 2, self.unit // 2, cols).swapaxes(1, 2)
        return np.ascontiguousarray(pairs).reshape(rows, cols)


@dataclass(frozen=True)
class TensorSpec:
    name: str
    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]
    transform: Transform
    stored: str
    data: bytes | None = None

    @property
    def weights(self) -> int:
        return prod(self.shape)


@dataclass(frozen=True)
class ModelFacts:
    arch: str
    n_layer: int
    n_head: int
    n_head_kv: int
    n_expert: int
    is_70b: bool
    parameters: int


NUMBER = re.compile(r"\.(0|[1-9]\d*)\.")  # of an expert

# What llama.cpp's converter leaves out of every text model: buffers, and the parts that see and hear.
BUFFERS = (".attention.masked_bias", ".attention.bias", ".rotary_emb.inv_freq")
MASK = re.compile(r"h\.\d+\.attn\.(masked_)?bias")  # of the first GPT-2 files, at which the converter stops
OTHER_STARTS = (
    "mlp", "vit.", "vpm.", "siglip2.", "conformer.", "merger.", "resampler.", "sound_encoder.", "sound_projection.",
    "speech_embeddings.",
)  # fmt: skip
OTHER_PARTS = (
    "visual.", "vision.", "audio.", "talker.", "vision_", "audio_", "token2wav.", "code2wav.", "projector.",
    "pre_mm_projector_norm", "image_newline", "view_seperator", "patch_embed", "patch_merger.", "patch_merge_mlp.",
    "model.connector.",
)  # fmt: skip


def _text_name(name: str, rules: Family) -> str | None:
    """A tensor's name as a text model has it, or None for what does not belong to the text model."""
    if name.endswith(BUFFERS) or name.startswith(OTHER_STARTS) or any(part in name for part in OTHER_PARTS):
        return None
    if MASK.fullmatch(name.removeprefix("transformer.")):
        return None
    name = name.removeprefix(rules.above).replace("language_model.", "").replace("text_model.", "")
    return None if name.startswith(rules.dropped) else name


def tensor_specs(checkpoint: Checkpoint, outtype: str = "auto") -> list[TensorSpec]:
    """Every tensor of the converter's file, in its order."""
    if checkpoint.kind == "gguf":
        return [_verbatim(t) for t in checkpoint.tensors.values()]
    return _Converter(checkpoint, outtype).specs()


def _verbatim(tensor: SourceTensor) -> TensorSpec:
    return TensorSpec(tensor.name, _trimmed(tensor.shape), (Piece(tensor.name),), Transform(), tensor.dtype)


def _trimmed(shape: tuple[int, ...]) -> tuple[int, ...]:
    """ggml does not count outer dimensions of one."""
    while len(shape) > 1 and shape[0] == 1:
        shape = shape[1:]
    return shape


class _Converter:
    """One walk over a checkpoint's tensors, which gathers those that are stacked."""

    def __init__(self, checkpoint: Checkpoint, outtype: str) -> None:
        self.checkpoint, self.place = checkpoint, checkpoint.source
        self.rules = family(checkpoint.config, self.place)
        self.config = settings(checkpoint.config, self.rules)
        self.shapes = Shapes(self.config, self.rules, self.place)
        self.shapes.headless = self.rules.pools and "embed_tokens.weight" in checkpoint.tensors
        above = "model." if self.shapes.headless else ""
        named = ((_text_name(above + tensor.name, self.rules), tensor) for tensor in checkpoint.tensors.values())
        self.tensors = {name: tensor for name, tensor in named if name}
        if self.rules.one_head and self.config.get("tie_word_embeddings"):
            self.tensors.pop("lm_head.weight", None)
        self.shapes.fused = any(name.endswith("mlp.experts.down_proj") for name in self.tensors)
        self.matrix = _matrix_type(self.tensors.values(), outtype)
        self.waiting: dict[str, int] = {}  # a layer's stacks -> how many of their tensors were seen

    def specs(self) -> list[TensorSpec]:
        _check_complete(self.tensors, self.shapes, self.place)
        found = [*_rope_tensors(self.rules, self.config, self.place)]
        layer_rows, outer_rows = _by_name(self.rules.layer), _by_name(self.rules.outer)
        layered = re.compile(re.escape(self.rules.prefix) + r"(0|[1-9]\d*)\.(.+)")
        for name in self.tensors:
            match = layered.fullmatch(name)
            layer, rest = (int(match[1]), match[2]) if match else (-1, name)
            if layer >= self.shapes.layers and self.rules.spare_layers:
                continue
            number = NUMBER.search(rest) if match else None
            rows = (layer_rows if match else outer_rows).get(NUMBER.sub(".*.", rest), [])
            rows = [row for row in rows if self.shapes.expects(row, layer)] or rows
            if not rows or layer >= self.shapes.layers or (number and int(number[1]) >= self.shapes.count(rows[0])):
                fact = f"tensor {name} does not belong to {self.rules.arch}"
                raise InputError(self.place, fact, "check config.json's architectures")
            found += self._stacked(rows[0], layer) if number else [self._spec(row, layer) for row in rows]
        return found

    def _stacked(self, row: Row, layer: int) -> list[TensorSpec]:
        """A layer's stacks once its last tensor came: all of those whose names begin alike, in their rows' order."""
        start = row.hf.partition("*")[0]
        rows = [r for r in self.rules.layer if r.hf.startswith(start) and "*" in r.hf]
        key = f"{layer} {start}"
        self.waiting[key] = self.waiting.get(key, 0) + 1
        complete = self.waiting[key] == sum(self.shapes.count(r) for r in rows)
        return [self._spec(r, layer) for r in rows] if complete else []

    def _spec(self, row: Row, layer: int) -> TensorSpec:
        sources = [self.tensors[name] for name in self.shapes.names(row, layer)]
        if len({source.dtype for source in sources}) > 1:
            fact = f"tensors {sources[0].name} and its likes are stored in different types"
            raise InputError(self.place, fact, "save the checkpoint again in one dtype")
        name = row.gguf if layer < 0 else f"blk.{layer}.{row.gguf}"
        shape = self._shape(row, layer, sources)
        single = len(shape) < 2 or name.endswith("_norm.weight") or not name.endswith(".weight")
        stored = "F32" if single or row.gguf in ALWAYS_F32 else self.matrix
        pieces = tuple(piece for source in sources for piece in self._pieces(row, source))
        return TensorSpec(name, _trimmed(shape), pieces, self._transform(row), stored)

    def _shape(self, row: Row, layer: int, sources: Sequence[SourceTensor]) -> tuple[int, ...]:
        """What the tensors make, so that what is not checked against the configuration is still what is there."""
        if row.source:
            return self.shapes.of(row, layer)
        shape = list(sources[0].shape)
        if row.part[1] > 1:
            shape[-2] //= row.part[1]
        if row.gguf == "token_embd.weight" and self.rules.real_rows:
            shape[0] = min(shape[0], self._vocabulary())
        return (len(sources), *shape) if "*" in row.hf else tuple(shape)

    def _vocabulary(self) -> int:
        """Tokens of the tokenizer, as the converter counts them for Gemma 3."""
        path = self.checkpoint.aux.get("tokenizer.json")
        if path is None or "tokenizer.model" in self.checkpoint.aux:
            return int(self.config["vocab_size"])
        found = json.loads(path.read_text(encoding="utf-8"))
        return len(found["model"]["vocab"]) + len(found["added_tokens"])

    def _pieces(self, row: Row, source: SourceTensor) -> Iterator[Piece]:
        rows = prod(source.shape[:-1])
        which, of = row.part
        if of > 1:  # rows which/of of every matrix
            each = source.shape[-2]
            for start in range(0, rows, each):
                yield Piece(source.name, start + which * each // of, start + (which + 1) * each // of)
        elif (
            row.change == "qkv" and len(source.shape) > 1
        ):  # each head's q, k and v rows: all q, then all k, then all v
            head = self.shapes.size["d"]
            for part in range(3):
                yield from (Piece(source.name, at, at + head) for at in range(part * head, rows, 3 * head))
        elif row.change in ("k_b", "v_b"):
            yield from self._latent_pieces(row, source)
        elif row.gguf == "token_embd.weight" and self.rules.real_rows:
            yield Piece(source.name, 0, min(rows, self._vocabulary()))
        else:
            yield Piece(source.name)

    def _latent_pieces(self, row: Row, source: SourceTensor) -> Iterator[Piece]:
        """Each head's rows for keys, or for values; keys are transposed, so their rows count in their new columns."""
        n, plain, values, rank = (self.shapes.size[letter] for letter in "nowr")
        if row.change == "v_b":
            heads = range(plain, n * (plain + values), plain + values)
            yield from (Piece(source.name, at, at + values) for at in heads)
            return
        if values * rank % plain:
            fact = f"heads of {plain} and {values} with a rank of {rank} are not supported"
            raise InputError(self.place, fact, CONVERT_ELSEWHERE)
        heads = range(0, n * (plain + values) * rank // plain, (plain + values) * rank // plain)
        yield from (Piece(source.name, at, at + rank) for at in heads)

    def _transform(self, row: Row) -> Transform:
        if row.change == "transpose":
            return Transform("transpose", self.shapes.of(row, -1)[0])
        if row.change == "k_b":
            return Transform("transpose", self.shapes.size["r"])
        if row.change in ("permute_q", "permute_k"):
            return Transform("permute", self.shapes.size["d"])
        if row.change == "qkv" and len(row.shape) == 1:
            return Transform("qkv", self.shapes.size["d"])
        return Transform(row.change) if row.change == "add_one" else Transform()


ALWAYS_F32 = ("ffn_gate_inp.weight", "ffn_gate_inp_shexp.weight", "shortconv.conv.weight", "position_embd.weight")


def _by_name(rows: Iterable[Row]) -> dict[str, list[Row]]:
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(row.hf, []).append(row)
    return found


def _matrix_type(tensors: Iterable[SourceTensor], outtype: str) -> str:
    """The converter's --outtype: auto is the type of the first matrix that is bf16 or f16; f16 if there is none."""
    if outtype not in OUTTYPES:
        raise ConfigError("model.outtype", f"{outtype!r} is not a type", "one of: " + ", ".join(OUTTYPES))
    if outtype != "auto":
        return outtype
    matrices = (t.dtype for t in tensors if len(t.shape) >= 2)
    return next((dtype for dtype in matrices if dtype in ("BF16", "F16")), "F16")


def _rope(config: Mapping[str, Any]) -> dict[str, Any]:
    """Rope settings, in one place or spread over the config; those of full attention where layers differ."""
    rope = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    rope = dict(rope.get("full_attention", rope))
    rope.setdefault("rope_type", rope.get("type", ""))
    for name in ("rope_theta", "partial_rotary_factor"):
        if rope.get(name) is None and config.get(name) is not None:
            rope[name] = config[name]
    old = config.get("original_max_position_embeddings") or rope.get("original_max_position_embeddings")
    rope["original_max_position_embeddings"] = old or config.get("max_position_embeddings")
    return rope


def _rope_tensors(rules: Family, config: Mapping[str, Any], place: str) -> list[TensorSpec]:
    rope = _rope(config)
    if rules.rope == "llama3" and rope["rope_type"] == "llama3":
        return [_generated("rope_freqs.weight", _llama3_factors(config, rope))]
    if rules.rope == "!llama3" and rope["rope_type"] == "llama3":
        fact = f"{rules.arch} with a rope scaling of Llama 3 is not supported"
        raise InputError(place, fact, "llama.cpp's converter stops too")
    if rules.rope == "proportional":
        return [_generated("rope_freqs.weight", _proportional_factors(config, rope))]
    if rules.rope == "longrope" and rope.get("long_factor"):
        factors = {n: np.array(rope[f"{n}_factor"], np.float32) for n in ("long", "short")}
        pairs = rotated(config, rope.get("partial_rotary_factor", 1.0)) // 2
        if {len(f) for f in factors.values()} != {pairs}:
            lengths = " and ".join(str(len(f)) for f in factors.values())
            fact = f"rope_scaling has {lengths} factors, the heads need {pairs}"
            raise InputError(place, fact, "fetch config.json again")
        return [_generated(f"rope_factors_{n}.weight", f) for n, f in factors.items()]
    return []


def _generated(name: str, values: np.ndarray) -> TensorSpec:
    return TensorSpec(name, values.shape, (), Transform(), "F32", values.tobytes())


def _proportional_factors(config: Mapping[str, Any], rope: Mapping[str, Any]) -> np.ndarray:
    """Gemma 4's full attention rotates pairs of a head that are spread over it: a factor stops the others."""
    head = of_full_attention(config, "head_dim", "global_head_dim") or 512
    turning = int(head * rope.get("partial_rotary_factor", 0.25) / 2)
    return np.array([1.0] * turning + [1e30] * (head // 2 - turning), np.float32)


def _llama3_factors(config: Mapping[str, Any], rope: Mapping[str, Any]) -> np.ndarray:
    """Llama 3's frequency factors, in float32 as PyTorch computes them."""
    dim = config.get("head_dim", config["hidden_size"] // config["num_attention_heads"])
    # PyTorch's float32 power is the rounded exact one here; NumPy's is not, in one value of five.
    exponents = (np.arange(0, dim, 2, dtype=np.float32) / np.float32(dim)).astype(np.float64)
    f32 = np.float32
    freqs = f32(1) / np.power(np.float64(rope.get("rope_theta", 10000.0)), exponents).astype(np.float32)
    factor, low, high = rope.get("factor", 8.0), rope.get("low_freq_factor", 1.0), rope.get("high_freq_factor", 4.0)
    old = rope["original_max_position_embeddings"] or 8192
    factors = []
    for freq in freqs:
        wavelen = f32(1) / freq * f32(2 * np.pi)  # PyTorch divides a number by a tensor that way: two roundings
        if wavelen < old / high:
            factors.append(1.0)
        elif wavelen > old / low:
            factors.append(factor)
        else:
            smooth = (f32(1) / wavelen * f32(old) - f32(low)) / f32(high - low)
            factors.append(f32(1) / ((f32(1) - smooth) / f32(factor) + smooth))
    return np.array(factors, np.float32)


def _check_complete(tensors: Mapping[str, SourceTensor], shapes: Shapes, place: str) -> None:
    for name, shape in every(shapes):
        found = tensors.get(name)
        if found is None:
            raise InputError(place, f"tensor {name} is missing", "the checkpoint is incomplete: fetch it again")
        if found.shape != shape:
            fact = f"tensor {name} has shape {list(found.shape)}, the config says {list(shape)}"
            raise InputError(place, fact, "config.json and weights do not belong together")


# Models that llama.cpp takes for a 70B, by their layers.
LAYERS_OF_70B = {"llama": 80, "deci": 80, "olmo": 80, "qwen2": 80, "jais2": 68}


def model_facts(checkpoint: Checkpoint) -> ModelFacts:
    if checkpoint.kind == "gguf":
        arch, n_layer, n_head, n_kv, n_expert = _gguf_facts(checkpoint)
    else:
        rules = family(checkpoint.config, checkpoint.source)
        shapes = Shapes(settings(checkpoint.config, rules), rules, checkpoint.source)
        arch, n_layer, n_expert = rules.arch, shapes.layers, shapes.size["e"]
        n_head, n_kv = shapes.size["n"], 1 if rules.one_kv_head else shapes.size["g"]
        if shapes.kinds[0] != "attention":
            n_kv = 0  # llama-quantize looks at the first layer
    is_70b = LAYERS_OF_70B.get(arch) == n_layer and (arch != "llama" or n_head != n_kv)
    parameters = sum(prod(t.shape) for t in checkpoint.tensors.values())
    return ModelFacts(arch, n_layer, n_head, n_kv, n_expert, is_70b, parameters)


def _gguf_facts(checkpoint: Checkpoint) -> tuple[str, int, int, int, int]:
    kvs = {kv.key: kv for kv in checkpoint.kvs}
    if "general.architecture" not in kvs:
        raise InputError(checkpoint.source, "has no general.architecture", "it is not a model: choose another file")
    arch = decode_kv(kvs["general.architecture"])

    def read(name: str, default: int) -> int:
        kv = kvs.get(f"{arch}.{name}")
        value = default if kv is None else decode_kv(kv)
        return int(value[0] if isinstance(value, list) else value)

    n_head = read("attention.head_count", 1)
    n_kv = read("attention.head_count_kv", n_head)
    return arch, read("block_count", 0), n_head, n_kv, read("expert_count", 0)
