"""Which type each tensor gets when a file must not be larger than a size: the least damage, exactly.

The multiple-choice knapsack problem (Kellerer, Pferschy, Pisinger, Knapsack Problems, 2004, chapter 11), given as an
integer program to HiGHS, which scipy carries. It finds the optimum: there is no gap that is accepted.
"""

from __future__ import annotations

import contextlib
import math
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from qbuild.budget import format_size
from qbuild.errors import ActionFailed, BudgetRefused
from qbuild.gguffile import header_size, layout

__all__ = ["Choice", "Tensor", "check", "choose", "damage", "fitted", "least", "size"]

SCALE = 1e6  # of the largest total damage in the program: HiGHS takes a difference of 1e-6 for none


@dataclass(frozen=True)
class Choice:
    """A tensor and the types it can get: ``{type: (bytes, damage)}``. Damage is any sum of errors, 0 or more."""

    name: str
    types: Mapping[str, tuple[int, float]]


@dataclass(frozen=True)
class Tensor:
    """A tensor of a file and the damage of each type that it can get, 0 where there is but one. The blocks of the types
    fill its rows."""

    name: str
    shape: tuple[int, ...]
    damages: Mapping[str, float]

    @property
    def choice(self) -> Choice:
        """With its bytes in a file, padding counted."""
        return Choice(self.name, {t: (_bytes(self, t), hurt) for t, hurt in self.damages.items()})


def _bytes(tensor: Tensor, type_: str) -> int:
    return layout([(tensor.name, tensor.shape, type_)])[1]


def _header(tensors: Sequence[Tensor], kv_bytes: int) -> int:
    return header_size(kv_bytes, [(t.name, t.shape, next(iter(t.damages))) for t in tensors])


def least(tensors: Sequence[Tensor], kv_bytes: int) -> int:
    """Bytes of the smallest file of these tensors whose key-value pairs take ``kv_bytes``."""
    return _header(tensors, kv_bytes) + sum(min(_bytes(t, type_) for type_ in t.damages) for t in tensors)


def fitted(tensors: Sequence[Tensor], kv_bytes: int, max_bytes: int, place: str) -> dict[str, str]:
    """The types that do the least damage in a file of at most ``max_bytes``. Raises BudgetRefused where even the
    smallest file is larger."""
    check(tensors, kv_bytes, max_bytes, place)
    return choose([t.choice for t in tensors], max_bytes - _header(tensors, kv_bytes))


def check(
    tensors: Sequence[Tensor], kv_bytes: int, max_bytes: int, place: str, *, in_bits: bool = False, more: int = 0
) -> None:
    """Raises BudgetRefused where the smallest file is larger than ``max_bytes``.

    ``in_bits``: the user limits bits a weight; ``more``: bytes that the key-value pairs may take beside ``kv_bytes``.
    """
    smallest = least(tensors, kv_bytes)
    if smallest > max_bytes:
        fact = f"the smallest file of these types takes {format_size(smallest)}, {format_size(max_bytes)} are allowed"
        enough = smallest + more
        bits = math.ceil(800 * enough / sum(math.prod(t.shape) for t in tensors)) / 100
        allowing = f"max_bpw={bits:g}" if in_bits else f"max_size={enough}"
        raise BudgetRefused(place, fact, f"allow more: {place}.{allowing}, or smaller types: {place}.types")


def size(choices: Sequence[Choice], types: Mapping[str, str]) -> int:
    """Bytes of the chosen types."""
    return sum(choice.types[types[choice.name]][0] for choice in choices)


def damage(choices: Sequence[Choice], types: Mapping[str, str]) -> float:
    """Damage of the chosen types, summed without rounding on the way."""
    return math.fsum(choice.types[types[choice.name]][1] for choice in choices)


