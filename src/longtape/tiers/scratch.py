"""Opens the scratch file: anonymous, private to the user, with direct I/O where it works.

Owns the choice of flags and the finding of alignments; must not know what goes into
the file.  Entered once a run, by the executor's thread.

Invariants: an anonymous file has no name from the moment this returns, so nothing is left of
it however the process ends; `direct` is true only where an aligned block was written
and read back that way.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
from dataclasses import dataclass, replace

from longtape.errors import StorageError, UsageError
from longtape.tiers import linux
from longtape.tiers.aligned import map_aligned
from longtape.tiers.openfile import OpenFile, open_file
from longtape.tiers.owned import open_owned

_IN_MEMORY = frozenset({"tmpfs", "ramfs", "devtmpfs", "hugetlbfs"})
_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
_LEAST_BLOCK = 4096
_LARGEST_BLOCK = 65536
_REMEDY = "see to the disk, or name another directory"


@dataclass(frozen=True, slots=True)
class Scratch:
    """An open scratch file."""

    file: OpenFile
    directory: str
    direct: bool
    """Reads and writes go past the page cache."""
    fallback_reason: str | None
    """Why not, in words for the report."""
    in_memory: bool
    """The file system keeps its files in memory, which the user meant to save."""
    memory_alignment: int
    """What the address of a buffer must be a multiple of."""
    block: int
    """What offsets and lengths must be multiples of."""

    @property
    def fd(self) -> int:
        """The file's descriptor."""
        return self.file.fileno()

    def __str__(self) -> str:
        return f"the scratch file in {self.directory}"


def open_scratch(directory: str | os.PathLike[str], *, direct: bool | None = None) -> Scratch:
    """Open a new, empty scratch file.

    Args:
        directory: Where; must exist.
        direct: True: direct I/O or an error; False: buffered; None: direct where it works.

    Raises:
        UsageError: The directory is missing, is none, or cannot be written to; or direct I/O was demanded in vain.
        StorageError: The system failed otherwise.
    """
    path = os.path.abspath(os.fspath(directory))
    file = _open_anonymous(path)
    try:
        return _set_up(file, path, direct)
    except OSError as error:
        file.close()
        if isinstance(error, StorageError):
            raise
        raise StorageError(error.errno, f"the scratch file in {path} cannot be set up: {error}; {_REMEDY}") from error
    except BaseException:
        file.close()
        raise


def open_named(path: str, *, is_new: bool, direct: bool | None = None) -> Scratch:
    """Open a scratch file that has a name and stays when the process ends; otherwise like `open_scratch`.

    Args:
        path: Of the file, in a directory that exists.
        is_new: Make it, private to the user; else it must be there, this user's alone, and keeps what is in it.
        direct: As in `open_scratch`.

    Raises:
        UsageError: The directory cannot be used, or direct I/O was demanded in vain.
        ResumeError: The file that is there is not this user's alone.
        StorageError: The file cannot be opened.
    """
    trial = open_scratch(os.path.dirname(path), direct=direct)
    try:
        new = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
        file = open_file(path, new) if is_new else open_owned(path)
        try:
            _set_direct(file.fileno(), on=trial.direct)
            if not trial.direct:
                _expect_no_order(file.fileno())
        except BaseException:
            file.close()
            raise
    except OSError as error:
        raise StorageError(
            error.errno, f"the scratch file {path} cannot be opened: {error.strerror}; {_REMEDY}"
        ) from error
    finally:
        with contextlib.suppress(OSError):  # it is closed all the same
            trial.file.close()
    return replace(trial, file=file)


