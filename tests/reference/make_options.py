"""Record what llama-quantize makes of tiny-llama with options, of other sources, and cut into shards.

    python tests/reference/make_options.py LLAMA_CPP tests/reference/options.json

LLAMA_CPP as for make_reference.py. Tests take ``CASES`` and compare with the record.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from make_reference import digest

DATA = Path(__file__).parent.parent / "data"
MATRIX = "tiny-llama-imatrix.gguf"


@dataclass(frozen=True)
class Case:
    """``words`` are llama-quantize's, ``target`` says the same to qbuild. ``sources``: file types that are made first,
    each of the one before; ``cut``: --split-max-size for the last source; ``shards``: for what is made."""

    ftype: str
    words: tuple[str, ...] = ()
    target: Mapping[str, Any] = field(default_factory=dict)
    sources: tuple[str, ...] = ()
    cut: str | None = None
    shards: str | None = None


PAIRS: dict[str, Any] = {
    "llama.context_length": 4096, "general.name": "Ein anderer Name, länger", "tokenizer.ggml.add_bos_token": False,
    "my.flag": True, "my.number": 0.1, "my.count": 4294967295, "llama.rope.freq_base": 1e6, "general.file_type": 7,
    "quantize.imatrix.file": "none",
}  # fmt: skip


def overrides(pairs: Mapping[str, Any]) -> tuple[str, ...]:
    """As llama-quantize's command line has them."""
    names = {bool: "bool", int: "int", float: "float", str: "str"}
    texts = {key: str(value).lower() if isinstance(value, bool) else value for key, value in pairs.items()}
    words = (f"{key}={names[type(value)]}:{texts[key]}" for key, value in pairs.items())
    return tuple(word for pair in words for word in ("--override-kv", pair))


WEIGHED, IMATRIX = ("--imatrix", MATRIX), {"imatrix": MATRIX}
CASES = {
    "without the middle layer": Case("Q4_K_M", ("--prune-layers", "1"), {"prune_layers": [1]}),
    "without first and last": Case("Q3_K_M", ("--prune-layers", "2,0"), {"prune_layers": [2, 0]}),
    "pruned, with a matrix": Case(
        "IQ2_M", (*WEIGHED, "--prune-layers", "0"), IMATRIX | {"prune_layers": [0]}
    ),
    "pairs": Case("Q4_0", overrides(PAIRS), {"override_kv": PAIRS}),
    "pairs, pruned, with a matrix": Case(
        "Q5_K_M", (*overrides(PAIRS), *WEIGHED, "--prune-layers", "1"),
        IMATRIX | {"override_kv": PAIRS, "prune_layers": [1]},
    ),
    "some weights": Case(
        "Q4_K_S", (*WEIGHED, "--include-weights", "ffn_down", "--include-weights", "blk.0."),
        IMATRIX | {"include_weights": ["ffn_down", "blk.0."]},
    ),
    "other weights": Case(
        "Q4_K_S", (*WEIGHED, "--exclude-weights", "ffn_down", "--exclude-weights", "blk.0."),
        IMATRIX | {"exclude_weights": ["ffn_down", "blk.0."]},
    ),
    **{f"of {source}": Case("Q4_K_M", sources=(source,)) for source in ("F32", "F16", "BF16")},
    "a matrix, of F32": Case("IQ3_S", WEIGHED, IMATRIX, sources=("F32",)),
    **{
        f"{ftype} of {source}": Case(ftype, ("--allow-requantize",), sources=(source,))
        for source, ftype in (
            ("Q8_0", "Q4_K_M"), ("Q4_K_M", "Q5_0"), ("Q6_K", "Q2_K"), ("Q5_1", "IQ4_XS"), ("Q4_K_M", "Q4_K_S"),
            ("Q5_K_M", "F16"), ("TQ2_0", "Q8_0"), ("IQ4_NL", "BF16"),
        )
    },
    "a matrix, of Q8_0": Case("IQ2_XS", (*WEIGHED, "--allow-requantize"), IMATRIX, sources=("Q8_0",)),
    "of shards": Case("Q4_K_M", sources=("F32",), cut="3M"),
    "shards": Case("Q8_0", shards="1M"),
    "shards, pruned": Case("Q8_0", ("--prune-layers", "1"), {"prune_layers": [1]}, shards="1M"),
    "shards of shards": Case("F16", sources=("F32",), cut="3M", shards="2M"),
}  # fmt: skip


def quantize(llama: Path, folder: Path, source: str, ftype: str, words: tuple[str, ...]) -> str:
    made = f"{ftype}.gguf"
    command = [llama / "build/bin/llama-quantize", *words, source, made, ftype]
    subprocess.run(command, check=True, capture_output=True, cwd=folder)
    return made


def split(llama: Path, folder: Path, source: str, size: str, prefix: str) -> list[str]:
    command = [llama / "build/bin/llama-gguf-split", "--split-max-size", size, source, prefix]
    subprocess.run(command, check=True, capture_output=True, cwd=folder)
    return sorted(path.name for path in folder.glob(f"{prefix}-*-of-*.gguf"))


def record(llama: Path, converted: Path, case: Case) -> dict[str, str]:
    """Digests by what follows ``made`` in the names of the files."""
    folder = Path(tempfile.mkdtemp(dir=converted.parent))
    shutil.copy(DATA / MATRIX, folder)  # the files note its path as it is typed
    source = str(converted)
    for ftype in case.sources:
        made = quantize(llama, folder, source, ftype, ())
        source = str((folder / made).rename(folder / f"source-{made}"))
    if case.cut:
        source = split(llama, folder, source, case.cut, "source")[0]
    made = quantize(llama, folder, source, case.ftype, case.words)
    files = split(llama, folder, made, case.shards, "made") if case.shards else [made]
    found = {name.removeprefix("made") if case.shards else ".gguf": digest(folder / name) for name in files}
    shutil.rmtree(folder)
    return found


def main(llama: Path, out: Path) -> None:
    with tempfile.TemporaryDirectory() as folder:
        converted = Path(folder) / "converted.gguf"
        convert = [sys.executable, "convert_hf_to_gguf.py", str(DATA / "tiny-llama"), "--outfile", str(converted)]
        subprocess.run(convert, cwd=llama, check=True, capture_output=True)
        files = {name: record(llama, converted, case) for name, case in CASES.items()}
    document = {
        "llama.cpp": "the source in llama-cpp-python 0.3.36 (ggml 0.25.3)",
        "command": "python tests/reference/make_options.py LLAMA_CPP tests/reference/options.json",
        "files": files,
    }
    out.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve(), Path(sys.argv[2]).resolve())
