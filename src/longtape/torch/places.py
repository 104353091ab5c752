"""Where a scan keeps its items, and how they get there: in memory that the host can touch.

Owns the form of a snapshot's bytes and what a `ScanJob` asks of the place its items are kept
in; implements it for the memory of the host (`HostPlace`).  `on_device` and `linked` do so for
a device.  Knows no step and no sweep.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Protocol

import numpy as np
import torch

from longtape.layout import Fields
from longtape.protocols import Bytes, Slot
from longtape.torch.blocks import Block
from longtape.torch.structure import Leaves

AsBlock = Callable[[Bytes | torch.Tensor], Block]
"""Makes a residual block of memory; in `CapturedSteps`."""


class Form:
    """How a state lies in bytes: its leaves, and behind them the state of random generators, where steps draw."""

    def __init__(self, like: Leaves, random_nbytes: int) -> None:
        self.like = like
        sizes = [leaf.numel() * leaf.element_size() for leaf in like]
        self.fields = Fields([*sizes, random_nbytes] if random_nbytes else sizes)
        self.leaves_nbytes = self.fields.offsets[len(sizes) - 1] + sizes[-1] if sizes else 0
        """Where the leaves end."""
        self.random_nbytes = random_nbytes

    def leaves(self, memory: torch.Tensor) -> Leaves:
        """Typed views of the leaves in memory that holds at least these."""
        places = zip(self.fields.offsets, self.fields.sizes, self.like, strict=False)
        return [
            memory[start : start + size].view(leaf.dtype).view(leaf.shape)
            if size
            else memory.new_empty(0).view(leaf.dtype).view(leaf.shape)
            for start, size, leaf in places
        ]

    def random(self, data: Bytes) -> torch.Tensor | None:
        """The generators' state in the host's part of a slot, behind the leaves or alone; None if nothing is drawn."""
        if not self.random_nbytes:
            return None
        start = self.fields.offsets[-1] if data.nbytes >= self.fields.nbytes else 0
        return torch.from_numpy(data[start : start + self.random_nbytes])


class Place(Protocol):
    """Keeps snapshots and residual blocks in the slots of a run; on the executor's thread."""

    inner_slots: int
    """Snapshots that fit within a window, for its steps to be reversed by Revolve; 0: they are all taped at once."""

    def lay_out(self, form: Form) -> None:
        """Snapshots have this form from now on."""

    def save(self, slot: Slot, carry: Leaves, random: torch.Tensor | None) -> None:
        """Keep a carry, and the generators' state, in a slot."""

    def load(self, slot: Slot) -> tuple[Leaves, torch.Tensor | None]:
        """What is kept in a slot; the carry is the caller's own."""

    def filling(self, slot: Slot, as_block: AsBlock) -> Block:
        """Where to put residuals that are to be kept in a slot."""

    def filled(self, slot: Slot, nbytes: int) -> None:
        """They are there: the first so many bytes."""

    def reading(self, slot: Slot, as_block: AsBlock) -> Block:
        """The residuals that are kept in a slot."""

    def read(self, slot: Slot) -> None:
        """They have been used."""

    def keep(self, number: int, carry: Leaves) -> None:
        """Keep a carry within a window."""

    def kept(self, number: int) -> Leaves:
        """A carry that is kept within a window; the caller's own."""

    def room(self, nbytes: int) -> Bytes | torch.Tensor:
        """Memory that steps can put residuals into, outside any slot; aligned to 64 bytes."""

    def window_room(self, nbytes: int) -> Bytes | torch.Tensor:
        """The same for those of a window, whose tape it is: always the same memory, once the run has begun."""

    def now(self) -> float:
        """Seconds on a clock, when all that was asked for has been done; not for use in a sweep."""


class HostPlace:
    """Slots in memory of the host; what is copied is there on return."""

    inner_slots = 0

    def __init__(self) -> None:
        self._form: Form

    def lay_out(self, form: Form) -> None:
        self._form = form

    def _views(self, slot: Slot) -> Leaves:
        if slot.views is None:
            slot.views = self._form.leaves(torch.from_numpy(slot.data))
        return slot.views  # type: ignore[no-any-return]

    def save(self, slot: Slot, carry: Leaves, random: torch.Tensor | None) -> None:
        with torch.no_grad():
            for view, leaf in zip(self._views(slot), carry, strict=True):
                view.copy_(leaf)
        keep_random(self._form, slot, random)

    def load(self, slot: Slot) -> tuple[Leaves, torch.Tensor | None]:
        carry = [
            view.clone() if leaf.device == view.device else view.to(leaf.device)
            for view, leaf in zip(self._views(slot), self._form.like, strict=True)
        ]
        return carry, self._form.random(slot.data)

    def filling(self, slot: Slot, as_block: AsBlock) -> Block:
        if slot.views is None:
            slot.views = as_block(slot.data)
        return slot.views  # type: ignore[no-any-return]

    def filled(self, slot: Slot, nbytes: int) -> None:
        pass

    def reading(self, slot: Slot, as_block: AsBlock) -> Block:
        return self.filling(slot, as_block)

    def read(self, slot: Slot) -> None:
        pass

    def keep(self, number: int, carry: Leaves) -> None:
        raise NotImplementedError

    def kept(self, number: int) -> Leaves:
        raise NotImplementedError

    def room(self, nbytes: int) -> Bytes:
        room = np.zeros(nbytes + 64, np.uint8)
        start = -room.ctypes.data % 64
        return room[start : start + nbytes]

    def window_room(self, nbytes: int) -> Bytes:
        return self.room(nbytes)

    def now(self) -> float:
        return time.perf_counter()


def keep_random(form: Form, slot: Slot, random: torch.Tensor | None) -> None:
    """Put the generators' state, which the host holds, where it belongs."""
    place = form.random(slot.data)
    if place is not None and random is not None:
        place.copy_(random)
