"""The seams: what the engine asks of a front end, of a storage tier and of an observer.

Nothing here is implemented; nothing here knows a framework, a file or a thread.

A *device* is an accelerator with memory of its own, in front of the memory that items are
kept in.  What it is asked to do it does later: an `Event` says when.  Whoever has asked for
something that touches the bytes of a slot leaves the event as the slot's *guard*; whoever
touches the bytes next waits for it, on the host or on another stream of the device.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from longtape.actions import Action, Key

Bytes = npt.NDArray[np.uint8]


class Event(Protocol):
    """A point in the work of a device; any thread may ask for it."""

    def is_over(self) -> bool:
        """Whether the device has got there; never waits.  Raises `DeviceError`."""

    def wait(self) -> None:
        """Return when the device has got there.  Raises `DeviceError`."""


@dataclass(slots=True, eq=False)
class Slot:
    """One preallocated buffer of a pool: room for one snapshot or one residual block."""

    data: Bytes
    """One-dimensional; its start is page-aligned or aligned as the pool says."""

    views: Any = field(default=None)
    """A front end's cache of typed views of `data`; the engine never looks at it."""

    guard: Event | None = field(default=None)
    """The last thing a device was asked to do with the bytes; None: nothing ever."""

    memory: Any = field(default=None)
    """For a slot on a device: its bytes there; `data` then holds only what stays on the host."""


class Floats(NamedTuple):
    """A run of floating-point numbers in the bytes of an item, from byte `start` to before `stop`."""

    start: int
    stop: int
    itemsize: int
    """Bytes of each number: 4 or 8, in the machine's own format."""


class Pool(Protocol):
    """A fixed number of equal slots."""

    def take(self) -> Slot:
        """A free slot; the caller owns it until it gives it back."""

    def give(self, slot: Slot) -> None:
        """Take a slot back."""


class Job(Protocol):
    """What the executor drives: the user's steps and working state, seen through a front end.

    Called from the executor's thread only.  Steps are half-open ranges.  A job that may be in a slot,
    or has memory of its own, has a method `leave` too: the sweeps are over, and it lets go of both.
    """

    def advance(self, start: int, stop: int) -> int:
        """Run steps ``[start, stop)`` on the working state; return the state reached.

        That is `stop`, unless the sequence ends earlier, which only a job of unknown
        length may find.
        """

    def reverse(self, start: int, stop: int) -> None:
        """Take the adjoint of steps ``stop-1 … start``, re-running them from the working state `start`."""

    def save(self, slot: Slot) -> Slot:
        """Put the working state into `slot`; return the slot that now holds it.

        A front end that copies returns `slot`.  One that can run from any buffer hands
        over the buffer its working state is in and keeps `slot` as its next target.
        """

    def load(self, slot: Slot) -> None:
        """Make the snapshot in `slot` the working state, by copy or by reference."""

    def yield_slot(self, slot: Slot) -> Slot:
        """The engine wants `slot` back: return it, or an equal one if the working state lives in it."""

    def adopt(self, slots: list[Slot]) -> None:
        """Work in these slots, which trade places with those of kept snapshots.

        Called once, before the sweep, on jobs that asked for working slots.
        """

    def load_initial(self) -> None:
        """Make state 0 the working state; only called on jobs that said they can."""

    def turn(self) -> None:
        """The forward sweep has ended: the working state is the final one."""

    def record(self, start: int, stop: int, slot: Slot) -> int:
        """Run steps ``[start, stop)`` and lay their residuals out in `slot`; returns as `advance` does."""

    def pull_back(self, start: int, stop: int, slot: Slot) -> None:
        """Take the adjoint of steps ``stop-1 … start`` from the residuals in `slot`."""


class Ahead(Protocol):
    """A front end that fetches items from memory before they are asked for; on the executor's thread."""

    def expect(self, key: Key, slot: Slot) -> None:
        """The item, which is in `slot`, is among the next that will be loaded or pulled back."""

    def forget(self, slot: Slot) -> None:
        """What is in `slot` is given up: whatever was fetched of it is not to be used."""


class Meter(Protocol):
    """Tells when actions ran where that is not when they were asked for; on the executor's thread."""

    def mark(self) -> Any:
        """A point of time that will be known later."""

    def note(self, began: Any, ended: Any, tell: Callable[[float, float], None]) -> None:
        """Have `tell` called with both points in seconds, on the engine's clock, once they are known.

        Those noted first are told first.  Waits where too many are not known yet: by that, the
        host runs ahead of the device by so many actions and no more.
        """

    def poll(self) -> None:
        """Tell what has become known; never waits."""


