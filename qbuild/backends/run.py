"""Running a backend: a request for its driver, and its output checked like our own."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from safetensors import safe_open

from qbuild.backends.environment import Environment, variables
from qbuild.errors import ActionFailed, ConfigError
from qbuild.quant.shapes import Scheme, packed, scheme_of

__all__ = ["Made", "Request", "check", "run", "suit"]

DRIVERS = Path(__file__).parent / "drivers"
LAYOUTS = {"autoawq": ("awq-gemm",), "auto_gptq": ("gptq",), "gptqmodel": ("gptq", "gptq_v2")}
ON_CUDA_ONLY = {"auto_gptq"}
WORDS = 6  # lines of a log that an error repeats


@dataclass(frozen=True)
class Request:
    """``model``: a directory of safetensors; ``tokens``: windows of token ids; ``device``: cpu or cuda."""

    model: Path
    tokens: Sequence[Sequence[int]]
    scheme: Scheme
    damping: float
    device: str


@dataclass(frozen=True)
class Made:
    """``version`` of the library; ``peak_ram`` of its process in bytes."""

    version: str
    peak_ram: int


def suit(backend: str, scheme: Scheme, device: str, place: str) -> None:
    """ConfigError where a backend cannot make what is asked, ``place`` being the target: for a plan to ask."""
    if scheme.layout not in LAYOUTS[backend]:
        others = [name for name, layouts in LAYOUTS.items() if scheme.layout in layouts]
        raise ConfigError(
            place, f"{backend} does not make {scheme.layout}", f"backend={' or '.join(['native', *others])}"
        )
    if device == "cpu" and backend in ON_CUDA_ONLY:
        raise ConfigError(
            place, f"{backend} quantizes on CUDA only, the device is cpu", "device=cuda, or backend=native"
        )


def run(environment: Environment, request: Request, out: Path, scratch: Path) -> Made:
    """Quantize into ``out``, a directory that does not exist yet; ``scratch`` is an empty folder for what goes between.
    Tokenizer and generation files are left to the caller: not every library copies them.

    ActionFailed with the library's last words where it fails; its whole log is ``scratch/log.txt`` until then.
    """
    tokens, done, asked = scratch / "tokens.json", scratch / "done.json", scratch / "request.json"
    tokens.write_text(json.dumps([list(window) for window in request.tokens]))
    scheme = request.scheme
    document = {
        "model": str(request.model), "tokens": str(tokens), "out": str(out), "done": str(done),
        "layout": scheme.layout, "bits": scheme.bits, "group_size": scheme.group_size, "symmetric": scheme.symmetric,
        "indexed": scheme.indexed, "damping": request.damping, "device": request.device,
    }  # fmt: skip
    asked.write_text(json.dumps(document))
    command = [str(environment.interpreter), "-I", str(DRIVERS / f"{environment.backend}_driver.py"), str(asked)]
    with (scratch / "log.txt").open("w+b") as log:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd=scratch, env=variables(environment.backend)
        )
        code, peak = _waited(process)
        if code or not done.is_file():
            log.seek(max(0, log.seek(0, os.SEEK_END) - 10_000))
            raise _failed(environment.backend, code, log.read().decode(errors="replace"))
    return Made(json.loads(done.read_text())["version"], peak)


def _waited(process: subprocess.Popen[bytes]) -> tuple[int, int]:
    """Exit code and peak memory in bytes. Whatever ends our waiting ends the process."""
    try:
        _, status, usage = os.wait4(process.pid, 0)
    except BaseException:
        process.kill()
        process.wait()
        raise
    process.returncode = os.waitstatus_to_exitcode(status)
    return process.returncode, usage.ru_maxrss * 1024


def _failed(backend: str, code: int, log: str) -> ActionFailed:
    said = [line.strip() for line in log.replace("\r", "\n").splitlines() if line.strip()][-WORDS:]
    how = f"was ended by signal {-code}" if code < 0 else f"ended with {code}"
    return ActionFailed(f"backend {backend}", "\n  ".join([f"{how}:", *said]), "backend=native quantizes without it")


def check(out: Path, scheme: Scheme, linears: Mapping[str, tuple[int, int]], place: str) -> None:
    """ActionFailed unless ``out`` holds ``linears`` ([out, in] by checkpoint name without .weight) as ``scheme`` says:
    its config describes it, and every tensor has the name, dtype and shape that loaders expect."""

    def wrong(fact: str) -> ActionFailed:
        return ActionFailed(place, f"the backend's output {fact}", "backend=native quantizes without it")

    config = json.loads((out / "config.json").read_text())
    told = scheme_of(config.get("quantization_config") or {}, scheme.dtype, str(out))
    if told != replace(scheme, symmetric=told.symmetric if scheme.layout == "awq-gemm" else scheme.symmetric):
        raise wrong(f"says that it is {told}, asked was {scheme}")
    found: dict[str, tuple[str, tuple[int, ...]]] = {}
    for path in sorted(out.glob("*.safetensors")):
        with safe_open(path, framework="np") as file:
            for name in file.keys():  # noqa: SIM118  # not a mapping
                entry = file.get_slice(name)
                found[name] = entry.get_dtype(), tuple(entry.get_shape())
    for linear, (rows, columns) in linears.items():
        for name, dtype, shape in packed(scheme, linear, rows, columns):
            if name not in found:
                raise wrong(f"has no tensor {name}")
            if found[name] != (dtype, shape):
                raise wrong(f"has {name} as {found[name][0]} {list(found[name][1])}, not {dtype} {list(shape)}")
