"""Packed linears are those of the libraries that made these layouts, and come back as the codes they were."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from qbuild.errors import ActionFailed
from qbuild.quant.codes import Codes
from qbuild.quant.packing import cast, pack, unpack
from qbuild.quant.shapes import LAYOUTS, Scheme, packed

RECORDED = Path(__file__).parent.parent / "data" / "packed"  # by tests/reference/make_packed.py
LIBRARIES = {
    "autoawq": "awq-gemm", "autogptq": "gptq", "gptqmodel": "gptq_v2", "compressed-tensors": "pack-quantized"
}  # fmt: skip


def cases(library: str) -> Iterator[tuple[str, dict[str, Tensor]]]:
    found: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for name, tensor in load_file(RECORDED / f"{library}.safetensors").items():
        case, _, key = name.partition("/")
        found[case][key] = tensor
    yield from found.items()


CASES = [(library, case) for library in LIBRARIES for case, _ in cases(library)]


def recorded(library: str, case: str) -> tuple[Scheme, Codes, dict[str, Tensor], Tensor]:
    tensors = dict(cases(library))[case]
    bits, group, kind = case.replace("--1-", "-row-").split("-")
    size = -1 if group == "row" else int(group)
    columns = tensors["codes"].shape[1]
    scheme = Scheme(LIBRARIES[library], int(bits), size, kind == "symmetric")
    parts = tensors["codes"], tensors["scales"], tensors["zeros"]
    codes = Codes(*parts, bits=int(bits), group_size=columns if size == -1 else size, symmetric=scheme.symmetric)
    return scheme, codes, {n: t for n, t in tensors.items() if n.startswith("m.")}, tensors["dense"]


def same(a: Codes, b: Codes) -> bool:
    pairs = [(a.codes, b.codes), (a.scales, b.scales), (a.zeros, b.zeros), (a.columns_group, b.columns_group)]
    return (a.bits, a.group_size, a.symmetric) == (b.bits, b.group_size, b.symmetric) and all(
        torch.equal(*pair) and pair[0].dtype == pair[1].dtype for pair in pairs
    )


def random_codes(rows: int, columns: int, bits: int, size: int, symmetric: bool) -> Codes:
    """Every zero point occurs, 0 and the largest among them."""
    many = columns // size
    zeros = torch.full((rows, many), 1 << bits - 1) if symmetric else torch.randint(0, 1 << bits, (rows, many))
    codes = torch.randint(0, 1 << bits, (rows, columns)).to(torch.uint8)
    return Codes(codes, torch.rand(rows, many).half(), zeros.to(torch.uint8), bits, size, symmetric)


@pytest.mark.parametrize(("library", "case"), CASES)
def test_tensors_equal_those_of_the_library(library: str, case: str) -> None:
    scheme, codes, theirs, _ = recorded(library, case)
    ours = pack(scheme, "m", codes)
    assert set(ours) == set(theirs)
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype, name
        assert torch.equal(ours[name], tensor), name


@pytest.mark.parametrize(("library", "case"), CASES)
def test_what_the_library_wrote_means_what_the_library_computes(library: str, case: str) -> None:
    """``dense`` is the library's own dequantization; AutoAWQ and GPTQModel multiply in float16."""
    scheme, codes, theirs, dense = recorded(library, case)
    found = unpack(scheme, "m", theirs, *codes.codes.shape)
    assert same(found, codes)
    precision = 2.0**-10 if library in ("autoawq", "gptqmodel") else 2.0**-22
    torch.testing.assert_close(found.dequantize(), dense, rtol=precision, atol=0)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_codes_come_back_as_they_were(layout: str, bits: int, symmetric: bool) -> None:
    torch.manual_seed(bits)
    codes = random_codes(96, 192, bits, 64, symmetric)
    scheme = Scheme(layout, bits, 64, symmetric)
    assert same(unpack(scheme, "m", pack(scheme, "m", codes), 96, 192), codes)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("indexed", [False, True])
