"""Runs a library in its own environment: ``python driver.py REQUEST.json``. See ``qbuild.backends``.

What differs between libraries is a file of its own beside this one.
"""

from __future__ import annotations

import json
import os
import runpy
import sys
import threading
from pathlib import Path

import torch


def end_with_the_parent() -> None:
    """Nothing is ever written to our standard input: it ends when the process that started us does. Without Python's
    own buffer, whose lock an interpreter that ends waits for."""
    os.read(0, 1)
    os._exit(130)


if __name__ == "__main__":
    threading.Thread(target=end_with_the_parent, daemon=True).start()
    asked = json.loads(Path(sys.argv[1]).read_text())
    torch.set_num_threads(asked["threads"])
    torch.manual_seed(0)
    runpy.run_path(str(Path(__file__).with_name(f"{asked['backend']}.py")))["quantize"](asked)
    Path(asked["done"]).touch()
