"""Times by the events of a device, told once they are known.

Owns the way from events to readings of the engine's clock, and the notes that wait for
events to be over.  Knows no action and no framework; on the executor's thread.

Invariants: notes of one list are told in the order in which they were made; nothing here
waits for the device but a list that is full, `Timeline.take_bearings` and `Notes.drain`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence

from longtape.protocols import Device, Event

MOST_AHEAD = 8
"""Actions that may have been asked of a device and not be done yet."""

Tell = Callable[[float, float], None]


class Timeline:
    """When the events of a device were, in seconds on the engine's clock."""

    def __init__(self, device: Device, clock: Callable[[], float]) -> None:
        self._device, self._clock = device, clock
        self.take_bearings()

    def take_bearings(self) -> None:
        """Set the two clocks against each other; waits for the device, so between the sweeps only."""
        base = self._device.compute.record()
        base.wait()
        self._base, self._at = base, self._clock()

    def span(self, began: Event, ended: Event) -> tuple[float, float]:
        """When two events were that are over.

        A device tells times between events in single precision: how long something took is asked for by
        itself, and is exact however long the sweep.
        """
        start = self._at + self._device.seconds(self._base, began)
        return start, start + self._device.seconds(began, ended)


class Notes:
    """Pairs of events, and whom to tell when they were.

    Args:
        timeline: Where they are looked up.
        most: How many may wait; None: any number.
    """

    def __init__(self, timeline: Timeline, most: int | None = None) -> None:
        self._timeline, self._most = timeline, most
        self._waiting: deque[tuple[Event, Event, Tell]] = deque()

    def add(self, began: Event, ended: Event, tell: Tell) -> None:
        """Note a pair; where too many wait, wait for the first of them."""
        self._waiting.append((began, ended, tell))
        if self._most is not None and len(self._waiting) > self._most:
            self._waiting[0][1].wait()
            self._tell_first()

    def __len__(self) -> int:
        return len(self._waiting)

    def poll(self) -> None:
        """Tell of those that are over; never waits."""
        while self._waiting and self._waiting[0][1].is_over():
            self._tell_first()

    def drain(self) -> None:
        """Wait for all, and tell of them."""
        while self._waiting:
            self._waiting[0][1].wait()
            self._tell_first()

    def _tell_first(self) -> None:
        began, ended, tell = self._waiting.popleft()
        tell(*self._timeline.span(began, ended))


class EventMeter:
    """Implements `longtape.protocols.Meter` with the events of a device's compute stream.

    Args:
        device: Whose.
        timeline: Where they are looked up.
        beside: Notes of other streams, to be told of whenever those of actions are.
        most_ahead: Actions that may have been asked for and not be done; `MOST_AHEAD` if None.
    """

    def __init__(
        self, device: Device, timeline: Timeline, *, beside: Sequence[Notes] = (), most_ahead: int | None = None
    ) -> None:
        self._device, self._beside = device, beside
        self._notes = Notes(timeline, MOST_AHEAD if most_ahead is None else most_ahead)

    def mark(self) -> Event:
        return self._device.compute.record()

    def note(self, began: Event, ended: Event, tell: Tell) -> None:
        self._notes.add(began, ended, tell)

    @property
    def ahead(self) -> int:
        """Actions that were asked for and are not known to be done."""
        return len(self._notes)

    def poll(self) -> None:
        for notes in (self._notes, *self._beside):
            notes.poll()

    def drain(self) -> None:
        """Wait for all that was noted."""
        for notes in (self._notes, *self._beside):
            notes.drain()
