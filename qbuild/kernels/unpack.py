"""Dequantizing the types of legacy.py, affine.py, symmetric.py, onebit.py: y = d * (q - offset) + m, 16 at a time.

Bit-equal to dequantize_row_* of llama.cpp (ggml-quants.c): the same products in the same order.
"""

from __future__ import annotations

import numpy as np

from qbuild.ggml import QTYPES
from qbuild.kernels.affine import read_scale_min
from qbuild.kernels.simd import from_half, inline, kernel, lane, load, load_as, scratch, store, to, zeros

_U8, _I32, _F32, _U16 = np.uint8, np.int32, np.float32, np.uint16
# Per type: a number for the kernel, and the level that means zero.
TYPES = {
    "Q8_0": (0, 128), "Q4_0": (1, 8), "Q4_1": (2, 0), "Q5_0": (3, 16), "Q5_1": (4, 0),
    "Q2_K": (5, 0), "Q3_K": (6, 4), "Q4_K": (7, 0), "Q5_K": (8, 0), "Q6_K": (9, 32),
    "Q1_0": (10, 1), "Q2_0": (11, 1),
}  # fmt: skip
_LANES = np.arange(16, dtype=np.int32)


def dequantize(name: str, data: np.ndarray, out: np.ndarray) -> None:
    """Flat uint8 blocks to flat float32."""
    q, (code, offset) = QTYPES[name], TYPES[name]
    _dequantize(data, out, out.size // q.block, q.block, q.nbytes, code, offset, _LANES)


@kernel
def _dequantize(data, out, blocks, n, nbytes, code, offset, numbers):
    levels, d, m = scratch(1, 256, _U8), scratch(1, 16, _F32), scratch(1, 16, _F32)
    m[:] = _F32(-0.0)  # adding it changes nothing, not even the sign of a zero
    for block in range(blocks):
        o = block * nbytes
        if code <= 4:
            _read_legacy(code, data, o, levels, d, m, numbers)
        elif code == 7 or code == 8:
            _read_k32(code, data, o, levels, d, m)
        elif code >= 10:
            _read_bits(code, data, o, levels, d, n)
        else:
            _read_k16(code, data, o, levels, d, m)
        for r in range(n // 16):
            y = to(to(load(levels, 16 * r, 16), _I32) - offset, _F32)
            store(out, block * n + 16 * r, y * d[r] + m[r])


@inline
def _half(data, at):
    return lane(from_half(load_as(data, at, _U16, 1)), 0)


@inline
def _read_legacy(code, data, o, levels, d, m, numbers):
    d[0] = d[1] = _half(data, o)
    if code == 0:
        store(levels, 0, load(data, o + 2, 32) ^ 128)
        return
    at = o + 2
    if code == 2 or code == 4:
        m[0] = m[1] = _half(data, at)
        at += 2
    fifth, low, high = zeros(16, _I32), zeros(16, _U8), zeros(16, _U8)
    if code >= 3:
        fifth = fifth + lane(load_as(data, at, _I32, 1), 0)
        shifts = load(numbers, 0, 16)
        low = to((fifth >> shifts) & 1, _U8) << 4
        high = to((fifth >> (shifts + 16)) & 1, _U8) << 4
        at += 4
    both = load(data, at, 16)
    store(levels, 0, low | (both & 15))
    store(levels, 16, high | (both >> 4))


@inline
def _read_bits(code, data, o, levels, d, n):
    """Signs as the levels 0 and 2, or levels of 2 bits."""
    d[:] = _half(data, o)
    for i in range(n):
        if code == 10:
            levels[i] = ((data[o + 2 + i // 8] >> (i % 8)) & 1) << 1
        else:
            levels[i] = (data[o + 2 + i // 4] >> (2 * (i % 4))) & 3


@inline
def _read_k32(code, data, o, levels, d, m):
    scale, low, at = _half(data, o), _half(data, o + 2), o + 16
    for r in range(8):
        sc, mc = read_scale_min(data, o + 4, r)
        d[2 * r] = d[2 * r + 1] = scale * _F32(sc)
        m[2 * r] = m[2 * r + 1] = -(low * _F32(mc))
    if code == 8:
        at += 32
    for r in range(8):
        q = (load(data, at + 32 * (r // 2), 32) >> (4 * (r % 2))) & 15
        if code == 8:
            q |= ((load(data, o + 16, 32) >> r) & 1) << 4
        store(levels, 32 * r, q)


@inline
def _read_k16(code, data, o, levels, d, m):
    if code == 5:
        scale, low = _half(data, o + 80), _half(data, o + 82)
        for r in range(16):
            d[r], m[r] = scale * _F32(data[o + r] & 15), -(low * _F32(data[o + r] >> 4))
    elif code == 6:
        scale, s = _half(data, o + 108), o + 96
        for r in range(16):
            c = (data[s + r % 8] >> (4 * (r // 8))) & 15 | (((data[s + 8 + r % 4] >> (2 * (r // 4))) & 3) << 4)
            d[r] = scale * _F32(_I32(c) - 32)
    else:
        scale = _half(data, o + 208)
        for r in range(16):
            d[r] = scale * _F32(np.int8(data[o + 192 + r]))
    for r in range(8):
        if code == 9:
            low4 = (load(data, o + 64 * (r // 4) + 32 * (r % 2), 32) >> (4 * (r % 4 // 2))) & 15
            store(levels, 32 * r, low4 | (((load(data, o + 128 + 32 * (r // 4), 32) >> (2 * (r % 4))) & 3) << 4))
        else:
            at = o + (16 if code == 5 else 32) + 32 * (r // 4)
            q = (load(data, at, 32) >> (2 * (r % 4))) & 3
            if code == 6:
                q |= ((load(data, o, 32) >> r) & 1) << 2
            store(levels, 32 * r, q)
