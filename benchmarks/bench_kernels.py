"""Speed of the quantizers beside ggml's, in one run on one thread, and whether the bytes are equal.

    python benchmarks/bench_kernels.py [--ggml libggml-base.so] [--types Q4_K,Q6_K] [--weights 2] [--dtype F32]

Thread CPU time, best of several, so a loaded machine disturbs little. ggml always reads float32, and as many of
the weights as keep it short. ``bad`` counts blocks that differ, of all that ggml was given.
"""

from __future__ import annotations

import argparse
import importlib.util
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from qbuild import kernels
from qbuild.ggml import QTYPES

COLS = 2048
CASTS = ("F32", "F16", "BF16")


def oracle():
    path = Path(__file__).parent.parent / "tests" / "kernels" / "ggml.py"
    spec = importlib.util.spec_from_file_location("ggml_oracle", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def best(function: Callable[[], object], seconds: float, least: int) -> float:
    """Least thread time of repeated calls."""
    times, begun = [], time.perf_counter()
    while len(times) < least or (time.perf_counter() - begun < seconds and len(times) < 20):
        start = time.thread_time()
        function()
        times.append(time.thread_time() - start)
    return min(times)


def measure(ggml, name: str, x: np.ndarray, held: np.ndarray, weights: np.ndarray | None, path: str | None) -> str:
    out = np.empty((len(x), QTYPES[name].row_bytes(COLS)), np.uint8)
    kernels.quantize_into(held, out, name, weights)  # compiled, or loaded from the cache
    ours = held.size / best(lambda: kernels.quantize_into(held, out, name, weights), 0.5, 3)
    start = time.thread_time()
    theirs = ggml.quantize(x[:16], name, weights, path)
    cost = max(time.thread_time() - start, 1e-6)
    rows = min(len(x), max(16, int(16 * 0.3 / cost)))
    rate = x[:rows].size / best(lambda: ggml.quantize(x[:rows], name, weights, path), 0.5, 2)
    theirs = ggml.quantize(x[:rows], name, weights, path)
    blocks = (-1, QTYPES[name].nbytes) if QTYPES[name].quantized else (-1, 64)
    bad = (out[:rows].reshape(blocks) != theirs.reshape(blocks)).any(axis=1)
    kind = "plain" if weights is None else "imatrix"
    return (
        f"{name:8} {kind:8} {rate / 1e6:9.1f} {ours / 1e6:9.1f} {ours / rate:7.1f}x {int(bad.sum()):6d} of {bad.size}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ggml", help="path to a libggml-base.so; default: the library inside xllamacpp")
    parser.add_argument("--types", default=",".join((*CASTS, *kernels.MODULES)))
    parser.add_argument("--weights", type=float, default=2.0, help="millions of weights")
    parser.add_argument("--dtype", default="F32", choices=("F32", "F16", "BF16"), help="what our kernels read")
    args = parser.parse_args()
    ggml, rng = oracle(), np.random.default_rng(0)
    rows = max(1, int(args.weights * (1 << 20)) // COLS)
    x = (rng.standard_t(5, (rows, COLS)) * 0.02).astype(np.float32)
    if args.dtype == "F16":
        held = x.astype(np.float16)
        x = held.astype(np.float32)
    elif args.dtype == "BF16":
        held = (x.view(np.uint32) >> 16).astype(np.uint16)
        x = (held.astype(np.uint32) << 16).view(np.float32)
    else:
        held = x
    imatrix = (rng.random(COLS) ** 3 * 10).astype(np.float32)
    print(f"million weights per second, one thread, {args.dtype} source")
    print("type     weights       ggml      ours    ratio    bad")
    for name in args.types.split(","):
        for weights in (None,) if name in CASTS else (None, imatrix):
            if weights is not None or name not in kernels.NEEDS_IMATRIX:
                print(measure(ggml, name, x, held, weights, args.ggml), flush=True)


if __name__ == "__main__":
    main()
