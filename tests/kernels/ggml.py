"""ggml's own quantizers as the oracle: C symbols of xllamacpp's library, or of a given libggml-base.so, by ctypes."""

from __future__ import annotations

import ctypes
import functools
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from qbuild.ggml import QTYPES


@functools.cache
def shared_library(path: str | None = None) -> ctypes.CDLL:
    """``path``: a libggml-base.so; without it, the library inside xllamacpp, found without importing the package."""
    if path is None:
        spec = find_spec("xllamacpp")
        if spec is None or spec.origin is None:
            raise FileNotFoundError("xllamacpp is not installed")
        path = str(next(Path(spec.origin).parent.glob("xllamacpp*.so")))
    lib = ctypes.CDLL(path)
    lib.ggml_quantize_chunk.restype = ctypes.c_size_t
    lib.ggml_quantize_chunk.argtypes = [ctypes.c_int, *[ctypes.c_void_p] * 2, *[ctypes.c_int64] * 3, ctypes.c_void_p]
    return lib


def quantize(x: np.ndarray, name: str, imatrix: np.ndarray | None = None, path: str | None = None) -> np.ndarray:
    """float32 [rows, cols] to uint8 [rows, row bytes], as llama-quantize calls it."""
    lib, t = shared_library(path), QTYPES[name]
    x = np.ascontiguousarray(x, np.float32)
    rows, cols = x.shape
    out = np.zeros((rows, t.row_bytes(cols)), np.uint8)
    lib.ggml_quantize_init(t.id)
    weights = None if imatrix is None else np.ascontiguousarray(imatrix, np.float32).ctypes.data
    lib.ggml_quantize_chunk(t.id, x.ctypes.data, out.ctypes.data, 0, rows, cols, weights)
    return out


def dequantize(data: np.ndarray, name: str, path: str | None = None) -> np.ndarray:
    """uint8 [rows, row bytes] to float32 [rows, cols]."""
    t = QTYPES[name]
    rows = data.shape[0]
    data = np.ascontiguousarray(data)
    out = np.empty((rows, data.shape[1] // t.nbytes * t.block), np.float32)
    spelled = name[:-2].lower() + "_K" if name.endswith("_K") else name.lower()
    function = getattr(shared_library(path), f"dequantize_row_{spelled}")
    function(ctypes.c_void_p(data.ctypes.data), ctypes.c_void_p(out.ctypes.data), ctypes.c_int64(out.size))
    return out


def assert_same(name: str, ours: np.ndarray, theirs: np.ndarray) -> None:
    """Fails with the first of the blocks that differ."""
    n = QTYPES[name].nbytes
    a, b = ours.reshape(-1, n), theirs.reshape(-1, n)
    bad = np.flatnonzero((a != b).any(axis=1))
    if bad.size:
        k = int(bad[0])
        raise AssertionError(
            f"{name}: {bad.size} of {len(a)} blocks differ, first {k}\nours {a[k].tolist()}\nggml {b[k].tolist()}"
        )
