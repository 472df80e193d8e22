"""Statistics of a calibration as the entries of llama.cpp's importance matrices: by the names of the GGUF file.

A weight's entry is about the columns of its inputs, which no conversion reorders: what it does to rows (permuted heads,
q, k and v apart, gate and up apart) leaves them alone. As in llama-imatrix's own files, the embedding and the output
have none. Beyond that, none here either:

* routers and other matrices that stay float32, of which llama-imatrix writes entries that nothing reads;
* the two halves of latent attention's kv_b_proj, which llama.cpp multiplies at another place of the computation.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from math import prod

import numpy as np

from qbuild.arch.convert import TensorSpec
from qbuild.calibration.statistics import Input, Statistics

__all__ = ["entries"]


def entries(
    specs: Sequence[TensorSpec], tensors: Mapping[str, tuple[int, ...]], layers: Iterable[Statistics]
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """What ``qbuild.imatrix.dump`` writes: by weight name, sums of squares float32 [matrices, columns] and the tokens
    that each matrix saw, float32 [matrices].

    ``specs`` are the tensors of the GGUF file, ``tensors`` the shapes of the checkpoint's. An expert that no token
    reached has zeros for both, as llama-imatrix writes it; llama-quantize then takes all of its columns as equal.
    """
    linears = {spec.name: names for spec in specs if (names := _linears(spec, tensors))}
    wanted: dict[str, list[tuple[str, int]]] = {}  # by linear: the weights that hold it, and where
    for weight, names in linears.items():
        for matrix, name in enumerate(names):
            wanted.setdefault(name, []).append((weight, matrix))
    columns = {spec.name: spec.shape[-1] for spec in specs}
    found: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    for name, read in _measured(layers):
        for weight, matrix in wanted.get(name, ()):
            if weight not in found:
                shape = len(linears[weight]), columns[weight]
                found[weight] = np.zeros(shape, np.float32), np.zeros(shape[0], np.float32)
            if read is not None:
                sums, counts = found[weight]
                sums[matrix], counts[matrix] = read.diagonal, read.count
    return found


def _measured(layers: Iterable[Statistics]) -> Iterator[tuple[str, Input | None]]:
    for layer in layers:
        yield from ((name, read) for read in layer.inputs for name in read.shared)
        yield from ((name, None) for name in layer.unreached)


def _linears(spec: TensorSpec, tensors: Mapping[str, tuple[int, ...]]) -> list[str]:
    """The linear of each matrix of a weight, as statistics name them; empty where there is no such."""
    if not spec.name.startswith("blk.") or len(spec.shape) < 2 or spec.transform.kind == "transpose":
        return []
    names: dict[str, None] = {}
    for piece in spec.pieces:
        shape, plain = tensors[piece.source], piece.source.removesuffix(".weight")
        if len(shape) < 3:
            names[plain] = None
            continue
        stop = prod(shape[:-1]) if piece.stop is None else piece.stop
        names |= dict.fromkeys(
            f"{plain}[{matrix}]" for matrix in range(piece.start // shape[-2], -(-stop // shape[-2]))
        )
    return list(names) if len(names) == prod(spec.shape[:-2]) else []
