"""Calibration texts: what is written in files, in a data set of the Hub, or in the texts that come with qbuild.

A document is a text, or a conversation: a list of messages with ``role`` and ``content``.
"""

from __future__ import annotations

import codecs
import importlib
import json
import math
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import resources
from itertools import count
from pathlib import Path
from typing import Any, BinaryIO

from qbuild.errors import InputError
from qbuild.inputs import exists, readable

__all__ = ["Document", "check", "documents", "files", "parsed"]

Document = str | list[dict[str, str]]

CORPUS = "corpus"
BREAK = "\n\n----\n\n"  # between the documents of a built-in file
LINES = (".jsonl", ".json")
SUFFIXES = (".txt", *LINES)
MAX_BYTES = 1 << 30  # all of it is held in memory, by the job that makes tokens of it
LINE = 1 << 20  # bytes that are held where a file is only looked at
ON_HUB = re.compile(r"([A-Za-z0-9][\w.-]*/[\w.-]+)(?:/(.+))?")
KINDS = "name FILE.txt, FILE.jsonl, a directory of them, or ORG/NAME/FILE.jsonl on the Hub"


def check(source: str, length: int, use: str) -> None:
    """Raises InputError for a text here that cannot be read, or that is too short for a window of ``length`` tokens
    whatever the tokenizer: a token is a byte or more, and one or two stand between documents. One on the Hub passes."""
    paths, size, found = files(source, fetch=False), 0.0, 0
    for nbytes in (nbytes for path in paths for nbytes in _sizes(path, source) if nbytes):
        size, found = size + nbytes, found + 1
    if paths and not found:
        raise InputError(source, "has no text in it", KINDS)
    if paths and size + 2 * found < length:
        fact = f"the text is too short: it has {size:.0f} bytes, a window needs {length} tokens"
        raise InputError(f"{use}.source", fact, f"give more text, or lower {use}.length")


def documents(source: str | None, *, offline: bool = False) -> list[Document]:
    """The documents of a source; None: the built-in ones.

    A ``.txt`` file is one document. A ``.jsonl`` or ``.json`` file has an object in every line, with ``text`` (a
    string) or ``messages``. A directory is its files, by name. ``org/name/file`` that is no path here is fetched from
    the data set ``org/name`` on the Hub; ``offline`` takes it from the Hub's own cache. Raises InputError.
    """
    if source is None:
        return list(_built_in())
    return parsed({path: _read(path, source) for path in files(source, fetch=True, offline=offline)}, source)


def parsed(contents: Mapping[Path, bytes], source: str) -> list[Document]:
    """The documents of files whose bytes are at hand, as ``documents`` gives them."""
    found = [document for path, data in contents.items() for document in _file(path, data) if document]
    if not found:
        raise InputError(source, "has no text in it", KINDS)
    return found


def files(source: str, *, fetch: bool, offline: bool = False) -> list[Path]:
    """The files of a source. Without ``fetch`` one on the Hub has none. Raises InputError."""
    path = Path(source).expanduser()
    there = exists(path)
    if not there and path.suffix not in SUFFIXES[:1] and (match := ON_HUB.fullmatch(source)):
        return [_fetched(match[1], match[2], source, offline)] if fetch else []
    if not there:
        raise InputError(source, "there is no such file or directory", KINDS)
    if not path.is_dir():
        return [path]
    with readable(path):
        found = sorted(file for file in path.iterdir() if file.suffix in SUFFIXES and file.is_file())
    if not found:
        raise InputError(source, f"has no {', '.join(SUFFIXES)} files in it", KINDS)
    return found


def _built_in() -> Iterator[str]:
    folder = resources.files(__package__).joinpath(CORPUS)
    for file in sorted(folder.iterdir(), key=lambda entry: entry.name):
        if file.name.endswith(".txt"):
            yield from file.read_text(encoding="utf-8").strip("\n").split(BREAK)


def _sizes(path: Path, source: str) -> Iterator[float]:
    """Bytes of each document of a file, of which a little is held at a time: the process that plans has a small part
    of the budget. Infinite is a conversation, to which a template may add much, and what a line too long may hold."""
    with _opened(path, source) as file:
        if path.suffix not in LINES:
            yield _text_size(file, path)
            return
        for number in count(1):
            line = file.readline(LINE + 1)
            if not line:
                return
            if len(line) > LINE:
                yield math.inf
                return
            text = _decoded(line.removesuffix(b"\n"), path, number)
            if text.strip():
                document = _document(text, f"{path}:{number}")
                yield len(document.encode()) if isinstance(document, str) else math.inf


def _text_size(file: BinaryIO, path: Path) -> int:
    decoder, size, line = codecs.getincrementaldecoder("utf-8-sig")(), 0, 1
    while True:
        data = file.read(LINE)
        try:
            size += len(decoder.decode(data, final=not data).encode())
        except UnicodeDecodeError as error:
            raise _no_utf8(path, line + error.object[: error.start].count(b"\n")) from None
        line += data.count(b"\n")
        if not data:
            return size


