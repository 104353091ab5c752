"""A fixed number of equal, aligned memory slots, mapped once and used again and again.

Owns the memory and knows which slots are out; must not know what is in them.
Entered by the executor's thread only.

Invariants: every slot is free or out, never both; the slot given back last goes out
first, so that a run that needs few slots touches the pages of few.
"""

from __future__ import annotations

import contextlib
import mmap

import numpy as np

from longtape.errors import StateError, UsageError
from longtape.protocols import Bytes, Slot
from longtape.sizes import format_bytes
from longtape.tiers.aligned import map_aligned


class SlotPool:
    """`count` slots of `nbytes` bytes each.

    Pages are faulted in by the first write to them, so a slot that never goes out costs
    address space only.

    Args:
        count: How many slots; may be zero.
        nbytes: Length of each slot's `data`, in bytes.
        alignment: What the address of each slot is a multiple of, in bytes; a power of two.

    Raises:
        UsageError: A number makes no sense, or the system has not so much memory to map.
    """

    def __init__(self, count: int, nbytes: int, *, alignment: int = 4096) -> None:
        if count < 0 or nbytes < 0:
            raise UsageError(f"a pool of {count} slots of {nbytes} bytes cannot be; neither may be negative")
        if alignment < 1 or alignment & (alignment - 1):
            raise UsageError(f"the alignment of slots must be a power of two, not {alignment}")
        self.count, self.nbytes, self.alignment = count, nbytes, alignment
        self._stride = stride = -(-nbytes // alignment) * alignment
        try:
            self._mapping: mmap.mmap | None
            self._mapping, self._arena = map_aligned(count * stride, alignment)
        except (OSError, OverflowError, ValueError) as error:
            raise UsageError(
                f"a pool of {count} slots of {format_bytes(nbytes)} takes {format_bytes(count * stride)} of memory, "
                f"which the system refuses ({error}); ask for fewer slots"
            ) from error
        slots = [Slot(self._arena[k * stride : k * stride + nbytes]) for k in range(count)]
        self._all = frozenset(slots)
        self._free = slots[::-1]
        self._out: set[Slot] = set()
        self._closed = False
        self.high_water = 0
        """The most slots that were out at once."""

    @property
    def free(self) -> int:
        """How many slots `take` can still give out."""
        return len(self._free)

    def memory(self, count: int) -> Bytes:
        """The memory of those slots of a new pool that go out first, at most `count`."""
        self._require_open()
        return self._arena[: min(count, self.count) * self._stride]

    def take(self) -> Slot:
        """A free slot, its bytes as they were left; the caller owns it until it gives it back.

        Raises:
            StateError: No slot is free, or the pool is closed.
        """
        self._require_open()
        if not self._free:
            raise StateError(f"all {self.count} slots of {format_bytes(self.nbytes)} are out; give one back first")
        slot = self._free.pop()
        self._out.add(slot)
        self.high_water = max(self.high_water, len(self._out))
        return slot

    def give(self, slot: Slot) -> None:
        """Take a slot back.

        Raises:
            StateError: The slot is not out, or the pool is closed.
            UsageError: The slot is another pool's.
        """
        self._require_open()
        if slot not in self._out:
            if slot not in self._all:
                raise UsageError("this slot does not belong to this pool; give it to the one it was taken from")
            raise StateError("this slot was given back already")
        self._out.discard(slot)
        self._free.append(slot)

    def close(self) -> None:
        """Release the memory; idempotent.

        Slots still out lose their `data`.  Where somebody holds a view of their own, the
        memory stays until that view goes.
        """
        if self._closed:
            return
        self._closed = True
        for slot in self._all:
            slot.data, slot.views = np.empty(0, dtype=np.uint8), None
        self._free.clear()
        self._out.clear()
        self._all = frozenset()
        self._arena = np.empty(0, dtype=np.uint8)
        mapping, self._mapping = self._mapping, None
        if mapping is not None:
            with contextlib.suppress(BufferError):  # a view outlives the pool, and keeps the memory, but no longer
                mapping.close()

    def _require_open(self) -> None:
        if self._closed:
            raise StateError("the pool is closed; its slots are gone")
