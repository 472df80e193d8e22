"""Seconds and peak memory of quantizing one decoder layer, for Llama shapes with made-up weights and activations.

usage: bench_solve.py [SHAPE ...] [--device cpu] [--group 64] [--tokens 8192] [--loops]

Each way runs twice and the second is timed: a device compiles and plans in the first. With --loops, on a CUDA device,
the loops over columns in Triton stand beside a CPU's: codes that differ, microseconds a block of 128 columns.
"""

from __future__ import annotations

import argparse
import time
from functools import partial

import torch
from bench_calibration import model_of

from qbuild.calibration.extent import Way, device_solve, model_shape
from qbuild.quant import columns
from qbuild.quant.families import groups
from qbuild.quant.grid import Grid
from qbuild.quant.layer import Params, solve
from qbuild.quant.scaling import Seen

WAYS = {
    "AWQ, plain rounding": {"symmetric": False, "rounding": "nearest"},
    "AWQ (the default)": {"symmetric": False},
    "GPTQ (the default)": {"symmetric": True},
    "GPTQ, no scales": {"symmetric": True, "scaled": False},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shapes", nargs="*", default=["135m"])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--group", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--loops", action="store_true")
    options = parser.parse_args()
    for shape in options.shapes:
        config, tensors = model_of(shape, 1)
        shaped = model_shape(config, tensors).layers[0]
        work, seen = layer(tensors, options)
        wanted = sorted(name.removesuffix(".weight") for name in work if name.endswith("proj.weight"))
        known = groups(config, "model.layers.0.", work, wanted)
        for name, way in WAYS.items():
            settings = dict(way)
            params = Params(Grid(4, options.group, settings.pop("symmetric")), **settings)
            run = partial(solve, work, seen.get, known, params)
            timed(run, options.device)
            seconds, peak = timed(run, options.device)
            found = device_solve(shaped, Way(params.rounding, params.scaled), shaped.code_bytes(4, options.group)).vram
            print(f"{shape} {name:<20} {seconds:7.2f} s, VRAM {peak >> 20} MiB of {found >> 20} predicted", flush=True)
    if options.loops:
        loops()


def layer(tensors, options):  # type: ignore[no-untyped-def]
    """A layer's weights and what its linears read, on the device."""
    torch.manual_seed(0)
    work = {n: torch.randn(s, device=options.device).mul_(0.02).bfloat16() for n, s in tensors.items() if ".0." in n}
    inputs: dict[int, Seen] = {}
    for columns_ in {w.shape[1] for w in work.values() if w.ndim == 2}:
        x = torch.randn(options.tokens, columns_, device=options.device)
        x *= torch.logspace(-1, 1, columns_, device=options.device)[torch.randperm(columns_, device=options.device)]
        inputs[columns_] = Seen(x.T @ x, x.abs().mean(0), len(x))
    return work, {n.removesuffix(".weight"): inputs[w.shape[1]] for n, w in work.items() if w.ndim == 2}


def timed(run, device):  # type: ignore[no-untyped-def]
    """Seconds, and bytes of the device that were allocated at most."""
    if device == "cpu":
        began = time.monotonic()
        run()
        return time.monotonic() - began, 0
    torch.cuda.reset_peak_memory_stats()
    torch.cuda.synchronize()
    began = time.monotonic()
    run()
    torch.cuda.synchronize()
    return time.monotonic() - began, torch.cuda.max_memory_allocated()


def loops() -> None:
    from qbuild.quant import triton_columns

    torch.manual_seed(0)
    size, rows = 128, 4096
    x = torch.randn(400, size)
    hessian = x.T @ x / len(x) + 0.1 * torch.eye(size)
    factor = torch.linalg.cholesky(torch.linalg.inv(hessian), upper=True)
    block, slope = torch.randn(2, size, rows)
    scales, zeros = (torch.rand(4, rows) * 0.2 + 0.05).half().float(), torch.randint(0, 15, (4, rows)).float()
    which, codes = torch.randint(0, 4, (size,)), torch.randint(0, 16, (size, rows)).float()

    def rounding(module, given):  # type: ignore[no-untyped-def]
        return module.round_block(*given, 15)[0]

    def improving(module, given):  # type: ignore[no-untyped-def]
        module.improve(*given, 15)
        return given[0]

    for name, run, given in (
        ("round_block", rounding, (block, factor, scales, zeros, which)),
        ("improve", improving, (codes, torch.empty_like(codes), slope, block, hessian, scales[0], zeros[0])),
    ):
        made, spent = [], []
        for module, device in ((triton_columns, "cuda"), (columns, "cpu")):
            copies = [tuple(part.clone().to(device) for part in given) for _ in range(11)]
            made.append(run(module, copies.pop()).cpu())
            each = partial(lambda m, run, copies: [run(m, copy) for copy in copies], module, run, copies)
            spent.append(f"{timed(each, device)[0] * 1e5:.0f}")
        differing = float((made[0] != made[1]).float().mean())
        print(f"  {name:<12} codes differing {differing:.2e}, us a block: Triton {spent[0]}, a CPU's thread {spent[1]}")


if __name__ == "__main__":
    main()
