"""Interrupts that come at a chosen line of Longtape's, and what must not be left of a run afterwards."""

from __future__ import annotations

import dis
import fcntl
import gc
import mmap
import os
import sys
import threading
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any
from unittest import mock

import longtape
from longtape.tiers import aligned

_LOAD_CONST, _SWAP = dis.opmap["LOAD_CONST"], dis.opmap.get("SWAP", -1)
_POP_EXCEPT = dis.opmap["POP_EXCEPT"]
PACKAGE = str(Path(longtape.__file__).parent)
PATIENCE_SECONDS = 5.0
"""How long threads that are told to end may take."""


class Interrupt(KeyboardInterrupt):
    """Ours, and nobody else's."""


def lines_of(body: Callable[[], Any]) -> int:
    """How many lines of Longtape's this thread runs in it."""
    count = 0

    def noting(frame: FrameType) -> None:
        nonlocal count
        count += 1

    _traced(body, noting)
    return count


def interrupted(body: Callable[[], Any], at: int) -> str | None:
    """Run it with an interrupt before line `at`; where that was, or None if it ended before."""
    left, where = at, None

    def interrupting(frame: FrameType) -> None:
        nonlocal left, where
        left -= 1
        if left < 0:
            where = f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno} ({frame.f_code.co_name})"
            raise Interrupt  # Python stops tracing by itself

    try:
        _traced(body, interrupting)
    except Interrupt:
        pass
    except BaseException as error:  # what an interrupt in a callback was turned into
        if where is None:
            raise
        del error
    return where


def _is_exit(frame: FrameType) -> bool:
    """Whether a ``with`` or an ``except`` is about to be left in good order.

    Python looks for no interrupt before it has been.  One that a trace function raises where an ``except`` returns
    makes CPython 3.11 lose a reference to the exception, and with it all that its frames hold.
    """
    code, at = frame.f_code.co_code, frame.f_lasti
    at += 2 * (code[at] == _SWAP)  # below what is returned
    if code[at] == _POP_EXCEPT:
        return True
    return code[at] == _LOAD_CONST and code[at : at + 2] == code[at + 2 : at + 4] == code[at + 4 : at + 6]


def _traced(body: Callable[[], Any], at_line: Callable[[FrameType], None]) -> None:
    def local(frame: FrameType, event: str, argument: Any) -> Any:
        if event == "line" and not _is_exit(frame):
            at_line(frame)
        return local

    def called(frame: FrameType, event: str, argument: Any) -> Any:
        return local if frame.f_code.co_filename.startswith(PACKAGE) else None

    before = sys.gettrace()
    sys.settrace(called)
    try:
        body()
    finally:
        sys.settrace(before)


class Nothing:
    """What there was before: threads of ours, and open files; and the memory of slots that is mapped meanwhile."""

    def __init__(self) -> None:
        self._files = _open_files()
        self._mappings: list[weakref.ref[mmap.mmap]] = []

    def __enter__(self) -> Nothing:
        def noting(nbytes: int, alignment: int) -> Any:
            mapping, data = aligned.map_aligned(nbytes, alignment)
            self._mappings.append(weakref.ref(mapping))
            return mapping, data

        self._patch = mock.patch("longtape.tiers.pool.map_aligned", noting)
        self._patch.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._patch.stop()

    def left(self, *, collects: bool = True) -> list[str]:
        """What is left, once all references are gone and what is ending has ended."""
        until = time.monotonic() + PATIENCE_SECONDS
        while True:
            found = [thread.name for thread in threading.enumerate() if thread.name.startswith("longtape")]
            found += [name for number, name in _open_files().items() if self._files.get(number) != name]
            found += [f"{nbytes} bytes of slots" for nbytes in self._mapped()]
            if not found or time.monotonic() > until:
                return found
            if collects:
                gc.collect()
            time.sleep(0.002)

    def _mapped(self) -> list[int]:
        mappings = [mapping for ref in self._mappings if (mapping := ref()) is not None and not mapping.closed]
        return [len(mapping) for mapping in mappings]


def _open_files() -> dict[int, str]:
    found: dict[int, str] = {}
    for entry in os.listdir("/proc/self/fd"):
        try:
            name = os.readlink(f"/proc/self/fd/{entry}")
        except FileNotFoundError:
            continue
        if name.startswith("/") and not name.startswith(("/dev/", "/proc/", sys.prefix, sys.base_prefix)):
            found[int(entry)] = name
    return found


def locked(directory: str | os.PathLike[str]) -> list[str]:
    """Files in a directory that somebody has locked."""
    found = []
    for path in Path(directory).iterdir():
        with open(path, "rb") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                found.append(path.name)
    return found
