"""Buffers on the device through which items come and go.

Owns the buffers, what is in each, and the events after which each may be used: a *ring*, made
once, so that nothing is allocated in a sweep.  Copies nothing itself.

Invariants: a buffer that holds a slot's bytes holds just these, once `arrived` is over;
nobody writes to a buffer before its `busy` events are over.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from longtape.protocols import Event, Slot
from longtape.torch.blocks import Block
from longtape.torch.structure import Leaves


@dataclass(slots=True, eq=False)
class Buffer:
    """Room for one item on its way."""

    memory: torch.Tensor
    """Bytes, on the device."""
    holds: Slot | None = None
    """The slot whose bytes are here, or will be."""
    arrived: Event | None = None
    """After which they are; None: they are here for whoever asks on the compute stream."""
    busy: list[Event] = field(default_factory=list)
    """Who is still reading them, or writing."""
    is_expected: bool = False
    """They were fetched for what comes next, and not used yet."""
    used: int = 0
    """When it was last taken or found, counted."""
    leaves: Leaves | None = None
    """The bytes as a state."""
    block: Block | None = None
    """The bytes as residuals."""

    def still_busy(self) -> list[Event]:
        """The events to wait for before the bytes are overwritten."""
        self.busy = [event for event in self.busy if not event.is_over()]
        return self.busy


class Ring:
    """A fixed number of equal buffers.

    Args:
        memories: Of each, on the device.
    """

    def __init__(self, memories: Sequence[torch.Tensor]) -> None:
        self._buffers = [Buffer(memory) for memory in memories]
        self._count = 0

    def __len__(self) -> int:
        return len(self._buffers)

    def find(self, slot: Slot) -> Buffer | None:
        """The buffer that holds a slot's bytes, if one does."""
        for buffer in self._buffers:
            if buffer.holds is slot:
                return self._touched(buffer)
        return None

    def take(self) -> Buffer:
        """A buffer for something else: an empty one, or the one not used for longest; expected ones are spared."""
        buffer = min(self._buffers, key=lambda b: (b.is_expected, b.holds is not None, b.used))
        buffer.holds, buffer.arrived, buffer.is_expected = None, None, False
        return self._touched(buffer)

    def spare(self) -> bool:
        """Whether a buffer can be fetched into without giving up what is expected, and one is left for saving."""
        return sum(not buffer.is_expected for buffer in self._buffers) > 1

    def forget(self, slot: Slot) -> None:
        """A slot's bytes are given up."""
        for buffer in self._buffers:
            if buffer.holds is slot:
                buffer.holds, buffer.arrived, buffer.is_expected = None, None, False

    def _touched(self, buffer: Buffer) -> Buffer:
        self._count += 1
        buffer.used = self._count
        return buffer
