"""The words of a command line, read before Hydra is: one verb, make's switches, Hydra's options, overrides."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from qbuild import schema
from qbuild.errors import ConfigError

__all__ = ["Args", "read"]

# Options with a value: the name they are kept under, and the values they know.
VALUED: dict[str, tuple[str, tuple[str, ...]]] = {
    "-c": ("cfg", ("job", "hydra", "all")),
    "--cfg": ("cfg", ("job", "hydra", "all")),
    "-p": ("package", ()),
    "--package": ("package", ()),
    "-i": ("info", ("all", "config", "defaults", "defaults-tree", "plugins", "searchpath")),
    "--info": ("info", ("all", "config", "defaults", "defaults-tree", "plugins", "searchpath")),
    "-cd": ("config_dir", ()),
    "--config-dir": ("config_dir", ()),
    "-sc": ("shell_completion", ()),
    "--shell-completion": ("shell_completion", ()),
    "-j": ("jobs", ()),
}
SWITCHES = {
    "-n": "dry_run",
    "-k": "keep_going",
    "-B": "rebuild",
    "-m": "multirun",
    "--multirun": "multirun",
    "-h": "help",
    "--help": "help",
    "--hydra-help": "hydra_help",
    "--resolve": "resolve",
    "--version": "version",
}
BUNDLE = frozenset("nkBm")  # make's habit: -kB


@dataclass(frozen=True)
class Args:
    """``words`` are what stands beside the verb without an ``=`` (the model of ``info``)."""

    verb: str = "build"
    words: tuple[str, ...] = ()
    overrides: tuple[str, ...] = ()
    switches: frozenset[str] = frozenset()
    options: Mapping[str, str] = field(default_factory=dict)


def read(argv: list[str], verbs: Mapping[str, int]) -> Args:
    """``verbs``: how many words each takes. Raises ConfigError for what is not understood."""
    words, overrides, switches, options = [], [], set(), {}
    queue = iter(argv)
    for item in queue:
        name, equals, value = item.partition("=")
        if item in SWITCHES:
            switches.add(SWITCHES[item])
        elif item.startswith("-") and len(item) > 2 and BUNDLE.issuperset(item[1:]):
            switches.update(SWITCHES[f"-{letter}"] for letter in item[1:])
        elif name in VALUED:
            options[VALUED[name][0]] = _option(name, value if equals else next(queue, None))
        elif item.startswith("-j") and item[2:].isdigit():
            options["jobs"] = item[2:]
        elif item.startswith("-"):
            raise ConfigError(item, "there is no such option", schema.close(item, [*SWITCHES, *VALUED]))
        elif equals or item[:1] in "+~":
            overrides.append(item)
        else:
            words.append(item)
    verb, rest = _verb(words, verbs)
    extra = list(_switched(switches, options))
    return Args(verb, tuple(rest), tuple(overrides + extra), frozenset(switches), options)


def _option(name: str, value: str | None) -> str:
    key, choices = VALUED[name]
    if value is None and key == "info":
        return "all"
    if value is None:
        raise ConfigError(name, "needs a value", f"choices: {', '.join(choices)}" if choices else f"{name} VALUE")
    if choices and value not in choices:
        raise ConfigError(name, f"{value!r} is not a choice", schema.close(value, choices))
    if key == "jobs" and not (value.isdigit() and int(value)):
        raise ConfigError(name, f"{value!r} is not a number of threads", "-j 4")
    return value


def _verb(words: list[str], verbs: Mapping[str, int]) -> tuple[str, list[str]]:
    if not words:
        return "build", []
    verb, rest = words[0], words[1:]
    if verb not in verbs:
        remedy = schema.close(verb, verbs) + f"\nto build a model: model.source={verb}; a recipe: +recipe={verb}"
        raise ConfigError(verb, "there is no such command", remedy)
    if len(rest) > verbs[verb]:
        takes = "one word" if verbs[verb] else "no words"
        remedy = f"settings are key=value; to run a recipe: +recipe={rest[-1]}"
        raise ConfigError(rest[-1], f"`qbuild {verb}` takes {takes} beside it", remedy)
    return verb, rest


def _switched(switches: set[str], options: dict[str, str]) -> Iterator[str]:
    """make's switches are spellings of keys, so that a plan and ``--cfg job`` show them."""
    if "keep_going" in switches:
        yield "keep_going=true"
    if "rebuild" in switches:
        yield "rebuild=true"
    if "jobs" in options:
        yield f"budget.threads={options['jobs']}"
