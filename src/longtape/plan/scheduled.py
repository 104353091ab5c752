"""A schedule made elsewhere, as a plan: its own order of steps, with transfers begun early and in the background.

Owns how a `Transcript` becomes actions.  The schedule says which steps run and what is
kept; what it keeps on disk is written from the moment it is stored, and fetched ahead of
its use into slots that the schedule does not need for its snapshots in memory.

Invariants: steps run in the schedule's order and from the right states; what it keeps in
memory is never evicted; what storage loses is computed again from the state below.
"""

from __future__ import annotations

from longtape.actions import Advance, Await, Discard, Free, Key, Kind, Read, Restore, Reverse, Store, Turn, Write
from longtape.errors import BudgetError, StorageError, UsageError
from longtape.plan.choose import Choice
from longtape.plan.costs import Costs, Problem
from longtape.plan.course import Actions, Course
from longtape.plan.layout import Layout, Rules
from longtape.plan.predict import Prediction
from longtape.plan.stock import Status, Stock
from longtape.plan.transcript import Entry, Op, Place, Transcript

MOST_READS_AHEAD = 4
"""Reads in progress at once: more would only delay the one that is needed first."""

_LOOK_AHEAD = 16
"""Uses of disk that are looked ahead at."""


def settle(transcript: Transcript, problem: Problem, costs: Costs) -> Choice:
    """The given schedule as a choice: slots from the budget, and what the run is expected to take.

    Raises:
        BudgetError: The memory cannot hold what the schedule keeps in memory, and one state more
            if it uses the disk; says the least that would.
    """
    state = problem.state_nbytes
    least = max(1, transcript.memory_items + (1 if transcript.uses_disk else 0))
    slots = min(problem.memory_nbytes // state, transcript.memory_items + transcript.disk_items)
    if problem.memory_nbytes < least * state:
        beside = ", and one on its way to or from disk" if transcript.uses_disk else ""
        raise BudgetError(
            f"{transcript.name} keeps {transcript.memory_items} states at once in RAM and working storage{beside}: "
            f"that takes {least * state} bytes, but memory={problem.memory_nbytes}; give more, or use another schedule"
        )
    if problem.disk_nbytes is not None and transcript.disk_items * state > problem.disk_nbytes:
        raise BudgetError(
            f"{transcript.name} keeps {transcript.disk_items} states at once on disk, {transcript.disk_items * state} "
            f"bytes, but may take {problem.disk_nbytes} there: that is disk_limit, or what is free less a reserve; "
            "give more, free some, or use another schedule"
        )
    return Choice(
        schedule="given",
        window=1,
        spacing=transcript.steps / max(1, transcript.writes),
        slots=max(1, slots),
        blocks=0,
        record_fraction=0.0,
        tail=0,
        stall_spacing=None,
        prediction=_predict(transcript, problem, costs, max(1, slots)),
        disk_nbytes=problem.disk_nbytes,
    )


def _predict(transcript: Transcript, problem: Problem, costs: Costs, slots: int) -> Prediction:
    """Compute waits where all transfers of a kind together take longer than the sweep they belong to."""
    steps, state = transcript.steps, problem.state_nbytes
    forward = steps * costs.forward
    reverse = (transcript.advances - steps) * costs.forward + steps * costs.reverse
    stall = max(0.0, transcript.writes * costs.write_seconds(state) - forward)
    stall += max(0.0, transcript.reads * costs.read_seconds(state) - reverse)
    return Prediction(
        time_seconds=forward + reverse + stall,
        ideal_seconds=steps * (costs.forward + costs.reverse),
        peak_memory_bytes=slots * state,
        peak_disk_bytes=transcript.disk_items * state,
        advances=transcript.advances,
        writes=transcript.writes,
        reads=transcript.reads,
        bytes_written=transcript.writes * state,
        bytes_read=transcript.reads * state,
        stall_seconds=stall,
    )


class ScheduledPlan:
    """Yields the actions of one run of a transcript; iterate it once."""

    def __init__(self, stock: Stock, transcript: Transcript) -> None:
        self._stock, self._transcript = stock, transcript
        self._shelf = stock.snapshots
        self._course = Course(stock, Layout(), Rules())
        self._staging = self._shelf.capacity - transcript.memory_items
        self._work: int | None = 0
        self._kept: dict[int, Place] = {}
        self._in_memory = 0
        """Items that the schedule keeps in memory."""
        self._turned = False
        self._coming = 0
        """The next of the transcript's uses of disk."""

    def __iter__(self) -> Actions:
        for index, entry in enumerate(self._transcript):
            if self._turned:
                yield from self._prefetch(index)
            match entry.op:
                case Op.ADVANCE:
                    yield from self._go(entry.first)
                    yield Advance(entry.first, entry.second)
                    self._work = entry.second
                case Op.KEEP:
                    if entry.needed:
                        yield from self._go(entry.first)
                        yield from self._keep(entry.first, entry.place)
                case Op.COPY:
                    yield from self._copy(entry)
                case Op.LOAD:
                    yield from self._go(entry.first)
                    if entry.last:
                        yield from self._drop(entry.first, entry.source)
                case Op.REVERSE:
                    yield from self._go(entry.first)
                    yield Reverse(entry.first, entry.first + 1)
                    self._work = None
                case Op.TURN:
                    yield Turn()
                    self._work, self._turned = None, True
        if not self._transcript.reverses:
            raise UsageError(f"{self._transcript.name} takes no adjoint: it keeps nothing; use another schedule")

    def _key(self, step: int) -> Key:
        return Key(Kind.SNAPSHOT, step)

    # The working state -----------------------------------------------------------------------

    def _go(self, step: int) -> Actions:
        """Make state `step` the working state."""
        if self._work == step:
            return
        yield from self._bring(step)
        if self._work != step:
            yield Restore(step)
            self._work = step

    def _bring(self, step: int) -> Actions:
        """Have state `step` in memory; if storage has lost it, it is computed, and is then the working state."""
        course, shelf = self._course, self._shelf
        if not course.resident(step):
            was_protected = step in shelf.protected
            shelf.protected.add(step)
            if not course.coming(step) and course.stored(step):
                yield from self._make_room()
                yield Read(self._key(step))
            while course.coming(step) and not course.resident(step):
                yield Await(self._key(step))
            if not was_protected:
                shelf.protected.discard(step)
        if not course.resident(step):
            below = max((kept for kept in self._kept if kept < step and course.exists(kept)), default=None)
            if below is None:
                raise StorageError(
                    f"state {step} was lost on storage and nothing below it is left to compute it from; "
                    "use a schedule that keeps state 0 in memory, or another disk"
                )
            yield from self._go(below)
            yield Advance(below, step)
            self._work = step

    # What is kept ----------------------------------------------------------------------------

    def _keep(self, step: int, place: Place) -> Actions:
        """Keep the working state, which is `step`."""
        course, shelf = self._course, self._shelf
        before = self._kept.get(step, Place.NOWHERE)
        self._kept[step] = before | place
        if place & Place.MEMORY:
            self._in_memory += not before & Place.MEMORY
            shelf.protected.add(step)
        if not course.resident(step):
            if place is Place.DISK and course.stored(step):
                return
            while step in shelf.memory and not course.resident(step):
                yield Await(self._key(step))  # it is being read, or was given up while it was being written
            if not course.resident(step):
                yield from self._make_room()
                yield Store(step)
        if place is Place.DISK and not course.stored(step) and shelf.memory[step] is Status.RESIDENT:
            yield Write(self._key(step))

    def _copy(self, entry: Entry) -> Actions:
        """Keep a kept state in another place as well."""
        if not entry.needed:
            return
        step = entry.first
        yield from self._bring(step)
        yield from self._keep(step, entry.place)
        if entry.last:
            yield from self._drop(step, entry.source)

    def _drop(self, step: int, place: Place) -> Actions:
        """The copy in `place` has been used for the last time."""
        before = self._kept[step]
        left = before & ~place
        if before & Place.MEMORY and not left & Place.MEMORY:
            self._in_memory -= 1
            self._shelf.protected.discard(step)
        if left:
            self._kept[step] = left
            return
        del self._kept[step]
        if self._shelf.known(step):
            yield Discard(self._key(step))

    def _make_room(self) -> Actions:
        shelf, stock = self._shelf, self._stock
        if shelf.free == 0 and shelf.evictable() is None and not stock.writes and not stock.reads:
            unprotected = [step for step in shelf.memory if step not in shelf.protected]
            if unprotected == [0]:
                raise StorageError(
                    "state 0 could not be stored, and memory has no room for it beside what the schedule keeps there; "
                    "give memory for one more state, or another disk"
                )
        yield from self._course.make_room()

    # Reading ahead ---------------------------------------------------------------------------

    def _prefetch(self, index: int) -> Actions:
        """Begin to read what will be used next, into slots the schedule does not need for what it keeps in memory."""
        course, shelf, loads = self._course, self._shelf, self._transcript.disk_loads
        while self._coming < len(loads) and loads[self._coming] < index:
            self._coming += 1
        wanted: set[int] = set()
        for position in range(self._coming, min(len(loads), self._coming + _LOOK_AHEAD)):
            step = self._transcript.step_of(loads[position])
            wanted.add(step)
            if len(wanted) > self._staging or len(self._stock.reads) >= MOST_READS_AHEAD:
                return
            if course.coming(step) or not course.stored(step) or step in shelf.memory:
                continue
            if shelf.free == 0 or len(shelf.memory) - self._in_memory >= self._staging:
                victim = shelf.evictable()
                if victim is None or victim in wanted:
                    return
                yield Free(self._key(victim))
            yield Read(self._key(step))
