"""The manifest of an action: everything that can change its bytes, and nothing else.

One walk writes both the action key and the text of ``qbuild explain``, so that the explanation cannot drift from the
key. A manifest is fed by typed params and input digests, never by the Hydra configuration.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from typing import Any

import blake3

from qbuild.digest import Digest

__all__ = ["action_key", "explain", "walk"]

FORMAT = 1  # of this walk; raising it disowns every result


def _canonical(value: Any, where: str) -> str:
    """Tagged text of a param: ``4``, ``4.0`` and ``"4"`` differ, and so do an empty tuple and ``None``."""
    match value:
        case None:
            return "null"
        case bool():
            return f"bool {str(value).lower()}"
        case int():
            return f"int {value}"
        case float():
            return f"float {value.hex()}"
        case str():
            return f"str {value!r}"
        case Digest():
            return f"digest {value}"
        case tuple():
            return "[" + ", ".join(_canonical(item, where) for item in value) + "]"
        case _ if dataclasses.is_dataclass(value):
            fields = (f"{f.name}={_canonical(getattr(value, f.name), where)}" for f in dataclasses.fields(value))
            return "{" + ", ".join(fields) + "}"
    raise TypeError(f"BUG: {where}: {type(value).__name__} cannot stand in a manifest")


def walk(
    kind: str, salt: int, params: Any, inputs: Iterable[tuple[str, Digest]], versions: Iterable[tuple[str, str]] = ()
) -> Iterator[tuple[str, str]]:
    """Yield (name, value) for every part of the manifest, in a fixed order."""
    yield "manifest", str(FORMAT)
    yield "kind", kind
    yield "salt", str(salt)
    for field in dataclasses.fields(params):
        yield f"param {field.name}", _canonical(getattr(params, field.name), f"{kind}.{field.name}")
    for role, digest in inputs:
        yield f"input {role}", str(digest)
    for name, version in sorted(versions):
        yield f"version {name}", version


def action_key(parts: Iterable[tuple[str, str]]) -> str:
    """64 hex characters. Each part is fed with its length, so no two manifests share a byte stream."""
    text = "".join(f"{len(name)}:{name}{len(value)}:{value}" for name, value in parts)
    return blake3.blake3(text.encode()).hexdigest()


def explain(parts: Iterable[tuple[str, str]]) -> list[str]:
    """The same parts as readable lines, in two columns."""
    rows = list(parts)
    width = max((len(name) for name, _ in rows), default=0)
    return [f"{name:<{width}}  {value}" for name, value in rows]
