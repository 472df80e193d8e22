"""What a build shows while it runs: a live view in a terminal, now and then a line elsewhere, messages only for JSON.

Everything here goes to standard error; standard output belongs to the result.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, TextIO

from qbuild.budget import format_size

__all__ = ["Lines", "Live", "Messages", "Sink", "Status", "duration", "sink"]

NEAR = 0.9  # of the budget: worth a second look
EVERY = 5.0  # seconds between plain lines


@dataclass(frozen=True)
class Status:
    """A moment of a build. ``rss`` and ``budget`` are bytes of RAM; ``bound``: CPU, GPU, memory or disk."""

    tensors_done: int
    tensors_total: int
    bytes_done: int
    bytes_total: int
    weights_per_s: float | None  # None: weights are not what is counted
    eta_s: float | None
    rss: int
    budget: int
    bound: str
    current: str
    unit: str = "tensors"

    @property
    def share(self) -> float:
        return min(1.0, self.bytes_done / self.bytes_total) if self.bytes_total else 1.0

    @property
    def near_budget(self) -> bool:
        return bool(self.budget) and self.rss > NEAR * self.budget


class Sink(Protocol):
    """``message`` may come at any time; ``update`` only between ``start`` and ``finish``, as often as one likes."""

    def start(self, title: str, total: int, total_bytes: int, budget_ram: int, unit: str = "tensors") -> None: ...

    def update(self, status: Status) -> None: ...

    def message(self, level: str, text: str) -> None: ...

    def finish(self) -> None: ...


def sink(stream: TextIO, *, quiet: bool) -> Sink:
    """The sink that fits where ``stream`` leads."""
    if quiet:
        return Messages(stream)
    return Live(stream) if stream.isatty() else Lines(stream)


class Messages:
    """Messages, no progress."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream

    def start(self, title: str, total: int, total_bytes: int, budget_ram: int, unit: str = "tensors") -> None:
        pass

    def update(self, status: Status) -> None:
        pass

    def message(self, level: str, text: str) -> None:
        self.stream.write(labelled(level, text) + "\n")
        self.stream.flush()

    def finish(self) -> None:
        pass


class Lines(Messages):
    """A line at the start, one every few seconds, one at the end: for logs."""

    def __init__(self, stream: TextIO, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__(stream)
        self.clock, self.shown, self.last = clock, 0.0, None

    last: Status | None  # what has come and is not shown

    def start(self, title: str, total: int, total_bytes: int, budget_ram: int, unit: str = "tensors") -> None:
        self.shown, self.last = self.clock(), None
        work = f"{total} {unit.removesuffix('s') if total == 1 else unit}"
        told = [] if work in title else [work]
        told += [f"{format_size(total_bytes)} to read"] if unit == "tensors" else []
        self.stream.write(": ".join([title, ", ".join(told)] if told else [title]) + "\n")
        self.stream.flush()

    def update(self, status: Status) -> None:
        self.last = status
        if self.clock() - self.shown >= EVERY:
            self._show(status)

    def finish(self) -> None:
        if self.last is not None:
            self._show(self.last)

    def _show(self, status: Status) -> None:
        self.shown, self.last = self.clock(), None
        facts = [f"{status.share:4.0%}", *work_of(status), memory_of(status), *outlook_of(status)]
        self.stream.write("  ".join(facts) + "\n")
        self.stream.flush()


class Live(Messages):
    """Three lines that are redrawn in place, gone when the build has ended."""

    def __init__(self, stream: TextIO) -> None:
        super().__init__(stream)
        self.view: Any = None
        self.title = ""

    def start(self, title: str, total: int, total_bytes: int, budget_ram: int, unit: str = "tensors") -> None:
        from rich.console import Console
        from rich.live import Live as RichLive

        self.title = title
        console = Console(file=self.stream, highlight=False)
        self.view = RichLive(console=console, refresh_per_second=8, transient=True, redirect_stdout=False)
        self.view.start()
        self.update(Status(0, total, 0, total_bytes, None, None, 0, budget_ram, "", "", unit))

    def update(self, status: Status) -> None:
        from rich.console import Group
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        head = Table.grid(padding=(0, 1), expand=True)
        head.add_column(ratio=1)
        head.add_column(width=5, justify="right")
        head.add_row(ProgressBar(total=1.0, completed=status.share), f"{status.share:.0%}")
        facts, memory, rest = work_of(status), memory_of(status), outlook_of(status)
        line = Text("".join(f"{fact} · " for fact in facts), overflow="ellipsis", no_wrap=True)
        line.append(memory, style="bold red" if status.near_budget else "")
        foot = Text(" · ".join([*rest, status.current]), style="dim", overflow="ellipsis", no_wrap=True)
        title = Text(self.title, style="bold", overflow="ellipsis", no_wrap=True)
        self.view.update(Group(title, head, line, foot))

    def message(self, level: str, text: str) -> None:
        if self.view is None:
            super().message(level, text)
        else:
            self.view.console.print(labelled(level, text), markup=False)

    def finish(self) -> None:
        if self.view is not None:
            self.view.stop()
        self.view = None


def labelled(level: str, text: str) -> str:
    return text if level == "info" else f"{level}: {text}"


def work_of(status: Status) -> list[str]:
    """Work done and its rate."""
    done = f"{status.tensors_done}/{status.tensors_total} {status.unit}"
    return [done] if status.weights_per_s is None else [done, f"{status.weights_per_s / 1e6:.0f} M weights/s"]


def memory_of(status: Status) -> str:
    if not status.rss:
        return f"RAM budget {format_size(status.budget)}"  # nothing is known of it yet
    near = ", near the budget" if status.near_budget else ""
    return f"RAM {format_size(status.rss)} of {format_size(status.budget)}{near}"


def outlook_of(status: Status) -> list[str]:
    """What bounds the build and how long it will still take."""
    over = status.share == 1 or status.tensors_done == status.tensors_total
    eta = "" if status.eta_s is None or over else f"{duration(status.eta_s)} left"
    return [fact for fact in (f"bound by {status.bound}" if status.bound else "", eta) if fact]


def duration(seconds: float) -> str:
    """``0.8 s``, ``42 s``, ``3 min 20 s``, ``2 h 05 min``."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02} min"
