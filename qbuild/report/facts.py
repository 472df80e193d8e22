"""build.json → the report's own document: what it held, and what follows from it."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from pathlib import PurePath
from statistics import fmean
from typing import Any

__all__ = ["METRICS", "REQUIRED", "commands", "errors", "pareto", "report", "source_perplexity"]

Document = Mapping[str, Any]
_GENERATE = "from transformers import pipeline; print(pipeline('text-generation', {path!r})('Once upon a time'))"
REQUIRED = frozenset({"model", "targets", "totals", "jobs", "versions"})
METRICS = ("kl", "perplexity")  # of a target's evaluation; less is better, and zero the least there can be


def report(built: Document) -> dict[str, Any]:
    """All that ``build.json`` holds, and for each target its ``file``, ``commands``, ``evaluation``, ``front`` and
    ``errors``.

    ``front`` says by metric whether no other target is as small and as good; ``errors`` is what ``errors`` tells of its
    weights. Where nothing was evaluated, these three are null.
    """
    measured: Document = (built.get("evaluation") or {}).get("targets", {})
    sizes = {name: target["bytes"] for name, target in built["targets"].items() if name in measured}
    fronts = {metric: pareto({n: (sizes[n], measured[n][metric]) for n in sizes}) for metric in METRICS}
    targets = {}
    for name, target in built["targets"].items():
        file = PurePath(target["path"]).name
        targets[name] = dict(target) | {
            "file": file,
            "commands": commands(file),
            "evaluation": measured.get(name),
            "front": {metric: name in front for metric, front in fronts.items()} if name in measured else None,
            "errors": errors(measured[name].get("weights", {})) if name in measured else None,
        }
    return {"evaluation": None, "notices": []} | dict(built) | {"targets": targets}


def source_perplexity(measured: Mapping[str, Document]) -> float | None:
    """Of the source, which every target's evaluation notes; None where an older qbuild measured them."""
    return next((result["source_perplexity"] for result in measured.values() if "source_perplexity" in result), None)


def errors(weights: Mapping[str, float]) -> dict[str, Any] | None:
    """Relative squared errors of a target's matrices in short: ``layers``, the mean of each decoder layer; ``mean`` of
    all matrices; ``largest``, the name and error of the worst. None where none were told."""
    if not weights:
        return None
    layers: dict[int, list[float]] = {}
    for name, error in weights.items():
        if (found := re.search(r"\.(\d+)\.", name)) is not None:
            layers.setdefault(int(found[1]), []).append(error)
    worst = max(weights, key=lambda name: weights[name])
    means = [fmean(layers[index]) for index in sorted(layers)]
    return {"layers": means, "mean": fmean(weights.values()), "largest": [worst, weights[worst]]}


def pareto(points: Mapping[str, tuple[float, float]]) -> set[str]:
    """The names that no other point beats: none is at most as large in both and smaller in one."""

    def beaten(name: str) -> bool:
        x, y = points[name]
        return any(a <= x and b <= y and (a, b) != (x, y) for a, b in points.values())

    return {name for name in points if not beaten(name)}


def commands(file: str) -> list[dict[str, str]]:
    """How to run a file, in the folder where it lies: ``{"program", "command"}`` for each program that loads it."""
    path = shlex.quote(f"./{file}" if file.startswith("-") else file)
    if file.endswith((".imatrix", "-imatrix.gguf")):
        return [{"program": "llama.cpp", "command": f"llama-quantize --imatrix {path} MODEL-F16.gguf Q4_K_M"}]
    if file.endswith(".gguf"):
        return [
            {"program": "llama.cpp", "command": f"llama-cli -m {path} -p 'Once upon a time'"},
            {"program": "llama.cpp, as a server", "command": f"llama-server -m {path} --port 8080"},
        ]
    folder = shlex.quote(f"./{file}")  # without a slash both programs look for a model of that name on the Hub
    return [
        {"program": "vLLM", "command": f"vllm serve {folder}"},
        {"program": "transformers", "command": f"python -c {shlex.quote(_GENERATE.format(path=f'./{file}'))}"},
    ]
