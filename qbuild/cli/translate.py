"""Hydra's, OmegaConf's and YAML's errors as ours: the place, the fact, the remedy, and no traceback."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

from qbuild import schema
from qbuild.errors import ConfigError

__all__ = ["translated"]


@contextmanager
def translated(overrides: list[str]) -> Iterator[None]:
    from hydra.errors import HydraException, MissingConfigException, OverrideParseException
    from omegaconf.errors import OmegaConfBaseException
    from yaml import MarkedYAMLError, YAMLError

    try:
        yield
    except OverrideParseException as error:
        raise _parse_error(error.override, str(error)) from None
    except MissingConfigException as error:
        raise _missing(error.missing_cfg_file or "", error.options, str(error), overrides) from None
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"{mark.name}:{mark.line + 1}" if mark else "configuration"
        raise ConfigError(place, f"is not YAML: {error.problem or error.context}", "check indentation and quotes") from None
    except YAMLError as error:
        raise ConfigError("configuration", f"is not YAML: {error}", "check indentation and quotes") from None
    except (HydraException, OmegaConfBaseException) as error:
        raise _composition(error, overrides) from None


def _parse_error(override: str, text: str) -> ConfigError:
    detail = text.splitlines()[0].split(":", 1)[-1].strip() if "mismatched" in text or "token" in text else ""
    remedy = "key=value; quote lists and odd characters for the shell: 'target=[gguf/q4_k_m,gguf/q8_0]' \"out='a b'\""
    return ConfigError(override, "is not a setting" + (f" ({detail})" if detail else ""), remedy)


def _missing(name: str, options: object, text: str, overrides: list[str]) -> ConfigError:
    """A file of a config group that is not there. Hydra lists the options of the group."""
    group, _, choice = name.partition("/")
    listed = list(options) if isinstance(options, (list, tuple)) else []
    where = next((o for o in overrides if choice and o.lstrip("+").startswith(f"{group}=") and choice in o), name)
    fact = f"there is no {group} named {choice!r}" if choice else f"{name!r} is not there"
    return ConfigError(where, fact, schema.close(choice, listed) if listed else text.splitlines()[-1].strip())


def _composition(error: Exception, overrides: list[str]) -> ConfigError:
    cause = error.__cause__ or error.__context__
    text = str(error) or str(cause or "")
    whole = f"{text}\n{cause or ''}"
    if (found := re.search(r"Could not override '([^']+)'", text)) is not None:
        return _unknown_key(found[1], overrides)
    if (found := re.search(r"Ambiguous value for argument '([^']+)'", text)) is not None:
        key, _, values = found[1].partition("=")
        remedy = f"as a list: '{key}=[{values}]'\nas a sweep, one build each: -m {found[1]}"
        return ConfigError(found[1], "several values for one setting", remedy)
    if (found := re.search(r"full_key: (\S+)", whole)) is not None:
        fact = next((line for line in whole.splitlines() if line.strip() and "override" not in line), text)
        return ConfigError(found[1], _lower(fact), _at(text))
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return ConfigError("configuration", _lower(lines[0]) if lines else type(error).__name__, "\n".join(lines[1:]))


def _unknown_key(key: str, overrides: list[str]) -> ConfigError:
    return ConfigError(next((o for o in overrides if o.startswith(f"{key}=")), key), "there is no such key", _near(key))


def _near(key: str) -> str:
    """The keys at the level where ``key`` goes wrong."""
    head, _, rest = key.partition(".")
    if head == "targets":
        name, _, wrong = rest.partition(".")
        known = schema.keys(schema.GgufTarget)
        return schema.close(wrong, known) + f"\nand targets.{name} is there only once target=… has chosen it"
    sections = schema.sections()
    if head in sections:
        return schema.close(rest, sections[head])
    return schema.close(head, [*schema.keys(schema.Config), "target"])


def _at(text: str) -> str:
    found = re.search(r"In '([^']+)'", text)
    return f"in {found[1]}.yaml" if found else ""


def _lower(text: str) -> str:
    return text[:1].lower() + text[1:] if text[1:2].islower() else text
