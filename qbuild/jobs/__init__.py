"""What workers run for calibrated targets. These modules may load torch: only a worker imports them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from qbuild.digest import Digest
from qbuild.errors import StoreError
from qbuild.inputs import InputFile
from qbuild.store import Store

__all__ = ["Emit", "content", "needed"]

Emit = Callable[[dict[str, Any]], None]


def needed(store: Store, digest: Digest) -> bytes:
    """A stored artifact that an action before this one made."""
    data = store.read_bytes(digest)
    if data is None:
        raise StoreError(str(store.root), f"{digest} is gone or damaged", "run again: it is made anew")
    return data


def content(store: Store, item: InputFile | Digest) -> bytes:
    """What was made before this action, or given by the user."""
    return item.read() if isinstance(item, InputFile) else needed(store, item)
