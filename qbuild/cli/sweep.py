"""Jobs of a multirun → builds: jobs that differ only in their targets are one build, with one plan and one read.

Jobs that differ in their calibration too are builds that share a folder. A function of the configurations. Targets of
one name that are not equal get names of their own, after what differs.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

from qbuild import schema
from qbuild.errors import ConfigError
from qbuild.recipe import calibrated, calibrates
from qbuild.running import IDLE
from qbuild.schema import CalibrationConf, Config, Target

__all__ = ["Build", "Member", "apart", "builds", "failing", "joined", "only", "share", "total"]


Settings = Mapping[str, Any]


@dataclass(frozen=True)
class Member:
    """One job of a build. ``targets``: the job's own target names to those of the build."""

    number: int  # place in the sweep, from 0
    targets: Mapping[str, str]


@dataclass(frozen=True)
class Build:
    config: Config
    members: tuple[Member, ...]


def builds(configs: Sequence[Config], *, together: bool) -> list[Build]:
    """A build for each job or, ``together``, as few as the jobs allow, in the order of their first jobs.

    Raises ConfigError where jobs of different models would write to one folder.
    """
    unchosen = set.intersection(*(set(config.unchosen) for config in configs))
    configs = [dataclasses.replace(config, unchosen=tuple(sorted(unchosen))) for config in configs]
    if not together:
        return [_build([(number, config)], {}) for number, config in enumerate(configs)]
    rivals = _rivals(configs)
    groups: dict[str, list[tuple[int, Config]]] = {}
    for number, config in enumerate(configs):
        rest = dataclasses.replace(config, targets={}, calibration=CalibrationConf())
        calibrations = [c.calibration for c in configs if calibrates(c) and _alike(c, config)]
        if not calibrates(config) and calibrations:  # any of its model's will do
            config = dataclasses.replace(config, calibration=calibrations[0])
        groups.setdefault(repr((rest, config.calibration)), []).append((number, config))
    return [_build(jobs, rivals) for jobs in groups.values()]


def _alike(one: Config, other: Config) -> bool:
    """Whether two jobs differ in targets and calibration only."""
    return dataclasses.replace(one, targets=other.targets, calibration=other.calibration) == other


def _build(jobs: Sequence[tuple[int, Config]], rivals: Mapping[tuple[str, str], list[Settings]]) -> Build:
    targets: dict[str, Target] = {}
    members = []
    for number, config in jobs:
        names = {}
        for name, target in config.targets.items():
            settings = _settings(target, config)
            names[name], renamed = _named(name, target, settings, rivals.get((_folder(config), name), [settings]))
            targets[names[name]] = renamed
        members.append(Member(number, names))
    return Build(dataclasses.replace(jobs[0][1], targets=targets), tuple(members))


def _rivals(configs: Sequence[Config]) -> dict[tuple[str, str], list[Settings]]:
    """What one name of a target stands for in one folder."""
    models: dict[str, str | None] = {}
    found: dict[tuple[str, str], list[Settings]] = {}
    for config in configs:
        folder = _folder(config)
        if models.setdefault(folder, config.model.source) != config.model.source:
            remedy = "leave 'out' to be outputs/<model name>, or give each model a model.name of its own"
            raise ConfigError("out", f"jobs of different models would write to {folder}", remedy)
        for name, target in config.targets.items():
            known = found.setdefault((folder, name), [])
            if (settings := _settings(target, config)) not in known:
                known.append(settings)
    return found


def _folder(config: Config) -> str:
    """Where a job writes, as far as its configuration tells."""
    return config.out or f"outputs/{config.model.name or PurePath(config.model.source or '').name}"


def _settings(target: Target, config: Config) -> Settings:
    """All that decides the bytes of a target of one source."""
    found = vars(target) | {"outtype": config.model.outtype, "revision": config.model.revision}
    if calibrated(target):
        found |= {key: value for key, value in vars(config.calibration).items() if key != "spill"}
        found["device"] = config.device
    return found


