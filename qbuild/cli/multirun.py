"""A sweep: its jobs as few builds, priced before the first starts, run one after the other, told of as one outcome."""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from qbuild import execute, render, schema
from qbuild.budget import Remedy, refuse
from qbuild.cli import sweep
from qbuild.cli.compose import Composer, Job
from qbuild.cli.runner import Outcome, Runner, failed, show
from qbuild.cli.verbs import VERBS
from qbuild.errors import ConfigError, Interrupted

__all__ = ["keep_going", "run"]

Ended = list[tuple[sweep.Build, Outcome]]


def run(composer: Composer, runner: Runner) -> Outcome:
    """Every job of a sweep; the first that fails ends it unless keep_going says otherwise."""
    jobs = composer.jobs()
    if jobs is None:
        launched = composer.launch(runner)
        for words, outcome in [] if runner.quiet else launched:
            sys.stdout.write(f"{' '.join(words)}\n")
            show(outcome, json_wanted=False)
        if runner.makes:
            _note([outcome for _, outcome in launched])
        return _launched(launched)
    builds = sweep.builds([job.config for job in jobs], together=VERBS[runner.verb].merges)
    refused = _refused(builds, runner) if runner.makes and len(builds) > 1 else None
    if refused is not None:
        return refused
    ended = _all(builds, jobs, runner, told=not runner.quiet)
    if runner.makes:
        _note([outcome for _, outcome in ended])
    return _merged(ended, jobs)


def keep_going(config: schema.Config, runner: Runner) -> Outcome:
    """A build of several targets, as a sweep of one job for each: one that fails leaves the others to finish."""
    members = tuple(sweep.Member(number, {name: name}) for number, name in enumerate(config.targets))
    jobs = [Job(config, (name,), volatile=False) for name in config.targets]
    ended = _all([sweep.Build(config, members)], jobs, runner, told=False)
    made = [outcome for _, outcome in ended if "error" not in outcome.document]
    if len(ended) == 1:
        return ended[0][1]
    wrong = [(build, outcome) for build, outcome in ended if "error" in outcome.document]
    code = _code([outcome for _, outcome in wrong])
    failures = {name: outcome.document["error"] for build, outcome in wrong for name in build.config.targets}
    if not made:
        first, texts = wrong[0][1], dict.fromkeys(outcome.text for _, outcome in wrong)
        return Outcome({**first.document, "failed": failures}, "".join(texts), code)
    _note(made)
    document = sweep.joined([outcome.document for outcome in made]) | {"failed": failures}
    return Outcome(document, render.result(document), code)


def _refused(builds: Sequence[sweep.Build], runner: Runner) -> Outcome | None:
    """What speaks against starting: a build that cannot be, or a disk that does not hold what all builds write.

    With keep_going a build that cannot be fails when its turn comes, and the others are made.
    """
    planner, documents = replace(runner, dry_run=True), []
    for build in builds:
        outcome = planner(build.config)
        if "error" not in outcome.document:
            documents.append(outcome.document)
        elif not build.config.keep_going:
            return outcome
    needs = sum(document["predicted"]["disk"] for document in documents)
    room = min((document["budget"]["disk"] for document in documents), default=needs)
    if needs <= room:
        return None
    remedies = [Remedy("another disk", needs, "store.dir=/BIG/DISK/store out=/BIG/DISK/out")]
    return failed(refuse(f"a sweep of {len(builds)} builds", "disk", needs, room, remedies))


def _all(builds: Sequence[sweep.Build], jobs: list[Job], runner: Runner, *, told: bool) -> Ended:
    """Run builds to their ends, ``told`` as they end."""
    todo, ended = deque(builds), []
    while todo:
        build = todo.popleft()
        outcome = _one(build, jobs, runner) if told else runner(build.config)
        place = outcome.document.get("error", {}).get("place", "")
        goes_on = build.config.keep_going and outcome.code != Interrupted.exit_code
        if "error" in outcome.document and goes_on and len(build.members) > 1:
            # What it finished is stored: nothing is made twice.
            broken, again = sweep.apart(build, place)
            todo.extendleft(reversed(again))
            ended += [(broken, outcome)] if broken else []
            continue
        ended.append((sweep.only(build, sweep.failing(build, place)), outcome))
        if outcome.code and not goes_on:
            break
    return ended


