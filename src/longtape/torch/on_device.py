"""A scan whose items are all kept on the device itself.

Owns the slots in device memory: one reservation for all of one kind.  Every copy is one more
thing for the device to do in the order of its computations, so nothing has to be waited for.
The state of random generators stays on the host, where they have it.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import torch

from longtape.actions import Key
from longtape.engine.meter import EventMeter, Timeline
from longtape.errors import StateError
from longtape.plan.choose import Choice
from longtape.plan.costs import Costs
from longtape.plan.costs import Device as Limits
from longtape.protocols import Device, Slot
from longtape.report import DeviceReport
from longtape.torch.blocks import Block
from longtape.torch.places import AsBlock, Form, keep_random
from longtape.torch.structure import Leaves

STATE_ALIGNMENT, BLOCK_ALIGNMENT = 16, 64
"""Of slots on the device: what any type of number needs; and what residuals are laid out by."""


def tensor_of(memory: Any) -> torch.Tensor:
    """Memory of a device as a tensor of bytes."""
    return memory if isinstance(memory, torch.Tensor) else torch.from_numpy(memory)


def aligned(nbytes: int, alignment: int) -> int:
    """The next multiple."""
    return -(-nbytes // alignment) * alignment


class DevicePool:
    """Equal slots in one reservation of device memory; implements `longtape.protocols.Pool`.

    Args:
        device: Whose memory.
        count: How many slots.
        nbytes: Of each, on the device.
        host_nbytes: Of each, beside it on the host.
        alignment: What each begins at a multiple of, in bytes.
    """

    def __init__(self, device: Device, count: int, nbytes: int, host_nbytes: int, *, alignment: int) -> None:
        stride = aligned(nbytes, alignment)
        self.nbytes = count * stride
        memory = tensor_of(device.reserve(self.nbytes))
        self._free = [
            Slot(np.zeros(host_nbytes, np.uint8), memory=memory[k * stride : k * stride + nbytes])
            for k in reversed(range(count))
        ]
        self._out: set[Slot] = set()
        self.high_water = 0

    def take(self) -> Slot:
        """A free slot; the caller owns it until it gives it back."""
        if not self._free:
            raise StateError(f"all {len(self._out)} slots on the device are out; give one back first")
        slot = self._free.pop()
        self._out.add(slot)
        self.high_water = max(self.high_water, len(self._out))
        return slot

    def give(self, slot: Slot) -> None:
        """Take a slot back."""
        self._out.remove(slot)
        self._free.append(slot)

    def close(self) -> None:
        """Release the memory; idempotent."""
        for slot in (*self._free, *self._out):
            slot.memory = slot.views = None
        self._free, self._out = [], set()


def pool_there(device: Device, form: Form, count: int, nbytes: int | None) -> DevicePool:
    """Slots on the device for states, or for blocks of so many bytes."""
    if nbytes is None:
        return DevicePool(device, count, form.leaves_nbytes, form.random_nbytes, alignment=STATE_ALIGNMENT)
    return DevicePool(device, count, nbytes, 0, alignment=BLOCK_ALIGNMENT)


def _leaves_there(form: Form, slot: Slot) -> Leaves:
    if slot.views is None:
        slot.views = form.leaves(slot.memory)
    return slot.views  # type: ignore[no-any-return]


def save_there(form: Form, slot: Slot, carry: Leaves, random: torch.Tensor | None) -> None:
    """Keep a carry in a slot on the device."""
    with torch.no_grad():
        for view, leaf in zip(_leaves_there(form, slot), carry, strict=True):
            view.copy_(leaf)
    keep_random(form, slot, random)


def load_from_there(form: Form, slot: Slot) -> tuple[Leaves, torch.Tensor | None]:
    """What is kept in a slot on the device."""
    return [view.clone() for view in _leaves_there(form, slot)], form.random(slot.data)


def block_there(slot: Slot, as_block: AsBlock) -> Block:
    """A slot on the device as residuals."""
    if slot.views is None:
        slot.views = as_block(slot.memory)
    return slot.views  # type: ignore[no-any-return]


class OnDevice:
    """Implements `longtape.torch.places.Place` and `longtape.accelerator.Accelerator`.

    Args:
        device: Where the steps run.
    """

    limits: Limits | None = None
    """None: what is kept in the run's memory is on the device."""

    inner_slots = 0

    def __init__(self, device: Device) -> None:
        self._device = device
        self._form: Form
        self._pools: list[DevicePool] = []
        self._in_use_before = device.begin_peak()
        self._peak = 0
        self.timeline = Timeline(device, time.perf_counter)
        self.meter = EventMeter(device, self.timeline)

    # Place -------------------------------------------------------------------------------------

    def lay_out(self, form: Form) -> None:
        self._form = form

    def save(self, slot: Slot, carry: Leaves, random: torch.Tensor | None) -> None:
        save_there(self._form, slot, carry, random)

    def load(self, slot: Slot) -> tuple[Leaves, torch.Tensor | None]:
        return load_from_there(self._form, slot)

    def filling(self, slot: Slot, as_block: AsBlock) -> Block:
        return block_there(slot, as_block)

    def filled(self, slot: Slot, nbytes: int) -> None:
        pass

    def reading(self, slot: Slot, as_block: AsBlock) -> Block:
        return block_there(slot, as_block)

    def read(self, slot: Slot) -> None:
        pass

    def keep(self, number: int, carry: Leaves) -> None:
        raise NotImplementedError

    def kept(self, number: int) -> Leaves:
        raise NotImplementedError

    def room(self, nbytes: int) -> torch.Tensor:
        like = self._form.like
        return torch.empty(nbytes, dtype=torch.uint8, device=like[0].device if like else None)

    def window_room(self, nbytes: int) -> torch.Tensor:
        return self.room(nbytes)

    def now(self) -> float:
        self._device.compute.synchronize()
        return time.perf_counter()

    # Accelerator -------------------------------------------------------------------------------

    def pool(self, count: int, nbytes: int, alignment: int, *, is_state: bool) -> DevicePool:
        """Slots on the device."""
        self._pools.append(pool_there(self._device, self._form, count, None if is_state else nbytes))
        return self._pools[-1]

    def settle(self, choice: Choice, item_nbytes: int) -> None:
        """The plan is chosen."""

    def with_link(self, costs: Costs, nbytes: int) -> Costs:
        """Nothing goes over the link."""
        return costs

    def watch(self, on_link: Any) -> None:
        """There are no copies to tell of."""

    def begin_sweep(self) -> None:
        """Compare clocks."""
        self.timeline.take_bearings()

    def end_sweep(self) -> None:
        """Wait until all is done."""
        self.meter.drain()

    def expect(self, key: Key, slot: Slot) -> None:
        """It is here."""

    def forget(self, slot: Slot) -> None:
        """Nothing was fetched."""

    def usage(self) -> DeviceReport:
        """What the run took of the device."""
        return DeviceReport(
            name=self._device.name,
            pool_bytes=sum(pool.nbytes for pool in self._pools),
            peak_bytes=max(0, self._peak - self._in_use_before),
        )

    def close(self) -> None:
        """The pools are closed by the run; note how much memory was used until now."""
        self._peak = max(self._peak, self._device.peak_nbytes())
