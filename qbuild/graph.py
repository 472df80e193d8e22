"""The graph: actions, what they read, and the targets that are asked for. Values only; nothing is read or run here."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from qbuild.digest import Digest

__all__ = ["Action", "Graph", "Input", "Output", "Source"]


@dataclass(frozen=True, slots=True)
class Source:
    """Bytes of the outside world: ``nbytes`` at ``offset`` of a file. Their digest may not be known yet."""

    name: str
    file: str
    offset: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class Output:
    """What another action of the graph makes."""

    action: str


Input = Source | Output | Digest


@dataclass(frozen=True, slots=True)
class Action:
    """Repeatable work: ``kind`` names its rules, ``params`` (a frozen dataclass) and ``inputs`` decide its bytes.

    ``id`` is unique in the graph and readable (``blk.0.attn_q.weight:Q4_K``); it never enters the key.
    """

    id: str
    kind: str
    params: Any
    inputs: tuple[tuple[str, Input], ...]


@dataclass
class Graph:
    """Actions in dependency order: an action is added after what it reads, so there can be no cycle."""

    actions: dict[str, Action] = field(default_factory=dict)
    targets: dict[str, str] = field(default_factory=dict)  # target name -> id of the action that makes it

    def add(self, action: Action) -> Output:
        """Add an action; adding an equal one again returns the same output (targets share it)."""
        known = self.actions.get(action.id)
        if known is not None:
            if known != action:
                raise ValueError(f"BUG: two different actions are called {action.id!r}")
            return Output(action.id)
        for _, item in action.inputs:
            if isinstance(item, Output) and item.action not in self.actions:
                raise ValueError(f"BUG: {action.id!r} reads {item.action!r}, which is not in the graph yet")
        self.actions[action.id] = action
        return Output(action.id)

    def reads(self, action_id: str) -> Iterator[str]:
        """Ids of the actions that ``action_id`` reads."""
        for _, item in self.actions[action_id].inputs:
            if isinstance(item, Output):
                yield item.action

    def needed(self, roots: Iterable[str]) -> list[str]:
        """Ids of ``roots`` and everything they need, in dependency order."""
        want: set[str] = set()
        stack = list(roots)
        while stack:
            action_id = stack.pop()
            if action_id not in want:
                want.add(action_id)
                stack.extend(self.reads(action_id))
        return [action_id for action_id in self.actions if action_id in want]
