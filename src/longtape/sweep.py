"""`Sweep`: adjoint models that own NumPy buffers.

Thin: it lays a model's arrays out in a slot and back, and hands the rest to a run.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Sequence
from statistics import median
from types import TracebackType
from typing import Any, Protocol, Self

import numpy as np
import numpy.typing as npt

from longtape.compose import Run, Settings, Traits
from longtape.engine.trace import Trace
from longtape.errors import StepError, UsageError
from longtape.layout import Fields
from longtape.measure import JobCosts
from longtape.plan.choose import Choice
from longtape.plan.costs import Costs
from longtape.protocols import Observer, Slot, Tier
from longtape.report import Report
from longtape.witness import Witness

Array = npt.NDArray[Any]


TINY_SECONDS = 20e-6
"""A step shorter than this is worth less than deciding about it on its own."""

MOST_ROWS = 64
"""Steps of a window whose states are kept beside the slots, within the budget."""


class Model(Protocol):
    """What `Sweep` asks of a model that updates its buffers in place.

    A model may also have:

    * ``max_reverse`` (int): most steps one `reverse` call may take; 1 if absent;
    * ``reverse_seconds`` (float): about how long `reverse` takes a step, for the plan; if
      absent, twice as long as a forward step, until the first adjoints have been timed;
    * ``adjoint`` (sequence of arrays): what `reverse` updates, accumulated gradients
      included.  It is checked to be arrays, and otherwise left alone: it is where a
      half-finished reverse sweep would be made durable;
    * ``advance_into(step, source, target)`` and ``reverse_from(step, source)``: run one
      step from the arrays `source` into the arrays `target` of the same shapes, and take
      its adjoint from `source`, changing neither.  A model that has both is run from the
      kept snapshots themselves, and nothing is copied to keep or to restore one.
    """

    state: Sequence[Array]
    """The live buffers, which hold state 0 when the sweep is made."""

    def advance(self, start: int, stop: int) -> Any:
        """Run steps ``start … stop-1`` on the buffers."""

    def reverse(self, start: int, stop: int) -> Any:
        """The buffers hold state `start`: take the adjoint of steps ``stop-1 … start``."""


class _Fields:
    """The model's arrays, and where each lies in a slot."""

    def __init__(self, arrays: Sequence[Array]) -> None:
        self.shapes = [(a.dtype, a.shape) for a in arrays]
        self._layout = Fields([a.nbytes for a in arrays])
        self.nbytes = self._layout.nbytes

    def views(self, slot: Slot) -> list[Array]:
        """The arrays of a snapshot, as views of the slot; made once a slot."""
        if slot.views is None:
            parts = self._layout.split(slot.data)
            slot.views = [
                part.view(dtype).reshape(shape) for part, (dtype, shape) in zip(parts, self.shapes, strict=True)
            ]
        return slot.views  # type: ignore[no-any-return]

    def check(self, arrays: Sequence[Array], step: int) -> None:
        if len(arrays) != len(self.shapes):
            raise StepError(f"the model's state has {len(arrays)} arrays at step {step}; it had {len(self.shapes)}")
        for index, (array, (dtype, shape)) in enumerate(zip(arrays, self.shapes, strict=True)):
            if array.dtype != dtype or array.shape != shape:
                raise StepError(
                    f"state[{index}] is {array.dtype}{list(array.shape)} at step {step}; "
                    f"it was {dtype}{list(shape)}. A step must keep the shapes and dtypes of its state"
                )


