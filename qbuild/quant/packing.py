"""Codes of linears as the tensors that loaders read, and back.

Codes lie side by side in words of 32 bits, from the least significant bit up, and a code that does not fit runs over
into the next word (3 bits: 32 codes in 3 words). The layouts differ in the dimension along which words are filled:
along out in ``awq-gemm`` (eight channels in the order of its kernels), along in for ``gptq`` and ``pack-quantized``.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from qbuild.errors import ActionFailed
from qbuild.quant.codes import Codes
from qbuild.quant.shapes import WORD, Scheme, groups, words

__all__ = ["cast", "pack", "unpack"]

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
AWQ_ORDER = [0, 2, 4, 6, 1, 3, 5, 7]  # the channel of each lane of a word, low to high
AWQ_LANES = [0, 4, 1, 5, 2, 6, 3, 7]  # the lane of each channel
TOGETHER = 512  # columns that are filled at a time: what is read stays in a cache, whichever way it lies


def pack(scheme: Scheme, linear: str, codes: Codes) -> dict[str, Tensor]:
    """The tensors of ``shapes.packed``, in its order; ActionFailed where a scale leaves the range of its dtype."""
    if scheme.symmetric and not (codes.zeros == 1 << scheme.bits - 1).all():
        raise ValueError(f"BUG: {linear}: symmetric codes with another zero point than the middle")
    if (codes.groups_of is not None) != scheme.indexed:
        raise ValueError(f"BUG: {linear}: an index of groups where the layout has none, or none where it has one")
    if scheme.layout == "pack-quantized":
        return _pack_compressed_tensors(scheme, linear, codes)
    if scheme.layout == "awq-gemm":
        lanes = (_interleaved(values, AWQ_ORDER) for values in (codes.codes, codes.zeros))
        qweight, qzeros = (_fill(values, scheme.bits).T for values in lanes)
    else:
        # AutoGPTQ's files hold zero points minus one, modulo 2 to the bits.
        offset = 1 if scheme.layout == "gptq" else 0
        zeros = (codes.zeros - offset) & ((1 << scheme.bits) - 1)
        qweight, qzeros = _fill(codes.codes.T, scheme.bits), _fill(zeros, scheme.bits).T
    found = {"qweight": qweight, "qzeros": qzeros, "scales": codes.scales.T}
    if scheme.layout != "awq-gemm":
        found["g_idx"] = _groups_of(scheme, codes)
    return {f"{linear}.{name}": value.contiguous() for name, value in found.items()}


def unpack(scheme: Scheme, linear: str, stored: Mapping[str, Tensor], rows: int, columns: int) -> Codes:
    """The codes of ``linear`` [rows (out), columns (in)] out of ``pack``'s tensors, on their device."""
    bits, many = scheme.bits, groups(scheme, columns)
    groups_of = None
    if scheme.layout == "pack-quantized":
        codes = _spread(stored[f"{linear}.weight_packed"].T, bits, columns).T
        scales = stored[f"{linear}.weight_scale"].to(torch.float16)
        if scheme.symmetric:
            zeros = torch.full((rows, many), 1 << bits - 1, dtype=torch.uint8, device=codes.device)
        else:
            zeros = _spread(stored[f"{linear}.weight_zero_point"], bits, rows)
    else:
        qweight, qzeros = stored[f"{linear}.qweight"], stored[f"{linear}.qzeros"]
        scales, zeros = stored[f"{linear}.scales"].T, _spread(qzeros.T, bits, rows)
        if scheme.layout == "awq-gemm":
            codes = _interleaved(_spread(qweight.T, bits, rows), AWQ_LANES)
            zeros = _interleaved(zeros, AWQ_LANES)
        else:
            codes = _spread(qweight, bits, columns).T
            zeros = (zeros + (1 if scheme.layout == "gptq" else 0)) & ((1 << bits) - 1)
            groups_of = stored[f"{linear}.g_idx"] if scheme.indexed else None
    return Codes(
        codes=codes.contiguous(), scales=scales.contiguous(), zeros=zeros.contiguous(), groups_of=groups_of,
        bits=bits, group_size=columns // many, symmetric=scheme.symmetric,
    )  # fmt: skip


