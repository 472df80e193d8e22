"""The null build: a build that found nothing to do is remembered with the stats of every file it rests on.

The record is named by the words of the command and the folder it ran in. While no recorded file has changed (size, times,
inode; folders by their own stat), the same words have the same answer, and neither Hydra nor numpy is loaded to find it.
"""

from __future__ import annotations

import json
import os
import sys

from qbuild import __version__, machine

UNUSUAL = ("-B", "-m", "--multirun", "--cfg", "-c", "--info", "-i", "--help", "-h", "--version", "rebuild=true")


def _name(argv: list[str]) -> str:
    import _blake2

    text = json.dumps([__version__, sys.executable, os.getcwd(), argv])  # noqa: PTH109 - pathlib costs a third of the start
    return _blake2.blake2b(text.encode(), digest_size=20).hexdigest()


def _stat(path: str) -> list[int] | None:
    try:
        found = os.stat(path)  # noqa: PTH116
    except OSError:
        return None
    return [found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino]


def lookup(argv: list[str]) -> str | None:
    """The answer that these words had, if nothing it rests on has changed."""
    if any(word in UNUSUAL for word in argv):
        return None
    path = machine.null_record(_name(argv))
    try:
        with open(path, encoding="utf-8") as file:  # noqa: PTH123
            record = json.load(file)
        if all(_stat(name) == stat for name, stat in record["files"].items()):
            return str(record["answer"])
    except (OSError, ValueError, KeyError):
        pass  # no record, or one half written: the full path answers
    return None


def record(argv: list[str], files: list[str], answer: str) -> None:
    """Remember an answer. A file that changes while it is recorded makes the record useless, never wrong."""
    if any(word in UNUSUAL for word in argv):
        return
    path = machine.null_record(_name(argv))
    document = {"files": {name: _stat(name) for name in files}, "answer": answer}
    try:
        os.makedirs(os.path.dirname(path), exist_ok=True)  # noqa: PTH103, PTH120
        beside = f"{path}.{os.getpid()}"
        with open(beside, "w", encoding="utf-8") as file:  # noqa: PTH123
            json.dump(document, file)
        os.replace(beside, path)  # noqa: PTH105
    except OSError:
        pass  # a cache that cannot be written costs time only
