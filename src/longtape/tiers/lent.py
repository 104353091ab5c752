"""A tier that belongs to somebody else: used, emptied and left open.

Owns the list of what was put into it; must not know what kind of tier it is.  Threads as
`longtape.protocols.Tier` says; `close` is called by the last worker.

Invariant: after `close`, the tier below holds nothing that came through here, and is
open.  So a sweep can begin anew in it, and its owner goes on with it.  A borrower that nobody
refers to any more may still be emptying it: the next one waits for that.
"""

from __future__ import annotations

import contextlib
import threading
import weakref
from typing import Any

from longtape.actions import Key
from longtape.errors import StateError
from longtape.protocols import Bytes, Tier

_last: weakref.WeakValueDictionary[int, LentTier] = weakref.WeakValueDictionary()
"""The last loan of each tier, by its `id`."""


class LentTier:
    """Implements `longtape.protocols.Tier` with a tier that its owner closes.

    Args:
        inner: The owner's tier.
        borrower: Whoever closes this, or is garbage some day; then its workers do.
        patience: Wait no longer than these seconds for the last borrower's workers.
    """

    is_lent = True

    def __init__(self, inner: Tier, borrower: object = None, patience: float = 0.0) -> None:
        self.inner = inner
        self._keys: set[Key] = set()
        self._borrower = None if borrower is None else weakref.ref(borrower)
        self._is_back = threading.Event()
        before = _last.get(id(inner))
        if before is not None and before._keys and before._borrower is not None and before._borrower() is None:
            before._is_back.wait(patience)
        _last[id(inner)] = self

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
        with contextlib.suppress(KeyError):  # two threads may come here: each key is one's
            while True:
                self._release_left(self._keys.pop())
        self._is_back.set()

    def _release_left(self, key: Key) -> None:
        with contextlib.suppress(OSError, StateError, KeyError):  # broken, or closed by its owner already
            self.inner.release(key)
