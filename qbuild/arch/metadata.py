"""The key-value pairs of llama.cpp's converter, in its order, and what llama-quantize makes of them.

Runs in a worker: transformers supplies config defaults (the converter reads them through AutoConfig, so they are part
of the file) and byte-level BPE tokenizers. Pairs are gathered as {what gguf's writer calls them: value}; giving one
twice keeps its first place. The type of the file is left out: llama-quantize replaces it.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from qbuild.arch import convert, hyperparameters, vocab
from qbuild.arch.shapes import family, text_part
from qbuild.checkpoint import Checkpoint
from qbuild.errors import ConfigError, InputError
from qbuild.gguffile import KV, GGUFType, decode_kv, encode_kv, value_type

__all__ = ["check_overrides", "metadata", "quantized_kvs"]

# Keys that the converter knows and the gguf package does not.
NEWER = {
    "normalizer_lowercase": "tokenizer.ggml.normalizer.lowercase",
    "normalizer_strip_accents": "tokenizer.ggml.normalizer.strip_accents",
}


def metadata(checkpoint: Checkpoint, name: str | None) -> list[KV]:
    """Every key-value pair of ``convert_hf_to_gguf.py``'s file for this checkpoint."""
    import gguf

    folder = checkpoint.root
    if folder is None:
        raise ValueError("BUG: metadata of a checkpoint that is not on disk")
    rules = family(checkpoint.config, checkpoint.source)
    arch, config = rules.arch, load_config(folder, bare=rules.bare)
    writer = gguf.GGUFWriter(None, arch)
    try:
        first, params = hyperparameters.parameters(arch, config, folder)
    except KeyError as error:
        fact = f"config.json has no {error.args[0]}"
        raise InputError(checkpoint.source, fact, "fetch config.json again; llama.cpp's converter stops too") from None
    _add(writer, first)
    _general(writer, checkpoint, folder, name)
    _add(writer, params)
    _add(writer, vocab.tokenizer(arch, folder, config))
    return [_kv(key, item) for key, item in writer.kv_data[0].items()]


def _add(writer: Any, values: dict[str, Any]) -> None:
    for name, value in values.items():
        if name in NEWER:
            writer.add_bool(NEWER[name], value)
        else:
            getattr(writer, f"add_{name}")(value)


def _kv(key: str, item: Any) -> KV:
    """gguf's value objects as raw entries; an array's item type is that of its first value unless it is named."""
    vtype = GGUFType(int(item.type))
    if vtype != GGUFType.ARRAY:
        return encode_kv(key, item.value, vtype)
    import gguf

    sub = item.sub_type or gguf.GGUFValueType.get_type(item.value[0])
    return encode_kv(key, item.value, vtype, GGUFType(int(sub)))


def load_config(folder: Path, *, bare: bool = False) -> dict[str, Any]:
    """The configuration with transformers' defaults, as the converter sees it; ``bare``: without them."""
    config: dict[str, Any] = vocab.read_json(folder / "config.json")
    if not bare:
        from transformers import AutoConfig

        with suppress(Exception):  # whatever it is, the converter goes on with the bare file
            config = AutoConfig.from_pretrained(folder, trust_remote_code=False).to_dict()
    return {**config, **text_part(config)}


def _general(writer: Any, checkpoint: Checkpoint, folder: Path, name: str | None) -> None:
    import gguf

    counts = _parameter_counts(convert.tensor_specs(checkpoint))
    meta = gguf.Metadata.load(None, folder, name, counts[0])
    # The converter's own copy of this class also reads the name that transformers gives this.
    penalty = (vocab.read_json(folder / "generation_config.json") or {}).get("repetition_penalty")
    if penalty is not None and meta.sampling_penalty_repeat is None:
        meta.sampling_penalty_repeat = penalty
    if meta.name is None:
        meta.name = folder.name
    if meta.size_label is None:
        meta.size_label = gguf.size_label(*counts)
    writer.add_type(gguf.GGUFType.MODEL)
    meta.set_gguf_meta_model(writer)


