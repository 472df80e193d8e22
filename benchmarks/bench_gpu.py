"""GPU kernels against the CPU's: equal bytes, and weights a second on the device, from host memory, and on one core.

    python benchmarks/bench_gpu.py [TYPE ...]

Bytes are compared on the hazards of tests/kernels, rows of the tiny-llama in tests/data and heavy-tailed random rows,
from F32, F16 and BF16, plain and with three importance matrices. Rates are of bf16; from host memory they include the
copies both ways, and the measured bus says what they can reach. Needs a CUDA device, torch and triton.
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from qbuild import kernels, machine
from qbuild.ggml import QTYPES

ROOT = Path(__file__).parent.parent
TYPES = ("Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")
WEIGHTS, COLS, SECONDS = 1 << 24, 4096, 0.2  # of one chunk; of one measurement
THREADS = 4  # as many chunks are on their way at once


def rows(hazards: np.ndarray) -> np.ndarray:
    """float32 [rows, columns]: the hazards, real weights and random ones."""
    from qbuild.checkpoint import Reader, open_path

    cols, real = hazards.shape[1], []
    checkpoint = open_path(ROOT / "tests/data/tiny-llama", "tiny-llama")
    with Reader(checkpoint.files) as reader:
        for tensor in checkpoint.tensors.values():
            if len(tensor.shape) == 2 and tensor.shape[1] == cols:
                data = bytearray(tensor.nbytes)
                reader.read_into(tensor.file, tensor.offset, memoryview(data))
                real.append((np.frombuffer(data, np.uint16).astype(np.uint32) << 16).view(np.float32))
    weights = np.concatenate(real).reshape(-1, cols)[:400:2]
    random = np.random.default_rng(3).standard_t(4, (150, cols)).astype(np.float32) * np.float32(0.02)
    return np.concatenate([hazards, weights, random])


def compare(name: str) -> tuple[int, int]:
    """(blocks, blocks that differ) of a type, over source types and importance matrices."""
    from qbuild.kernels.gpu import encode, table

    sys.path.insert(0, str(ROOT / "tests"))
    spec = importlib.util.spec_from_file_location("oracle", ROOT / "tests/kernels/test_kernels_oracle.py")
    assert spec is not None
    assert spec.loader is not None
    oracle = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(oracle)
    x = rows(np.concatenate([r.astype(np.float32) for r in oracle.hazards(1)]))
    stream, blocks, bad = encode.Stream(table.footprint(name, x.size, x.shape[1])), 0, 0
    for dtype in ("F32", "F16", "BF16"):
        held, _ = oracle.held_as(x, dtype)
        for matrix in oracle.imatrices(2):
            weights = None if matrix is None else matrix.astype(np.float32)
            want = kernels.quantize(held, name, weights)
            found = np.full_like(want, 0xA5)
            stream.quantize_into(held, found, name, weights)
            differ = (found != want).reshape(-1, QTYPES[name].nbytes).any(1)
            blocks, bad = blocks + len(differ), bad + int(differ.sum())
    return blocks, bad


def rate(once: Callable[[], None], finish: Callable[[], None] = lambda: None) -> float:
    """Calls of ``once`` a second, after one that is not counted."""
    once()
    finish()
    began, calls = time.perf_counter(), 0
    while time.perf_counter() - began < SECONDS:
        for _ in range(4):
            once()
        finish()
        calls += 4
    return calls / (time.perf_counter() - began)


def bus() -> tuple[float, float]:
    """Bytes a second up and down, each alone, from and to pinned memory."""
    import torch

    host = torch.empty(256 << 20, dtype=torch.uint8, pin_memory=True)
    device = torch.empty_like(host, device="cuda")
    up = rate(lambda: device.copy_(host, non_blocking=True), torch.cuda.synchronize)
    down = rate(lambda: host.copy_(device, non_blocking=True), torch.cuda.synchronize)
    return up * host.nbytes, down * host.nbytes


def on_device(name: str, x: np.ndarray, matrix: np.ndarray | None) -> float:
    """Weights a second of data that is there."""
    import torch

    from qbuild.kernels.gpu import encode, table

    source = torch.from_numpy(x.view(np.int16).reshape(-1)).cuda()
    out = torch.empty(x.size // QTYPES[name].block * QTYPES[name].nbytes, dtype=torch.uint8, device="cuda")
    weights = None if matrix is None else torch.from_numpy(matrix).cuda()
    scratch = torch.empty(sum(table.planes(name, x.size)), dtype=torch.float32, device="cuda")
    return x.size * rate(lambda: encode.quantize(name, source, out, COLS, weights, scratch), torch.cuda.synchronize)


def from_host(name: str, x: np.ndarray, matrix: np.ndarray | None) -> float:
    """Weights a second from pinned memory to pinned memory, as the threads of a pass do it."""
    import torch

    from qbuild.kernels.gpu import encode, table

    finished, barrier = [0.0] * THREADS, threading.Barrier(THREADS)

    def pinned(shape: tuple[int, ...], dtype: torch.dtype) -> np.ndarray:
        return torch.empty(shape, dtype=dtype, pin_memory=True).numpy()

    def work(thread: int) -> None:
        stream = encode.Stream(table.footprint(name, x.size, COLS, 2))
        mine = pinned(x.shape, torch.uint16)
        mine[:] = x
        out = pinned((len(x), QTYPES[name].row_bytes(COLS)), torch.uint8)
        stream.quantize_into(mine, out, name, matrix)
        barrier.wait()
        finished[thread] = rate(lambda: stream.quantize_into(mine, out, name, matrix))

    threads = [threading.Thread(target=work, args=(n,)) for n in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return x.size * sum(finished)


def main(types: list[str]) -> int:
    """Blocks that differ."""
    if not machine.gpus():
        print("bench_gpu: skipped; there is no CUDA device")
        return 0
    jobs = {
        name: subprocess.Popen([sys.executable, __file__, "compare", name], stdout=subprocess.PIPE) for name in types
    }
    compared = {name: job.communicate()[0].split() for name, job in jobs.items()}
    import torch

    up, down = bus()
    print(torch.cuda.get_device_name(), "torch", torch.__version__)
    print(f"bus: {up / 1e9:.1f} GB/s up, {down / 1e9:.1f} down: at most {up / 2e9:.1f} G weights/s of bf16")
    print(f"{'':23}{'G weights/s, plain':>24}{'with imatrix':>24}")
    print(f"{'type':6}{'blocks':>9}{'differ':>8}" + f"{'device':>8}{'host':>8}{'core':>8}" * 2)
    rng = np.random.default_rng(5)
    x = rng.standard_normal((WEIGHTS // COLS, COLS), np.float32) * np.float32(0.02)
    held, matrix = (x.view(np.uint32) >> 16).astype(np.uint16), rng.random(COLS, np.float32) + np.float32(0.01)
    for name in types:
        found = []
        for weights in (None, matrix):
            few = held[: len(held) // 16]
            core = few.size * rate(lambda: kernels.quantize(few, name, weights))  # noqa: B023
            found += [on_device(name, held, weights), from_host(name, held, weights), core]
        blocks, bad = map(int, compared[name])
        print(f"{name:6}{blocks:9}{bad:8}" + "".join(f"{value / 1e9:8.2f}" for value in found), flush=True)
    return sum(int(found[1]) for found in compared.values())


if __name__ == "__main__":
    if sys.argv[1:2] == ["compare"]:
        print(*compare(sys.argv[2]))
    else:
        raise SystemExit(1 if main(sys.argv[1:] or list(TYPES)) else 0)