def _one(build: sweep.Build, jobs: list[Job], runner: Runner) -> Outcome:
    """Run one build of a sweep and show how it ended."""
    for member in build.members:
        sys.stdout.write(f"[{member.number + 1}/{len(jobs)}] {' '.join(jobs[member.number].overrides)}\n")
    sys.stdout.flush()
    outcome = runner(build.config)
    show(outcome, json_wanted=False)
    return outcome


def _note(outcomes: Sequence[Outcome]) -> None:
    """One build.json where several builds of the sweep wrote to one folder: each alone would tell of the last only."""
    folders: dict[Path, list[Mapping[str, Any]]] = {}
    for outcome in outcomes:
        for target in list(outcome.document.get("targets", {}).values())[:1]:
            folders.setdefault(Path(target["path"]).parent, []).append(outcome.document)
    for folder, documents in folders.items():
        if len(documents) > 1 and any(document["jobs"] for document in documents):
            execute.write_json(folder / "build.json", sweep.joined(documents))


def _merged(ended: Ended, jobs: list[Job]) -> Outcome:
    """Builds of a sweep as one outcome, by job."""
    found: dict[int, dict[str, Any]] = {}
    for number, (build, outcome) in enumerate(ended):
        for member in build.members:
            part: Mapping[str, Any] = outcome.document
            if "error" not in part:
                part = {"build": number, "result": sweep.share(member, part)}
            found[member.number] = _entry(member.number, jobs[member.number].overrides, outcome, part)
    documents = [dict(outcome.document) for _, outcome in ended]
    document = {"jobs": [found[n] for n in sorted(found)], "builds": documents}
    return _summed(document | {"total": sweep.total(documents)}, len(jobs), [outcome for _, outcome in ended])


def _launched(done: list[tuple[tuple[str, ...], Outcome]]) -> Outcome:
    """Outcomes that a launcher brought back, as one."""
    outcomes, jobs = _overwritten([outcome for _, outcome in done]), []
    for number, ((words, _), outcome) in enumerate(zip(done, outcomes, strict=True)):
        part = outcome.document if "error" in outcome.document else {"result": outcome.document}
        jobs.append(_entry(number, words, outcome, part))
    total = sweep.total([dict(outcome.document) for outcome in outcomes])
    total.pop("wall_seconds", None)  # jobs ran beside each other
    return _summed({"jobs": jobs, "total": total}, len(jobs), outcomes)


def _overwritten(outcomes: Sequence[Outcome]) -> list[Outcome]:
    """Jobs of a launcher do not know of each other: one whose file another wrote with other bytes has failed."""
    last: dict[str, str] = {}
    found = []
    for outcome in reversed(outcomes):
        targets = outcome.document.get("targets", {}).values()
        lost = [t["path"] for t in targets if "digest" in t and last.setdefault(t["path"], t["digest"]) != t["digest"]]
        remedy = "give each job a place of its own: out=DIRECTORY; without the launcher the files are told apart"
        error = ConfigError(lost[0], "was written by several jobs with different bytes", remedy) if lost else None
        found.append(failed(error) if error else outcome)
    return found[::-1]


def _summed(document: dict[str, Any], jobs: int, outcomes: Sequence[Outcome]) -> Outcome:
    document["total"] |= {"jobs": jobs, "failed": sum(job["exit_code"] != 0 for job in document["jobs"])}
    code = _code(outcomes)
    return Outcome(document, render.sweep(document) if code or len(outcomes) > 1 else "", code)


def _code(outcomes: Sequence[Outcome]) -> int:
    """The exit code of several: that of an interrupt, whatever failed before it, else of the first that failed."""
    codes = [outcome.code for outcome in outcomes if outcome.code]
    return Interrupted.exit_code if Interrupted.exit_code in codes else next(iter(codes), 0)


def _entry(number: int, overrides: tuple[str, ...], outcome: Outcome, part: Mapping[str, Any]) -> dict[str, Any]:
    """A job of a sweep in its document: how it ended, and its result or error."""
    return {"number": number + 1, "overrides": list(overrides), "exit_code": outcome.code, **part}
