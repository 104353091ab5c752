"""What resumable runs have left in a directory: listed, and removed when asked.

Owns nothing that a run needs; changes nothing but in `remove_leftover`.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
from collections.abc import Iterator
from dataclasses import dataclass

from longtape.durable import journal
from longtape.durable.home import DATA, JOURNAL, begins_as_data, begins_as_journal, is_name
from longtape.durable.journal import Record
from longtape.errors import ResumeError, StorageError, UsageError
from longtape.tiers import owned


@dataclass(frozen=True, slots=True)
class Leftover:
    """Files of a run that has not ended well, or has not ended."""

    name: str
    paths: tuple[str, ...]
    nbytes: int
    """Disk space of its files."""
    modified: float
    """When the journal was last written, or the data where there is no journal; seconds since the epoch."""
    held: bool
    """A process is working on it."""
    records: tuple[Record, ...]
    """The first and, where there are more, the last of the journal."""
    identities: tuple[owned.Identity, ...]
    """Which files had these paths when they were listed."""


def leftovers(directory: str | os.PathLike[str]) -> list[Leftover]:
    """The resumable runs that have files in a directory, by name; changes nothing.

    Raises:
        UsageError: The directory cannot be read.
    """
    try:
        names = sorted(os.listdir(directory))
    except OSError as error:
        raise UsageError(f"{os.fspath(directory)} cannot be read: {error.strerror}") from error
    found = []
    for name in sorted({n[: -len(suffix)] for n in names for suffix in (JOURNAL, DATA) if n.endswith(suffix)}):
        left = _leftover(os.path.abspath(directory), name) if is_name(name) else None
        if left is not None:
            found.append(left)
    return found


def _leftover(directory: str, name: str) -> Leftover | None:
    paths: list[str] = []
    found: list[os.stat_result] = []
    records: list[Record] = []
    held = False
    journal_path, data_path = (os.path.join(directory, name + suffix) for suffix in (JOURNAL, DATA))
    with contextlib.suppress(OSError, ResumeError), _opened(journal_path) as fd:
        held = not _can_lock(fd)
        for record, _ in journal.read(fd):
            records[1:] = [record] if records else []
            records = records or [record]
            del record
        if not records and not begins_as_journal(fd):
            return None
        paths.append(journal_path)
        found.append(os.fstat(fd))
    with contextlib.suppress(OSError, ResumeError), _opened(data_path) as fd:
        if begins_as_data(fd):
            paths.append(data_path)
            found.append(os.fstat(fd))
    if not paths:
        return None
    return Leftover(
        name,
        tuple(paths),
        sum(512 * s.st_blocks for s in found),
        found[0].st_mtime,
        held,
        tuple(records),
        tuple((s.st_dev, s.st_ino) for s in found),
    )


def remove_leftover(left: Leftover) -> bool:
    """Remove a leftover's files, unless a process holds them, or others have their names now; whether it did.

    Raises:
        StorageError: The system refuses.
    """
    try:
        with _opened(left.paths[0]) as fd:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if owned.identity(fd) != left.identities[0]:
                return False
            removed = [owned.remove(path, which) for path, which in zip(left.paths, left.identities, strict=True)]
            return any(removed)
    except ResumeError:
        return False
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.ENOENT):
            return False
        raise StorageError(error.errno, f"{left.paths[0]} cannot be removed: {error.strerror}") from error


@contextlib.contextmanager
def _opened(path: str) -> Iterator[int]:
    file = owned.open_owned(path)
    try:
        yield file.fileno()
    finally:
        file.close()


def _can_lock(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        return False
    return True
