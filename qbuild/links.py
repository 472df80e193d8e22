"""Outputs: the store's file, placed in the user's folder without writing its bytes again where that is possible."""

from __future__ import annotations

import errno
import os
from pathlib import Path

from qbuild.digest import Digest, Hasher
from qbuild.errors import ConfigError, StoreError
from qbuild.fsutil import FULL, clone, disk_error, fsync_dir, hash_range, write_all

__all__ = ["MODES", "check_mode", "place"]

ELSEWHERE = "choose another folder: out=DIRECTORY"
MODES = ("auto", "reflink", "hardlink", "copy")
NO_HARD_LINK = frozenset({errno.EXDEV, errno.EPERM, errno.EMLINK, errno.EOPNOTSUPP, errno.ENOSYS})


def check_mode(mode: str) -> str:
    if mode not in MODES:
        raise ConfigError("store.link", f"no way to link is called {mode!r}", f"one of: {', '.join(MODES)}")
    return mode


def place(source: Path, dest: Path, mode: str, digest: Digest) -> str:
    """Put ``source`` at ``dest``: written beside it, then renamed over it. Returns the way that worked."""
    try:
        dest.parent.mkdir(parents=True, exist_ok=True)
        if dest.is_dir():
            raise ConfigError(str(dest), "is a folder, a file is to be written there", ELSEWHERE)
        beside = dest.with_name(f".qbuild-{os.urandom(8).hex()}")  # a name may be as long as a name can be already
        try:
            how = _make(source, beside, mode, digest)
            beside.replace(dest)
        finally:
            beside.unlink(missing_ok=True)
        fsync_dir(dest.parent)
        return how
    except OSError as error:
        if error.errno in FULL:
            raise disk_error(error, dest.parent, digest.size) from None
        fact = f"cannot be written: {os.strerror(error.errno or 0)}"
        raise ConfigError(str(dest), fact, ELSEWHERE) from None


def _make(source: Path, beside: Path, mode: str, digest: Digest) -> str:
    if mode in ("auto", "reflink") and _reflink(source, beside):
        return "reflink"
    if mode in ("auto", "hardlink") and _hard_link(source, beside):
        return "hardlink"
    if mode in ("auto", "copy"):
        _copy(source, beside, digest)
        return "copy"
    fact = f"store.link={mode}: the file system cannot do that between {source.parent} and {beside.parent}"
    remedy = "use store.link=auto, or put the store beside the outputs: store.dir=DIRECTORY"
    raise ConfigError(str(beside.parent), fact, remedy)


def _hard_link(source: Path, beside: Path) -> bool:
    try:
        os.link(source, beside)
    except OSError as error:
        if error.errno in NO_HARD_LINK:
            return False
        raise
    return True


def _reflink(source: Path, beside: Path) -> bool:
    with source.open("rb") as reader, beside.open("xb") as writer:
        cloned = clone(reader.fileno(), writer.fileno())
        if cloned:
            os.fsync(writer.fileno())
    if not cloned:
        beside.unlink()
    return cloned


def _copy(source: Path, beside: Path, digest: Digest) -> None:
    """In constant memory, and verified on the way: a copy must not spread damage."""
    hasher = Hasher()
    with source.open("rb") as reader, beside.open("xb", buffering=0) as writer:

        def feed(part: memoryview) -> None:
            write_all(writer.fileno(), part, hasher.size)
            hasher.update(part)

        hash_range(reader.fileno(), 0, digest.size, feed)
        os.fsync(writer.fileno())
    if hasher.digest() != digest:
        raise StoreError(str(source), "the stored bytes are damaged", "run qbuild verify, then build again")
