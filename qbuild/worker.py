"""The process that runs a job, and the parent's view of it.

A job runs in a process of its own so that its memory peak is its own, a kill by the kernel is a report instead of the
end of the build, and what it imported (numba, transformers) is gone with it. The worker dies with its parent.
"""

from __future__ import annotations

import contextlib
import importlib
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from qbuild import errors, machine, vram
from qbuild.actions import hashing, stream, warm
from qbuild.actions import metadata as metadata_action
from qbuild.budget import format_size
from qbuild.errors import ActionFailed, ConfigError, Interrupted, QbuildError
from qbuild.store import Store

POLL = 0.05  # seconds between looks at the worker's memory
NEAR = 0.92  # of the budget: warn

Emit = Callable[[dict[str, Any]], None]


@dataclass(frozen=True)
class Job:
    """``kind`` names an entry of the table below; ``task`` is its value. ``predicted`` and ``limit`` are bytes of RAM,
    ``vram`` and ``vram_limit`` those of a device, 0 for a job that uses none."""

    kind: str
    label: str
    task: Any
    store: Path
    predicted: int
    limit: int
    vram: int = 0
    vram_limit: int = 0


@dataclass(frozen=True)
class Done:
    """``peak`` and ``vram``: bytes of RAM and of a device that were taken at most."""

    value: Any
    peak: int
    seconds: float
    vram: int = 0


# parent side ---------------------------------------------------------------------------------------------------------


def run(job: Job, on_event: Emit) -> Done:
    """Run a job to its end. Raises what the job raised, or ActionFailed with predicted against observed memory."""
    ours, theirs = multiprocessing.Pipe()
    began = time.monotonic()
    with tempfile.TemporaryFile() as log, ours:
        process = subprocess.Popen(
            [sys.executable, "-P", "-c", f"from qbuild.worker import main; main({theirs.fileno()})"],
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env=machine.worker_environ(Path(__file__).parent.parent),
        )
        theirs.close()
        watch = _Watch(job, process, on_event)
        try:
            ours.send(job)
            status, value, peak, vram_peak = _listen(ours, watch)
        except (EOFError, ConnectionError):
            process.wait()
            raise watch.killed(_tail(log)) from None
        except KeyboardInterrupt:
            raise Interrupted("interrupted", f"{job.label} was stopped", "run again to go on from here") from None
        finally:
            if sys.exc_info()[0] is not None:
                process.kill()
            process.wait()
    if status == "error":
        raise value
    if status == "bug":
        raise RuntimeError(f"in worker {job.label}:\n{value}")
    # What the worker measures is its own; what it started was seen from here.
    return Done(value, max(peak, watch.peak), time.monotonic() - began, vram_peak)


def _listen(connection: Connection, watch: _Watch) -> tuple[Any, ...]:
    while True:
        if connection.poll(POLL):
            message = connection.recv()
            if message[0] != "event":
                return tuple(message)
            watch.event(message[1])
        watch.look()


def _tail(log: Any) -> str:
    log.seek(0)
    lines = log.read().decode(errors="replace").strip().splitlines()
    return "\n".join(lines[-3:])


class _Watch:
    """Memory of the worker against its budget: warns near it, and stops the worker before the kernel does."""

    def __init__(self, job: Job, process: subprocess.Popen[bytes], on_event: Emit) -> None:
        self.job, self.process, self.on_event = job, process, on_event
        self.peak = self.rss = self.seen = 0
        self.warned = self.stopped = False

    def event(self, event: dict[str, Any]) -> None:
        self.on_event(event | {"rss": self.rss})

    def look(self) -> None:
        """What is seen twice counts: a process that was forked shows its parent's memory until it has its own."""
        before, self.seen = self.seen, machine.tree_rss(self.process.pid)
        self.rss = min(before, self.seen)
        self.peak = max(self.peak, self.rss)
        if self.rss > self.job.limit and not self.stopped:
            self.stopped = True
            self.process.kill()
        elif self.rss > NEAR * self.job.limit and not self.warned:
            self.warned = True
            text = f"{self.job.label} uses {format_size(self.rss)} of its {format_size(self.job.limit)} of RAM"
            self.on_event({"event": "message", "level": "warning", "text": text})

    def killed(self, tail: str) -> ActionFailed:
        code = self.process.returncode
        memory = f"predicted peak {format_size(self.job.predicted)}, observed {format_size(self.peak)}"
        if self.stopped:
            fact = f"stopped: it went over its RAM budget of {format_size(self.job.limit)} ({memory})"
            return ActionFailed(self.job.label, fact, "raise budget.ram, or lower budget.threads")
        name = signal.Signals(-code).name if code and code < 0 else f"exit status {code}"
        remedy = tail or "run again: finished tensors are kept; if memory ran out, lower budget.ram or budget.threads"
        return ActionFailed(self.job.label, f"the worker was killed by {name} ({memory})", remedy)


