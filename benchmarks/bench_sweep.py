"""A sweep against its parts, side by side in one run: one multirun of eight GGUF types, eight single builds on empty
stores and, with --llama, the conversion and eight runs of llama-quantize.

    python benchmarks/bench_sweep.py --model DIRECTORY [--llama LLAMA_CPP] [--threads 2]

LLAMA_CPP is a source tree with build/bin/llama-quantize. The page cache is dropped before each part where that is
allowed. Every file of the sweep is compared with the single build's and with llama.cpp's, byte for byte.
"""

from __future__ import annotations

import argparse
import filecmp
import json
import os
import sys
import tempfile
from pathlib import Path

from bench_whole_job import drop_caches, timed

TYPES = ("Q2_K", "Q3_K_M", "Q4_0", "Q4_K_S", "Q4_K_M", "Q5_K_M", "Q6_K", "Q8_0")


def build(root: Path, model: Path, threads: int, words: list[str]) -> tuple[float, float, dict]:
    """(wall seconds, CPU seconds, document) of a build on a store of its own."""
    drop_caches()
    command = [sys.executable, "-m", "qbuild", *words, f"model.source={model}", f"store.dir={root}/store"]
    wall, cpu, _, text = timed([*command, f"out={root}/out", f"budget.threads={threads}", "format=json"])
    return wall, cpu, json.loads(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--llama", type=Path)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    args = parser.parse_args()
    if not args.model:
        print("bench_sweep: skipped; give --model DIRECTORY (benchmarks/make_checkpoint.py makes one)")
        return
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as folder:
        root = Path(folder)
        targets = ",".join(f"gguf/{t.lower()}" for t in TYPES)
        wall, cpu, document = build(root / "sweep", args.model, args.threads, ["-m", f"target={targets}"])
        totals = document["builds"][0]["totals"]
        made = {name: Path(t["path"]) for job in document["jobs"] for name, t in job["result"]["targets"].items()}
        single_wall = single_cpu = their_wall = their_cpu = 0.0
        equal = True
        for number, type_ in enumerate(TYPES):
            words = [f"target=gguf/{type_.lower()}"]
            one, busy, alone = build(root / f"single-{number}", args.model, args.threads, words)
            single_wall, single_cpu = single_wall + one, single_cpu + busy
            path = Path(alone["targets"][type_.lower()]["path"])
            equal &= filecmp.cmp(made[type_.lower()], path, shallow=False)
        if args.llama:
            converted, file = root / "converted.gguf", root / "made.gguf"
            drop_caches()
            command = [sys.executable, "convert_hf_to_gguf.py", args.model.resolve(), "--outfile", converted]
            their_wall, their_cpu, *_ = timed(command, cwd=args.llama)
            for type_ in TYPES:
                drop_caches()
                command = [args.llama / "build/bin/llama-quantize", converted, file, type_, args.threads]
                one, busy, *_ = timed(command)
                their_wall, their_cpu = their_wall + one, their_cpu + busy
                equal &= filecmp.cmp(made[type_.lower()], file, shallow=False)
    print(f"{args.model.name} → {len(TYPES)} file types, {args.threads} threads")
    print(f"{'':32}{'wall s':>9}{'CPU s':>9}{'sweep /':>9}")
    print(f"{'one sweep':32}{wall:9.1f}{cpu:9.1f}")
    print(f"{'eight builds, empty stores':32}{single_wall:9.1f}{single_cpu:9.1f}{wall / single_wall:9.2f}")
    if args.llama:
        print(f"{'conversion, 8 x llama-quantize':32}{their_wall:9.1f}{their_cpu:9.1f}{wall / their_wall:9.2f}")
    held = sum(sum(t["verdicts"].values()) for job in document["jobs"] for t in job["result"]["targets"].values())
    computed = f"{totals['computed']} tensors computed for {held}"
    print(f"read {totals['read_bytes']} bytes once; {computed}; equal files: {equal}")


if __name__ == "__main__":
    main()
