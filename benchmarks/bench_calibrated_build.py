"""A calibrated build as a user runs it: seconds, RAM and device memory of every job, predicted beside measured.

    python benchmarks/bench_calibrated_build.py DIRECTORY --text wiki.valid.txt --shape 7b --device cuda

It writes a Llama-shaped checkpoint of random weights into DIRECTORY, where it is not there yet, and builds one target
after another into a new store: the first runs the forward pass, the others find its statistics. Targets with a comma
between them are one build: --target awq/w4_g128,gptq/w4_g128.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
MIB = 1 << 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--text", type=Path, required=True, help="what is calibrated on")
    parser.add_argument("--shape", default="7b", help="of make_checkpoint.py")
    parser.add_argument("--layers", type=int, help="fewer than the shape has")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--target", action="append", help="a build; may be given again")
    parser.add_argument("--tokenizer", type=Path, default=HERE.parent / "tests" / "data" / "tiny-llama")
    parser.add_argument("words", nargs="*", help="more of qbuild's words: calibration.samples=64 …")
    options = parser.parse_intermixed_args()
    model, store = options.directory / "model", options.directory / "store"
    if not (model / "model.safetensors.index.json").exists():
        layers = ["--layers", str(options.layers)] if options.layers else []
        make = [sys.executable, str(HERE / "make_checkpoint.py"), options.shape, str(model), *layers]
        subprocess.run([*make, "--tokenizer", str(options.tokenizer)], check=True)
    shutil.rmtree(store, ignore_errors=True)
    print("| target | job | seconds | RAM, MiB | predicted | VRAM, MiB | predicted |\n" + "| --- " * 7 + "|")
    for target in options.target or ["awq/w4_g128", "gptq/w4_g128"]:
        out = options.directory / target.replace("/", "-").replace(",", "+")
        words = [f"model.source={model}", f"target=[{target}]", f"calibration.source={options.text}", f"out={out}"]
        words += [f"device={options.device}", f"store.dir={store}", *options.words, "format=json"]
        done = subprocess.run([sys.executable, "-m", "qbuild", *words], stdout=subprocess.PIPE, text=True)
        document = json.loads(done.stdout)
        if done.returncode:
            sys.exit(f"{target}: {document['error']}")
        for label, job in document["jobs"].items():
            keys = ("peak_ram", "predicted_ram", "peak_vram", "predicted_vram")
            sizes = " | ".join(str(job.get(key, 0) // MIB) for key in keys)
            print(f"| {target} | {label} | {job['seconds']:.1f} | {sizes} |", flush=True)
        most = max(document["targets"].values(), key=lambda made: made["peak_ram"])
        sizes = f"{most['peak_ram'] // MIB} | {most['predicted_ram'] // MIB}"
        print(f"| {target} | all | {document['totals']['wall_seconds']:.1f} | {sizes} | | |", flush=True)
        print(f"actions: {document['totals']['actions']}", flush=True)


if __name__ == "__main__":
    main()
