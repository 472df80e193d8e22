"""Source tensors as torch tensors, read by range."""

from __future__ import annotations

from types import TracebackType

import torch

from qbuild.checkpoint import Checkpoint, Reader
from qbuild.errors import InputError

__all__ = ["Tensors"]

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class Tensors:
    """Reads tensors of a checkpoint by name. A file that changes while this is open is an error when it closes."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self.before = [file.identity() for file in checkpoint.files]
        self.reader = Reader(checkpoint.files)

    def __enter__(self) -> Tensors:
        self.reader.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.reader.__exit__(kind, error, at)
        if kind is None:
            self._check()

    def __call__(self, name: str) -> torch.Tensor:
        """The tensor in the dtype it is stored in."""
        found = self.checkpoint.tensors[name]
        buffer = bytearray(found.nbytes)
        self.reader.read_into(found.file, found.offset, memoryview(buffer))
        return torch.frombuffer(buffer, dtype=DTYPES[found.dtype]).reshape(found.shape)

    def _check(self) -> None:
        for file, before in zip(self.checkpoint.files, self.before, strict=True):
            if file.identity() != before:
                remedy = "run again when nothing writes it: results of this run are not used"
                raise InputError(str(file.path), "changed while it was read", remedy)
