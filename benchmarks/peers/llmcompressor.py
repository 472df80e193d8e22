"""llm-compressor 0.14."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.quantization import GPTQModifier, QuantizationModifier
from llmcompressor.modifiers.transform.awq import AWQModifier
from llmcompressor.pipelines.cache import IntermediatesCache
from transformers import AutoModelForCausalLM


def quantize(request: dict[str, Any]) -> None:
    IntermediatesCache.pin_memory = lambda *_, **__: None  # torch refuses to pin where there is no accelerator
    tokens = json.loads(Path(request["tokens"]).read_text())
    weights = QuantizationArgs(
        num_bits=request["bits"], type="int", symmetric=request["symmetric"], strategy="group",
        group_size=request["group_size"],
    )  # fmt: skip
    groups = {"group_0": QuantizationScheme(targets=["Linear"], weights=weights)}
    linears = {"config_groups": groups, "ignore": ["lm_head"]}
    recipes = {
        "gptq": lambda: [GPTQModifier(**linears)],
        "awq": lambda: [AWQModifier(), QuantizationModifier(**linears)],
    }
    model = AutoModelForCausalLM.from_pretrained(request["model"], dtype="auto")
    data = Dataset.from_dict({"input_ids": tokens, "attention_mask": [[1] * len(row) for row in tokens]})
    oneshot(
        model=model, dataset=data, recipe=recipes[request["method"]](), max_seq_length=len(tokens[0]),
        num_calibration_samples=len(tokens), shuffle_calibration_samples=False,
    )  # fmt: skip
    model.save_pretrained(request["out"], save_compressed=True)
