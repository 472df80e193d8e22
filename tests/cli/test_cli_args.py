"""Reading the words of a command line."""

from __future__ import annotations

import pytest

from qbuild.cli.args import read
from qbuild.errors import ConfigError

VERBS = {"build": 0, "plan": 0, "info": 1, "gc": 0}


def test_no_verb_is_build() -> None:
    args = read(["+recipe=x", "out=y"], VERBS)
    assert (args.verb, args.overrides) == ("build", ("+recipe=x", "out=y"))


def test_switches_of_make_are_spellings_of_keys() -> None:
    args = read(["-kB", "-j8", "-n"], VERBS)
    assert args.overrides == ("keep_going=true", "rebuild=true", "budget.threads=8")
    assert "dry_run" in args.switches


@pytest.mark.parametrize("words", [["-j", "3"], ["-j3"], ["-j=3"]])
def test_threads_in_each_of_makes_ways(words: list[str]) -> None:
    assert read(words, VERBS).overrides == ("budget.threads=3",)


def test_options_of_hydra_may_stand_anywhere() -> None:
    args = read(["--cfg", "job", "plan", "-p", "budget", "a=1", "-m"], VERBS)
    assert args.verb == "plan"
    assert args.options == {"cfg": "job", "package": "budget"}
    assert args.overrides == ("a=1",)


def test_a_word_that_a_verb_takes() -> None:
    assert read(["info", "./model"], VERBS).words == ("./model",)


@pytest.mark.parametrize(
    ("argv", "place", "hint"),
    [
        (["plna"], "plna", "did you mean plan?"),
        (["plan", "llama7b_q4"], "llama7b_q4", "+recipe=llama7b_q4"),
        (["info", "a", "b"], "b", "key=value"),
        (["--hlep"], "--hlep", "did you mean --help?"),
        (["--cfg", "jb"], "--cfg", "did you mean job?"),
        (["--cfg"], "--cfg", "choices: job"),
        (["-j", "many"], "-j", "-j 4"),
        (["-j", "0"], "-j", "-j 4"),
        (["-j"], "-j", "-j VALUE"),
        (["-x"], "-x", "-n"),
    ],
)
def test_what_is_not_understood_is_an_error_with_a_way_out(argv: list[str], place: str, hint: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read(argv, VERBS)
    assert caught.value.place == place
    assert hint in caught.value.remedy
