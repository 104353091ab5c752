"""The asynchronous multistage plan: store while computing, prefetch while reversing, Revolve in between.

Owns the algorithm and nothing else.  It reads a `Stock`, yields actions and knows
no clock, array, file or thread.  One generator serves every case:

* no storage: the whole sequence is the tail, which is plain Revolve;
* storage: snapshots go to storage as often as it takes them, and between two of
  them Revolve recomputes within the free slots, prefetching the next one just in
  time;
* a job that records: windows whose residuals storage can carry are recorded, and
  are neither stored as snapshots nor recomputed.

Units.  Inside this file positions are *windows*: window k holds steps
``[k·window, (k+1)·window)``, cut off at N.  Everything that leaves it is in steps.

Invariants: forward, nothing is awaited unless a fixed spacing was asked for; the
adjoint comes down one window at a time; a snapshot that is lost only merges two
intervals; the initial state is never given up before the adjoint of step 0.

Source: Griewank and Walther 2000 for Revolve; Kukreja, Hückelheim and Gorman 2018
for the idea of asynchronous storing and prefetching.  The rules that differ from
theirs are explained in ``docs/design.md``.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from math import ceil, floor, inf

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
    Store,
    Turn,
    Write,
)
from longtape.errors import PlanError, StorageError
from longtape.plan.binomial import advances, split
from longtape.plan.stock import Shelf, Status, Stock

Actions = Iterator[Action]

MOST_READS_AHEAD = 4
"""Reads in progress at once: more would only delay the one that is needed first."""


@dataclass(frozen=True, slots=True)
class Rules:
    """How the plan treats costs it can only estimate.

    The defaults are for real machines; `EXACT` is for costs known to the digit.
    """

    keep_spacing: bool = True
    """Never store closer together than ⌊t_w/t_f⌋ windows, however idle the writer looks."""

    elastic: bool = True
    """Let the write queue grow into free slots while storage stalls, and thin it out when it cannot."""

    margin: float = 1.0
    """Prefetch ahead by (1 + margin) times the expected read."""

    deep: bool = True
    """Prefetch further restart points into slots the current interval cannot use."""

    grain_seconds: float = 100e-6
    """Look at the writer no more often than this, so that tiny steps are not slowed by the looking."""


EXACT = Rules(keep_spacing=False, elastic=False, margin=0.0, deep=False, grain_seconds=0.0)


@dataclass(frozen=True, slots=True)
class Layout:
    """The choices a plan is made with; all counted in steps."""

    window: int = 1
    """Steps whose adjoint is taken in one go."""

    tail: int = 0
    """The last steps, which the forward sweep already stores as Revolve would.  N: no storage is used."""

    fixed_spacing: int | None = None
    """Store at every such step, waiting for storage where it does not keep up; None: as storage allows."""

    records: bool = False
    """Adjoints are taken from residuals: of windows recorded forward, or re-recorded in reverse."""

    record_fraction: float = 0.0
    """Most of the windows to record in the forward sweep, for storage to carry."""

    stores: bool = True
    """Whether there is storage to write to."""

    safety: int = 32
    """While windows are recorded, still store a snapshot every so many windows, against lost blocks."""

    staging: int | None = None
    """Forward, hold no more items of a kind in memory than this while stored ones can make room.

    Memory that was never touched costs more to touch than a stored item costs to read back.
    None: fill the memory there is.
    """

    final_state: bool = True
    """Whether the forward sweep runs the last window too, because the caller needs the final state."""

    initial_is_free: bool = False
    """The job can restore state 0 by itself, without a slot."""

    pin_initial: bool = False
    """Keep state 0 in its slot throughout, so that no fault of storage can cost it."""


class AsynchronousPlan:
    """Yields the actions of one run; iterate it once."""

    def __init__(self, stock: Stock, layout: Layout, rules: Rules | None = None) -> None:
        self.stock = stock
        self.layout = layout
        self.rules = rules or Rules()
        self._work: int | None = 0
        self._adjoint: int | None = None
        """The highest window not yet reversed; None until the sweep turns."""
        self._restarts = array("q")
        """Windows whose start was kept, ascending."""
        self._recorded = array("q")
        """Windows recorded in the forward sweep, ascending."""
        self._tail = layout.tail
        self._last_store = 0
        self._gap_factor = 1

    def __iter__(self) -> Actions:
        yield from self._forward()
        yield from self._reverse()

    # Windows and steps -----------------------------------------------------------------------

    def _at(self, window: int) -> int:
        step = window * self.layout.window
        return step if self.stock.steps is None else min(step, self.stock.steps)

    def _windows(self, steps: int) -> int:
        return -(-steps // self.layout.window)

    def _snapshot(self, window: int) -> Key:
        return Key(Kind.SNAPSHOT, window * self.layout.window)

    def _residuals(self, window: int) -> Key:
        return Key(Kind.RESIDUALS, window * self.layout.window)

    def _resident(self, window: int) -> bool:
        if window == 0 and self.layout.initial_is_free:
            return True
        return self.stock.snapshots.resident(window * self.layout.window)

    def _coming(self, window: int) -> bool:
        """In memory or on its way there."""
        status = self.stock.snapshots.memory.get(window * self.layout.window)
        return self._resident(window) or status is Status.READING

    def _stored(self, window: int) -> bool:
        return window * self.layout.window in self.stock.snapshots.stored

    def _exists(self, window: int) -> bool:
        return (window == 0 and self.layout.initial_is_free) or self.stock.snapshots.known(window * self.layout.window)

    # Costs, per window -------------------------------------------------------------------------

    @property
    def _forward_seconds(self) -> float:
        return self.stock.forward.value * self.layout.window

    @property
    def _reverse_seconds(self) -> float:
        stock = self.stock
        return (stock.reverse.value if stock.reverse.count else 2.0 * stock.forward.value) * self.layout.window

    @property
    def _read_seconds(self) -> float:
        return (self.stock.read if self.stock.read.count else self.stock.write).value

    def _spacing(self) -> float:
        """Windows that pass during one write; 0 while nothing is known of it."""
        step = self._forward_seconds
        return self.stock.write.value / step if step > 0 else 0.0

    def _piece_seconds(self, length: int, slots: int) -> float:
        if slots < 1 and length > 1:
            return inf
        recomputed = advances(length, slots) if length > 1 else 0
        return recomputed * self._forward_seconds + length * self._reverse_seconds

    # Slots -------------------------------------------------------------------------------------

    def _evict(self, kind: Kind = Kind.SNAPSHOT) -> Action | None:
        step = self.stock.shelf(kind).evictable()
        return None if step is None else Free(Key(kind, step))

    def _reuse(self, kind: Kind) -> Actions:
        """Evict a stored item if there is no free slot, or none that should be touched."""
        shelf, staging = self.stock.shelf(kind), self.layout.staging
        if shelf.free == 0 or (staging is not None and len(shelf.memory) >= staging):
            action = self._evict(kind)
            if action is not None:
                yield action

    def _make_room(self, kind: Kind = Kind.SNAPSHOT, *, required: bool = True) -> Generator[Action, None, bool]:
        """Free one slot, waiting for a transfer to end where nothing can be evicted; False if that cannot be.

        It always can, unless reads that never answered have cost the slots it takes.
        """
        shelf = self.stock.shelf(kind)
        while shelf.free == 0:
            action = self._evict(kind) or self._give_up(kind)
            if action is None:
                if not self.stock.writes and not self.stock.reads:
                    if required:
                        raise self._no_room(shelf)
                    return False
                action = Await()
            yield action
        return True

    def _no_room(self, shelf: Shelf) -> Exception:
        if shelf.capacity < shelf.made_with:
            return StorageError(
                f"storage stopped answering in the middle of reading, and holds the memory of "
                f"{shelf.made_with - shelf.capacity} of {shelf.made_with} {shelf.kind.value} items, without which the "
                "sweep cannot go on; give more memory, or another disk"
            )
        return PlanError(f"no {shelf.kind.value} slot can be freed: {sorted(shelf.memory)[:20]} are all in use")

    def _give_up(self, kind: Kind) -> Action | None:
        """An item whose write failed, and which nothing protects, when there is no other way."""
        if self.stock.writes or self.stock.reads:
            return None
        shelf = self.stock.shelf(kind)
        spared = {0} if kind is Kind.SNAPSHOT else set()
        unprotected = [s for s, v in shelf.memory.items() if v is Status.RESIDENT and s not in shelf.protected | spared]
        return Discard(Key(kind, min(unprotected))) if unprotected else None

    def _protect(self, window: int) -> None:
        self.stock.snapshots.protected.add(window * self.layout.window)

    def _push(self, window: int) -> Actions:
        """Keep the working state, which is at `window`, in a slot of its own until its adjoint."""
        if not (window == 0 and self.layout.initial_is_free):
            while window * self.layout.window in self.stock.snapshots.memory:
                yield Await(self._snapshot(window))  # it was given up while it was being written
            yield from self._make_room()
            yield Store(self._at(window))
            self._protect(window)
        self._restarts.append(window)

    def _finish(self, window: int) -> Actions:
        """The restart point is not needed again."""
        self.stock.snapshots.protected.discard(window * self.layout.window)
        if self._restarts and self._restarts[-1] == window:
            self._restarts.pop()
        if self.stock.snapshots.known(window * self.layout.window):
            yield Discard(self._snapshot(window))

    def _request(self, window: int | None) -> Actions:
        """Have a stored restart point brought into memory, and keep it there."""
        if window is None or not self._exists(window):
            return
        self._protect(window)
        if not self._coming(window) and self._stored(window) and (yield from self._make_room(required=False)):
            yield Read(self._snapshot(window))

    # Forward sweep -----------------------------------------------------------------------------

    def _forward(self) -> Actions:
        if self.layout.pin_initial:
            self._protect(0)
        window = yield from self._greedy(0)
        if self.layout.tail and self._restarts and self.stock.snapshots.available() == 0:
            self._tail = 0  # every slot waits to be written: keeping the tail would delay compute
            window = yield from self._greedy(window)
        if self.stock.steps is None:
            raise PlanError("the job did not say where the sequence ends")
        last = self._windows(self.stock.steps) - 1
        if window > last or (not self.layout.final_state and window == last):
            yield from self._turn(last)
            return
        yield from self._push(window)
        below = self._restarts[-2] if len(self._restarts) > 1 else None
        yield from self._interval(window, last - window + 1, self.stock.snapshots.available() + 1, below)

    def _greedy_end(self) -> float:
        """The first window the greedy sweep leaves alone."""
        if self.stock.steps is None:
            return inf
        count = self._windows(self.stock.steps)
        if self._tail:
            return count - max(1, min(count, self._windows(self._tail)))
        return count if self.layout.final_state else count - 1

    def _greedy(self, window: int) -> Generator[Action, None, int]:
        """Advance to the greedy end, storing as the rules say; returns the window it stopped at."""
        while window < self._greedy_end():
            if self.stock.failed:
                yield from self._drop_failed()
            if self._records_next(window):
                yield from self._record(window)
                window += 1
            else:
                yield from self._keep(window)
                following = self._next_look(window)
                yield Advance(self._at(window), self._at(following))
                window = following
            self._work = window
        return window

    def _drop_failed(self) -> Actions:
        """Free the slots of items that could not be written; their intervals merge with the ones before."""
        while self.stock.failed:
            key = self.stock.failed.pop()
            if self.stock.shelf(key.kind).memory.get(key.step) is not Status.RESIDENT:
                continue
            window = key.step // self.layout.window
            kept = self._restarts if key.kind is Kind.SNAPSHOT else self._recorded
            if key.kind is Kind.SNAPSHOT and window == 0:
                continue
            index = bisect_left(kept, window)
            if index < len(kept) and kept[index] == window:
                del kept[index]
            yield Discard(key)

    def _keep(self, window: int) -> Actions:
        """Store the working state if the rules say so and a slot can be had without waiting."""
        after_record = bool(self._recorded) and self._recorded[-1] == window - 1
        if not (after_record or self._wants_snapshot(window)):
            if self._queue_is_stuck(window):
                yield from self._thin_queue()
            return
        if self.layout.fixed_spacing:
            while self.stock.snapshots.available() <= 0 and self.stock.writes:
                yield Await()
        yield from self._try_store(window)

    def _try_store(self, window: int) -> Actions:
        self._last_store = window
        if window == 0 and self.layout.initial_is_free:
            self._restarts.append(0)
            return
        yield from self._reuse(Kind.SNAPSHOT)
        if self.stock.snapshots.free == 0:
            return
        yield Store(self._at(window))
        self._restarts.append(window)
        if self.layout.stores:
            yield Write(self._snapshot(window))

    def _wants_snapshot(self, window: int) -> bool:
        since = window - self._last_store
        if window == 0:
            return True
        if self.layout.fixed_spacing:
            return since >= self._windows(self.layout.fixed_spacing)
        stock = self.stock
        if self.rules.keep_spacing and since < max(1, floor(self._spacing())):
            return False
        ends_in_time = len(stock.writes) == 1 and stock.write_remainder() <= self._forward_seconds * (1 + 1e-9)
        if (not stock.writes or ends_in_time) and stock.unwritten(Kind.SNAPSHOT) < 2:
            self._gap_factor = 1
            return True
        return self.rules.elastic and self._wants_elastic(since)

    def _wants_elastic(self, since: int) -> bool:
        """Queue more than the writer can take now, into slots that would otherwise lie idle."""
        return self._gap_reached(since) and self._queue_has_room()

    def _gap_reached(self, since: int) -> bool:
        return self.stock.write.count > 0 and since >= self._gap_factor * max(1, ceil(self._spacing()))

    def _queue_has_room(self) -> bool:
        return self.stock.unwritten(Kind.SNAPSHOT) <= self.stock.snapshots.capacity - 2

    def _queue_is_stuck(self, window: int) -> bool:
        if not self.rules.elastic or self.layout.fixed_spacing:
            return False
        return self._gap_reached(window - self._last_store) and not self._queue_has_room()

    def _thin_queue(self) -> Actions:
        """Give up every other snapshot that waits to be written, and store half as often until the queue is empty."""
        for key in self.stock.queued_writes()[::2]:
            if key.kind is Kind.SNAPSHOT and key.step:
                index = bisect_left(self._restarts, key.step // self.layout.window)
                del self._restarts[index]
                yield Discard(key)
        self._gap_factor *= 2

    def _next_look(self, window: int) -> int:
        """Where to look at the writer again: as late as the rules allow, to keep the looking cheap."""
        following = window + 1
        if self.rules.grain_seconds and self._forward_seconds > 0:
            following = window + max(1, floor(self.rules.grain_seconds / self._forward_seconds))
        if self.layout.fixed_spacing:
            following = self._last_store + self._windows(self.layout.fixed_spacing)
        elif self.rules.keep_spacing:
            following = max(following, self._last_store + floor(self._spacing()))
        if self.layout.record_fraction:
            following = window + 1
        return int(min(max(following, window + 1), self._greedy_end()))

    # Recording ---------------------------------------------------------------------------------

    def _records_next(self, window: int) -> bool:
        fraction = self.layout.record_fraction
        if fraction <= 0 or len(self._recorded) + 1 > fraction * (window + 1) + 1e-9:
            return False
        shelf = self.stock.residuals
        return shelf.free > 0 or shelf.evictable() is not None

    def _record(self, window: int) -> Actions:
        if window == 0 or window - self._last_store >= self.layout.safety:
            yield from self._try_store(window)
        yield from self._reuse(Kind.RESIDUALS)
        yield Record(self._at(window), self._at(window + 1))
        self._recorded.append(window)
        if self.layout.stores:
            yield Write(self._residuals(window))

    def _pull_back(self, window: int) -> Actions:
        """The adjoint of a recorded window, from its residuals."""
        key = self._residuals(window)
        shelf = self.stock.residuals
        shelf.protected.add(key.step)
        if key.step not in shelf.memory and key.step in shelf.stored:
            yield from self._make_room(Kind.RESIDUALS)
            yield Read(key)
        while shelf.known(key.step) and not shelf.resident(key.step):
            yield Await(key)
        shelf.protected.discard(key.step)
        self._recorded.pop()
        if not shelf.resident(key.step):
            return
        yield PullBack(self._at(window), self._at(window + 1))
        yield Discard(key)
        self._came_down(window)
        yield from self._prefetch_blocks()

    def _prefetch_blocks(self) -> Actions:
        """Read the blocks needed next into blocks that are free, or hold what is needed later."""
        shelf = self.stock.residuals
        # Where windows are also re-recorded, one block is left for that, or it would take back a prefetched one.
        most = min(shelf.capacity, 2 * (self.layout.staging or shelf.capacity))
        most -= 1 if self.layout.record_fraction < 1 else 0
        held = 0
        for index in range(len(self._recorded) - 1, max(-1, len(self._recorded) - 1 - shelf.capacity), -1):
            key = self._residuals(self._recorded[index])
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

    # The adjoint of one window -----------------------------------------------------------------

    def _take_adjoint(self, window: int) -> Actions:
        """Working state is at `window`: take its adjoint."""
        start, stop = self._at(window), self._at(window + 1)
        if self.layout.records:
            yield from self._make_room(Kind.RESIDUALS)
            yield Record(start, stop)
            yield PullBack(start, stop)
            yield Discard(self._residuals(window))
        else:
            yield Reverse(start, stop)
        self._came_down(window)
        if self._recorded:
            yield from self._prefetch_blocks()

    def _came_down(self, window: int) -> None:
        self._adjoint = window - 1
        self._work = None

    def _turn(self, last: int) -> Actions:
        """The forward sweep ends: run what is left of it and hand over to the caller."""
        if self._adjoint is None:
            if self.layout.final_state:
                if self._work is not None and self._work <= last:
                    yield Advance(self._at(self._work), self._at(last + 1))
                self._work = None
            self._adjoint = last
            yield Turn()

    # Reverse sweep -----------------------------------------------------------------------------

    def _reverse(self) -> Actions:
        while self._adjoint is not None and self._adjoint >= 0:
            top = self._adjoint
            while self._restarts and self._restarts[-1] > top:
                yield from self._finish(self._restarts[-1])
            while self._recorded and self._recorded[-1] > top:  # an empty window, by which the end was found
                yield Discard(self._residuals(self._recorded.pop()))
            if self._recorded and self._recorded[-1] == top:
                yield from self._pull_back(top)
            elif self._work == top:
                if self._restarts and self._restarts[-1] == top:
                    yield from self._finish(top)
                yield from self._take_adjoint(top)
            else:
                yield from self._reverse_interval(top)

    def _reverse_interval(self, top: int) -> Actions:
        """Reverse from `top` down to the restart point below it, or to the next recorded window."""
        start = self._restarts[-1]
        self._protect(start)
        if not self._resident(start):
            yield from self._request(start)
            while self._coming(start) and not self._resident(start):
                yield Await(self._snapshot(start))
            if not self._resident(start):
                yield from self._lose(start)
                return
        base = self._recorded[-1] + 1 if self._recorded else 0
        if start < base:
            # The snapshot after the recorded windows was lost: run through them once more.
            yield Restore(self._at(start))
            yield Advance(self._at(start), self._at(base))
            self._work = base
            if self.stock.snapshots.available() == 0:
                yield from self._go(base, top)
                yield from self._take_adjoint(top)
                return
            yield from self._push(base)
            start = base
        below = self._restarts[-2] if len(self._restarts) > 1 else None
        length = top - start + 1
        slots = self.stock.snapshots.available() + 1
        if self.rules.deep:
            yield from self._prefetch_snapshots(min(length, slots) - 1)
        yield from self._interval(start, length, self.stock.snapshots.available() + 1, below)

    def _lose(self, window: int) -> Actions:
        """Live without a restart point: its interval merges with the one below."""
        yield from self._finish(window)
        if not self._restarts:
            raise StorageError(
                "state 0 was lost on storage, so that nothing is left to recompute from; give memory for three "
                "states or more, and it is kept there throughout"
            )

    def _prefetch_snapshots(self, needed: int) -> Actions:
        """Read further restart points ahead, but leave `needed` slots to the current interval."""
        shelf = self.stock.snapshots
        ahead = min(shelf.capacity, self.layout.staging or shelf.capacity)
        for index in range(len(self._restarts) - 2, max(-1, len(self._restarts) - 2 - ahead), -1):
            window = self._restarts[index]
            if self._coming(window) or not self._stored(window):
                continue
            if len(self.stock.reads) >= MOST_READS_AHEAD:
                return
            if shelf.free <= needed:
                victim = shelf.evictable()
                if victim is None or victim > self._snapshot(window).step:
                    return
                yield Free(Key(Kind.SNAPSHOT, victim))
            yield Read(self._snapshot(window))

    def _go(self, start: int, to: int) -> Actions:
        """Bring the working state to `to`, from the snapshot `start` unless it is already there."""
        if self._work not in (start, to):
            yield Restore(self._at(start))
            self._work = start
        if self._work < to:
            yield Advance(self._at(self._work), self._at(to))
            self._work = to

    def _interval(self, start: int, length: int, slots: int, below: int | None) -> Actions:
        """Reverse one interval, and have the restart point `below` it in memory by the end of it.

        The rules, with l = `length`, c = `slots` and k the optimal first position: reverse
        the upper part [k, l) on c-1 slots while it is too early to fetch; fetch as late as
        the read can still hide behind the rest; where fetching takes a slot that Revolve
        wants, move the split so that the slot is only given up when the read must start.
        """
        if below is None:
            yield from self._revolve(start, length, slots)
            return
        lead = (1.0 + self.rules.margin) * self._read_seconds + 1e-9
        while length > 0:
            requested = below * self.layout.window in self.stock.snapshots.protected and self._coming(below)
            if length == 1:
                if not requested and slots >= 2:
                    yield from self._request(below)
                yield from self._single(start)
                yield from self._request(below)
                return
            if slots <= 1:
                yield from self._revolve(start, length, 1)
                yield from self._request(below)
                return
            cut = split(length, min(slots, length))
            left = self._piece_seconds(cut, slots - 1)
            if self._work == start + length - 1 and not self._must_turn():
                yield from self._take_adjoint(start + length - 1)
                length -= 1
                continue
            if not requested and left < lead:
                cut_late = self._latest_split(length, slots, cut, lead)
                if cut_late is None:
                    yield from self._request(below)
                    yield from self._revolve(start, length, slots - 1)
                    return
                cut, left = cut_late, self._piece_seconds(cut_late, slots - 1)
                if left < lead:
                    yield from self._go(start, start + cut)
                    yield from self._push(start + cut)
                    yield from self._revolve(start + cut, length - cut, slots - 1, then_request=below)
                    yield from self._revolve(start, cut, slots - 1)
                    return
            if left >= lead:
                yield from self._go(start, start + cut)
                yield from self._push(start + cut)
                yield from self._revolve(start + cut, length - cut, slots - 1)
                length = cut
                continue
            yield from self._request(below)
            yield from self._revolve(start, length, slots - 1)
            return

    def _latest_split(self, length: int, slots: int, cut: int, lead: float) -> int | None:
        """The split after whose upper part the fetch must start; None if fetching now costs no more."""
        with_adjoint = self._piece_seconds(cut, slots - 1) + self._reverse_seconds
        if with_adjoint >= lead:
            return cut
        if length < slots:
            return None
        low, high = cut, length
        while low < high:
            middle = (low + high) // 2
            if self._piece_seconds(middle, slots - 1) + self._reverse_seconds >= lead:
                high = middle
            else:
                low = middle + 1
        if low > length - 1:
            return None
        moved = low + advances(length - low, slots - 1) + advances(low, slots - 1)
        return low if moved <= advances(length, slots - 1) else None

    def _must_turn(self) -> bool:
        return self._adjoint is None

    def _single(self, window: int) -> Actions:
        """An interval of one window whose restart point is in memory: free its slot, then the adjoint."""
        if self._must_turn():
            yield from self._turn(window)
        if self._work != window:
            yield Restore(self._at(window))
            self._work = window
        yield from self._finish(window)
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
                if self._work == target and not self._must_turn():
                    yield from self._take_adjoint(target)
                    length_of -= 1
                elif min(slots_of, length_of) <= 1:
                    yield from self._go(start_of, target)
                    if self._must_turn():
                        yield from self._turn(target)
                        yield from self._go(start_of, target)
                    yield from self._take_adjoint(target)
                    length_of -= 1
                else:
                    slots_of = min(slots_of, length_of)
                    cut = split(length_of, slots_of)
                    yield from self._go(start_of, start_of + cut)
                    yield from self._push(start_of + cut)
                    pieces.append((start_of, cut, slots_of))
                    start_of, length_of, slots_of = start_of + cut, length_of - cut, slots_of - 1
            if length_of == 1:
                last_of_all = then_request is not None and start_of == start
                if self._must_turn():
                    yield from self._turn(start_of)
                if self._work != start_of:
                    yield Restore(self._at(start_of))
                    self._work = start_of
                yield from self._finish(start_of)
                if last_of_all:
                    yield from self._request(then_request)
                yield from self._take_adjoint(start_of)
