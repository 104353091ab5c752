"""A run without threads or files: transfers end, fail or hang where a seeded draw says so.

The plan, the executor and the mover are the real ones; job, tier and workers are small
fakes that check all they are asked.  One run takes about a millisecond, so that tens of
thousands of interleavings can be tried.
"""

from __future__ import annotations

import itertools
import random
from collections import deque
from dataclasses import dataclass, field

import numpy as np

from longtape.actions import Key, Kind
from longtape.engine.executor import Executor
from longtape.engine.mover import Budget, Mover
from longtape.engine.workers import Transfer
from longtape.errors import DamagedBlock, StateError, StorageError, StorageFull
from longtape.plan.asynchronous import AsynchronousPlan, Layout, Rules
from longtape.plan.stock import Stock
from longtape.protocols import Slot
from longtape.tiers.pool import SlotPool

STATE, BLOCK = 16, 32
SCRIBBLE = 0xEE


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        self.now += 0.01
        return self.now


@dataclass
class CountingJob:
    """The working state is its own number; any other than the one expected fails at once."""

    steps: int
    clock: Clock
    known: bool = True
    work: int | None = 0
    adjoint: int | None = None
    advanced: int = 0
    forward_seconds: float = 1.0
    pulled_back: int = 0

    def advance(self, start: int, stop: int) -> int:
        assert self.work == start, f"asked for step {start}, holding state {self.work}"
        assert stop <= self.steps or (not self.known and start <= self.steps)
        stop = min(stop, self.steps)
        self.work = stop
        self.advanced += stop - start
        self.clock.now += self.forward_seconds * (stop - start)
        return stop

    def _come_down(self, start: int, stop: int) -> None:
        assert self.adjoint == min(stop, self.steps), f"adjoint of {start}..{stop}, having that of {self.adjoint}"
        self.adjoint, self.work = start, None
        self.clock.now += 2 * self.forward_seconds * (stop - start)

    def reverse(self, start: int, stop: int) -> None:
        assert self.work == start, f"adjoint of step {start}, holding state {self.work}"
        self._come_down(start, stop)

    def save(self, slot: Slot) -> Slot:
        assert self.work is not None
        slot.data[:8] = np.frombuffer(np.int64(self.work).tobytes(), np.uint8)
        slot.data[8:] = self.work % 251
        return slot

    def load(self, slot: Slot) -> None:
        self.work = int(np.frombuffer(slot.data[:8].tobytes(), np.int64)[0])
        assert (slot.data[8:] == self.work % 251).all(), "a torn snapshot was loaded"

    def load_initial(self) -> None:
        self.work = 0

    def yield_slot(self, slot: Slot) -> Slot:
        return slot

    def adopt(self, slots: list[Slot]) -> None:
        raise AssertionError

    def turn(self) -> None:
        self.adjoint = self.steps

    def record(self, start: int, stop: int, slot: Slot) -> int:
        reached = self.advance(start, stop)
        slot.data[:16] = np.frombuffer(np.array([start, reached]).tobytes(), np.uint8)
        slot.data[16:] = start % 249
        return reached

    def pull_back(self, start: int, stop: int, slot: Slot) -> None:
        found = np.frombuffer(slot.data[:16].tobytes(), np.int64).tolist()
        assert found == [start, min(stop, self.steps)], f"residuals of {found} used for {start}..{stop}"
        assert (slot.data[16:] == start % 249).all(), "torn residuals were used"
        self._come_down(start, stop)
        self.pulled_back += 1


@dataclass(frozen=True)
class Mishaps:
    """How likely each is, a transfer."""

    full: float = 0.0
    bad_write: float = 0.0
    bad_read: float = 0.0
    stuck: float = 0.0
    """Never answers, or only much later."""
    release: float = 0.0
    from_index: int = 0
    """The first transfer that may meet one."""
    to_index: int = 10**9
    """The first after which none does any more."""


