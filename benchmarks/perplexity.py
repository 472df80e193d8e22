"""Perplexity of a build's GGUF files as qbuild measured it and as llama.cpp does, as a Markdown table.

    qbuild model.source=MODEL target=gguf/q4_k_m evaluation.source=TEXT evaluation.samples=8 evaluation.length=256
    python benchmarks/perplexity.py LLAMA_PERPLEXITY outputs/MODEL/build.json

LLAMA_PERPLEXITY is llama.cpp's program of that name. It reads the windows of the evaluation: the same text from its
beginning, each window with the model's BOS in place of its first token where it has one, and counts second halves.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
from pathlib import Path


def perplexity(program: Path, file: Path, text: str, windows: int, length: int) -> float:
    """As printed. Keys, values and attention are as exact as the evaluator's, where the defaults round them."""
    command = [program, "-m", file, "-f", text, "--chunks", str(windows), "-c", str(length), "-t", "2"]
    exact = ["-ctk", "f32", "-ctv", "f32", "-fa", "off"]
    done = subprocess.run([*command, *exact], check=True, capture_output=True, text=True)
    found = re.search(r"PPL = (\S+) \+/- (\S+)", done.stdout + done.stderr)
    if found is None:
        raise SystemExit(f"{file}: {program} printed no perplexity")
    return float(found[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("program", type=Path)
    parser.add_argument("build", type=Path)
    args = parser.parse_args()
    built = json.loads(args.build.read_text())
    asked = built["evaluation"]
    print("| file | MiB | qbuild | llama.cpp | apart |\n| --- | ---: | ---: | ---: | ---: |")
    for name, target in sorted(built["targets"].items(), key=lambda item: -item[1]["bytes"]):
        file, measured = Path(target["path"]), asked["targets"].get(name)
        if measured is None or file.suffix != ".gguf":
            continue
        theirs = perplexity(args.program, file, asked["source"], asked["samples"], asked["length"])
        ours = measured["perplexity_llama"]
        numbers = f"{target['bytes'] / (1 << 20):.1f} | {ours:.4f} | {theirs:.4f} | {ours / theirs - 1:+.2%}"
        print(f"| {file.stem} | {numbers} |", flush=True)


if __name__ == "__main__":
    main()
