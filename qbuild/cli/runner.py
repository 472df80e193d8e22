"""One job: a configuration in, an outcome out. No error leaves here but as an outcome."""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from qbuild import progress, render, schema
from qbuild.cli.verbs import VERBS, Request
from qbuild.errors import Interrupted, QbuildError

__all__ = ["PIPE_CLOSED", "Outcome", "Runner", "failed", "show"]

PIPE_CLOSED = 141  # what a shell reports of a program that a closed pipe ended


@dataclass(frozen=True)
class Outcome:
    """How one job ended: its document (an error's is ``{"error": …}``), its text, its exit code."""

    document: Mapping[str, Any]
    text: str
    code: int


@dataclass(frozen=True)
class Runner:
    """What is done with each job. A value, so that a launcher can send it to another process.

    ``began``: when the command did, in nanoseconds since the epoch: with -B nothing is made twice after that.
    """

    verb: str
    words: tuple[str, ...]
    dry_run: bool
    quiet: bool
    began: int

    @property
    def makes(self) -> bool:
        """Whether files are made."""
        return self.verb == "build" and not self.dry_run

    def run(self, config: schema.Config) -> Outcome:
        sink = progress.sink(sys.stderr, quiet=self.quiet or config.format == "json")
        answer = VERBS[self.verb].run(Request(config, self.words, self.dry_run, sink, self.began))
        return Outcome(answer.document, answer.text, answer.code)

    def __call__(self, config: schema.Config) -> Outcome:
        try:
            return self.run(config)
        except (Exception, KeyboardInterrupt) as error:
            return failed(error)


def show(outcome: Outcome, json_wanted: bool) -> int:
    """Print an outcome; returns its exit code."""
    if json_wanted:
        sys.stdout.write(json.dumps(outcome.document, indent=2) + "\n")
    elif "error" in outcome.document:
        sys.stderr.write(outcome.text)
    else:
        sys.stdout.write(outcome.text)
    sys.stdout.flush()
    return outcome.code


def failed(error: BaseException) -> Outcome:
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
