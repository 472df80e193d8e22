"""Sizes, footprints and budgets: plain arithmetic on values, the vocabulary of every refusal."""

from __future__ import annotations

import re
from dataclasses import dataclass

from qbuild.errors import BudgetRefused, ConfigError

__all__ = ["Budget", "Footprint", "Remedy", "format_size", "parse_size", "refuse"]

_UNITS = {"": 1, "B": 1}
for _power, _prefix in enumerate("KMGT", start=1):
    _UNITS[_prefix + "B"] = 1000**_power
    _UNITS[_prefix + "iB"] = 1024**_power


def parse_size(text: str | int, place: str) -> int:
    """Bytes of ``16GiB``, ``500MB`` or ``1073741824``."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", str(text))
    if match is None or match[2] not in _UNITS:
        raise ConfigError(place, f"{text!r} is not a size", "write bytes or a unit: 16GiB, 500MB, auto")
    return int(float(match[1]) * _UNITS[match[2]])


def format_size(nbytes: float) -> str:
    """``31.2 GiB``: binary units, one decimal, whole bytes below one KiB."""
    if abs(nbytes) < 1024:
        return f"{int(nbytes)} B"
    for unit in ("KiB", "MiB", "GiB"):
        nbytes /= 1024
        if abs(nbytes) < 1024:
            return f"{nbytes:.1f} {unit}"
    return f"{nbytes / 1024:.1f} TiB"


@dataclass(frozen=True)
class Footprint:
    """Predicted peak of one action, in bytes. ``disk`` counts what stays and what is temporary."""

    ram: int = 0
    vram: int = 0
    disk: int = 0


@dataclass(frozen=True)
class Budget:
    """What a build may use: bytes, and threads. ``auto`` has been resolved."""

    ram: int
    vram: int
    disk: int
    threads: int


@dataclass(frozen=True)
class Remedy:
    """A way out of a refusal: what it is, what would then be needed, and the override to paste."""

    what: str
    needs: int
    override: str


def refuse(who: str, resource: str, needs: int, limit: int, remedies: list[Remedy]) -> BudgetRefused:
    """The refusal of a plan that can never fit, with the cheapest remedies first."""
    width = max((len(r.what) for r in remedies), default=0)
    lines = [f"{r.what + ':':<{width + 1}} {format_size(r.needs):>10}  → {r.override}" for r in remedies]
    fact = f"{who} needs {format_size(needs)} of {resource}, the budget is {format_size(limit)}"
    return BudgetRefused("refused", fact, "\n".join(lines))
