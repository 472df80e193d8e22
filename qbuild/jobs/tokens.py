"""The calibration text as windows of tokens."""

from __future__ import annotations

import sys

from qbuild.actions.tokens import Task
from qbuild.calibration.texts import documents, parsed
from qbuild.calibration.tokens import Packed, Shape, begin_token, load_tokenizer, windows
from qbuild.digest import Digest
from qbuild.errors import InputError
from qbuild.inputs import copies
from qbuild.jobs import Emit
from qbuild.store import Store

__all__ = ["run"]


def run(task: Task, store: Store, emit: Emit) -> Digest:
    # transformers loads torch wherever it is installed: 170 MB and two seconds that a tokenizer does not need.
    sys.modules["torch"] = None  # type: ignore[assignment]
    packed = _packed(task, store)
    if (highest := int(packed.ids.max())) >= task.rows:
        fact = f"its tokenizer gives the token {highest}, its embedding has {task.rows} rows"
        raise InputError(task.model, fact, "take the tokenizer that belongs to these weights")
    source = task.source if task.texts else "the text that comes with qbuild"
    said = f"{task.use} on {source}: {packed.notice}"
    emit({"event": "message", "level": "info", "text": said})
    return store.put_bytes(packed.to_bytes())


def _packed(task: Task, store: Store) -> Packed:
    contents = {text.path: text.read() for text in task.texts}
    found = parsed(contents, task.source) if contents else documents(None)
    shape = Shape(task.params.samples, task.params.length, task.params.seed)
    with copies(task.tokenizer, task.folder, store.root) as folder:
        tokenizer = load_tokenizer({name: folder / name for name in task.tokenizer}, task.model)
        begin = begin_token(tokenizer) if task.params.begin else None
        return windows(found, tokenizer, shape, begin, use=task.use)
