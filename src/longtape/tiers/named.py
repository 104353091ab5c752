"""A disk tier whose file has a name, and outlives the process that wrote it.

Owns what that takes beyond `DiskTier`: the file's first block, which says whose it is;
entering what an earlier process has written; and not using room again while a durable
record may still name what is in it.  Threads as `longtape.protocols.Tier` says; `sync`
is a worker's.

Invariant: an extent that was given back is not written to before `settle` has been
called for it, unless the disk has no other room.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from longtape.actions import Key, Kind
from longtape.errors import DamagedBlock, StorageFull
from longtape.tiers import block
from longtape.tiers.disk import DiskTier
from longtape.tiers.ledger import Entry
from longtape.tiers.scratch import Scratch, open_named

_OWNER = Key(Kind.PARTS, -1)
_NOTHING = np.empty(0, np.uint8)


class Place(NamedTuple):
    """Where an item lies in the file, and which of its writes is there."""

    key: Key
    reserved: int
    """Bytes of payload there is room for."""
    written: int
    """Bytes of payload there are."""
    offset: int
    sequence: int


class NamedDiskTier(DiskTier):
    """Implements `longtape.protocols.Tier` with a file that stays until it is removed.

    Args:
        path: Of the file, in an existing directory.
        run_id: 16 bytes that mark this run's blocks.
        is_new: Make the file; else go on with the one there is, which must be this run's.
        limit: As for `DiskTier`.
        direct: As for `DiskTier`.

    Raises:
        DamagedBlock: The file is there, and another run's or damaged at its beginning.
        StorageError: The file cannot be opened.
    """

    def __init__(
        self, path: str, *, run_id: bytes, is_new: bool, limit: int | None = None, direct: bool | None = None
    ) -> None:
        self.path, self._is_new = path, is_new
        self._retired: list[Entry] = []
        super().__init__(os.path.dirname(path), run_id=run_id, limit=limit, direct=direct)

    def _open(self, directory: str, direct: bool | None) -> Scratch:
        return open_named(self.path, is_new=self._is_new, direct=direct)

    def _set_up(self, scratch: Scratch) -> None:
        super()._set_up(scratch)
        owner = block.header(self.run_id, _OWNER, 0, _NOTHING)
        try:
            if self._is_new:
                self._file.write(0, _NOTHING, owner)
            found = owner if self._is_new else self._file.read(0, _NOTHING, block.HEADER_NBYTES)
        except OSError as error:
            raise self._explained(error, f"to open {self.path}") from error
        if found != owner:
            raise DamagedBlock(f"{self.path} does not begin as the scratch file of this run must")
        self._extents.claim([(0, self._file.block)])
        self.file_bytes = os.fstat(scratch.fd).st_size

    # What a resumed run begins with ----------------------------------------------------------

    def enter(self, items: Iterable[tuple[Key, Place]]) -> list[Key]:
        """Take in what an earlier process has written, each under a key of its own; before anything else is done.

        Items that cannot be there (beyond the file's end, over another one) are left out.

        Returns:
            The keys that were taken in.
        """
        size = os.fstat(self._scratch.fd).st_size
        taken, keys, end = [], [], self._file.block
        for key, place in sorted(items, key=lambda item: item[1].offset):
            length = self._file.size_of(place.reserved) if 0 <= place.written <= place.reserved else size + 1
            if place.offset < end or place.offset % self._file.block or place.offset + length > size:
                continue
            end = place.offset + length
            taken.append((place.offset, length))
            keys.append(key)
            self._ledger.enter(key, Entry(place.key, place.reserved, place.offset, place.written, place.sequence))
        self._extents.claim(taken)
        return keys

    def places(self, keys: Iterable[Key]) -> list[Place | None]:
        """Where these items lie; None for one that is not, or not yet, written."""
        return [
            None if e is None else Place(e.key, e.nbytes, e.written or 0, e.offset, e.sequence)
            for e in self._ledger.written(keys)
        ]

    # What makes it durable ---------------------------------------------------------------------

    def sync(self) -> None:
        """Wait until all that was written is on the device.  Raises `OSError`."""
        with self._ledger.held():
            os.fdatasync(self._scratch.fd)

    @property
    def retired(self) -> int:
        """How many given-back extents wait to be used again."""
        return len(self._retired)

    def settle(self, count: int) -> None:
        """The first `count` of them are named by no durable record any more."""
        for entry in self._retired[:count]:
            super()._give_back(entry)
        del self._retired[:count]

    def _give_back(self, entry: Entry) -> None:
        self._retired.append(entry)

    def _find_room(self, size: int) -> int:
        try:
            return super()._find_room(size)
        except StorageFull:
            if not self._retired:
                raise
        # A record may name what is there now; whoever resumes from it will see that it was overwritten.
        self.settle(len(self._retired))
        return super()._find_room(size)
