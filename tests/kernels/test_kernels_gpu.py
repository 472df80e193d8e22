"""The GPU's kernels against the CPU's, which other tests hold against ggml. Skipped where there is no CUDA device."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qbuild import kernels, machine
from qbuild.ggml import QTYPES
from qbuild.kernels.gpu.table import TYPES, footprint

pytestmark = pytest.mark.skipif(
    not (machine.gpus() and machine.has_torch() and machine.has_triton()), reason="no CUDA device, torch and triton"
)
TINY = Path(__file__).parent.parent / "data" / "tiny-llama"
COLS = 512


@pytest.fixture(scope="module")
def encode() -> Any:
    return import_module("qbuild.kernels.gpu.encode")


def troubles() -> Iterator[np.ndarray]:
    """float32 rows of COLS: what other code paths of a search are there for."""
    rng = np.random.default_rng(1)
    normal = rng.standard_normal((8, COLS)).astype(np.float32) * np.float32(0.02)
    yield from (normal, np.abs(normal), -np.abs(normal), np.zeros_like(normal), np.full_like(normal, -0.25))
    yield np.where(rng.random(normal.shape) < 0.02, normal * 1000, normal)
    yield -np.float32(0.1) + rng.integers(0, 3, normal.shape).astype(np.float32) * np.float32(2.0**-27)
    yield normal * (10.0 ** rng.uniform(-38, 30, (8, COLS // 32))).astype(np.float32).repeat(32, axis=1)
    bits = rng.integers(0, 1 << 32, normal.shape, dtype=np.uint32).view(np.float32)
    yield np.where(np.isfinite(bits), bits, 1)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("name", list(TYPES))
def test_blocks_have_the_bytes_of_the_cpu(encode: Any, name: str, weighted: bool) -> None:
    x = np.concatenate(list(troubles()))
    matrix = (10.0 ** np.random.default_rng(2).uniform(-6, 6, COLS)).astype(np.float32) if weighted else None
    stream = encode.Stream(footprint(name, x.size, COLS))
    for held in (x, (x.view(np.uint32) >> 16).astype(np.uint16), np.clip(x, -6e4, 6e4).astype(np.float16)):
        out = np.full((len(x), QTYPES[name].row_bytes(COLS)), 0xA5, np.uint8)
        stream.quantize_into(held, out, name, matrix)
        np.testing.assert_array_equal(out, kernels.quantize(held, name, matrix))


def test_a_chunk_that_is_larger_than_the_memory_held_for_it_is_a_bug(encode: Any) -> None:
    x = np.zeros((2, COLS), np.float32)
    with pytest.raises(ValueError, match="bytes of the device"):
        encode.Stream(footprint("Q4_K", COLS, COLS)).quantize_into(x, np.empty((2, 288), np.uint8), "Q4_K")


def test_kernels_have_the_same_names_whichever_comes_first() -> None:
    """Else what was compiled before a pass is compiled in it again."""

    def named(*order: str) -> str:
        code = "from qbuild.kernels.gpu import blocks as k; found = {n: getattr(k, n).cache_key for n in %r}"
        code += "; print(sorted(found.items()))"
        return subprocess.run(
            [sys.executable, "-c", code % (order,)], capture_output=True, text=True, check=True
        ).stdout

    kernels = ("search_affine", "search_scale", "pack")
    assert named(*kernels) == named(*reversed(kernels))


def test_builds_on_both_devices_make_equal_files(tmp_path: Path) -> None:
    def build(device: str) -> Any:
        words = [f"model.source={TINY}", "target=[gguf/q4_k_m,gguf/q5_k_s,gguf/q3_k_m,gguf/q4_0]", f"device={device}"]
        words += [f"store.dir={tmp_path}/{device}/store", f"out={tmp_path}/{device}/out", "format=json"]
        done = subprocess.run([sys.executable, "-m", "qbuild", *words], capture_output=True, text=True, cwd=tmp_path)
        assert done.returncode == 0, done.stderr + done.stdout
        return {name: target["digest"] for name, target in json.loads(done.stdout)["targets"].items()}

    assert build("cuda") == build("cpu")