class Stream(Protocol):
    """Work that a device does in order, while whoever asked for it goes on."""

    def record(self) -> Event:
        """The point after all that was asked for so far; its time can be told later."""

    def wait(self, event: Event) -> None:
        """Have whatever is asked for from now on begin after `event`; the caller goes on."""

    def copy(self, target: Any, source: Any) -> None:
        """Copy bytes between the device and pinned memory; both must be left alone until it is done."""

    def touches(self, memory: Any, *, writes: bool) -> None:
        """What was just asked for here, beside copies, reads or writes this memory, which copies touch too.

        Nothing has to come of it: a device for tests checks that events order it with the copies.
        """

    def synchronize(self) -> None:
        """Return when all is done that was asked for.  Raises `DeviceError`."""


class Device(Protocol):
    """An accelerator: three streams, memory, and a clock.

    `Stream.wait`, `record` and `copy` are called from the executor's thread.  What the steps
    compute is asked for on the stream `compute`, in whatever way the front end's framework does.
    """

    name: str

    @property
    def compute(self) -> Stream:
        """Where the steps run."""

    @property
    def out(self) -> Stream:
        """Copies from the device."""

    @property
    def into(self) -> Stream:
        """Copies to the device."""

    def reserve(self, nbytes: int) -> Any:
        """Uninitialised memory on the device, one-dimensional bytes.  Raises `BudgetError` if there is not so much."""

    def pin(self, memory: Bytes) -> None:
        """Let copies reach host memory while the host goes on.  Raises `BudgetError` if the system refuses."""

    def unpin(self, memory: Bytes) -> None:
        """Undo `pin`, before the memory goes."""

    def seconds(self, began: Event, ended: Event) -> float:
        """Time between two points that are over."""

    def begin_peak(self) -> int:
        """Measure the most memory in use from now on; returns what is in use now, in bytes."""

    def peak_nbytes(self) -> int:
        """The most memory in use since `begin_peak`, as the framework's allocator counts."""

    def is_capturing(self) -> bool:
        """Whether the caller is recording its work instead of having it done."""


class Tier(Protocol):
    """Slow, cheap storage.  A tier only moves bytes: it decides nothing.

    `reserve`, `release` and `close` are called from the executor's thread; `write`
    and `read` from workers, at most one call per key at a time.
    """

    def reserve(self, key: Key, nbytes: int) -> None:
        """Find room for an item; raise `StorageFull` where there is none."""

    def write(self, key: Key, data: Bytes) -> None:
        """Write a reserved item, blocking; on return it can be read back.  Raises `StorageError`."""

    def read(self, key: Key, out: Bytes) -> None:
        """Fill `out` with a written item, blocking, and check it.  Raises `StorageError`, `DamagedBlock`."""

    def release(self, key: Key) -> None:
        """Give the item's room back."""

    def close(self) -> None:
        """Release everything; idempotent."""


class Observer(Protocol):
    """Watches a run.  The engine calls it after each action; it must return quickly and change nothing.

    Where steps run on a device, that is some actions later, when it is known when an action ended; in order.
    """

    def on_action(self, action: Action, began: float, ended: float) -> None:
        """An action ran from `began` to `ended` (seconds on the engine's clock)."""

    def on_transfer(self, kind: str, key: Key, nbytes: int, began: float, ended: float) -> None:
        """A ``"write"`` or ``"read"`` moved `nbytes` bytes between `began` and `ended`."""


class Durable(Protocol):
    """What a job lays open so that its run can be resumed; on the executor's thread.

    Arrays are bytes: contiguous, one-dimensional.  Those handed out are read before the
    next step is run; those handed in belong to the job.
    """

    def state(self) -> list[tuple[str, Bytes]]:
        """The leaves of the working state, each with a name for people."""

    def run_again(self, start: int, stop: int) -> None:
        """Run steps that were run before from the working state; nothing is to be seen of it but their end."""

    def put_initial(self, slot: Slot) -> None:
        """Make state 0 the working state, as it was when the run was made; `slot` has a copy of it."""

    def rows(self, start: int, stop: int) -> list[Bytes]:
        """What the forward sweep has produced for steps ``[start, stop)`` beside the state."""

    def put_rows(self, start: int, stop: int, arrays: list[Bytes]) -> None:
        """Take back what `rows` gave; raise `DamagedBlock` if it cannot be used."""

    def seed(self) -> str | None:
        """A fingerprint of the adjoint that the reverse sweep begins with; None if it cannot be made durable."""

    def adjoint(self) -> list[Bytes]:
        """The adjoint as it is, accumulated gradients included."""

    def put_adjoint(self, arrays: list[Bytes]) -> None:
        """Take back what `adjoint` gave."""

    def bars(self, start: int, stop: int) -> list[Bytes]:
        """What the reverse sweep has produced for steps ``[start, stop)`` that will not change any more."""

    def put_bars(self, start: int, stop: int, arrays: list[Bytes]) -> None:
        """Take back what `bars` gave."""


class Standing(Protocol):
    """Sums and the like, which the forward sweep updates beside the state; made durable as they stand at a point."""

    def standing(self) -> list[Bytes]:
        """As it is."""

    def put_standing(self, arrays: list[Bytes]) -> None:
        """Take back what `standing` gave; called once, after all rows have been put back."""