class StrictTier:
    """Bytes in a dict; refuses every call that makes no sense."""

    def __init__(self, mishaps: Mishaps, rng: random.Random) -> None:
        self.mishaps, self.rng = mishaps, rng
        self.room: dict[Key, int] = {}
        self.data: dict[Key, bytes] = {}
        self.closed = False

    def reserve(self, key: Key, nbytes: int) -> None:
        if key in self.room:
            raise StateError(f"{key} has room already")
        if self.rng.random() < self.mishaps.full:
            raise StorageFull(28, "full")
        self.room[key] = nbytes

    def write(self, key: Key, data: np.ndarray) -> None:
        assert data.nbytes == self.room[key]
        self.data[key] = data.tobytes()

    def read(self, key: Key, out: np.ndarray) -> None:
        assert key in self.data, f"{key} is read before it was written"
        out[:] = np.frombuffer(self.data[key], np.uint8)

    def release(self, key: Key) -> None:
        if key not in self.room:
            raise StateError(f"{key} has no room")
        del self.room[key]
        self.data.pop(key, None)
        if self.rng.random() < self.mishaps.release:
            raise StorageError(5, "cannot release")

    def close(self) -> None:
        self.closed = True


@dataclass
class ScriptedWorkers:
    """One writer and one reader that move when asked, as the draw says."""

    tier: StrictTier
    clock: Clock
    mishaps: Mishaps
    rng: random.Random
    pace: float
    """How likely a transfer is to get on, a poll."""
    comes_back: bool
    """Whether stuck transfers answer in the end."""
    queues: dict[bool, deque[Transfer]] = field(default_factory=lambda: {True: deque(), False: deque()})
    current: dict[bool, Transfer | None] = field(default_factory=lambda: {True: None, False: None})
    fate: dict[Transfer, str] = field(default_factory=dict)
    count: int = 0
    hung: int = 0
    closed_after: float | None = None

    def submit(self, transfer: Transfer) -> None:
        self.queues[transfer.is_write].append(transfer)

    def _start(self, is_write: bool) -> None:
        queue = self.queues[is_write]
        while self.current[is_write] is None and queue:
            transfer = queue.popleft()
            if not transfer.claim():
                continue
            transfer.began = self.clock()
            self.current[is_write] = transfer
            self.fate[transfer] = self._draw_fate(is_write)

    def _draw_fate(self, is_write: bool) -> str:
        index, mishaps = self.count, self.mishaps
        self.count += 1
        if not mishaps.from_index <= index < mishaps.to_index:
            return "ok"
        if self.rng.random() < mishaps.stuck:
            self.hung += 1
            return "stuck"
        return "bad" if self.rng.random() < (mishaps.bad_write if is_write else mishaps.bad_read) else "ok"

    def _end(self, is_write: bool) -> Transfer | None:
        transfer = self.current[is_write]
        if transfer is None:
            return None
        fate = self.fate[transfer]
        data = transfer.slot.data
        if fate == "stuck":
            if not is_write and self.rng.random() < 0.5:
                data[:] = SCRIBBLE  # half-way through
            return None
        self.current[is_write] = None
        transfer.ended = self.clock()
        if fate == "bad":
            transfer.error = DamagedBlock("bad") if not is_write else StorageError(5, "bad")
            if not is_write:
                data[: self.rng.randrange(data.nbytes)] = SCRIBBLE
        else:
            (self.tier.write if is_write else self.tier.read)(transfer.key, data)
        return transfer

    def next_finished(self, timeout: float | None) -> Transfer | None:
        for is_write in (True, False):
            if self.rng.random() < self.pace or timeout != 0:
                self._start(is_write)
        order = [True, False]
        self.rng.shuffle(order)
        for is_write in order:
            if self.rng.random() < self.pace or timeout != 0:
                ended = self._end(is_write)
                if ended is not None:
                    return ended
        if timeout != 0:
            self.clock.now += timeout or 0.0
        if self.comes_back:
            for is_write in order:
                transfer = self.current[is_write]
                if transfer is not None and self.fate[transfer] == "stuck" and self.rng.random() < 0.1:
                    self.current[is_write] = None
                    if is_write:
                        if transfer.key in self.tier.room:
                            self.tier.write(transfer.key, transfer.slot.data)
                    else:
                        transfer.slot.data[:] = SCRIBBLE
                        transfer.error = StorageError(5, "late")
                    if timeout == 0:
                        return transfer
                    self.late.append(transfer)
        if timeout == 0 and self.late:
            return self.late.pop(0)
        return None

    late: list[Transfer] = field(default_factory=list)

    def close(self, timeout: float) -> bool:
        self.closed_after = timeout
        return not any(self.current.values())


