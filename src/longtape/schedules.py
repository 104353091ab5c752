"""Longtape's plans as schedules for the package checkpoint_schedules, and so for pyadjoint and Firedrake.

Thin: it runs the asynchronous plan in the event model, whose clock stands in for the
machine's, and puts its actions into that package's words.  The other way round, any
schedule in those words runs on Longtape: ``longtape.Sweep(..., schedule=schedule)``.

Needs the package checkpoint_schedules, which is loaded with this module.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import inf, isfinite
from numbers import Integral
from typing import Any

from checkpoint_schedules import Copy, EndForward, EndReverse, Forward, Move, Reverse, StorageType
from checkpoint_schedules.schedule import CheckpointSchedule

from longtape.actions import Action, Advance, Discard, Restore, Store, Turn, Write
from longtape.actions import Reverse as TakeAdjoint
from longtape.errors import PlanError, UsageError
from longtape.plan.binomial import advances
from longtape.plan.choose import Choice, choose
from longtape.plan.costs import Costs, Problem
from longtape.plan.layout import EXACT, Layout
from longtape.plan.simulate import Speeds, play

__all__ = ["AsyncMultistage", "Revolve"]


class AsyncMultistage(CheckpointSchedule):  # type: ignore[misc]
    """Store on disk as often as the disk takes states without delaying compute; Revolve in RAM in between.

    The schedule is the one that `longtape.Sweep` would follow on a machine with these
    costs: stored states spread over the whole sequence, a tail in RAM at the end of it,
    and, where the disk is too slow to help, plain Revolve.  An executor that stores in
    the background gets the full benefit.  One that waits for every write pays what it
    always pays, and recomputes less than with a fixed number of snapshots.

    Costs are relative: only their ratios matter.  Actions come one by one, as they are
    asked for.  Offline; one adjoint calculation.

    Args:
        max_n: N, the number of steps.
        snapshots_in_ram: States that fit in memory, at least 1; the schedule never has
            more in `StorageType.RAM`.
        snapshots_on_disk: Most states in `StorageType.DISK` at once; None for no limit.
        forward: Seconds for a forward step (t_f).
        reverse: Seconds for the adjoint of a step, the taped run of the step included (t_b).
        write: Seconds to write a state to disk (t_w).
        read: Seconds to read one (t_r).

    Raises:
        UsageError: A number makes no sense.

    Example::

        tape.enable_checkpointing(AsyncMultistage(1_000, 8, forward=0.1, reverse=0.2, write=0.5, read=0.3))
    """

    def __init__(
        self,
        max_n: int,
        snapshots_in_ram: int,
        snapshots_on_disk: int | None = None,
        *,
        forward: float = 1.0,
        reverse: float = 2.0,
        write: float = 2.0,
        read: float = 2.0,
    ) -> None:
        max_n = _count("max_n", max_n, least=1)
        snapshots_in_ram = _count("snapshots_in_ram", snapshots_in_ram, least=1)
        if snapshots_on_disk is not None:
            snapshots_on_disk = _count("snapshots_on_disk", snapshots_on_disk, least=0)
        for name, seconds in (("forward", forward), ("reverse", reverse), ("write", write), ("read", read)):
            _require_seconds(name, seconds)
        super().__init__(max_n)
        self._slots = snapshots_in_ram
        self._seconds = Speeds(forward, reverse, lambda key: write, lambda key: read)
        self._costs = Costs(forward, reverse, write_bytes_per_second=1 / write, read_bytes_per_second=1 / read)
        self.choice = self._choose(snapshots_on_disk)
        """The chosen plan, with what it is predicted to take; a state counts as one byte."""
        self._exhausted = False

    def _choose(self, limit: int | None) -> Choice:
        problem = Problem(self._max_n, 1, self._slots, has_disk=limit != 0, disk_nbytes=limit or None)
        choice = choose(problem, self._costs)
        paced = choice.uses_disk and not choice.stall_spacing and not choice.longest_piece
        if limit and paced and choice.prediction.peak_disk_bytes >= limit:
            # Where the disk sets the pace, the count may come out one higher than predicted.
            return self._choose(limit - 1)
        return choice

    def _iterator(self) -> Iterator[Any]:
        choice = self.choice
        layout = Layout(
            tail=choice.tail,
            dense=choice.dense,
            fixed_spacing=choice.stall_spacing,
            longest_piece=choice.longest_piece,
            stores=choice.uses_disk,
            final_state=False,
        )
        room = choice.prediction.peak_disk_bytes if choice.longest_piece else inf
        actions = play(self._max_n, choice.slots, self._seconds, layout, EXACT, storage_limit=room)
        yield from _Interpreter(self, actions).run()

    @property
    def is_exhausted(self) -> bool:
        """Whether the adjoint calculation has ended."""
        return self._exhausted

    def uses_storage_type(self, storage_type: StorageType) -> bool:
        """Whether snapshots go to this storage."""
        if storage_type is StorageType.DISK:
            return self.choice.uses_disk
        return storage_type is StorageType.RAM


class Revolve(AsyncMultistage):
    """Revolve in RAM: the fewest steps run again, as Griewank and Walther (2000), from closed forms.

    There is nothing to prepare: the first action is there at once, whatever N.

    Args:
        max_n: N, the number of steps.
        snapshots_in_ram: States that fit in memory, at least 1.

    Raises:
        UsageError: A number makes no sense.
    """

    def __init__(self, max_n: int, snapshots_in_ram: int) -> None:
        super().__init__(max_n, snapshots_in_ram, 0)

    @property
    def steps_run(self) -> int:
        """Forward steps in all, the taped one of each step included: t(N, s) + N."""
        return advances(self._max_n, self._slots) + int(self._max_n)


def _count(name: str, count: Any, *, least: int) -> int:
    if isinstance(count, bool) or not isinstance(count, Integral) or count < least:
        raise UsageError(f"{name} must be an integer of at least {least}, not {count!r}")
    return int(count)


def _require_seconds(name: str, seconds: Any) -> None:
    try:
        makes_sense = not isinstance(seconds, bool) and isfinite(seconds) and seconds > 0
    except TypeError:
        makes_sense = False
    if not makes_sense:
        raise UsageError(f"{name} must be a positive number of seconds, not {seconds!r}")


class _Interpreter:
    """Puts Longtape's actions into the words of the other package.

    There, a state is stored by the forward action that starts from it, in one storage,
    and a read is no action of its own.  So a store waits for the next steps, a store
    that is written is one on disk, and what is read ahead is copied when it is used.
    """

    def __init__(self, schedule: AsyncMultistage, actions: Iterator[Action]) -> None:
        self._schedule, self._actions = schedule, actions
        self._steps: int = schedule.max_n
        self._to_store: int | None = None
        self._stored: dict[int, StorageType] = {}
        self._place = StorageType.RAM
        self._ended_forward = False

    def run(self) -> Iterator[Any]:
        schedule = self._schedule
        following: Action | None = next(self._actions, None)
        while following is not None:
            action, following = following, next(self._actions, None)
            match action:
                case Store(step):
                    self._to_store, self._place = step, StorageType.RAM
                case Write(key):
                    if self._to_store != key.step:
                        raise PlanError(f"state {key.step} is written after steps were run from it")
                    self._place = StorageType.DISK
                case Advance(start, stop):
                    yield self._forward(start, stop)
                case Restore(step):
                    place = self._stored[step]
                    schedule._n = step
                    if isinstance(following, Discard) and following.key.step == step:
                        del self._stored[step]
                        yield Move(step, place, StorageType.WORK)
                    else:
                        yield Copy(step, place, StorageType.WORK)
                case Discard(key):
                    yield from self._forget(key.step)
                case TakeAdjoint(start, stop):
                    yield from self._reverse(start, stop)
                case Turn():
                    pass  # told together with the first adjoint step, which is where the last step is run
                case _:
                    pass  # reads and evictions: only an executor that stores in the background has them
        schedule._exhausted = True
        yield EndReverse()

    def _forward(self, start: int, stop: int) -> Any:
        stores = self._to_store == start
        self._schedule._n = stop
        if stores:
            self._stored[start], self._to_store = self._place, None
        return Forward(start, stop, stores, False, self._place if stores else StorageType.WORK)

    def _reverse(self, start: int, stop: int) -> Iterator[Any]:
        self._to_store = None  # a state whose own adjoint comes next need not be kept
        self._schedule._n = stop
        yield Forward(start, stop, False, True, StorageType.WORK)
        if not self._ended_forward:
            self._ended_forward = True
            yield EndForward()
        self._schedule._r = self._steps - start
        yield Reverse(stop, start, True)

    def _forget(self, step: int) -> Iterator[Any]:
        """Give up a stored state that was not just copied."""
        if self._to_store == step:
            self._to_store = None
        elif step in self._stored:
            yield Move(step, self._stored.pop(step), StorageType.NONE)
