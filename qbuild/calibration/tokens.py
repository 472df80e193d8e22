"""Calibration data: texts as tokens, in windows of equal length. The artifact is the tokens, and its digest is theirs.

transformers reads the tokenizer, which needs no torch: the worker that runs this hides it.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from qbuild.calibration.texts import Document
from qbuild.errors import InputError

__all__ = ["Packed", "Shape", "begin_token", "load_tokenizer", "windows"]

VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json")
SHAPE = struct.Struct("<II")


@dataclass(frozen=True)
class Shape:
    """``samples`` windows of ``length`` tokens are wanted; ``seed`` orders the documents where there are several."""

    samples: int
    length: int
    seed: int = 0


@dataclass(frozen=True)
class Packed:
    """``ids`` is int32 [windows, length]; ``notice`` says what of the texts is in it, and is no part of its bytes."""

    ids: np.ndarray
    notice: str = ""

    def to_bytes(self) -> bytes:
        """Windows and length as uint32, then the tokens as int32, all little-endian."""
        return SHAPE.pack(*self.ids.shape) + self.ids.astype("<i4").tobytes()

    @staticmethod
    def from_bytes(data: bytes) -> Packed:
        """Raises ValueError or struct.error for bytes that ``to_bytes`` did not make."""
        count, length = SHAPE.unpack_from(data)
        return Packed(np.frombuffer(data, "<i4", offset=SHAPE.size).reshape(count, length).astype(np.int32))


def load_tokenizer(files: Mapping[str, Path], place: str) -> Any:
    """transformers' tokenizer from the small files of a checkpoint, by name, which lie in one directory.

    ``place`` is what the user calls the model. Raises InputError.
    """
    from transformers import AutoTokenizer

    found = next((files[name] for name in VOCABULARIES if name in files), None)
    if found is None:
        fact = f"has no tokenizer: there is no {', '.join(VOCABULARIES[:-1])} or {VOCABULARIES[-1]}"
        raise InputError(place, fact, "calibration needs it: fetch it from where the model came from")
    try:
        return AutoTokenizer.from_pretrained(found.parent, local_files_only=True)
    except (ValueError, OSError, KeyError, TypeError, AttributeError, ImportError) as error:
        fact = f"transformers cannot load the tokenizer: {error}"
        raise InputError(place, fact, "fetch its files again") from None


def begin_token(tokenizer: Any) -> int | None:
    """The token that the tokenizer puts before a text (BOS), or None where it puts none."""
    ids = tokenizer("a")["input_ids"]
    return int(ids[0]) if ids and ids[0] == tokenizer.bos_token_id else None


def windows(
    documents: Sequence[Document],
    tokenizer: Any,
    shape: Shape,
    begin: int | None = None,
    use: str = "calibration",
) -> Packed:
    """Cut documents into windows, one after the other, with no gaps, no padding and no overlap.

    Special tokens are not added. One document is taken from its beginning. Several are taken in an order that the seed
    decides, with the end-of-text token between them, until there are enough windows.

    ``begin`` makes the windows those of llama-imatrix and llama-perplexity for a model that begins its texts with this
    token: it is put before the text once, and then over the first token of every window. Raises InputError for a text
    that is too short, with ``use`` as the part of the configuration that names it.
    """
    wanted = shape.samples * shape.length
    parts: list[list[int]] = [] if begin is None else [[begin]]
    total, taken = sum(map(len, parts)), 0
    for ids in _encoded(_ordered(documents, shape.seed), tokenizer):
        if taken and total >= wanted:
            break
        between = [tokenizer.eos_token_id] if taken and tokenizer.eos_token_id is not None else []
        parts += [between, ids]
        total += len(between) + len(ids)
        taken += 1
    count = min(shape.samples, total // shape.length)
    if count == 0:
        fact = f"the text is too short: it has {total} tokens, a window needs {shape.length}"
        raise InputError(f"{use}.source", fact, f"give more text, or lower {use}.length")
    stream = np.fromiter((token for part in parts for token in part), np.int32, total)
    cut = stream[: count * shape.length].reshape(count, shape.length).copy()
    if begin is not None:
        cut[:, 0] = begin
    return Packed(cut, _notice(shape, count, total, taken, len(documents)))


def _ordered(documents: Sequence[Document], seed: int) -> list[Document]:
    """Shuffled by hashes, which stay what they are when a library's generator changes."""
    order = sorted(range(len(documents)), key=lambda n: hashlib.sha256(f"{seed}:{n}".encode()).digest())
    return [documents[n] for n in order]


def _encoded(documents: Sequence[Document], tokenizer: Any) -> Iterator[list[int]]:
    for document in documents:
        text = document if isinstance(document, str) else _rendered(document, tokenizer)
        # Texts are longer than the model's context, of which the tokenizer would warn.
        yield tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


def _rendered(messages: list[dict[str, str]], tokenizer: Any) -> str:
    """A conversation as the model's chat template writes it; without a template, what was said."""
    if not tokenizer.chat_template:
        return "\n\n".join(said["content"] for said in messages)
    from jinja2 import TemplateError

    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False))
    except (TemplateError, ValueError, KeyError, TypeError) as error:  # the template is a program of the model's
        roles = ", ".join(said["role"] for said in messages[:6])
        fact = f"the model's chat template refuses messages of {roles}: {error}"
        raise InputError("calibration.source", fact, "correct the roles, or give the conversations as text") from None


def _notice(shape: Shape, count: int, total: int, taken: int, documents: int) -> str:
    used = count * shape.length
    tokens = f"{used:,} of {total:,} tokens"
    if documents > 1:
        tokens += f" of {taken:,} documents" if taken == documents else f" of {taken:,} out of {documents:,} documents"
    said = f"{count:,} windows of {shape.length:,} tokens: {tokens}"
    return said if count == shape.samples else f"{said}; {shape.samples:,} windows were asked for"
