"""The command line: words in, one answer out, an exit code. Errors end here and nowhere else."""

from qbuild.cli.app import main

__all__ = ["main"]