class _InPlaceJob:
    """A model that works on its own buffers: snapshots are copied out and in."""

    def __init__(self, model: Any, fields: _Fields) -> None:
        self._model, self._fields = model, fields
        self._step = 0
        self._rows: list[list[Array]] = []

    def keep_rows(self, count: int) -> None:
        """Reverse windows of up to `count` + 1 steps, one step at a time, keeping the states of a window here."""
        arrays = self._model.state
        self._rows = [[np.empty_like(array) for array in arrays] for _ in range(count)]

    def initial(self) -> list[Array]:
        """State 0, to go back to after steps were run only to time them."""
        return [array.copy() for array in self._model.state]

    def reset(self, initial: list[Array]) -> None:
        for array, kept in zip(self._model.state, initial, strict=True):
            np.copyto(array, kept, casting="no")
        self._step = 0

    def advance(self, start: int, stop: int) -> int:
        self._model.advance(start, stop)
        self._step = stop
        return stop

    def reverse(self, start: int, stop: int) -> None:
        if self._rows and stop > start + 1:
            self._reverse_by_rows(start, stop)
        else:
            self._model.reverse(start, stop)
        self._step = start

    def _reverse_by_rows(self, start: int, stop: int) -> None:
        model, rows = self._model, self._rows
        for row, step in zip(rows, range(start, stop - 1), strict=False):
            for kept, array in zip(row, model.state, strict=True):
                np.copyto(kept, array)
            self.advance(step, step + 1)
        model.reverse(stop - 1, stop)
        for step in range(stop - 2, start - 1, -1):
            for array, kept in zip(model.state, rows[step - start], strict=True):
                np.copyto(array, kept)
            model.reverse(step, step + 1)

    def save(self, slot: Slot) -> Slot:
        arrays = self._model.state
        self._fields.check(arrays, self._step)
        for kept, array in zip(self._fields.views(slot), arrays, strict=True):
            np.copyto(kept, array, casting="no")
        return slot

    def load(self, slot: Slot) -> None:
        for kept, array in zip(self._fields.views(slot), self._model.state, strict=True):
            np.copyto(array, kept, casting="no")

    def yield_slot(self, slot: Slot) -> Slot:
        return slot

    def adopt(self, slots: list[Slot]) -> None:
        raise NotImplementedError

    def load_initial(self) -> None:
        raise NotImplementedError

    def turn(self) -> None:
        pass

    def record(self, start: int, stop: int, slot: Slot) -> int:
        raise NotImplementedError

    def pull_back(self, start: int, stop: int, slot: Slot) -> None:
        raise NotImplementedError

    def live(self) -> Sequence[Array]:
        """The arrays of the working state."""
        return self._model.state  # type: ignore[no-any-return]


class _OutOfPlaceJob(_InPlaceJob):
    """A model that runs from any buffer into any other: snapshots change hands, and are never copied.

    The job works in two slots beside those of the budget.  The working state is in one
    of them, or in a kept snapshot (borrowed) until the next step leaves it.
    """

    def __init__(self, model: Any, fields: _Fields) -> None:
        super().__init__(model, fields)
        # To time steps in, before there is a pool to take slots from.
        self.adopt([Slot(np.empty(fields.nbytes, np.uint8)) for _ in range(2)])

    def adopt(self, slots: list[Slot]) -> None:
        self._own = slots
        self.reset([])

    def initial(self) -> list[Array]:
        return []  # steps leave the model's own arrays alone until the sweep turns

    def reset(self, initial: list[Array]) -> None:
        # State 0 stays where it is: the first step reads it there.
        self._current = Slot(np.empty(0, np.uint8), views=list(self._model.state))

    def advance(self, start: int, stop: int) -> int:
        fields, own = self._fields, self._own
        for step in range(start, stop):
            target = own[1] if self._current is own[0] else own[0]
            self._model.advance_into(step, fields.views(self._current), fields.views(target))
            self._current = target
        return stop

    def reverse(self, start: int, stop: int) -> None:
        if stop != start + 1:
            raise UsageError("a model with reverse_from reverses one step at a time")
        self._model.reverse_from(start, self._fields.views(self._current))

    def save(self, slot: Slot) -> Slot:
        if self._current not in self._own:
            for target, source in zip(self._fields.views(slot), self._fields.views(self._current), strict=True):
                np.copyto(target, source, casting="no")
            return slot
        kept = self._current
        self._own[self._own.index(kept)] = slot
        return kept

    def load(self, slot: Slot) -> None:
        self._current = slot

    def yield_slot(self, slot: Slot) -> Slot:
        if self._current is not slot:
            return slot
        given = self._own[0]
        self._own[0] = slot
        return given

    def live(self) -> Sequence[Array]:
        return self._fields.views(self._current)

    def turn(self) -> None:
        for array, kept in zip(self._model.state, self._fields.views(self._current), strict=True):
            if array is not kept:
                np.copyto(array, kept, casting="no")


