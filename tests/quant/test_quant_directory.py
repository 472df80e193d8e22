"""Directories of quantized checkpoints: every byte has its place before a weight is read, and loaders find it there."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

from qbuild.checkpoint import Checkpoint, open_path, shapes
from qbuild.errors import ConfigError, InputError
from qbuild.quant.directory import Directory, Item, OutFile, directory, plain_dtype, write
from qbuild.quant.shapes import ITEM_SIZES, Scheme

TINY = Path(__file__).parent.parent / "data" / "tiny-llama"
LIMIT = 5_000_000_000


@pytest.fixture
def tiny() -> Checkpoint:
    return open_path(TINY, "tiny-llama")


def linears(checkpoint: Checkpoint) -> list[str]:
    return [n.removesuffix(".weight") for n, t in checkpoint.tensors.items() if n.endswith("_proj.weight")]


def planned(checkpoint: Checkpoint, scheme: Scheme, limit: int = LIMIT, **given: Any) -> Directory:
    names = given.get("names", linears(checkpoint))
    return directory(checkpoint, scheme, names, place="targets.t", max_shard_size=limit)


def zeros(item: Item) -> Mapping[str, list[bytes]]:
    return {t.name: [bytes(t.nbytes // 2), bytes(t.nbytes - t.nbytes // 2)] for t in item.tensors}


def written(folder: Path, file: OutFile) -> Path:
    path = folder / file.name
    with path.open("wb") as out:

        def put(offset: int, chunk: object) -> None:
            out.seek(offset)
            out.write(chunk)  # type: ignore[arg-type]

        write(file, put, zeros)
    return path


def model(config: dict[str, Any], *tensors: tuple[str, tuple[int, ...]]) -> Checkpoint:
    return shapes(config, tensors, source="a model")


def tensors_of(found: Directory) -> Iterator[str]:
    return (t.name for file in found.files for item in file.items for t in item.tensors)


@pytest.mark.parametrize("layout", ["awq-gemm", "gptq_v2", "pack-quantized"])
def test_files_are_read_by_safetensors_and_hold_what_was_planned(tiny: Checkpoint, tmp_path: Path, layout: str) -> None:
    found = planned(tiny, Scheme(layout, 4, 64, False, dtype="BF16"))
    (file,) = found.files
    path = written(tmp_path, file)
    assert (file.name, path.stat().st_size) == ("model.safetensors", file.size)
    expected = {t.name: (t.dtype, list(t.shape)) for item in file.items for t in item.tensors}
    with safe_open(path, "pt") as stored:
        assert stored.metadata() == {"format": "pt"}
        assert {n: (s.get_dtype(), s.get_shape()) for n in stored.keys() for s in [stored.get_slice(n)]} == expected  # noqa: SIM118


def test_every_tensor_is_aligned_to_its_dtype_and_follows_the_one_before(tiny: Checkpoint) -> None:
    """torch refuses to view a buffer at an offset that is no multiple of the item's size."""
    (file,) = planned(tiny, Scheme("pack-quantized", 4, 64, False, dtype="BF16")).files
    tensors = sorted((t for i in file.items for t in i.tensors), key=lambda t: t.offset)
    assert all(t.offset % ITEM_SIZES[t.dtype] == 0 for t in tensors)
    assert all(a.offset + a.nbytes == b.offset for a, b in pairwise(tensors))
    assert (tensors[0].offset, tensors[-1].offset + tensors[-1].nbytes) == (len(file.header), file.size)


def test_odd_counts_of_narrow_items_do_not_shift_wide_ones() -> None:
    checkpoint = model({}, ("a.weight", (3,)), ("model.layers.0.x.weight", (8, 32)))
    (file,) = planned(checkpoint, Scheme("pack-quantized", 4, 32, True, dtype="BF16"), names=["model.layers.0.x"]).files
    offsets = {t.name: t.offset for item in file.items for t in item.tensors}
    assert offsets["model.layers.0.x.weight_shape"] % 8 == 0
    assert offsets["a.weight"] > offsets["model.layers.0.x.weight_packed"]


