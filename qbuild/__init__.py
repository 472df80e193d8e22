"""qbuild: make for quantized language models. Importing it does nothing; its functions load the engine when used."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qbuild.api import Evaluation, Result, TargetResult, build, configure

__all__ = ["Evaluation", "Result", "TargetResult", "build", "configure"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'qbuild' has no attribute {name!r}")
    return getattr(import_module("qbuild.api"), name)