@dataclass(frozen=True)
class Case:
    """One run."""

    steps: int = 30
    slots: int = 3
    blocks: int = 0
    layout: Layout = field(default_factory=Layout)
    rules: Rules = field(default_factory=Rules)
    known: bool = True
    mishaps: Mishaps = field(default_factory=Mishaps)
    pace: float = 0.3
    write: float = 3.0
    comes_back: bool = False
    seed: int = 0


@dataclass
class Outcome:
    mover: Mover
    job: CountingJob
    workers: ScriptedWorkers
    tier: StrictTier
    actions: int


MOST_ACTIONS = 200_000


def run(case: Case) -> Outcome:
    """Run it to the end; whatever goes wrong raises."""
    rng = random.Random(case.seed)
    clock = Clock()
    job = CountingJob(case.steps, clock, case.known)
    stock = Stock(case.slots, case.blocks, steps=case.steps if case.known else None, clock=clock)
    stock.forward.add(1.0)
    stock.reverse.add(2.0)
    for mean in (stock.write, stock.read, stock.block_write, stock.block_read):
        mean.add(case.write)
    tier = StrictTier(case.mishaps, rng)
    workers = ScriptedWorkers(tier, clock, case.mishaps, rng, case.pace, case.comes_back)
    pools = {Kind.SNAPSHOT: SlotPool(case.slots, STATE), Kind.RESIDUALS: SlotPool(case.blocks, BLOCK)}
    budget = Budget(case.slots * STATE + case.blocks * BLOCK)
    mover = Mover(
        stock=stock,
        pools=dict(pools),
        nbytes={Kind.SNAPSHOT: STATE, Kind.RESIDUALS: BLOCK},
        budget=budget,
        tier=tier,
        workers=workers,
        stuck_seconds=5.0,
        observers=[],
    )
    counter = itertools.count()

    def counted():
        for action in AsynchronousPlan(stock, case.layout, case.rules):
            assert next(counter) < MOST_ACTIONS, "the plan does not end"
            yield action

    executor = Executor(counted(), job, mover, clock=clock, observers=[])
    try:
        executor.run(until_turn=True)
        assert job.work == case.steps or not case.layout.final_state
        executor.run()
        assert job.adjoint == 0, f"the run ended with the adjoint at {job.adjoint}"
        _check_books(mover, pools)
    finally:
        mover.close()
        for pool in pools.values():
            pool.close()
    assert tier.closed
    return Outcome(mover, job, workers, tier, next(counter))


def _check_books(mover: Mover, pools: dict[Kind, SlotPool]) -> None:
    """Every slot and every byte of room is accounted for."""
    lost = dict.fromkeys(Kind, 0)
    for transfer in mover._abandoned:
        lost[transfer.key.kind] += not transfer.is_write
    for kind, pool in pools.items():
        held = sum(1 for key in mover.held if key.kind is kind)
        assert held == len(mover.stock.shelf(kind).memory), "held slots and the stock differ"
        assert pool.free + held + lost[kind] == pool.count, f"{kind.value} slots leaked"
        assert mover.stock.shelf(kind).capacity == pool.count - lost[kind]
    for shelf in (mover.stock.snapshots, mover.stock.residuals):
        left = set(shelf.memory) | shelf.stored
        assert len(left) <= 1 + len(mover._under_way) + len(mover._abandoned), f"items left behind: {sorted(left)}"
