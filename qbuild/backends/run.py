"""Running a backend: what it can make, a request for its driver, and its output checked before it is believed."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from qbuild.backends.environment import Environment, variables
from qbuild.checkpoint import stored
from qbuild.errors import ActionFailed, ConfigError, InputError
from qbuild.quant.directory import DERIVED, Directory, Item
from qbuild.quant.shapes import Scheme, scheme_of

__all__ = ["Output", "Request", "run", "suit"]

DRIVERS = Path(__file__).parent / "drivers"
LAYOUTS = {"autoawq": ("awq-gemm",), "auto_gptq": ("gptq",), "gptqmodel": ("gptq", "gptq_v2")}
ON_CUDA_ONLY = {"auto_gptq"}
# model_type of what a library knows; GPTQModel looks at any model.
FAMILIES = {
    "autoawq": (
        "aquila", "baichuan", "bloom", "cohere", "deepseek_v2", "deepseek_v3", "exaone", "falcon", "gemma", "gemma2",
        "gpt_bigcode", "gpt_neox", "gptj", "internlm2", "llama", "minicpm", "minicpm3", "mistral", "mixtral", "mpt",
        "opt", "phi3", "qwen", "qwen2", "qwen3", "qwen3_moe", "stablelm", "starcoder2",
    ),
    "auto_gptq": (
        "baichuan", "bloom", "codegen", "deci", "falcon", "gemma", "gpt2", "gpt_bigcode", "gpt_neox", "gptj",
        "internlm", "llama", "mistral", "mixtral", "moss", "opt", "qwen", "qwen2", "stablelm_epoch", "xverse",
    ),
}  # fmt: skip
DTYPES = {"F16": "float16", "BF16": "bfloat16"}
WITHOUT = "backend=native quantizes without it"
WORDS = 6  # lines of a log that an error repeats
CHUNK = 4 << 20


@dataclass(frozen=True)
class Request:
    """``model``: a directory of safetensors; ``tokens``: windows of token ids; ``device``: cpu or cuda."""

    model: Path
    tokens: Sequence[Sequence[int]]
    scheme: Scheme
    damping: float
    device: str
    threads: int


def suit(backend: str, scheme: Scheme, model_type: str, device: str, place: str) -> None:
    """ConfigError where a backend cannot make what is asked, ``place`` being the target: for a plan to ask."""
    if scheme.layout not in LAYOUTS[backend]:
        others = [name for name, layouts in LAYOUTS.items() if scheme.layout in layouts]
        raise ConfigError(
            place, f"{backend} does not make {scheme.layout}", f"{place}.backend={' or '.join(['native', *others])}"
        )
    if model_type not in FAMILIES.get(backend, (model_type,)):
        known = ", ".join(FAMILIES[backend])
        raise ConfigError(place, f"{backend} knows no {model_type}", f"{place}.backend=native\nit knows {known}")
    if device == "cpu" and backend in ON_CUDA_ONLY:
        fact = f"{backend} quantizes on CUDA only, the device is cpu"
        raise ConfigError(place, fact, f"device=cuda, or {place}.backend=native")


def run(environment: Environment, request: Request, out: Path, scratch: Path) -> None:
    """Quantize into ``out``, a directory that does not exist yet; ``scratch`` is an empty folder for what goes between.

    ActionFailed with the library's last words where it fails; its whole log is ``scratch/log.txt``.
    """
    tokens, done, asked = scratch / "tokens.json", scratch / "done", scratch / "request.json"
    tokens.write_text(json.dumps([list(window) for window in request.tokens]))
    scheme = request.scheme
    document = {
        "backend": environment.backend, "model": str(request.model), "tokens": str(tokens), "out": str(out),
        "done": str(done), "layout": scheme.layout, "bits": scheme.bits, "group_size": scheme.group_size,
        "symmetric": scheme.symmetric, "dtype": DTYPES[scheme.dtype], "damping": request.damping,
        "device": request.device, "threads": request.threads,
    }  # fmt: skip
    asked.write_text(json.dumps(document))
    command = [str(environment.interpreter), "-I", str(DRIVERS / "driver.py"), str(asked)]
    env = variables(environment.backend) | {"TMPDIR": str(scratch)}
    with (
        (scratch / "log.txt").open("w+b") as log,
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=log, stderr=log, cwd=scratch, env=env) as process,
    ):
        try:
            code = process.wait()
        finally:
            process.kill()
        if code or not done.is_file():
            log.seek(max(0, log.seek(0, os.SEEK_END) - 10_000))
            raise _failed(environment.backend, code, log.read().decode(errors="replace"))


def _failed(backend: str, code: int, log: str) -> ActionFailed:
    said = [line.strip() for line in log.replace("\r", "\n").splitlines() if line.strip()][-WORDS:]
    how = f"was ended by signal {-code}" if code < 0 else f"ended with {code}"
    return ActionFailed(f"backend {backend}", "\n  ".join([f"{how}:", *said]), WITHOUT)


class Output:
    """The directory that a library wrote, and its tensors by name: ``get`` of ``quant.directory.write``."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.tensors = {n: entry for path in sorted(folder.glob("*.safetensors")) for n, entry in stored(path)}

    def check(self, scheme: Scheme, planned: Directory, place: str) -> None:
        """ActionFailed unless it holds what was planned: its config describes ``scheme``, and its tensors have the
        names, dtypes and shapes that loaders expect, with none beside them."""

        def wrong(fact: str) -> ActionFailed:
            return ActionFailed(place, f"the backend's output {fact}", f"{place}.{WITHOUT}")

        config = json.loads((self.folder / "config.json").read_text())
        try:
            told = scheme_of(config.get("quantization_config") or {}, scheme.dtype, place)
        except InputError as error:
            raise wrong(error.fact) from None
        if told != scheme:
            raise wrong(f"says that it is {told}, asked was {scheme}")
        wanted = {t.name: t for file in planned.files for item in file.items for t in item.tensors}
        for name, tensor in wanted.items():
            found = self.tensors.get(name)
            if found is None:
                raise wrong(f"has no tensor {name}")
            if (found.dtype, found.shape) != (tensor.dtype, tensor.shape):
                had, asked = (f"{t.dtype} {list(t.shape)}" for t in (found, tensor))
                raise wrong(f"has {name} as {had}, not {asked}")
        beside = [name for name in self.tensors if name not in wanted and not _implied(name)]
        if beside:
            raise wrong(f"has a tensor {beside[0]} that no loader would know")

    def __call__(self, item: Item) -> Mapping[str, Iterator[bytearray]]:
        """The bytes of each tensor of an item, in chunks."""
        return {tensor.name: self.tensors[tensor.name].chunks(CHUNK) for tensor in item.tensors}


def _implied(name: str) -> bool:
    """Tensors that say nothing new: a tied head, and what every loader computes."""
    return name == "lm_head.weight" or name.endswith(DERIVED)
