"""The directory that a quantized checkpoint is: every file, every byte's place, known before a weight is read.

Shards are filled in the order of the model (embedding, layers, norm, head) up to ``max_shard_size``, and all tensors of
a linear lie in one of them. Inside a file wider dtypes come first, as in files of the safetensors library: each tensor
is aligned to its dtype. Places are known, so tensors may be written in any order and one at a time.

The format: https://github.com/huggingface/safetensors#format.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from qbuild.checkpoint import INDEX, Checkpoint, SourceTensor
from qbuild.errors import ConfigError, InputError
from qbuild.quant.shapes import ITEM_SIZES, Scheme, Stored, packed, quantization_config, refusal

__all__ = ["DERIVED", "Directory", "Item", "OutFile", "OutTensor", "directory", "plain_dtype", "write"]

Chunk = bytes | bytearray | memoryview
NOT_COPIED = {"config.json", "README.md", "modules.json"}  # written anew, of another model, of an embedding model
DERIVED = ".rotary_emb.inv_freq"  # old checkpoints hold what every loader computes


@dataclass(frozen=True)
class OutTensor:
    """A tensor at ``offset`` bytes of its file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


@dataclass(frozen=True)
class Item:
    """What is made in one piece: the tensors of a linear, or one plain tensor.

    ``source``: checkpoint name of the plain tensor, or of the linear without ``.weight``; ``layer``: its decoder layer.
    """

    source: str
    linear: bool
    layer: int | None
    tensors: tuple[OutTensor, ...]


@dataclass(frozen=True)
class OutFile:
    """``header`` is what the file begins with; ``items`` are in the order of the model."""

    name: str
    header: bytes
    items: tuple[Item, ...]
    size: int


@dataclass(frozen=True)
class Directory:
    """``texts`` are small files by name, whole; ``copies`` are files of the source by name."""

    files: tuple[OutFile, ...]
    texts: Mapping[str, str]
    copies: Mapping[str, Path]

    @property
    def size(self) -> int:
        """Bytes of all files but the copies."""
        return sum(file.size for file in self.files) + sum(len(text.encode()) for text in self.texts.values())


def plain_dtype(checkpoint: Checkpoint, layout: str) -> str:
    """The dtype of what is not quantized: the model's own, but float16 where AWQ's kernels ask it or it is float32."""
    own = _main_dtype(checkpoint)
    return own if own == "BF16" and layout != "awq-gemm" else "F16"


def directory(
    checkpoint: Checkpoint,
    scheme: Scheme,
    linears: Iterable[str],
    *,
    place: str,
    max_shard_size: int,
    quantizer: str = "qbuild",
) -> Directory:
    """Lay out ``checkpoint`` with ``linears`` (checkpoint names without .weight) stored as ``scheme`` says.

    ``place`` is what an error names, ``targets.NAME``; ``max_shard_size`` is in bytes of tensors; ``quantizer`` is
    noted where the layout has a place for it. ConfigError where no loader would read the result, InputError where the
    checkpoint cannot be laid out.
    """
    if checkpoint.kind == "gguf":
        remedy = "name the directory of safetensors that it was made from"
        raise InputError(checkpoint.source, "a GGUF file has no safetensors to quantize", remedy)
    quantized = {name: _matrix(checkpoint, name) for name in linears}
    why = refusal(scheme, quantized)
    if why is not None:
        raise ConfigError(place, why, _remedy(scheme, quantized, place))
    shards = _shards(_items(checkpoint, scheme, quantized), max_shard_size)
    names = [f"model-{n + 1:05d}-of-{len(shards):05d}.safetensors" for n in range(len(shards))]
    files = tuple(_file(n, s) for n, s in zip(names if len(shards) > 1 else ["model.safetensors"], shards, strict=True))
    skipped = [t.name.removesuffix(".weight") for t in checkpoint.tensors.values() if _other_linear(t, quantized)]
    quantization = quantization_config(scheme, sorted(skipped, key=_natural), quantizer)
    texts = _texts(checkpoint.config, scheme, quantization)
    if len(files) > 1:
        texts[INDEX] = _index(files)
    return Directory(files, texts, {n: path for n, path in checkpoint.aux.items() if n not in NOT_COPIED})


def write(
    file: OutFile, put: Callable[[int, Chunk], object], get: Callable[[Item], Mapping[str, Iterable[Chunk]]]
) -> None:
    """Write one file: ``put(offset, bytes)`` its header, then what ``get`` gives for each item, by tensor name.

    One item is held at a time. A tensor that is not as long as planned is a bug, and told as one.
    """
    put(0, file.header)
    for item in file.items:
        made = get(item)
        for tensor in item.tensors:
            at = tensor.offset
            for chunk in made[tensor.name]:
                put(at, chunk)
                at += memoryview(chunk).nbytes
            if at != tensor.offset + tensor.nbytes:
                raise ValueError(f"BUG: {tensor.name} has {at - tensor.offset} bytes, planned were {tensor.nbytes}")


# tensors -------------------------------------------------------------------------------------------------------------


def _matrix(checkpoint: Checkpoint, linear: str) -> tuple[int, int]:
    """[out, in] of a linear that is to be quantized."""
    tensor = checkpoint.tensors.get(f"{linear}.weight")
    if tensor is None or len(tensor.shape) != 2:
        fact = f"{linear} is no matrix of its own" if tensor is None else f"{linear} is of shape {list(tensor.shape)}"
        remedy = "experts stacked in one tensor cannot be stored so yet: use target=gguf/q4_k_m"
        raise InputError(checkpoint.source, fact, remedy)
    return tensor.shape[0], tensor.shape[1]


