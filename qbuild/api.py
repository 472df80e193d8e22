"""qbuild from Python: the command line's engine for notebooks and scripts.

    result = qbuild.build(qbuild.configure("model.source=./my-model", "target=gguf/q4_k_m"))
    result.targets["q4_k_m"].path

``configure`` takes the words of a command line, ``build`` what it gives.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qbuild import execute, progress, schema
from qbuild.cli import compose
from qbuild.cli.args import Args

__all__ = ["Evaluation", "Result", "TargetResult", "build", "configure"]


@dataclass(frozen=True)
class Evaluation:
    """A target against its source on the text of ``evaluation.source``.

    ``perplexity``: of all tokens of a window but its first; ``perplexity_llama``: of those in its second half, as
    llama.cpp counts them; ``source_…``: the source's own. ``kl``: D(source ‖ target), nats a token. ``top1``: share of
    equal first choices. ``tokens``: how many were compared. ``weights``: ‖W - Ŵ‖² / ‖W‖² of each matrix by its name in
    the source.
    """

    perplexity: float
    perplexity_llama: float
    source_perplexity: float
    source_perplexity_llama: float
    kl: float
    top1: float
    tokens: int
    weights: Mapping[str, float]


@dataclass(frozen=True)
class TargetResult:
    """One output, as in ``build.json``. ``path`` is what a loader is given, ``files`` are all of it. ``peak_…`` and
    ``predicted_…`` are bytes, 0 where nothing had to run.

    ``calibration``: the text it was calibrated on and the digest of its tokens; None where it was not.
    """

    path: Path
    files: tuple[Path, ...]
    digest: str
    bytes: int
    bits_per_weight: float
    verdicts: Mapping[str, int]  # of its tensors: "hit" and "run"
    seconds: float
    peak_ram: int
    predicted_ram: int
    peak_vram: int
    predicted_vram: int
    calibration: Mapping[str, Any] | None
    evaluation: Evaluation | None  # None where ``evaluation.source`` names no text


@dataclass(frozen=True)
class Result:
    """What a build made. ``document`` is all of it: the content of ``build.json``."""

    targets: Mapping[str, TargetResult]
    document: Mapping[str, Any]


def configure(*overrides: str, folder: str | Path = ".") -> schema.Config:
    """The configuration of a command line's words, such as ``+recipe=tiny_q4`` or ``budget.ram=8GiB``.

    Recipes and conf are looked for in ``folder`` first. Raises ConfigError for what is not understood.
    """
    with compose.opened(Args(overrides=overrides), Path(folder).absolute()) as composer:
        return composer.job().config


def build(config: schema.Config | Mapping[str, Any], *, quiet: bool = False) -> Result:
    """Make everything that ``config`` asks for; what is stored already is served.

    A mapping is what a recipe holds: ``{"model": {"source": …}, "targets": {"q4": {"ftype": "Q4_K_M"}}}``. Progress
    goes to standard error unless ``quiet``. Raises a QbuildError that says place, fact and remedy.
    """
    settings = config if isinstance(config, schema.Config) else schema.parse(config)
    document = execute.build(settings, progress.sink(sys.stderr, quiet=quiet))
    measured = (document["evaluation"] or {}).get("targets", {})
    targets = {}
    for name, made in document["targets"].items():
        found = Evaluation(**measured[name]) if name in measured else None
        paths = {"path": Path(made["path"]), "files": tuple(map(Path, made["files"]))}
        targets[name] = TargetResult(**(made | paths | {"evaluation": found}))
    return Result(targets, document)