def _parameter_counts(specs: Sequence[convert.TensorSpec]) -> tuple[int, int, int, int]:
    """(all weights, those outside experts, those of one expert, experts)."""
    experts = [s for s in specs if "_exps." in s.name and len(s.shape) >= 3]
    total = sum(s.weights for s in specs)
    counts = [s.shape[-2 if ".bias" in s.name else -3] for s in experts]
    one = sum(s.weights // count for s, count in zip(experts, counts, strict=True))
    return total, total - sum(s.weights for s in experts), one, sum(counts) // len(counts) if counts else 0


Noted = tuple[str, str | None, int, int]
Override = tuple[str, bool | int | float | str]
OVERRIDES = {bool: GGUFType.BOOL, int: GGUFType.UINT32, float: GGUFType.FLOAT32, str: GGUFType.STRING}
INTEGERS = (GGUFType.UINT8, GGUFType.INT8, GGUFType.UINT16, GGUFType.INT16, GGUFType.UINT32, GGUFType.INT32,
            GGUFType.UINT64, GGUFType.INT64)  # fmt: skip
LIKE = {GGUFType.FLOAT64: GGUFType.FLOAT32} | dict.fromkeys(INTEGERS, GGUFType.UINT32)


def quantized_kvs(
    kvs: Sequence[KV],
    file_type: int,
    imatrix: Noted | None = None,
    overrides: Sequence[Override] = (),
    blocks: int | None = None,
) -> list[KV]:
    """What llama-quantize writes: the source's pairs, then version and file type, the user's pairs, what it notes of
    an importance matrix, and the number of layers that pruning leaves; what comes later stands there alone.

    ``imatrix``: file, data set, entries and chunks (texts cut to 127 bytes). split.* are dropped.
    """
    version = encode_kv("general.quantization_version", 2, GGUFType.UINT32)
    added = [version, encode_kv("general.file_type", file_type, GGUFType.UINT32)]
    added += [encode_kv(key, value, OVERRIDES[type(value)]) for key, value in overrides]
    added += _matrix_kvs(imatrix) if imatrix is not None else []
    if blocks is not None:
        arch = next(decode_kv(kv) for kv in kvs if kv.key == "general.architecture")
        added.append(encode_kv(f"{arch}.block_count", blocks, GGUFType.UINT32))
    found: dict[str, KV] = {kv.key: kv for kv in kvs if not kv.key.startswith("split.")}
    for kv in added:
        found.pop(kv.key, None)
        found[kv.key] = kv
    return list(found.values())


def check_overrides(kvs: Sequence[KV], overrides: Sequence[Override], place: str) -> None:
    """A key that is there keeps its kind of value: no loader reads it as another. Raises ConfigError."""
    types = {kv.key: value_type(kv) for kv in kvs}
    for key, value in overrides:
        there, given = types.get(key), OVERRIDES[type(value)]
        if there is not None and LIKE.get(there, there) != given:
            fact = f"{value!r} would be written as {given.name}, the model has {there.name} there"
            raise ConfigError(f"{place}.{key}", fact, EXAMPLES.get(LIKE.get(there, there), "leave it as it is"))


EXAMPLES = {
    GGUFType.UINT32: "write a whole number: 8", GGUFType.FLOAT32: "write a number with a point: 8.0",
    GGUFType.BOOL: "write true or false", GGUFType.STRING: "write it in quotes",
}  # fmt: skip


def _matrix_kvs(noted: Noted) -> list[KV]:
    file, dataset, entries, chunks = noted
    texts = {"file": file} | ({"dataset": dataset} if dataset is not None else {})
    numbers = {"entries_count": entries} | ({"chunks_count": chunks} if chunks > 0 else {})
    found = [_noted(name, text.encode()[:127].decode("utf-8", "surrogateescape")) for name, text in texts.items()]
    return [*found, *(encode_kv(f"quantize.imatrix.{name}", n, GGUFType.UINT32) for name, n in numbers.items())]


def _noted(name: str, text: str) -> KV:
    return encode_kv(f"quantize.imatrix.{name}", text, GGUFType.STRING)