def test_items_come_in_the_order_of_the_model() -> None:
    names = ["lm_head.weight", "model.embed_tokens.weight", "model.norm.weight"]
    names += [f"model.layers.{n}.mlp.up_proj.weight" for n in (10, 9, 0)]
    checkpoint = model({}, *((n, (32, 32)) for n in names))
    found = planned(checkpoint, Scheme("gptq", 4, 32, True))
    assert [(item.source, item.layer) for item in found.files[0].items] == [
        ("model.embed_tokens.weight", None), ("model.layers.0.mlp.up_proj", 0), ("model.layers.9.mlp.up_proj", 9),
        ("model.layers.10.mlp.up_proj", 10), ("model.norm.weight", None), ("lm_head.weight", None),
    ]  # fmt: skip


def test_shards_keep_linears_whole_and_the_index_names_them(tiny: Checkpoint) -> None:
    limit = 400_000
    found = planned(tiny, Scheme("gptq", 4, 64, True), limit=limit)
    index = json.loads(found.texts["model.safetensors.index.json"])
    where = {t.name: file.name for file in found.files for item in file.items for t in item.tensors}
    assert index["weight_map"] == where
    assert [file.name for file in found.files][:1] == [f"model-00001-of-{len(found.files):05d}.safetensors"]
    assert len(found.files) > 2
    sizes = [[sum(t.nbytes for t in item.tensors) for item in file.items] for file in found.files]
    assert all(sum(file) <= limit or len(file) == 1 for file in sizes)
    assert index["metadata"]["total_size"] == sum(map(sum, sizes))
    homes = {(item.source, file.name) for file in found.files for item in file.items}
    assert len(homes) == sum(len(file.items) for file in found.files)


def test_one_shard_has_no_index(tiny: Checkpoint) -> None:
    assert set(planned(tiny, Scheme("awq-gemm", 4, 64, False)).texts) == {"config.json"}


def test_the_tied_head_is_left_out_and_the_head_of_its_own_is_plain() -> None:
    tensors = [("lm_head.weight", (64, 32)), ("model.embed_tokens.weight", (64, 32))]
    tied = planned(model({"tie_word_embeddings": True}, *tensors), Scheme("gptq", 4, 32, True))
    assert list(tensors_of(tied)) == ["model.embed_tokens.weight"]
    own = planned(model({"tie_word_embeddings": False}, *tensors), Scheme("gptq", 4, 32, True))
    assert list(tensors_of(own)) == ["model.embed_tokens.weight", "lm_head.weight"]


def test_the_config_is_the_source_s_with_the_dtype_and_the_quantization(tiny: Checkpoint) -> None:
    found = json.loads(planned(tiny, Scheme("awq-gemm", 4, 64, False, dtype="F16")).texts["config.json"])
    assert found.pop("quantization_config")["quant_method"] == "awq"
    assert found == {**tiny.config, "dtype": "float16"}


def test_a_config_without_a_dtype_gets_the_key_that_all_versions_read() -> None:
    checkpoint = model({"text_config": {"torch_dtype": "bfloat16"}}, ("model.norm.weight", (32,)))
    config = json.loads(planned(checkpoint, Scheme("gptq", 4, 32, True)).texts["config.json"])
    assert config["torch_dtype"] == config["text_config"]["torch_dtype"] == "float16"


def test_gptq_repeats_its_config_beside(tiny: Checkpoint) -> None:
    texts = planned(tiny, Scheme("gptq", 4, 64, True)).texts
    assert json.loads(texts["quantize_config.json"]) == json.loads(texts["config.json"])["quantization_config"]


def test_tokenizer_files_are_copied_and_the_source_s_card_is_not(tiny: Checkpoint) -> None:
    aux = {**tiny.aux, "README.md": TINY / "README.md"}
    copies = planned(replace(tiny, aux=aux), Scheme("gptq", 4, 64, True)).copies
    assert {"tokenizer.json", "tokenizer_config.json"} <= set(copies)
    assert set(copies).isdisjoint({"config.json", "README.md"})


