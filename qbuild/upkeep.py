"""What ``verify``, ``gc`` and ``status`` say about a store: values, and the choice of what goes."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from qbuild.digest import Digest

__all__ = ["GcItem", "GcReport", "Problem", "Stats", "choose"]


@dataclass(frozen=True)
class Problem:
    """``kind``: ``damaged`` or ``missing``. ``where``: ``blob``, ``slice`` (of an unfinished file) or ``output``."""

    kind: str
    where: str
    path: Path
    digest: Digest
    fact: str

    def __str__(self) -> str:
        return f"{self.path}: {self.where} is {self.kind}: {self.fact}"


@dataclass(frozen=True)
class GcItem:
    """A file that goes. ``frees`` is 0 where an output is the same file (a hard link) and stays."""

    path: Path
    size: int
    frees: int
    last_used: int
    why: str


@dataclass(frozen=True)
class GcReport:
    items: tuple[GcItem, ...]
    kept: int  # bytes that stay in the store
    dry_run: bool

    @property
    def freed(self) -> int:
        return sum(item.frees for item in self.items)


@dataclass(frozen=True)
class Stats:
    blobs: int
    blob_bytes: int
    partials: int
    partial_bytes: int
    slices: int
    results: int
    outputs: int


def choose(droppable: Iterable[GcItem], kept: int, limit: int | None) -> tuple[list[GcItem], int]:
    """What to drop, the least recently used first, and the bytes that stay. No limit: all that may go."""
    items = sorted(droppable, key=lambda item: (item.last_used, str(item.path)))
    total, chosen = kept + sum(item.size for item in items), []
    for item in items:
        if limit is not None and total <= limit:
            break
        chosen.append(item)
        total -= item.size
    return chosen, total