def _items(checkpoint: Checkpoint, scheme: Scheme, quantized: Mapping[str, tuple[int, int]]) -> Iterable[Item]:
    """Every item in the order of the model, its tensors without a place yet."""
    main = _main_dtype(checkpoint)
    tied = bool(checkpoint.config.get("tie_word_embeddings"))
    for name in sorted(checkpoint.tensors, key=_order):
        tensor, linear = checkpoint.tensors[name], name.removesuffix(".weight")
        if name.endswith(DERIVED) or (tied and linear == "lm_head"):
            continue
        layer = _layer(name)
        if linear in quantized and linear != name:
            yield Item(linear, True, layer, _unplaced(packed(scheme, linear, *quantized[linear])))
            continue
        # What a 16-bit model keeps in float32 (a router's bias) needs it.
        dtype = scheme.dtype if tensor.dtype == main else tensor.dtype
        yield Item(name, False, layer, _unplaced([Stored(name, dtype, tensor.shape)]))


def _unplaced(stored: Iterable[Stored]) -> tuple[OutTensor, ...]:
    return tuple(OutTensor(t.name, t.dtype, t.shape, 0, t.nbytes) for t in stored)


def _main_dtype(checkpoint: Checkpoint) -> str:
    sizes: Counter[str] = Counter()
    for tensor in checkpoint.tensors.values():
        sizes[tensor.dtype] += tensor.nbytes
    return max(sorted(sizes), key=sizes.__getitem__)


def _other_linear(tensor: SourceTensor, quantized: Mapping[str, object]) -> bool:
    """Whether a tensor is a matrix inside a layer that stays as it is: a router, for one."""
    linear = tensor.name.removesuffix(".weight")
    inside = len(tensor.shape) == 2 and linear != tensor.name and _layer(tensor.name) is not None
    return inside and linear not in quantized


def _layer(name: str) -> int | None:
    """The number of the decoder layer that a tensor belongs to: the first in its name."""
    match = re.search(r"\.(\d+)\.", name)
    return int(match[1]) if match else None


def _order(name: str) -> tuple[int, list[tuple[int, str]]]:
    """Embedding, layers by number, what follows them, head."""
    if _layer(name) is not None:
        rank = 1
    elif name.startswith(("lm_head", "embed_out", "output")):
        rank = 3
    else:
        rank = 0 if re.search(r"embed|wte|wpe", name) else 2
    return rank, _natural(name)


def _natural(name: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in name.split(".")]


# files ---------------------------------------------------------------------------------------------------------------


def _shards(items: Iterable[Item], limit: int) -> list[list[Item]]:
    found: list[list[Item]] = []
    size = limit + 1
    for item in items:
        nbytes = sum(t.nbytes for t in item.tensors)
        if size + nbytes > limit:
            found.append([])
            size = 0
        found[-1].append(item)
        size += nbytes
    return found


def _file(name: str, items: list[Item]) -> OutFile:
    """A safetensors file: its header, and its items with their places."""
    tensors = [tensor for item in items for tensor in item.tensors]
    tensors.sort(key=lambda tensor: -ITEM_SIZES[tensor.dtype])
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    begins, at = {}, 0
    for t in tensors:
        begins[t.name] = at
        entries[t.name] = {"dtype": t.dtype, "shape": list(t.shape), "data_offsets": [at, at + t.nbytes]}
        at += t.nbytes
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    header = len(text).to_bytes(8, "little") + text
    placed = tuple(
        replace(i, tensors=tuple(replace(t, offset=len(header) + begins[t.name]) for t in i.tensors)) for i in items
    )
    return OutFile(name, header, placed, len(header) + at)


def _index(files: Iterable[OutFile]) -> str:
    tensors = {t.name: (t.nbytes, file.name) for file in files for item in file.items for t in item.tensors}
    total = sum(nbytes for nbytes, _ in tensors.values())
    where = {name: file for name, (_, file) in sorted(tensors.items())}
    return _json({"metadata": {"total_size": total}, "weight_map": where})


def _texts(config: Mapping[str, Any], scheme: Scheme, quantization: Mapping[str, Any]) -> dict[str, str]:
    texts = {"config.json": _json({**_typed(config, scheme.dtype), "quantization_config": quantization})}
    if scheme.layout.startswith("gptq"):
        texts["quantize_config.json"] = _json(quantization)  # AutoGPTQ and older vLLM look here
    return texts


def _typed(config: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """A config that names the dtype of its plain tensors, under the key that it had."""
    name = {"F16": "float16", "BF16": "bfloat16", "F32": "float32"}[dtype]
    key = "dtype" if "dtype" in config else "torch_dtype"
    found = {**config, key: name}
    inner = found.get("text_config")
    if isinstance(inner, Mapping) and not {"dtype", "torch_dtype"}.isdisjoint(inner):
        found["text_config"] = _typed(inner, dtype)
    return found


def _json(document: Mapping[str, Any]) -> str:
    return json.dumps(document, indent=2, ensure_ascii=False) + "\n"


def _remedy(scheme: Scheme, shapes: Mapping[str, tuple[int, int]], place: str) -> str:
    """The settings that are one change away and that a loader reads; empty where there are none."""
    changes: list[dict[str, Any]] = [{"layout": "gptq_v2"}, {"symmetric": True}, {"bits": 4}]
    changes += [{"group_size": size} for size in (128, 64, 32)]
    if not scheme.layout.startswith("gptq"):
        changes = changes[1:]
    ways = [c for c in changes if refusal(replace(scheme, **c), shapes) is None]
    return "\n".join(f"{place}.{key}={str(value).lower()}" for way in ways[:1] for key, value in way.items())
