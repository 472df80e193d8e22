"""GPTQModel, run in an environment of its own: ``python gptqmodel_driver.py REQUEST.json``. See ``qbuild.backends``."""

from __future__ import annotations

import importlib.metadata
import json
import sys
from pathlib import Path
from typing import Any

# Paths of this run, which it writes into its config files: two runs would differ.
OF_THIS_RUN = ("offload_to_disk_path", "offload_to_disk")


def quantize(request: dict[str, Any]) -> None:
    from gptqmodel import GPTQModel, QuantizeConfig  # type: ignore[import-not-found]

    config = QuantizeConfig(
        bits=request["bits"], group_size=request["group_size"], sym=request["symmetric"],
        desc_act=request["indexed"], damp_percent=request["damping"], format=request["layout"],
    )  # fmt: skip
    tokens = json.loads(Path(request["tokens"]).read_text())
    model = GPTQModel.load(request["model"], config, device=request["device"])
    model.quantize([{"input_ids": row, "attention_mask": [1] * len(row)} for row in tokens], batch_size=1)
    model.save(request["out"])


def tidy(out: Path) -> None:
    """What differs from run to run goes: the same request should make the same bytes."""
    (out / "quant_log.csv").unlink(missing_ok=True)  # losses and times
    for name in ("config.json", "quantize_config.json"):
        document = json.loads((out / name).read_text())
        quantization = document.get("quantization_config", document)
        for place in (quantization, quantization.get("meta") or {}):
            for key in OF_THIS_RUN:
                place.pop(key, None)
        (out / name).write_text(json.dumps(document, indent=2, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    asked = json.loads(Path(sys.argv[1]).read_text())
    quantize(asked)
    tidy(Path(asked["out"]))
    Path(asked["done"]).write_text(json.dumps({"version": importlib.metadata.version("gptqmodel")}))
