"""Perplexity of GGUF files in llama.cpp, as a Markdown table.

    python benchmarks/perplexity.py LLAMA_PERPLEXITY TEXT FILE.gguf [FILE.gguf ...] [--chunks 20] [--context 256]

LLAMA_PERPLEXITY is llama.cpp's program of that name; every file reads the same first chunks of TEXT.
"""

from __future__ import annotations

import argparse
import re
import subprocess
from pathlib import Path


def perplexity(program: Path, text: Path, file: Path, chunks: int, context: int) -> tuple[str, str]:
    """Perplexity and its standard error, as printed."""
    command = [program, "-m", file, "-f", text, "--chunks", str(chunks), "-c", str(context), "-t", "2"]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    found = re.search(r"PPL = (\S+) \+/- (\S+)", done.stdout + done.stderr)
    if found is None:
        raise SystemExit(f"{file}: {program} printed no perplexity")
    return found[1], found[2]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("program", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("files", type=Path, nargs="+")
    parser.add_argument("--chunks", type=int, default=20)
    parser.add_argument("--context", type=int, default=256)
    args = parser.parse_args()
    print("| file | MiB | perplexity | ± |\n| --- | ---: | ---: | ---: |")
    for file in sorted(args.files, key=lambda path: -path.stat().st_size):
        value, error = perplexity(args.program, args.text, file, args.chunks, args.context)
        print(f"| {file.stem} | {file.stat().st_size / (1 << 20):.1f} | {value} | {error} |", flush=True)


if __name__ == "__main__":
    main()
