"""The reverse sweep of the asynchronous plan: from restart point to restart point, fetching ahead.

Owns how an interval is reversed while the restart point below it is fetched, and how
recorded windows are pulled back.  See `asynchronous` for the whole.
"""

from __future__ import annotations

from collections.abc import Generator

from longtape.actions import (
    Action,
    Advance,
    Await,
    Discard,
    Free,
    Key,
    Kind,
    PullBack,
    Read,
    Record,
    Restore,
    Reverse,
    Turn,
    Write,
)
from longtape.errors import StorageError
from longtape.plan.binomial import advances, split
from longtape.plan.course import Actions, Course

MOST_READS_AHEAD = 4
"""Reads in progress at once: more would only delay the one that is needed first."""


class ReverseSweep:
    """Yields the actions of the reverse sweep, and of the tail that the forward sweep leaves to it."""

    def __init__(self, course: Course) -> None:
        self._course = course

    def run(self) -> Actions:
        while self._course.adjoint is not None and self._course.adjoint >= 0:
            top = self._course.adjoint
            while self._course.restarts and self._course.restarts[-1] > top:
                yield from self._course.finish(self._course.restarts[-1])
            while (
                self._course.recorded and self._course.recorded[-1] > top
            ):  # an empty window, by which the end was found
                yield Discard(self._course.residuals(self._course.recorded.pop()))
            if self._course.recorded and self._course.recorded[-1] == top:
                yield from self._pull_back(top)
            elif self._course.work == top:
                if self._course.restarts and self._course.restarts[-1] == top:
                    yield from self._course.finish(top)
                yield from self._take_adjoint(top)
            else:
                yield from self._reverse_interval(top)

    def _pull_back(self, window: int) -> Actions:
        """The adjoint of a recorded window, from its residuals."""
        key = self._course.residuals(window)
        shelf = self._course.stock.residuals
        shelf.protected.add(key.step)
        if key.step not in shelf.memory and key.step in shelf.stored:
            yield from self._course.make_room(Kind.RESIDUALS)
            yield Read(key)
        while shelf.known(key.step) and not shelf.resident(key.step):
            yield Await(key)
        shelf.protected.discard(key.step)
        self._course.recorded.pop()
        if not shelf.resident(key.step):
            return
        yield PullBack(self._course.at(window), self._course.at(window + 1))
        yield Discard(key)
        self._came_down(window)
        yield from self._prefetch_blocks()

    def _prefetch_blocks(self) -> Actions:
        """Read the blocks needed next into blocks that are free, or hold what is needed later."""
        shelf = self._course.stock.residuals
        if len(shelf.memory) >= len(self._course.recorded):
            return  # they are all there
        # Where windows are also re-recorded, one block is left for that, or it would take back a prefetched one.
        most = min(shelf.capacity, 2 * (self._course.layout.staging or shelf.capacity))
        most -= 1 if self._course.layout.record_fraction < 1 else 0
        held = 0
        for index in range(
            len(self._course.recorded) - 1, max(-1, len(self._course.recorded) - 1 - shelf.capacity), -1
        ):
            key = self._course.residuals(self._course.recorded[index])
            held += 1
            if held > most or shelf.available() <= 0:
                return
            if key.step in shelf.memory or key.step not in shelf.stored:
                continue
            if shelf.free == 0:
                victim = shelf.evictable()
                if victim is None or victim > key.step:
                    return
                yield Free(Key(Kind.RESIDUALS, victim))
            yield Read(key)

    def _take_adjoint(self, window: int) -> Actions:
        """Working state is at `window`: take its adjoint."""
        start, stop = self._course.at(window), self._course.at(window + 1)
        if self._course.layout.records:
            while start in self._course.stock.residuals.memory:
                yield Await(self._course.residuals(window))  # it was given up while it was being written
            yield from self._course.make_room(Kind.RESIDUALS)
            yield Record(start, stop)
            yield PullBack(start, stop)
            yield Discard(self._course.residuals(window))
        else:
            yield Reverse(start, stop)
        self._came_down(window)
        if self._course.recorded:
            yield from self._prefetch_blocks()

    def _came_down(self, window: int) -> None:
        self._course.adjoint = window - 1
        self._course.work = None

    def turn(self, last: int) -> Actions:
        """The forward sweep ends: run what is left of it and hand over to the caller."""
        if self._course.adjoint is None:
            if self._course.layout.final_state:
                if self._course.work is not None and self._course.work <= last:
                    yield Advance(self._course.at(self._course.work), self._course.at(last + 1))
                self._course.work = None
            self._course.adjoint = last
            yield Turn()

    def _reverse_interval(self, top: int) -> Actions:
        """Reverse from `top` down to the restart point below it, or to the next recorded window."""
        start = self._course.restarts[-1]
        self._course.protect(start)
        if not self._course.resident(start):
            yield from self._course.request(start)
            while self._course.coming(start) and not self._course.resident(start):
                yield Await(self._course.snapshot(start))
            if not self._course.resident(start):
                yield from self._lose(start)
                return
        base = self._course.recorded[-1] + 1 if self._course.recorded else 0
        if start < base:
            # The snapshot after the recorded windows was lost: run through them once more.
            yield Restore(self._course.at(start))
            yield Advance(self._course.at(start), self._course.at(base))
            self._course.work = base
            if self._course.stock.snapshots.available() == 0:
                yield from self._go(base, top)
                yield from self._take_adjoint(top)
                return
            yield from self._course.push(base)
            start = base
        start = yield from self._cut(start, top)
        below = self._course.restarts[-2] if len(self._course.restarts) > 1 else None
        length = top - start + 1
        slots = self._course.stock.snapshots.available() + 1
        if self._course.rules.deep:
            yield from self._prefetch_snapshots(max(1, min(length - 1, slots)) - 1)
        yield from self.interval(start, length, self._course.stock.snapshots.available() + 1, below)

    def _cut(self, start: int, top: int) -> Generator[Action, None, int]:
        """Store on the way up where little storage is to be used again; returns where the last piece begins."""
        course = self._course
        while (cut := course.cut(start, top - start + 1)) is not None:
            is_stored = course.is_stored(start, top - start - cut + 1)
            yield from self._go(start, start + cut)
            if start or not course.layout.pin_initial:
                course.unprotect(start)
            yield from course.push(start + cut)
            start += cut
            if not is_stored:
                break
            yield Write(course.snapshot(start))
        if course.layout.longest_piece:
            yield from course.wait_for_slots(top - start + 1)
        return start

    def _lose(self, window: int) -> Actions:
        """Live without a restart point: its interval merges with the one below."""
        yield from self._course.finish(window)
        if not self._course.restarts:
            raise StorageError(
                "state 0 was lost on storage, so that nothing is left to recompute from; give memory for three "
                "states or more, and it is kept there throughout"
            )

    def _prefetch_snapshots(self, needed: int) -> Actions:
        """Read further restart points ahead, but leave `needed` slots to the current interval."""
        course, shelf = self._course, self._course.stock.snapshots
        ahead = min(shelf.capacity, course.layout.held or course.layout.staging or shelf.capacity)
        spare = shelf.available() - needed
        for index in range(len(course.restarts) - 2, max(-1, len(course.restarts) - 2 - ahead), -1):
            window = course.restarts[index]
            if course.resident(window):
                spare -= course.stored(window) and not course.protects(window)
            if course.coming(window) or not course.stored(window):
                continue
            if len(course.stock.reads) >= MOST_READS_AHEAD or spare <= 0:
                return
            if shelf.free <= needed:
                victim = shelf.evictable()
                if victim is None or victim > course.snapshot(window).step:
                    return
                yield Free(Key(Kind.SNAPSHOT, victim))
            yield Read(course.snapshot(window))
            spare -= 1

    def _go(self, start: int, to: int) -> Actions:
        """Bring the working state to `to`, from the snapshot `start` unless it is already there."""
        if self._course.work not in (start, to):
            yield Restore(self._course.at(start))
            self._course.work = start
        if self._course.work < to:
            yield Advance(self._course.at(self._course.work), self._course.at(to))
            self._course.work = to

    def interval(self, start: int, length: int, slots: int, below: int | None) -> Actions:
        """Reverse one interval, and have the restart point `below` it in memory by the end of it.

        The rules, with l = `length`, c = `slots` and k the optimal first position: reverse
        the upper part [k, l) on c-1 slots while it is too early to fetch; fetch as late as
        the read can still hide behind the rest; where fetching takes a slot that Revolve
        wants, move the split so that the slot is only given up when the read must start.
        """
        if below is None or self._has_its_slot(below):
            yield from self._course.request(below)
            yield from self._revolve(start, length, slots)
            return
        lead = self._course.lead_seconds + 1e-9
        while length > 0:
            if length == 1:
                if slots >= 2:
                    yield from self._course.request(below)
                yield from self._single(start)
                yield from self._course.request(below)
                return
            if slots <= 1:
                yield from self._revolve(start, length, 1)
                yield from self._course.request(below)
                return
            if not self._must_turn() and advances(length, slots - 1) == advances(length, slots):
                yield from self._course.request(below)
                yield from self._revolve(start, length, slots - 1)
                return
            cut = split(length, min(slots, length))
            left = self._course.piece_seconds(cut, slots - 1)
            if self._course.work == start + length - 1 and not self._must_turn():
                yield from self._take_adjoint(start + length - 1)
                length -= 1
                continue
            if left < lead:
                cut_late = self._latest_split(length, slots, cut, lead)
                if cut_late is None:
                    yield from self._course.request(below)
                    yield from self._revolve(start, length, slots - 1)
                    return
                cut, left = cut_late, self._course.piece_seconds(cut_late, slots - 1)
                if left < lead:
                    yield from self._go(start, start + cut)
                    yield from self._course.push(start + cut)
                    yield from self._revolve(start + cut, length - cut, slots - 1, then_request=below)
                    yield from self._revolve(start, cut, slots - 1)
                    return
            yield from self._go(start, start + cut)
            yield from self._course.push(start + cut)
            yield from self._revolve(start + cut, length - cut, slots - 1)
            length = cut

    def _has_its_slot(self, window: int) -> bool:
        """Whether a restart point is being read or written, so that keeping it takes none of the slots there are."""
        shelf = self._course.stock.snapshots
        return self._course.coming(window) and self._course.snapshot(window).step not in shelf.clean

    def _latest_split(self, length: int, slots: int, cut: int, lead: float) -> int | None:
        """The split after whose upper part the fetch must start; None if fetching now costs no more."""
        with_adjoint = self._course.piece_seconds(cut, slots - 1) + self._course.reverse_seconds
        if with_adjoint >= lead:
            return cut
        if length < slots:
            return None
        low, high = cut, length
        while low < high:
            middle = (low + high) // 2
            if self._course.piece_seconds(middle, slots - 1) + self._course.reverse_seconds >= lead:
                high = middle
            else:
                low = middle + 1
        if low > length - 1:
            return None
        moved = low + advances(length - low, slots - 1) + advances(low, slots - 1)
        return low if moved <= advances(length, slots - 1) else None

    def _must_turn(self) -> bool:
        return self._course.adjoint is None

    def _single(self, window: int) -> Actions:
        """An interval of one window whose restart point is in memory: free its slot, then the adjoint."""
        if self._must_turn():
            yield from self.turn(window)
        if self._course.work != window:
            yield Restore(self._course.at(window))
            self._course.work = window
        yield from self._course.finish(window)
        yield from self._take_adjoint(window)

    def _revolve(self, start: int, length: int, slots: int, *, then_request: int | None = None) -> Actions:
        """Plain Revolve on ``[start, start + length)`` with `slots` slots, the one of `start` included.

        `then_request` is fetched as soon as the slot of `start` is free.
        """
        pieces = [(start, length, slots)]
        while pieces:
            start_of, length_of, slots_of = pieces.pop()
            while length_of > 1:
                target = start_of + length_of - 1
                # Of the last two windows, both starts are kept only where the working state goes on to the end.
                slots_of = max(1, min(slots_of, length_of if self._must_turn() else length_of - 1))
                if self._course.work == target and not self._must_turn():
                    yield from self._take_adjoint(target)
                    length_of -= 1
                elif slots_of == 1:
                    yield from self._go(start_of, target)
                    if self._must_turn():
                        yield from self.turn(target)
                        yield from self._go(start_of, target)
                    yield from self._take_adjoint(target)
                    length_of -= 1
                else:
                    cut = split(length_of, slots_of)
                    yield from self._go(start_of, start_of + cut)
                    yield from self._course.push(start_of + cut)
                    pieces.append((start_of, cut, slots_of))
                    start_of, length_of, slots_of = start_of + cut, length_of - cut, slots_of - 1
            if length_of == 1:
                last_of_all = then_request is not None and start_of == start
                if self._must_turn():
                    yield from self.turn(start_of)
                if self._course.work != start_of:
                    yield Restore(self._course.at(start_of))
                    self._course.work = start_of
                yield from self._course.finish(start_of)
                if last_of_all:
                    yield from self._course.request(then_request)
                yield from self._take_adjoint(start_of)
