"""The null build's short cut: same command, same folder, nothing touched since → the recorded answer.

A build is recorded under its command line with the stats of every file that it rests on: configuration, sources,
outputs, qbuild's own files. ``answer`` compares them before anything heavy is imported. Any doubt (a stat that differs,
a record that cannot be read) means the normal path, so a record can only save time.
"""

from __future__ import annotations

import json
import os
import sys
import zlib
from collections.abc import Iterable

from qbuild import __version__, machine

__all__ = ["answer", "record", "tree"]

FORMAT = 1
RACY_NS = 2_000_000_000  # a file changed this shortly before the build began may have changed again unseen

Stat = list[int]


def answer(argv: list[str], cwd: str) -> str | None:
    """What a null build of this very command prints, if nothing that it rests on has changed."""
    try:
        with open(_path(argv, cwd), encoding="utf-8") as file:
            found = json.load(file)
        if found["asked"] != _asked(argv, cwd):
            return None
        for path, stat in found["stats"].items():
            if _stat(path) != stat:
                return None
        text = found["stdout"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return text if isinstance(text, str) else None


def record(
    argv: list[str], cwd: str, inputs: Iterable[str], outputs: Iterable[str], stdout: str, began_ns: int
) -> bool:
    """Keep an answer. ``inputs`` were read after ``began_ns``: one changed near or after that makes it worthless.

    An input that does not exist is recorded as missing. Failing to record is not an error.
    """
    stats: dict[str, Stat | None] = {}
    for path in [*inputs, *_own_files()]:
        stats[os.path.abspath(path)] = stat = _stat(path)
        if stat is not None and max(stat[1], stat[2]) > began_ns - RACY_NS:
            return False
    for path in outputs:
        stats[os.path.abspath(path)] = stat = _stat(path)
        if stat is None:
            return False
    target = _path(argv, cwd)
    beside = f"{target}.{os.getpid()}"
    try:
        os.makedirs(os.path.dirname(target), exist_ok=True)
        with open(beside, "w", encoding="utf-8") as file:
            json.dump({"asked": _asked(argv, cwd), "stats": stats, "stdout": stdout}, file)
        os.replace(beside, target)
    except OSError:
        return False
    return True


def tree(root: str) -> list[str]:
    """Every folder and file below ``root`` but caches; ``root`` alone when it is missing. A folder's time stamp tells
    that something was added or taken away."""
    found = [root]
    for folder, folders, files in os.walk(root):
        folders[:] = sorted(name for name in folders if name != "__pycache__" and not name.startswith("."))
        found += [os.path.join(folder, name) for name in [*folders, *sorted(files)] if not name.startswith(".")]
    return found


def _own_files() -> list[str]:
    """qbuild's own code, and the folders that packages are installed in: another version may write other bytes."""
    package = os.path.dirname(os.path.abspath(__file__))
    return [*(path for path in sys.path if path.endswith("site-packages")), *tree(package)]


def _stat(path: str) -> Stat | None:
    try:
        found = os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    return [found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino]


def _asked(argv: list[str], cwd: str) -> list[object]:
    return [FORMAT, __version__, sys.version, sys.prefix, cwd, argv]


def _path(argv: list[str], cwd: str) -> str:
    # A short name will do: the record holds the whole question and is compared with it.
    return machine.null_record(f"{zlib.crc32(repr(_asked(argv, cwd)).encode()):08x}")
