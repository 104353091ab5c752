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
    Free,
    Key,
    Kind,
    Record,
    Store,
    Write,
)
from longtape.plan.binomial import repetitions
from longtape.plan.course import Actions, Course
from longtape.plan.online import MOST_WEIGHED, cheapest_drop, next_look
from longtape.plan.stock import Status
from longtape.plan.thinning import Thinning

FAILURES_TO_GIVE_UP = 3
"""Writes in a row that fail for good before storage counts as dead, and memory is used as if there were none."""


DENSE_RESERVE = 2
"""Slots that are left to the reverse sweep where every state of the end is kept."""


class ForwardSweep:
    """Yields the actions of the forward sweep up to the tail."""

    def __init__(self, course: Course) -> None:
        self._course = course
        self._tail = course.layout.tail
        self._last_store = 0
        self._gap_factor = self._dense_gap = 1
        self._thinning = Thinning(course)
        self._failures = 0
        self._writes_ended = 0
        self._tries_again_at = self._patience = 0

    def give_up_tail(self) -> None:
        """Run on to the end: keeping the tail would delay compute."""
        self._tail = 0

    def keep_initial(self) -> Actions:
        """The working state is state 0: keep it as a sweep that begins does."""
        yield from self._try_store(0)

    def run(self, window: int) -> Generator[Action, None, int]:
        """Advance to the greedy end, storing as the rules say; returns the window it stopped at."""
        while window < self._greedy_end():
            yield from self._trust_again()
            if self._course.stock.failed:
                yield from self._deal_with_failed(window)
            if self._in_memory_alone():
                yield from self._keep_in_memory(window)
                yield from self._try_storage(window)
                following = int(min(self._next_look_in_memory(window), self._greedy_end()))
                yield Advance(self._course.at(window), self._course.at(following))
                window = following
            elif (yield from self._can_record(window)):
                yield from self._record(window)
                window += 1
            else:
                yield from self._keep(window)
                following = max(window + 1, self._next_look(window))
                yield Advance(self._course.at(window), self._course.at(following))
                window = following
            self._course.work = window
        return window

    def _greedy_end(self) -> float:
        """The first window the greedy sweep leaves alone."""
        if self._course.stock.steps is None:
            return inf
        count = self._course.windows(self._course.stock.steps)
        if self._course.layout.longest_piece:
            return self._last_piece(count)
        if self._tail:
            return count - max(1, min(count, self._course.windows(self._tail)))
        return count if self._course.layout.final_state else count - 1

    def _last_piece(self, count: int) -> int:
        """Where the piece begins that is reversed first, from memory alone; the end while that is not the next one."""
        start = self._course.restarts[-1] if self._course.restarts else 0
        cut = self._course.cut(start, count - start)
        if cut is None:
            return start
        return count if self._course.is_stored(start, count - start - cut) else start + cut

    def _next_cut(self) -> int:
        """The window to store at, where storage is cut short."""
        start, steps = self._course.restarts[-1], self._course.stock.steps
        assert steps is not None
        cut = self._course.cut(start, self._course.windows(steps) - start)
        return self._course.windows(steps) if cut is None else start + cut

    def _deal_with_failed(self, window: int) -> Actions:
        """Items that could not be written: once more where storage is full; else their intervals merge with others.

        When writes fail again and again, snapshots stay where they are, in memory.
        """
        stock = self._course.stock
        while stock.failed:
            key = stock.failed.pop()
            shelf = stock.shelf(key.kind)
            if shelf.memory.get(key.step) is not Status.RESIDENT or key.step in shelf.stored:
                continue  # given up, or written after all
            if not stock.has_room(key.kind) and (yield from self._thinning.make_room(key.kind)):
                if shelf.memory.get(key.step) is Status.RESIDENT:  # and not what was given up for room
                    yield Write(key)
                continue
            self._failures += 1
            if self._failures == FAILURES_TO_GIVE_UP:
                self._wait_before_trying(window, 1)
            if key.kind is Kind.RESIDUALS or not self._in_memory_alone():
                yield from self._drop(key)

    def _drop(self, key: Key) -> Actions:
        window = key.step // self._course.layout.window
        kept = self._course.restarts if key.kind is Kind.SNAPSHOT else self._course.recorded
        if key.kind is Kind.SNAPSHOT and window == 0:
            return
        index = bisect_left(kept, window)
        if index < len(kept) and kept[index] == window:
            del kept[index]
        yield Discard(key)

    # Memory alone: no storage, or none that works, and no end in sight -----------------------

    def _in_memory_alone(self) -> bool:
        stock = self._course.stock
        if not self._course.layout.stores:
            return not self._course.layout.record_fraction
        too_small = stock.storage_limit < stock.item_nbytes[Kind.SNAPSHOT]
        # Where the end is known, Revolve from the last stored state costs one sweep more at most.
        return stock.steps is None and (too_small or self._failures >= FAILURES_TO_GIVE_UP)

    def _next_look_in_memory(self, window: int) -> int:
        following = next_look(window, self._course.stock.snapshots.capacity)
        if self._course.rules.grain_seconds and self._course.forward_seconds > 0:
            following = max(following, window + floor(self._course.rules.grain_seconds / self._course.forward_seconds))
        return following

    def _wait_before_trying(self, window: int, spacings: int) -> None:
        self._patience = spacings
        self._tries_again_at = window + ceil(spacings * max(1.0, self._course.spacing()))

    def _try_storage(self, window: int) -> Actions:
        """Now and then, ever less often, see whether storage works again."""
        latest = self._course.restarts[-1] if self._course.restarts else 0
        if window < self._tries_again_at or not self._course.layout.stores or self._course.stock.writes:
            return
        if latest and self._is_in_memory_only(latest) and self._course.stock.has_room(Kind.SNAPSHOT):
            self._wait_before_trying(window, 2 * self._patience)
            yield Write(self._course.snapshot(latest))

    def _is_in_memory_only(self, window: int) -> bool:
        status = self._course.stock.snapshots.memory.get(window * self._course.layout.window)
        return status is Status.RESIDENT and not self._course.stored(window)

    def _trust_again(self) -> Actions:
        """If a write has ended well after all, write what is in memory only."""
        stock = self._course.stock
        if stock.writes_ended == self._writes_ended:
            return
        self._writes_ended = stock.writes_ended
        if self._failures >= FAILURES_TO_GIVE_UP:
            for restart in self._course.restarts:
                if self._is_in_memory_only(restart) and stock.has_room(Kind.SNAPSHOT):
                    yield Write(self._course.snapshot(restart))
        self._failures = 0

    def _keep_in_memory(self, window: int) -> Actions:
        """Store the working state, and if need be give up the restart point that is missed least."""
        course, shelf = self._course, self._course.stock.snapshots
        if window == 0:
            yield from self._try_store(0)
            return
        if course.at(window) in shelf.memory:
            return
        if shelf.capacity > MOST_WEIGHED:
            wanted = len(course.restarts) > shelf.capacity * 2 // 3 and self._thinning.least_gap > 0
            for _ in range((shelf.free == 0) + wanted):
                if (action := self._thinning.snapshot()) is not None:
                    yield action
            if window - self._last_store < self._thinning.least_gap:
                return
        elif shelf.free == 0:
            held = [restart for restart in course.restarts if course.resident(restart)]
            slots = shelf.capacity + (course.layout.initial_is_free and not shelf.resident(0))
            if len(held) < 2:
                return
            index = cheapest_drop([*held, window], slots)
            if index == len(held):
                return
            yield from self._give_up(held[index])
        if shelf.free:
            yield Store(course.at(window))
            course.restarts.append(window)
            self._last_store = window

    def _give_up(self, window: int) -> Actions:
        """Give up the memory of a restart point, and the restart point with it unless it is stored too."""
        key = self._course.snapshot(window)
        if self._course.stored(window):
            yield Free(key)
        else:
            yield from self._drop(key)

    # With storage ------------------------------------------------------------------------------

    def _keep(self, window: int) -> Actions:
        """Store the working state if the rules say so and a slot can be had without waiting."""
        if self._course.restarts and self._course.restarts[-1] == window:
            return
        after_record = bool(self._course.recorded) and self._course.recorded[-1] == window - 1
        run = self._course.layout.plain_run
        run_ends = run is not None and window - self._last_store >= run
        if not (after_record or run_ends or self._wants_snapshot(window)):
            if self._queue_is_stuck(window):
                yield from self._thin_queue()
            return
        if self._course.layout.fixed_spacing or self._course.layout.longest_piece:
            while self._course.stock.snapshots.available() <= 0 and self._course.stock.writes:
                yield Await(room=Kind.SNAPSHOT)
        if window and window >= self._dense_from():
            yield from self._spare_dense()
            if window - self._last_store < self._dense_gap:
                return
        elif window and not self._course.stock.has_room(Kind.SNAPSHOT):
            made = yield from self._thinning.make_room(Kind.SNAPSHOT)
            if not made or (not after_record and window - self._last_store < self._thinning.least_gap):
                return
        yield from self._try_store(window)

    def _try_store(self, window: int) -> Actions:
        self._last_store = window
        if self._course.restarts and self._course.restarts[-1] == window:
            return  # kept before, by a run that is gone on with
        if window == 0 and self._course.layout.initial_is_free:
            self._course.restarts.append(0)
            return
        yield from self._course.reuse(Kind.SNAPSHOT)
        if self._course.stock.snapshots.free == 0:
            return
        yield Store(self._course.at(window))
        self._course.restarts.append(window)
        waits = window >= self._dense_from() and not self._writer_is_free()
        if self._course.layout.stores and not waits and self._course.stock.has_room(Kind.SNAPSHOT):
            yield Write(self._course.snapshot(window))

    def _wants_snapshot(self, window: int) -> bool:
        since = window - self._last_store
        if window == 0:
            return True
        if since < self._thinning.least_gap or not self._course.layout.stores:
            return False
        if window >= self._dense_from():
            return since >= self._dense_gap
        if self._course.layout.longest_piece:
            return window >= self._next_cut()
        if self._course.layout.fixed_spacing:
            return since >= self._course.windows(self._course.layout.fixed_spacing)
        if self._course.rules.keep_spacing and since < max(1, floor(self._course.spacing())):
            return False
        if self._is_too_late(window):
            return False
        if self._writer_is_free():
            self._gap_factor = 1
            return True
        return self._course.rules.elastic and self._wants_elastic(since)

    def _is_too_late(self, window: int) -> bool:
        """Whether the interval up to the tail is so short that the read behind it would stall for longer than it saves.

        An interval of l windows hides l·(t_F + t_B) of the read of the one below; without it that one has l windows
        more, each advanced ρ times.
        """
        course, rest = self._course, self._greedy_end() - window
        if rest == inf or not self._tail or not window:
            return False
        again = repetitions(max(1, ceil(course.spacing())) + 1, max(1, course.stock.snapshots.capacity - 1))
        return rest * ((1 + again) * course.forward_seconds + course.reverse_seconds) < course.read_seconds

    def _writer_is_free(self) -> bool:
        """No write is under way, or the only one will have ended before one more window has.

        With a device, what is stored a window later can be written only after its copy to
        memory, which is so much later still; two writes may end in that time.
        """
        stock, copied = self._course.stock, self._course.layout.out_seconds
        if not stock.writes:
            return True
        most = 2 if copied and stock.unwritten(Kind.SNAPSHOT) == len(stock.writes) else 1
        until = self._course.forward_seconds + copied
        ahead = stock.write_remainder() + (len(stock.writes) - 1) * stock.write.value
        return len(stock.writes) <= most and ahead < until * (1 - 1e-9)

    def _dense_from(self) -> float:
        """The first window of the end of which every state is kept."""
        steps, dense = self._course.stock.steps, self._course.layout.dense
        return inf if steps is None or not dense else self._course.windows(steps) - self._course.windows(dense)

    def _spare_dense(self) -> Actions:
        """Where storage is slower than it was believed: keep every other state of the end, then every fourth, …"""
        course, shelf = self._course, self._course.stock.snapshots
        while shelf.available() < DENSE_RESERVE:
            alone = [k for k in course.restarts if k >= self._dense_from() and self._is_in_memory_only(k)]
            self._dense_gap *= 2
            if len(alone) < 2:
                return
            for restart in alone[-2::-2]:
                yield from self._drop(course.snapshot(restart))

    def _wants_elastic(self, since: int) -> bool:
        """Queue more than the writer can take now, into slots that would otherwise lie idle."""
        return self._gap_reached(since) and self._queue_has_room()

    def _gap_reached(self, since: int) -> bool:
        return self._course.stock.write.count > 0 and since >= self._gap_factor * max(1, ceil(self._course.spacing()))

    def _queue_has_room(self) -> bool:
        return self._course.stock.unwritten(Kind.SNAPSHOT) <= self._course.stock.snapshots.capacity - 2

    def _queue_is_stuck(self, window: int) -> bool:
        layout = self._course.layout
        if not self._course.rules.elastic or layout.fixed_spacing or layout.longest_piece:
            return False
        if window - self._last_store < self._thinning.least_gap:
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
        if self._course.layout.longest_piece:
            following = self._next_cut()
        elif self._course.layout.fixed_spacing:
            following = self._last_store + self._course.windows(self._course.layout.fixed_spacing)
        elif self._course.rules.keep_spacing:
            following = max(following, self._last_store + floor(self._course.spacing()))
        following = max(following, self._last_store + self._thinning.least_gap)
        if self._course.layout.record_fraction or window >= self._dense_from():
            following = window + 1
        following = int(min(following, max(window + 1, self._dense_from())))
        return int(min(max(following, window + 1), self._greedy_end()))

    def _can_record(self, window: int) -> Generator[Action, None, bool]:
        """Whether to record the next window: where its share says so, and memory and storage have room."""
        fraction = self._course.layout.record_fraction
        if fraction <= 0 or len(self._course.recorded) + 1 > fraction * (window + 1) + 1e-9:
            return False
        shelf = self._course.stock.residuals
        if shelf.free == 0 and shelf.evictable() is None:
            return False
        insured = window > 0 and window - self._last_store < self._course.layout.safety
        if not insured and (window == 0 or (yield from self._thinning.make_room(Kind.SNAPSHOT))):
            yield from self._try_store(window)
        return (yield from self._thinning.make_room(Kind.RESIDUALS))

    def _record(self, window: int) -> Actions:
        yield from self._course.reuse(Kind.RESIDUALS)
        yield Record(self._course.at(window), self._course.at(window + 1))
        self._course.recorded.append(window)
        if self._course.layout.stores:
            yield Write(self._course.residuals(window))
