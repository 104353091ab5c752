"""The one loop: take an action from the plan, perform it, note what it cost.

Owns nothing but the loop and its timings.  It trusts the plan's order and nothing
else; any plan in the vocabulary of `longtape.actions` runs through it.  Runs on the
caller's thread, which is the only one that mutates bookkeeping.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

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
from longtape.protocols import Job, Observer


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
    ) -> None:
        self._plan, self._job, self._mover = plan, job, mover
        self._stock: Stock = mover.stock
        self._clock, self._observers = clock, observers
        self._turned = False
        self._adjoint = 0
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
        clock, perform, poll, observers = self._clock, self._perform, self._mover.poll, self._observers
        for action in self._plan:
            began = clock()
            try:
                perform[type(action)](action)
            except Exception as error:
                error.add_note(self._describe(action))
                raise
            ended = clock()
            for observer in observers:
                observer.on_action(action, began, ended)
            if until_turn and self._turned:
                return
            poll()

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
        began = self._clock()
        reached = self._job.advance(action.start, action.stop)
        if reached != action.stop:
            self._stock.steps = reached
        if reached > action.start:
            self._stock.forward.add((self._clock() - began) / (reached - action.start))

    def _record(self, action: Record) -> None:
        key = Key(Kind.RESIDUALS, action.start)
        slot = self._mover.take(key)
        self._mover.hold(key, slot)
        reached = self._job.record(action.start, action.stop, slot)
        if reached != action.stop:
            self._stock.steps = reached

    def _reverse(self, action: Reverse) -> None:
        began = self._clock()
        self._job.reverse(action.start, action.stop)
        self._stock.reverse.add((self._clock() - began) / (action.stop - action.start))
        self._adjoint = action.start

    def _pull_back(self, action: PullBack) -> None:
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
        if key.kind is Kind.SNAPSHOT and key in held:
            held[key] = self._job.yield_slot(held[key])
        self._mover.give_up(key)

    def _discard(self, action: Discard) -> None:
        self._give_up(action.key)
        self._mover.forget(action.key)
