"""AutoGPTQ, run in an environment of its own: ``python auto_gptq_driver.py REQUEST.json``. See ``qbuild.backends``."""

from __future__ import annotations

import importlib.metadata
import json
import sys
from pathlib import Path
from typing import Any

import torch


def quantize(request: dict[str, Any]) -> None:
    from auto_gptq import AutoGPTQForCausalLM, BaseQuantizeConfig  # type: ignore[import-not-found]

    config = BaseQuantizeConfig(
        bits=request["bits"], group_size=request["group_size"], sym=request["symmetric"],
        desc_act=request["indexed"], damp_percent=request["damping"],
    )  # fmt: skip
    tokens = torch.tensor(json.loads(Path(request["tokens"]).read_text()))
    model = AutoGPTQForCausalLM.from_pretrained(request["model"], config, torch_dtype=torch.float16)
    on_gpu = request["device"] != "cpu"
    if on_gpu:
        model.model.to(request["device"])
    examples = [{"input_ids": row[None], "attention_mask": torch.ones_like(row[None])} for row in tokens]
    model.quantize(examples, batch_size=1, cache_examples_on_gpu=on_gpu)
    model.save_quantized(request["out"], use_safetensors=True)
    (made,) = Path(request["out"]).glob("*.safetensors")
    made.rename(made.with_name("model.safetensors"))  # its own name for it is known to no other loader


if __name__ == "__main__":
    asked = json.loads(Path(sys.argv[1]).read_text())
    quantize(asked)
    Path(asked["done"]).write_text(json.dumps({"version": importlib.metadata.version("auto_gptq")}))
