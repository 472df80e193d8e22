"""GPTQModel 7.7.0."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch


def quantize(request: dict[str, Any]) -> None:
    from gptqmodel import GPTQModel, QuantizeConfig  # type: ignore[import-not-found]

    config = QuantizeConfig(
        bits=request["bits"], group_size=request["group_size"], sym=request["symmetric"], desc_act=False,
        damp_percent=request["damping"], format=request["layout"],
        pack_impl="original",  # the others are compiled when they are first used, where there is a compiler
    )  # fmt: skip
    tokens = json.loads(Path(request["tokens"]).read_text())
    model = GPTQModel.load(request["model"], config, device=request["device"], dtype=getattr(torch, request["dtype"]))
    examples = [{"input_ids": row, "attention_mask": [1] * len(row)} for row in tokens]
    model.quantize(examples, batch_size=1, calibration_data_min_length=1)  # it would drop shorter ones
    model.save(request["out"])
