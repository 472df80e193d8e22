"""Statistics of a calibration as the entries of llama.cpp's importance matrices: by the names of the GGUF file.

A weight's entry is about the columns of its inputs, which no conversion reorders: what it does to rows (permuted heads,
q, k and v apart, gate and up apart) leaves them alone. As in llama-imatrix's own files, the embedding and the output
have none. Beyond those, none here either:

* routers and other matrices that stay float32, of which llama-imatrix writes entries that nothing reads;
* the two halves of latent attention's kv_b_proj, which llama.cpp multiplies at another place of the computation.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Sequence
from math import prod

import numpy as np

from qbuild.arch.convert import TensorSpec
from qbuild.calibration.statistics import Input, Statistics

__all__ = ["entries", "shapes"]


def entries(specs: Sequence[TensorSpec], layers: Iterable[Statistics]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """What ``qbuild.imatrix.dump`` writes: by weight name, sums of squares float32 [matrices, columns] and the tokens
    that each matrix saw, float32 [matrices].

    ``specs`` are the tensors of the GGUF file. An expert that no token reached has zeros for both, as llama-imatrix
    writes it; llama-quantize then takes all of its columns as equal.
    """
    seen: dict[str, Input | None] = {}
    for layer in layers:
        seen |= dict.fromkeys(layer.unreached)
        for found in layer.inputs:
            seen |= dict.fromkeys(found.shared, found)
    made = {}
    for spec in specs:
        if names := _linears(spec, seen):
            sums, counts = np.zeros((len(names), spec.shape[-1]), np.float32), np.zeros(len(names), np.float32)
            for matrix, name in enumerate(names):
                if (read := seen[name]) is not None:
                    sums[matrix], counts[matrix] = read.diagonal, read.count
            made[spec.name] = sums, counts
    return made


def shapes(specs: Sequence[TensorSpec], linears: Container[str]) -> dict[str, tuple[int, int]]:
    """(matrices, columns) of every entry, where statistics know these linears: checkpoint names without .weight."""
    found = {spec.name: (len(_linears(spec, linears)), spec.shape[-1]) for spec in specs}
    return {name: shape for name, shape in found.items() if shape[0]}


def _linears(spec: TensorSpec, seen: Container[str]) -> list[str]:
    """The linear of each matrix of a weight, as statistics name them; empty where they know none."""
    matrices = prod(spec.shape[:-2])
    sources = list(dict.fromkeys(piece.source.removesuffix(".weight") for piece in spec.pieces))
    if len(sources) == 1 and f"{sources[0]}[0]" in seen:  # all experts in one tensor
        sources = [f"{sources[0]}[{expert}]" for expert in range(matrices)]
    known = spec.name.startswith("blk.") and all(source in seen for source in sources)
    return sources if known and len(sources) == matrices else []