def test_routers_stay_and_are_named_in_the_config() -> None:
    checkpoint = model(
        {}, ("model.layers.0.mlp.gate.weight", (8, 64)), ("model.layers.0.mlp.experts.0.up_proj.weight", (64, 64))
    )
    found = planned(checkpoint, Scheme("awq-gemm", 4, 64, False))
    skipped = json.loads(found.texts["config.json"])["quantization_config"]["modules_to_not_convert"]
    assert skipped == ["lm_head", "model.layers.0.mlp.gate"]
    assert "model.layers.0.mlp.gate.weight" in tensors_of(found)


def test_what_a_16_bit_model_keeps_in_float32_stays_so(tiny: Checkpoint) -> None:
    name = "model.norm.weight"
    tensor = tiny.tensors[name]
    mixed = replace(tiny, tensors={**tiny.tensors, name: replace(tensor, dtype="F32", nbytes=2 * tensor.nbytes)})
    found = planned(mixed, Scheme("awq-gemm", 4, 64, False, dtype="F16"))
    dtypes = {t.name: t.dtype for item in found.files[0].items for t in item.tensors}
    assert (dtypes[name], dtypes["model.embed_tokens.weight"]) == ("F32", "F16")


def test_frequencies_that_loaders_compute_are_left_out() -> None:
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    checkpoint = model({}, (name, (32,)), ("model.norm.weight", (32,)))
    assert list(tensors_of(planned(checkpoint, Scheme("gptq", 4, 32, True)))) == ["model.norm.weight"]


@pytest.mark.parametrize(
    ("source", "layout", "expected"),
    [
        ("bfloat16", "awq-gemm", "F16"),
        ("bfloat16", "gptq", "BF16"),
        ("float32", "gptq", "F16"),
        ("float16", "gptq", "F16"),
    ],
)
def test_plain_tensors_keep_bfloat16_where_kernels_allow(source: str, layout: str, expected: str) -> None:
    assert plain_dtype(model({"dtype": source}, ("a.weight", (32,))), layout) == expected


@pytest.mark.parametrize(
    ("scheme", "said", "remedy"),
    [
        (Scheme("gptq", 4, 512, True), "group size 512", "targets.t.group_size=128"),
        (Scheme("gptq", 4, 64, False), "asymmetric", "targets.t.layout=gptq_v2"),
        (Scheme("awq-gemm", 8, 64, False), "8 bits", "targets.t.bits=4"),
    ],
)
def test_what_no_loader_reads_is_refused_with_a_way_out(
    tiny: Checkpoint, scheme: Scheme, said: str, remedy: str
) -> None:
    with pytest.raises(ConfigError) as refused:
        planned(tiny, scheme)
    assert refused.value.place == "targets.t"
    assert said in refused.value.fact
    assert refused.value.remedy == remedy


def test_stacked_experts_are_refused() -> None:
    checkpoint = model({}, ("model.layers.0.mlp.experts.up_proj", (4, 64, 64)))
    with pytest.raises(InputError, match="no matrix of its own"):
        planned(checkpoint, Scheme("gptq", 4, 32, True), names=["model.layers.0.mlp.experts.up_proj[0]"])


def test_a_gguf_source_is_refused(tiny: Checkpoint) -> None:
    with pytest.raises(InputError, match="GGUF"):
        planned(replace(tiny, kind="gguf"), Scheme("gptq", 4, 32, True))


def test_a_tensor_shorter_than_planned_is_a_bug(tiny: Checkpoint) -> None:
    file = planned(tiny, Scheme("gptq", 4, 64, True)).files[0]
    with pytest.raises(ValueError, match="BUG"):
        write(file, lambda offset, chunk: None, lambda item: {t.name: [b"short"] for t in item.tensors})


def test_the_same_plan_is_the_same_bytes(tiny: Checkpoint) -> None:
    shuffled = replace(tiny, tensors=dict(reversed(tiny.tensors.items())))
    scheme = Scheme("gptq", 4, 64, True)
    assert planned(tiny, scheme, names=linears(tiny)[::-1]) == planned(shuffled, scheme)


def test_the_header_is_padded_to_eight_bytes(tiny: Checkpoint) -> None:
    header = planned(tiny, Scheme("gptq", 4, 64, True)).files[0].header
    assert struct.unpack("<Q", header[:8])[0] == len(header) - 8
    assert len(header) % 8 == 0
