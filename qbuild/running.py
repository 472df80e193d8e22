"""Jobs of one build, run one after the other: what each needed, and the progress they report as a status."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from qbuild import machine, worker
from qbuild.errors import InputChanged
from qbuild.lower import PARENT_RAM
from qbuild.plan import Plan
from qbuild.progress import Sink, Status

__all__ = ["IDLE", "Jobs"]

IDLE = {"seconds": 0.0, "peak_ram": 0, "predicted_ram": 0, "peak_vram": 0, "predicted_vram": 0}  # of what did not run
SETTLED = 20.0  # seconds, after which a hundredth of the work tells how long it takes; before, a tenth


class Jobs:
    """Runs jobs in workers within the plan's budget. ``noted`` is by label, for build.json."""

    def __init__(self, made: Plan, sink: Sink) -> None:
        self.plan, self.sink = made, sink
        self.noted: dict[str, dict[str, Any]] = {}
        self.began = time.monotonic()
        self.todo_tensors = self.todo_bytes = 0
        self.unit = "tensors"
        self.weights = sum(spec.weights for spec in made.resolved.specs.values())

    def run(self, kind: str, label: str, task: Any, ram: int, vram: int = 0) -> worker.Done:
        """Run a job that is predicted to take so much RAM, and of the device's memory if it uses one."""
        budget = self.plan.budget
        limit = max(0, budget.ram - PARENT_RAM)
        job = worker.Job(kind, label, task, self.plan.store.root, ram, limit, vram, budget.vram)
        try:
            done = worker.run(job, self._event)
        except InputChanged:  # it may have kept its time stamps: the next build hashes it, whatever they say
            for file in self.plan.resolved.checkpoint.files:
                self.plan.store.sources.forget(str(file.path))
            raise
        self.noted[label] = {"predicted_ram": ram, "peak_ram": done.peak, "seconds": round(done.seconds, 3)}
        if vram:
            self.noted[label] |= {"predicted_vram": vram, "peak_vram": done.vram}
        return done

    @property
    def peak_vram(self) -> int:
        """Of the job that took most of the device's memory; 0 where none used it."""
        return max((job.get("peak_vram", 0) for job in self.noted.values()), default=0)

    @property
    def peak(self) -> int:
        """Peak of the whole build: its largest worker, and this process beside it."""
        largest = max((job["peak_ram"] for job in self.noted.values()), default=0)
        return largest + machine.process_rss(os.getpid())

    @contextmanager
    def progress(self, title: str, total: int, nbytes: int, unit: str = "tensors") -> Iterator[None]:
        """Show progress events of the jobs that run inside: ``total`` of a unit, ``nbytes`` of any measure of work."""
        self.began, self.unit = time.monotonic(), unit
        self.todo_tensors, self.todo_bytes = total, nbytes
        self.sink.start(title, total, nbytes, self.plan.budget.ram, unit)
        try:
            yield
        finally:
            self.sink.finish()

    def _event(self, event: dict[str, Any]) -> None:
        if event["event"] == "message":
            self.sink.message(event["level"], event["text"])
            return
        elapsed = max(time.monotonic() - self.began, 1e-3)
        # The first tensors are small, and the clock ran while the worker started: they tell no rate.
        enough = self.todo_bytes / (100 if elapsed > SETTLED else 10)
        rate = event["bytes"] / elapsed if event["bytes"] >= enough else 0.0
        self.sink.update(
            Status(
                tensors_done=event["tensors"],
                tensors_total=self.todo_tensors,
                bytes_done=event["bytes"],
                bytes_total=self.todo_bytes,
                weights_per_s=rate * self.weights / max(self.todo_bytes, 1)
                if rate and self.unit == "tensors"
                else None,
                eta_s=(self.todo_bytes - event["bytes"]) / rate if rate else None,
                rss=event["rss"] + machine.process_rss(os.getpid()),
                budget=self.plan.budget.ram,
                bound=_bound(event["seconds"], self.plan),
                current=event["current"],
                unit=self.unit,
            )
        )


def _bound(seconds: dict[str, float], made: Plan) -> str:
    """What holds the build back: where the pipeline waits."""
    if "encode" not in seconds:  # hashing, or calibration
        return "disk" if seconds["read"] > seconds.get("hash", 0.0) else "CPU"
    if made.strategy.device == "cpu" and made.strategy.threads < made.budget.threads:
        return "memory"
    if seconds["wait_slot"] > seconds["read"]:
        return (
            "disk" if seconds["write"] > seconds["wait_encode"] else {"cpu": "CPU", "cuda": "GPU"}[made.strategy.device]
        )
    return "disk" if seconds["read"] > seconds["hash"] else "CPU"
