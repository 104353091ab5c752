"""The files of resumable runs in a directory: named, private, locked, listed, removed.

Owns names, modes and locks; must not know what a run writes into its files.  A run called
NAME has two: ``NAME.longtape-journal``, which is locked as long as the run is going on, and
``NAME.longtape-data``.

Invariants: a file that does not begin as Longtape's is never changed and never removed; the
lock ends with the process that took it, however it ends, and children that it forks do
not hold it; the journal is closed only when nobody is writing to it, for its number may be
another file's next.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import stat
import threading
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from longtape.durable import journal
from longtape.durable.journal import Journal, Record
from longtape.errors import ResumeError, StorageError, UsageError
from longtape.tiers.openfile import OpenFile, open_file

JOURNAL, DATA = ".longtape-journal", ".longtape-data"
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._+=-]{0,127}")
_homes: weakref.WeakSet[Home] = weakref.WeakSet()


class UnreadableJournal(StorageError):
    """The system could not read a journal; nothing is known of what it holds."""


class Home:
    """One run's files, found or made, and locked until `close`.

    Args:
        directory: Where; made if it is missing.
        name: Of the run.

    Raises:
        UsageError: The directory cannot be used, or the name cannot be a file's.
        ResumeError: Another run has the files open, or a file in their place is not Longtape's.
        StorageError: The system failed otherwise.
    """

    def __init__(self, directory: str | os.PathLike[str], name: str) -> None:
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            raise UsageError(f"a run's name is made of letters, digits and ._+=-, not {name!r}")
        self.directory, self.name = os.path.abspath(os.fspath(directory)), name
        self.first: Record | None = None
        """What the journal began with when it was opened."""
        self.is_damaged = False
        """The journal held something, and nothing of it can be read."""
        self.torn_nbytes = 0
        """How much there is behind the last record that can be read; some, where an append was cut off."""
        self._first_end = self._end = self._count = 0
        self._guard = threading.Lock()
        self._users, self._closing = 0, False
        try:
            os.makedirs(self.directory, mode=0o700, exist_ok=True)
            self._file: OpenFile | None = _open_locked(self.journal_path, name)
        except OSError as error:
            raise StorageError(
                error.errno, f"{self.directory} cannot hold a resumable run: {error.strerror}; name another directory"
            ) from error
        _homes.add(self)
        try:
            self._read()
        except BaseException:
            self.close()
            raise

    @property
    def journal_path(self) -> str:
        """Of the journal."""
        return os.path.join(self.directory, self.name + JOURNAL)

    @property
    def data_path(self) -> str:
        """Of the scratch file."""
        return os.path.join(self.directory, self.name + DATA)

    @property
    def _fd(self) -> int:
        """The journal's descriptor; below 0 where it is closed."""
        return -1 if self._file is None else self._file.fileno()

    def _read(self) -> None:
        try:
            for record, end in journal.read(self._fd):
                if self.first is None:
                    self.first, self._first_end = record, end
                self._end, self._count = end, self._count + 1
                del record  # before the next one is read
            self.torn_nbytes = os.fstat(self._fd).st_size - self._end
            self.is_damaged = self.first is None and self.torn_nbytes > 0
            if self.is_damaged and not _begins_as_ours(self._fd):
                raise ResumeError(f"{self.journal_path} is not a journal of Longtape; move it, or use another name")
        except OSError as error:
            raise self._unreadable(error) from error

    def _unreadable(self, error: OSError) -> UnreadableJournal:
        return UnreadableJournal(
            error.errno,
            f"{self.journal_path} cannot be read: {error.strerror}; try again, and see to the disk if it does not help",
        )

    def later(self) -> Iterator[Record]:
        """The records after the first, one at a time.  Raises `StorageError`."""
        if self.first is None:
            return
        try:
            for record, _ in journal.read(self._fd, after=(self.first, self._first_end)):
                yield record
                del record
        except OSError as error:
            raise self._unreadable(error) from error

    @property
    def data_nbytes(self) -> int:
        """Length of the scratch file; 0 where there is none."""
        try:
            return os.stat(self.data_path, follow_symlinks=False).st_size
        except OSError:
            return 0

    def journal(self, run_id: bytes) -> Journal:
        """To append to what there is, while `in_use`."""
        return Journal(self._fd, run_id, end=self._end, count=self._count)

    @contextlib.contextmanager
    def in_use(self) -> Iterator[None]:
        """The files stay open and locked meanwhile; a `close` that comes is made up for at the end.

        Raises:
            StorageError: They are closed already.
        """
        with self._guard:
            if self._fd < 0 or self._closing:
                raise StorageError(errno.EBADF, f"the run {self.name!r} was given up; nothing more is made durable")
            self._users += 1
        try:
            yield
        finally:
            with self._guard:
                self._users -= 1
                file = self._let_go() if self._closing else None
            _close(file)

    def sync_directory(self) -> None:
        """Make the names of the files durable.  Raises `OSError`."""
        fd = os.open(self.directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)

    def reopen(self) -> None:
        """Take the lock again after `close`.  Raises as making one does."""
        with self._guard:
            if self._closing and self._fd >= 0:
                raise StorageError(
                    errno.EBUSY,
                    f"storage has not answered, and the run {self.name!r} is held until it does; try again later, or "
                    "use another name",
                )
            self._closing = False
        if self._fd < 0:
            try:
                self._file = _open_locked(self.journal_path, self.name)
            except OSError as error:
                raise self._unreadable(error) from error

    def clear(self) -> None:
        """Forget the run, and keep the lock: what comes is a new one.  Raises `StorageError`."""
        try:
            os.ftruncate(self._fd, 0)
            os.fdatasync(self._fd)
            self.first, self.is_damaged = None, False
            self._end = self._count = 0
            _remove(self.data_path)
        except OSError as error:
            raise StorageError(
                error.errno,
                f"{self.data_path} cannot be removed: {error.strerror}; remove it by hand, or use another name",
            ) from error

    def remove(self) -> list[str]:
        """The run has ended: remove its files.  `close` gives up the lock.

        Returns:
            The paths of those that could not be removed.
        """
        left: list[str] = []
        if self._fd >= 0:
            # The journal goes first: without it nobody takes the data for a run that can be gone on with.
            for path in (self.journal_path, self.data_path):
                try:
                    _remove(path)
                except OSError:
                    left.append(path)
        return left

    def close(self) -> None:
        """Leave the files as they are, and give up the lock, once nobody uses them; idempotent."""
        with self._guard:
            self._closing = True
            file = None if self._users else self._let_go()
        _close(file)

    def _let_go(self) -> OpenFile | None:
        file, self._file = self._file, None
        return file


