"""The one loop: take an action from the plan, perform it, note what it cost.

Owns nothing but the loop and its timings.  It trusts the plan's order and nothing
else; any plan in the vocabulary of `longtape.actions` runs through it.  Runs on the
caller's thread, which is the only one that mutates bookkeeping.

Where steps run on a device, an action returns before it is done.  A meter then tells later
when it was, in order, and keeps the loop from running ahead too far; and what will be wanted
from memory next is announced, so that it can be on its way to the device meanwhile.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from heapq import nlargest

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
from longtape.engine.mover import Mover
from longtape.plan.stock import Stock
from longtape.protocols import Ahead, Job, Meter, Observer

BLOCKS_AHEAD = 2
"""Residual blocks that are announced; of snapshots only the next one, for others may be stored above the one below."""

_LOOKS_AHEAD_AFTER = frozenset({Turn, Advance, Record, Reverse, PullBack, Restore, Await})
"""Actions that take time, in which items may have arrived: looking through all there are after each would add up."""


class Executor:
    """Runs one plan on one job."""

    def __init__(
        self,
        plan: Iterator[Action],
        job: Job,
        mover: Mover,
        *,
        clock: Callable[[], float],
        observers: list[Observer],
        meter: Meter | None = None,
        ahead: Ahead | None = None,
    ) -> None:
        self._plan, self._job, self._mover = plan, job, mover
        self._stock: Stock = mover.stock
        self._clock, self._observers = clock, observers
        self._meter, self._ahead = meter, ahead
        self._turned = False
        self._adjoint = 0
        self._ran = 0
        """Steps that the last `Advance` really ran."""
        self._perform: dict[type, Callable[..., None]] = {
            Advance: self._advance,
            Record: self._record,
            Reverse: self._reverse,
            PullBack: self._pull_back,
            Store: self._store,
            Restore: self._restore,
            Write: lambda action: mover.begin_write(action.key),
            Read: lambda action: mover.begin_read(action.key),
            Free: lambda action: self._give_up(action.key),
            Discard: self._discard,
            Await: lambda action: mover.wait(),
            Turn: self._turn,
        }

    def run(self, *, until_turn: bool = False) -> None:
        """Perform actions until the plan ends, or until the forward sweep does.

        Raises:
            Exception: Whatever the user's step raises, with a note saying where.
        """
        perform, poll, meter = self._perform, self._mover.poll, self._meter
        mark = self._clock if meter is None else meter.mark
        for action in self._plan:
            began = mark()
            try:
                perform[type(action)](action)
            except Exception as error:
                error.add_note(self._describe(action))
                raise
            ended = mark()
            if meter is None:
                self._notice(action, self._ran, began, ended)
            else:
                meter.note(began, ended, partial(self._notice, action, self._ran))
            if until_turn and self._turned:
                return
            poll()
            if meter is not None:
                meter.poll()
            if self._ahead is not None and self._turned and type(action) in _LOOKS_AHEAD_AFTER:
                self._announce(self._ahead, self._adjoint)

    def _notice(self, action: Action, ran: int, began: float, ended: float) -> None:
        """An action took so long: note it in the running means, and tell the observers."""
        kind = type(action)
        if kind is Advance:
            if ran > 0:
                self._stock.forward.add((ended - began) / ran)
        elif kind is Reverse:
            self._stock.reverse.add((ended - began) / (action.stop - action.start))  # type: ignore[union-attr]
        for observer in self._observers:
            observer.on_action(action, began, ended)

    def _announce(self, ahead: Ahead, below: int) -> None:
        """Say what is wanted next once the adjoint stands at step `below`: blocks, or else the highest snapshot."""
        stock, held = self._stock, self._mover.held
        blocks = nlargest(BLOCKS_AHEAD, (step for step in stock.residuals.memory if step < below))
        snapshot = max((step for step in stock.snapshots.memory if step < below), default=-1)
        wanted = [Key(Kind.RESIDUALS, step) for step in blocks if step >= snapshot]
        if snapshot >= 0 and not wanted:
            wanted = [Key(Kind.SNAPSHOT, snapshot)]
        for key in wanted:
            if not stock.shelf(key.kind).resident(key.step):
                return
            ahead.expect(key, held[key])

    def _describe(self, action: Action) -> str:
        match action:
            case Advance(start, stop) | Record(start, stop):
                what = f"running steps {start} to {stop - 1}"
                what += " again" if self._turned else ""
            case Reverse(start, stop) | PullBack(start, stop):
                what = f"taking the adjoint of steps {stop - 1} down to {start}"
            case _:
                what = f"performing {action}"
        sweep = f"reverse sweep, for the adjoint of step {self._adjoint - 1}" if self._turned else "forward sweep"
        return f"longtape: while {what} ({sweep})"

    # Steps -----------------------------------------------------------------------------------

    def _advance(self, action: Advance) -> None:
        reached = self._job.advance(action.start, action.stop)
        if reached != action.stop:
            self._stock.steps = reached
        self._ran = reached - action.start

    def _record(self, action: Record) -> None:
        key = Key(Kind.RESIDUALS, action.start)
        slot = self._mover.take(key)
        self._mover.hold(key, slot)
        reached = self._job.record(action.start, action.stop, slot)
        if reached != action.stop:
            self._stock.steps = reached

    def _reverse(self, action: Reverse) -> None:
        if self._ahead is not None:
            self._announce(self._ahead, action.start)
        self._job.reverse(action.start, action.stop)
        self._adjoint = action.start

    def _pull_back(self, action: PullBack) -> None:
        if self._ahead is not None:
            self._announce(self._ahead, action.start)
        self._job.pull_back(action.start, action.stop, self._mover.held[Key(Kind.RESIDUALS, action.start)])
        self._adjoint = action.start

    def _turn(self, action: Turn) -> None:
        self._turned = True
        self._adjoint = self._stock.steps or 0
        self._job.turn()

    # Snapshots -------------------------------------------------------------------------------

    def _store(self, action: Store) -> None:
        key = Key(Kind.SNAPSHOT, action.step)
        self._mover.hold(key, self._job.save(self._mover.take(key)))

    def _restore(self, action: Restore) -> None:
        slot = self._mover.held.get(Key(Kind.SNAPSHOT, action.step))
        if slot is None:
            self._job.load_initial()
        else:
            self._job.load(slot)

    def _give_up(self, key: Key) -> None:
        held = self._mover.held
        if self._ahead is not None and key in held:
            self._ahead.forget(held[key])
        if key.kind is Kind.SNAPSHOT and key in held:
            held[key] = self._job.yield_slot(held[key])
        self._mover.give_up(key)

    def _discard(self, action: Discard) -> None:
        self._give_up(action.key)
        self._mover.forget(action.key)
