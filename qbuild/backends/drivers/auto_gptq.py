"""AutoGPTQ 0.7.1."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch


def quantize(request: dict[str, Any]) -> None:
    from auto_gptq import AutoGPTQForCausalLM, BaseQuantizeConfig  # type: ignore[import-not-found]

    config = BaseQuantizeConfig(
        bits=request["bits"], group_size=request["group_size"], sym=request["symmetric"], desc_act=False,
        damp_percent=request["damping"],
    )  # fmt: skip
    tokens = torch.tensor(json.loads(Path(request["tokens"]).read_text()))
    dtype = getattr(torch, request["dtype"])
    model = AutoGPTQForCausalLM.from_pretrained(request["model"], config, torch_dtype=dtype)
    model.model.to(request["device"])
    examples = [{"input_ids": row[None], "attention_mask": torch.ones_like(row[None])} for row in tokens]
    model.quantize(examples, batch_size=1, cache_examples_on_gpu=True)
    model.save_quantized(request["out"], use_safetensors=True)
