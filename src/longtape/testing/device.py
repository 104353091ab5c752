"""A device that is none, for those who test what drives one: its copies come as late as they may.

Owns an implementation of `longtape.protocols.Device` in the memory of the host.  Its streams
are threads that do what they are told in order; every copy is held back as a `Delay` says: until
somebody waits for it, for a while, or not at all.  What the steps compute runs at once, on
the caller's thread; where the compute stream is told to wait, the caller does.

So whoever reads what has not arrived reads what was there before, and whoever writes to what
has not departed is heard of at the other end: wrong bits, every time, and not once in a
thousand runs as on a device.

What does not show in the bits, because what is computed runs at once here, is found by logic: every access
to the device's memory and to pinned memory is held against those before it, and two of which
one writes must be ordered by events.  Neither luck nor timing plays a part in that.

Must not know any job; needs no framework: it takes arrays, or tensors that have `numpy()`.

Invariant: a stream holds back no copy that somebody waits for, on the host or on another
stream; so nothing here can hang that would not on a device.
"""

from __future__ import annotations

import random
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Collection
from dataclasses import dataclass
from math import inf
from types import TracebackType
from typing import Any, Literal

import numpy as np

from longtape.errors import BudgetError, DeviceError, UsageError
from longtape.protocols import Bytes, Event
from longtape.sizes import format_bytes

Delay = Callable[[str], float]
"""Given the name of a stream, the seconds for which it holds back its next copy or event; inf: until it is wanted."""

Waiter = Literal["compute", "out", "in", "worker"]

Clock = dict[str, int]
"""Of each stream, how much of what it was asked for is known to be done before."""


def at_once(stream: str) -> float:
    """Copy as soon as it is asked for."""
    return 0.0


def when_wanted(stream: str) -> float:
    """Copy when somebody waits for it, and no sooner: the worst that a device may do."""
    return inf


def drawn(seed: int, *, longest: float = 200e-6) -> Delay:
    """At once, when it is wanted, or after up to `longest` seconds, by chance."""
    chance, lock = random.Random(seed), threading.Lock()

    def delay(stream: str) -> float:
        with lock:
            return chance.choice((0.0, inf, inf, chance.random() * longest))

    return delay


@dataclass(frozen=True, slots=True)
class Access:
    """Bytes from address `start` to before `stop` were read or written."""

    stream: str
    moment: int
    """How much the stream had been asked for."""
    start: int
    stop: int
    writes: bool


class SimulatedEvent:
    """Implements `longtape.protocols.Event`."""

    def __init__(self, stream: SimulatedStream, number: int) -> None:
        self.stream, self.number = stream, number
        self.clock = dict(stream.clock)
        self.seconds = 0.0
        """On `time.perf_counter`, once it is over."""
        self.over = False

    def is_over(self) -> bool:
        device = self.stream.device
        device.raise_failure()
        if self.over:
            device.host_knows(self)
        return self.over

    def wait(self) -> None:
        device = self.stream.device
        is_worker = threading.current_thread().name.startswith("longtape-")
        if is_worker and device.ignores("worker"):
            return
        self.stream.until(self)
        if not is_worker:
            device.host_knows(self)


