"""Record what llama.cpp makes of a checkpoint: the digest of each whole file, for tests that then need no compiler.

    python tests/reference/make_reference.py LLAMA_CPP MODEL_DIRECTORY OUT.json [TYPE ...]

LLAMA_CPP is a source tree of llama.cpp with build/bin/llama-quantize, such as the one inside the source package
llama-cpp-python: python convert_hf_to_gguf.py MODEL, then llama-quantize for each type.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

import blake3

PLAIN = "F32 F16 BF16 Q8_0 Q4_0 Q4_1 Q5_0 Q5_1 Q2_K Q2_K_S Q3_K_S Q3_K_M Q3_K_L Q4_K_S Q4_K_M Q5_K_S Q5_K_M Q6_K"
GRID = "IQ1_S IQ1_M IQ2_XXS IQ2_XS IQ2_S IQ2_M IQ3_XXS IQ3_XS IQ3_S IQ3_M"
OTHER = "IQ4_NL IQ4_XS MXFP4_MOE TQ1_0 TQ2_0 Q1_0 Q2_0"
TYPES = f"{PLAIN} {GRID} {OTHER}".split()
NEED_IMATRIX = {"Q2_K_S", "IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ2_M", "IQ3_XXS", "IQ3_XS"}


def digest(path: Path) -> str:
    return f"{blake3.blake3(path.read_bytes()).hexdigest()}/{path.stat().st_size}"


def main(llama: Path, model: Path, out: Path, types: list[str]) -> None:
    files = {}
    # A matrix beside the model's folder is used too; its path is typed as a bare name, for the file notes it.
    matrix = model.resolve().parent / f"{model.name}-imatrix.gguf"
    weighed = {}
    with tempfile.TemporaryDirectory() as folder:
        converted = Path(folder) / "converted.gguf"
        convert = [sys.executable, "convert_hf_to_gguf.py", str(model.resolve()), "--outfile", str(converted)]
        subprocess.run(convert, cwd=llama, check=True, capture_output=True)
        for name in types:
            made = Path(folder) / f"{name}.gguf"
            if name not in NEED_IMATRIX:
                command = [llama / "build/bin/llama-quantize", converted, made, name]
                subprocess.run(command, check=True, capture_output=True)
                files[name] = digest(made)
            if matrix.is_file():
                command = [llama / "build/bin/llama-quantize", "--imatrix", matrix.name, converted, made, name]
                subprocess.run(command, check=True, capture_output=True, cwd=matrix.parent)
                weighed[name] = digest(made)
            made.unlink()
    packages = {name: version(name) for name in ("transformers", "tokenizers", "sentencepiece")}
    document = {
        "model": model.name,
        "llama.cpp": "the source in llama-cpp-python 0.3.36 (ggml 0.25.3)",
        "command": "convert_hf_to_gguf.py MODEL; llama-quantize CONVERTED OUT TYPE",
        "packages": packages,
        "files": files,
        "files with imatrix": weighed,
    }
    out.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]), sys.argv[4:] or TYPES)
