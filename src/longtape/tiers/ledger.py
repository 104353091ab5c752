"""Keeps the books of a tier: what is reserved, what was written, what is under way.

Owns those facts and the counters; must not know where the bytes go.  `add`, `remove`,
`take_late` and `close` are called on the executor's thread, `begin`, `end` and `held` on workers.  One
lock guards it all and is never held across I/O.

Invariants: an item has at most one transfer at a time; an item taken out while a
transfer of it is stuck keeps its room until that has ended; what `on_idle` releases
is released once, after the last transfer.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

from longtape.actions import Key
from longtape.errors import StateError, UsageError


@dataclass(slots=True, eq=False)
class Entry:
    """One item's room."""

    key: Key
    nbytes: int
    """Room for a payload of so many bytes."""
    offset: int = 0
    written: int | None = None
    """Length of the payload that was last written whole; None: there is none."""
    sequence: int = 0
    """Number of the last write, of all writes of this tier."""
    busy: bool = False
    removed: bool = False


class Ledger:
    """The books of one tier.

    Args:
        name: What the tier is, for messages.
        on_idle: Called once, when the ledger is closed and no transfer is under way.
    """

    def __init__(self, name: str, on_idle: Callable[[], None]) -> None:
        self.name = name
        self.bytes_written = 0
        self.bytes_read = 0
        self._on_idle = on_idle
        self._entries: dict[Key, Entry] = {}
        self._late: list[Entry] = []
        self._lock = threading.Lock()
        self._under_way = 0
        self._sequence = 0
        self._closed = False

    def add(self, key: Key, nbytes: int) -> Entry:
        """Enter an item.  Raises `StateError` if it is there already, `UsageError` if `nbytes` is negative."""
        with self._lock:
            self._require_open()
            if nbytes < 0:
                raise UsageError(f"room for {key} of {nbytes} bytes was asked of {self.name}; that is negative")
            if key in self._entries:
                raise StateError(f"{key} has room in {self.name} already; release it first")
            entry = self._entries[key] = Entry(key, nbytes)
            return entry

    def remove(self, key: Key) -> Entry | None:
        """Take an item out: its entry, or None while a transfer of it is under way (see `take_late`)."""
        with self._lock:
            self._require_open()
            entry = self._known(key)
            del self._entries[key]
            entry.removed = True
            return None if entry.busy else entry

    def enter(self, key: Key, entry: Entry) -> None:
        """Enter, under `key`, an item that an earlier process wrote; sequence numbers go on above its own."""
        with self._lock:
            self._require_open()
            self._entries[key] = entry
            self._sequence = max(self._sequence, entry.sequence)

    def written(self, keys: Iterable[Key]) -> list[Entry | None]:
        """For each key a copy of its entry, or None where no whole write of it has ended."""
        with self._lock:
            entries = [self._entries.get(key) for key in keys]
            return [None if e is None or e.written is None else replace(e) for e in entries]

    def take_late(self) -> list[Entry]:
        """Entries whose transfers ended after they were taken out."""
        if not self._late:
            return []
        with self._lock:
            late, self._late = self._late, []
        return late

    def begin_write(self, key: Key, nbytes: int) -> Entry:
        """A write begins, into room that must be there and large enough; what was written before is void."""
        with self._lock:
            entry = self._ready(key)
            if nbytes > entry.nbytes:
                raise UsageError(f"{nbytes} bytes of {key} do not fit the {entry.nbytes} reserved in {self.name}")
            self._sequence += 1
            entry.sequence, entry.written = self._sequence, None
            self._begin(entry)
            return entry

    def begin_read(self, key: Key, nbytes: int) -> Entry:
        """A read begins, of an item that must have been written with just this length."""
        with self._lock:
            entry = self._ready(key)
            if entry.written is None:
                raise StateError(f"{key} was never written whole to {self.name}, so it cannot be read")
            if nbytes != entry.written:
                raise UsageError(f"{key} has {entry.written} bytes in {self.name}; the array to read into has {nbytes}")
            self._begin(entry)
            return entry

    def end(self, entry: Entry, *, written: int | None = None, read: int | None = None) -> None:
        """The transfer has ended, and moved so many bytes if it went well."""
        with self._lock:
            if written is not None:
                entry.written = written
                self.bytes_written += written
            if read is not None:
                self.bytes_read += read
            entry.busy = False
            if entry.removed:
                self._late.append(entry)
            self._under_way -= 1
            idle = self._closed and self._under_way == 0
        if idle:
            self._on_idle()

    @contextmanager
    def held(self) -> Iterator[None]:
        """What is under way meanwhile is no transfer, but `on_idle` waits for it.  Raises `StateError` when closed."""
        with self._lock:
            self._require_open()
            self._under_way += 1
        try:
            yield
        finally:
            with self._lock:
                self._under_way -= 1
                idle = self._closed and self._under_way == 0
            if idle:
                self._on_idle()

    def close(self) -> None:
        """Refuse all that comes later; idempotent."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            self._entries.clear()
            idle = self._under_way == 0
        if idle:
            self._on_idle()

    def _begin(self, entry: Entry) -> None:
        entry.busy = True
        self._under_way += 1

    def _ready(self, key: Key) -> Entry:
        self._require_open()
        entry = self._known(key)
        if entry.busy:
            raise StateError(f"a transfer of {key} is under way in {self.name}; only one at a time")
        return entry

    def _known(self, key: Key) -> Entry:
        entry = self._entries.get(key)
        if entry is None:
            raise StateError(f"{key} has no room in {self.name}; reserve it first")
        return entry

    def _require_open(self) -> None:
        if self._closed:
            raise StateError(f"{self.name} is closed")
