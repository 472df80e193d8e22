"""Record how other libraries store given codes, in tests/data/packed/LIBRARY.safetensors.

    python tests/reference/make_packed.py LIBRARY [--sources DIR]

LIBRARY: autoawq (0.2.9), autogptq (0.7.1), gptqmodel (7.7.0) or compressed-tensors (0.20.0), one a run, for they do not
live in one environment. --sources: a folder with AutoGPTQ's unpacked wheel, whose modules are loaded one by one because
the package does not import beside a current transformers.

A case is named BITS-GROUP-KIND. Its tensors: codes, scales and zeros, which are random; those of the library, below
``m.``; and ``dense``, float32: the weights by the library's own dequantization.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import sys
import types
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

ROWS, COLUMNS = 32, 64
OUT = Path(__file__).parent.parent / "data" / "packed"
CASES = [(4, 32, False), (4, 16, True), (4, -1, True), (8, 32, True), (8, 16, False), (3, 32, True), (2, 32, True)]


def made(bits: int, group: int, symmetric: bool) -> dict[str, Tensor]:
    """Random codes; scales are powers of two times few bits, so that code times scale is exact in float32."""
    torch.manual_seed(bits * 1000 + group)
    groups = 1 if group == -1 else COLUMNS // group
    zeros = torch.randint(1, 1 << bits, (ROWS, groups))
    return {
        "codes": torch.randint(0, 1 << bits, (ROWS, COLUMNS)).to(torch.uint8),
        "scales": (torch.randint(256, 512, (ROWS, groups)) / 2.0**14).half(),
        "zeros": torch.full_like(zeros, 1 << bits - 1).to(torch.uint8) if symmetric else zeros.to(torch.uint8),
    }


def weights(case: dict[str, Tensor]) -> Tensor:
    repeat = COLUMNS // case["scales"].shape[1]
    scales, zeros = (case[n].float().repeat_interleave(repeat, 1) for n in ("scales", "zeros"))
    return (case["codes"].float() - zeros) * scales


def linear(case: dict[str, Tensor]) -> nn.Linear:
    module = nn.Linear(COLUMNS, ROWS, bias=False)
    module.weight.data = weights(case)
    return module


def index(group: int) -> Tensor:
    return torch.arange(COLUMNS, dtype=torch.int32) // (COLUMNS if group == -1 else group)


def autoawq(bits: int, group: int, symmetric: bool, case: dict[str, Tensor]) -> dict[str, Tensor] | None:
    from awq.modules.linear.gemm import WQLinear_GEMM
    from awq.utils.packing_utils import dequantize_gemm

    if bits != 4 or symmetric:
        return None
    size = COLUMNS if group == -1 else group
    module = WQLinear_GEMM.from_linear(
        linear(case), bits, size, scales=case["scales"].float().T, zeros=case["zeros"].float().T
    )
    dense = dequantize_gemm(module.qweight, module.qzeros, module.scales, bits, size).T
    return {"qweight": module.qweight, "qzeros": module.qzeros, "scales": module.scales, "dense": dense}


def autogptq(bits: int, group: int, symmetric: bool, case: dict[str, Tensor]) -> dict[str, Tensor]:
    module = sys.modules["qlinear_cuda_old"].QuantLinear(bits, group, COLUMNS, ROWS, False, weight_dtype=torch.float32)
    module.pack(linear(case), case["scales"].float(), case["zeros"].float(), index(group))
    dense = module(torch.eye(COLUMNS)).T  # this version has no function of its own for it: W = I @ W
    found = {n: getattr(module, n) for n in ("qweight", "qzeros", "g_idx")}
    return {**found, "scales": module.scales.half(), "dense": dense}


def gptqmodel(bits: int, group: int, symmetric: bool, case: dict[str, Tensor]) -> dict[str, Tensor]:
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear

    module = TorchLinear(bits, group, symmetric, False, COLUMNS, ROWS, False)
    module.pack_original(linear(case), case["scales"].float(), case["zeros"].float(), index(group))
    module.post_init()
    found = {n: getattr(module, n).clone() for n in ("qweight", "qzeros", "scales", "g_idx")}
    return {**found, "dense": module.dequantize_weight().T}


def compressed_tensors(bits: int, group: int, symmetric: bool, case: dict[str, Tensor]) -> dict[str, Tensor]:
    from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor as Packed
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    strategy = {"strategy": "channel"} if group == -1 else {"strategy": "group", "group_size": group}
    scheme = QuantizationScheme(
        targets=["Linear"], weights=QuantizationArgs(num_bits=bits, symmetric=symmetric, **strategy)
    )
    middle = 1 << bits - 1
    state = {
        "weight": weights(case),
        "weight_scale": case["scales"].float(),
        "weight_zero_point": (case["zeros"].int() - middle).to(torch.int8),
    }
    found = Packed.compress(state, scheme)
    dense = Packed.decompress(found, scheme)["weight"]
    return {**found, "weight_scale": found["weight_scale"].half(), "dense": dense}


def load_autogptq(sources: Path) -> None:
    path = sources / "auto_gptq" / "nn_modules" / "qlinear" / "qlinear_cuda_old.py"
    spec = importlib.util.spec_from_file_location("qlinear_cuda_old", path)
    assert isinstance(spec, importlib.machinery.ModuleSpec)
    assert spec.loader is not None
    module: types.ModuleType = importlib.util.module_from_spec(spec)
    sys.modules["qlinear_cuda_old"] = module
    spec.loader.exec_module(module)


MAKERS = {"autoawq": autoawq, "autogptq": autogptq, "gptqmodel": gptqmodel, "compressed-tensors": compressed_tensors}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("library", choices=MAKERS)
    parser.add_argument("--sources", type=Path)
    given = parser.parse_args()
    if given.library == "autogptq":
        load_autogptq(given.sources)
        version = "0.7.1"
    else:
        version = importlib.metadata.version(given.library)
    tensors = {}
    for bits, group, symmetric in CASES:
        case = made(bits, group, symmetric)
        stored = MAKERS[given.library](bits, group, symmetric, case)
        if stored is None:
            continue
        stored["dense"] = stored["dense"].float()
        named = {**case, **{n if n == "dense" else f"m.{n}": t for n, t in stored.items()}}
        name = f"{bits}-{group}-{'symmetric' if symmetric else 'asymmetric'}"
        tensors |= {f"{name}/{n}": t.detach().contiguous() for n, t in named.items()}
    OUT.mkdir(exist_ok=True)
    about = {"library": given.library, "version": version, "torch": torch.__version__}
    save_file(tensors, OUT / f"{given.library}.safetensors", metadata=about)
    print(len(tensors), "tensors", about)


if __name__ == "__main__":
    main()
