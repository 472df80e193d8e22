"""Predicted against measured peak RAM, job by job, for several shapes and targets. What DESIGN promises: 1 to 1.15.

    python benchmarks/bench_memory.py [DIRECTORY ...]

Without directories: tiny-llama and freshly written random checkpoints of 100M and 1.1B parameters.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
TINY = HERE.parent / "tests" / "data" / "tiny-llama"
SETTINGS = (
    ("gguf/q4_k_m", []),
    ("gguf/q4_k_m", ["budget.threads=1"]),
    ("gguf/q2_k,gguf/q4_k_m,gguf/q8_0", []),
    ("gguf/q4_k_m", ["budget.ram=232MiB"]),
)


def build(model: Path, targets: str, words: list[str], root: Path) -> dict | None:
    command = [sys.executable, "-m", "qbuild", f"model.source={model}", f"target=[{targets}]", *words, "format=json"]
    done = subprocess.run([*command, f"store.dir={root}/store", f"out={root}/out"], capture_output=True, text=True)
    return json.loads(done.stdout) if done.returncode == 0 else None


def main(models: list[Path]) -> None:
    print(f"{'model':14}{'targets':36}{'settings':22}{'job':12}{'predicted':>10}{'measured':>10}{'ratio':>7}")
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as folder:
        root = Path(folder)
        for shape in () if models else ("100m", "1.1b"):
            maker = [sys.executable, HERE / "make_checkpoint.py", shape, root / shape, "--tokenizer", TINY]
            subprocess.run([str(word) for word in maker], check=True)
            models.append(root / shape)
        for number, model in enumerate(models if len(sys.argv) > 1 else [TINY, *models]):
            for setting, (targets, words) in enumerate(SETTINGS):
                run = root / f"run{number}-{setting}"
                document = build(model, targets, words, run)
                show(model.name, targets.replace("gguf/", ""), " ".join(words), document)
                subprocess.run(["rm", "-rf", str(run)], check=True)


def show(model: str, targets: str, words: str, document: dict | None) -> None:
    if document is None:
        print(f"{model:14}{targets:36}{words:22}refused")
        return
    rows = {name.split()[0]: (job["predicted_ram"], job["peak_ram"]) for name, job in document["jobs"].items()}
    first = next(iter(document["targets"].values()))
    rows["in all"] = (first["predicted_ram"], first["peak_ram"])
    for name, (predicted, measured) in rows.items():
        if name != "compiling":
            sizes = f"{predicted / 2**20:8.0f} M{measured / 2**20:8.0f} M{predicted / measured:7.2f}"
            print(f"{model:14}{targets:36}{words:22}{name:12}{sizes}")


if __name__ == "__main__":
    main([Path(word) for word in sys.argv[1:]])