def _open_locked(path: str, name: str) -> OpenFile:
    """The journal, made if it is missing, locked for this process alone."""
    while True:
        file = open_file(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK)
        fd = file.fileno()
        try:
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                raise ResumeError(f"{path} is no regular file; move it, or use another name")
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_at(path, fd):
                return file
        except BlockingIOError:
            holder = _holder(fd)
            file.close()
            raise ResumeError(
                f"the run {name!r} in {os.path.dirname(path)} is going on in another sweep ({holder}); wait for it, "
                "or give this one another name"
            ) from None
        except BaseException:
            file.close()
            raise
        file.close()  # it was removed, by a run that ended, between being opened and being locked


def _is_at(path: str, fd: int) -> bool:
    with contextlib.suppress(FileNotFoundError):
        there, ours = os.stat(path, follow_symlinks=False), os.fstat(fd)
        return (there.st_dev, there.st_ino) == (ours.st_dev, ours.st_ino)
    return False


def _holder(fd: int) -> str:
    """Who holds the lock, as far as the system tells."""
    inode = os.fstat(fd).st_ino
    with contextlib.suppress(OSError, ValueError):
        for line in Path("/proc/locks").read_text(encoding="ascii").splitlines():
            fields = line.split()
            if len(fields) > 5 and fields[1] == "FLOCK" and fields[5].rpartition(":")[2] == str(inode):
                return "this process" if int(fields[4]) == os.getpid() else f"process {fields[4]}"
    return "another process"


def _begins_as_ours(fd: int) -> bool:
    """Whether a journal without one sound record may be ours: empty, torn while it was begun, or zeros."""
    begin = journal.exactly(fd, min(len(journal.MAGIC), os.fstat(fd).st_size), 0)
    return journal.MAGIC.startswith(begin) or not any(begin)


def _remove(path: str) -> None:
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)


def _close(file: OpenFile | None) -> None:
    """What a closing file has to complain of comes too late to matter: what had to be durable was synced."""
    if file is not None:
        with contextlib.suppress(OSError):
            file.close()


def _leave_to_parent() -> None:
    for home in list(_homes):
        _close(home._let_go())  # the guard may be held by a thread that the child has not


os.register_at_fork(after_in_child=_leave_to_parent)


# Leftovers ----------------------------------------------------------------------------------------


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
        left = _leftover(os.path.abspath(directory), name) if _NAME.fullmatch(name) else None
        if left is not None:
            found.append(left)
    return found


def _leftover(directory: str, name: str) -> Leftover | None:
    paths: list[str] = []
    records: list[Record] = []
    held = False
    journal_path, data_path = (os.path.join(directory, name + suffix) for suffix in (JOURNAL, DATA))
    with contextlib.suppress(OSError), _opened(journal_path) as fd:
        held = not _can_lock(fd)
        for record, _ in journal.read(fd):
            records[1:] = [record] if records else []
            records = records or [record]
            del record
        if not records and not _begins_as_ours(fd):
            return None
        paths.append(journal_path)
    with contextlib.suppress(OSError), _opened(data_path) as fd:
        if paths or _is_data(fd):
            paths.append(data_path)
    if not paths:
        return None
    stats = [os.stat(path, follow_symlinks=False) for path in paths]
    return Leftover(
        name,
        tuple(paths),
        sum(512 * s.st_blocks for s in stats),
        stats[0].st_mtime,
        held,
        tuple(records),
    )


def remove_leftover(left: Leftover) -> bool:
    """Remove a leftover's files, unless a process holds them now; whether it did."""
    try:
        with _opened(left.paths[0]) as fd:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            for path in left.paths:
                _remove(path)
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.ENOENT):
            return False
        raise StorageError(error.errno, f"{left.paths[0]} cannot be removed: {error.strerror}") from error
    return True


@contextlib.contextmanager
def _opened(path: str):  # type: ignore[no-untyped-def]
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise OSError(errno.EINVAL, "no regular file")
        yield fd
    finally:
        os.close(fd)


def _can_lock(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _is_data(fd: int) -> bool:
    """Whether a file without a journal begins as a scratch file of ours."""
    return journal.exactly(fd, 8, 0) == b"LONGTAPE"