class _Verified(_InPlaceJob):
    """Compares states with what they were the first time, bit for bit."""

    def __init__(self, model: Any, fields: _Fields) -> None:
        super().__init__(model, fields)
        self._witness: Witness | None = None
        self._loaded = True

    def begin(self) -> None:
        """From now on steps count: those before were run to time them."""
        self._witness = Witness("state[{}]".format)

    @property
    def states_verified(self) -> int:
        """States that came out the same when they were computed again or fetched."""
        return 0 if self._witness is None else self._witness.compared

    def _see(self, state: int, *, kept: bool = False) -> None:
        if self._witness is not None:
            leaves = [np.ascontiguousarray(array).reshape(-1).view(np.uint8) for array in self.live()]
            self._witness.see(state, leaves, kept=kept)

    def _see_loaded(self, start: int) -> None:
        if self._loaded and self._witness is not None:
            self._loaded = False
            self._see(start, kept=True)

    def load(self, slot: Slot) -> None:
        super().load(slot)
        self._loaded = True

    def advance(self, start: int, stop: int) -> int:
        self._see_loaded(start)
        for step in range(start, stop):
            super().advance(step, step + 1)
            self._see(step + 1)
        return stop

    def reverse(self, start: int, stop: int) -> None:
        self._see_loaded(start)
        super().reverse(start, stop)


class _VerifiedOutOfPlaceJob(_Verified, _OutOfPlaceJob):
    """The same for a model that runs out of place."""


_JOBS = {
    (False, False): _InPlaceJob,
    (True, False): _OutOfPlaceJob,
    (False, True): _Verified,
    (True, True): _VerifiedOutOfPlaceJob,
}
"""By whether the model runs out of place, and whether states are verified."""


