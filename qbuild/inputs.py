"""Small files of the user's, read as what they were when their digest was taken.

What is made of a file is kept under its digest, and files are edited while a build runs. So nothing opens one by its
path again: it is read here, whole, and compared.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from qbuild.digest import Digest, Hasher, digest_bytes
from qbuild.errors import InputChanged, InputError

__all__ = ["InputFile", "changed", "copies", "exists", "folder_name", "readable", "write"]

PART = 1 << 20  # bytes


@dataclass(frozen=True)
class InputFile:
    path: Path
    digest: Digest

    @classmethod
    def taken(cls, path: Path) -> InputFile:
        """The file as it is now, of which a little is held at a time: it may be a text of a gigabyte. Raises InputError
        where it cannot be read."""
        hasher = Hasher()
        with readable(path), path.open("rb") as file:
            while part := file.read(PART):
                hasher.update(part)
        return cls(path, hasher.digest())

    def read(self) -> bytes:
        """Its bytes. Raises InputError where they are not those of the digest any more."""
        with readable(self.path):
            data = self.path.read_bytes()
        if digest_bytes(data) != self.digest:
            raise changed(self.path)
        return data


def changed(path: Path, what: str = "") -> InputChanged:
    """The error for a file that is not what it was; ``what``: the part of it that was read."""
    fact = f"{what} changed after it was hashed".lstrip()
    return InputChanged(str(path), fact, "run again when nothing writes it: nothing was made of the new bytes")


def exists(path: Path) -> bool:
    """Whether there is such a file or directory. Raises InputError where it lies in a folder that we cannot enter."""
    with readable(path):
        return path.exists()


@contextmanager
def readable(path: Path) -> Iterator[None]:
    """The system's errors of reading ``path`` as InputError."""
    try:
        yield
    except OSError as error:
        remedy = "check the path, and that it is yours to read"
        raise InputError(str(path), f"cannot be read: {error.strerror}", remedy) from None


def folder_name(folder: Path) -> str:
    """What a folder is called, where its path ends in .. too."""
    return folder.resolve().name if folder.name == ".." else folder.name


def write(files: Mapping[str, InputFile], folder: Path) -> None:
    """Put ``files`` into a folder, by names below it."""
    for name, file in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(file.read())


@contextmanager
def copies(files: Mapping[str, InputFile], like: Path, store: Path) -> Iterator[Path]:
    """A folder with ``files`` by name and nothing else, for libraries that open files themselves. It is called as
    ``like``, which errors name instead, and lies in the store, where gc finds it after a kill."""
    within = store / "copies"
    within.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=within) as scratch:
        folder = Path(scratch) / folder_name(like)
        folder.mkdir(exist_ok=True)  # the root of a file system has no name
        write(files, folder)
        try:
            yield folder
        except InputError as error:
            place, fact, remedy = (text.replace(str(folder), str(like)) for text in error.args)
            raise InputError(place, fact, remedy) from None
