"""What 4-bit checkpoints of a model lose and what making them costs: qbuild beside other quantizers, one evaluator.

    python benchmarks/bench_quality.py --model DIRECTORY --calibration valid.txt --test test.txt --work FOLDER [JOB ...]

Each job of ``JOBS`` is a process of its own, from the model to a directory of safetensors, on the same windows of
tokens; JOBs choose some. The other tools run in FOLDER/env/TOOL/bin/python: make each with ``python -m venv`` and the
packages of ``PACKAGES``; a job whose tool is not there is left out, and said. What was measured stays in FOLDER, so
that a job can be run again alone: take its folder away. Without --model it says what it needs and stops.

--layers N cuts the model after N layers: for tools that are too slow for all. --device cuda is for those that are too
slow on a CPU.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from multiprocessing import get_context
from pathlib import Path

HERE = Path(__file__).resolve().parent
DRIVERS = HERE.parent / "qbuild" / "backends" / "drivers"
PACKAGES = {
    "autoawq": "torch==2.13.0 autoawq==0.2.9 transformers==5.23.0",
    "gptqmodel": "gptqmodel==7.7.0",  # needs torch 2.14
    "llmcompressor": "torch==2.13.0 llmcompressor==0.14.0.1",
    "auto_round": "torch==2.13.0 auto-round==0.16.1 transformers==5.23.0",
}
VARIABLES = {"gptqmodel": {"GPTQMODEL_CPU_WORKERS": "2"}}  # with its own count it stops on two cores


@dataclass(frozen=True)
class Job:
    """``tool``: a key of ``PACKAGES``, or qbuild, whose ``settings`` are a target and words of its command line.
    ``driver``: the script that the tool's Python runs; ``settings`` are in its request."""

    tool: str
    symmetric: bool
    driver: Path | None = None
    settings: dict[str, object] = field(default_factory=dict)
    target: str = ""
    words: tuple[str, ...] = ()


def qbuild(target: str, *words: str, symmetric: bool = False) -> Job:
    return Job("qbuild", symmetric, target=target, words=words)


def peer(tool: str, driver: Path, *, symmetric: bool, **settings: object) -> Job:
    return Job(tool, symmetric, driver, settings)


LLM_COMPRESSOR, AUTO_ROUND = HERE / "peers" / "llmcompressor.py", HERE / "peers" / "auto_round.py"
V2 = "targets.gptq_w4_g64.symmetric=false", "targets.gptq_w4_g64.layout=gptq_v2"
PLAIN = "targets.gptq_w4_g64.scaled=false"
BF16 = "calibration.dtype=bfloat16"  # as the other tools compute
JOBS = {
    "qbuild-awq": qbuild("awq/w4_g64"),
    "qbuild-awq-bf16": qbuild("awq/w4_g64", BF16),
    "qbuild-awq-nearest": qbuild("awq/w4_g64", "targets.awq_w4_g64.rounding=nearest"),
    "qbuild-gptq": qbuild("gptq/w4_g64", symmetric=True),
    "qbuild-gptq-bf16": qbuild("gptq/w4_g64", BF16, symmetric=True),
    "qbuild-gptq-plain": qbuild("gptq/w4_g64", PLAIN, symmetric=True),
    "qbuild-gptq-asym": qbuild("gptq/w4_g64", *V2),
    "qbuild-gptq-asym-plain": qbuild("gptq/w4_g64", PLAIN, *V2),
    "autoawq": peer("autoawq", DRIVERS / "autoawq.py", symmetric=False),
    "gptqmodel-gptq": peer("gptqmodel", DRIVERS / "gptqmodel.py", symmetric=True, layout="gptq"),
    "gptqmodel-gptq-asym": peer("gptqmodel", DRIVERS / "gptqmodel.py", symmetric=False, layout="gptq_v2"),
    "llmcompressor-gptq": peer("llmcompressor", LLM_COMPRESSOR, symmetric=True, method="gptq"),
    "llmcompressor-gptq-asym": peer("llmcompressor", LLM_COMPRESSOR, symmetric=False, method="gptq"),
    "llmcompressor-awq": peer("llmcompressor", LLM_COMPRESSOR, symmetric=False, method="awq"),
    "auto_round-rtn": peer("auto_round", AUTO_ROUND, symmetric=False, iters=0),
    "auto_round-rtn-sym": peer("auto_round", AUTO_ROUND, symmetric=True, iters=0),
    "auto_round-20": peer("auto_round", AUTO_ROUND, symmetric=False, iters=20),
    "auto_round-200": peer("auto_round", AUTO_ROUND, symmetric=False, iters=200),
    "auto_round-200-sym": peer("auto_round", AUTO_ROUND, symmetric=True, iters=200),
}


