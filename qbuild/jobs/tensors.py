"""Source tensors as torch tensors, read by range."""

from __future__ import annotations

import torch

from qbuild.checkpoint import Checkpoint, Reader

__all__ = ["Tensors"]

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class Tensors:
    """Reads tensors of a checkpoint by name, as they were when they were hashed."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint, self.reader = checkpoint, Reader(checkpoint.files)

    def __enter__(self) -> Tensors:
        self.reader.__enter__()
        return self

    def __exit__(self, *raised: object) -> None:
        self.reader.__exit__(*raised)

    def __call__(self, name: str) -> torch.Tensor:
        """The tensor in the dtype it is stored in. Raises InputError where it has changed."""
        found = self.checkpoint.tensors[name]
        return torch.frombuffer(self.reader.tensor(found), dtype=DTYPES[found.dtype]).reshape(found.shape)
