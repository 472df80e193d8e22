"""Graph → passes: where each tensor's bytes go, how a pass runs inside its budget, and what it will need.

Device, chunk size and threads are strategy: they change footprint and time, never the bytes, so they are in no key.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from qbuild import gguffile
from qbuild.actions import stream, tensor, warm
from qbuild.budget import Budget, Footprint, Remedy, refuse
from qbuild.digest import Digest, digest_bytes
from qbuild.ggml import QTYPES
from qbuild.gguffile import KV
from qbuild.graph import Action, Source
from qbuild.kernels.grids import GRIDS
from qbuild.recipe import FileTarget, Resolved
from qbuild.vram import CONTEXT, reserved

# Bytes of source in one chunk, best first. A GPU wants large ones: each is a dozen launches from Python.
CHUNKS = {
    "cpu": tuple(1 << power for power in (23, 22, 21, 20, 19, 18)),
    "cuda": tuple(1 << power for power in (25, 24, 23, 22, 21, 20, 19, 18)),
}
GPU_THREADS = 4  # chunks on their way at once: one goes up, one is computed, one comes down
PARENT_RAM = 57 << 20  # the build's own process beside its worker: Hydra, SQLite, the plan (measured: 49 to 53)
WORKER_RAM = 176 << 20  # a worker with numpy, numba and kernels loaded, before any buffer (measured: 165 to 175)
GRID_RAM = 18 << 20  # and with the tables of types that have grids (measured: 5 to 15)
WORKER_RAM_CUDA = 900 << 20  # and one with torch and a CUDA context
CHUNKS_PER_PASS = 32  # a small model gets small chunks: buffers are then all used, and the pipeline is never empty
TENSOR_RAM = 4 << 10  # Python objects of one tensor of a pass


@dataclass(frozen=True)
class Strategy:
    chunk_bytes: int
    threads: int
    device: str = "cpu"


@dataclass(frozen=True)
class Layout:
    """Where the tensors of a file stand: ``offsets`` from the start of the file, ``size`` of all of it."""

    offsets: tuple[int, ...]
    size: int


@dataclass(frozen=True)
class Wanted:
    """A file that a pass will make: shard ``number`` of a target, with its tensors from ``first`` on. Its header is
    empty while only its size is asked for."""

    target: FileTarget
    number: int
    first: int
    layout: Layout
    header: bytes = b""

    @property
    def tensors(self) -> slice:
        return slice(self.first, self.first + len(self.layout.offsets))


def outputs(target: FileTarget, kv_bytes: int) -> list[Wanted]:
    """The files of a target whose key-value pairs take ``kv_bytes``: the first has them, each tells which it is."""
    found, first = [], 0
    counts = target.shards or (len(target.named),)
    for number, count in enumerate(counts):
        tensors = target.named[first : first + count]
        pairs = sum(len(kv.raw) for kv in _own_kvs(target, number)) + (kv_bytes if number == 0 else 0)
        start = gguffile.header_size(pairs, tensors)
        offsets, size = gguffile.layout(tensors)
        found.append(Wanted(target, number, first, Layout(tuple(start + at for at in offsets), start + size)))
        first += count
    return found


def _own_kvs(target: FileTarget, number: int) -> list[KV]:
    return gguffile.split_kvs(number, len(target.shards), len(target.named)) if target.shards else []


def headed(target: FileTarget, kvs: list[KV]) -> list[Wanted]:
    """The files of a target, ready to be made."""
    found = []
    for item in outputs(target, sum(len(kv.raw) for kv in kvs)):
        pairs = [*(kvs if item.number == 0 else []), *_own_kvs(target, item.number)]
        found.append(replace(item, header=gguffile.header(pairs, target.named[item.tensors])))
    return found


def pass_task(
    resolved: Resolved, wanted: list[Wanted], strategy: Strategy, known: Mapping[Source, Digest]
) -> stream.PassTask:
    """The pass that makes ``wanted``: each tensor is read once, in file order, for every place that wants it.

    ``known``: digests of source bytes that need no read to be known.
    """
    places: dict[str, list[tuple[int, int]]] = {}
    tensors: dict[str, set[str]] = {}  # tensor name -> its actions, one per type
    for index, item in enumerate(wanted):
        target, tensors_ = item.target, item.tensors
        choices = zip(target.choices[tensors_], target.tensors[tensors_], item.layout.offsets, strict=True)
        for (spec, _), action, offset in choices:
            places.setdefault(action, []).append((index, offset))
            tensors.setdefault(spec.name, set()).add(action)
    tasks = tuple(_tensor_task(resolved, name, sorted(a), places, known) for name, a in tensors.items())
    files = tuple(
        stream.OutputTask(w.target.name, _partial(w), w.header, w.layout.offsets[0], w.layout.size) for w in wanted
    )
    chunk, threads, device = strategy.chunk_bytes, strategy.threads, strategy.device
    return stream.PassTask(resolved.checkpoint.files, tasks, files, chunk, threads, device=device)


def _partial(item: Wanted) -> str:
    """Names a file while it is written, the same in every run. A header does not tell all that its tensors are made of:
    with different parts of an importance matrix it can be the same."""
    return digest_bytes(repr((item.number, item.target.tensors)).encode() + item.header).hash


def _tensor_task(
    resolved: Resolved,
    name: str,
    actions: list[str],
    places: dict[str, list[tuple[int, int]]],
    known: Mapping[Source, Digest],
) -> stream.TensorTask:
    graph, spec = resolved.graph, resolved.specs[name]
    numbers = {str(f.path): index for index, f in enumerate(resolved.checkpoint.files)}
    pieces = []
    for index, (_, item) in enumerate(graph.actions[actions[0]].inputs):
        if isinstance(item, Source):
            pieces.append(stream.Piece(item.name, numbers.get(item.file, 0), item.offset, item.nbytes, known.get(item)))
        elif index == 0 and spec.data is not None:
            pieces.append(stream.Piece(name, -1, 0, len(spec.data), None, spec.data))
    wants = tuple(_want(resolved, graph.actions[a], places[a]) for a in actions)
    return stream.TensorTask(name, tuple(pieces), spec.transform.unit, wants)


def _want(resolved: Resolved, action: Action, places: list[tuple[int, int]]) -> stream.Want:
    weights = next((item for role, item in action.inputs if role == "imatrix"), None)
    data = resolved.imatrix_slices[weights] if isinstance(weights, Digest) else None
    return stream.Want(action.params, tuple(places), data)


def predict_ram(task: stream.PassTask) -> int:
    """Peak bytes of the worker that runs ``task``."""
    slot, scratch = stream.slot_bytes(task)
    buffers = stream.slots(task) * slot + task.threads * scratch
    base = WORKER_RAM_CUDA if task.device == "cuda" else WORKER_RAM
    base += tables_ram(want.params.type for t in task.tensors for want in t.wants)
    matrices = {want.imatrix for t in task.tensors for want in t.wants if want.imatrix is not None}
    buffers += 2 * sum(map(len, matrices))  # as they came, and as they are kept
    return base + buffers + len(task.tensors) * TENSOR_RAM + sum(o.header_bytes for o in task.outputs)


def tables_ram(types: Iterable[str]) -> int:
    """Bytes of the tables that quantizing to these types needs."""
    return GRID_RAM if any(name in GRIDS for name in types) else 0


def predict_vram(task: stream.PassTask) -> int:
    """Peak bytes of GPU memory of the worker that runs ``task``."""
    if task.device != "cuda":
        return 0
    return CONTEXT + reserved(1) + task.threads * reserved(stream.device_bytes(task))  # 1: of numerators


def predict_parent(resolved: Resolved, wanted: list[Wanted]) -> int:
    """Peak bytes of the process that plans and watches: it holds each vocabulary once, every header, and importance
    matrices as they were read and in slices."""
    matrices, headers = sum(map(len, resolved.imatrix_slices.values())), [w.layout.offsets[0] for w in wanted]
    return PARENT_RAM + 2 * matrices + 2 * max(headers) + sum(headers)


def kernels_of(resolved: Resolved, todo: Sequence[FileTarget], device: str) -> warm.Task:
    """The kernels that making these files needs."""
    actions = [resolved.graph.actions[action] for t in todo for action in t.tensors]
    types = {a.params.type for a in actions if not stream.on_gpu(a.params.type, device)}
    there = {
        warm.OnGpu(a.params.type, tensor.held_as(a.params), any(role == "imatrix" for role, _ in a.inputs))
        for a in actions
        if stream.on_gpu(a.params.type, device)
    }
    return warm.Task(tuple(sorted(types)), tuple(sorted(there)))


def choose_strategy(
    resolved: Resolved, wanted: list[Wanted], budget: Budget, before: int, device: str
) -> tuple[Strategy, Footprint]:
    """The fastest way on a device that fits and what it needs, worker and parent together. Raises BudgetRefused.

    ``before``: what the jobs before the pass need, each alone.
    """
    parent = predict_parent(resolved, wanted)
    base = pass_task(resolved, wanted, Strategy(CHUNKS[device][0], budget.threads, device), {})
    share = sum(t.nbytes for t in base.tensors) // CHUNKS_PER_PASS
    least = Footprint()
    for threads in range(_threads(base), 0, -1):
        for chunk in [c for c in CHUNKS[device] if c <= max(share, CHUNKS[device][-1])]:
            task = stream.resized(base, chunk, threads, device)
            least = Footprint(ram=parent + max(predict_ram(task), before), vram=predict_vram(task))
            if least.ram <= budget.ram and least.vram <= budget.vram:
                return Strategy(chunk, threads, device), least
    who = "gguf pass " + ", ".join(f"'{name}'" for name in dict.fromkeys(w.target.name for w in wanted))
    if least.ram > budget.ram:
        raise refuse(who, "RAM", least.ram, budget.ram, [_raised("ram", least.ram)])
    on_cpu = Remedy("encode on the CPU", 0, "device=cpu")
    raise refuse(who, "VRAM", least.vram, budget.vram, [_raised("vram", least.vram), on_cpu])


def _threads(task: stream.PassTask) -> int:
    """Compute threads: a GPU needs few, unless they have types to encode that it does not."""
    types = {w.params.type for t in task.tensors for w in t.wants if QTYPES[w.params.type].quantized}
    few = task.device == "cuda" and all(stream.on_gpu(type_, task.device) for type_ in types)
    return min(task.threads, GPU_THREADS) if few else task.threads


def _raised(name: str, needs: int) -> Remedy:
    return Remedy("the least it runs in", needs, f"budget.{name}={-(-needs // (1 << 20))}MiB")