def test_unpacking_makes_nothing_elsewhere_than_where_the_words_are(layout: str, indexed: bool) -> None:
    """On a GPU a tensor made on the default device, a CPU, would fail; here one of the default device has no values."""
    indexed = indexed and layout.startswith("gptq")
    codes = random_codes(96, 192, 4, 64, layout != "awq-gemm")
    codes = replace(codes, groups_of=torch.arange(192, dtype=torch.int32) % 3) if indexed else codes
    scheme = Scheme(layout, 4, 64, layout != "awq-gemm", indexed=indexed)
    packed, expected = pack(scheme, "m", codes), codes.dequantize()
    with torch.device("meta"):
        found = unpack(scheme, "m", packed, 96, 192)
        assert torch.equal(found.dequantize(), expected)
        assert torch.equal(found.columns_group, codes.columns_group)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("bits", [3, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_what_is_packed_is_what_was_planned(layout: str, bits: int, symmetric: bool) -> None:
    scheme = Scheme(layout, bits, 32, symmetric, dtype="BF16")
    dtypes = {"I64": torch.int64, "I32": torch.int32, "F16": torch.float16, "BF16": torch.bfloat16}
    planned = [(t.name, dtypes[t.dtype], t.shape) for t in packed(scheme, "m", 64, 128)]
    made = pack(scheme, "m", random_codes(64, 128, bits, 32, symmetric))
    assert [(name, t.dtype, tuple(t.shape)) for name, t in made.items()] == planned
    assert all(t.is_contiguous() for t in made.values())


def test_a_zero_point_of_zero_survives_the_minus_one_of_gptq() -> None:
    codes = replace(random_codes(32, 32, 4, 32, False), zeros=torch.zeros(32, 1, dtype=torch.uint8))
    stored = pack(Scheme("gptq", 4, 32, False), "m", codes)
    assert torch.equal(stored["m.qzeros"], torch.full((1, 4), -1, dtype=torch.int32))
    assert same(unpack(Scheme("gptq", 4, 32, False), "m", stored, 32, 32), codes)


def test_columns_in_groups_out_of_order_keep_their_index() -> None:
    codes = random_codes(32, 64, 4, 32, True)
    shuffled = replace(codes, groups_of=torch.randperm(64).to(torch.int32) // 32)
    scheme = Scheme("gptq_v2", 4, 32, True, indexed=True)
    stored = pack(scheme, "m", shuffled)
    assert torch.equal(stored["m.g_idx"], shuffled.groups_of)
    assert same(unpack(scheme, "m", stored, 32, 64), shuffled)


def test_an_index_that_the_config_does_not_tell_of_is_a_bug() -> None:
    codes = replace(random_codes(32, 64, 4, 32, True), groups_of=torch.zeros(64, dtype=torch.int32))
    with pytest.raises(ValueError, match="BUG"):
        pack(Scheme("gptq", 4, 32, True), "m", codes)


def test_rows_that_fill_no_whole_word_are_held_by_compressed_tensors() -> None:
    codes = random_codes(20, 64, 4, 32, False)
    scheme = Scheme("pack-quantized", 4, 32, False)
    assert same(unpack(scheme, "m", pack(scheme, "m", codes), 20, 64), codes)


def test_symmetric_codes_with_a_stray_zero_point_are_a_bug() -> None:
    with pytest.raises(ValueError, match="BUG"):
        pack(Scheme("gptq", 4, 32, True), "m", random_codes(32, 64, 4, 32, False))


def test_a_value_beyond_float16_is_refused_and_named() -> None:
    with pytest.raises(ActionFailed, match=r"model\.norm\.weight: has values up to 70144"):
        cast("model.norm.weight", torch.tensor([1.0, 70000.0], dtype=torch.bfloat16), "F16")


def test_a_cast_rounds_to_nearest_even() -> None:
    assert cast("w", torch.tensor([1 + 2.0**-11, 1 + 3 * 2.0**-11]), "F16").tolist() == [1.0, 1 + 2.0**-9]
