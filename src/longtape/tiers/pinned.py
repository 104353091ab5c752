"""A pool whose memory copies of a device can reach while the host goes on.

Owns the registration of a `SlotPool`'s memory with the device.  The memory is mapped by the pool
and not by the framework, whose allocator of pinned memory rounds every request up to a power of
two.  Entered by the executor's thread only.

Invariant: the memory is registered from before the first slot goes out until after the last
copy, for which whoever closes the pool has waited; or until nobody refers to the pool.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable

from longtape.protocols import Bytes, Slot
from longtape.tiers.pool import SlotPool

Pin = Callable[[Bytes], None]


class PinnedPool:
    """`count` slots of `nbytes` bytes each, in pinned memory; otherwise as `SlotPool`.

    Args:
        count: How many slots; may be zero.
        nbytes: Length of each slot's `data`, in bytes.
        alignment: What the address of each slot is a multiple of, in bytes.
        pin: Registers memory with the device; raises `BudgetError` where that is refused.
        unpin: Undoes it.

    Raises:
        UsageError: As `SlotPool`.
        BudgetError: What `pin` raises.
    """

    def __init__(self, count: int, nbytes: int, *, alignment: int = 4096, pin: Pin, unpin: Pin) -> None:
        self._pool = SlotPool(count, nbytes, alignment=alignment)
        memory = self._pool.memory(count)
        self.pinned_nbytes = memory.nbytes
        pin(memory)
        self._unpinning = weakref.finalize(self, unpin, memory)
        self._unpinning.atexit = False

    @property
    def high_water(self) -> int:
        """The most slots that were out at once."""
        return self._pool.high_water

    def take(self) -> Slot:
        """A free slot; the caller owns it until it gives it back."""
        return self._pool.take()

    def give(self, slot: Slot) -> None:
        """Take a slot back."""
        self._pool.give(slot)

    def close(self) -> None:
        """Release the memory; idempotent."""
        self._unpinning()
        self._pool.close()
