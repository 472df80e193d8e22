"""Which files a build depended on, so that the same command can be answered from its record next time."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qbuild import fastpath, schema
from qbuild.actions.tokens import BUILTIN
from qbuild.checkpoint import AUX, TEMPLATES
from qbuild.recipe import AUTO, calibrates
from qbuild.running import IDLE

__all__ = ["as_null", "inputs", "outputs"]


def inputs(config: schema.Config, folders: tuple[Path, ...]) -> list[str] | None:
    """Configuration and source files; None where stats cannot tell that nothing changed (a model on the Hub)."""
    source = _source(config.model.source or "")
    if source is None or config.rebuild:
        return None
    found = [path for folder in folders for path in fastpath.tree(str(folder))]
    targets = [t for t in config.targets.values() if isinstance(t, schema.GgufTarget | schema.FitTarget)]
    read = [t.imatrix for t in targets if t.imatrix and t.imatrix != AUTO]
    if calibrates(config) and config.calibration.source != BUILTIN:
        read.append(config.calibration.source)
    if config.evaluation.source not in (None, BUILTIN):
        read.append(config.evaluation.source)
    texts = [path for name in read for path in fastpath.tree(str(Path(name).expanduser()))]  # a text may be a folder
    return [*found, *map(str, source), *texts]


def _source(source: str) -> list[Path] | None:
    if not source:
        return None
    if source.startswith("pkg://"):
        package, _, inside = source.removeprefix("pkg://").partition("/")
        spec = importlib.util.find_spec(package)
        roots = list(spec.submodule_search_locations or []) if spec else []
        return [Path(roots[0]) / inside] if roots else None
    path = Path(source).expanduser()
    if path.is_dir():
        below = [path / name for name in AUX if "/" in name and (path / name).is_file()]
        return [path, *sorted(path.iterdir()), *below, *sorted(path.glob(TEMPLATES))]
    if not path.is_file():
        return None
    split = re.fullmatch(r"(.+)-\d{5}-of-(\d{5})\.gguf", path.name)
    return sorted(path.parent.glob(f"{split[1]}-*-of-{split[2]}.gguf")) if split else [path]


def outputs(document: Mapping[str, Any]) -> list[str]:
    """Every file that was made, the folders among them, and what was written of the build."""
    paths = [Path(target["path"]) for target in document["targets"].values()]
    files = [file for target in document["targets"].values() for file in target["files"]]
    return [*map(str, paths), *files, *sorted({str(path.parent / "build.json") for path in paths})]


def as_null(document: Mapping[str, Any]) -> dict[str, Any]:
    """The document that the next build would make if nothing changes: all of it was there."""
    targets = {name: _idle(target) for name, target in document["targets"].items()}
    evaluation = document["evaluation"] and _idle(document["evaluation"])
    totals = {key: {} if isinstance(value, dict) else type(value)() for key, value in document["totals"].items()}
    return {**document, "targets": targets, "evaluation": evaluation, "totals": totals, "jobs": {}}


def _idle(made: dict[str, Any]) -> dict[str, Any]:
    return made | IDLE | {"verdicts": {"hit": sum(made["verdicts"].values())}}
