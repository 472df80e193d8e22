from __future__ import annotations

import sys
from pathlib import Path

import pytest

from qbuild.store import Store

sys.path.insert(0, str(Path(__file__).parent))  # for store_kit


@pytest.fixture
def store(tmp_path: Path):
    opened = Store(tmp_path / "store")
    yield opened
    opened.close()
