"""``checkpoint.directory``: a model directory out of solved layers, plain tensors and side files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass

from qbuild.checkpoint import Checkpoint
from qbuild.digest import Digest, digest_bytes
from qbuild.errors import StoreError
from qbuild.inputs import InputFile
from qbuild.quant.directory import Directory
from qbuild.quant.shapes import Scheme
from qbuild.store import Store

KIND = "checkpoint.directory"
SALT = 1
RAM = 270 << 20  # a worker with torch loaded, and what layers and tensors leave (measured: 227, and 12 to 40)
RAM_CUDA = RAM + (280 << 20)  # with a torch that was built for CUDA (measured: 275)


@dataclass(frozen=True)
class Params:
    """``files``: digest of every header and of the texts that are written; the inputs are what fills them."""

    layout: str
    files: str


@dataclass(frozen=True)
class Task:
    """``solved`` is by layer; ``copies`` are the files that go along as they are, by name."""

    key: str
    checkpoint: Checkpoint
    directory: Directory
    copies: Mapping[str, InputFile]
    scheme: Scheme
    solved: tuple[Digest, ...]


@dataclass(frozen=True)
class Made:
    """``tree`` is the artifact that stands for the directory."""

    tree: Digest
    read_bytes: int
    written_bytes: int


def planned(directory: Directory) -> str:
    """Digest of what is written whatever the weights are: headers and texts."""
    parts = [(file.name, file.header) for file in directory.files]
    parts += [(name, text.encode()) for name, text in sorted(directory.texts.items())]
    return digest_bytes(repr(parts).encode()).hash


def tree(files: Mapping[str, Digest]) -> bytes:
    """The artifact that stands for a directory: its files by name."""
    return json.dumps({name: str(digest) for name, digest in sorted(files.items())}).encode()


def listed(store: Store, artifact: Digest, target: str) -> dict[str, Digest]:
    """The files of a directory's artifact. Raises StoreError where it is gone or damaged."""
    blob = store.read_bytes(artifact)
    if blob is None:
        fact = f"the list of the files of {target} is gone or damaged"
        raise StoreError(str(store.root), fact, "run again: it is made anew")
    return {name: Digest.parse(text) for name, text in json.loads(blob).items()}
