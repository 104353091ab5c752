"""A tier that makes items smaller on their way to another tier.

Owns what each item became, and nothing of where it goes.  Must not know what the bytes
mean beyond where they hold floating-point numbers.  Threads as `longtape.protocols.Tier`
says, except that room is found in the tier below when an item is written, by the worker:
only then is it known how much it takes.  A lock keeps that apart from `release`; it is
held while room is found, never while bytes move.

Invariants: what the tier below stores, and checks, are the bytes that it was given; an
item that does not get smaller is stored as it is; what is in use below is exactly what
the items that were written became.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

from longtape.actions import Key, Kind
from longtape.errors import DamagedBlock
from longtape.protocols import Bytes, Floats, Tier
from longtape.tiers.aligned import map_aligned
from longtape.tiers.block import require_bytes
from longtape.tiers.codecs import LARGEST_NBYTES, Codec
from longtape.tiers.ledger import Entry, Ledger

_PAGE = 4096
_MAGNITUDE = 1 << 16

FloatsOf = Callable[[Kind, int], Sequence[Floats]]
"""Where an item of a kind and a length holds floating-point numbers that may be rounded."""


class CompressedTier:
    """Implements `longtape.protocols.Tier` over another one, which it closes with itself.

    Args:
        inner: Stores what the items become.
        codec: Makes them smaller.
        floats: Where items hold floating-point numbers; None where none may be rounded.
    """

    def __init__(self, inner: Tier, codec: Codec, floats: FloatsOf | None = None) -> None:
        self.inner, self.codec = inner, codec
        self._floats = floats
        self._ledger = Ledger(f"the compressed {type(inner).__name__}", inner.close)
        self._packed: dict[Key, int] = {}
        self._lock = threading.Lock()
        self._room = _Room()
        self.stored_nbytes = 0
        """Bytes that the items below take now, written or not."""
        self.peak_stored_nbytes = 0
        self.bytes_stored = 0
        """Bytes written to the tier below."""
        self.bytes_fetched = 0
        """Bytes read from it."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or name == "inner":
            raise AttributeError(name)
        return getattr(self.inner, name)  # what the report wants to know of a tier: `direct`, `fallback_reason`

    @property
    def bytes_written(self) -> int:
        """Bytes of the items written, before they became smaller."""
        return self._ledger.bytes_written

    @property
    def bytes_read(self) -> int:
        """Bytes of the items read."""
        return self._ledger.bytes_read

    @property
    def ratio(self) -> float | None:
        """How many times smaller what was written has become; None where nothing was."""
        return self.bytes_written / self.bytes_stored if self.bytes_stored else None

    def reserve(self, key: Key, nbytes: int) -> None:
        """Note an item of up to `nbytes`; its room is found when it is written."""
        for late in self._ledger.take_late():
            self._drop(late.key)
        self._ledger.add(key, nbytes)

    def write(self, key: Key, data: Bytes) -> None:
        """Make an item smaller and write it.

        Raises:
            StorageFull, StorageError: It was not written; what was there before is void too.
        """
        require_bytes(data)
        entry, written = self._ledger.begin_write(key, data.nbytes), None
        try:
            packed = self._pack(key, data)
            self._find_room(key, packed.nbytes)
            self.inner.write(key, packed)
            self.bytes_stored += packed.nbytes
            written = data.nbytes
        finally:
            self._ledger.end(entry, written=written)

    def read(self, key: Key, out: Bytes) -> None:
        """Fill `out` with a written item.

        Raises:
            DamagedBlock: The bytes are not those that were written; `out` holds garbage.
            StorageError: They could not be read.
        """
        require_bytes(out, writeable=True)
        entry, read = self._ledger.begin_read(key, out.nbytes), None
        try:
            nbytes = self._packed[key]
            if nbytes == out.nbytes:
                self.inner.read(key, out)
            else:
                self._unpack(key, nbytes, out)
            self.bytes_fetched += nbytes
            read = out.nbytes
        finally:
            self._ledger.end(entry, read=read)

    def release(self, key: Key) -> None:
        """Give the item's room back; where a transfer is using it, as soon as that has ended."""
        entry: Entry | None = self._ledger.remove(key)
        if entry is not None:
            self._drop(key)

    def close(self) -> None:
        """Close the tier below, once no transfer is under way; idempotent."""
        self._ledger.close()

    # Inside ----------------------------------------------------------------------------------

    def _pack(self, key: Key, data: Bytes) -> Bytes:
        """The bytes to store: fewer than `data`, or `data` itself."""
        if not 0 < data.nbytes <= LARGEST_NBYTES:
            return data
        floats = self._floats(key.kind, data.nbytes) if self._floats is not None else ()
        packed = self.codec.encode(data, floats)
        if packed.nbytes >= data.nbytes:
            return data
        room = self._room.of(packed.nbytes)  # aligned, so that it goes in one call
        room[:] = packed
        return room

    def _unpack(self, key: Key, nbytes: int, out: Bytes) -> None:
        packed = self._room.of(nbytes)
        self.inner.read(key, packed)
        try:
            self.codec.decode(packed, out)
        except ValueError as error:
            raise DamagedBlock(
                f"{key} was read, but its {nbytes} bytes are no {self.codec.name}: {error}; it has to be computed "
                "again from an earlier snapshot"
            ) from error

    def _find_room(self, key: Key, nbytes: int) -> None:
        with self._lock:
            before = self._packed.pop(key, None)
            if before is not None:
                self.stored_nbytes -= before
                self.inner.release(key)
            self.inner.reserve(key, nbytes)
            self._packed[key] = nbytes
            self.stored_nbytes += nbytes
            self.peak_stored_nbytes = max(self.peak_stored_nbytes, self.stored_nbytes)

    def _drop(self, key: Key) -> None:
        with self._lock:
            nbytes = self._packed.pop(key, None)
            if nbytes is not None:
                self.stored_nbytes -= nbytes
                self.inner.release(key)


class _Room(threading.local):
    """Aligned memory of the calling worker, kept between its transfers."""

    def __init__(self) -> None:
        _, self._data = map_aligned(0, _PAGE)

    def of(self, nbytes: int) -> Bytes:
        """Room for so many bytes, as they were left; valid until the next call."""
        if nbytes > self._data.nbytes:
            _, self._data = map_aligned(-(-nbytes // _MAGNITUDE) * _MAGNITUDE, _PAGE)
        return self._data[:nbytes]
