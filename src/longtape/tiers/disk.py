"""The disk tier: one anonymous scratch file, direct I/O, checksummed blocks.

Owns the file, its growth and its limit.  Must not know what the bytes mean, nor when
they will be wanted.  `reserve`, `release` and `close` are entered by the executor's
thread, `write` and `read` by workers.

Invariants: a block that `read` returns without an error is, byte for byte, what the last
`write` of that key was given; an extent is reused only when no transfer uses it; the file
is closed only when no transfer is under way, for its number may be another file's next.
"""

from __future__ import annotations

import contextlib
import errno
import os
from functools import partial

from longtape.actions import Key
from longtape.errors import DamagedBlock, StorageError, StorageFull, UsageError
from longtape.protocols import Bytes
from longtape.sizes import format_bytes
from longtape.tiers import block, linux
from longtape.tiers.behind import DropBehind
from longtape.tiers.extents import Extents
from longtape.tiers.ledger import Entry, Ledger
from longtape.tiers.openfile import OpenFile
from longtape.tiers.scratch import Scratch, open_scratch
from longtape.tiers.space import usable_nbytes
from longtape.tiers.whole import WholeFile

LEAST_GROWTH_NBYTES = 64 << 20
LARGEST_GROWTH_NBYTES = 1 << 30
_GROWTH_ITEMS = 64
_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
_CANNOT_ALLOCATE = frozenset({errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL})


