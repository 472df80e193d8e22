"""The loops over columns in Triton against those of a CPU, by Triton's interpreter: no GPU is needed, only Triton."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec

import pytest

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="Triton comes with torch for CUDA only")

COMPARED = """
import torch
from qbuild.quant import columns, triton_columns

torch.manual_seed(0)
triton_columns.COLUMNS = 40  # a group of more columns goes in parts
for size, rows in ((64, 128), (24, 64)):
    x = torch.randn(300, size)
    hessian = x.T @ x / 300 + 0.1 * torch.eye(size)
    factor = torch.linalg.cholesky(torch.linalg.inv(hessian), upper=True)
    scales, zeros = (torch.rand(4, rows) * 0.2 + 0.05).half().float(), torch.randint(0, 15, (4, rows)).float()
    groups, block, slope = torch.randint(0, 4, (size,)), torch.randn(size, rows), torch.randn(size, rows)
    ours = triton_columns.round_block(block, factor, scales, zeros, groups, 15)
    plain = columns.round_block(block.clone(), factor, scales, zeros, groups, 15)
    assert torch.equal(ours[0], plain[0])
    torch.testing.assert_close(ours[1], plain[1], rtol=1e-4, atol=1e-5)
    codes = torch.randint(0, 16, (size, rows)).float()
    errors, made = torch.empty_like(codes), []
    for loops in (columns, triton_columns):
        mine = codes.clone(), errors.clone(), slope.clone(), block, hessian, scales[0].clone()
        loops.improve(*mine, zeros[0], 15)
        made.append(mine)
    assert torch.equal(made[0][0], made[1][0])
    torch.testing.assert_close(made[0][5], made[1][5], rtol=1e-3, atol=0)  # next to each other in float16
"""


@pytest.mark.slow
def test_both_loops_choose_the_same_codes() -> None:
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", COMPARED], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