@dataclass(frozen=True)
class Cost:
    """Seconds, and bytes: the peak of the largest process, and the safetensors that were written."""

    wall: float
    cpu: float
    peak: int
    size: int


def run(name: str, job: Job, args: argparse.Namespace) -> None:
    """Make FOLDER/NAME/out and FOLDER/NAME/cost.json."""
    folder = args.work / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    out = folder / "out"
    command, variables = _ours(job, args, folder) if job.driver is None else _theirs(job, args, folder)
    began = time.monotonic()
    with (folder / "log.txt").open("wb") as log:
        child = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd=folder, env=variables
        )  # fmt: skip
        _, status, usage = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
    wall = time.monotonic() - began
    if child.returncode:
        print(f"{name} failed with {child.returncode}; its last words are in {folder}/log.txt", flush=True)
        return
    if job.driver is None:
        (made,) = (path for path in (folder / "made").iterdir() if path.is_dir())
        made.rename(out)
    size = sum(path.stat().st_size for path in out.glob("*.safetensors"))
    cost = Cost(wall, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024, size)
    (folder / "cost.json").write_text(json.dumps(asdict(cost)))
    shutil.rmtree(folder / "store", ignore_errors=True)
    print(f"{name}: {cost}", flush=True)


def _ours(job: Job, args: argparse.Namespace, folder: Path) -> tuple[list[str], dict[str, str]]:
    """With a store of its own, so that nothing is taken from another job."""
    command = [
        sys.executable, "-m", "qbuild", f"model.source={args.model}", f"target={job.target}", *job.words,
        f"calibration.source={args.calibration}", f"calibration.samples={args.samples}",
        f"calibration.length={args.length}", f"store.dir={folder}/store", f"out={folder}/made",
        f"budget.threads={args.threads}", f"device={args.device}",
    ]  # fmt: skip
    return command, dict(os.environ)


def _theirs(job: Job, args: argparse.Namespace, folder: Path) -> tuple[list[str], dict[str, str]]:
    request = {
        "driver": str(job.driver), "model": str(args.model), "tokens": str(args.work / "calibration.json"),
        "out": f"{folder}/out", "bits": 4, "group_size": 64, "symmetric": job.symmetric, "damping": 0.05,
        "dtype": "bfloat16", "device": args.device, "threads": args.threads, **job.settings,
    }  # fmt: skip
    (folder / "request.json").write_text(json.dumps(request))
    python = args.work / "env" / job.tool / "bin" / "python"
    variables = {"OMP_NUM_THREADS": str(args.threads), **VARIABLES.get(job.tool, {})}
    # -P: the drivers bear the names of the packages that they import
    command = [str(python), "-P", str(HERE / "peers" / "run.py"), f"{folder}/request.json"]
    return command, {**os.environ, **variables}


def tokens(args: argparse.Namespace, text: Path, samples: int) -> list[list[int]]:
    """The windows that qbuild would take."""
    from qbuild.calibration.texts import documents
    from qbuild.calibration.tokens import Shape, load_tokenizer, windows
    from qbuild.checkpoint import open_path

    source = open_path(args.model, str(args.model))
    packed = windows(documents(str(text)), load_tokenizer(source.aux, source.source), Shape(samples, args.length))
    found: list[list[int]] = packed.ids.tolist()
    return found


