"""AutoAWQ, run in an environment of its own: ``python autoawq_driver.py REQUEST.json``. See ``qbuild.backends``."""

from __future__ import annotations

import importlib.metadata
import json
import sys
from pathlib import Path
from typing import Any

import torch


def copy_what_stays_on_the_cpu() -> None:
    """Version 0.2.9 keeps weights with ``.cpu()`` while it scales them in place. On a CPU that is no copy: the scales
    of all trials multiply up, and the model is destroyed without a word."""
    plain = torch.Tensor.cpu

    def cpu(self: torch.Tensor, *args: Any, **named: Any) -> torch.Tensor:
        return self.clone() if self.device.type == "cpu" else plain(self, *args, **named)

    torch.Tensor.cpu = cpu


def quantize(request: dict[str, Any]) -> None:
    from awq import AutoAWQForCausalLM  # type: ignore[import-not-found]

    tokens = json.loads(Path(request["tokens"]).read_text())
    model = AutoAWQForCausalLM.from_pretrained(request["model"], device_map=request["device"], safetensors=True)
    config = {"w_bit": request["bits"], "q_group_size": request["group_size"], "zero_point": True, "version": "GEMM"}
    length = max(map(len, tokens))  # it skips longer texts
    model.quantize(None, config, calib_data=tokens, max_calib_samples=len(tokens), max_calib_seq_len=length)
    model.save_quantized(request["out"])


if __name__ == "__main__":
    asked = json.loads(Path(sys.argv[1]).read_text())
    copy_what_stays_on_the_cpu()
    quantize(asked)
    Path(asked["done"]).write_text(json.dumps({"version": importlib.metadata.version("autoawq")}))
