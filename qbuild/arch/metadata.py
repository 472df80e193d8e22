"""The key-value pairs of llama.cpp's converter, in its order, and what llama-quantize makes of them.

Runs in a worker: transformers supplies config defaults (the converter reads them through AutoConfig, so they are part
of the file) and byte-level BPE tokenizers.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qbuild.arch import convert, vocab
from qbuild.checkpoint import Checkpoint
from qbuild.gguffile import KV, GGUFType, encode_kv


def metadata(checkpoint: Checkpoint, name: str | None) -> list[KV]:
    """Every key-value pair of ``convert_hf_to_gguf.py``'s file for this checkpoint."""
    import gguf

    folder = checkpoint.root
    if folder is None:
        raise ValueError("BUG: metadata of a checkpoint that is not on disk")
    rules = convert.family(checkpoint.config, checkpoint.source)
    writer = gguf.GGUFWriter(None, rules.arch)
    _general(writer, checkpoint, folder, name)
    config = hparams(folder)
    _parameters(writer, config)
    writer.add_vocab_size(config["vocab_size"])
    writer.add_rope_dimension_count(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])
    _vocabulary(writer, folder, config)
    return [_kv(key, item) for key, item in writer.kv_data[0].items()]


def _kv(key: str, item: Any) -> KV:
    """gguf's value objects as raw entries; an array's item type is that of its first value unless it is named."""
    vtype = GGUFType(int(item.type))
    if vtype != GGUFType.ARRAY:
        return encode_kv(key, item.value, vtype)
    import gguf

    sub = item.sub_type or gguf.GGUFValueType.get_type(item.value[0])
    return encode_kv(key, item.value, vtype, GGUFType(int(sub)))


def hparams(folder: Path) -> dict[str, Any]:
    """The configuration with transformers' defaults, as the converter sees it."""
    from transformers import AutoConfig

    try:
        config: dict[str, Any] = AutoConfig.from_pretrained(folder, trust_remote_code=False).to_dict()
    except (ValueError, OSError, KeyError):
        config = vocab.read_json(folder / "config.json")
    return {**config, **config.get("text_config", {})}


def _general(writer: Any, checkpoint: Checkpoint, folder: Path, name: str | None) -> None:
    import gguf

    weights = sum(spec.weights for spec in convert.tensor_specs(checkpoint))
    meta = gguf.Metadata.load(None, folder, name, weights)
    penalty = (vocab.read_json(folder / "generation_config.json") or {}).get("repetition_penalty")
    if penalty is not None and meta.sampling_penalty_repeat is None:
        meta.sampling_penalty_repeat = penalty
    if meta.name is None:
        meta.name = folder.name
    if meta.size_label is None:
        meta.size_label = gguf.size_label(weights, weights, 0, 0)
    writer.add_type(gguf.GGUFType.MODEL)
    meta.set_gguf_meta_model(writer)


def _parameters(writer: Any, config: dict[str, Any]) -> None:
    writer.add_block_count(config["num_hidden_layers"])
    for key, add in (
        ("max_position_embeddings", writer.add_context_length),
        ("hidden_size", writer.add_embedding_length),
        ("intermediate_size", writer.add_feed_forward_length),
        ("num_attention_heads", writer.add_head_count),
        ("num_key_value_heads", writer.add_head_count_kv),
    ):
        if config.get(key) is not None:
            add(config[key])
    _rope(writer, config)
    if config.get("rms_norm_eps") is not None:
        writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    if config.get("head_dim") is not None:
        writer.add_key_length(config["head_dim"])
        writer.add_value_length(config["head_dim"])


def _rope(writer: Any, config: dict[str, Any]) -> None:
    import gguf

    rope = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    rope.setdefault("rope_type", rope.get("type"))
    rope.setdefault("rope_theta", config.get("rope_theta"))
    kind, factor = rope["rope_type"], rope.get("factor")
    if kind == "linear" and factor is not None:
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(factor)
    elif kind == "yarn" and factor is not None:
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(factor)
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
        for key, add in (
            ("extrapolation_factor", writer.add_rope_scaling_yarn_ext_factor),
            ("attention_factor", writer.add_rope_scaling_yarn_attn_factor),
            ("beta_fast", writer.add_rope_scaling_yarn_beta_fast),
            ("beta_slow", writer.add_rope_scaling_yarn_beta_slow),
        ):
            if rope.get(key) is not None:
                add(rope[key])
    elif kind in ("su", "longrope"):
        writer.add_rope_scaling_type(gguf.RopeScalingType.LONGROPE)
    if rope["rope_theta"] is not None:
        writer.add_rope_freq_base(rope["rope_theta"])


def _vocabulary(writer: Any, folder: Path, config: dict[str, Any]) -> None:
    prefix = (vocab.read_json(folder / "tokenizer_config.json") or {}).get("add_prefix_space")
    if prefix is not None:
        writer.add_add_space_prefix(prefix)
    size = config.get("vocab_size")
    merges: list[str] = []
    if (folder / "tokenizer.model").is_file():
        texts, scores, types = vocab.sentencepiece(folder, size)
        limit = len(texts)
        _tokens(writer, "llama", "default", texts, scores, types)
    else:
        texts, types, pre = vocab.bpe(folder, size)
        limit, merges = None, vocab.merges(folder)
        _tokens(writer, "gpt2", pre, texts, None, types)
    if merges:
        writer.add_token_merges(merges)
    _special(writer, vocab.Special(folder, limit))
    if size == 49152:  # the converter's rule for granite's small models catches every vocabulary of that size
        writer.add_add_bos_token(False)


def _tokens(writer: Any, model: str, pre: str, texts: list[str], scores: list[float] | None, types: list[int]) -> None:
    writer.add_tokenizer_model(model)
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(texts)
    if scores is not None:
        writer.add_token_scores(scores)
    writer.add_token_types(types)


def _special(writer: Any, special: vocab.Special) -> None:
    for name, value in special.ids.items():
        getattr(writer, f"add_{name}_token_id")(value)
    for name, flag in special.add.items():
        getattr(writer, f"add_add_{name}_token", lambda _: None)(flag)
    if special.template is not None:
        writer.add_chat_template(special.template)


REPLACED = ("general.quantization_version", "general.file_type")


def quantized_kvs(
    kvs: Sequence[KV], file_type: int, imatrix: tuple[str, str | None, int, int] | None = None
) -> list[KV]:
    """What llama-quantize writes: the source's pairs, then version and file type at the end; split.* are dropped.

    ``imatrix``: file, data set, entries and chunks, which it notes after them (texts cut to 127 bytes).
    """
    kept = [kv for kv in kvs if kv.key not in REPLACED and not kv.key.startswith("split.")]
    version = encode_kv("general.quantization_version", 2, GGUFType.UINT32)
    noted = [version, encode_kv("general.file_type", file_type, GGUFType.UINT32)]
    if imatrix is not None:
        file, dataset, entries, chunks = imatrix
        texts = {"file": file} | ({"dataset": dataset} if dataset is not None else {})
        numbers = {"entries_count": entries} | ({"chunks_count": chunks} if chunks > 0 else {})
        noted += [_noted(name, text.encode()[:127].decode("utf-8", "surrogateescape")) for name, text in texts.items()]
        noted += [encode_kv(f"quantize.imatrix.{name}", n, GGUFType.UINT32) for name, n in numbers.items()]
    replaced = {kv.key for kv in noted}
    return [*(kv for kv in kept if kv.key not in replaced), *noted]


def _noted(name: str, text: str) -> KV:
    return encode_kv(f"quantize.imatrix.{name}", text, GGUFType.STRING)
