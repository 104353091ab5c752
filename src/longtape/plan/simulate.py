"""The event model: runs a plan against a clock of its own and says what it would take.

Owns a simulated machine with one computing thread, one writer and one reader, and if
need be a device with a link each way.  It is also the first judge of a plan: every state
carries its number, and an action that uses the wrong one raises `PlanError`.

Source of the model: durations are constant, or drawn by the functions given; writes
and reads are served first come, first served, each kind one at a time.  So are the copies
over the link (`copies`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from math import inf

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
from longtape.errors import PlanError
from longtape.plan.asynchronous import AsynchronousPlan, Layout, Rules
from longtape.plan.binomial import advances
from longtape.plan.copies import Channel, Duration, Link
from longtape.plan.stock import Stock


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a simulated run took.  Times in the unit of the durations given."""

    seconds: float
    advances: int
    """Plain steps, the first sweep included."""
    recorded: int
    """Steps run while their residuals were kept."""
    writes: int
    reads: int
    stall_seconds: float
    forward_stall_seconds: float
    peak_slots: int
    peak_blocks: int
    peak_stored: int
    bytes_out: int = 0
    """Over the link of a device, as `item_nbytes` says."""
    bytes_in: int = 0
    out_seconds: float = 0.0
    """For which the link was busy."""
    in_seconds: float = 0.0
    link_stall_seconds: float = 0.0
    """For which compute waited for the link, beside `stall_seconds`."""


@dataclass(frozen=True, slots=True)
class Speeds:
    """Durations of the simulated machine, per step and per item."""

    forward: float | Callable[[int], float]
    """Seconds of a step; or of each step, by its number."""
    reverse: float | Callable[[int], float]
    """Seconds of an adjoint step; or of each."""
    write: Duration
    read: Duration
    record: float | None = None
    pull_back: float | None = None
    copy_out: Duration | None = None
    """Seconds of an item over the link of a device to memory; None: the steps run where items are kept."""
    copy_in: Duration | None = None
    staging: int = 4
    """Buffers on the device for items on their way, out or in."""
    device_slots: int = 0
    """Snapshots by which Revolve reverses a window there, which then takes t(h, s₁) more steps; 0: none."""

    def again(self, length: int) -> int:
        """Steps advanced within the adjoint of a window of so many."""
        return advances(length, self.device_slots) if self.device_slots else 0


def _in_all(seconds: float | Callable[[int], float], start: int, stop: int) -> float:
    """Seconds of steps ``[start, stop)``."""
    return sum(map(seconds, range(start, stop))) if callable(seconds) else seconds * (stop - start)


