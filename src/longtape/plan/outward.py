"""The forward sweep of the asynchronous plan: store or record as often as storage allows, never waiting.

Owns the rules that say which states are stored and which windows are recorded.  See
`asynchronous` for the whole.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Generator
from math import ceil, floor, inf

from longtape.actions import (
    Action,
    Advance,
    Await,
    Discard,
    Kind,
    Record,
    Store,
    Write,
)
from longtape.plan.course import Actions, Course
from longtape.plan.stock import Status


class ForwardSweep:
    """Yields the actions of the forward sweep up to the tail."""

    def __init__(self, course: Course) -> None:
        self._course = course
        self._tail = course.layout.tail
        self._last_store = 0
        self._gap_factor = 1

    def give_up_tail(self) -> None:
        """Run on to the end: keeping the tail would delay compute."""
        self._tail = 0

    def run(self, window: int) -> Generator[Action, None, int]:
        """Advance to the greedy end, storing as the rules say; returns the window it stopped at."""
        while window < self._greedy_end():
            if self._course.stock.failed:
                yield from self._drop_failed()
            if self._records_next(window):
                yield from self._record(window)
                window += 1
            else:
                yield from self._keep(window)
                following = self._next_look(window)
                yield Advance(self._course.at(window), self._course.at(following))
                window = following
            self._course.work = window
        return window

    def _greedy_end(self) -> float:
        """The first window the greedy sweep leaves alone."""
        if self._course.stock.steps is None:
            return inf
        count = self._course.windows(self._course.stock.steps)
        if self._tail:
            return count - max(1, min(count, self._course.windows(self._tail)))
        return count if self._course.layout.final_state else count - 1

    def _drop_failed(self) -> Actions:
        """Free the slots of items that could not be written; their intervals merge with the ones before."""
        while self._course.stock.failed:
            key = self._course.stock.failed.pop()
            if self._course.stock.shelf(key.kind).memory.get(key.step) is not Status.RESIDENT:
                continue
            window = key.step // self._course.layout.window
            kept = self._course.restarts if key.kind is Kind.SNAPSHOT else self._course.recorded
            if key.kind is Kind.SNAPSHOT and window == 0:
                continue
            index = bisect_left(kept, window)
            if index < len(kept) and kept[index] == window:
                del kept[index]
            yield Discard(key)

    def _keep(self, window: int) -> Actions:
        """Store the working state if the rules say so and a slot can be had without waiting."""
        after_record = bool(self._course.recorded) and self._course.recorded[-1] == window - 1
        run = self._course.layout.plain_run
        run_ends = run is not None and window - self._last_store >= run
        if not (after_record or run_ends or self._wants_snapshot(window)):
            if self._queue_is_stuck(window):
                yield from self._thin_queue()
            return
        if self._course.layout.fixed_spacing:
            while self._course.stock.snapshots.available() <= 0 and self._course.stock.writes:
                yield Await(room=Kind.SNAPSHOT)
        yield from self._try_store(window)

    def _try_store(self, window: int) -> Actions:
        self._last_store = window
        if window == 0 and self._course.layout.initial_is_free:
            self._course.restarts.append(0)
            return
        yield from self._course.reuse(Kind.SNAPSHOT)
        if self._course.stock.snapshots.free == 0:
            return
        yield Store(self._course.at(window))
        self._course.restarts.append(window)
        if self._course.layout.stores:
            yield Write(self._course.snapshot(window))

    def _wants_snapshot(self, window: int) -> bool:
        since = window - self._last_store
        if window == 0:
            return True
        if self._course.layout.fixed_spacing:
            return since >= self._course.windows(self._course.layout.fixed_spacing)
        stock = self._course.stock
        if self._course.rules.keep_spacing and since < max(1, floor(self._course.spacing())):
            return False
        ends_in_time = len(stock.writes) == 1 and stock.write_remainder() <= self._course.forward_seconds * (1 + 1e-9)
        if (not stock.writes or ends_in_time) and stock.unwritten(Kind.SNAPSHOT) < 2:
            self._gap_factor = 1
            return True
        return self._course.rules.elastic and self._wants_elastic(since)

    def _wants_elastic(self, since: int) -> bool:
        """Queue more than the writer can take now, into slots that would otherwise lie idle."""
        return self._gap_reached(since) and self._queue_has_room()

    def _gap_reached(self, since: int) -> bool:
        return self._course.stock.write.count > 0 and since >= self._gap_factor * max(1, ceil(self._course.spacing()))

    def _queue_has_room(self) -> bool:
        return self._course.stock.unwritten(Kind.SNAPSHOT) <= self._course.stock.snapshots.capacity - 2

    def _queue_is_stuck(self, window: int) -> bool:
        if not self._course.rules.elastic or self._course.layout.fixed_spacing:
            return False
        return self._gap_reached(window - self._last_store) and not self._queue_has_room()

    def _thin_queue(self) -> Actions:
        """Give up every other snapshot that waits to be written, and store half as often until the queue is empty."""
        for key in self._course.stock.queued_writes()[::2]:
            if key.kind is Kind.SNAPSHOT and key.step:
                index = bisect_left(self._course.restarts, key.step // self._course.layout.window)
                del self._course.restarts[index]
                yield Discard(key)
        self._gap_factor *= 2

    def _next_look(self, window: int) -> int:
        """Where to look at the writer again: as late as the rules allow, to keep the looking cheap."""
        following = window + 1
        if self._course.rules.grain_seconds and self._course.forward_seconds > 0:
            following = window + max(1, floor(self._course.rules.grain_seconds / self._course.forward_seconds))
        if self._course.layout.fixed_spacing:
            following = self._last_store + self._course.windows(self._course.layout.fixed_spacing)
        elif self._course.rules.keep_spacing:
            following = max(following, self._last_store + floor(self._course.spacing()))
        if self._course.layout.record_fraction:
            following = window + 1
        return int(min(max(following, window + 1), self._greedy_end()))

    def _records_next(self, window: int) -> bool:
        fraction = self._course.layout.record_fraction
        if fraction <= 0 or len(self._course.recorded) + 1 > fraction * (window + 1) + 1e-9:
            return False
        shelf = self._course.stock.residuals
        return shelf.free > 0 or shelf.evictable() is not None

    def _record(self, window: int) -> Actions:
        if window == 0 or window - self._last_store >= self._course.layout.safety:
            yield from self._try_store(window)
        yield from self._course.reuse(Kind.RESIDUALS)
        yield Record(self._course.at(window), self._course.at(window + 1))
        self._course.recorded.append(window)
        if self._course.layout.stores:
            yield Write(self._course.residuals(window))
