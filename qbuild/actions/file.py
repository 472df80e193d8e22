"""``gguf.file``: one GGUF file out of metadata and tensors, or its shards. Bytes are a header and tensors in order."""

from __future__ import annotations

from dataclasses import dataclass

KIND = "gguf.file"
SALT = 2


@dataclass(frozen=True)
class Params:
    """``tensors`` is (name, shape, type) in file order; ``file_type`` is llama.cpp's id for ``general.file_type``.

    ``imatrix`` is what llama-quantize notes of an importance matrix: file as typed, data set, entries, chunks.
    ``overrides`` are key-value pairs of the user's, ``blocks`` the layers that pruning leaves, ``shards`` how many
    tensors each file has, where there are several.
    """

    file_type: int
    tensors: tuple[tuple[str, tuple[int, ...], str], ...]
    imatrix: tuple[str, str | None, int, int] | None = None
    overrides: tuple[tuple[str, bool | int | float | str], ...] = ()
    blocks: int | None = None
    shards: tuple[int, ...] = ()