def _read(path: Path, source: str) -> bytes:
    with _opened(path, source) as file:
        return file.read()


@contextmanager
def _opened(path: Path, source: str) -> Iterator[BinaryIO]:
    if path.suffix not in SUFFIXES:
        raise InputError(source, f"{path.name} is no text that can be read here", KINDS)
    try:
        with path.open("rb") as file:
            if path.stat().st_size > MAX_BYTES:
                raise InputError(source, f"{path.name} is larger than 1 GiB", "a part of it is enough: head -n 10000")
            yield file
    except FileNotFoundError:
        raise InputError(source, "there is no such file or directory", KINDS) from None
    except OSError as error:
        raise InputError(source, f"{path.name} cannot be read: {error.strerror}", "check the file") from None


def _file(path: Path, data: bytes) -> Iterator[Document]:
    text = _decoded(data, path, 1)
    if path.suffix not in LINES:
        return iter([text])
    return (_document(line, f"{path}:{n}") for n, line in enumerate(text.split("\n"), 1) if line.strip())


def _decoded(data: bytes, path: Path, line: int) -> str:
    """Text from line ``line`` of a file on, as it is: no translation of line ends."""
    try:
        return data.decode("utf-8-sig" if line == 1 else "utf-8")
    except UnicodeDecodeError as error:
        raise _no_utf8(path, line + data[: error.start].count(b"\n")) from None


def _no_utf8(path: Path, line: int) -> InputError:
    return InputError(f"{path}:{line}", "is not UTF-8", "save the text as UTF-8")


def _document(line: str, place: str) -> Document:
    """One line of a JSONL file."""
    remedy = '{"text": "…"} or {"messages": [{"role": "user", "content": "…"}, …]} in every line'
    try:
        found = json.loads(line)
    except ValueError as error:
        raise InputError(place, f"is not JSON: {error}", remedy) from None
    if isinstance(found, dict):
        if isinstance(found.get("text"), str):
            return _whole(found["text"], place)
        if _is_conversation(found.get("messages")):
            return [{key: _whole(said[key], place) for key in ("role", "content")} for said in found["messages"]]
    keys = f"; it has {', '.join(map(str, list(found)[:8]))}" if isinstance(found, dict) else ""
    raise InputError(place, f"has neither text nor messages{keys}", remedy)


def _whole(text: str, place: str) -> str:
    """JSON can hold half of a surrogate pair, which is no letter: no tokenizer reads it."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        fact = f"has half of a letter in it: {text[error.start : error.start + 1]!a}"
        raise InputError(place, fact, "take it out, or write the text again") from None
    return text


def _is_conversation(messages: Any) -> bool:
    return (
        isinstance(messages, list)
        and bool(messages)
        and all(
            isinstance(said, dict) and isinstance(said.get("role"), str) and isinstance(said.get("content"), str)
            for said in messages
        )
    )


def _fetched(repo: str, name: str | None, source: str, offline: bool) -> Path:
    """One file of a data set, in the Hub's own cache."""
    from huggingface_hub import HfApi, errors, get_session, hf_hub_download

    transport = importlib.import_module(type(get_session()).__module__.partition(".")[0]).HTTPError
    try:
        if name is None and offline:
            raise InputError(source, "is a data set, and offline=true: its files cannot be listed", KINDS)
        if name is None:
            there = [f.rfilename for f in HfApi().dataset_info(repo).siblings or [] if f.rfilename.endswith(SUFFIXES)]
            raise InputError(source, _choice(there), f"name a file of it: {repo}/{there[0] if there else 'FILE.jsonl'}")
        return Path(hf_hub_download(repo, name, repo_type="dataset", local_files_only=offline))
    except errors.GatedRepoError:
        remedy = f"accept its terms at https://huggingface.co/datasets/{repo}, then set HF_TOKEN to a token of yours"
        raise InputError(source, "is gated: your account has no access, or no token was sent", remedy) from None
    except (errors.RepositoryNotFoundError, errors.EntryNotFoundError) as error:
        if isinstance(error, errors.LocalEntryNotFoundError):
            raise InputError(source, "is not here, and the Hub cannot be asked", KINDS) from None
        fact = "there is no such file or directory, nor such a data set on the Hub"
        raise InputError(source, fact, KINDS) from None
    except (errors.HfHubHTTPError, errors.OfflineModeIsEnabled, OSError, transport) as error:
        raise InputError(source, f"is not here, and the Hub cannot be reached: {error}", KINDS) from None


def _choice(there: list[str]) -> str:
    if not there:
        return f"is a data set without {', '.join(SUFFIXES)} files"
    more = f" and {len(there) - 6} more" if len(there) > 6 else ""
    return f"is a data set with the files {', '.join(there[:6])}{more}"
