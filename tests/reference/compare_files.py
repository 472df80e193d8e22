"""Whole files of qbuild against llama.cpp's, both made now: for models too large to keep digests and matrices of.

    python tests/reference/compare_files.py LLAMA_CPP MODEL OUT [--imatrix FILE] [--random FILE] [--types A,B]

LLAMA_CPP and MODEL as for make_reference.py; OUT is an empty folder, qbuild's files stay in OUT/out. --imatrix: a GGUF
file from llama-imatrix; --random: the same, with its sums replaced by random positive ones. Prints each type that
differs, then how many files were compared and how many differ; exits with 1 where any does.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
from make_reference import NEED_IMATRIX, TYPES, digest

from qbuild.gguffile import read_header


def randomized(matrix: Path, seed: int = 0) -> None:
    """Replace the sums of squares in a matrix by random positive ones, over six powers of ten."""
    rng, header = np.random.default_rng(seed), read_header(matrix)
    with matrix.open("r+b") as file:
        for t in header.tensors:
            if t.name.endswith(".in_sum2"):
                file.seek(header.data_offset + t.offset)
                file.write((10.0 ** rng.uniform(-3, 3, int(np.prod(t.shape)))).astype("<f4").tobytes())


def ours(model: Path, out: Path, types: list[str], matrix: str | None) -> dict[str, str]:
    targets = ",".join(f"gguf/{name.lower()}" for name in types)
    words = [] if matrix is None else [f"targets.{name.lower()}.imatrix={matrix}" for name in types]
    command = [sys.executable, "-m", "qbuild", f"model.source={model}", f"target=[{targets}]", *words]
    command += [f"store.dir={out}/store", f"out={out}/out", "format=json"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=out)
    if done.returncode:
        raise SystemExit(done.stderr or done.stdout)  # an error of format=json is a document
    made = json.loads(done.stdout)["targets"]
    return {name: made[name.lower()]["digest"] for name in types}


def theirs(llama: Path, converted: Path, out: Path, name: str, matrix: str | None) -> str:
    made = out / "theirs.gguf"
    words = [] if matrix is None else ["--imatrix", matrix]
    command = [llama / "build/bin/llama-quantize", *words, converted, made, name]
    subprocess.run(command, check=True, capture_output=True, cwd=out)
    return digest(made)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("llama", type=Path)
    parser.add_argument("model", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--imatrix", type=Path)
    parser.add_argument("--random", type=Path)
    parser.add_argument("--types", default=",".join(TYPES))
    args = parser.parse_args()
    llama, model, out = args.llama.resolve(), args.model.resolve(), args.out.resolve()
    matrix = args.imatrix or args.random
    if matrix is not None:
        shutil.copy(matrix, out / "matrix.gguf")  # the files note its path as typed, so both are given this one
        if args.random:
            randomized(out / "matrix.gguf")
    converted = out / "converted.gguf"
    convert = [sys.executable, "convert_hf_to_gguf.py", str(model), "--outfile", str(converted)]
    subprocess.run(convert, cwd=llama, check=True, capture_output=True)
    types = [name for name in args.types.split(",") if matrix is not None or name not in NEED_IMATRIX]
    noted = None if matrix is None else "matrix.gguf"
    made = ours(model, out, types, noted)
    different = [name for name in types if theirs(llama, converted, out, name, noted) != made[name]]
    print(*(f"{name} differs" for name in different), f"{len(types)} compared, {len(different)} different", sep="\n")
    raise SystemExit(bool(different))


if __name__ == "__main__":
    main()
