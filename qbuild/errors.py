"""Every error a user can meet. A message has a place, a fact and a remedy; the class decides the exit code.

    QbuildError               1
    ├── ActionFailed          1   an action ran and failed (a killed worker, a full disk, NaN weights)
    │   └── StoreError        1   the store cannot be read or written
    ├── ConfigError           2   usage or configuration
    ├── BudgetRefused         3   the plan cannot fit; nothing was started
    ├── InputError            4   the input is missing, damaged or not supported
    │   └── InputChanged      4   a file is not what it was when it was hashed
    └── Interrupted         130

Anything else that escapes is a bug in qbuild and is reported as one (``BUG:``).
"""

from __future__ import annotations

import textwrap
from dataclasses import dataclass

__all__ = [
    "WIDTH", "ActionFailed", "BudgetRefused", "ConfigError", "InputChanged", "InputError", "Interrupted", "Notice",
    "QbuildError", "StoreError", "told",
]  # fmt: skip

WIDTH = 80  # columns of what people read


def told(place: str, fact: str, remedy: str) -> str:
    """Place and fact, then the remedy set in and wrapped: one may list every choice. A line of it that is set in
    already is a command to paste, and stays whole."""
    lines = [f"{place}: {fact}" if place else fact]
    wrapper = textwrap.TextWrapper(
        WIDTH, initial_indent="  ", subsequent_indent="    ", break_long_words=False, break_on_hyphens=False
    )
    for line in remedy.splitlines():
        lines += [f"  {line}"] if line.startswith("  ") else wrapper.wrap(line)
    return "\n".join(lines)


class QbuildError(Exception):
    """place: fact, then the remedy on lines of its own. All three are plain text without a trailing period."""

    exit_code = 1

    def __init__(self, place: str, fact: str, remedy: str = "") -> None:
        super().__init__(place, fact, remedy)
        self.place, self.fact, self.remedy = place, fact, remedy

    def __str__(self) -> str:
        return told(self.place, self.fact, self.remedy)


class ActionFailed(QbuildError):
    exit_code = 1


class StoreError(ActionFailed):
    pass


class ConfigError(QbuildError):
    exit_code = 2


class BudgetRefused(QbuildError):
    exit_code = 3


class InputError(QbuildError):
    exit_code = 4


class InputChanged(InputError):
    pass


class Interrupted(QbuildError):
    exit_code = 130


@dataclass(frozen=True)
class Notice:
    """What is probably not meant, and no error: it stops nothing and changes no byte."""

    place: str
    fact: str
    remedy: str

    def __str__(self) -> str:
        return told(self.place, self.fact, self.remedy)
