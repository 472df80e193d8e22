"""Where the marks of a plot stand: values to positions on the page. The template draws them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

__all__ = ["Bar", "Label", "Mark", "Plot", "Point", "Tick", "bars", "scatter"]

WIDTH, HEIGHT = 760.0, 360.0
LEFT, RIGHT, TOP, BOTTOM = 76.0, 24.0, 16.0, 48.0
LETTER, LINE = 7.2, 15.0  # what a letter of a label takes at most, in px at the font size of the page
RADIUS = 5.5
DECADE = 8.0  # values that differ by more than this factor get a logarithmic axis
NOTHING = 1e-6  # on a logarithmic axis less is drawn as zero: a divergence of so little is rounding

Place = Callable[[float], float]
Spot = tuple[float, float]
Box = tuple[float, float, float, float]  # left, top, right, bottom


@dataclass(frozen=True)
class Point:
    """A target: bytes, a metric, whether it is on the front, and what is told of it."""

    name: str
    x: float
    y: float
    front: bool
    about: str


@dataclass(frozen=True)
class Tick:
    at: float
    text: str


@dataclass(frozen=True)
class Label:
    x: float
    y: float
    anchor: str  # SVG's text-anchor


@dataclass(frozen=True)
class Mark:
    point: Point
    x: float
    y: float
    label: Label | None  # none where every place beside the point is taken


@dataclass(frozen=True)
class Plot:
    """``front`` are the corners of the line through the best points."""

    x_title: str
    y_title: str
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    marks: tuple[Mark, ...]
    front: tuple[tuple[float, float], ...]
    width: float = WIDTH
    height: float = HEIGHT
    left: float = LEFT
    right: float = WIDTH - RIGHT
    top: float = TOP
    bottom: float = HEIGHT - BOTTOM


def scatter(points: Sequence[Point], y_title: str) -> Plot:
    """Size against a metric, less being better in both. Sizes are linear; a metric over decades is logarithmic."""
    unit, unit_name = _unit(max(p.x for p in points))
    x_values = [p.x / unit for p in points]
    y_values = [p.y for p in points]
    x_place, x_ticks = _linear(x_values, LEFT, WIDTH - RIGHT)
    y_place, y_ticks = _axis(y_values, HEIGHT - BOTTOM, TOP)
    at = {p.name: (x_place(p.x / unit), y_place(p.y)) for p in points}
    front = sorted(at[p.name] for p in points if p.front)
    taken = [(x - RADIUS, y - RADIUS, x + RADIUS, y + RADIUS) for x, y in at.values()]
    marks = []
    for point in sorted(points, key=lambda p: (not p.front, p.name)):  # the best ones get their names first
        x, y = at[point.name]
        others = [place for name, place in at.items() if name != point.name]
        marks.append(Mark(point, x, y, _label(point.name, (x, y), others, taken)))
    return Plot(f"size, {unit_name}", y_title, x_ticks, y_ticks, tuple(marks), tuple(front))


def _unit(nbytes: float) -> tuple[float, str]:
    return (float(1 << 30), "GiB") if nbytes >= 1 << 30 else (float(1 << 20), "MiB")


def _axis(values: Sequence[float], start: float, end: float) -> tuple[Place, tuple[Tick, ...]]:
    above = [v for v in values if v > NOTHING]
    if len(above) > 1 and max(above) > DECADE * min(above):
        return _logarithmic(above, start, end, zero=len(above) < len(values))
    return _linear(values, start, end)


def _linear(values: Sequence[float], start: float, end: float) -> tuple[Place, tuple[Tick, ...]]:
    low, high = min(values), max(values)
    span = (high - low) or abs(high) or 1.0
    low, high = max(low - 0.08 * span, 0.0) if low >= 0 else low - 0.08 * span, high + 0.08 * span
    step = 10 ** math.floor(math.log10((high - low) / 4))
    step *= next(factor for factor in (1, 2, 5, 10) if factor * step * 6 >= high - low)
    places = max(0, -math.floor(math.log10(step)))

    def place(value: float) -> float:
        return start + (value - low) / (high - low) * (end - start)

    numbers = range(math.ceil(low / step), math.floor(high / step) + 1)
    return place, tuple(Tick(place(n * step), f"{n * step:.{places}f}") for n in numbers)


def _logarithmic(above: Sequence[float], start: float, end: float, zero: bool) -> tuple[Place, tuple[Tick, ...]]:
    """A zero has no logarithm: it stands at the start of the axis, which is then called 0."""
    low, high = math.log10(min(above)), math.log10(max(above))
    low, high = low - (0.25 if zero else 0.08) * (high - low), high + 0.08 * (high - low)

    def place(value: float) -> float:
        return start + (math.log10(value) - low) / (high - low) * (end - start) if value > NOTHING else start

    digits = (1,) if high - low > 2.5 else (1, 2, 5)
    values = [d * 10.0**power for power in range(math.floor(low), math.ceil(high) + 1) for d in digits]
    ticks = [Tick(place(v), f"{v:.10f}".rstrip("0").rstrip(".")) for v in values if low <= math.log10(v) <= high]
    return place, tuple([Tick(start, "0"), *ticks] if zero else ticks)


def _label(text: str, at: Spot, others: Sequence[Spot], taken: list[Box]) -> Label | None:
    """The first place beside a point where its name covers nothing and is no nearer to another point; ``taken`` grows
    by it."""
    x, y = at
    wide, gap = LETTER * len(text), RADIUS + 5
    sides = [
        (Label(x + gap, y + 4, "start"), x + gap, y - LINE / 2),
        (Label(x, y - gap, "middle"), x - wide / 2, y - gap - LINE + 3),
        (Label(x - gap, y + 4, "end"), x - gap - wide, y - LINE / 2),
        (Label(x, y + gap + 9, "middle"), x - wide / 2, y + gap - 3),
    ]
    for label, left in (Label(x + gap, y, "start"), x + gap), (Label(x - gap, y, "end"), x - gap - wide):
        sides += [(replace(label, y=y + off + 4), left, y + off - LINE / 2) for off in (-LINE, LINE)]
    for label, left, top in sides:
        box = (left, top, left + wide, top + LINE)
        inside = left >= LEFT and box[2] <= WIDTH and top >= 0 and box[3] <= HEIGHT - BOTTOM
        own = math.dist(at, (label.x, label.y - 4))
        near = any(math.dist(other, (label.x, label.y - 4)) < own for other in others)
        if inside and not near and not any(_overlap(box, other) for other in taken):
            taken.append(box)
            return label
    return None


def _overlap(one: Box, other: Box) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]


@dataclass(frozen=True)
class Bar:
    """``share`` of the longest bar, in percent; ``mark`` where another value stands on the same scale."""

    name: str
    text: str
    share: float
    mark: float | None


def bars(rows: Mapping[str, tuple[float, str, float | None]]) -> tuple[Bar, ...]:
    """Bars of ``{name: (value, text, mark)}``, all on one scale that begins at zero."""
    longest = max([max(value, mark or 0.0) for value, _, mark in rows.values()], default=0.0) or 1.0
    return tuple(
        Bar(name, text, 100 * value / longest, None if mark is None else 100 * mark / longest)
        for name, (value, text, mark) in rows.items()
    )
