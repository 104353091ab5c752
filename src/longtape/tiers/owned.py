"""Files with a name that are this user's alone, and the removal of just those.

Owns what makes a file found by its name one to go on with, and what may be unlinked.  A name
says little: another run, or the user, may have given it to another file since.

Invariants: a file of another user, with a second name, or that others may write to is
never read, changed or removed; what is removed is the file that was opened.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat

from longtape.errors import ResumeError
from longtape.tiers.openfile import OpenFile, open_file

_FOREIGN = (errno.ELOOP, errno.ENXIO, errno.EISDIR)
"""What `open` says of symbolic links, sockets and directories."""

Identity = tuple[int, int]
"""Of a file, as long as it is open: its device and number."""


def open_owned(path: str, *, makes: bool = False) -> OpenFile:
    """Open a file that is there, or made if it is missing.

    Raises:
        ResumeError: It is not a file of this user alone; says why.
        OSError: The system refuses.
    """
    try:
        file = open_file(path, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | (os.O_CREAT if makes else 0))
    except OSError as error:
        if error.errno in _FOREIGN:
            raise ResumeError(f"{path} is no regular file; move it, or use another name") from None
        raise
    try:
        require_owned(file.fileno(), path)
    except BaseException:
        file.close()
        raise
    return file


def require_owned(fd: int, path: str) -> None:
    """Refuse what may be somebody else's.

    Raises:
        ResumeError: It is no regular file, another user's, linked twice, or others may write to it.
    """
    found = os.fstat(fd)
    if not stat.S_ISREG(found.st_mode):
        raise ResumeError(f"{path} is no regular file; move it, or use another name")
    if found.st_uid != os.geteuid():
        raise ResumeError(
            f"{path} belongs to user {found.st_uid}, and this process runs as user {os.geteuid()}; use another name, "
            "or a directory of your own"
        )
    if found.st_nlink > 1:
        raise ResumeError(
            f"{path} has {found.st_nlink} links, and may be another file's; remove them, or use another name"
        )
    if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise ResumeError(
            f"others may write to {path} (mode {found.st_mode & 0o777:o}); chmod 600 it if you trust it, or use "
            "another name"
        )


def identity(fd: int) -> Identity:
    """Of an open file."""
    found = os.fstat(fd)
    return found.st_dev, found.st_ino


def is_at(path: str, which: Identity) -> bool:
    """Whether this file has the name now.  Raises `OSError` where the system cannot tell."""
    try:
        there = os.stat(path, follow_symlinks=False)
    except (FileNotFoundError, NotADirectoryError):
        return False
    return (there.st_dev, there.st_ino) == which


def where(fd: int, otherwise: str) -> str:
    """The path that an open file has now, wherever it was moved, as far as the system tells."""
    try:
        return os.readlink(f"/proc/self/fd/{fd}")
    except OSError:
        return otherwise


def remove(path: str, which: Identity) -> bool:
    """Remove this file, if it still has the name; whether it did.  Raises `OSError`."""
    if not is_at(path, which):
        return False
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)
    return True