class SimulatedStream:
    """Implements `longtape.protocols.Stream`: a thread that works off what it is told."""

    def __init__(self, device: SimulatedDevice, name: str) -> None:
        self.device, self.name = device, name
        self._tasks: deque[tuple[int, Callable[[], None]]] = deque()
        self._given = self._done = 0
        self._wanted = 0
        """Nothing up to this number is to be held back."""
        self._thread: threading.Thread | None = None
        self.clock: Clock = {}
        """What is done before whatever this stream is asked for next."""

    # The caller's side -------------------------------------------------------------------------

    def record(self) -> SimulatedEvent:
        self._tick()
        event = SimulatedEvent(self, self._given + 1)

        def happen() -> None:
            event.seconds, event.over = time.perf_counter(), True

        self._give(happen)
        return event

    def wait(self, event: Event) -> None:
        assert isinstance(event, SimulatedEvent)
        if self.device.ignores(self.name):
            return
        _join(self.clock, event.clock)
        if self is self.device.compute:  # what is computed runs on the caller's thread, so that has to wait
            event.stream.until(event)
        else:
            self._give(lambda: event.stream.until(event))

    def copy(self, target: Any, source: Any) -> None:
        into, what = _array(target), _array(source)
        if into.nbytes != what.nbytes:
            raise UsageError(f"{what.nbytes} bytes were to be copied to a place of {into.nbytes}")
        self.device.check_pinned(into, what)
        self.touches(into, writes=True)
        self.touches(what, writes=False)
        self._give(lambda: self.device.move(self.name, into, what))

    def touches(self, memory: Any, *, writes: bool) -> None:
        array = _array(memory)
        moment = self._tick()
        if array.nbytes:
            at = array.ctypes.data
            self.device.note(Access(self.name, moment, at, at + array.nbytes, writes), self.clock)

    def _tick(self) -> int:
        _join(self.clock, self.device.host_clock)
        self.clock[self.name] = self.clock.get(self.name, 0) + 1
        return self.clock[self.name]

    def synchronize(self) -> None:
        self.record().wait()

    def _give(self, task: Callable[[], None]) -> None:
        changed = self.device.changed
        with changed:
            self.device.raise_failure()
            if self.device.is_closed:
                raise DeviceError("the simulated device is closed; make a new one for another run")
            self._given += 1
            self._tasks.append((self._given, task))
            if self._thread is None:
                name = f"simulated-{self.name}"
                self._thread = threading.Thread(target=self._work, name=name, daemon=True)
                self._thread.start()
            changed.notify_all()

    def until(self, event: SimulatedEvent) -> None:
        """Wait for an event of this stream, which is thereby wanted."""
        changed = self.device.changed
        with changed:
            self._wanted = max(self._wanted, event.number)
            changed.notify_all()
            changed.wait_for(lambda: event.over or self.device.failure is not None)
            if not event.over:
                self.device.raise_failure()

    # The thread's side -------------------------------------------------------------------------

    def _work(self) -> None:
        changed = self.device.changed
        while True:
            with changed:
                changed.wait_for(lambda: self._tasks or self.device.is_closed)
                if not self._tasks:
                    return
                number, task = self._tasks.popleft()
                self._hold_back(number)
            try:
                if self.device.failure is None:
                    task()
            except Exception as error:
                self.device.fail(error)
            with changed:
                self._done = number
                changed.notify_all()
            del task

    def _hold_back(self, number: int) -> None:
        seconds = self.device.delay(self.name)
        if seconds > 0.0:
            self.device.changed.wait_for(
                lambda: self._wanted >= number or self.device.is_closed or self.device.failure is not None,
                None if seconds == inf else seconds,
            )

    def join(self) -> None:
        """Let the thread end."""
        if self._thread is not None:
            self._thread.join()


