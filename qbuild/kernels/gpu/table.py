"""The types that a GPU encodes, as data, and the device memory that takes: for plans, so without torch."""

from __future__ import annotations

from dataclasses import dataclass

from qbuild.ggml import QTYPES

__all__ = ["TYPES", "Field", "Type", "footprint", "parts", "planes"]

ALIGNMENT = 256  # bytes: kernels are compiled for aligned pointers


@dataclass(frozen=True)
class Field:
    """Bytes of a block that hold levels: ``pack`` says how."""

    at: int
    nbytes: int
    run: int
    count: int
    right: int
    bits: int


@dataclass(frozen=True)
class Type:
    """A type: weights one lane searches, highest level (or half the levels, if signed), rules, fields."""

    sub: int
    top: int
    plain: str  # what weighs a weight without an imatrix
    weighted: str  # and with one
    fields: tuple[Field, ...]
    sigma: float = 2.0  # with an imatrix, sigma2 = sigma * mean(x * x)
    first: float = 0.0  # numerators of the search without an imatrix: first + 0.1 * s + top
    tries: int = 0
    minimum: bool = True

    @property
    def legacy(self) -> bool:
        return self.plain == "round"


def _legacy(top: int, minimum: bool) -> Type:
    at = 4 if minimum else 2
    fifth = (Field(at, 4, 1, 8, 4, 1),) if top == 31 else ()
    return Type(32, top, "round", "sigma", (*fifth, Field(at + 4 * len(fifth), 16, 16, 2, 0, 4)), 1.0, minimum=minimum)


TYPES = {
    "Q8_0": Type(32, 255, "round", "round", (Field(2, 32, 32, 1, 0, 8),), minimum=False),
    "Q4_0": _legacy(15, False),
    "Q4_1": _legacy(15, True),
    "Q5_0": _legacy(31, False),
    "Q5_1": _legacy(31, True),
    "Q2_K": Type(16, 3, "magnitude", "sigma", (Field(16, 64, 32, 4, 0, 2),), 1.0, -0.5, 16),
    "Q4_K": Type(32, 15, "average", "sigma", (Field(16, 128, 32, 2, 0, 4),), 2.0, -1.0, 21),
    "Q5_K": Type(
        32, 31, "average", "sigma", (Field(16, 32, 32, 8, 4, 1), Field(48, 128, 32, 2, 0, 4)), 2.0, -0.5, 16
    ),
    "Q3_K": Type(
        16, 4, "square", "sigma", (Field(0, 32, 32, 8, 2, 1), Field(32, 64, 32, 4, 0, 2)), minimum=False
    ),
    "Q6_K": Type(
        16, 32, "square", "imatrix", (Field(0, 128, 64, 2, 0, 4), Field(128, 64, 32, 4, 4, 2)), minimum=False
    ),
}  # fmt: skip


def planes(name: str, weights: int) -> tuple[int, int, int, int]:
    """Floats of the scratch planes of a chunk of ``weights``: fits, d, mean squares, kept levels."""
    subs = weights // TYPES[name].sub
    sizes = (5 * subs, 2 * subs, subs, weights if name == "Q3_K" else 0)
    return tuple(-(-size * 4 // ALIGNMENT) * ALIGNMENT // 4 for size in sizes)  # type: ignore[return-value]


def parts(name: str, weights: int, cols: int, source_bytes: int) -> tuple[int, int, int, int]:
    """Bytes of device memory for a chunk of ``weights``: scratch, source, imatrix, result."""
    out = weights // QTYPES[name].block * QTYPES[name].nbytes
    sizes = (4 * sum(planes(name, weights)), weights * source_bytes, 4 * cols, out)
    return tuple(-(-size // ALIGNMENT) * ALIGNMENT for size in sizes)  # type: ignore[return-value]


def footprint(name: str, weights: int, cols: int, source_bytes: int = 4) -> int:
    """Bytes of device memory that chunks of ``weights`` pass through."""
    return sum(parts(name, weights, cols, source_bytes))