def _open_anonymous(path: str) -> OpenFile:
    if not os.path.isdir(path):
        what = "is not a directory" if os.path.exists(path) else "does not exist"
        raise UsageError(f"a scratch file is to be made in {path}, which {what}; name a directory you can write to")
    with contextlib.suppress(OSError, AttributeError):  # a file system, or a system, without O_TMPFILE
        # O_EXCL: nobody can give it a name later.
        return open_file(path, os.O_TMPFILE | os.O_EXCL | os.O_RDWR)
    name = os.path.join(path, f".longtape-{os.urandom(8).hex()}")
    try:
        file = open_file(name, os.O_CREAT | os.O_EXCL | os.O_RDWR)
        _unlink(name)
    except BaseException as error:
        with contextlib.suppress(OSError):  # an interrupt leaves no name behind
            os.unlink(name)
        if isinstance(error, StorageError) or not isinstance(error, OSError):
            raise
        if error.errno in _FULL | {errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EIO}:
            raise StorageError(
                error.errno, f"no scratch file can be made in {path}: {error.strerror}; {_REMEDY}"
            ) from error
        raise UsageError(
            f"no scratch file can be made in {path} ({error.strerror}); name a directory you can write to"
        ) from error
    return file


def _unlink(name: str) -> None:
    try:
        os.unlink(name)
    except OSError as error:
        raise StorageError(
            error.errno, f"the scratch file {name} cannot be made anonymous: {error}; {_REMEDY}"
        ) from error


def _set_up(file: OpenFile, path: str, direct: bool | None) -> Scratch:
    fd = file.fileno()
    in_memory = linux.file_system(fd) in _IN_MEMORY
    memory_alignment, block = _alignments(fd)
    reason: str | None = "not asked for"
    if direct is not False:
        reason = _refusal(fd, in_memory, memory_alignment, block)
        if reason is not None and direct:
            raise UsageError(f"direct I/O was asked for in {path}, but {reason}; use another directory, or direct=None")
    if reason is not None:
        _set_direct(fd, on=False)
        memory_alignment = 1
        _expect_no_order(fd)
    return Scratch(
        file=file,
        directory=path,
        direct=reason is None,
        fallback_reason=reason,
        in_memory=in_memory,
        memory_alignment=memory_alignment,
        block=block,
    )


def _expect_no_order(fd: int) -> None:
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)  # no reading ahead: we know what comes next


def _alignments(fd: int) -> tuple[int, int]:
    """Memory alignment, and block: never less than a page, or a file system would serialise writes."""
    memory, offset = linux.direct_alignment(fd) or (0, 0)
    preferred = os.fstat(fd).st_blksize
    if not _LEAST_BLOCK <= preferred <= _LARGEST_BLOCK or preferred & (preferred - 1):
        preferred = _LEAST_BLOCK
    return memory or _LEAST_BLOCK, max(offset, preferred)


def _refusal(fd: int, in_memory: bool, memory_alignment: int, block: int) -> str | None:
    """Switch direct I/O on and try it; why it does not work, or None if it does."""
    if in_memory:
        return f"the file system ({linux.file_system(fd)}) keeps its files in memory"
    if linux.direct_alignment(fd) == (0, 0):
        return f"the file system ({linux.file_system(fd)}) cannot do direct I/O on this file"
    if not hasattr(os, "O_DIRECT"):
        return "this system has no O_DIRECT"
    try:
        _set_direct(fd, on=True)
        return _try_block(fd, memory_alignment, block)
    except OSError as error:
        if error.errno in _FULL:
            return None  # no room to try; the first write will tell
        if error.errno == errno.EIO:
            raise
        return f"the file system ({linux.file_system(fd)}) refuses it ({error.strerror})"


def _try_block(fd: int, memory_alignment: int, block: int) -> str | None:
    _, buffer = map_aligned(2 * block, memory_alignment)
    out, back = buffer[:block], buffer[block:]
    out[:] = 0xA5
    try:
        if os.pwritev(fd, [out.data], 0) != block or os.preadv(fd, [back.data], 0) != block or (back != out).any():
            return "an aligned block did not come back as it was written"
        return None
    finally:
        os.ftruncate(fd, 0)


def _set_direct(fd: int, *, on: bool) -> None:
    direct = getattr(os, "O_DIRECT", 0)
    flags = fcntl.fcntl(fd, fcntl.F_GETFL)
    wanted = flags | direct if on else flags & ~direct
    if wanted != flags:
        fcntl.fcntl(fd, fcntl.F_SETFL, wanted)
