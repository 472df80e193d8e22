"""From argv to an exit code."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import time
import traceback
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from qbuild import __version__, fastpath, machine, progress, render, schema
from qbuild.cli import args as arguments
from qbuild.cli import compose, nullbuild, sweep
from qbuild.cli.compose import Composer, Job
from qbuild.cli.verbs import VERBS, Request
from qbuild.errors import ConfigError, InputError, Interrupted, QbuildError

__all__ = ["main"]

PIPE_CLOSED = 141  # what a shell reports of a program that a closed pipe ended


@dataclass(frozen=True)
class Outcome:
    """How one job ended: its document (an error's is ``{"error": …}``), its text, its exit code."""

    document: Mapping[str, Any]
    text: str
    code: int


def main(argv: list[str]) -> int:
    json_wanted = [a for a in argv if a.startswith("format=")][-1:] == ["format=json"]
    with _terminable():
        try:
            outcome = _quietly(argv, json_wanted) if json_wanted else _run(argv, json_wanted)
        except BaseException as error:
            outcome = _failed(error)
    try:
        return _print(outcome, json_wanted)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return PIPE_CLOSED


def _print(outcome: Outcome, json_wanted: bool) -> int:
    if json_wanted:
        sys.stdout.write(json.dumps(outcome.document, indent=2) + "\n")
    elif "error" in outcome.document:
        sys.stderr.write(outcome.text)
    else:
        sys.stdout.write(outcome.text)
    sys.stdout.flush()
    return outcome.code


def _quietly(argv: list[str], json_wanted: bool) -> Outcome:
    """Whatever a library prints goes to standard error: standard output is one document."""
    with contextlib.redirect_stdout(sys.stderr):
        return _run(argv, json_wanted)


def _failed(error: BaseException) -> Outcome:
    """An error as an outcome. What is not one of ours is a bug, and shows where."""
    if isinstance(error, KeyboardInterrupt):
        error = Interrupted("interrupted", "nothing finished is lost", "run the same command again to go on from here")
    if isinstance(error, QbuildError):
        document = {"place": error.place, "fact": error.fact, "remedy": error.remedy, "exit_code": error.exit_code}
        return Outcome({"error": document}, render.error(document), error.exit_code)
    if isinstance(error, BrokenPipeError):
        return Outcome({"error": {}}, "", PIPE_CLOSED)
    text = "".join(traceback.format_exception(error))
    sys.stderr.write(text)
    fact = f"{type(error).__name__}: {error}"
    document = {"place": "BUG", "fact": fact, "remedy": "please report it with the lines above", "exit_code": 1}
    return Outcome({"error": document}, render.error(document), 1)


@contextlib.contextmanager
def _terminable() -> Iterator[None]:
    """SIGTERM ends a build as Ctrl-C does: workers stopped, finished tensors kept."""

    def stop(_signal: int, _frame: object) -> NoReturn:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _run(argv: list[str], json_wanted: bool) -> Outcome:
    began = time.time_ns()
    args = arguments.read(argv, {name: verb.words for name, verb in VERBS.items()})
    if "version" in args.switches:
        return Outcome({"version": __version__}, f"qbuild {__version__}\n", 0)
    if "help" in args.switches:
        return Outcome({"help": _help()}, _help(), 0)
    cwd = _cwd()
    with compose.opened(args, cwd) as composer:
        if "shell_completion" in args.options:
            return _completion(composer, args.options["shell_completion"] + "".join(args.overrides))
        if args.options.keys() & {"cfg", "info"} or "hydra_help" in args.switches:
            composer.show(args)
            return Outcome({}, "", 0)
        runner = Runner(args.verb, args.words, "-n" if "dry_run" in args.switches else "", json_wanted)
        if "multirun" in args.switches:
            return _multirun(composer, runner)
        job = composer.job()
        outcome = runner.run(job.config)
        if args.verb == "build" and not runner.dry_run:
            _record(argv, cwd, job, composer, outcome, json_wanted, began)
        return outcome


def _cwd() -> Path:
    try:
        return Path.cwd()
    except FileNotFoundError:
        raise InputError("working folder", "is gone", "change to one that exists") from None


@dataclass(frozen=True)
class Runner:
    """What is done with each job. A value, so that a launcher can send it to another process."""

    verb: str
    words: tuple[str, ...]
    dry_run: str
    quiet: bool

    def run(self, config: schema.Config) -> Outcome:
        sink = progress.sink(sys.stderr, quiet=self.quiet or config.format == "json")
        answer = VERBS[self.verb].run(Request(config, self.words, bool(self.dry_run), sink))
        return Outcome(answer.document, answer.text, answer.code)

    def __call__(self, config: schema.Config) -> Outcome:
        try:
            return self.run(config)
        except (Exception, KeyboardInterrupt) as error:
            return _failed(error)


def _multirun(composer: Composer, runner: Runner) -> Outcome:
    """Every job of a sweep; the first that fails ends it unless keep_going says otherwise."""
    jobs = composer.jobs()
    if jobs is None:
        launched = composer.launch(runner)
        for words, outcome in [] if runner.quiet else launched:
            sys.stdout.write(f"{' '.join(words)}\n")
            _print(outcome, json_wanted=False)
        return _launched(launched)
    todo = deque(sweep.builds([job.config for job in jobs], together=VERBS[runner.verb].merges))
    ended: list[tuple[sweep.Build, Outcome]] = []
    while todo:
        build = todo.popleft()
        outcome = _one(build, jobs, runner)
        place = outcome.document.get("error", {}).get("place", "")
        goes_on = build.config.keep_going and outcome.code != Interrupted.exit_code
        if "error" in outcome.document and goes_on and len(build.members) > 1:
            # What it finished is stored: nothing is made twice.
            failed, again = sweep.apart(build, place)
            todo.extendleft(reversed(again))
            ended += [(failed, outcome)] if failed else []
            continue
        ended.append((sweep.only(build, sweep.failing(build, place)), outcome))
        if outcome.code and not goes_on:
            break
    return _merged(ended, jobs)


def _one(build: sweep.Build, jobs: list[Job], runner: Runner) -> Outcome:
    """Run one build of a sweep and show how it ended."""
    if not runner.quiet:
        for member in build.members:
            sys.stdout.write(f"[{member.number + 1}/{len(jobs)}] {' '.join(jobs[member.number].overrides)}\n")
        sys.stdout.flush()
    outcome = runner(build.config)
    if not runner.quiet:
        _print(outcome, json_wanted=False)
    return outcome


def _merged(ended: list[tuple[sweep.Build, Outcome]], jobs: list[Job]) -> Outcome:
    """Builds of a sweep as one outcome, by job."""
    found: dict[int, dict[str, Any]] = {}
    for number, (build, outcome) in enumerate(ended):
        for member in build.members:
            part: Mapping[str, Any] = outcome.document
            if "error" not in part:
                part = {"build": number, "result": sweep.share(member, part)}
            found[member.number] = _entry(jobs[member.number].overrides, outcome, part)
    outcomes = [outcome for _, outcome in ended]
    documents = [dict(outcome.document) for outcome in outcomes]
    return Outcome({"jobs": [found[n] for n in sorted(found)], "builds": documents}, "", _first_failure(outcomes))


def _launched(done: list[tuple[tuple[str, ...], Outcome]]) -> Outcome:
    """Outcomes that a launcher brought back, as one."""
    jobs = [_entry(words, o, o.document if "error" in o.document else {"result": o.document}) for words, o in done]
    return Outcome({"jobs": jobs}, "", _first_failure([outcome for _, outcome in done]))


def _entry(overrides: tuple[str, ...], outcome: Outcome, part: Mapping[str, Any]) -> dict[str, Any]:
    """A job of a sweep in its document: how it ended, and its result or error."""
    return {"overrides": list(overrides), "exit_code": outcome.code, **part}


def _first_failure(outcomes: list[Outcome]) -> int:
    return next((outcome.code for outcome in outcomes if outcome.code), 0)


def _record(
    argv: list[str], cwd: Path, job: Job, composer: Composer, outcome: Outcome, json_wanted: bool, began: int
) -> None:
    """Let the same command be answered without Hydra next time, if that can be told from file stats alone."""
    inputs = None if job.volatile or outcome.code else nullbuild.inputs(job.config, composer.folders)
    if inputs is None:
        return
    document = nullbuild.as_null(outcome.document)
    text = json.dumps(document, indent=2) + "\n" if json_wanted else render.result(document)
    fastpath.record(argv, str(cwd), inputs, nullbuild.outputs(document), text, began)


def _completion(composer: Composer, request: str) -> Outcome:
    """``-sc install=bash``, ``-sc query=bash``: Hydra's protocol, with our verbs at the first word."""
    action, _, shell = request.partition("=")
    if action not in ("install", "uninstall", "query") or shell not in ("bash", "fish", "zsh"):
        fact = f"{request!r} is not understood"
        raise ConfigError("--shell-completion", fact, 'eval "$(qbuild -sc install=bash)"; shells: bash, zsh, fish')
    if action != "query":
        plugin = composer.plugin(shell)
        plugin.install() if action == "install" else plugin.uninstall()
        return Outcome({}, "", 0)
    words = machine.environ().get("COMP_LINE", "").partition(" ")[2].lstrip()
    first, blank, rest = words.partition(" ")
    if first in VERBS and blank:
        found = compose.complete(composer, shell, rest.lstrip())
    else:
        found = compose.complete(composer, shell, words)
        if not blank:
            found = [verb for verb in VERBS if verb.startswith(first)] + found
    return Outcome({"completions": found}, ("\n" if shell == "fish" else " ").join(found) + "\n", 0)


def _help() -> str:
    verbs = "\n".join(f"  {name:<8} {verb.about}" for name, verb in VERBS.items())
    return HELP.format(verbs=verbs)


HELP = """\
qbuild: make for quantized language models

  qbuild [COMMAND] [+recipe=NAME] [key=value ...] [-m]

commands
{verbs}

examples
  qbuild model.source=./my-model target=gguf/q4_k_m
  qbuild plan +recipe=llama7b_q4 budget.ram=8GiB
  qbuild info meta-llama/Llama-2-7b-hf
  qbuild model.source=m.gguf 'target=[gguf/q4_k_m,gguf/q8_0]' targets.q8_0.pure=true
  qbuild -m +recipe=tiny_q4 target=gguf/q4_k_m,gguf/q5_k_m

options
  -n          only say what would be done (build, gc)
  -j N        N threads (budget.threads=N)
  -k          keep going after a failure
  -B          make everything again
  -m          multirun: every combination of the comma-separated values, as one build
  --cfg job   print the configuration with every key, and stop
  --info      how it was composed: [all|config|defaults|defaults-tree|plugins|searchpath]
  -cd FOLDER  look for configuration in FOLDER first
  --version, --hydra-help, -sc install=bash (tab completion: eval "$(...)")

keys
  model.source   folder of safetensors, Hub id, FILE.gguf, or pkg://package/file
  target         gguf/q4_k_m and so on; its settings are in targets.q4_k_m
  out            folder of the results (outputs/<model name>)
  budget.ram, .vram, .disk, .threads      a size such as 16GiB, or auto
  store.dir, format=json, offline=true    all others: qbuild --cfg job

Recipes and configuration: ./recipes and ./conf first, then qbuild's own.
Exit codes: 0 done, 1 an action failed, 2 usage, 3 refused by the budget,
4 the input is missing, damaged or not supported, 130 interrupted.
"""
