from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture(scope="session")
def ggml() -> ModuleType:
    """The oracle, tests/kernels/ggml.py; skips where xllamacpp is not installed."""
    spec = importlib.util.spec_from_file_location("ggml_oracle", Path(__file__).with_name("ggml.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    try:
        module.shared_library()
    except FileNotFoundError as error:
        pytest.skip(str(error))
    return module