def evaluate(names: list[str], args: argparse.Namespace) -> None:
    """Makes FOLDER/NAME/result.json of each directory, ours and theirs: linears unpacked to float32."""
    import numpy as np

    from qbuild.checkpoint import Reader, open_path
    from qbuild.evaluation import readers, run
    from qbuild.quant.shapes import scheme_of

    checkpoint = open_path(args.model, str(args.model))
    shapes = {name: tensor.shape for name, tensor in checkpoint.tensors.items()}
    ids = np.array(tokens(args, args.test, args.windows), np.int32)
    task = run.Task(checkpoint.config, ids, threads=args.threads)
    with Reader(checkpoint.files) as reader:
        source = readers.safetensors(checkpoint, reader)
        states = run.states(task, source)
        for name in names:
            out = args.work / name / "out"
            config = json.loads((out / "config.json").read_text())
            scheme = scheme_of(config["quantization_config"], "BF16", str(out))
            model = readers.packed(sorted(out.glob("*.safetensors")), shapes, scheme)
            result = run.evaluate(task, source, states, model)
            (args.work / name / "result.json").write_text(json.dumps(result.to_json()))


def table(args: argparse.Namespace) -> None:
    print("| job | MB | perplexity | KL | same | CPU s | s | peak MB |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
    for name in JOBS:
        folder = args.work / name
        if not (folder / "cost.json").is_file():
            continue
        cost = Cost(**json.loads((folder / "cost.json").read_text()))
        quality = " | | "
        if (folder / "result.json").is_file():
            found = json.loads((folder / "result.json").read_text())
            quality = f"{found['perplexity']:.2f} | {found['kl']:.4f} | {found['top1']:.1%}"
        costs = f"{cost.cpu:.0f} | {cost.wall:.0f} | {cost.peak / 1e6:.0f}"
        print(f"| {name} | {cost.size / 1e6:.1f} | {quality} | {costs} |")


def cut(model: Path, layers: int, into: Path) -> Path:
    """A copy of a model's first layers."""
    from safetensors.torch import load_file, save_file

    into.mkdir(parents=True, exist_ok=True)
    for path in model.iterdir():
        if path.suffix != ".safetensors":
            shutil.copy(path, into)
    config = json.loads((model / "config.json").read_text())
    (into / "config.json").write_text(json.dumps(config | {"num_hidden_layers": layers}))
    tensors = {name: tensor for path in model.glob("*.safetensors") for name, tensor in load_file(path).items()}
    kept = {name: tensor for name, tensor in tensors.items() if _layer(name) < layers}
    save_file(kept, into / "model.safetensors", {"format": "pt"})
    return into


def _layer(tensor: str) -> int:
    _, found, after = tensor.partition(".layers.")
    return int(after.partition(".")[0]) if found else -1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="JOB", help=f"some of: {', '.join(JOBS)}")
    for path in ("model", "calibration", "test", "work"):
        parser.add_argument(f"--{path}", type=lambda given: Path(given).resolve())
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--windows", type=int, default=20)
    parser.add_argument("--layers", type=int)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--costs", action="store_true", help="evaluate nothing")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    args = parser.parse_args()
    if not (args.model and args.calibration and args.test and args.work):
        print("bench_quality: skipped; give --model, --calibration, --test and --work")
        return
    args.work.mkdir(parents=True, exist_ok=True)
    if args.layers:
        args.model = cut(args.model, args.layers, args.work / "model")
    with ProcessPoolExecutor(1, get_context("spawn")) as apart:  # what this process holds would be a child's peak too
        ids = apart.submit(tokens, args, args.calibration, args.samples).result()
    (args.work / "calibration.json").write_text(json.dumps(ids))
    for name in args.names or JOBS:
        job, folder = JOBS[name], args.work / name
        if (folder / "cost.json").is_file():
            continue
        if job.driver is not None and not (args.work / "env" / job.tool).is_dir():
            print(f"{name}: left out; {args.work}/env/{job.tool} would be: {PACKAGES[job.tool]}")
            continue
        run(name, job, args)
    made = [name for name in JOBS if (args.work / name / "cost.json").is_file()]
    if not args.costs:
        evaluate([name for name in made if not (args.work / name / "result.json").is_file()], args)
    table(args)


if __name__ == "__main__":
    main()