def choose(choices: Sequence[Choice], max_bytes: int) -> dict[str, str]:
    """The type of every tensor, so that their bytes are at most ``max_bytes`` and no other way does less damage.

    Neither the order of the tensors nor that of their types decides anything: of a tensor's equal types the smallest
    and then the first by name is taken, of equal tensors the first by name gets the larger type. Raises BudgetRefused
    with the least size that can be had, ValueError for a damage that is negative or not a number.
    """
    ordered = sorted(choices, key=lambda choice: choice.name)
    if len({choice.name for choice in ordered}) < len(ordered):
        raise ValueError("two choices have one name")
    useful = [Choice(choice.name, _useful(choice)) for choice in ordered]
    least = sum(min(nbytes for nbytes, _ in choice.types.values()) for choice in useful)
    if least > max_bytes:
        fact = f"the smallest types take {format_size(least)}, {format_size(max_bytes)} are left for them"
        raise BudgetRefused("fit", fact, f"allow {least - max_bytes} bytes more")
    limit = max_bytes
    while True:
        found = _solve(useful, limit)
        over = size(useful, found) - max_bytes
        if over <= 0:
            return _settled(useful, found)
        limit -= over  # the solver's tolerance let it pass the limit


def _useful(choice: Choice) -> dict[str, tuple[int, float]]:
    """Without the types that another one beats, smallest first."""
    kept: dict[str, tuple[int, float]] = {}
    best = math.inf
    for type_, (nbytes, hurt) in sorted(choice.types.items(), key=lambda item: (*item[1], item[0])):
        if not (math.isfinite(hurt) and hurt >= 0):
            raise ValueError(f"{choice.name}: the damage of {type_} is {hurt}")
        if hurt < best:
            kept[type_], best = (nbytes, hurt), hurt
    return kept


def _solve(choices: Sequence[Choice], limit: int) -> dict[str, str]:
    """One binary variable for each type of each tensor; the variables of a tensor sum to one."""
    if not choices:
        return {}
    import numpy as np
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import csr_array

    owners = np.repeat(np.arange(len(choices)), [len(choice.types) for choice in choices])
    numbers = np.arange(len(owners))
    # The extra bytes and the saved damage over each tensor's smallest type: small numbers keep the solver exact.
    least = [next(iter(choice.types.values())) for choice in choices]
    extra = [n - low for choice, (low, _) in zip(choices, least, strict=True) for n, _ in choice.types.values()]
    saved = [top - d for choice, (_, top) in zip(choices, least, strict=True) for _, d in choice.types.values()]
    unit = math.gcd(*extra) or 1
    room = (limit - sum(low for low, _ in least)) // unit
    worth = -np.array(saved) / (sum(top for _, top in least) or 1.0) * SCALE
    one_each = csr_array((np.ones(len(owners)), (owners, numbers)))
    within = csr_array(np.array(extra, dtype=np.float64)[None] / unit)
    with _silent():
        result = milp(
            worth, integrality=np.ones(len(owners)), bounds=Bounds(0, 1),
            constraints=[LinearConstraint(one_each, 1, 1), LinearConstraint(within, -np.inf, room)],
            options={"mip_rel_gap": 0.0},
        )  # fmt: skip
    if result.x is None or result.status != 0:
        raise ActionFailed("fit", f"the solver found no best choice of types: {result.message}", "choose another size")
    types = [type_ for choice in choices for type_ in choice.types]
    return {choices[owners[n]].name: types[n] for n in np.flatnonzero(result.x > 0.5)}


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """HiGHS in scipy 1.17 prints lines of its debugging, whatever its options say."""
    sys.stdout.flush()
    kept, nowhere = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    try:
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)
        os.close(nowhere)


def _settled(choices: Sequence[Choice], types: Mapping[str, str]) -> dict[str, str]:
    """The same choice, with the types of equal tensors dealt out by name, largest first."""
    groups: dict[tuple[tuple[str, tuple[int, float]], ...], list[Choice]] = {}
    for choice in choices:
        groups.setdefault(tuple(choice.types.items()), []).append(choice)
    dealt: dict[str, str] = {}
    for equal in groups.values():
        largest_first = sorted((types[c.name] for c in equal), key=lambda t: -equal[0].types[t][0])
        dealt |= dict(zip((c.name for c in equal), largest_first, strict=True))
    return {choice.name: dealt[choice.name] for choice in choices}
