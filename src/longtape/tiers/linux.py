"""System calls that Python does not offer, or calls with the GIL: statx, fallocate, sync_file_range and madvise.

Owns the ctypes declarations; must not know what the file is for.  Any thread may call;
the calls release the GIL.

Invariant: where the system lacks a call, the answer is "not known" or a plain `OSError`
with ``ENOSYS``, never a crash.
"""

from __future__ import annotations

import ctypes
import errno
import os
from pathlib import Path

_libc = ctypes.CDLL(None, use_errno=True)
_offset = ctypes.c_int64

_AT_EMPTY_PATH = 0x1000
_STATX_DIOALIGN = 0x2000
_STATX_WORDS = 64  # struct statx is 256 bytes; we read words of 32 bits
_MASK, _DIO_MEM_ALIGN, _DIO_OFFSET_ALIGN = 0, 0x98 // 4, 0x9C // 4
_POPULATE_WRITE = 23
_SYNC_WRITE = 2
_SYNC_WAIT = 1 | 2 | 4  # wait for what is under way, write, wait


def direct_alignment(fd: int) -> tuple[int, int] | None:
    """What direct I/O on `fd` must be aligned to: (memory, file offset) in bytes.

    Zeros say that the file cannot do direct I/O; None that the system does not tell.
    """
    if not hasattr(_libc, "statx"):
        return None
    words = (ctypes.c_uint32 * _STATX_WORDS)()
    if _libc.statx(fd, b"", _AT_EMPTY_PATH, _STATX_DIOALIGN, words) != 0 or not words[_MASK] & _STATX_DIOALIGN:
        return None
    return words[_DIO_MEM_ALIGN], words[_DIO_OFFSET_ALIGN]


def allocate(fd: int, offset: int, nbytes: int) -> None:
    """Give the file `nbytes` of disk space from `offset` on, and grow it to hold them.

    ``os.posix_fallocate`` would, where the file system cannot, write to every block.

    Raises:
        OSError: ``ENOSPC``: no such space; ``EOPNOTSUPP`` or ``ENOSYS``: cannot be asked for here.
    """
    for name in ("fallocate64", "fallocate"):
        if hasattr(_libc, name):
            return _call(getattr(_libc, name), fd, 0, _offset(offset), _offset(nbytes))
    raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))


def begin_writeback(fd: int, offset: int, nbytes: int) -> None:
    """Have the kernel begin to write dirty pages of the range to the device; does not wait for it."""
    if hasattr(_libc, "sync_file_range"):
        _call(_libc.sync_file_range, fd, _offset(offset), _offset(nbytes), _SYNC_WRITE)


def finish_writeback(fd: int, offset: int, nbytes: int) -> None:
    """Wait until dirty pages of the range have gone to the device.  Raises `OSError` if they could not."""
    if hasattr(_libc, "sync_file_range"):
        _call(_libc.sync_file_range, fd, _offset(offset), _offset(nbytes), _SYNC_WAIT)
    else:
        os.fsync(fd)


def populate(address: int, nbytes: int) -> None:
    """Have the system provide the memory of whole pages, whose content stays as it is.

    Raises:
        OSError: ``EINVAL`` or ``ENOSYS``: cannot be asked for here.
    """
    if not hasattr(_libc, "madvise"):
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
    _call(_libc.madvise, ctypes.c_void_p(address), ctypes.c_size_t(nbytes), _POPULATE_WRITE)


def drop_cache(fd: int, offset: int, nbytes: int) -> None:
    """Have the kernel forget clean cached pages of the range."""
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(fd, offset, nbytes, os.POSIX_FADV_DONTNEED)


def _call(function: ctypes._NamedFuncPointer, *arguments: object) -> None:
    while function(*arguments) != 0:
        code = ctypes.get_errno()
        if code != errno.EINTR:
            raise OSError(code, os.strerror(code))


def file_system(fd: int) -> str | None:
    """The type of the file system that holds `fd`, such as ``"ext4"``; None if not known."""
    device = os.fstat(fd).st_dev
    wanted = f"{os.major(device)}:{os.minor(device)}"
    try:
        lines = Path("/proc/self/mountinfo").read_text(errors="replace").splitlines()
    except OSError:
        return None
    for line in lines:
        before, _, after = line.partition(" - ")
        if before.split()[2:3] == [wanted] and after:
            return after.split()[0]
    return None
