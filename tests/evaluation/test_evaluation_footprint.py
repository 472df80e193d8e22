"""What an evaluation is predicted to take: known without torch, and enough."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from qbuild.checkpoint import open_path
from qbuild.evaluation.footprint import Text, evaluation, on_device, states, states_bytes

TINY = Path(__file__).parent.parent / "data" / "tiny-llama"
CONFIG = json.loads((TINY / "config.json").read_text())
SHAPES = {name: tensor.shape for name, tensor in open_path(TINY, str(TINY)).tensors.items()}

MEASURE = """
import json, resource, sys
from pathlib import Path
import numpy as np
from qbuild.checkpoint import Reader, open_path
from qbuild.evaluation.readers import safetensors
from qbuild.evaluation.run import Task, evaluate, states
checkpoint = open_path(Path(sys.argv[1]), sys.argv[1])
with Reader(checkpoint.files) as reader:
    model = safetensors(checkpoint, reader)
    task = Task(checkpoint.config, np.random.default_rng(0).integers(0, 2000, (4, 256)).astype(np.int32))
    evaluate(task, model, states(task, model), model)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10)
"""


def test_states_are_counted_once_for_each_model() -> None:
    small, large = Text(8, 512), Text(4096, 512)
    more = states_bytes(CONFIG, large) - states_bytes(CONFIG, small)
    assert states(CONFIG, SHAPES, large) - states(CONFIG, SHAPES, small) == more
    both = [evaluation(CONFIG, SHAPES, text, dequantized=True) for text in (small, large)]
    assert both[1] - both[0] == 2 * more


@pytest.mark.parametrize(
    ("dtype", "source", "target", "held"),
    [
        ("float32", "BF16", "BF16", 4 + 2 + 4),
        ("float32", "BF16", "F32", 4 + 4),
        ("float32", "F32", "F16", 4 + 2 + 4),
        ("bfloat16", "BF16", "BF16", 2 + 2),
        ("bfloat16", "BF16", "F16", 2 + 2 + 2),
        ("bfloat16", "BF16", "F32", 2 + 4 + 2),
        ("bfloat16", "F32", "F32", 4 + 4),
    ],
)
def test_on_a_device_both_heads_are_counted_and_one_as_it_is_read(
    dtype: str, source: str, target: str, held: int
) -> None:
    """The source's, the target's as it is stored, and what that becomes where it is stored in another dtype; or both as
    they are stored, to be compared."""
    ends = [name for name in ("model.embed_tokens.weight", "lm_head.weight") if name in SHAPES]
    large = SHAPES | dict.fromkeys(ends, (1 << 10, 1 << 20))
    vram = on_device(CONFIG, large, Text(4, 256, dtype), source=source, targets=[target]).vram
    assert held << 30 < vram < (held + 1) << 30


def test_the_prediction_loads_no_torch() -> None:
    code = "import sys, qbuild.evaluation.footprint; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"


@pytest.mark.slow
def test_an_evaluation_stays_below_its_prediction() -> None:
    done = subprocess.run([sys.executable, "-c", MEASURE, str(TINY)], capture_output=True, text=True, check=True)
    assert int(done.stdout.split()[-1]) <= evaluation(CONFIG, SHAPES, Text(4, 256), dequantized=False)
