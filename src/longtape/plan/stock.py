"""What is kept where: the bookkeeping a plan reads and whoever runs the plan keeps up to date.

Owns the status of every snapshot and residual block in memory and on storage, and
what is known of the costs.  Knows no buffer, file, thread or clock: time comes in
through `Stock.clock`.  Only the thread that runs the plan touches it.

Invariants:

* an item is in memory in exactly one `Status`; items in memory never exceed the
  shelf's capacity;
* an item is `stored` only after its write has ended well;
* `clean` holds exactly the items that are resident and stored: they may be evicted
  without losing anything.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable, Mapping
from enum import Enum, auto
from math import inf

from longtape.actions import Key, Kind
from longtape.errors import PlanError
from longtape.plan.costs import RunningMean

MOST_OF_MEAN = 4.0
"""A transfer counts in its running mean for no more than so many times that mean.

One stall says little of the transfers after it, and must not thin out what is stored; a disk that has become slower
shows within a few transfers all the same.
"""


class Status(Enum):
    """What is happening to an item in memory."""

    RESIDENT = auto()
    WRITING = auto()
    """Resident; a write of it is queued or in progress."""
    READING = auto()
    """A read into its slot is queued or in progress."""
    DOOMED = auto()
    """Given up while a transfer was in progress: its slot is free when the transfer ends."""


class Shelf:
    """The items of one kind: which are in memory, which on storage."""

    def __init__(self, kind: Kind, capacity: int) -> None:
        self.kind = kind
        self.capacity = self.made_with = capacity
        """Slots that can be used; fewer than it was made with while a read that was given up may still fill some."""
        self.spared = 0
        """Of those, slots that are left alone unless nothing else can make room."""
        self.memory: dict[int, Status] = {}
        self.stored: set[int] = set()
        self.clean: set[int] = set()
        self.protected: set[int] = set()
        self.high_water = 0
        self._oldest: list[int] = []

    @property
    def free(self) -> int:
        """Slots with nothing in them."""
        return self.capacity - self.spared - len(self.memory)

    def available(self) -> int:
        """Slots that are free or can be made free at once by evicting a stored item."""
        return self.free + len(self.clean) - sum(1 for step in self.protected if step in self.clean)

    def spare(self, most: int) -> None:
        """From now on leave alone what is beyond so many slots, those in use excepted."""
        self.spared = max(0, self.capacity - max(most, len(self.memory)))

    def resident(self, step: int) -> bool:
        """Whether the item can be used from memory now."""
        status = self.memory.get(step)
        return status is Status.RESIDENT or status is Status.WRITING

    def known(self, step: int) -> bool:
        """Whether the item still exists, or is on its way, anywhere."""
        return step in self.stored or self.memory.get(step, Status.DOOMED) is not Status.DOOMED

    def evictable(self) -> int | None:
        """The stored item in memory with the lowest step, which a reverse sweep needs last."""
        spared = []
        found = None
        while self._oldest:
            step = self._oldest[0]
            if step in self.clean and step not in self.protected:
                found = step
                break
            heapq.heappop(self._oldest)
            if step in self.clean:
                spared.append(step)
        for step in spared:
            heapq.heappush(self._oldest, step)
        return found

    def put(self, step: int, status: Status) -> None:
        """Occupy a slot."""
        if step in self.memory or self.free <= 0:
            raise PlanError(f"no slot for {self.kind.value} {step}: {len(self.memory)} of {self.capacity} in use")
        self.memory[step] = status
        self.high_water = max(self.high_water, len(self.memory))

    def become(self, step: int, status: Status) -> None:
        """Change an item's status, keeping `clean` true."""
        self.memory[step] = status
        if status is Status.RESIDENT and step in self.stored:
            self.clean.add(step)
            heapq.heappush(self._oldest, step)
        else:
            self.clean.discard(step)

    def remove(self, step: int) -> None:
        """Vacate a slot."""
        del self.memory[step]
        self.clean.discard(step)


