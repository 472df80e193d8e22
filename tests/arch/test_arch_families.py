"""Every family's whole files, header and all, against what llama.cpp made of the same small random checkpoints."""

from __future__ import annotations

import json
from pathlib import Path

import blake3
import numpy as np
import pytest
from arch.arch_kit import DATA, maker

import qbuild
from qbuild import gguffile
from qbuild.actions import tensor
from qbuild.arch import convert, mix
from qbuild.arch.metadata import metadata, quantized_kvs
from qbuild.checkpoint import Checkpoint, Reader, open_path
from qbuild.ggml import FILE_TYPES, QTYPES

RECORD: dict[str, dict[str, dict[str, str]]] = json.loads((DATA / "arch/families.json").read_text())
RECORDED, WEIGHED = RECORD["files"], RECORD["with matrix.gguf"]
MAKER = maker("make_families")


def gguf_bytes(checkpoint: Checkpoint, file_type: str, kvs: list[gguffile.KV]) -> bytes:
    """The whole file, made tensor by tensor in this process."""
    specs = convert.tensor_specs(checkpoint)
    choices = mix.choose(specs, convert.model_facts(checkpoint), mix.Mix(file_type))
    pairs = quantized_kvs(kvs, FILE_TYPES[file_type].id)
    out = bytearray(gguffile.header(pairs, [(s.name, s.shape, t) for s, t in choices]))
    with Reader(checkpoint.files) as reader:
        for spec, type_ in choices:
            out += encoded(checkpoint, reader, spec, type_)
            out += bytes(-len(out) % 32)
    return bytes(out)


def encoded(checkpoint: Checkpoint, reader: Reader, spec: convert.TensorSpec, type_: str) -> bytes:
    cols, dtype = spec.shape[-1], "F32"
    parts = [spec.data] if spec.data is not None else []
    for piece in spec.pieces:
        source = checkpoint.tensors[piece.source]
        dtype, row = source.dtype, QTYPES[source.dtype].row_bytes(cols)
        stop = source.nbytes // row if piece.stop is None else piece.stop
        buffer = bytearray((stop - piece.start) * row)
        reader.read_into(source.file, source.offset + piece.start * row, memoryview(buffer))
        parts.append(bytes(buffer))
    raw = np.frombuffer(b"".join(parts), np.uint8).reshape(-1, QTYPES[dtype].row_bytes(cols))
    out = np.empty((raw.shape[0], QTYPES[type_].row_bytes(cols)), np.uint8)
    tensor.encode(raw, tensor.Params(type_, spec.stored, dtype, cols, spec.transform), out)
    return out.tobytes()


@pytest.mark.parametrize("variant", RECORDED)
def test_a_family_gives_llama_cpps_files(variant: str, tmp_path: Path) -> None:
    folder = MAKER.write(variant, tmp_path)
    checkpoint = open_path(folder, str(folder))
    kvs = metadata(checkpoint, None)
    for file_type, expected in RECORDED[variant].items():
        made = gguf_bytes(checkpoint, file_type, kvs)
        assert f"{blake3.blake3(made).hexdigest()}/{len(made)}" == expected, file_type


@pytest.mark.parametrize("variant", WEIGHED)
def test_each_expert_of_a_stack_is_weighed_by_its_own_sums(
    variant: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the whole engine, which cuts the matrix; the file notes the matrix's path as it was typed."""
    folder = MAKER.write(variant, tmp_path)
    MAKER.write_matrix(folder, tmp_path / "matrix.gguf")
    monkeypatch.chdir(tmp_path)
    targets = {name.lower(): {"format": "gguf", "ftype": name, "imatrix": "matrix.gguf"} for name in WEIGHED[variant]}
    store, out = {"dir": str(tmp_path / "store")}, str(tmp_path / "out")
    config = {"model": {"source": str(folder)}, "targets": targets, "store": store, "out": out}
    made = qbuild.build(config, quiet=True).targets
    for name, expected in WEIGHED[variant].items():
        assert MAKER.digest(made[name.lower()].path) == expected, name
