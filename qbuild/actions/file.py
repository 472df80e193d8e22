"""``gguf.file``: one GGUF file out of metadata and tensors. Its bytes are a header and the tensors in order."""

from __future__ import annotations

from dataclasses import dataclass

KIND = "gguf.file"
SALT = 2


@dataclass(frozen=True)
class Params:
    """``tensors`` is (name, shape, type) in file order; ``file_type`` is llama.cpp's id for ``general.file_type``.

    ``imatrix`` is what llama-quantize notes of an importance matrix: file as typed, data set, entries, chunks.
    """

    file_type: int
    tensors: tuple[tuple[str, tuple[int, ...], str], ...]
    imatrix: tuple[str, str | None, int, int] | None = None
