"""The command's entry: a recorded null build is answered from here, before anything heavy is imported."""

from __future__ import annotations

import os
import sys

from qbuild import fastpath

__all__ = ["main"]


def main() -> int:
    argv = sys.argv[1:]
    try:
        text = fastpath.answer(argv, os.getcwd())
    except FileNotFoundError:
        text = None  # the working folder is gone: said by the command line
    if text is not None:
        sys.stdout.write(text)
        return 0
    # The one import of our own that is not at the top of a file: Hydra and numpy stay out of a null build.
    from qbuild.cli import main as full

    return full(argv)


if __name__ == "__main__":
    sys.exit(main())