def cast(name: str, values: Tensor, dtype: str) -> Tensor:
    """``values`` in another floating dtype (a safetensors name), to nearest even; what it cannot hold is an error."""
    found = values.to(DTYPES[dtype])
    if dtype == "F16" and not torch.isfinite(found).all():
        fact = f"has values up to {values.abs().max().item():g}, and this layout stores float16, which ends at 65504"
        raise ActionFailed(name, fact, "choose a layout that keeps bfloat16: target=ct/w4a16_g128")
    return found.contiguous()


def _pack_compressed_tensors(scheme: Scheme, linear: str, codes: Codes) -> dict[str, Tensor]:
    found = {
        f"{linear}.weight_packed": _fill(codes.codes.T, scheme.bits).T.contiguous(),
        f"{linear}.weight_scale": cast(linear, codes.scales, scheme.dtype),
        f"{linear}.weight_shape": torch.tensor(codes.codes.shape, dtype=torch.int64),
    }
    if not scheme.symmetric:
        found[f"{linear}.weight_zero_point"] = _fill(codes.zeros, scheme.bits)
    return found


def _groups_of(scheme: Scheme, codes: Codes) -> Tensor:
    columns = codes.codes.shape[1]
    if codes.groups_of is not None:
        return codes.groups_of
    return torch.arange(columns, dtype=torch.int32) // (columns // groups(scheme, columns))


def _interleaved(values: Tensor, order: list[int]) -> Tensor:
    """Rows of every eight in another order."""
    return values.unflatten(0, (-1, 8))[:, order].flatten(0, 1)


def _fill(values: Tensor, bits: int) -> Tensor:
    """uint8 [n, m] below 2 to the bits -> int32 [words, m], filled along the first dimension."""
    return torch.cat([_filled(some.contiguous(), bits) for some in values.split(TOGETHER, dim=1)], dim=1)


def _filled(values: Tensor, bits: int) -> Tensor:
    count = values.shape[0]
    if count % WORD:
        values = torch.nn.functional.pad(values, (0, 0, 0, WORD - count % WORD))
    lanes = values.unflatten(0, (-1, WORD))
    found = torch.zeros(lanes.shape[0], bits, lanes.shape[2], dtype=torch.int32)
    for lane in range(WORD):
        word, bit = divmod(lane * bits, WORD)
        code = lanes[:, lane].to(torch.int32)
        found[:, word] |= code << bit
        if bit + bits > WORD:
            found[:, word + 1] |= code >> WORD - bit
    return found.flatten(0, 1)[: words(count, bits)]


def _spread(filled: Tensor, bits: int, count: int) -> Tensor:
    """The first ``count`` values, uint8 [count, m], of int32 [words, m]."""
    if filled.shape[0] % bits:
        filled = torch.nn.functional.pad(filled, (0, 0, 0, bits - filled.shape[0] % bits))
    blocks = filled.unflatten(0, (-1, bits))
    found = torch.empty(blocks.shape[0], WORD, blocks.shape[2], dtype=torch.uint8, device=filled.device)
    mask = (1 << bits) - 1
    for lane in range(WORD):
        word, bit = divmod(lane * bits, WORD)
        # The shift drags the sign along: what lies above a word's last bits comes from the next word.
        low = (blocks[:, word] >> bit) & (mask if bit + bits <= WORD else (1 << WORD - bit) - 1)
        if bit + bits > WORD:
            low |= (blocks[:, word + 1] << WORD - bit) & mask
        found[:, lane] = low.to(torch.uint8)
    return found.flatten(0, 1)[:count]
