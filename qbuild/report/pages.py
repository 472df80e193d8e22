"""The report's document as a page for a browser and as a model card."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from qbuild.budget import format_size
from qbuild.progress import duration
from qbuild.report.facts import source_perplexity
from qbuild.report.plot import Bar, Plot, Point, bars, scatter

if TYPE_CHECKING:
    from jinja2 import Environment

__all__ = ["html", "markdown"]

Document = Mapping[str, Any]
TITLES = {"kl": "KL divergence to the source, nats a token", "perplexity": "perplexity"}
MARKDOWN = re.compile(r"([\\`*_{}\[\]()#+!|~$-])")


def html(report: Document) -> str:
    """One page that loads nothing: the plots are SVG in it, and its policy forbids every request."""
    plots = {metric: _plot(report, metric) for metric in TITLES} if _measured(report) else {}
    shown = {"plots": plots, "sizes": _sizes(report), "seconds": _seconds(report), "memory": _memory(report)}
    shown["strips"] = _strips(report)
    return _render("report.html.j2", report, shown, private=True)


def markdown(report: Document) -> str:
    """A model card: what the Hub shows of a folder, as its README.md."""
    return _render("report.md.j2", report, {}, private=False)


def _render(template: str, report: Document, shown: Document, *, private: bool) -> str:
    values = {"report": report, "measured": _measured(report), "facts": _provenance(report, private=private)}
    own = source_perplexity((report["evaluation"] or {}).get("targets", {}))
    return _environment().get_template(template).render(values | dict(shown), source_perplexity=own)


def _environment() -> Environment:
    from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape

    made = Environment(
        loader=PackageLoader("qbuild.report"), autoescape=select_autoescape(("html.j2",)), undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True,
    )  # fmt: skip
    made.filters |= {"size": format_size, "duration": duration, "number": number, "percent": percent}
    made.filters |= {"md": _escaped, "fence": _fenced, "json": lambda value: json.dumps(value)}
    return made


def number(value: float) -> str:
    """Four digits that count: 0.0001234, 8.120, 35.89, 12345; below a millionth two, with an exponent."""
    if value == 0:
        return "0"
    if abs(value) < 1e-6:
        return f"{value:.1e}"
    return f"{value:.{max(0, 3 - math.floor(math.log10(abs(value))))}f}"


def percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _escaped(text: object) -> str:
    """Text that Markdown takes for text, on one line."""
    plain = str(text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return MARKDOWN.sub(r"\\\1", " ".join(plain.split()))


def _fenced(code: str) -> str:
    """A code block that nothing in the code can end."""
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", code)), default=0))
    return f"{fence}\n{code}\n{fence}"


def _measured(report: Document) -> list[str]:
    """The targets that were evaluated, smallest first."""
    targets = report["targets"]
    return sorted((n for n in targets if targets[n]["evaluation"]), key=lambda name: (targets[name]["bytes"], name))


def _plot(report: Document, metric: str) -> Plot:
    points = []
    for name in _measured(report):
        target = report["targets"][name]
        result = target["evaluation"]
        about = [name, format_size(target["bytes"]), f"{target['bits_per_weight']:.2f} bits a weight"]
        about += [f"KL {number(result['kl'])}", f"perplexity {number(result['perplexity'])}"]
        about += [f"same first choice {percent(result['top1'])}"]
        points.append(Point(name, target["bytes"], result[metric], target["front"][metric], " · ".join(about)))
    return scatter(points, TITLES[metric])


def _strips(report: Document) -> dict[str, list[tuple[float, float]]]:
    """Layer by layer, the mean error of a target's weights: in percent of its worst layer's, and as it is."""
    told = {name: report["targets"][name]["errors"] for name in _measured(report)}
    layers = {name: errors["layers"] for name, errors in told.items() if errors and errors["layers"]}
    return {n: [(100 * error / (max(row) or 1.0), error) for error in row] for n, row in layers.items()}


def _sizes(report: Document) -> Sequence[Bar]:
    return bars({n: (t["bytes"], format_size(t["bytes"]), None) for n, t in report["targets"].items()})


def _seconds(report: Document) -> Sequence[Bar]:
    return bars({n: (job["seconds"], duration(job["seconds"]), None) for n, job in report["jobs"].items()})


def _memory(report: Document) -> Sequence[Bar]:
    """What each job took, marked with what was predicted of it."""
    rows = {}
    for name, job in report["jobs"].items():
        text = f"{format_size(job['peak_ram'])} of {format_size(job['predicted_ram'])}"
        rows[name] = (job["peak_ram"], text, job["predicted_ram"])
    return bars(rows)


def _provenance(report: Document, *, private: bool) -> list[tuple[str, str]]:
    """What the files were made of. A local path is told only where it stays: not on a card."""
    model = report["model"]
    source = str(model["source"])
    local = model["revision"] is None and not source.startswith("pkg://")
    found = [] if local and not private else [("source", source)]
    found += [("revision", model["revision"])] if model["revision"] else []
    found += [("digest of what was read", model["inputs"])]
    for title, part in (*_calibrations(report), ("evaluation", report["evaluation"] or {})):
        kept = ("digest", "samples", "length", "dtype")
        found += [(f"{title} {key}", str(part[key])) for key in kept if part.get(key) is not None]
        text = part.get("source")
        if text and (private or text == "builtin"):
            found.append((f"{title} text", str(text)))
    return found + [(f"version of {name}", version) for name, version in report["versions"].items()]


def _calibrations(report: Document) -> list[tuple[str, Document]]:
    """Every text that a target was calibrated on, under a title: with the targets' names where there are several."""
    found: dict[str, tuple[list[str], Document]] = {}
    for name, target in report["targets"].items():
        if part := target.get("calibration"):
            found.setdefault(repr(part), ([], part))[0].append(name)
    if len(found) == 1:
        return [("calibration", part) for _, part in found.values()]
    return [(f"{', '.join(names)}: calibration", part) for names, part in found.values()]