class Stock:
    """Everything a plan may see of the run: items, transfers under way, running costs."""

    def __init__(
        self, slots: int, blocks: int = 0, *, steps: int | None = None, clock: Callable[[], float] = lambda: 0.0
    ) -> None:
        self.snapshots = Shelf(Kind.SNAPSHOT, slots)
        self.residuals = Shelf(Kind.RESIDUALS, blocks)
        self.steps = steps
        """N; for an unknown length, None until the job has said where it ends."""
        self.clock = clock
        self.forward = RunningMean()
        """Seconds per step, plain."""
        self.reverse = RunningMean()
        """Seconds per step, adjoint with taping."""
        self.write = RunningMean()
        """Seconds to write one snapshot."""
        self.read = RunningMean()
        """Seconds to read one snapshot."""
        self.block_write = RunningMean()
        self.block_read = RunningMean()
        self.writes: deque[Key] = deque()
        """Unfinished writes, in the order they were begun."""
        self.reads: deque[Key] = deque()
        self.lost: list[Key] = []
        """Items that a failed transfer has cost, for whoever reports it."""
        self.failed: list[Key] = []
        """Items whose write failed and which are therefore in memory only, until the plan deals with them."""
        self.reached: int | None = None
        """Where an earlier process had come in the forward sweep, in steps; None: there was none."""
        self.adjoint: int | None = None
        """The step to which one had taken the adjoint; None: the reverse sweep begins at the end."""
        self.item_nbytes: Mapping[Kind, int] = {Kind.SNAPSHOT: 1, Kind.RESIDUALS: 1}
        """What an item takes on storage."""
        self.storage_limit = inf
        """Most bytes on storage: as stated, or less where it was found full."""
        self.writes_ended = 0
        """Writes that ended well."""
        self._writing_since = 0.0

    def shelf(self, kind: Kind) -> Shelf:
        """The shelf that holds items of this kind."""
        return self.snapshots if kind is Kind.SNAPSHOT else self.residuals

    # What the plan asks ------------------------------------------------------------------

    def write_remainder(self) -> float:
        """Expected seconds until the write in progress ends; 0 when no write is."""
        if not self.writes:
            return 0.0
        expected = (self.write if self.writes[0].kind is Kind.SNAPSHOT else self.block_write).value
        return max(0.0, expected - (self.clock() - self._writing_since))

    def queued_writes(self) -> list[Key]:
        """Writes begun but, as far as is known, not started: all but the first."""
        return list(self.writes)[1:]

    def unwritten(self, kind: Kind) -> int:
        """Items of this kind in memory whose write has not ended."""
        return sum(1 for key in self.writes if key.kind is kind)

    def occupied(self) -> int:
        """Bytes on storage, writes under way included."""
        shelves = (self.snapshots, self.residuals)
        return sum((len(shelf.stored) + self.unwritten(shelf.kind)) * self.item_nbytes[shelf.kind] for shelf in shelves)

    def has_room(self, kind: Kind) -> bool:
        """Whether one more item may go to storage."""
        return self.storage_limit == inf or self.occupied() + self.item_nbytes[kind] <= self.storage_limit

    # What the one who runs the plan reports ------------------------------------------------

    def put(self, key: Key) -> None:
        """The item is now in memory."""
        self.shelf(key.kind).put(key.step, Status.RESIDENT)

    def begin_write(self, key: Key) -> None:
        """A write of a resident item was begun."""
        shelf = self.shelf(key.kind)
        if shelf.memory.get(key.step) is not Status.RESIDENT or key.step in shelf.stored:
            raise PlanError(f"cannot write {key}: it is not in memory, or already stored")
        shelf.become(key.step, Status.WRITING)
        if not self.writes:
            self._writing_since = self.clock()
        self.writes.append(key)

    def begin_read(self, key: Key) -> None:
        """A read of a stored item was begun; it takes a slot from now on."""
        shelf = self.shelf(key.kind)
        if key.step not in shelf.stored:
            raise PlanError(f"cannot read {key}: it was never stored")
        shelf.put(key.step, Status.READING)
        self.reads.append(key)

    def end_write(self, key: Key, *, ok: bool, seconds: float | None = None, at: float | None = None) -> bool:
        """A write ended, now or `at` a time before; tells whether the item's slot became free by it."""
        self.writes.remove(key)
        self._writing_since = self.clock() if at is None else at
        shelf = self.shelf(key.kind)
        if ok and seconds is not None:
            _note(self.write if key.kind is Kind.SNAPSHOT else self.block_write, seconds)
        if shelf.memory[key.step] is Status.DOOMED:
            shelf.remove(key.step)
            return True
        if ok:
            self.writes_ended += 1
            shelf.stored.add(key.step)
        else:
            self.failed.append(key)
        shelf.become(key.step, Status.RESIDENT)
        return False

    def end_read(self, key: Key, *, ok: bool, seconds: float | None = None) -> bool:
        """A read ended; tells whether its slot became free (the item was given up, or is lost)."""
        self.reads.remove(key)
        shelf = self.shelf(key.kind)
        if ok and seconds is not None:
            _note(self.read if key.kind is Kind.SNAPSHOT else self.block_read, seconds)
        if ok and shelf.memory[key.step] is not Status.DOOMED:
            shelf.become(key.step, Status.RESIDENT)
            return False
        if not ok:
            shelf.stored.discard(key.step)
            self.lost.append(key)
        shelf.remove(key.step)
        return True

    def found_full(self) -> None:
        """Storage had no room for an item beside those it holds; with none on it, that tells nothing of its size."""
        occupied = self.occupied()
        if occupied:
            self.storage_limit = min(self.storage_limit, occupied)

    def free(self, key: Key, *, cancelled: bool = False) -> bool:
        """The plan gave up an item's memory; tells whether the slot is free at once.

        `cancelled` says that the item's write had not started and never will.
        """
        shelf = self.shelf(key.kind)
        status = shelf.memory[key.step]
        if cancelled:
            self.writes.remove(key)
        elif status is not Status.RESIDENT:
            shelf.become(key.step, Status.DOOMED)
            return False
        shelf.remove(key.step)
        return True

    def forget(self, key: Key) -> None:
        """The stored copy, if any, is given up."""
        shelf = self.shelf(key.kind)
        shelf.stored.discard(key.step)
        shelf.clean.discard(key.step)


def _note(mean: RunningMean, seconds: float) -> None:
    mean.add(min(seconds, MOST_OF_MEAN * mean.value) if mean.value > 0.0 else seconds)
