"""A scan on a device whose items are kept in pinned memory of the host, and on disk behind it.

Owns the copies between the two: out of the device behind whatever is computed, into it ahead of
need.  Owns the ring of buffers they go through, the snapshots within a window, and the guards
that say when a slot's bytes and a buffer's may be touched again.  Runs on the executor's thread;
nothing in it waits for the device but what is called before the sweeps or after one.

A snapshot's leaves travel; the state of random generators, which the host holds, is put behind
them in the slot by the host, and read from there.

Invariants:

* a copy stream touches nothing but the ring, and slots of the run's pinned pool: never a tensor
  of the framework's allocator, which knows of the compute stream alone;
* compute reads a buffer after the event of its arrival, and writes to it after the events of all
  who read it; a copy begins after the last thing that was asked for with its slot and its buffer;
* a slot's guard is the last of these.  As each waits for the one before, it stands for all.
"""

from __future__ import annotations

import contextlib
import time
from dataclasses import replace
from statistics import median

import torch

from longtape.accelerator import OnLink
from longtape.actions import Key, Kind
from longtape.engine.meter import EventMeter, Notes, Timeline
from longtape.errors import BudgetError, DeviceError
from longtape.measure import line_through
from longtape.plan.choose import Choice
from longtape.plan.costs import Costs
from longtape.plan.costs import Device as Limits
from longtape.protocols import Device, Event, Slot, Stream
from longtape.report import DeviceReport, Link
from longtape.sizes import format_bytes
from longtape.tiers.pinned import PinnedPool
from longtape.torch.blocks import Block
from longtape.torch.on_device import (
    BLOCK_ALIGNMENT,
    STATE_ALIGNMENT,
    DevicePool,
    aligned,
    block_there,
    load_from_there,
    pool_there,
    save_there,
    tensor_of,
)
from longtape.torch.places import AsBlock, Form, keep_random
from longtape.torch.ring import Buffer, Ring
from longtape.torch.structure import Leaves

LEAST_BUFFERS = 2
"""One on its way out, one on its way in."""

STAGING = Limits(0).staging
"""Buffers at most."""

_LEAST_PROBED, _MOST_PROBED = 8 << 20, 64 << 20
_REPEATS = 3


