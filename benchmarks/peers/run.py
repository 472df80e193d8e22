"""Runs ``quantize`` of a driver in the Python of its tool: ``python run.py REQUEST.json``."""

import json
import runpy
import sys
from pathlib import Path

import torch

if __name__ == "__main__":
    asked = json.loads(Path(sys.argv[1]).read_text())
    torch.set_num_threads(asked["threads"])
    torch.manual_seed(0)
    runpy.run_path(asked["driver"])["quantize"](asked)