# worker side ---------------------------------------------------------------------------------------------------------


def _run_pass(job: Job, emit: Emit) -> Any:
    gpu = importlib.import_module("qbuild.kernels.gpu.encode") if job.task.device == "cuda" else None
    task = stream.Pass(job.task, Store(job.store), emit, gpu)
    files = task.run()
    return files, task.tally


def _run_metadata(job: Job, _emit: Emit) -> bytes:
    # transformers loads torch wherever it is installed: 170 MB and two seconds that tokenizers and configs do not need.
    sys.modules["torch"] = None  # type: ignore[assignment]
    return metadata_action.run(job.task, job.store)


def _run_hash(job: Job, emit: Emit) -> Any:
    return hashing.run(job.task, Store(job.store), emit)


def _run_warm(job: Job, _emit: Emit) -> None:
    warm.run(job.task)


KINDS: dict[str, Callable[[Job, Emit], Any]] = {
    "gguf.metadata": _run_metadata,
    "gguf.pass": _run_pass,
    "kernels.warm": _run_warm,
    "source.hash": _run_hash,
}
# Modules that may load torch: named here, imported only in the worker that runs them.
JOBS = {
    "calibration.tokens": "qbuild.jobs.tokens",
    "calibration.statistics": "qbuild.jobs.statistics",
    "calibration.sensitivity": "qbuild.jobs.sensitivity",
    "gguf.damage": "qbuild.jobs.damage",
    "gguf.choice": "qbuild.jobs.choice",
    "quant.layer": "qbuild.jobs.solve",
    "quant.propagated": "qbuild.jobs.propagate",
    "calibration.imatrix": "qbuild.jobs.importance",
    "checkpoint.directory": "qbuild.jobs.directory",
    "quant.backend": "qbuild.jobs.backend",
    "evaluation.result": "qbuild.jobs.evaluation",
}


def _run(job: Job, emit: Emit) -> Any:
    if job.kind in KINDS:
        return KINDS[job.kind](job, emit)
    try:
        module = importlib.import_module(JOBS[job.kind])
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        raise ConfigError(job.label, "torch is not installed", "pip install 'qbuild[calibrate]'") from None
    return module.run(job.task, Store(job.store), emit)


def _peak() -> int:
    """VmHWM, this program's own peak; ``ru_maxrss`` of a child also counts the parent's pages before exec."""
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) * 1024
    return 0


def main(descriptor: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides what an interrupt means
    connection = Connection(descriptor)
    job: Job = connection.recv()
    lock = threading.Lock()

    def send(message: tuple[Any, ...]) -> None:
        with lock, contextlib.suppress(BrokenPipeError):
            connection.send(message)

    threading.Thread(target=_die_with_parent, args=(connection,), daemon=True).start()
    held: vram.Hold | None = None
    try:
        held = vram.hold(job.vram_limit) if job.vram else None
        value = _run(job, lambda event: send(("event", event)))
        send(("done", value, _peak(), held.peak() if held else 0))
    except QbuildError as error:
        send(("error", error, _peak(), 0))
    except Exception as error:
        if held and vram.ran_out(error):
            send(("error", _over_budget(job, held.peak()), _peak(), 0))
        else:
            send(("bug", traceback.format_exc(), _peak(), 0))
    os._exit(0)


def _over_budget(job: Job, peak: int) -> ActionFailed:
    memory = f"predicted peak {format_size(job.vram)}, observed {format_size(peak)}"
    fact = f"stopped: it went over its VRAM budget of {format_size(job.vram_limit)} ({memory})"
    return ActionFailed(job.label, fact, "raise budget.vram, or compute on the CPU: device=cpu")


def _die_with_parent(connection: Connection) -> None:
    """The parent never writes again, so a readable pipe is a closed one."""
    with contextlib.suppress(EOFError, OSError):
        connection.poll(None)
    os._exit(errors.Interrupted.exit_code)
