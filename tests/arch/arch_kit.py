"""What the tests of this folder share: its two makers, loaded as modules, and how types are recorded."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from qbuild.arch.convert import ModelFacts, TensorSpec
from qbuild.arch.mix import Mix, choose
from qbuild.errors import ConfigError

HERE = Path(__file__).parent
DATA = HERE.parent / "data"


def maker(name: str) -> Any:
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, HERE / f"{name}.py")
        assert spec is not None
        assert spec.loader is not None
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


def type_runs(specs: Sequence[TensorSpec], facts: ModelFacts, mix: Mix) -> str | None:
    """The types chosen, in order, as they are recorded: ``Q4_K*3 F32*1``; None where llama-quantize stops."""
    try:
        types = [type_ for _, type_ in choose(specs, facts, mix)]
    except ConfigError:
        return None
    return " ".join(f"{type_}*{len(list(group))}" for type_, group in groupby(types))
