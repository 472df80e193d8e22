"""Targets against their source, on text: one pass of the source, one of each target."""

from __future__ import annotations

import gc
import json
import time
from contextlib import ExitStack
from typing import Any

import torch

from qbuild.actions.evaluation import RESULT, STATES, Target, Task
from qbuild.cache import ActionCache, ActionResult
from qbuild.calibration.families import layer_prefix
from qbuild.calibration.tokens import Packed
from qbuild.checkpoint import Reader, gguf_parts
from qbuild.digest import Digest
from qbuild.errors import StoreError
from qbuild.evaluation import readers
from qbuild.evaluation import run as evaluator
from qbuild.evaluation.readers import Tensors
from qbuild.heap import trim
from qbuild.jobs import Emit, needed
from qbuild.store import Store

__all__ = ["run"]


def run(task: Task, store: Store, emit: Emit) -> dict[str, Digest]:
    """Digests of the results by target; each is cached at once."""
    cache, began = ActionCache(store), time.monotonic()
    ids = Packed.from_bytes(needed(store, task.tokens)).ids
    wanted = evaluator.Task(task.checkpoint.config, ids, task.params.dtype, task.params.device, task.threads)
    matrices = [name for name, tensor in task.checkpoint.tensors.items() if len(tensor.shape) > 1]
    made: dict[str, Digest] = {}

    def progress(done: int, current: str) -> None:
        times = {"read": 0.0, "hash": time.monotonic() - began}
        emit({"event": "progress", "tensors": done, "bytes": done, "current": current, "seconds": times})

    with Reader(task.checkpoint.files) as reader:
        stored = readers.safetensors(task.checkpoint, reader)
        source = stored.on(wanted.device)
        states = _states(task, wanted, source, store, cache)
        progress(1, "the source")
        for number, target in enumerate(task.targets, start=2):
            with ExitStack() as stack:
                model = _target(target, task, stored, store, stack)
                found: dict[str, Any] = evaluator.evaluate(wanted, source, states, model).to_json()
                found["weights"] = evaluator.weight_errors(source, model, matrices, scaled=_scaled(target, task))
            made[target.name] = store.put_bytes(json.dumps(found).encode())
            cache.put(target.key, ActionResult(RESULT, (made[target.name],), about=target.digests[:1]))
            del model
            gc.collect()  # hooks of a model are in cycles, and its tensors with them
            trim()
            progress(number, target.name)
    return made


def _states(task: Task, wanted: evaluator.Task, source: Tensors, store: Store, cache: ActionCache) -> torch.Tensor:
    dtype = getattr(torch, task.params.dtype)
    if task.states is not None:
        found = torch.frombuffer(bytearray(needed(store, task.states)), dtype=dtype)
        return found.view(*wanted.tokens.shape, -1)
    states = evaluator.states(wanted, source)
    digest = store.put_bytes(memoryview(states.view(torch.uint8).numpy().reshape(-1)))
    cache.put(task.key, ActionResult(STATES, (digest,)))
    return states


def _scaled(target: Target, task: Task) -> str | None:
    """What the names of the tensors begin with that AWQ's scales may have changed."""
    return layer_prefix(task.checkpoint.config, task.checkpoint.tensors) if target.scaled else None


def _target(target: Target, task: Task, source: Tensors, store: Store, stack: ExitStack) -> Tensors:
    """The tensors of a target on the task's device; ``source`` on the CPU, where a GGUF file is dequantized."""
    paths = []
    for digest in target.digests:
        path = store.path(digest)
        if path is None:
            raise StoreError(str(store.root), f"{digest} is gone or damaged", "run again: it is made anew")
        paths.append(path)
    shapes = {name: tensor.shape for name, tensor in task.checkpoint.tensors.items()}
    if target.scheme is not None:
        return readers.packed(paths, shapes, target.scheme, task.params.device)
    file = gguf_parts(paths, str(paths[0]))
    reader = stack.enter_context(Reader(file.files))
    return readers.gguf(file, reader, target.specs, shapes, source.read).on(task.params.device)
