"""The whole job, side by side in one run: safetensors → a quantized GGUF, by qbuild and by llama.cpp's two programs.

    python benchmarks/bench_whole_job.py --model DIRECTORY --llama LLAMA_CPP [--type Q4_K_M] [--threads 2]

LLAMA_CPP is a source tree with build/bin/llama-quantize. Without --model or --llama it says what it needs and stops:
nothing is compared that was not run. Each program reads from the same cache state (the page cache is dropped first
where that is allowed). Both files are compared byte for byte.
"""

from __future__ import annotations

import argparse
import contextlib
import filecmp
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path


def drop_caches() -> bool:
    os.sync()
    with contextlib.suppress(OSError):
        Path("/proc/sys/vm/drop_caches").write_text("3")
        return True
    return False


def timed(command: list, **more) -> tuple[float, float, int, str]:
    """(wall seconds, CPU seconds, peak bytes of the largest process, stdout)."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    began = time.monotonic()
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, **more)
    wall = time.monotonic() - began
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        raise SystemExit(f"{command[0]} failed:\n{done.stderr[-2000:]}")
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return wall, cpu, after.ru_maxrss * 1024, done.stdout


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--llama", type=Path)
    parser.add_argument("--type", default="Q4_K_M")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    args = parser.parse_args()
    if not args.model or not args.llama:
        print("bench_whole_job: skipped; give --model DIRECTORY (benchmarks/make_checkpoint.py makes one) and --llama")
        return
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as folder:
        root = Path(folder)
        cold = drop_caches()
        command = [sys.executable, "-m", "qbuild", f"model.source={args.model}", f"target=gguf/{args.type.lower()}"]
        command += [f"store.dir={root}/store", f"out={root}/out", f"budget.threads={args.threads}", "format=json"]
        wall, cpu, _, text = timed(command)
        report = json.loads(text)
        target = next(iter(report["targets"].values()))
        ours = (wall, cpu, target["peak_ram"])
        converted, made = root / "converted.gguf", root / "made.gguf"
        drop_caches()
        convert = timed(
            [sys.executable, "convert_hf_to_gguf.py", args.model.resolve(), "--outfile", converted], cwd=args.llama
        )
        drop_caches()
        quantize = timed([args.llama / "build/bin/llama-quantize", converted, made, args.type, args.threads])
        equal = filecmp.cmp(made, target["path"], shallow=False)
    theirs = (convert[0] + quantize[0], convert[1] + quantize[1], max(convert[2], quantize[2]))
    print(f"{args.model.name} → {args.type}, {args.threads} threads, {'cold' if cold else 'warm'} page cache")
    print(f"{'':24}{'wall s':>9}{'CPU s':>9}{'peak MB':>9}")
    rows = (
        ("qbuild", ours),
        ("convert_hf_to_gguf.py", convert[:3]),
        ("llama-quantize", quantize[:3]),
        ("both", theirs),
    )
    for name, (seconds, busy, peak) in rows:
        print(f"{name:24}{seconds:9.1f}{busy:9.1f}{peak / 1e6:9.0f}")
    print(f"ratio: {theirs[0] / ours[0]:.1f} x wall, {theirs[1] / ours[1]:.1f} x CPU; equal files: {equal}")
    print("qbuild's stages (s):", json.dumps({k: round(v, 1) for k, v in report["totals"]["seconds"].items()}))


if __name__ == "__main__":
    main()
