"""Keeps a buffered scratch file out of the page cache.

Owns the list of ranges written and not yet dropped; must not know what is in them.
Workers enter; the lock guards the list only and is never held across I/O.

Invariant: at most about one batch and what is being written now is dirty at any time.
"""

from __future__ import annotations

import threading

from longtape.tiers import linux

BATCH_NBYTES = 64 << 20


class DropBehind:
    """Has the kernel write and then forget what passes through file `fd`."""

    def __init__(self, fd: int, *, batch_nbytes: int = BATCH_NBYTES) -> None:
        self._fd, self._batch_nbytes = fd, batch_nbytes
        self._lock = threading.Lock()
        self._ranges: list[tuple[int, int]] = []
        self._pending = 0

    def written(self, offset: int, nbytes: int) -> None:
        """Note a written range; every so often, wait for a batch to reach the device.  Raises `OSError`."""
        linux.begin_writeback(self._fd, offset, nbytes)
        with self._lock:
            self._ranges.append((offset, nbytes))
            self._pending += nbytes
            if self._pending < self._batch_nbytes:
                return
            batch, self._ranges, self._pending = self._ranges, [], 0
        for start, length in batch:
            linux.finish_writeback(self._fd, start, length)
            linux.drop_cache(self._fd, start, length)

    def read(self, offset: int, nbytes: int) -> None:
        """The range was read and will not be wanted from the cache."""
        linux.drop_cache(self._fd, offset, nbytes)
