"""Arrays of any number and size as few blocks, and back.

Owns how they are grouped: small ones together, large ones alone, so that neither many
parameters nor large ones cost more than their bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from longtape.errors import DamagedBlock, StorageError
from longtape.protocols import Bytes

GROUP_NBYTES = 1 << 20

MOST_ARRAYS = 1 << 17
"""So that what is made of their sizes takes a few MiB, whatever a file says."""


def label(what: str, start: int, stop: int) -> Bytes:
    """Which steps the arrays are of, to go with them: what is read can then be held against what a journal says."""
    return np.frombuffer(f"{what} {start} {stop}".encode(), np.uint8)


def pack(arrays: Sequence[Bytes]) -> list[Bytes]:
    """Blocks that hold the arrays: first their sizes, then groups of them.

    An array that is alone in its group is not copied.

    Raises:
        StorageError: There are more than `MOST_ARRAYS`.
    """
    if len(arrays) > MOST_ARRAYS:
        raise StorageError(f"{len(arrays):,} arrays cannot be made durable at once; the most is {MOST_ARRAYS:,}")
    sizes = np.array([array.nbytes for array in arrays], "<i8").view(np.uint8)
    parts = [[arrays[k] for k in group] for group in _groups([array.nbytes for array in arrays])]
    return [sizes, *(part[0] if len(part) == 1 else np.concatenate(part) for part in parts)]


def unpack(nbytes: Sequence[int], read: Callable[[int, Bytes], None]) -> list[Bytes]:
    """The arrays.

    Args:
        nbytes: Length of each block.
        read: Fills an array with the block of this number.

    Raises:
        DamagedBlock: The blocks do not fit each other.
    """
    if not nbytes or nbytes[0] % 8 or nbytes[0] > 8 * MOST_ARRAYS:
        raise DamagedBlock("the sizes of what was made durable are missing")
    first = np.empty(nbytes[0], np.uint8)
    read(0, first)
    sizes = first.view("<i8").tolist()
    groups = _groups(sizes) if all(size >= 0 for size in sizes) else []
    if [sum(sizes[k] for k in group) for group in groups] != list(nbytes[1:]):
        raise DamagedBlock("the parts of what was made durable are of other sizes than they must be")
    arrays: list[Bytes] = []
    for number, group in enumerate(groups, start=1):
        block = np.empty(nbytes[number], np.uint8)
        read(number, block)
        arrays += np.split(block, np.cumsum([sizes[k] for k in group])[:-1])
    return arrays


def _groups(sizes: Sequence[int]) -> list[list[int]]:
    """Numbers of consecutive arrays that share a block."""
    groups: list[list[int]] = []
    held = 0
    for k, size in enumerate(sizes):
        if not groups or held + size > GROUP_NBYTES:
            groups.append([])
            held = 0
        groups[-1].append(k)
        held += size
    return groups
