"""Grids of the IQ1, IQ2 and IQ3 types: which codes are grid points, and the grid points near every other code.

A *code* is the levels of 8 weights in 2 bits each, or of 4 weights in 3 bits each, the first weight lowest; a level l
stands for 2 * l + 1. The points and their order come from the gguf package; nearness is that of ggml_quantize_init
(iq2xs_init_impl, iq3xs_init_impl in llama.cpp's ggml-quants.c). Tables are made anew in each process, in 0.1 s.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np

RUN = 16  # lists of neighbours are padded to a multiple of it
PART = 256  # codes at a time: IQ1's at once are 110 MiB of distances and places
_FAR = 255  # larger than any squared distance between levels: 32 of 2 bits, 196 of 3 bits


@dataclass(frozen=True)
class Grid:
    """Bits of a level, and how many of the smallest distinct distances make a point a neighbour."""

    bits: int
    nearest: int


GRIDS = {
    "IQ1_S": Grid(2, 3),
    "IQ1_M": Grid(2, 3),
    "IQ2_XXS": Grid(2, 2),
    "IQ2_XS": Grid(2, 2),
    "IQ2_S": Grid(2, 1),
    "IQ3_XXS": Grid(3, 2),
    "IQ3_S": Grid(3, 3),
}


@dataclass(frozen=True)
class Tables:
    """What a quantizer looks up, by code."""

    place: np.ndarray  # int32: number of the grid point; elsewhere ~(run where its list begins in ``lists``)
    runs: np.ndarray  # int32: length of the list in runs
    lists: np.ndarray  # uint16: codes of neighbours, nearest first, then by number; padded with the first one


@functools.cache
def tables(name: str) -> Tables:
    grid = GRIDS[name]
    points = _points(name)
    levels = 3 if grid.bits == 2 else 8
    shifts = grid.bits * np.arange(points.shape[1])
    everything = np.indices((levels,) * points.shape[1], np.uint8).reshape(points.shape[1], -1).T
    codes, point_codes = _pack(everything, shifts), _pack(points, shifts)
    place = np.zeros(1 << 8 * grid.bits if grid.bits == 2 else 1 << 12, np.int32)
    runs = np.zeros_like(place)
    off = ~np.isin(codes, point_codes)
    lengths, neighbours = _neighbours(everything[off], points, grid.nearest)
    count = -(-lengths // RUN)
    begin = np.cumsum(count) - count
    first = np.cumsum(lengths) - lengths
    lists = np.repeat(point_codes[neighbours[first]], count * RUN)
    owner = np.repeat(np.arange(lengths.size), lengths)
    lists[begin[owner] * RUN + np.arange(neighbours.size) - first[owner]] = point_codes[neighbours]
    place[point_codes] = np.arange(len(points))
    place[codes[off]] = ~begin
    runs[codes[off]] = count
    return Tables(place, runs, lists)


def _points(name: str) -> np.ndarray:
    """Levels of the grid points, uint8 [points, weights]."""
    from gguf import quants

    source = getattr(quants, name)
    source.init_grid()
    return np.searchsorted(source.grid_map, source.grid[0, 0]).astype(np.uint8)


def _pack(levels: np.ndarray, shifts: np.ndarray) -> np.ndarray:
    return (levels.astype(np.uint16) << shifts.astype(np.uint16)).sum(axis=1, dtype=np.uint16)


def _neighbours(codes: np.ndarray, points: np.ndarray, nearest: int) -> tuple[np.ndarray, np.ndarray]:
    """How many neighbours each code has, and all their numbers, in order of code, distance, number."""
    parts = [_near(codes[at : at + PART], points, nearest) for at in range(0, len(codes), PART)]
    lengths, numbers = zip(*parts, strict=True)
    return np.concatenate(lengths), np.concatenate(numbers)


def _near(codes: np.ndarray, points: np.ndarray, nearest: int) -> tuple[np.ndarray, np.ndarray]:
    a, b = codes.astype(np.float32), points.astype(np.float32)
    distance = ((a * a).sum(1)[:, None] + (b * b).sum(1) - 2 * (a @ b.T)).astype(np.uint8)
    limit = distance.min(axis=1)
    for _ in range(nearest - 1):
        limit = np.where(distance > limit[:, None], distance, _FAR).min(axis=1)
    code, point = np.nonzero(distance <= limit[:, None])
    order = np.lexsort((point, distance[code, point], code))
    return np.bincount(code, minlength=len(codes)), point[order].astype(np.uint16)
