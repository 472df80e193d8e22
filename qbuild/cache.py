"""The action cache: action key → result. Only what succeeded is in it. What can no longer be served is still known, so
that what was made of it is found.

Beside the results lie two kinds of notes that no result depends on: hints (work of this name was done before, so
hashing its input first may spare it) and measured rates.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from qbuild.digest import Digest
from qbuild.store import Store

__all__ = ["ActionCache", "ActionResult"]

KEEP_NOTES = 16  # measurements of one name: the newest count


@dataclass(frozen=True)
class ActionResult:
    """What an action made. ``inputs``: the stored artifacts it read, which ``gc`` keeps while it keeps the outputs.
    ``about``: stored artifacts that it tells something of; ``gc`` keeps the outputs while it keeps one of them."""

    kind: str
    outputs: tuple[Digest, ...]
    inputs: tuple[Digest, ...] = ()
    about: tuple[Digest, ...] = ()


class ActionCache:
    """Results of a store. ``since``: those that were stored before (nanoseconds since the epoch) do not count."""

    def __init__(self, store: Store, since: int = 0) -> None:
        self.store, self.since = store, since

    def get(self, key: str) -> ActionResult | None:
        """The result, if it is still stored."""
        found = self.find(key)
        return found if found is not None and self.stored(found) else None

    def stored(self, result: ActionResult) -> bool:
        """Whether every output is still in the store, as a blob or as a slice of one."""
        return all(self.store.has(digest) for digest in result.outputs)

    def find(self, key: str) -> ActionResult | None:
        """The result, whether or not its outputs are still there."""
        query = "SELECT kind, outputs, inputs, about FROM results WHERE key = ? AND created >= ?"
        with self.store.index.reading() as db:
            row = db.execute(query, (key, self.since)).fetchone()
        if row is None:
            return None
        return ActionResult(row[0], *map(_digests, row[1:]))

    def put(self, key: str, result: ActionResult) -> None:
        self.put_many([(key, result)])

    def put_many(self, results: Iterable[tuple[str, ActionResult]]) -> None:
        """Store results; the newest of a key counts. An action that failed has none, nothing stands in for it."""
        rows = []
        for key, result in results:
            if not result.outputs:
                raise ValueError(f"BUG: a result of {result.kind} without outputs")
            rows.append(_row(key, result, self.store.clock()))
        with self.store.index.writing() as db:
            db.executemany("INSERT OR REPLACE INTO results VALUES (?, ?, ?, ?, ?, ?)", rows)

    def forget(self, key: str) -> None:
        with self.store.index.writing() as db:
            db.execute("DELETE FROM results WHERE key = ?", (key,))

    # notes -----------------------------------------------------------------------------------------------------------

    def note_hint(self, key: str) -> None:
        with self.store.index.writing() as db:
            db.execute("INSERT OR IGNORE INTO hints VALUES (?)", (key,))

    def has_hint(self, key: str) -> bool:
        with self.store.index.reading() as db:
            return db.execute("SELECT 1 FROM hints WHERE key = ?", (key,)).fetchone() is not None

    def note_rate(self, name: str, per_second: float) -> None:
        with self.store.index.writing() as db:
            db.execute("INSERT INTO rates (name, per_second) VALUES (?, ?)", (name, per_second))
            db.execute(
                "DELETE FROM rates WHERE id IN"
                " (SELECT id FROM rates WHERE name = ? ORDER BY id DESC LIMIT -1 OFFSET ?)",
                (name, KEEP_NOTES),
            )

    def rate(self, name: str) -> float | None:
        """The median of what was measured on this machine, or None."""
        with self.store.index.reading() as db:
            rows = db.execute("SELECT per_second FROM rates WHERE name = ? ORDER BY per_second", (name,)).fetchall()
        return rows[len(rows) // 2][0] if rows else None


def _row(key: str, result: ActionResult, created: int) -> tuple[Any, ...]:
    lists = (result.outputs, result.inputs, result.about)
    outputs, inputs, about = (json.dumps([str(digest) for digest in digests]) for digests in lists)
    return key, result.kind, outputs, inputs, about, created


def _digests(text: str) -> tuple[Digest, ...]:
    return tuple(Digest.parse(item) for item in json.loads(text))
