"""AutoAWQ 0.2.9."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch


def copy_what_stays_on_the_cpu() -> None:
    """It keeps weights with ``.cpu()`` while it scales them in place. On a CPU that is no copy: the scales of all
    trials multiply up, and the model is destroyed without a word."""
    plain = torch.Tensor.cpu

    def cpu(self: torch.Tensor, *args: Any, **named: Any) -> torch.Tensor:
        return self.clone() if self.device.type == "cpu" else plain(self, *args, **named)

    torch.Tensor.cpu = cpu


def quantize(request: dict[str, Any]) -> None:
    from awq import AutoAWQForCausalLM  # type: ignore[import-not-found]

    copy_what_stays_on_the_cpu()
    tokens = json.loads(Path(request["tokens"]).read_text())
    dtype = getattr(torch, request["dtype"])
    model = AutoAWQForCausalLM.from_pretrained(
        request["model"],
        device_map=request["device"],
        torch_dtype=torch.float32 if request["device"] == "cpu" else dtype,  # CPUs are slow in half precision
        safetensors=True,
        trust_remote_code=False,  # its default is True
    )
    config = {"w_bit": request["bits"], "q_group_size": request["group_size"], "zero_point": True, "version": "GEMM"}
    length = max(map(len, tokens))  # it skips longer texts
    model.quantize(None, config, calib_data=tokens, max_calib_samples=len(tokens), max_calib_seq_len=length)
    model.model.to(dtype)
    model.save_quantized(request["out"])