class DiskTier:
    """Implements `longtape.protocols.Tier` with a file.

    The file has no name: nothing is left of it when the process ends, however it ends.

    Args:
        directory: An existing directory on the disk to use.
        run_id: 16 bytes that mark this run's blocks; random by default.
        limit: The most bytes the file may grow to, headers included.  None: what is free on the disk now, less a
            reserve (`space`); no limit is higher than that.
        direct: True: direct I/O, or an error; False: through the page cache, which is then
            dropped behind each batch of writes; None: direct where it works.

    Raises:
        UsageError: The directory is missing or cannot be written to, or an argument makes no sense.
        StorageError: The system failed otherwise.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        *,
        run_id: bytes | None = None,
        limit: int | None = None,
        direct: bool | None = None,
    ) -> None:
        self.run_id = os.urandom(16) if run_id is None else run_id
        if len(self.run_id) != 16:
            raise UsageError(f"run_id must be 16 bytes, not {len(self.run_id)}")
        if limit is not None and limit < 0:
            raise UsageError(f"limit={limit} is negative; give the most bytes the scratch file may take")
        self._stated_limit = limit
        scratch = self._scratch = self._open(os.fspath(directory), direct)
        try:
            self._set_up(scratch)
        except BaseException:
            scratch.file.close()
            raise

    def _open(self, directory: str, direct: bool | None) -> Scratch:
        return open_scratch(directory, direct=direct)

    def _set_up(self, scratch: Scratch) -> None:
        self._file = WholeFile(
            scratch.fd, block=scratch.block, memory_alignment=scratch.memory_alignment, direct=scratch.direct
        )
        self._behind = None if scratch.direct or scratch.in_memory else DropBehind(scratch.fd)
        self._ledger = Ledger(str(scratch), partial(_close, scratch.file))
        self._extents = Extents()
        # Memory is not to be taken before it is needed.
        self._growth = 0 if scratch.in_memory else LARGEST_GROWTH_NBYTES
        file = os.fstat(scratch.fd)
        self.file_bytes = file.st_size
        """How far the file has grown."""
        limits = (self._stated_limit, usable_nbytes(scratch.directory, beside=512 * file.st_blocks))
        self.limit: int | None = min((nbytes for nbytes in limits if nbytes is not None), default=None)
        """The most bytes it may grow to; None: there is no telling."""

    # What the report wants to know -----------------------------------------------------------

    @property
    def direct(self) -> bool:
        """Whether reads and writes go past the page cache."""
        return self._scratch.direct

    @property
    def fallback_reason(self) -> str | None:
        """Why they do not, in words; None if they do."""
        return self._scratch.fallback_reason

    @property
    def directory(self) -> str:
        """The absolute path of the directory that the file is in."""
        return self._scratch.directory

    @property
    def block_nbytes(self) -> int:
        """What a payload's length should be a multiple of, for no byte to be copied or padded."""
        return self._scratch.block

    @property
    def bytes_in_use(self) -> int:
        """Bytes of the file that are reserved now, headers and padding included."""
        return self._extents.in_use

    @property
    def peak_bytes(self) -> int:
        """The most bytes that were reserved at once."""
        return self._extents.peak

    @property
    def bytes_written(self) -> int:
        """Payload bytes written."""
        return self._ledger.bytes_written

    @property
    def bytes_read(self) -> int:
        """Payload bytes read."""
        return self._ledger.bytes_read

    def item_nbytes(self, nbytes: int) -> int:
        """What an item of `nbytes` takes of the file, header and padding included."""
        return self._file.size_of(nbytes)

    def fileno(self) -> int:
        """The file's descriptor, for looking at; it is closed with the tier."""
        return self._scratch.fd

    # The tier --------------------------------------------------------------------------------

    def reserve(self, key: Key, nbytes: int) -> None:
        """Find room for an item of up to `nbytes`.

        Raises:
            StorageFull: The disk has no more room, or the limit is reached.
            StateError: The key has room already, or the tier is closed.
        """
        for late in self._ledger.take_late():
            self._give_back(late)
        entry = self._ledger.add(key, nbytes)
        size = self._file.size_of(nbytes)
        try:
            entry.offset = self._find_room(size)
        except OSError as error:
            self._ledger.remove(key)
            raise self._explained(error, f"{key} needs {format_bytes(size)}") from error

    def write(self, key: Key, data: Bytes) -> None:
        """Write an item of at most the length reserved; `data` is free again on return.

        Raises:
            StorageFull, StorageError: It was not written; what was there before is void too.
        """
        block.require_bytes(data)
        entry, written = self._ledger.begin_write(key, data.nbytes), None
        try:
            header = block.header(self.run_id, key, entry.sequence, data)
            self._file.write(entry.offset, data, header)
            if self._behind is not None:
                self._behind.written(entry.offset, self._file.size_of(data.nbytes))
            written = data.nbytes
        except OSError as error:
            raise self._explained(error, self._describe("write", entry, data.nbytes)) from error
        finally:
            self._ledger.end(entry, written=written)

    def read(self, key: Key, out: Bytes) -> None:
        """Fill `out`, which has the very length that was written, and check it.

        Raises:
            DamagedBlock: The bytes are not those that were written; `out` holds garbage.
            StorageError: The system could not read them.
        """
        block.require_bytes(out, writeable=True)
        entry, read = self._ledger.begin_read(key, out.nbytes), None
        try:
            found = self._file.read(entry.offset, out, block.HEADER_NBYTES)
            if self._behind is not None:
                self._behind.read(entry.offset, self._file.size_of(out.nbytes))
            self._check(entry, out, found)
            read = out.nbytes
        except DamagedBlock:
            raise
        except OSError as error:
            raise self._explained(error, self._describe("read", entry, out.nbytes)) from error
        finally:
            self._ledger.end(entry, read=read)

    def release(self, key: Key) -> None:
        """Give the item's room back; where a transfer is using it, as soon as that has ended."""
        entry = self._ledger.remove(key)
        if entry is not None:
            self._give_back(entry)

    def close(self) -> None:
        """Close the file, which is the end of it; idempotent.  A transfer still under way is let end first."""
        self._ledger.close()

    # Inside ----------------------------------------------------------------------------------

    def _check(self, entry: Entry, out: Bytes, found: bytes | None) -> None:
        expected = block.header(self.run_id, entry.key, entry.sequence, out)
        if found == expected:
            return
        what = "the file ends before it does" if found is None else block.difference(expected, found)
        raise DamagedBlock(
            f"{self._describe('read', entry, out.nbytes)} brought a damaged block: {what}; "
            "it has to be computed again from an earlier snapshot, and the disk should be looked at"
        )

    def _describe(self, verb: str, entry: Entry, nbytes: int) -> str:
        return f"to {verb} {entry.key} ({format_bytes(nbytes)} at offset {entry.offset} of {self._scratch})"

    def _explained(self, error: OSError, asked: str) -> StorageError:
        """The same failure in our words, its errno kept."""
        if isinstance(error, StorageError):
            return error
        why = error.strerror or str(error)
        if error.errno in _FULL:
            return StorageFull(
                error.errno, f"{asked}, but {why} ({self.directory}); free some, or use another directory"
            )
        return StorageError(error.errno, f"{asked} failed: {why}; see to the disk, or use another directory")

    def _find_room(self, size: int) -> int:
        offset = self._extents.reuse(size)
        if offset is not None:
            return offset
        try:
            self._grow(self._extents.end + size, size)
        except OSError as error:
            if not isinstance(error, StorageFull) and error.errno not in _FULL:
                raise
            end, offset = self._extents.end, self._extents.carve(size)
            if offset is not None:
                return offset
            if self._extents.end == end:  # looking for a piece may have lowered it
                raise
            self._grow(self._extents.end + size, size)
        return self._extents.append(size)

    def _grow(self, least: int, size: int) -> None:
        """Grow the file to `least` bytes, and in advance by some more where there is room."""
        if least <= self.file_bytes:
            return
        if self.limit is not None and least > self.limit:
            raise StorageFull(
                errno.EDQUOT,
                f"room for {format_bytes(size)} would grow {self._scratch} past {self._allowed(self.limit)}",
            )
        ahead = min(self._growth, max(LEAST_GROWTH_NBYTES, _GROWTH_ITEMS * size))
        while True:
            wanted = max(least, self.file_bytes + ahead)
            wanted = wanted if self.limit is None else min(wanted, self.limit)
            try:
                self._allocate(wanted)
            except OSError as error:
                with contextlib.suppress(OSError):  # a failed attempt may have taken all there was
                    os.ftruncate(self._scratch.fd, self.file_bytes)
                if error.errno not in _FULL or wanted == least:
                    raise
                ahead = self._growth = ahead // 2 if ahead > LEAST_GROWTH_NBYTES // 64 else 0
            else:
                self.file_bytes = wanted
                return

    def _allowed(self, limit: int) -> str:
        """Which limit this is, and what to do about it."""
        if limit == self._stated_limit:
            return f"its limit of {format_bytes(limit)}; raise the limit"
        return (
            f"the {format_bytes(limit)} that were free there when the run began, less a reserve; free some, or use "
            "another directory"
        )

    def _allocate(self, nbytes: int) -> None:
        try:
            linux.allocate(self._scratch.fd, self.file_bytes, nbytes - self.file_bytes)
        except OSError as error:
            if error.errno not in _CANNOT_ALLOCATE:
                raise
            os.ftruncate(self._scratch.fd, nbytes)  # a sparse file, which may be full only when it is written

    def _give_back(self, entry: Entry) -> None:
        self._extents.give_back(entry.offset, self._file.size_of(entry.nbytes))


def _close(file: OpenFile) -> None:
    with contextlib.suppress(OSError):  # it is closed all the same, and nobody waits for what was in it
        file.close()
