"""What the files of a quantized checkpoint hold, an item at a time: packed codes, and plain tensors as they were."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping

import torch
from torch import Tensor

from qbuild.checkpoint import Checkpoint, Reader
from qbuild.quant.codes import Solved
from qbuild.quant.directory import Item, OutTensor
from qbuild.quant.packing import DTYPES, cast, pack
from qbuild.quant.shapes import ITEM_SIZES, Scheme

__all__ = ["Contents"]

CHUNK = 1 << 20  # items of a plain tensor that are in memory at once


class Contents:
    """``get`` of ``directory.write``. ``solved`` gives what a decoder layer became; one layer is held at a time."""

    def __init__(self, checkpoint: Checkpoint, reader: Reader, scheme: Scheme, solved: Callable[[int], Solved]) -> None:
        self._checkpoint, self._reader, self._scheme, self._solved = checkpoint, reader, scheme, solved
        self._held: tuple[int, Solved] | None = None

    def __call__(self, item: Item) -> Mapping[str, Iterable[memoryview]]:
        """The bytes of each tensor of an item. ActionFailed where a value does not fit the dtype of the file."""
        layer = None if item.layer is None else self._layer(item.layer)
        if item.linear:
            if layer is None or item.source not in layer.codes:
                raise ValueError(f"BUG: {item.source} was planned to be quantized and is not")
            packed = pack(self._scheme, item.source, layer.codes[item.source])
            return {name: [_bytes(values)] for name, values in packed.items()}
        (tensor,) = item.tensors
        if layer is not None and item.source in layer.tensors:
            return {tensor.name: [_bytes(cast(tensor.name, layer.tensors[item.source], tensor.dtype))]}
        return {tensor.name: self._plain(item.source, tensor)}

    def _layer(self, number: int) -> Solved:
        if self._held is None or self._held[0] != number:
            self._held = None  # before the next is made, not after
            self._held = number, self._solved(number)
        return self._held[1]

    def _plain(self, source: str, tensor: OutTensor) -> Iterator[memoryview]:
        """A tensor of the checkpoint in the dtype of the file, in chunks."""
        found = self._checkpoint.tensors[source]
        for buffer in self._reader.chunks(found, CHUNK * ITEM_SIZES[found.dtype]):
            if found.dtype == tensor.dtype:
                yield memoryview(buffer)
            else:
                yield _bytes(cast(tensor.name, torch.frombuffer(buffer, dtype=DTYPES[found.dtype]), tensor.dtype))


def _bytes(values: Tensor) -> memoryview:
    return memoryview(values.contiguous().view(-1).view(torch.uint8).numpy())