class Linked:
    """Implements `longtape.torch.places.Place` and `longtape.accelerator.Accelerator`.

    Args:
        device: Where the steps run.
        memory_nbytes: Most bytes on it for buffers, snapshots within a window, and its tape.
    """

    def __init__(self, device: Device, memory_nbytes: int) -> None:
        self._device = device
        self._memory_nbytes = memory_nbytes
        self.limits: Limits | None = Limits(memory_nbytes)
        self.inner_slots = 0
        self._form: Form
        self._ring = Ring([])
        self._inner: list[Leaves] = []
        self._window: torch.Tensor | None = None
        self._arena: torch.Tensor | None = None
        self._pools: list[PinnedPool] = []
        self._in_use_before = device.begin_peak()
        self._peak = 0
        self._reserved_nbytes = 0
        self._is_near = False
        """The plan keeps everything on the device."""
        self._closed = False
        self._links = {"out": _Link(), "in": _Link(), "idle": _Link()}
        self._on_link: OnLink | None = None
        self.timeline = Timeline(device, time.perf_counter)
        self._notes = {lane: Notes(self.timeline) for lane in self._links}
        self.meter = EventMeter(device, self.timeline, beside=list(self._notes.values()))

    # Before the sweeps -------------------------------------------------------------------------

    def lay_out(self, form: Form) -> None:
        self._form = form

    def limit_tapes(self, tape_nbytes: int) -> None:
        """What each further taped step of a window takes on the device."""
        self.limits = Limits(self._memory_nbytes, tape_nbytes)

    def with_link(self, costs: Costs, nbytes: int) -> Costs:
        """Time copies of an item of this size and of a small one, both ways, a few times; the medians count."""
        nbytes = max(4, min(max(nbytes, _LEAST_PROBED), _MOST_PROBED, self._memory_nbytes))
        pool = PinnedPool(1, nbytes, pin=self._device.pin, unpin=self._device.unpin)
        try:
            here, there = torch.from_numpy(pool.take().data), tensor_of(self._device.reserve(nbytes))
            sizes = (min(4096, nbytes // 4), nbytes)
            out = [self._typical(self._device.out, here[:size], there[:size]) for size in sizes]
            into = [self._typical(self._device.into, there[:size], here[:size]) for size in sizes]
        finally:
            pool.close()
        latency, leaving = line_through(sizes, out)
        _, coming = line_through(sizes, into)
        return replace(costs, out_bytes_per_second=leaving, in_bytes_per_second=coming, link_latency=latency)

    def _typical(self, stream: Stream, target: torch.Tensor, source: torch.Tensor) -> float:
        seconds = []
        for _ in range(_REPEATS + 1):  # the first one may have to wake the link up
            began = stream.record()
            stream.copy(target, source)
            ended = stream.record()
            ended.wait()
            seconds.append(max(1e-9, self._device.seconds(began, ended)))
        return median(seconds[1:])

    def pool(self, count: int, nbytes: int, alignment: int, *, is_state: bool) -> PinnedPool | DevicePool:
        """Slots in pinned memory; or on the device, where the plan keeps everything there."""
        if self._is_near:
            near = pool_there(self._device, self._form, count, None if is_state else nbytes)
            self._reserved_nbytes += near.nbytes
            return near
        pool = PinnedPool(count, nbytes, alignment=alignment, pin=self._device.pin, unpin=self._device.unpin)
        self._pools.append(pool)
        return pool

    def settle(self, choice: Choice, item_nbytes: int) -> None:
        """Reserve the buffers, the snapshots within a window and the tape of one, in one piece."""
        assert self.limits is not None
        self._is_near = choice.on_device
        if self._is_near:
            return
        item = aligned(item_nbytes, BLOCK_ALIGNMENT if choice.blocks else STATE_ALIGNMENT)
        state = aligned(self._form.leaves_nbytes, STATE_ALIGNMENT)
        tapes = 0 if choice.device_slots else (choice.window - 1) * self.limits.tape_nbytes
        inner = choice.device_slots * state
        buffers = min(STAGING, (self._memory_nbytes - tapes - inner) // max(1, item))
        if buffers < LEAST_BUFFERS:
            raise BudgetError(
                f"memory={format_bytes(self._memory_nbytes)} of {self._device.name} cannot hold {LEAST_BUFFERS} items "
                f"on their way, the largest of {item} bytes, beside {tapes + inner} bytes for a window of "
                f"{choice.window} steps; give at least {tapes + inner + LEAST_BUFFERS * item} bytes"
            )
        nbytes = buffers * item + inner
        self._arena = arena = tensor_of(self._device.reserve(nbytes))
        self._reserved_nbytes = arena.nbytes
        self._ring = Ring([arena[k * item : k * item + item_nbytes] for k in range(buffers)])
        places = [buffers * item + k * state for k in range(choice.device_slots)]
        self._inner = [self._form.leaves(arena[at : at + state]) for at in places]
        self.inner_slots = choice.device_slots

    def watch(self, on_link: OnLink) -> None:
        """Whom to tell of copies."""
        self._on_link = on_link

    # Snapshots ---------------------------------------------------------------------------------

    def save(self, slot: Slot, carry: Leaves, random: torch.Tensor | None) -> None:
        if slot.memory is not None:
            save_there(self._form, slot, carry, random)
            return
        buffer = self._ring.take()
        self._hold_compute(buffer.still_busy())
        with torch.no_grad():
            for view, leaf in zip(self._leaves(buffer), carry, strict=True):
                view.copy_(leaf)
        self._copy_out(buffer, slot, self._form.leaves_nbytes)
        keep_random(self._form, slot, random)  # behind the leaves, where no copy goes

    def load(self, slot: Slot) -> tuple[Leaves, torch.Tensor | None]:
        if slot.memory is not None:
            return load_from_there(self._form, slot)
        buffer = self._fetched(slot, self._form.leaves_nbytes)
        carry = [view.clone() for view in self._leaves(buffer)]
        self._used(buffer)
        return carry, self._form.random(slot.data)

    def _leaves(self, buffer: Buffer) -> Leaves:
        if buffer.leaves is None:
            buffer.leaves = self._form.leaves(buffer.memory)
        return buffer.leaves

    # Residuals ---------------------------------------------------------------------------------

    def filling(self, slot: Slot, as_block: AsBlock) -> Block:
        if slot.memory is not None:
            return block_there(slot, as_block)
        self._filled = self._ring.take()
        self._hold_compute(self._filled.still_busy())
        return self._block(self._filled, as_block)

    def filled(self, slot: Slot, nbytes: int) -> None:
        if slot.memory is not None:
            return
        self._copy_out(self._filled, slot, nbytes)

    def reading(self, slot: Slot, as_block: AsBlock) -> Block:
        if slot.memory is not None:
            return block_there(slot, as_block)
        return self._block(self._fetched(slot, slot.data.nbytes), as_block)

    def read(self, slot: Slot) -> None:
        if slot.memory is not None:
            return
        buffer = self._ring.find(slot)
        assert buffer is not None
        self._used(buffer)

    def _used(self, buffer: Buffer) -> None:
        """Compute has been asked to read the buffer."""
        self._device.compute.touches(buffer.memory, writes=False)
        buffer.busy.append(self._device.compute.record())

    def _block(self, buffer: Buffer, as_block: AsBlock) -> Block:
        if buffer.block is None:
            buffer.block = as_block(buffer.memory)
        return buffer.block

    # Within a window ---------------------------------------------------------------------------

    def keep(self, number: int, carry: Leaves) -> None:
        with torch.no_grad():
            for view, leaf in zip(self._inner[number], carry, strict=True):
                view.copy_(leaf)

    def kept(self, number: int) -> Leaves:
        return [view.clone() for view in self._inner[number]]

    def room(self, nbytes: int) -> torch.Tensor:
        like = self._form.like
        return torch.empty(nbytes, dtype=torch.uint8, device=like[0].device if like else None)

    def window_room(self, nbytes: int) -> torch.Tensor:
        if self._window is None or self._window.nbytes < nbytes:
            self._window = self.room(nbytes)
        return self._window[:nbytes]

    def now(self) -> float:
        self._device.compute.synchronize()
        return time.perf_counter()

    # Copies ------------------------------------------------------------------------------------

    def _copy_out(self, buffer: Buffer, slot: Slot, nbytes: int) -> None:
        """What compute has put into the buffer, on to its slot."""
        self._ring.forget(slot)
        out = self._device.out
        self._device.compute.touches(buffer.memory, writes=True)
        out.wait(self._device.compute.record())
        ended = self._copied(out, "out", _tensor(slot)[:nbytes], buffer.memory[:nbytes], slot)
        buffer.holds, buffer.arrived = slot, None
        buffer.busy.append(ended)

    def _copy_in(self, buffer: Buffer, slot: Slot, nbytes: int) -> None:
        into = self._device.into
        for event in buffer.still_busy():
            into.wait(event)
        ended = self._copied(into, "in", buffer.memory[:nbytes], _tensor(slot)[:nbytes], slot)
        buffer.holds, buffer.arrived = slot, ended
        buffer.busy.append(ended)

    def _copied(self, stream: Stream, lane: str, target: torch.Tensor, source: torch.Tensor, slot: Slot) -> Event:
        if slot.guard is not None:
            stream.wait(slot.guard)
        began = stream.record()
        stream.copy(target, source)
        slot.guard = ended = stream.record()
        self._note(lane, target.nbytes, began, ended)
        return ended

    def _fetched(self, slot: Slot, nbytes: int) -> Buffer:
        """The buffer that holds a slot's bytes, which compute may read from now on."""
        buffer = self._ring.find(slot)
        if buffer is None:
            buffer = self._ring.take()
            self._copy_in(buffer, slot, nbytes)
        if buffer.arrived is not None:
            self._hold_compute([buffer.arrived])
        buffer.is_expected = False
        return buffer

    def _hold_compute(self, events: list[Event]) -> None:
        """Have compute go on after these, and note for how long it stands still."""
        late = [event for event in events if not event.is_over()]
        if not late:
            return
        compute = self._device.compute
        began = compute.record()
        for event in late:
            compute.wait(event)
        self._note("idle", 0, began, compute.record())

    def expect(self, key: Key, slot: Slot) -> None:
        if slot.memory is not None:
            return
        buffer = self._ring.find(slot)
        if buffer is None:
            if not self._ring.spare():
                return
            buffer = self._ring.take()
            nbytes = self._form.leaves_nbytes if key.kind is Kind.SNAPSHOT else slot.data.nbytes
            self._copy_in(buffer, slot, nbytes)
        buffer.is_expected = True

    def forget(self, slot: Slot) -> None:
        self._ring.forget(slot)

    # Timing --------------------------------------------------------------------------------------

    def _note(self, lane: str, nbytes: int, began: Event, ended: Event) -> None:
        def tell(start: float, stop: float) -> None:
            link = self._links[lane]
            link.count, link.nbytes, link.seconds = link.count + 1, link.nbytes + nbytes, link.seconds + stop - start
            if self._on_link is not None:
                self._on_link(lane, start, stop)

        self._notes[lane].add(began, ended, tell)

    def begin_sweep(self) -> None:
        """Compare clocks."""
        self.timeline.take_bearings()

    def end_sweep(self) -> None:
        """Wait for all that was asked for."""
        self.meter.drain()

    def usage(self) -> DeviceReport:
        """What the run took of the device and of the link."""
        links = [
            Link(way, self._links[way].count, self._links[way].nbytes, self._links[way].seconds)
            for way in ("out", "in")
        ]
        return DeviceReport(
            name=self._device.name,
            budget_bytes=self._memory_nbytes,
            pool_bytes=self._reserved_nbytes,
            peak_bytes=max(0, self._peak - self._in_use_before),
            pinned_bytes=sum(pool.pinned_nbytes for pool in self._pools),
            idle_seconds=self._links["idle"].seconds,
            links=tuple(links),
        )

    def close(self) -> None:
        """Have no copy touch a slot any more, and give the device's memory back; idempotent."""
        if self._closed:
            return
        self._closed = True
        for stream in (self._device.out, self._device.into):
            with contextlib.suppress(DeviceError):  # one that has failed copies nothing any more
                stream.synchronize()
        self._peak = max(self._peak, self._device.peak_nbytes())
        self._ring, self._inner, self._window, self._arena = Ring([]), [], None, None


class _Link:
    """What went over the link in one direction."""

    def __init__(self) -> None:
        self.count = self.nbytes = 0
        self.seconds = 0.0


def _tensor(slot: Slot) -> torch.Tensor:
    """The bytes of a slot in host memory; made once a slot."""
    if slot.views is None:
        slot.views = torch.from_numpy(slot.data)
    return slot.views  # type: ignore[no-any-return]
