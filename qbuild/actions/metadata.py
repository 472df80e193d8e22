"""``gguf.metadata``: the key-value pairs that llama.cpp's converter writes for a checkpoint, as one blob.

It needs transformers (config defaults, tokenizers), so it runs in a worker of its own and never at plan time. Its
inputs are the digests of the small files beside the weights.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from qbuild.arch.metadata import metadata
from qbuild.checkpoint import Checkpoint
from qbuild.gguffile import KV
from qbuild.inputs import InputFile, copies

KIND = "gguf.metadata"
SALT = 1
# transformers' config defaults and tokenizers decide values; a new release is a new key.
VERSIONS = ("transformers", "tokenizers", "gguf")

_LENGTHS = struct.Struct("<IQ")


@dataclass(frozen=True)
class Params:
    """``name`` is the model's name where the user gave one; ``folder`` feeds the converter's name heuristics."""

    name: str | None
    folder: str
    weights: str  # digest of names, shapes and dtypes: the converter counts parameters for general.size_label


@dataclass(frozen=True)
class Task:
    """``files``: the small files beside the weights, by name."""

    checkpoint: Checkpoint
    name: str | None
    files: Mapping[str, InputFile]


def ram(aux: Mapping[str, Path]) -> int:
    """Predicted peak bytes: transformers without torch, and the vocabulary as Python and tokenizer objects.

    Measured: 70 to 87 MiB with SentencePiece; 123, 225 and 376 MiB with BPE vocabularies of 49, 128 and 256 thousand
    tokens, whose tokenizer.json has 1.7, 5.2 and 11 MiB.
    """
    size = aux["tokenizer.json"].stat().st_size if "tokenizer.json" in aux else 0
    return (88 << 20) + 6 * size if "tokenizer.model" in aux else (86 << 20) + 28 * size


def run(task: Task, store: Path) -> bytes:
    if task.checkpoint.root is None:
        raise ValueError("BUG: metadata of a checkpoint that is not on disk")
    with copies(task.files, task.checkpoint.root, store) as folder:
        return pack(metadata(replace(task.checkpoint, root=folder), task.name))


def pack(kvs: Sequence[KV]) -> bytes:
    """Length-prefixed keys and raw entries."""
    return b"".join(_LENGTHS.pack(len(kv.key.encode()), len(kv.raw)) + kv.key.encode() + kv.raw for kv in kvs)


def unpack(blob: bytes) -> list[KV]:
    kvs, at = [], 0
    while at < len(blob):
        key, raw = _LENGTHS.unpack_from(blob, at)
        at += _LENGTHS.size
        kvs.append(KV(blob[at : at + key].decode(), blob[at + key : at + key + raw]))
        at += key + raw
    return kvs