def _named(name: str, target: Target, settings: Settings, rivals: Sequence[Settings]) -> tuple[str, Target]:
    """A target's name in the build and, where others share its name, a file name that tells them apart."""
    keys = [key for key in settings if len({repr(rival.get(key)) for rival in rivals}) > 1]
    if not keys:
        return name, target
    difference = "-".join(_word(key, settings[key]) for key in keys)
    if keys == ["suffix"]:
        return f"{name}-{difference}", target
    return f"{name}-{difference}", dataclasses.replace(target, suffix=f"{schema.label(target)}-{difference}")


def _word(field: str, value: Any) -> str:
    """A setting as part of a file name; a path by its last part."""
    text = PurePath(value).stem if isinstance(value, str) else str(value)
    return f"{field}-{re.sub(r'[^A-Za-z0-9_.]+', '_', text).strip('_')}"


def only(build: Build, members: Sequence[Member]) -> Build:
    """Some jobs of a build as a build of their own, with the targets that they ask for."""
    names = dict.fromkeys(name for member in members for name in member.targets.values())
    targets = {name: build.config.targets[name] for name in names}
    return Build(dataclasses.replace(build.config, targets=targets), tuple(members))


def apart(build: Build, place: str) -> tuple[Build | None, list[Build]]:
    """A build of several jobs that failed: the jobs that its error names, and the others to be tried again.

    They stay one build; where the error names no target, each is tried alone.
    """
    blamed = failing(build, place)
    if len(blamed) == len(build.members):
        return None, [only(build, [member]) for member in build.members]
    return only(build, blamed), [only(build, [m for m in build.members if m not in blamed])]


def share(member: Member, document: Mapping[str, Any]) -> dict[str, Any]:
    """A job's part of the document of its build, under the job's own names; all of one that knows no targets."""
    if "targets" not in document:
        return dict(document)
    return {"targets": {name: document["targets"][own] for name, own in member.targets.items()}}


def failing(build: Build, place: str) -> Sequence[Member]:
    """The jobs that an error is about: those with the target that it names, else all."""
    names = [name for name in build.config.targets if re.match(rf"targets\.{re.escape(name)}(\.|$)", place)]
    return [m for m in build.members if set(names) & set(m.targets.values())] or build.members


def joined(documents: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What builds of one model did in one folder, as what one build would say: targets side by side, totals added."""
    targets: dict[str, Any] = {}
    jobs: dict[str, Any] = {}
    measured: dict[str, Any] = {}
    for number, document in enumerate(documents, start=1):
        targets |= document["targets"]
        measured |= (document["evaluation"] or {}).get("targets", {})
        jobs |= {f"{number}: {name}" if name in jobs else name: job for name, job in document["jobs"].items()}
    evaluation = _evaluation([document["evaluation"] for document in documents if document["evaluation"]])
    notices = [notice for document in documents for notice in document["notices"]]
    found = {"targets": targets, "notices": notices, "jobs": jobs, "totals": _added([d["totals"] for d in documents])}
    return dict(documents[-1]) | found | {"evaluation": evaluation and {**evaluation, "targets": measured}}


def _evaluation(parts: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """What builds took to measure their targets: memory at its largest, all else added."""
    if not parts:
        return None
    memory = IDLE.keys() - {"seconds"}
    added = _added([{key: part[key] for key in ("verdicts", "seconds")} for part in parts])
    return {**parts[0], **added, **{key: max(part[key] for part in parts) for key in memory}}


def total(documents: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What builds one after the other need (memory at its largest, all else added) or what they did."""
    predicted = [document["predicted"] for document in documents if "predicted" in document]
    done = _added([document["totals"] for document in documents if "totals" in document])
    if not predicted:
        return done
    largest = {key: max(p[key] for p in predicted) for key in ("ram", "vram")}
    return largest | {key: sum(p[key] for p in predicted) for key in ("disk", "read_bytes", "seconds")}


def _added(parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Numbers of the same key added, inside of mappings too."""
    found: dict[str, Any] = {}
    for key in dict.fromkeys(key for part in parts for key in part):
        values = [part[key] for part in parts if key in part]
        found[key] = _added(values) if isinstance(values[0], Mapping) else sum(values)
    return found
