"""Grid types against ggml's own quantizers: block bytes, the tables, and the mistake that is kept."""

from __future__ import annotations

import tracemalloc
from collections.abc import Iterator

import numpy as np
import pytest

from qbuild import kernels
from qbuild.ggml import QTYPES
from qbuild.kernels import grids
from qbuild.lower import GRID_RAM, tables_ram

TYPES = ("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S")
COLS = 768


def hazards(seed: int) -> Iterator[np.ndarray]:
    """Rows of COLS weights, each kind of trouble by itself; none so large that ggml asserts and ends the process."""
    rng = np.random.default_rng(seed)
    normal = rng.standard_normal((6, COLS)) * 0.02
    sign = np.where(np.arange(COLS) % 2, -1.0, 1.0)
    yield normal
    yield np.zeros((1, COLS))
    yield np.full((1, COLS), -0.0)
    yield np.full((1, COLS), 0.25)
    yield np.full((1, COLS), -0.25)
    yield (sign * 0.1)[None]
    yield np.abs(normal)
    yield -np.abs(normal)
    yield np.where(np.arange(COLS) % 8, normal, -np.abs(normal))  # an odd number of minus signs in each 8
    yield np.where(rng.random((4, COLS)) < 0.02, normal[:4] * 1000, normal[:4])  # outliers
    yield np.where(rng.random((4, COLS)) < 0.5, 0.0, normal[:4])
    yield np.where(rng.random((2, COLS)) < 0.5, -0.0, 0.0)
    yield -np.eye(8, COLS) * 3  # one weight, and it is the one a sign is mended at
    yield rng.integers(-3, 4, (6, COLS)) / 8  # few values: ties between neighbours
    yield (2 * rng.integers(-8, 8, (6, COLS)) + 1) / 64  # levels themselves
    for size in (16, 32, 256):  # groups and blocks of zeros between others
        yield np.where(rng.random((6, COLS // size)) < 0.5, 0.0, 1.0).repeat(size, axis=1) * normal
    for exponent in (-8, -15):  # about the size that counts as zero
        spread = rng.uniform(0.1, 3, (6, COLS // 16)).repeat(16, axis=1)
        yield rng.standard_normal((6, COLS)) * 10.0**exponent * spread
    yield rng.standard_normal((12, COLS)) * (10.0 ** rng.uniform(-40, 5, (12, COLS // 16))).repeat(16, axis=1)
    yield rng.standard_normal((4, COLS)) * 1e-41  # subnormal
    yield rng.standard_normal((4, COLS)) * 1e-44


def imatrices(seed: int, name: str) -> Iterator[np.ndarray | None]:
    rng = np.random.default_rng(seed)
    if name not in kernels.NEEDS_IMATRIX:
        yield None
    yield rng.random(COLS).astype(np.float32)
    rare = np.where(rng.random(COLS) < 0.3, 0, 10.0 ** rng.uniform(-6, 8, COLS))
    yield (rng.standard_normal(COLS) ** 2 * rare).astype(np.float32)
    yield np.where(rng.random(COLS) < 0.8, 0, 1).astype(np.float32)  # a sign mended where all weigh nothing
    yield np.zeros(COLS, np.float32)


@pytest.mark.parametrize("dtype", ["F32", "BF16", "F16"])
@pytest.mark.parametrize("name", TYPES)
def test_hazards(ggml, name, dtype):
    x = np.concatenate([row.astype(np.float32) for row in hazards(1)])
    held, wide = x, x
    if dtype == "F16":
        held = x.clip(-65504, 65504).astype(np.float16)
        wide = held.astype(np.float32)
    elif dtype == "BF16":
        held = (x.view(np.uint32) >> 16).astype(np.uint16)
        wide = (held.astype(np.uint32) << 16).view(np.float32)
    for imatrix in imatrices(2, name):
        ggml.assert_same(name, kernels.quantize(held, name, imatrix), ggml.quantize(wide, name, imatrix))


@pytest.mark.parametrize("name", TYPES)
@pytest.mark.parametrize("rows", [1, 17])
def test_last_group_is_not_full(ggml, name, rows):
    rng = np.random.default_rng(rows)
    for cols in (256, 768):
        x = rng.standard_normal((rows, cols)).astype(np.float32)
        imatrix = rng.random(cols).astype(np.float32)
        guarded = np.full((rows + 1, QTYPES[name].row_bytes(cols)), 0xA5, np.uint8)
        kernels.quantize_into(x, guarded[:rows], name, imatrix)
        ggml.assert_same(name, guarded[:rows], ggml.quantize(x, name, imatrix))
        assert (guarded[rows] == 0xA5).all()


@pytest.mark.parametrize("name", TYPES)
def test_chunks_and_threads_do_not_change_bytes(name):
    rng = np.random.default_rng(3)
    x, imatrix = rng.standard_normal((23, COLS)).astype(np.float32), rng.random(COLS).astype(np.float32)
    whole = kernels.quantize(x, name, imatrix)
    assert (kernels.quantize(x, name, imatrix, threads=2) == whole).all()
    parts = [kernels.quantize(x[at : at + 5], name, imatrix) for at in range(0, 23, 5)]
    assert (np.concatenate(parts) == whole).all()


@pytest.mark.parametrize("name", TYPES)
def test_what_is_read_back_is_near(ggml, name):
    """Bits of dequantize against ggml's, and no gross error: signs and points are where readers look for them."""
    rng = np.random.default_rng(4)
    x, imatrix = rng.standard_normal((8, COLS)).astype(np.float32), np.ones(COLS, np.float32)
    data = kernels.quantize(x, name, imatrix)
    ours, theirs = kernels.dequantize(data, name), ggml.dequantize(data, name)
    assert (ours.view(np.uint32) == theirs.view(np.uint32)).all()
    assert np.sqrt(np.mean((ours - x) ** 2)) < {"1": 0.6, "2": 0.45, "3": 0.25}[name[2]]


def test_zero_group_moves_later_points_of_iq3_s(ggml):
    """ggml's fault, kept: points and signs after an all-zero group are stored a group early, scales are not."""
    x = np.random.default_rng(5).standard_normal((1, 256)).astype(np.float32)
    x[0, 32:64] = 0
    data = kernels.quantize(x, "IQ3_S")
    assert (data == ggml.quantize(x, "IQ3_S")).all()
    assert not data[0, 2 + 56 : 2 + 64].any()  # the last group's points
    assert not data[0, 74 + 28 : 74 + 32].any()  # and signs
    assert data[0, 2 + 8 : 2 + 56].any()


@pytest.mark.parametrize("name", sorted(kernels.NEEDS_IMATRIX & set(TYPES)))
def test_missing_imatrix_is_refused(name):
    with pytest.raises(ValueError, match=f"{name} needs an imatrix"):
        kernels.quantize(np.zeros((1, 256), np.float32), name)


@pytest.mark.parametrize("name", TYPES)
def test_neighbours_of_a_code(name):
    """The tables against the rule itself, one code after another."""
    grid, t = grids.GRIDS[name], grids.tables(name)
    per, mask = (8, 3) if grid.bits == 2 else (4, 7)
    shifts = grid.bits * np.arange(per)
    rng = np.random.default_rng(6)
    point_codes = np.unique(np.concatenate([t.lists, [0]]))
    for levels in rng.integers(0, 3 if grid.bits == 2 else 8, (60, per)):
        code = int((levels << shifts).sum())
        distance = (((point_codes[:, None] >> shifts & mask) - levels) ** 2).sum(axis=1)
        if t.place[code] >= 0:
            assert distance.min() == 0
            continue
        limit = np.unique(distance)[grid.nearest - 1]
        near = point_codes[distance <= limit]
        order = np.lexsort((t.place[near], distance[distance <= limit]))
        begin = grids.RUN * ~t.place[code]
        row = t.lists[begin : begin + grids.RUN * t.runs[code]]
        assert row[: len(near)].tolist() == near[order].tolist()
        assert (row[len(near) :] == row[0]).all()
        assert len(row) - len(near) < grids.RUN


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("name", TYPES)
def test_hundreds_of_thousands_of_weights(ggml, name, seed):
    rng = np.random.default_rng(seed)
    x = (rng.standard_t(5, (512, COLS)) * 0.02).astype(np.float32)
    if seed == 1:
        x = (x.view(np.uint32) & 0xFFFF0000).view(np.float32)
    hard = np.concatenate([row.astype(np.float32) for k in range(6) for row in hazards(100 * seed + k)])
    for imatrix in imatrices(seed, name):
        ggml.assert_same(name, kernels.quantize(x, name, imatrix, threads=2), ggml.quantize(x, name, imatrix))
        ggml.assert_same(name, kernels.quantize(hard, name, imatrix), ggml.quantize(hard, name, imatrix))


def test_tables_are_made_within_what_a_plan_counts_for_them() -> None:
    """All neighbours of IQ1's codes at once took 110 MiB, and a worker was stopped for it."""
    tracemalloc.start()
    grids.tables.__wrapped__("IQ1_S")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < GRID_RAM


def test_types_with_grids_are_planned_with_their_tables() -> None:
    assert all(tables_ram([name]) == GRID_RAM for name in grids.GRIDS)
    assert tables_ram(["Q4_K", "IQ4_XS", "IQ4_NL"]) == 0
