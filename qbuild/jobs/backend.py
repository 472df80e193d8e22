"""A model, quantized by another library → the files of a model directory."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from qbuild import inputs
from qbuild.actions.backend import KIND, Task
from qbuild.actions.directory import Made
from qbuild.backends.run import Output, Request
from qbuild.backends.run import run as run_backend
from qbuild.cache import ActionCache, ActionResult
from qbuild.calibration.tokens import Packed
from qbuild.checkpoint import INDEX, Checkpoint, Reader
from qbuild.jobs import Emit, needed
from qbuild.jobs.files import put
from qbuild.store import Store

__all__ = ["run"]

CHUNK = 4 << 20


def run(task: Task, store: Store, emit: Emit) -> Made:
    scratch = task.scratch
    shutil.rmtree(scratch, ignore_errors=True)  # of a run that was killed
    scratch.mkdir(parents=True)
    ids = Packed.from_bytes(needed(store, task.tokens)).ids.tolist()
    wanted = task.params
    request = Request(_linked(task, scratch), ids, wanted.scheme, wanted.damping, wanted.device, task.threads)
    try:
        run_backend(task.environment, request, scratch / "out", scratch)
        _check(task.checkpoint)
        output = Output(scratch / "out")
        output.check(wanted.scheme, task.directory, task.place)
        outputs = put(task.directory, task.copies, output, task.key, store, emit)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    ActionCache(store).put(task.key, ActionResult(KIND, outputs, inputs=(task.tokens,)))
    nbytes = sum(file.size for file in task.checkpoint.files)
    return Made(outputs[0], nbytes, sum(file.size for file in task.directory.files))


def _linked(task: Task, scratch: Path) -> Path:
    """The model as a directory under the names that every library knows, wherever its files lie: links to the weights,
    small files as they were when they were hashed."""
    folder, checkpoint = scratch / "model", task.checkpoint
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(checkpoint.config))
    inputs.write(task.copies, folder)
    single = len(checkpoint.files) == 1
    names = ["model.safetensors"] if single else [file.path.name for file in checkpoint.files]
    for name, weights in zip(names, checkpoint.files, strict=True):
        (folder / name).symlink_to(weights.path.absolute())
    if not single:
        where = {name: names[tensor.file] for name, tensor in checkpoint.tensors.items()}
        (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return folder


def _check(checkpoint: Checkpoint) -> None:
    """The library read the weights by itself: raises InputError where they are not those that were hashed."""
    with Reader(checkpoint.files) as reader:
        for tensor in checkpoint.tensors.values():
            for _ in reader.chunks(tensor, CHUNK):
                pass
