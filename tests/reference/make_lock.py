"""Write the lock of a backend: qbuild/backends/locks/NAME.txt, of what pip chooses today.

    pip install --dry-run --ignore-installed --report REPORT.json autoawq==0.2.9 torch==2.6.0 transformers==4.51.3
    python tests/reference/make_lock.py autoawq REPORT.json --python 3.11 > REQUIREMENTS.txt
    pip download --no-deps --require-hashes -r REQUIREMENTS.txt -d FILES
    python tests/reference/make_lock.py autoawq REPORT.json --python 3.11 --files FILES

The requirements asked for were: autoawq==0.2.9 torch==2.6.0 transformers==4.51.3 setuptools (the versions it was last tested with);
auto-gptq==0.7.1 torch==2.2.2 transformers==4.40.2 "numpy<2" optimum==1.20.0; gptqmodel==7.7.0 (with GPTQMODEL_BUILD=0 and
--no-build-isolation). The packages asked for come first.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from qbuild.backends.environment import LOCKS


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("backend")
    parser.add_argument("report", type=Path)
    parser.add_argument("--python", required=True)
    parser.add_argument("--files", type=Path)
    given = parser.parse_args()
    installed = json.loads(given.report.read_text())["install"]
    installed.sort(key=lambda i: (not i["requested"], i["metadata"]["name"].lower()))
    lines = []
    for item in installed:
        about, found = item["metadata"], item["download_info"]
        line = f"{about['name']}=={about['version']} --hash=sha256:{found['archive_info']['hashes']['sha256']}"
        if given.files is not None:
            file = given.files / found["url"].rpartition("/")[2]
            line += f"  # {file.stat().st_size} {'wheel' if file.suffix == '.whl' else 'source'}"
        lines.append(line)
    if given.files is None:
        print(*lines, sep="\n")
    else:
        (LOCKS / f"{given.backend}.txt").write_text("\n".join([f"# python {given.python}", *lines]) + "\n")


if __name__ == "__main__":
    main()
