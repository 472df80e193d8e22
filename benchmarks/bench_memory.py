"""Predicted against measured peak RAM, job by job, for several shapes and targets. What DESIGN promises: 1 to 1.15.

    python benchmarks/bench_memory.py [--calibrated] [DIRECTORY ...]

Without directories: tiny-llama and freshly written random checkpoints of 100M and 1.1B parameters. With --calibrated:
AWQ, GPTQ, an importance matrix and a measured GGUF file in one build, in 3 GiB, hidden states in RAM and on disk; it
says whether both gave the same bytes.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
TINY = HERE.parent / "tests" / "data" / "tiny-llama"
PLAIN = (
    ("gguf/q4_k_m", []),
    ("gguf/q4_k_m", ["budget.threads=1"]),
    ("gguf/q2_k,gguf/q4_k_m,gguf/q8_0", []),
    ("gguf/q4_k_m", ["budget.ram=240MiB"]),
)
TEXT = ("calibration.samples=16", "evaluation.source=builtin", "evaluation.samples=4", "budget.ram=3GiB")
EVERY = ("imatrix,awq/w4_g64,gptq/w4_g64,gguf/q4_k_m", "targets.q4_k_m.imatrix=auto", *TEXT)
CALIBRATED = (
    (EVERY[0], [*EVERY[1:], "calibration.spill=false"]),
    (EVERY[0], [*EVERY[1:], "calibration.spill=true", "budget.threads=1"]),
    ("imatrix", ["calibration.samples=16", "budget.ram=3GiB", "calibration.dtype=bfloat16"]),
)


def build(model: Path, targets: str, words: list[str], root: Path) -> dict | None:
    command = [sys.executable, "-m", "qbuild", f"model.source={model}", f"target=[{targets}]", *words, "format=json"]
    done = subprocess.run([*command, f"store.dir={root}/store", f"out={root}/out"], capture_output=True, text=True)
    if done.returncode:
        print(done.stdout, done.stderr[-2000:], file=sys.stderr)
    return json.loads(done.stdout) if done.returncode == 0 else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", type=Path)
    parser.add_argument("--calibrated", action="store_true")
    options = parser.parse_args()
    print(f"{'job':58}{'predicted':>10}{'measured':>10}{'ratio':>7}{'seconds':>9}")
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as folder:
        root = Path(folder)
        for model in options.models or made(root):
            digests = []
            for number, (targets, words) in enumerate(CALIBRATED if options.calibrated else PLAIN):
                run = root / f"run{number}"
                document = build(model, targets, words, run)
                print(f"{model.name}: {targets.replace('gguf/', '')} {' '.join(words)}")
                if document is None:
                    print("  refused")
                else:
                    show(document)
                    digests.append({name: target["digest"] for name, target in document["targets"].items()})
                subprocess.run(["rm", "-rf", str(run)], check=True)
            if options.calibrated and len(digests) > 1:
                print("spilled or not:", "the same bytes" if digests[0] == digests[1] else "OTHER BYTES", flush=True)


def made(root: Path) -> list[Path]:
    for shape in ("100m", "1.1b"):
        maker = [sys.executable, HERE / "make_checkpoint.py", shape, root / shape, "--tokenizer", TINY]
        subprocess.run([str(word) for word in maker], check=True)
    return [TINY, root / "100m", root / "1.1b"]


def show(document: dict) -> None:
    rows = {name: (job["predicted_ram"], job["peak_ram"], job["seconds"]) for name, job in document["jobs"].items()}
    most = max(document["targets"].values(), key=lambda target: target["peak_ram"])
    rows["in all"] = (most["predicted_ram"], most["peak_ram"], document["totals"]["wall_seconds"])
    for name, (predicted, measured, seconds) in rows.items():
        if name != "compiling kernels":
            sizes = f"{predicted / 2**20:8.0f} M{measured / 2**20:8.0f} M{predicted / measured:7.2f}{seconds:9.1f}"
            print(f"  {name[:56]:56}{sizes}", flush=True)


if __name__ == "__main__":
    main()
