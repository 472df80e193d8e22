"""A written directory holds the codes it was given and the rest of the model as it was."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, CompressedTensorsConfig

from qbuild.checkpoint import Checkpoint, Reader, open_path
from qbuild.errors import ActionFailed
from qbuild.quant import contents
from qbuild.quant.codes import Codes, Solved
from qbuild.quant.contents import Contents
from qbuild.quant.directory import Chunk, Directory, directory, plain_dtype, write
from qbuild.quant.grid import Grid, ends, quantize
from qbuild.quant.packing import unpack
from qbuild.quant.shapes import Scheme

TINY = Path(__file__).parent.parent / "data" / "tiny-llama"
LAYERS = 3
SCHEMES = [
    Scheme("awq-gemm", 4, 64, False), Scheme("gptq", 4, 64, True), Scheme("gptq_v2", 4, 32, False),
    Scheme("gptq", 8, 32, True), Scheme("gptq", 3, 64, True), Scheme("pack-quantized", 4, 64, True),
    Scheme("pack-quantized", 4, 64, False), Scheme("pack-quantized", 8, -1, True),
]  # fmt: skip


def identity(scheme: Scheme) -> str:
    return f"{scheme.layout}-{scheme.bits}-{scheme.group_size}-{'symmetric' if scheme.symmetric else 'asymmetric'}"


def rounded(weight: Tensor, scheme: Scheme) -> Codes:
    """Round to nearest."""
    grid = Grid(scheme.bits, scheme.group_size, scheme.symmetric)
    grouped = grid.grouped(weight.float())
    scales, zeros = grid.at(*ends(grouped, grid))
    codes, _ = quantize(grouped, scales[..., None], zeros[..., None], grid.top)
    size = grouped.shape[-1]
    parts = codes.view_as(weight).to(torch.uint8), scales.half(), zeros.to(torch.uint8)
    return Codes(*parts, bits=scheme.bits, group_size=size, symmetric=scheme.symmetric)


def solve(weights: dict[str, Tensor], scheme: Scheme, layer: int) -> Solved:
    """Every projection rounded, and a norm changed, as AWQ changes them."""
    prefix = f"model.layers.{layer}."
    names = [n for n in weights if n.startswith(prefix) and n.endswith("_proj.weight")]
    norm = f"{prefix}input_layernorm.weight"
    return Solved({n.removesuffix(".weight"): rounded(weights[n], scheme) for n in names}, {norm: weights[norm] * 2})


def build(checkpoint: Checkpoint, scheme: Scheme, folder: Path, limit: int = 5_000_000_000) -> tuple[Scheme, Directory]:
    """Write the directory of a model with every projection rounded; the scheme gets the dtype of its plain tensors."""
    scheme = replace(scheme, dtype=plain_dtype(checkpoint, scheme.layout))
    weights = load_file(checkpoint.files[0].path)
    linears = [n.removesuffix(".weight") for n in checkpoint.tensors if n.endswith("_proj.weight")]
    planned = directory(checkpoint, scheme, linears, place="targets.t", max_shard_size=limit)
    folder.mkdir()
    for name, text in planned.texts.items():
        (folder / name).write_text(text)
    for name, path in planned.copies.items():
        shutil.copy(path, folder / name)
    with Reader(checkpoint.files) as reader:
        get = Contents(checkpoint, reader, scheme, lambda layer: solve(weights, scheme, layer))
        for file in planned.files:
            with (folder / file.name).open("wb") as out:

                def put(offset: int, chunk: Chunk) -> None:
                    out.seek(offset)
                    out.write(chunk)

                write(file, put, get)
    return scheme, planned


@pytest.fixture
def tiny() -> Checkpoint:
    return open_path(TINY, "tiny-llama")


def stored(folder: Path) -> dict[str, Tensor]:
    return {n: t for path in sorted(folder.glob("*.safetensors")) for n, t in load_file(path).items()}


@pytest.mark.parametrize("scheme", SCHEMES, ids=identity)
def test_codes_and_plain_tensors_are_read_back(tiny: Checkpoint, tmp_path: Path, scheme: Scheme) -> None:
    scheme, planned = build(tiny, scheme, tmp_path / "out")
    weights, found = load_file(TINY / "model.safetensors"), stored(tmp_path / "out")
    dtype = {"F16": torch.float16, "BF16": torch.bfloat16}[scheme.dtype]
    for item in planned.files[0].items:
        if item.linear:
            weight = weights[f"{item.source}.weight"]
            codes = unpack(scheme, item.source, found, *weight.shape)
            expected = rounded(weight, scheme)
            assert torch.equal(codes.codes, expected.codes)
            assert torch.equal(codes.zeros, expected.zeros)
        else:
            factor = 2 if "input_layernorm" in item.source else 1
            assert torch.equal(found[item.source], (weights[item.source] * factor).to(dtype)), item.source


def test_shards_together_hold_what_one_file_holds(tiny: Checkpoint, tmp_path: Path) -> None:
    build(tiny, SCHEMES[0], tmp_path / "one")
    build(tiny, SCHEMES[0], tmp_path / "many", limit=500_000)
    one, many = stored(tmp_path / "one"), stored(tmp_path / "many")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 2
    assert one.keys() == many.keys()
    assert all(torch.equal(one[name], many[name]) for name in one)
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == many.keys()


def test_plain_tensors_are_read_and_cast_in_chunks(
    tiny: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build(tiny, SCHEMES[0], tmp_path / "whole")
    monkeypatch.setattr(contents, "CHUNK", 1000)
    build(tiny, SCHEMES[0], tmp_path / "chunks")
    name = "model.safetensors"
    assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "chunks" / name).read_bytes()


def test_one_layer_is_solved_once_and_held_alone(tiny: Checkpoint) -> None:
    asked: list[int] = []

    def solved(layer: int) -> Solved:
        asked.append(layer)
        return solve(weights, SCHEMES[0], layer)

    weights = load_file(TINY / "model.safetensors")
    linears = [n.removesuffix(".weight") for n in tiny.tensors if n.endswith("_proj.weight")]
    planned = directory(tiny, SCHEMES[0], linears, place="targets.t", max_shard_size=10**9)
    with Reader(tiny.files) as reader:
        get = Contents(tiny, reader, SCHEMES[0], solved)
        write(planned.files[0], lambda offset, chunk: None, get)
    assert asked == list(range(LAYERS))


def test_a_weight_beyond_float16_stops_an_awq_directory(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    save_file({"model.norm.weight": torch.tensor([1e6], dtype=torch.bfloat16)}, folder / "model.safetensors")
    with pytest.raises(ActionFailed, match=r"model\.norm\.weight"):
        build(open_path(folder, "m"), SCHEMES[0], tmp_path / "out")


def test_a_linear_that_nothing_solved_is_a_bug(tiny: Checkpoint) -> None:
    linears = ["model.layers.0.mlp.up_proj"]
    planned = directory(tiny, SCHEMES[0], linears, place="targets.t", max_shard_size=10**9)
    with Reader(tiny.files) as reader, pytest.raises(ValueError, match="BUG"):
        write(planned.files[0], lambda *_: None, Contents(tiny, reader, SCHEMES[0], lambda layer: Solved({}, {})))


# loaders -------------------------------------------------------------------------------------------------------------


def dense(folder: Path, scheme: Scheme, planned: Directory) -> Any:
    """The model that a directory stands for: codes as plain weights, in float32."""
    model = AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32)
    state, found = model.state_dict(), stored(folder)
    for item in (item for file in planned.files for item in file.items):
        if item.linear:
            weight = state[f"{item.source}.weight"]
            weight.copy_(unpack(scheme, item.source, found, *weight.shape).dequantize())
        else:
            state[item.source].copy_(found[item.source].float())
    return model.eval()


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("scheme", SCHEMES, ids=identity)
def test_transformers_loads_a_directory_and_computes_what_it_says(
    tiny: Checkpoint, tmp_path: Path, scheme: Scheme
) -> None:
    """AWQ and GPTQ through GPTQModel, the others through compressed-tensors; on a CPU."""
    pytest.importorskip("compressed_tensors" if scheme.layout == "pack-quantized" else "gptqmodel")
    scheme, planned = build(tiny, scheme, tmp_path / "out")
    ids = torch.arange(3, 67)[None]
    packed_zeros = scheme.layout == "pack-quantized" and not scheme.symmetric  # shapes.LOADERS says why
    how = {"quantization_config": CompressedTensorsConfig(dequantize=True)} if packed_zeros else {}
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto", device_map="cpu", **how).eval()
    with torch.no_grad():
        expected = dense(tmp_path / "out", scheme, planned)(ids).logits
        found = model(ids).logits.float()
    assert (
        found - expected
    ).norm() < 0.02 * expected.norm()  # of rounding to 16 bits on the way; a wrong code is far beyond
    assert model.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0).shape == (1, 68)
