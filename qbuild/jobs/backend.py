"""A model, quantized by another library → the files of a model directory."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path

from qbuild.actions.backend import KIND, Task
from qbuild.actions.directory import Made
from qbuild.backends.run import Output, Request
from qbuild.backends.run import run as run_backend
from qbuild.cache import ActionCache, ActionResult
from qbuild.calibration.tokens import Packed
from qbuild.checkpoint import INDEX, Checkpoint
from qbuild.jobs import Emit, needed
from qbuild.jobs.files import put
from qbuild.store import Store

__all__ = ["run"]


def run(task: Task, store: Store, emit: Emit) -> Made:
    began, scratch = time.monotonic(), store.root / "backends" / task.key[:32]
    shutil.rmtree(scratch, ignore_errors=True)  # of a run that was killed
    scratch.mkdir(parents=True)
    ids = Packed.from_bytes(needed(store, task.tokens)).ids.tolist()
    wanted = task.params
    request = Request(
        _linked(task.checkpoint, scratch), ids, wanted.scheme, wanted.damping, wanted.device, task.threads
    )
    try:
        run_backend(task.environment, request, scratch / "out", scratch)
        output = Output(scratch / "out")
        output.check(wanted.scheme, task.directory, task.place)
        outputs = put(task.directory, output, task.key, store, emit)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    ActionCache(store).put(task.key, ActionResult(KIND, outputs, time.monotonic() - began, inputs=(task.tokens,)))
    nbytes = sum(file.size for file in task.checkpoint.files)
    return Made(outputs[0], nbytes, sum(file.size for file in task.directory.files))


def _linked(checkpoint: Checkpoint, scratch: Path) -> Path:
    """The model as a directory under the names that every library knows, wherever its files lie."""
    folder = scratch / "model"
    single = len(checkpoint.files) == 1
    names = ["model.safetensors"] if single else [file.path.name for file in checkpoint.files]
    paths = dict(zip(names, (file.path for file in checkpoint.files), strict=True)) | checkpoint.aux
    for name, path in paths.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).symlink_to(path.absolute())
    if not single:
        where = {name: names[tensor.file] for name, tensor in checkpoint.tensors.items()}
        (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return folder
