"""``gguf.tensor``: rows of a source tensor, transformed, stored as the converter would, quantized to one type.

Blocks depend on their own row alone, so a tensor is encoded chunk by chunk and the chunking cannot change the bytes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from qbuild import kernels
from qbuild.arch.convert import Transform
from qbuild.ggml import QTYPES

KIND = "gguf.tensor"
SALT = 1

# Weights, uint8 rows to fill, type, imatrix: as kernels.quantize_into, on any device.
Quantize = Callable[[np.ndarray, np.ndarray, str, np.ndarray | None], None]

_VIEWS = {"F32": np.float32, "F16": np.float16, "BF16": np.uint16}


# Types whose quantizer weighs columns by an importance matrix; for the others it is no input.
WEIGHED = frozenset(
    (
        *("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ1_S", "IQ1_M"),
        *("IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ4_NL", "IQ4_XS"),
    )
)


class BadWeights(Exception):
    """Weights that no output can hold; the caller knows the place. ``row`` counts from the first row encoded."""

    def __init__(self, row: int | None, fact: str, remedy: str) -> None:
        super().__init__(row, fact, remedy)
        self.row, self.fact, self.remedy = row, fact, remedy


@dataclass(frozen=True)
class Params:
    """What changes the bytes of a tensor, besides its source bytes (and its slice of an importance matrix).

    ``dtype`` is how the source bytes read, ``stored`` what llama.cpp's converter would write between source and
    quantizer (float32 sources go through float16 there, so they do here), ``type`` what comes out.
    """

    type: str
    stored: str
    dtype: str
    cols: int
    transform: Transform


def source_row_bytes(params: Params) -> int:
    return QTYPES[params.dtype].row_bytes(params.cols)


def stage_row_bytes(params: Params) -> int:
    """Scratch per row beside the source and output buffers: what ``encode`` copies before it quantizes."""
    if _verbatim(params):
        return 0
    unpacked = QTYPES[params.dtype].quantized
    held = "F32" if unpacked else params.dtype
    each = QTYPES[held].nbytes if unpacked else 0
    if params.transform.kind != "none":
        each += QTYPES[held].nbytes
    if held != params.stored and not QTYPES[params.stored].quantized:
        each += QTYPES[params.stored].nbytes
    return each * params.cols


def _verbatim(params: Params) -> bool:
    return params.transform.kind == "none" and params.type == params.dtype and QTYPES[params.type].quantized


def encode(
    raw: np.ndarray,
    params: Params,
    out: np.ndarray,
    imatrix: np.ndarray | None = None,
    quantize: Quantize = kernels.quantize_into,
) -> None:
    """Encode whole rows. ``raw``: uint8 [rows, source row bytes]; ``out``: uint8 [rows, output row bytes]. ``quantize``
    makes the blocks; what comes before, and the checks, are the same wherever it does.

    Raises BadWeights when a weight is NaN or infinite, or a block scale leaves float16's range: llama.cpp refuses
    such tensors too, and a file with them answers nonsense.
    """
    if _verbatim(params):
        out[:] = raw
        return
    rows = raw.shape[0]
    if QTYPES[params.dtype].quantized:
        values = kernels.dequantize(raw, params.dtype)
    else:
        values = raw.view(_VIEWS[params.dtype]).reshape(rows, params.cols)
    bad = kernels.first_nonfinite(values)
    if bad is not None:
        raise BadWeights(bad, "NaN or infinite weights", "repair the checkpoint: no format can hold them")
    if params.transform.kind != "none":
        values = params.transform.apply(values)
    _encode_values(values, params, out, imatrix, quantize)


def held_as(params: Params) -> str:
    """The type of the values that a quantizer is given."""
    return params.stored if not QTYPES[params.stored].quantized else "F32"


def _encode_values(
    values: np.ndarray, params: Params, out: np.ndarray, imatrix: np.ndarray | None, quantize: Quantize
) -> None:
    held = {np.dtype(np.float32): "F32", np.dtype(np.float16): "F16", np.dtype(np.uint16): "BF16"}[values.dtype]
    if held != params.stored and not QTYPES[params.stored].quantized:
        stored = np.empty(values.shape, _VIEWS[params.stored])
        kernels.cast_into(values, stored, held, params.stored)
        values, held = stored, params.stored
    if not QTYPES[params.type].quantized:
        target = out.view(_VIEWS[params.type]).reshape(values.shape)
        if held == params.type:
            target[:] = values
        else:
            kernels.cast_into(values, target, held, params.type)
        return
    quantize(values, out, params.type, imatrix)
    block = kernels.invalid_blocks(out, params.type)
    if block is not None:
        fact = f"a {params.type} block scale is outside float16's range"
        raise BadWeights(None, fact, "choose a wider type for it: targets.<name>.tensor_types, or bf16")
