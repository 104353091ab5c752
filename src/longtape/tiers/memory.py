"""A tier that keeps its bytes in memory: for tests, and to compare with.

Owns copies of what it is given.  Threads as `longtape.protocols.Tier` says.

Invariant: room is taken when it is reserved, never by a write.
"""

from __future__ import annotations

import errno

import numpy as np

from longtape.actions import Key
from longtape.errors import StorageFull
from longtape.protocols import Bytes
from longtape.sizes import format_bytes
from longtape.tiers.block import require_bytes
from longtape.tiers.ledger import Entry, Ledger


class MemoryTier:
    """Implements `longtape.protocols.Tier` with arrays.

    Args:
        limit: The most bytes to keep; None for no limit.
    """

    def __init__(self, *, limit: int | None = None) -> None:
        self.limit = limit
        self._ledger = Ledger("the memory tier", self._on_idle)
        self._kept: dict[Entry, Bytes] = {}
        self.bytes_in_use = 0
        self.peak_bytes = 0
        """The most bytes that were reserved at once."""

    @property
    def bytes_written(self) -> int:
        """Payload bytes written."""
        return self._ledger.bytes_written

    @property
    def bytes_read(self) -> int:
        """Payload bytes read."""
        return self._ledger.bytes_read

    def reserve(self, key: Key, nbytes: int) -> None:
        """Allocate room for an item.  Raises `StorageFull` beyond the limit."""
        for entry in self._ledger.take_late():
            self._drop(entry)
        entry = self._ledger.add(key, nbytes)
        if self.limit is not None and self.bytes_in_use + nbytes > self.limit:
            self._ledger.remove(key)
            raise StorageFull(
                errno.ENOSPC,
                f"no room for {key} ({format_bytes(nbytes)}) in the memory tier: {format_bytes(self.bytes_in_use)} of "
                f"its {format_bytes(self.limit)} are taken; release an item, or raise the limit",
            )
        self._kept[entry] = np.empty(nbytes, dtype=np.uint8)
        self.bytes_in_use += nbytes
        self.peak_bytes = max(self.peak_bytes, self.bytes_in_use)

    def write(self, key: Key, data: Bytes) -> None:
        """Copy `data`, of at most the length reserved."""
        require_bytes(data)
        entry, written = self._ledger.begin_write(key, data.nbytes), None
        try:
            np.copyto(self._kept[entry][: data.nbytes], data)
            written = data.nbytes
        finally:
            self._ledger.end(entry, written=written)

    def read(self, key: Key, out: Bytes) -> None:
        """Copy a written item into `out`, which has its very length."""
        require_bytes(out, writeable=True)
        entry, read = self._ledger.begin_read(key, out.nbytes), None
        try:
            np.copyto(out, self._kept[entry][: out.nbytes])
            read = out.nbytes
        finally:
            self._ledger.end(entry, read=read)

    def release(self, key: Key) -> None:
        """Forget an item."""
        entry = self._ledger.remove(key)
        if entry is not None:
            self._drop(entry)

    def _drop(self, entry: Entry) -> None:
        del self._kept[entry]
        self.bytes_in_use -= entry.nbytes

    def _on_idle(self) -> None:
        self._kept.clear()
        self.bytes_in_use = 0

    def close(self) -> None:
        """Forget everything; idempotent."""
        self._ledger.close()
