"""GPU kernels against the CPU's: equal bytes, and weights a second on the device.

    python benchmarks/bench_gpu.py golden FILE.npz     on a machine with numba: what the CPU kernels make
    python benchmarks/bench_gpu.py compare FILE.npz    on a machine with a CUDA device and triton: no numba needed

The golden file holds the hazards of tests/kernels, rows of the tiny-llama in tests/data and heavy-tailed random rows,
in every type the GPU has, from F32, F16 and BF16, plain and with three importance matrices.
"""

from __future__ import annotations

import importlib.util
import sys
import time
from pathlib import Path

import numpy as np

from qbuild.ggml import QTYPES

ROOT = Path(__file__).parent.parent
TYPES = ("Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")
DTYPES = ("F32", "F16", "BF16")
WEIGHTS, COLS, ROUNDS = 1 << 28, 4096, 3


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


def golden(file: Path) -> None:
    from qbuild import kernels

    sys.path.insert(0, str(ROOT / "tests"))
    spec = importlib.util.spec_from_file_location("oracle", ROOT / "tests/kernels/test_kernels_oracle.py")
    assert spec is not None
    assert spec.loader is not None
    oracle = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(oracle)
    x = rows(np.concatenate([r.astype(np.float32) for r in oracle.hazards(1)]))
    matrices = [None if m is None else m.astype(np.float32) for m in oracle.imatrices(2)]
    found = {f"imatrix.{i}": m for i, m in enumerate(matrices) if m is not None}
    for dtype in DTYPES:
        held, _ = oracle.held_as(x, dtype)
        found[f"x.{dtype}"] = held
        for name in TYPES:
            found |= {f"{name}.{dtype}.{i}": kernels.quantize(held, name, m) for i, m in enumerate(matrices)}
    np.savez_compressed(file, **found)


def compare(file: Path) -> int:
    """Blocks that differ."""
    import torch

    from qbuild.kernels.gpu import encode

    expected, wrong = np.load(file), 0
    print(torch.cuda.get_device_name(), "torch", torch.__version__)
    print(f"{'type':6}{'blocks':>9}{'differ':>8}{'plain':>9}{'imatrix':>9}  G weights/s on the device, BF16")
    for name in TYPES:
        blocks = bad = 0
        for dtype in DTYPES:
            x = expected[f"x.{dtype}"]
            source = torch.from_numpy((x.view(np.int16) if dtype == "BF16" else x).reshape(-1)).cuda()
            for i in range(sum(key.startswith(f"{name}.{dtype}.") for key in expected.files)):
                want = expected[f"{name}.{dtype}.{i}"].reshape(-1, QTYPES[name].nbytes)
                key = f"imatrix.{i}"
                matrix = torch.from_numpy(expected[key]).cuda() if key in expected.files else None
                out = torch.full((want.size,), 0xA5, dtype=torch.uint8, device="cuda")
                encode.quantize(name, source, out, x.shape[1], matrix)
                blocks += len(want)
                bad += int((out.cpu().numpy().reshape(want.shape) != want).any(1).sum())
        wrong += bad
        plain, weighted = rate(name, None), rate(name, torch.rand(COLS, device="cuda") + 0.01)
        print(f"{name:6}{blocks:9}{bad:8}{plain / 1e9:9.1f}{weighted / 1e9:9.1f}", flush=True)
    return wrong


def rate(name: str, matrix: object) -> float:
    """Weights a second of bf16 on the device."""
    import torch

    from qbuild.kernels.gpu import encode

    values = (torch.randn(WEIGHTS // COLS, COLS, device="cuda") * 0.02).to(torch.bfloat16).view(torch.int16).reshape(-1)
    out = torch.empty(WEIGHTS // QTYPES[name].block * QTYPES[name].nbytes, dtype=torch.uint8, device="cuda")
    encode.quantize(name, values, out, COLS, matrix)
    torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in range(ROUNDS):
        encode.quantize(name, values, out, COLS, matrix)
    torch.cuda.synchronize()
    return ROUNDS * WEIGHTS / (time.perf_counter() - began)


if __name__ == "__main__":
    if len(sys.argv) != 3 or sys.argv[1] not in ("golden", "compare"):
        raise SystemExit(__doc__)
    if sys.argv[1] == "golden":
        golden(Path(sys.argv[2]))
    else:
        raise SystemExit(1 if compare(Path(sys.argv[2])) else 0)