class SimulatedDevice:
    """Implements `longtape.protocols.Device`; use it in a ``with`` statement, which ends its threads.

    Args:
        delay: How long copies and events are held back.
        memory_nbytes: What can be reserved on it.
        pinnable_nbytes: What the system lets be pinned.
        ignoring: Who does not wait when told to: for tests that show that they would notice.
        checks: Raise where two accesses are not ordered.
        fail_at: The copy, counted from 1, at which the device is lost; None: it is not.
    """

    name = "a simulated device"

    def __init__(
        self,
        delay: Delay = at_once,
        *,
        memory_nbytes: float = inf,
        pinnable_nbytes: float = inf,
        ignoring: Collection[Waiter] = (),
        checks: bool = True,
        fail_at: int | None = None,
    ) -> None:
        self.changed = threading.Condition()
        self.is_closed = False
        self.delay = delay
        self.failure: DeviceError | None = None
        self._memory, self._pinnable, self._fail_at = memory_nbytes, pinnable_nbytes, fail_at
        self._ignoring, self._checks = frozenset(ignoring), checks
        self._arenas: list[weakref.ref[Bytes]] = []
        self._peak = 0
        self._accesses: dict[tuple[str, int, int, bool], Access] = {}
        self.host_clock: Clock = {}
        """What the host knows to be done."""
        self.pinned: dict[int, int] = {}
        """By address: bytes that are pinned now."""
        self.reservations = 0
        """How often memory was reserved."""
        self.copies = 0
        self.compute = SimulatedStream(self, "compute")
        self.out = SimulatedStream(self, "out")
        self.into = SimulatedStream(self, "in")

    # Device ------------------------------------------------------------------------------------

    def reserve(self, nbytes: int) -> Bytes:
        """Memory full of a pattern that is no sensible number."""
        if nbytes > self._memory:
            raise BudgetError(
                f"{format_bytes(nbytes)} were asked of {self.name}, which has {format_bytes(self._memory)}"
            )
        self.reservations += 1
        room = np.full(nbytes + 64, 0xFF, np.uint8)
        start = -room.ctypes.data % 64
        arena = room[start : start + nbytes]
        self._arenas.append(weakref.ref(arena))
        self._peak = max(self._peak, self._in_use())
        return arena

    def _in_use(self) -> int:
        return sum(arena.nbytes for arena in self._living())

    def _living(self) -> list[Bytes]:
        self._arenas = [reference for reference in self._arenas if reference() is not None]
        return [arena for reference in self._arenas if (arena := reference()) is not None]

    def pin(self, memory: Bytes) -> None:
        with self.changed:
            if sum(self.pinned.values()) + memory.nbytes > self._pinnable:
                raise BudgetError(
                    f"{format_bytes(memory.nbytes)} of host memory could not be pinned; give a smaller host_memory"
                )
            if memory.nbytes:
                self.pinned[memory.ctypes.data] = memory.nbytes

    def unpin(self, memory: Bytes) -> None:
        with self.changed:
            if memory.nbytes:
                del self.pinned[memory.ctypes.data]

    def seconds(self, began: Event, ended: Event) -> float:
        assert isinstance(began, SimulatedEvent)
        assert isinstance(ended, SimulatedEvent)
        if not (began.over and ended.over):
            raise DeviceError("the time between events was asked for that are not over")
        return ended.seconds - began.seconds

    def begin_peak(self) -> int:
        self._peak = self._in_use()
        return self._peak

    def peak_nbytes(self) -> int:
        return self._peak

    def is_capturing(self) -> bool:
        return False

    # For its streams ---------------------------------------------------------------------------

    def ignores(self, who: str) -> bool:
        """Whether this one goes on where it should wait."""
        return who in self._ignoring

    def move(self, stream: str, target: Bytes, source: Bytes) -> None:
        """Copy, or be lost."""
        with self.changed:
            self.copies += 1
            lost = self.copies == self._fail_at
        if lost:
            raise DeviceError(f"{self.name} was lost at copy {self._fail_at}, on its stream {stream!r}")
        np.copyto(target, source)

    def check_pinned(self, *places: Bytes) -> None:
        """One side of a copy is on the device, the other in pinned memory."""
        with self.changed:
            for place in places:
                at = place.ctypes.data
                spans = [(a.ctypes.data, a.ctypes.data + a.nbytes) for a in self._living()]
                ours = any(start <= at and at + place.nbytes <= stop for start, stop in spans)
                pinned = any(start <= at and at + place.nbytes <= start + n for start, n in self.pinned.items())
                if not ours and not pinned:
                    raise DeviceError(f"a copy of {place.nbytes} bytes to or from memory that is not pinned")

    def note(self, access: Access, clock: Clock) -> None:
        """Hold an access against those before it, given what is done before it."""
        if not self._checks:
            return
        for other in self._accesses.values():
            if other.stream == access.stream or not (access.writes or other.writes):
                continue
            if other.start < access.stop and access.start < other.stop and clock.get(other.stream, 0) < other.moment:
                raise DeviceError(
                    f"the stream {access.stream!r} {'writes' if access.writes else 'reads'} bytes that the stream "
                    f"{other.stream!r} may not yet have {'written' if other.writes else 'read'}: no event orders them"
                )
        self._accesses[access.stream, access.start, access.stop, access.writes] = access

    def host_knows(self, event: SimulatedEvent) -> None:
        """The host has seen that an event is over: what it asks for from now on comes after."""
        _join(self.host_clock, event.clock)

    def fail(self, error: Exception) -> None:
        """From now on nothing works."""
        with self.changed:
            if self.failure is None:
                self.failure = error if isinstance(error, DeviceError) else DeviceError(f"the device failed: {error}")
            self.changed.notify_all()

    def raise_failure(self) -> None:
        """Raise what the device has failed with, if it has."""
        if self.failure is not None:
            raise DeviceError(f"the device failed while the sweeps were running: {self.failure}") from self.failure

    # Its life ------------------------------------------------------------------------------------

    def close(self) -> None:
        """End the threads; idempotent."""
        with self.changed:
            self.is_closed = True
            self.changed.notify_all()
        for stream in (self.compute, self.out, self.into):
            stream.join()

    def __enter__(self) -> SimulatedDevice:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _join(clock: Clock, other: Clock) -> None:
    for stream, moment in other.items():
        if moment > clock.get(stream, 0):
            clock[stream] = moment


def _array(memory: Any) -> Bytes:
    array: Bytes = memory if isinstance(memory, np.ndarray) else memory.numpy()
    return array
