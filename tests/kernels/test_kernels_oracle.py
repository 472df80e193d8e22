"""Block bytes against ggml's own quantizers: every type, every source dtype, with and without an imatrix."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator

import numpy as np
import pytest

from qbuild import kernels
from qbuild.ggml import QTYPES

TYPES = (
    "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K",
    "IQ4_NL", "IQ4_XS", "MXFP4", "NVFP4", "TQ1_0", "TQ2_0", "Q1_0", "Q2_0",
)  # fmt: skip
COLS = 768


def hazards(seed: int) -> Iterator[np.ndarray]:
    """Rows of COLS weights, each kind of trouble by itself."""
    rng = np.random.default_rng(seed)
    normal = rng.standard_normal((4, COLS)) * 0.02
    scales = 10.0 ** rng.uniform(-45, 5, (12, COLS // 16))
    sign = np.where(np.arange(COLS) % 2, -1.0, 1.0)
    yield normal
    yield np.zeros((1, COLS))
    yield np.full((1, COLS), -0.0)
    yield np.full((1, COLS), 0.25)
    yield np.full((1, COLS), -0.25)
    yield (sign * 0.1)[None]  # ties for the largest magnitude
    yield (-sign * 0.1)[None]
    yield np.abs(normal)
    yield -np.abs(normal)
    yield np.where(rng.random((4, COLS)) < 0.02, normal * 1000, normal)  # outliers
    yield np.where(rng.random((4, COLS)) < 0.5, 0.0, normal)
    yield np.where(rng.random((2, COLS)) < 0.5, -0.0, 0.0)
    yield np.eye(8, COLS) * 3
    yield rng.integers(-3, 4, (4, COLS)) / 8  # few values, many ties
    yield np.where(rng.random((4, COLS // 32)) < 0.5, 0.0, 1.0).repeat(32, axis=1) * normal  # whole sub-blocks of zeros
    yield rng.standard_normal((12, COLS)) * scales.repeat(16, axis=1)
    yield rng.standard_normal((4, COLS)) * 1e-15 * rng.uniform(0.1, 3, (4, COLS // 16)).repeat(16, axis=1)
    yield rng.standard_normal((4, COLS)) * 1e-41  # subnormal
    yield -0.1 + rng.integers(0, 3, (4, COLS)) * 2.0**-27  # a range of an ulp or two
    yield rng.standard_normal((4, COLS)) * 10.0 ** rng.uniform(5, 37, (4, COLS // 32)).repeat(32, axis=1)  # overflows
    bits = rng.integers(0, 1 << 32, (4, COLS), dtype=np.uint32).view(np.float32)
    yield np.where(np.isfinite(bits), bits, 1)


def imatrices(seed: int) -> Iterator[np.ndarray | None]:
    rng = np.random.default_rng(seed)
    yield None
    yield rng.random(COLS)
    yield rng.standard_normal(COLS) ** 2 * np.where(rng.random(COLS) < 0.3, 0, 10.0 ** rng.uniform(-6, 8, COLS))
    yield np.zeros(COLS)


def held_as(x: np.ndarray, dtype: str) -> tuple[np.ndarray, np.ndarray]:
    """float32 weights rounded to a source dtype: as the source holds them, and as float32 again."""
    if dtype == "BF16":
        held = (x.view(np.uint32) >> 16).astype(np.uint16)
        return held, (held.astype(np.uint32) << 16).view(np.float32)
    held = x if dtype == "F32" else np.nan_to_num(x.clip(-65504, 65504)).astype(np.float16)
    return held, held.astype(np.float32)


@pytest.mark.parametrize("dtype", ["F32", "BF16", "F16"])
@pytest.mark.parametrize("name", TYPES)
def test_hazards(ggml, name, dtype):
    x = np.concatenate([row.astype(np.float32) for row in hazards(1)])
    held, wide = held_as(x, dtype)
    for imatrix in imatrices(2):
        weights = None if imatrix is None else imatrix.astype(np.float32)
        ggml.assert_same(name, kernels.quantize(held, name, weights), ggml.quantize(wide, name, weights))


@pytest.mark.parametrize("name", TYPES)
@pytest.mark.parametrize("rows", [1, 2, 17, 33])
def test_last_tile_is_not_full(ggml, name, rows):
    """Rows and columns that fill no whole number of lanes: the last group repeats a block and must not write it."""
    rng = np.random.default_rng(rows)
    block = QTYPES[name].block
    for cols in (block, 3 * block):
        x = rng.standard_normal((rows, cols)).astype(np.float32)
        guarded = np.full((rows + 1, QTYPES[name].row_bytes(cols)), 0xA5, np.uint8)
        for weights in (None, rng.random(cols).astype(np.float32)):
            kernels.quantize_into(x, guarded[:rows], name, weights)
            ggml.assert_same(name, guarded[:rows], ggml.quantize(x, name, weights))
            assert (guarded[rows] == 0xA5).all()


@pytest.mark.parametrize("name", TYPES)
def test_chunks_and_threads_do_not_change_bytes(name):
    rng = np.random.default_rng(3)
    x, weights = rng.standard_normal((23, COLS)).astype(np.float32), rng.random(COLS).astype(np.float32)
    whole = kernels.quantize(x, name, weights)
    assert (kernels.quantize(x, name, weights, threads=2) == whole).all()
    parts = [kernels.quantize(x[at : at + 5], name, weights) for at in range(0, 23, 5)]
    assert (np.concatenate(parts) == whole).all()


@pytest.mark.parametrize("name", ["MXFP4", "NVFP4"])
def test_scale_of_every_exponent(ggml, name):
    """The largest magnitude just below, at and above each power of two: log2f rounds up below one, E4M3 carries."""
    powers = np.arange(1, 255, dtype=np.uint32)[:, None] << 23
    near = np.concatenate([powers + np.arange(-70, 9, dtype=np.int32).view(np.uint32), powers | 0x700000], axis=1)
    subnormal = np.concatenate([(1 << np.arange(23)[:, None]) + np.arange(3) - 1, np.zeros((23, 1), int)], axis=1)
    largest = np.concatenate([near.ravel(), (near[:, ::8] ^ 0x80000000).ravel(), subnormal.astype(np.uint32).ravel()])
    block = QTYPES[name].block
    share = np.linspace(-1, 1, block, dtype=np.float32)
    share[::16] = 1
    x = largest.view(np.float32)[:, None] * share
    ggml.assert_same(name, kernels.quantize(x, name), ggml.quantize(x, name))


@pytest.mark.parametrize("name", ["IQ4_NL", "IQ4_XS"])
def test_weights_between_two_values(ggml, name):
    """Halfway between values a tie goes up; an ulp beside it does not."""
    values = np.array([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], np.float32)
    middles = ((values[1:] + values[:-1]) / 2).view(np.uint32)
    x = np.concatenate([(middles + np.uint32(k)).view(np.float32) for k in (0, 1, 0xFFFFFFFF)])
    rows = np.stack([np.resize(np.concatenate([[-127], x]), 256), np.resize(np.concatenate([[-127], x[::-1]]), 256)])
    rows[:, ::32] = -127  # so that the first scale tried is 1
    for scale in (1, 2.0**-9, -1, 3e-3):
        held = (rows * scale).astype(np.float32)
        for weights in (None, np.ones(256, np.float32)):
            ggml.assert_same(name, kernels.quantize(held, name, weights), ggml.quantize(held, name, weights))


@pytest.mark.parametrize("name", ["MXFP4", "NVFP4", "TQ1_0", "TQ2_0", "Q1_0", "Q2_0", "Q8_0"])
def test_rounded_types_ignore_an_imatrix(name):
    rng = np.random.default_rng(8)
    x, weights = rng.standard_normal((5, COLS)).astype(np.float32), rng.random(COLS).astype(np.float32)
    assert (kernels.quantize(x, name, weights) == kernels.quantize(x, name)).all()


@pytest.mark.parametrize("dtype", ["F32", "BF16", "F16"])
def test_casts(ggml, dtype):
    """Every float16, float32 of every exponent, ties and NaN; lengths that fill no whole vector."""
    rng = np.random.default_rng(4)
    halves = np.arange(1 << 16, dtype=np.uint16)
    near = (halves.view(np.float16).astype(np.float32).view(np.uint32) + 0x1000).view(np.float32)  # between two float16
    x = np.concatenate([near, rng.integers(0, 1 << 32, 99_999, dtype=np.uint32).view(np.float32)])
    x = x[None]
    source = {"F32": x, "F16": halves.view(np.float16)[None], "BF16": halves[None]}[dtype]
    wide = np.empty(source.shape, np.float32)
    kernels.cast_into(source, wide, dtype, "F32")
    expected = {"F32": lambda: x, "F16": lambda: source.astype(np.float32)}
    exact = expected.get(dtype, lambda: (source.astype(np.uint32) << 16).view(np.float32))()
    same = (wide.view(np.uint32) == exact.view(np.uint32)) | (np.isnan(wide) & np.isnan(exact))
    assert same.all()
    for name, kind in (("F16", np.float16), ("BF16", np.uint16)):
        if name == dtype:
            continue
        out = np.empty(source.shape, kind)
        kernels.cast_into(source, out, dtype, name)
        assert (out.view(np.uint16) == ggml.quantize(wide, name).view(np.uint16)).all()
        assert (kernels.quantize(source, name) == out.view(np.uint8)).all()


@pytest.mark.parametrize("name", TYPES)
def test_dequantize(ggml, name):
    x = np.random.default_rng(5).standard_normal((7, COLS)).astype(np.float32)
    data = kernels.quantize(x, name)
    ours, theirs = kernels.dequantize(data, name), ggml.dequantize(data, name)
    assert ours.shape == x.shape
    assert (ours.view(np.uint32) == theirs.view(np.uint32)).all()


def test_oracle_sees_a_difference(ggml):
    """The comparison itself: another rounding of one weight must show."""
    x = np.linspace(-1, 1, COLS, dtype=np.float32)[None]
    data = kernels.quantize(x, "Q4_K")
    data[0, 20] ^= 1
    with pytest.raises(AssertionError, match="1 of 3 blocks differ, first 0"):
        ggml.assert_same("Q4_K", data, ggml.quantize(x, "Q4_K"))


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", TYPES)
def test_millions_of_weights(ggml, name, seed):
    rng = np.random.default_rng(seed)
    x = (rng.standard_t(5, (3 << 19) // COLS * COLS) * 0.02).astype(np.float32).reshape(-1, COLS)
    if seed == 1:
        x = (x.view(np.uint32) & 0xFFFF0000).view(np.float32)
    hard = np.concatenate([row.astype(np.float32) for k in range(40) for row in hazards(100 * seed + k)])
    for weights in (None, (rng.random(COLS) ** 3 * 10).astype(np.float32)):
        ggml.assert_same(name, kernels.quantize(x, name, weights, threads=2), ggml.quantize(x, name, weights))
        ggml.assert_same(name, kernels.quantize(hard, name, weights), ggml.quantize(hard, name, weights))


def test_library_reports_a_type_size_we_know(ggml):
    """The oracle is the llama.cpp whose tables qbuild.ggml copies."""
    size = ggml.shared_library().ggml_row_size
    size.restype, size.argtypes = ctypes.c_size_t, [ctypes.c_int, ctypes.c_int64]
    for name in TYPES:
        assert size(QTYPES[name].id, 512) == QTYPES[name].row_bytes(512)