class _Machine:
    def __init__(self, stock: Stock, speeds: Speeds, steps: int) -> None:
        self.stock, self.speeds, self.steps = stock, speeds, steps
        self.now = 0.0
        self.writer, self.reader = Channel(speeds.write), Channel(speeds.read)
        self.link: Link | None = None
        if speeds.copy_out is not None and speeds.copy_in is not None:
            self.link = Link(speeds.copy_out, speeds.copy_in, speeds.staging)
        self.channels = [self.writer, self.reader, *([self.link.out, self.link.back] if self.link else [])]
        self.work: int | None = 0
        self.adjoint = steps
        self.turned = False
        self.advances = self.recorded = self.writes = self.reads = self.peak_stored = 0
        self.stalls = self.forward_stalls = self.link_stalls = 0.0

    def pass_time(self, until: float) -> None:
        """Let transfers that end by `until` end, then make it that time."""
        while True:
            channel = min(self.channels, key=lambda c: c.ends)
            if channel.ends > until + 1e-12:
                break
            self._complete(channel)
        self.now = until
        self._start(until)

    def _start(self, now: float) -> None:
        """Begin whatever can: a write once its item has left the device, the next copy in once it is in memory."""
        if self.link is None or not self.writer.queue or self.link.is_here(self.writer.queue[0]):
            self.writer.start_next(now)
        self.reader.start_next(now)
        if self.link is not None:
            self.link.start(now, lambda key: self.stock.shelf(key.kind).resident(key.step))

    def _complete(self, channel: Channel) -> None:
        key, ended = channel.end()
        self.now = ended
        if self.link is not None and channel in (self.link.out, self.link.back):
            self.link.complete(channel, key)
        elif channel is self.writer:
            self.writes += 1
            self.stock.end_write(key, ok=True, seconds=ended - channel.began)
            self.peak_stored = max(self.peak_stored, len(self.stock.snapshots.stored))
        else:
            self.reads += 1
            self.stock.end_read(key, ok=True, seconds=ended - channel.began)
        self._start(ended)

    # The link of a device -------------------------------------------------------------------

    def stage(self) -> None:
        """Wait for a buffer that an item can leave from."""
        began = self.now
        while self.link is not None and self.link.is_full():
            self.pass_time(self.link.out.ends)
        self.link_stalls += self.now - began

    def send(self, key: Key) -> None:
        """The item is in a buffer of the device, and begins to leave."""
        if self.link is not None:
            self.link.send(key, self.stock.item_nbytes[key.kind])
            self._start(self.now)

    def fetch(self, key: Key) -> None:
        """Wait until the item is on the device, where compute takes it."""
        link, began = self.link, self.now
        if link is None:
            return
        while not link.has(key):
            link.ask(key, self.now)
            self.pass_time(link.back.ends if link.back.current else link.out.ends)
        link.take(key)
        self.link_stalls += self.now - began

    def look_down(self, adjoint: int) -> None:
        """From now on the next item that comes in is the highest one kept below the adjoint."""
        if self.link is not None:
            self.link.below = adjoint
            self._start(self.now)

    def run_steps(self, start: int, stop: int, seconds: float) -> None:
        if self.work != start:
            raise PlanError(f"steps [{start}, {stop}) asked for while the working state is {self.work}")
        self.pass_time(self.now + seconds)
        self.work = stop

    def forward_seconds(self, start: int, stop: int) -> float:
        return _in_all(self.speeds.forward, start, stop)

    def advance(self, action: Advance) -> None:
        if self.stock.steps is None and action.stop >= self.steps:
            self.stock.steps = self.steps
        stop = min(action.stop, self.steps)
        seconds = self.forward_seconds(action.start, stop)
        self.run_steps(action.start, stop, seconds)
        if stop > action.start:
            self.stock.forward.add(seconds / (stop - action.start))
        self.advances += stop - action.start

    def record(self, action: Record) -> None:
        if self.stock.steps is None and action.stop >= self.steps:
            self.stock.steps = self.steps
        stop = min(action.stop, self.steps)
        self.stock.put(Key(Kind.RESIDUALS, action.start))
        self.stage()
        record = self.speeds.record
        plain = self.forward_seconds(action.start, stop)
        self.run_steps(action.start, stop, plain if record is None else record * (stop - action.start))
        self.recorded += stop - action.start
        self.send(Key(Kind.RESIDUALS, action.start))

    def reverse(self, action: Reverse) -> None:
        """From the working state: the adjoint of the window, and what is advanced again within it."""
        start, stop = action.start, min(action.stop, self.steps)
        if self.work != start:
            raise PlanError(f"adjoint of [{start}, {action.stop}) while the working state is {self.work}")
        again = self.speeds.again(stop - start)
        repeated = again * self.forward_seconds(start, stop) / (stop - start) if again else 0.0
        began = self.now
        self.come_down(start, stop, _in_all(self.speeds.reverse, start, stop) + repeated)
        self.advances += again
        self.stock.reverse.add((self.now - began) / (stop - start))

    def pull_back(self, action: PullBack) -> None:
        start, stop = action.start, min(action.stop, self.steps)
        key = Key(Kind.RESIDUALS, start)
        if not self.stock.residuals.resident(start):
            raise PlanError(f"residuals {start} are not in memory")
        self.fetch(key)
        if self.link is not None:
            self.link.in_use = 1
        seconds = self.speeds.pull_back
        self.come_down(start, stop, _in_all(self.speeds.reverse if seconds is None else seconds, start, stop))
        if self.link is not None:
            self.link.in_use = 0

    def come_down(self, start: int, stop: int, seconds: float) -> None:
        if self.adjoint != stop or not self.turned:
            raise PlanError(f"adjoint of [{start}, {stop}) asked for while it stands at {self.adjoint}")
        self.look_down(start)
        self.pass_time(self.now + seconds)
        self.adjoint, self.work = start, None

    def wait(self) -> None:
        began = self.now
        while (until := min(self.writer.ends, self.reader.ends)) == inf:
            if self.link is None or not self.writer.queue or self.link.out.current is None:
                raise PlanError("waiting for a transfer while none is in progress")
            self.pass_time(self.link.out.ends)
        waited = max(0.0, until - began)
        self.stalls += waited
        self.forward_stalls += 0.0 if self.turned else waited
        self.pass_time(max(until, self.now))

    def give_up(self, key: Key) -> None:
        if key.step not in self.stock.shelf(key.kind).memory:
            return
        cancelled = key in self.writer.queue
        if cancelled:
            self.writer.queue.remove(key)
        self.stock.free(key, cancelled=cancelled)

    def transfer(self, channel: Channel, key: Key) -> None:
        channel.queue.append(key)
        self._start(self.now)

    def perform(self, action: Action) -> None:  # noqa: C901 - one case an action
        match action:
            case Advance():
                self.advance(action)
            case Record():
                self.record(action)
            case Reverse():
                self.reverse(action)
            case PullBack():
                self.pull_back(action)
            case Store(step):
                if self.work != step:
                    raise PlanError(f"snapshot {step} asked for while the working state is {self.work}")
                self.stock.put(Key(Kind.SNAPSHOT, step))
                self.stage()
                self.send(Key(Kind.SNAPSHOT, step))
            case Restore(step):
                if step and not self.stock.snapshots.resident(step):
                    raise PlanError(f"snapshot {step} is not in memory")
                if self.stock.snapshots.resident(step):
                    self.fetch(Key(Kind.SNAPSHOT, step))
                self.work = step
            case Write(key):
                self.stock.begin_write(key)
                if self.stock.storage_limit < inf and self.stock.occupied() > self.stock.storage_limit:
                    raise PlanError(f"{key} is to be written, but storage has no room for it")
                self.transfer(self.writer, key)
            case Read(key):
                self.stock.begin_read(key)
                self.transfer(self.reader, key)
            case Free(key):
                self.give_up(key)
            case Discard(key):
                self.give_up(key)
                self.stock.forget(key)
                if self.link is not None:
                    self.link.forget(key)
            case Await():
                self.wait()
            case Turn():
                self.turned = True
                self.look_down(self.steps)


