"""A tier that belongs to somebody else: used, emptied and left open.

Owns the list of what was put into it; must not know what kind of tier it is.  Threads as
`longtape.protocols.Tier` says.

Invariant: after `close`, the tier below holds nothing that came through here, and is
open.  So a sweep can begin anew in it, and its owner goes on with it.
"""

from __future__ import annotations

import contextlib
from typing import Any

from longtape.actions import Key
from longtape.errors import StateError
from longtape.protocols import Bytes, Tier


class LentTier:
    """Implements `longtape.protocols.Tier` with a tier that its owner closes."""

    def __init__(self, inner: Tier) -> None:
        self.inner = inner
        self._keys: set[Key] = set()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or name == "inner":
            raise AttributeError(name)
        return getattr(self.inner, name)  # what a run wants to know of a tier: `item_nbytes`, `direct`

    def reserve(self, key: Key, nbytes: int) -> None:
        """Find room for an item; as the tier below does."""
        self.inner.reserve(key, nbytes)
        self._keys.add(key)

    def write(self, key: Key, data: Bytes) -> None:
        """Write an item; as the tier below does."""
        self.inner.write(key, data)

    def read(self, key: Key, out: Bytes) -> None:
        """Read an item; as the tier below does."""
        self.inner.read(key, out)

    def release(self, key: Key) -> None:
        """Give an item's room back."""
        self._keys.discard(key)
        self.inner.release(key)

    def close(self) -> None:
        """Give the room of every item back, and leave the tier open; idempotent."""
        while self._keys:
            with contextlib.suppress(OSError, StateError):  # broken, or closed by its owner already
                self.inner.release(self._keys.pop())
