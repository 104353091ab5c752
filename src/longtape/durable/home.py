"""The files of resumable runs in a directory: named, private, locked, listed, removed.

Owns names, modes and locks; must not know what a run writes into its files.  A run called
NAME has two: ``NAME.longtape-journal``, which is locked as long as the run is going on, and
``NAME.longtape-data``.

Invariants: a file that does not begin as Longtape's, or is not this user's alone, is never
changed and never removed, nor is one that has taken the name of ours; the lock ends with the
process that took it, however it ends, and children that it forks do not hold it; the journal
is closed only when nobody is writing to it, for its number may be another file's next.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import threading
import time
import weakref
from collections.abc import Iterator
from pathlib import Path

from longtape.durable import journal
from longtape.durable.journal import Journal, Record
from longtape.errors import ResumeError, StorageError, UsageError
from longtape.tiers import owned
from longtape.tiers.block import MAGIC as DATA_MAGIC
from longtape.tiers.openfile import OpenFile

JOURNAL, DATA = ".longtape-journal", ".longtape-data"
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._+=-]{0,127}")
_THIS, _ANOTHER = "this process", "another process"
_PATIENCE_SECONDS = 1.0
"""For a run of this process to give up its lock."""
_SECTOR = 512
"""Of a disk: the power may go when only some of those of a write are there."""
_UNUSABLE = (errno.EACCES, errno.EPERM, errno.EROFS)
_OTHER = "name another directory"
_homes: weakref.WeakSet[Home] = weakref.WeakSet()


class UnreadableJournal(StorageError):
    """The system could not read a journal; nothing is known of what it holds."""


class Home:
    """One run's files, found or made, and locked until `close`.

    Args:
        directory: Where; must exist.
        name: Of the run.

    Raises:
        UsageError: The directory cannot be used, or the name cannot be a file's.
        ResumeError: Another run has the files open, or a file in their place is not Longtape's, or not this user's.
        StorageError: The system failed otherwise.
    """

    def __init__(self, directory: str | os.PathLike[str], name: str) -> None:
        if not is_name(name):
            raise UsageError(f"a run's name is made of letters, digits and ._+=-, not {name!r}")
        self.directory, self.name = os.path.abspath(os.fspath(directory)), name
        self.first: Record | None = None
        """What the journal began with when it was opened."""
        self.is_damaged = False
        """The journal held something, and nothing of it can be read."""
        self.torn_nbytes = 0
        """How much there is behind the last record that can be read; some, where an append was cut off."""
        self._run_id: bytes | None = None
        self._first_end = self._end = self._count = 0
        self.is_believed = False
        """What is there is of this process, or was found to be of the run that goes on: it may be cleared."""
        self._guard = threading.Lock()
        self._users, self._closing = 0, False
        self._file: OpenFile | None = None
        try:
            _require_directory(self.directory)
            self._file = self._open_locked()
        except OSError as error:
            if error.errno in _UNUSABLE:
                raise UsageError(f"{self.directory} cannot hold a resumable run: {error.strerror}; {_OTHER}") from error
            raise StorageError(
                error.errno, f"{self.directory} cannot hold a resumable run: {error.strerror}; {_OTHER}"
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
            if self.is_damaged and not begins_as_journal(self._fd):
                raise ResumeError(
                    f"{self.journal_path} is not a journal of Longtape, or damaged where it begins, or of another "
                    "version; move it, or use another name"
                )
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
        self._run_id = run_id
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

    def is_in_place(self, data: owned.Identity) -> bool:
        """Whether the journal and this data file still have their names in the directory that was named."""
        try:
            return owned.is_at(self.journal_path, owned.identity(self._fd)) and owned.is_at(self.data_path, data)
        except OSError:
            return True  # the system cannot tell now

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
                self._file = self._open_locked()
                self._reread()
            except OSError as error:
                raise self._unreadable(error) from error

    def _reread(self) -> None:
        """What was read before counts only if it is still there: another run may have come and gone."""
        found = next(journal.read(self._fd), None)
        if found is not None and found[0].run_id not in (self._run_id, self.first and self.first.run_id):
            raise ResumeError(
                f"another run was begun as {self.name!r} in {self.directory} meanwhile; give this one another name"
            )

    def clear(self) -> None:
        """Forget the run, and keep the lock: what comes is a new one.

        Raises:
            ResumeError: In the place of the data is a file that is not Longtape's, or not this user's.
            StorageError: The system refuses.
        """
        try:
            data = self._old_data()
            os.ftruncate(self._fd, 0)
            os.fdatasync(self._fd)
            self.first, self.is_damaged, self.is_believed = None, False, True
            self._end = self._count = 0
            if data is not None:
                owned.remove(self.data_path, data)
        except OSError as error:
            raise StorageError(
                error.errno,
                f"{self.data_path} cannot be removed: {error.strerror}; remove it by hand, or use another name",
            ) from error

    def _old_data(self) -> owned.Identity | None:
        """The data file that is there.  Raises as `clear` does."""
        try:
            file = owned.open_owned(self.data_path)
        except FileNotFoundError:
            return None
        try:
            if not begins_as_data(file.fileno()):
                raise ResumeError(f"{self.data_path} is not a data file of Longtape; move it, or use another name")
            return owned.identity(file.fileno())
        finally:
            _close(file)

    def remove(self, data: owned.Identity) -> list[str]:
        """The run has ended: remove its files, and no others that have taken their names.  `close` gives up the lock.

        Args:
            data: Which file the data is in.

        Returns:
            The paths of those that could not be removed.
        """
        left: list[str] = []
        if self._fd >= 0:
            journal_path = owned.where(self._fd, self.journal_path)
            data_path = os.path.join(os.path.dirname(journal_path), self.name + DATA)
            # The journal goes first: without it nobody takes the data for a run that can be gone on with.
            for path, which in ((journal_path, owned.identity(self._fd)), (data_path, data)):
                try:
                    owned.remove(path, which)
                except OSError:
                    left.append(path)
        return left

    def close(self) -> None:
        """Leave the files as they are, and give up the lock, once nobody uses them; idempotent.

        A journal that nothing was written to is removed.
        """
        with self._guard:
            self._closing = True
            file = None if self._users else self._let_go()
        _close(file)

    def _let_go(self) -> OpenFile | None:
        file, self._file = self._file, None
        if file is not None:
            with contextlib.suppress(OSError):
                if not os.fstat(file.fileno()).st_size:
                    owned.remove(self.journal_path, owned.identity(file.fileno()))
        return file

    def _open_locked(self) -> OpenFile:
        """The journal, made if it is missing, locked for this process alone."""
        until = time.monotonic() + _PATIENCE_SECONDS
        while True:
            file = owned.open_owned(self.journal_path, makes=True)
            fd = file.fileno()
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if owned.is_at(self.journal_path, owned.identity(fd)):
                    return file
            except BlockingIOError:
                holder = _holder(fd)
                file.close()
                if holder in (_THIS, _ANOTHER) and time.monotonic() < until:
                    time.sleep(0.01)  # a run that was dropped gives up its lock once its point has ended
                    continue
                raise ResumeError(
                    f"the run {self.name!r} in {self.directory} is going on in another sweep ({holder}); wait for "
                    "it, or give this one another name"
                ) from None
            except BaseException:
                file.close()
                raise
            file.close()  # it was removed, by a run that ended, between being opened and being locked


def is_name(name: object) -> bool:
    """Whether a run can be called so."""
    return isinstance(name, str) and _NAME.fullmatch(name) is not None


def _require_directory(directory: str) -> None:
    if not os.path.isdir(directory):
        what = "is not a directory" if os.path.exists(directory) else "does not exist"
        raise UsageError(f"a run is to be made durable in {directory}, which {what}; make it first, or name another")


def _holder(fd: int) -> str:
    """Who holds the lock, as far as the system tells."""
    inode = os.fstat(fd).st_ino
    with contextlib.suppress(OSError, ValueError):
        for line in Path("/proc/locks").read_text(encoding="ascii").splitlines():
            fields = line.split()
            if len(fields) > 5 and fields[1] == "FLOCK" and fields[5].rpartition(":")[2] == str(inode):
                return _THIS if int(fields[4]) == os.getpid() else f"process {fields[4]}"
    return _ANOTHER


def begins_as_journal(fd: int) -> bool:
    """Whether a journal without one sound record is ours: empty, torn while it was begun, damaged later, or zeros."""
    begin = journal.exactly(fd, min(_SECTOR, os.fstat(fd).st_size), 0)
    return not any(begin) or journal.MAGIC.startswith(begin) or journal.begins_sound(begin)


def begins_as_data(fd: int) -> bool:
    """The same of the other file."""
    begin = journal.exactly(fd, min(_SECTOR, os.fstat(fd).st_size), 0)
    return not any(begin) or begin.startswith(DATA_MAGIC)


def _close(file: OpenFile | None) -> None:
    """What a closing file has to complain of comes too late to matter: what had to be durable was synced."""
    if file is not None:
        with contextlib.suppress(OSError):
            file.close()


def _leave_to_parent() -> None:
    for home in list(_homes):  # whose guard may be held by a thread that the child has not
        _close(home._file)
        home._file = None


os.register_at_fork(after_in_child=_leave_to_parent)
