"""The package around the kernels: laziness, the disk cache, checks of weights and blocks, refusals."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest

import qbuild
from qbuild import kernels
from qbuild.ggml import ENCODED

WARM = """
import sys
from qbuild import kernels
assert "numba" not in sys.modules
import numpy as np
assert kernels.first_nonfinite(np.zeros((1, 8), np.float32)) is None
from qbuild.kernels import cast
print("hits", sum(cast._first_nonfinite.compiled.stats.cache_hits.values()))
"""


def run(root: Path, code: str, cache: Path) -> str:
    env = {**os.environ, "PYTHONPATH": str(root), "NUMBA_CACHE_DIR": str(cache)}
    done = subprocess.run([sys.executable, "-c", code], env=env, cwd=root, check=True, capture_output=True, text=True)
    return done.stdout


def test_second_process_loads_kernels_and_an_edited_helper_recompiles_them(tmp_path):
    """numba stamps a cache with the kernel's own file; what it inlines from simd.py must count too."""
    root = tmp_path / "root"
    shutil.copytree(Path(qbuild.__file__).parent, root / "qbuild", ignore=shutil.ignore_patterns("__pycache__"))
    assert run(root, WARM, tmp_path / "cache") == "hits 0\n"
    assert run(root, WARM, tmp_path / "cache") == "hits 1\n"
    for edited, hits in (("affine.py", 1), ("simd.py", 0)):
        helper = root / "qbuild" / "kernels" / edited
        helper.write_text(helper.read_text() + "\n")
        assert run(root, WARM, tmp_path / "cache") == f"hits {hits}\n"


def test_read_only_weights_share_the_kernel():
    """A read-only array is a type of its own to numba: seconds of compiling, if it got through."""
    legacy = import_module("qbuild.kernels.legacy")
    x = np.frombuffer(np.ones(64, np.float32).tobytes(), np.float32).reshape(1, 64)
    assert not x.flags.writeable
    weights = np.frombuffer(np.ones(64, np.float32).tobytes(), np.float32)
    for imatrix in (None, weights):
        assert (kernels.quantize(x, "Q4_0", imatrix) == kernels.quantize(x.copy(), "Q4_0", imatrix)).all()
    assert len(legacy._round.compiled.signatures) == 1
    assert len(legacy._fit.compiled.signatures) == 1


def test_no_folder_for_a_cache_is_no_error(monkeypatch):
    from numba.core import caching

    simd = import_module("qbuild.kernels.simd")
    monkeypatch.setattr(caching.CacheImpl, "_locator_classes", [])

    def double(x):
        return x + x

    assert simd.kernel(double)(4) == 8


def test_weights_at_an_odd_address():
    x = np.random.default_rng(0).standard_normal((2, 256)).astype(np.float32)
    shifted = np.frombuffer(b"." + x.tobytes(), np.uint8)[1:].view(np.float32).reshape(x.shape)
    assert not shifted.flags.aligned
    assert (kernels.quantize(shifted, "Q6_K") == kernels.quantize(x, "Q6_K")).all()


@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.uint16])
@pytest.mark.parametrize("bad", ["nan", "inf", "-inf"])
def test_first_nonfinite_row(dtype, bad):
    x = np.full((9, 1000), 1.5, np.float32)
    held = (x.view(np.uint32) >> 16).astype(np.uint16) if dtype is np.uint16 else x.astype(dtype)
    word = np.float32(bad).view(np.uint32) >> 16
    value = word.astype(np.uint16) if dtype is np.uint16 else dtype(bad)
    assert kernels.first_nonfinite(held) is None
    for row, col in ((8, 999), (5, 0), (4, 999), (0, 63)):
        held[row, col] = value
        assert kernels.first_nonfinite(held) == row


def test_largest_finite_weights_are_finite():
    assert kernels.first_nonfinite(np.full((1, 70), np.finfo(np.float32).max)) is None
    assert kernels.first_nonfinite(np.full((1, 70), 65504, np.float16)) is None
    assert kernels.first_nonfinite(np.full((1, 70), 0x7F7F, np.uint16)) is None


@pytest.mark.parametrize("name", sorted(kernels.MODULES.keys() - {"MXFP4", "NVFP4"}))
def test_scale_beyond_float16_is_an_invalid_block(name):
    cols = 256
    x = np.tile(np.linspace(-1, 1, cols, dtype=np.float32), (6, 1))
    imatrix = np.ones(cols, np.float32)
    assert kernels.invalid_blocks(kernels.quantize(x, name, imatrix), name) is None
    x[4] *= 1e9
    data = kernels.quantize(x, name, imatrix)
    first = kernels.invalid_blocks(data, name)
    assert first is not None
    assert first // (data.shape[1] // kernels.QTYPES[name].nbytes) == 4


def test_8_bit_scales_hold_what_float16_cannot():
    """Only MXFP4 has a code for NaN, and its quantizer makes it of a block whose largest weight is 2**-126."""
    x = np.full((3, 256), 1e9, np.float32)
    assert kernels.invalid_blocks(kernels.quantize(x, "MXFP4"), "MXFP4") is None
    assert kernels.invalid_blocks(kernels.quantize(x, "NVFP4"), "NVFP4") is None
    x[1] = 2.0**-126
    assert kernels.invalid_blocks(kernels.quantize(x, "MXFP4"), "MXFP4") == 8
    assert kernels.invalid_blocks(kernels.quantize(x, "NVFP4"), "NVFP4") is None


def test_the_types_that_are_offered_are_those_that_can_be_made():
    assert set(ENCODED) == {"F32", "F16", "BF16", *kernels.MODULES}


def test_unusable_arguments_are_refused():
    x = np.zeros((2, 256), np.float32)
    out = np.zeros((2, 144), np.uint8)
    with pytest.raises(ValueError, match="no quantizer for Q9_K; there are"):
        kernels.quantize(x, "Q9_K")
    with pytest.raises(ValueError, match="not a multiple of 256"):
        kernels.quantize(x[:, :32], "Q4_K")
    with pytest.raises(ValueError, match="out is uint8"):
        kernels.quantize_into(x, out[:1], "Q4_K")
    with pytest.raises(ValueError, match="imatrix is float64"):
        kernels.quantize_into(x, out, "Q4_K", np.ones(256))
    with pytest.raises(ValueError, match="imatrix is float32"):
        kernels.quantize_into(x, out, "Q4_K", np.ones(255, np.float32))
    with pytest.raises(ValueError, match="weights are float64"):
        kernels.quantize_into(x.astype(np.float64), out, "Q4_K")
    with pytest.raises(ValueError, match="not C-contiguous"):
        kernels.quantize_into(np.zeros((256, 2), np.float32).T, out, "Q4_K")
    with pytest.raises(ValueError, match="cannot cast"):
        kernels.cast_into(x, x, "F32", "F16")


def test_no_rows():
    assert kernels.quantize(np.zeros((0, 256), np.float32), "Q4_K").shape == (0, 144)
    assert kernels.first_nonfinite(np.zeros((0, 256), np.float32)) is None
