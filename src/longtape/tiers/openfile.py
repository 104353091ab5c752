"""Open files that cannot be lost.

Owns the opening of every file that a run keeps open.  An interrupt may come between any two
instructions: a number that `os.open` has returned is lost if it comes before the number is noted.
Here the system's call and the object that closes the file are one.  Any thread may call.

Invariant: the file is closed when the object is, or when nobody refers to it.
"""

from __future__ import annotations

import io
import os


class OpenFile(io.FileIO):
    """An open file; closed without a word when it is garbage."""

    __del__ = io.FileIO.close  # and not a function in Python, which an interrupt could end


def open_file(path: str, flags: int, mode: int = 0o600) -> OpenFile:
    """As `os.open`.  Raises `OSError`."""
    # One step of `map` runs both calls, and no instruction of Python's comes between them.
    return next(map(OpenFile, map(os.open, (path,), (flags | os.O_CLOEXEC,), (mode,)), ("r+b",)))
