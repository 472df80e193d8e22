"""From argv to an exit code."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

from qbuild import __version__, fastpath, machine, render
from qbuild.cli import args as arguments
from qbuild.cli import compose, multirun, nullbuild
from qbuild.cli.compose import Composer, Job
from qbuild.cli.runner import PIPE_CLOSED, Outcome, Runner, failed, show
from qbuild.cli.verbs import VERBS
from qbuild.errors import ConfigError, InputError

__all__ = ["main"]


def main(argv: list[str]) -> int:
    json_wanted = [a for a in argv if a.startswith("format=")][-1:] == ["format=json"]
    with _terminable():
        try:
            outcome = _quietly(argv, json_wanted) if json_wanted else _run(argv, json_wanted)
        except BaseException as error:
            outcome = failed(error)
    try:
        return show(outcome, json_wanted)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return PIPE_CLOSED


def _quietly(argv: list[str], json_wanted: bool) -> Outcome:
    """Whatever a library prints goes to standard error: standard output is one document."""
    with contextlib.redirect_stdout(sys.stderr):
        return _run(argv, json_wanted)


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
        runner = Runner(args.verb, args.words, "dry_run" in args.switches, json_wanted, began)
        if "multirun" in args.switches:
            return multirun.run(composer, runner)
        job = composer.job()
        apart = runner.makes and job.config.keep_going and len(job.config.targets) > 1
        outcome = multirun.keep_going(job.config, runner) if apart else runner.run(job.config)
        if args.verb == "build" and not runner.dry_run:
            _record(argv, cwd, job, composer, outcome, json_wanted, began)
        return outcome


def _cwd() -> Path:
    try:
        return Path.cwd()
    except FileNotFoundError:
        raise InputError("working folder", "is gone", "change to one that exists") from None


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
