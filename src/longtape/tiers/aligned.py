"""Anonymous memory that starts at an aligned address.

Owns the mapping of it; must not know what it is for.  Any thread may call it.

Invariant: pages that nobody touches take no memory.
"""

from __future__ import annotations

import contextlib
import mmap

import numpy as np

from longtape.protocols import Bytes
from longtape.tiers import linux

HUGE_PAGE = 2 << 20


def address_of(data: Bytes) -> int:
    """The address of the first byte."""
    address: int = data.__array_interface__["data"][0]
    return address


def map_aligned(nbytes: int, alignment: int) -> tuple[mmap.mmap, Bytes]:
    """Map `nbytes` of private, zeroed memory.

    Mappings of 2 MiB and more ask for huge pages.  Direct I/O then hands the device a few
    large segments where there were hundreds of pages: on a virtual NVMe disk a 64 MiB write
    took a tenth of the CPU time, and ran at twice the speed.

    Args:
        nbytes: How many; zero gives an empty view of a mapping of one page.
        alignment: What the address of the first byte is a multiple of; a power of two.

    Returns:
        The mapping, and a view of the aligned part.  The memory goes when the last view and
        the mapping have gone.

    Raises:
        OSError: The system has not so much address space.
    """
    huge = nbytes >= HUGE_PAGE
    if huge:
        alignment = max(alignment, HUGE_PAGE)
    slack = alignment - mmap.PAGESIZE if alignment > mmap.PAGESIZE else 0
    # The default of Python's mmap is shared memory, which is not what a buffer wants.
    mapping = mmap.mmap(-1, max(nbytes, 1) + slack, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if huge and hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel without them
            mapping.madvise(mmap.MADV_HUGEPAGE)
    whole = np.frombuffer(mapping, dtype=np.uint8)
    start = -address_of(whole) % alignment
    return mapping, whole[start : start + nbytes]


def provide(data: Bytes) -> bool:
    """Have the system provide the pages that hold `data`, whose content stays as it is; False if it cannot be asked to.

    Others may use the memory meanwhile; but to map memory they wait until the call returns.
    """
    address = address_of(data)
    first = address - address % mmap.PAGESIZE
    try:
        linux.populate(first, -(-(address + data.nbytes - first) // mmap.PAGESIZE) * mmap.PAGESIZE)
    except OSError:
        return False
    return True
