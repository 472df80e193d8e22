"""Jobs of a multirun → builds: jobs that differ only in their targets are one build, with one plan and one read.

A function of the configurations. Targets of one name that are not equal get names of their own, after what differs.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

from qbuild import schema
from qbuild.schema import Config, Target

__all__ = ["Build", "Member", "apart", "builds", "failing", "only", "share"]


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
    """A build for each job or, ``together``, as few as the jobs allow, in the order of their first jobs."""
    groups: dict[str, list[int]] = {}
    for number, config in enumerate(configs):
        alike = repr(dataclasses.replace(config, targets={})) if together else str(number)
        groups.setdefault(alike, []).append(number)
    return [_merged(configs, numbers) for numbers in groups.values()]


def _merged(configs: Sequence[Config], numbers: list[int]) -> Build:
    rivals: dict[str, list[Target]] = {}  # the different targets of one name
    for number in numbers:
        for name, target in configs[number].targets.items():
            if target not in rivals.setdefault(name, []):
                rivals[name].append(target)
    targets: dict[str, Target] = {}
    members = []
    for number in numbers:
        names = {}
        for name, target in configs[number].targets.items():
            own, renamed = _named(name, target, rivals[name])
            targets[own] = renamed
            names[name] = own
        members.append(Member(number, names))
    return Build(dataclasses.replace(configs[numbers[0]], targets=targets), tuple(members))


def _named(name: str, target: Target, rivals: list[Target]) -> tuple[str, Target]:
    """A target's name in the build and, where others share its name, a file name that tells them apart."""
    if len(rivals) == 1:
        return name, target
    fields = [f.name for f in dataclasses.fields(target) if len({repr(getattr(r, f.name, None)) for r in rivals}) > 1]
    difference = "-".join(_word(field, getattr(target, field)) for field in fields)
    if "suffix" in fields:
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
