"""The console script. It imports next to nothing: a null build is answered from a record before Hydra is loaded."""

from __future__ import annotations

import sys

from qbuild import fastpath


def main() -> None:
    answer = fastpath.lookup(sys.argv[1:])
    if answer is not None:
        sys.stdout.write(answer)
        return
    from qbuild.cli import main as full

    sys.exit(full(sys.argv[1:]))


if __name__ == "__main__":
    main()
