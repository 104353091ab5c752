"""How much of a file system a run may take: what is free, less a reserve for everybody else."""

from __future__ import annotations

import os

RESERVED_SHARE, MOST_RESERVED_NBYTES = 0.05, 1 << 30
"""A run leaves free this share of the file system, and no more than these bytes."""


def usable_nbytes(directory: str | os.PathLike[str], *, beside: int = 0) -> int | None:
    """Bytes that a file in this directory may take, `beside` of which it has; None: the file system does not say."""
    try:
        found = os.statvfs(directory)
    except OSError:
        return None
    if not found.f_blocks:
        return None
    size, free = found.f_blocks * found.f_frsize, found.f_bavail * found.f_frsize
    return beside + max(0, free - min(int(RESERVED_SHARE * size), MOST_RESERVED_NBYTES))
