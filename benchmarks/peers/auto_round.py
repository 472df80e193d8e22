"""AutoRound 0.16. Without iterations it rounds to nearest."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from auto_round import AutoRound
from transformers import AutoModelForCausalLM, AutoTokenizer


def quantize(request: dict[str, Any]) -> None:
    tokens = torch.tensor(json.loads(Path(request["tokens"]).read_text()))
    model = AutoModelForCausalLM.from_pretrained(request["model"], dtype="auto")
    tokenizer = AutoTokenizer.from_pretrained(request["model"])
    batches = [{"input_ids": rows, "attention_mask": torch.ones_like(rows)} for rows in tokens.split(8)]
    quantizer = AutoRound(
        model, tokenizer, bits=request["bits"], group_size=request["group_size"], sym=request["symmetric"],
        dataset=batches, iters=request["iters"], nsamples=len(tokens), seqlen=tokens.shape[1], batch_size=8,
        device_map=request["device"],
    )  # fmt: skip
    out = Path(request["out"])
    quantizer.quantize_and_save(str(out), format="auto_gptq" if request["symmetric"] else "auto_awq")
    (folder,) = out.iterdir()  # it makes one inside, named after the model's folder
    for path in folder.iterdir():
        path.rename(out / path.name)
