"""Hydra's, OmegaConf's and YAML's errors as ours: the place, the fact, the remedy, and no traceback."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from qbuild import schema
from qbuild.errors import ConfigError

__all__ = ["translated"]

NOISE = r"raised while composing|Error merging|_(key|type): ?|_type="
KINDS = {
    "Integer": ("a whole number", "write a whole number: 8"),
    "Float": ("a number", "write a number: 0.1"),
    "bool": ("true or false", "write true or false"),
}
YAML_REMEDY = "check indentation and quotes"

Names = Callable[[str], list[str]]  # what can be chosen in a config group


@contextmanager
def translated(overrides: list[str], names: Names) -> Iterator[None]:
    from hydra.errors import HydraException, MissingConfigException, OverrideParseException
    from omegaconf.errors import OmegaConfBaseException
    from yaml import MarkedYAMLError, YAMLError

    try:
        yield
    except OverrideParseException as error:
        remedy = "write key=value, and quote lists for the shell: 'target=[gguf/q4_k_m,gguf/q8_0]'"
        raise ConfigError(error.override, "is not a setting", remedy) from None
    except MissingConfigException as error:
        raise _missing(error.missing_cfg_file or "", str(error), overrides, names) from None
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"{mark.name}:{mark.line + 1}" if mark else "configuration"
        raise ConfigError(place, f"is not YAML: {error.problem or error.context}", YAML_REMEDY) from None
    except YAMLError as error:
        raise ConfigError("configuration", f"is not YAML: {error}", YAML_REMEDY) from None
    except (HydraException, OmegaConfBaseException) as error:
        raise _composition(error, overrides, names) from None
    except ValueError as error:
        if not _raised_in(error, ("hydra", "omegaconf")):
            raise
        raise ConfigError("configuration", str(error), "qbuild --help shows the forms a setting has") from None


def _raised_in(error: Exception, packages: tuple[str, ...]) -> bool:
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return trace is not None and trace.tb_frame.f_globals.get("__name__", "").partition(".")[0] in packages


def _missing(name: str, text: str, overrides: list[str], names: Names) -> ConfigError:
    """A choice of a config group that is not there."""
    group, _, choice = name.partition("/")
    known = names(group)
    if not known:
        return ConfigError(name or "configuration", "is not there", text.splitlines()[0].strip())
    typed = (o for o in overrides if o.lstrip("+").startswith(f"{group}=") and choice in o)
    found = re.search(r"In '([^']+)'", text)
    file = f"{found[1]}.yaml" if found and found[1].startswith("recipe/") else None
    same = [n for n in known if n.rpartition("/")[2] == choice]
    remedy = f"did you mean {' or '.join(same)}?" if same else schema.close(choice, known)
    place = next(typed, f"{file}: {group}" if file else f"{group}={choice}")
    return ConfigError(place, f"there is no {group} named {choice!r}", remedy)


def _composition(error: Exception, overrides: list[str], names: Names) -> ConfigError:
    """Hydra and OmegaConf say what is wrong in prose only; the patterns below are those of 1.3 and 2.3."""
    text = f"{error}\n{error.__cause__ or error.__context__ or ''}"
    file = re.search(r"In '([^']+)': \w+ raised while composing", text)
    where = f"{file[1]}.yaml: " if file else ""
    key = re.search(r"full_key: (\S+)", text)
    if (found := re.search(r"Could not override '([^']+)'", text)) is not None:
        return _unknown(
            found[1], next((o for o in overrides if o.startswith(f"{found[1]}=")), found[1]), overrides, names
        )
    if (found := re.search(r"Ambiguous value for argument '([^']+)'", text)) is not None:
        name, _, values = found[1].partition("=")
        remedy = f"as a list: '{name}=[{values}]'\nas a sweep: -m {found[1]}"
        return ConfigError(found[1], "several values for one setting", remedy)
    if key is not None and re.search(r"Key '[^']+' (not in|is not in struct)", text):
        return _unknown(key[1], where + key[1], overrides, names)
    if (found := re.search(r"is not a subclass of (\w+)", text)) is not None:
        section = next((s for s, node in schema.sections().items() if node.__name__ == found[1]), "configuration")
        listed = ", ".join(f"{section}.{name}" for name in schema.keys(schema.sections().get(section, schema.Config)))
        return ConfigError(where + section, "is a group of keys, not a value", listed)
    if re.search(r"[Cc]annot assign \w+ to Dict", text):
        return ConfigError(where + "targets", "is a group of keys, not a value", "to choose targets: target=NAME")
    wrong = re.search(r"Value '(.*?)' (?:of|is) .*?\b(Integer|Float|bool)\b", text)
    if key is not None and wrong is not None:
        kind, remedy = KINDS[wrong[2]]
        return ConfigError(where + key[1], f"{wrong[1]!r} is not {kind}", remedy)
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    facts = [line for line in lines if not re.search(NOISE, line)]
    fact = facts[0] if facts else type(error).__name__
    rest = "\n".join(line for line in facts[1:] if line not in fact) if key is None else ""
    return ConfigError(where + (key[1] if key else "configuration"), fact[:1].lower() + fact[1:], rest)


def _unknown(key: str, place: str, overrides: list[str], names: Names) -> ConfigError:
    """A key that does not exist: the keys at the level where it goes wrong."""
    head, _, rest = key.partition(".")
    sections = schema.sections()
    if head == "recipe":
        remedy = f"a recipe is added with a plus: +{place}"
    elif head == "targets":
        return _setting(rest, place, _chosen(overrides), names)
    elif head in _settings() and head not in schema.keys(schema.Config):
        value, owners = place.partition("=")[2] or "…", _owners(head)
        takers = [name for name in _chosen(overrides) if _takes(name, head, names)] or ["NAME"]
        settings = " or ".join(f"targets.{name}.{key}={value}" for name in takers)
        remedy = f"it is a setting of {' and '.join(owners)} targets: {settings}"
    elif rest and head in sections:
        remedy = schema.close(rest, schema.keys(sections[head]))
    else:
        remedy = schema.close(head, [*schema.keys(schema.Config), "target"])
    return ConfigError(place, "there is no such key", remedy)


def _setting(rest: str, place: str, chosen: list[str], names: Names) -> ConfigError:
    """``targets.<rest>``, where there is no such target, or its targets have no such setting."""
    name, dot, wrong = rest.partition(".")
    if chosen and name not in chosen:
        takers = [one for one in chosen if _takes(one, wrong.partition(".")[0], names)]
        meant = [one for one in takers if one.endswith(f"_{name}")] or schema.nearest(name, takers) or takers
        remedy = f"did you mean {' or '.join(f'targets.{one}{dot}{wrong}' for one in meant)}?"
        return ConfigError(place, f"no target is called {name!r}", remedy if meant else f"chosen: {', '.join(chosen)}")
    format_, in_file = _format(name, names), not place.startswith("targets.")
    if format_ is not None and (chosen or in_file):
        return _no_setting(format_, wrong, place, names)
    remedy = f"{schema.close(wrong, _settings())}\nand targets.{name} is there only once target=… has chosen it"
    return ConfigError(place, "there is no such key", remedy)


def _settings() -> list[str]:
    """Of targets of all formats."""
    return list(dict.fromkeys(key for format_ in schema.FORMATS.values() for key in schema.keys(format_)))


def _format(name: str, names: Names) -> str | None:
    """The format of a target that can be chosen, as far as its folder tells."""
    choice = next((c for c in names("target") if target_name(c) == name), "")
    format_ = "fit" if choice == "gguf/fit" else choice.partition("/")[0]
    return format_ if format_ in schema.FORMATS else None


def _owners(key: str) -> list[str]:
    """The formats whose targets have a setting."""
    return [format_ for format_, cls in schema.FORMATS.items() if key in schema.keys(cls)]


def _takes(name: str, key: str, names: Names) -> bool:
    """Whether a setting may be meant for a target: not one that targets of other formats have."""
    format_, owners = _format(name, names), _owners(key)
    return format_ is None or not owners or format_ in owners


def _no_setting(format_: str, key: str, place: str, names: Names) -> ConfigError:
    """A setting that targets of a format do not have, and others may."""
    owners = _owners(key)
    if not owners:
        return ConfigError(place, "there is no such key", schema.close(key, schema.keys(schema.FORMATS[format_])))
    fact = f"a setting of {' and '.join(owners)} targets, not of {format_}"
    if format_ == "awq" and key == "bits":
        fact = "AWQ has 4 bits, always"
    bits = place.partition("bits=")[2]
    others = [c for c in names("target") if c.partition("/")[0] in owners and f"/w{bits}" in c] if bits else []
    own = f"choices: {', '.join(schema.keys(schema.FORMATS[format_]))}"
    return ConfigError(place, fact, f"with {bits} bits: {', '.join(others)}" if others else own)


def _chosen(overrides: list[str]) -> list[str]:
    """Names of the targets that a command line chooses: ``gguf/q4_k_m`` is q4_k_m, ``awq/w4_g128`` awq_w4_g128."""
    values = (override.partition("=")[2] for override in overrides if override.startswith("target="))
    found = (choice for value in values for choice in re.findall(r"[\w./-]+", value))
    return list(dict.fromkeys(map(target_name, found)))


def target_name(choice: str) -> str:
    return choice.removeprefix("gguf/").replace("/", "_")