def simulate(
    steps: int,
    slots: int,
    speeds: Speeds,
    *,
    layout: Layout | None = None,
    rules: Rules | None = None,
    blocks: int = 0,
    known: bool = True,
    storage_limit: float = inf,
    item_nbytes: Mapping[Kind, int] | None = None,
    believed: Speeds | None = None,
    observe: Callable[[Action], None] | None = None,
) -> Outcome:
    """Run the asynchronous plan in the event model.

    Args:
        steps: N.
        slots: Snapshot slots in memory.
        speeds: Durations.
        layout: The plan's choices; the default stores as often as the writer can.
        rules: How the plan treats uncertain costs.
        blocks: Residual blocks in memory.
        known: Whether the plan knows N from the start.
        storage_limit: Most bytes on storage.
        item_nbytes: What an item takes there; 1 if None.
        believed: What the plan takes the durations to be when it starts; the true ones if None.
        observe: Called with every action before it is performed.

    Raises:
        PlanError: The plan did something illegal.
    """
    machine, plan = _set_up(steps, slots, believed or speeds, speeds, layout, rules, blocks=blocks, known=known)
    machine.stock.storage_limit = storage_limit
    machine.stock.item_nbytes = item_nbytes or machine.stock.item_nbytes
    for action in plan:
        if observe is not None:
            observe(action)
        machine.perform(action)
    if machine.adjoint != 0:
        raise PlanError(f"the plan ended with the adjoint at step {machine.adjoint}")
    stock = machine.stock
    return Outcome(
        seconds=machine.now,
        advances=machine.advances,
        recorded=machine.recorded,
        writes=machine.writes,
        reads=machine.reads,
        stall_seconds=machine.stalls,
        forward_stall_seconds=machine.forward_stalls,
        peak_slots=stock.snapshots.high_water,
        peak_blocks=stock.residuals.high_water,
        peak_stored=machine.peak_stored,
        link_stall_seconds=machine.link_stalls,
        **(machine.link or Link(speeds.write, speeds.read, 0)).figures(),
    )


def play(
    steps: int, slots: int, speeds: Speeds, layout: Layout, rules: Rules, *, storage_limit: float = inf
) -> Iterator[Action]:
    """The actions that the asynchronous plan takes in the event model, one by one as they are asked for."""
    machine, plan = _set_up(steps, slots, speeds, speeds, layout, rules)
    machine.stock.storage_limit = storage_limit
    for action in plan:
        yield action
        machine.perform(action)


def _set_up(
    steps: int,
    slots: int,
    believed: Speeds,
    speeds: Speeds,
    layout: Layout | None,
    rules: Rules | None,
    *,
    blocks: int = 0,
    known: bool = True,
) -> tuple[_Machine, AsynchronousPlan]:
    """A machine at the start of the plan, which takes the durations to be what it believes."""
    machine: _Machine
    stock = Stock(slots, blocks, steps=steps if known else None, clock=lambda: machine.now)
    machine = _Machine(stock, speeds, steps)
    probe, block = Key(Kind.SNAPSHOT, 0), Key(Kind.RESIDUALS, 0)
    stock.forward.add(believed.forward(0) if callable(believed.forward) else believed.forward)
    window = min(layout.window if layout else 1, steps)
    within = stock.forward.value * believed.again(window) / window
    stock.reverse.add((believed.reverse(steps - 1) if callable(believed.reverse) else believed.reverse) + within)
    stock.write.add(believed.write(probe))
    stock.read.add(believed.read(probe))
    stock.block_write.add(believed.write(block))
    stock.block_read.add(believed.read(block))
    return machine, AsynchronousPlan(stock, layout or Layout(), rules)