class Sweep:
    """Forward and reverse through `steps` steps of a model, within a memory budget.

    Args:
        model: See `Model`; its buffers hold state 0.
        steps: N, at least 1.
        memory: Most bytes held for snapshots at any moment, such as ``"4GiB"`` or an
            integer.  The model's own buffers are not counted.
        disk: Directory for a private scratch file, or None to recompute in memory only.
        disk_limit: Most bytes of it.
        observers: Objects with `on_action` and `on_transfer`, called as things happen.
        tier: Storage to use in place of a scratch file.
        costs: Times to plan with; measured on the model when None.
        verify: Compare every state that is computed again, or fetched, with what it was the
            first time, bit for bit.  Takes a hash a step, and 8 bytes an array and step
            beside `memory`.  States inside one `reverse` call are not seen.
        stuck_seconds: Wait no longer than this for storage; what it does not deliver is
            recomputed.
        schedule: A `checkpoint_schedules.CheckpointSchedule` to follow, fresh; it is read and
            checked here, and used up.  What it keeps on disk is written and fetched in the
            background.  None: the quickest plan for the budget is chosen.

    Raises:
        BudgetError: `memory` cannot hold one state, or what the schedule keeps in memory.
        ScheduleError: The schedule breaks its own rules; says at which action and step.
        UsageError: Any other argument that cannot be honoured.

    Example::

        sweep = longtape.Sweep(model, 20_000, memory="4GiB", disk="/scratch")
        sweep.forward()
        model.adjoint[0][:] = model.state[0] - observed
        sweep.reverse()
        print(sweep.report)
    """

    def __init__(
        self,
        model: Any,
        steps: int,
        *,
        memory: int | str,
        disk: str | os.PathLike[str] | None = None,
        disk_limit: int | str | None = None,
        observers: Iterable[Observer] = (),
        tier: Tier | None = None,
        costs: Costs | None = None,
        verify: bool = False,
        stuck_seconds: float = 30.0,
        schedule: Any = None,
    ) -> None:
        if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
            raise UsageError(f"steps must be an integer of at least 1, not {steps!r}")
        self._model = model
        fields = _checked_fields(model)
        out_of_place = hasattr(model, "advance_into") and hasattr(model, "reverse_from")
        self._job = _JOBS[out_of_place, verify](model, fields)
        self._steps, self._nbytes = steps, fields.nbytes
        estimate = _checked_seconds(model)
        measured = None if costs is not None else self._measure(estimate)
        assumed = measured is not None and estimate is None
        span = 1 if out_of_place else getattr(model, "max_reverse", 1)
        if not isinstance(span, int) or span < 1:
            raise UsageError(f"model.max_reverse must be an integer of at least 1, not {span!r}")
        by_rows = schedule is None and not out_of_place and span == 1 and self._steps_are_tiny(measured)
        traits = Traits(
            title=type(model).__name__,
            steps=steps,
            state_nbytes=fields.nbytes,
            working_slots=2 if out_of_place else 0,
            max_window=MOST_ROWS if by_rows else span,
            tape_nbytes=fields.nbytes if by_rows else 0,
            reverse_is_assumed=assumed,
            notes=("predicted as if an adjoint step took twice a forward step",) if assumed else (),
        )
        settings = Settings(
            memory,
            disk=disk,
            disk_limit=disk_limit,
            observers=tuple(observers),
            tier=tier,
            costs=costs,
            stuck_seconds=stuck_seconds,
            schedule=schedule,
        )
        self._run = Run(self._job, traits, settings, measure=None if measured is None else lambda: measured)
        if by_rows:
            self._job.keep_rows(self._run.choice.window - 1)
        if isinstance(self._job, _Verified):
            self._job.begin()

    def _steps_are_tiny(self, measured: JobCosts | None) -> bool:
        """Whether deciding step by step would cost more than the steps: then whole windows are reversed at once."""
        return measured is not None and self._steps >= 10_000 and measured.forward < TINY_SECONDS

    def _measure(self, reverse: float | None) -> JobCosts:
        """Time a few first steps, and put state 0 back."""
        initial = self._job.initial()
        return _time_steps(self._job, initial, self._steps, reverse)

    @property
    def plan(self) -> Choice:
        """The chosen plan, with predicted time and bytes."""
        return self._run.choice

    @property
    def report(self) -> Report:
        """Predicted against measured, once `reverse` has ended."""
        return self._run.report

    @property
    def trace(self) -> Trace:
        """What happened when."""
        return self._run.trace

    def forward(self) -> None:
        """Run every step; afterwards the model's buffers hold the final state."""
        self._run.forward()

    def reverse(self) -> None:
        """Take the adjoint of every step, last to first.

        The model's adjoint must have been set to the final condition.  Afterwards the
        model's state buffers hold no particular state, and everything is released.
        """
        self._run.reverse()

    def close(self) -> None:
        """Give up a sweep that is not wanted any more; `reverse` does so by itself."""
        self._run.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def _checked_fields(model: Any) -> _Fields:
    arrays = getattr(model, "state", None)
    if not isinstance(arrays, (list, tuple)) or not arrays:
        raise UsageError("model.state must be a non-empty list of NumPy arrays: the buffers its steps update")
    _check_arrays("state", arrays)
    adjoint = getattr(model, "adjoint", ())
    _check_arrays("adjoint", [adjoint] if isinstance(adjoint, np.ndarray) else adjoint)
    return _Fields(arrays)


def _checked_seconds(model: Any) -> float | None:
    """What the model says an adjoint step takes."""
    seconds = getattr(model, "reverse_seconds", None)
    if seconds is None:
        return None
    if isinstance(seconds, bool) or not isinstance(seconds, (int, float)) or not 0 < seconds < float("inf"):
        raise UsageError(f"model.reverse_seconds must be the seconds that the adjoint of a step takes, not {seconds!r}")
    return float(seconds)


def _check_arrays(name: str, arrays: Sequence[Any]) -> None:
    for index, array in enumerate(arrays):
        if not isinstance(array, np.ndarray) or array.dtype.hasobject:
            kind = type(array).__name__
            raise UsageError(f"model.{name}[{index}] must be a NumPy array of plain numbers, not {kind}")


def _time_steps(job: _InPlaceJob, initial: list[Array], steps: int, reverse: float | None) -> JobCosts:
    clock = time.perf_counter

    def run(count: int) -> float:
        job.reset(initial)
        began = clock()
        job.advance(0, count)
        return clock() - began

    def busy() -> None:
        run(count)

    def restore() -> None:
        job.reset(initial)

    count = 1
    try:
        run(1)  # the first call may compile
        while (seconds := run(count)) < 2e-3 and count * 4 <= steps:
            count *= 4
        forward = median([seconds, run(count), run(count)]) / count
    finally:
        restore()
    return JobCosts(forward=forward, reverse=2.0 * forward if reverse is None else reverse, busy=busy, restore=restore)
