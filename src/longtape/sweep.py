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

from longtape.actions import Kind
from longtape.compose import Run, Settings, Traits, refuse_lossy_verification, refuse_resuming
from longtape.durable.fingerprints import of_bytes, of_code
from longtape.durable.home import Home
from longtape.durable.keeper import DEFAULT_SECONDS, Resumable, check_seconds, found_begin
from longtape.engine.trace import Trace
from longtape.errors import StepError, UsageError
from longtape.layout import Fields
from longtape.measure import JobCosts
from longtape.plan.choose import Choice
from longtape.plan.costs import Costs
from longtape.protocols import Bytes, Floats, Observer, Slot, Tier
from longtape.report import Report
from longtape.tiers.aligned import map_aligned
from longtape.witness import Witness

Array = npt.NDArray[Any]


TINY_SECONDS = 20e-6
"""A step shorter than this is worth less than deciding about it on its own."""

LONG = 10_000
"""Steps from which on that matters."""

MOST_ROWS = 64
"""Steps of a window whose states are kept beside the slots, within the budget."""


MOST_SAMPLED = 16
"""Steps run to see how small the model's data becomes, or how long it takes to record one."""

SAMPLE_NBYTES = 4 << 20

_RESIDUAL_ALIGNMENT = 64


class Model(Protocol):
    """What `Sweep` asks of a model that updates its buffers in place.

    A model may also have:

    * ``max_reverse`` (int): most steps one `reverse` call may take; 1 if absent;
    * ``reverse_seconds`` (float): about how long `reverse` takes a step, for the plan; if
      absent, twice as long as a forward step, until the first adjoints have been timed;
    * ``adjoint`` (array or sequence of arrays): what `reverse` updates, accumulated gradients
      included, all of it.  It is checked to be arrays; only with ``resume`` is it used: it is
      made durable on the way, and set when a half-finished reverse sweep is gone on with;
    * ``fingerprint`` (str or bytes): whatever else the gradient depends on, such as parameters;
      with ``resume``, a run that was begun with another one is refused;
    * ``advance_into(step, source, target)`` and ``reverse_from(step, source)``: run one
      step from the arrays `source` into the arrays `target` of the same shapes, and take
      its adjoint from `source`, changing neither.  A model that has both is run from the
      kept snapshots themselves, and nothing is copied to keep or to restore one.  Where
      storage takes every state (and the adjoint needs nothing else), no step is run twice:
      the state is the tape;
    * ``residual_nbytes`` (int), ``record(step, residuals)`` and ``pull_back(step, residuals)``:
      run one step on the buffers and put what its adjoint needs into `residuals`, a uint8
      array of so many bytes that starts at a multiple of 64; and take the adjoint of the
      step from it, whatever the state buffers hold.  Then storage carries residuals
      instead of states where that is quicker, and recorded steps are never run again.
    """

    state: Sequence[Array]
    """The live buffers, which hold state 0 when the sweep is made."""

    def advance(self, start: int, stop: int) -> Any:
        """Run steps ``start … stop-1`` on the buffers.

        In a sweep with ``steps=None``, return the state reached: `stop`, or less where the sequence
        has ended, which may be `start` itself.  (`advance_into` then returns False, and makes no step.)
        """

    def reverse(self, start: int, stop: int) -> Any:
        """The buffers hold state `start`: take the adjoint of steps ``stop-1 … start``."""


class _Fields:
    """The model's arrays, and where each lies in a slot."""

    def __init__(self, arrays: Sequence[Array]) -> None:
        self.shapes = [(a.dtype, a.shape) for a in arrays]
        self._layout = Fields([a.nbytes for a in arrays])
        self.nbytes = self._layout.nbytes
        self.floats = [
            Floats(offset, offset + array.nbytes, array.dtype.itemsize // (2 if array.dtype.kind == "c" else 1))
            for offset, array in zip(self._layout.offsets, arrays, strict=True)
            if array.dtype.isnative and array.dtype.char in "fdFD"
        ]

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
        self.model = model
        self._fields = fields
        self._step = 0
        self._rows: list[list[Array]] = []

    def keep_rows(self, count: int) -> None:
        """Reverse windows of up to `count` + 1 steps, one step at a time, keeping the states of a window here."""
        arrays = self.model.state
        self._rows = [[np.empty_like(array) for array in arrays] for _ in range(count)]

    def leave(self) -> None:
        """The sweeps are over: hold no memory."""
        self._rows = []

    def initial(self) -> list[Array]:
        """State 0, to go back to after steps were run only to time them."""
        return [array.copy() for array in self.model.state]

    def reset(self, initial: list[Array]) -> None:
        for array, kept in zip(self.model.state, initial, strict=True):
            np.copyto(array, kept, casting="no")
        self._step = 0

    may_end = False
    """Whether it is the model that says where the sequence ends: in the forward sweep of a length not known."""

    def advance(self, start: int, stop: int) -> int:
        reached = self.model.advance(start, stop)
        self._step = self._checked_end(reached, start, stop) if self.may_end else stop
        return self._step

    def _checked_end(self, reached: Any, start: int, stop: int) -> int:
        if isinstance(reached, bool) or not isinstance(reached, (int, np.integer)) or not start <= reached <= stop:
            raise StepError(
                f"advance({start}, {stop}) returned {reached!r}; with steps=None it must return the state reached, "
                f"which is {stop} unless the sequence ends before"
            )
        return int(reached)

    def reverse(self, start: int, stop: int) -> None:
        if self._rows and stop > start + 1:
            self._reverse_by_rows(start, stop)
        else:
            self.model.reverse(start, stop)
        self._step = start

    def _reverse_by_rows(self, start: int, stop: int) -> None:
        model, rows = self.model, self._rows
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
        arrays = self.model.state
        self._fields.check(arrays, self._step)
        for kept, array in zip(self._fields.views(slot), arrays, strict=True):
            np.copyto(kept, array, casting="no")
        return slot

    def load(self, slot: Slot) -> None:
        for kept, array in zip(self._fields.views(slot), self.model.state, strict=True):
            np.copyto(array, kept, casting="no")

    def yield_slot(self, slot: Slot) -> Slot:
        return slot

    def adopt(self, slots: list[Slot]) -> None:
        raise NotImplementedError

    def load_initial(self) -> None:
        raise NotImplementedError

    def turn(self) -> None:
        self.may_end = False

    def record(self, start: int, stop: int, slot: Slot) -> int:
        for step, residuals in zip(range(start, stop), self._residuals(slot), strict=False):
            self.model.record(step, residuals)
        self._step = stop
        return stop

    def pull_back(self, start: int, stop: int, slot: Slot) -> None:
        rows = self._residuals(slot)
        for step in range(stop - 1, start - 1, -1):
            self.model.pull_back(step, rows[step - start])

    def _residuals(self, slot: Slot) -> list[Bytes]:
        """The part of each step in a block; made once a slot."""
        if slot.views is None:
            nbytes = self.model.residual_nbytes
            stride = _stride(self.model)
            slot.views = [slot.data[k : k + nbytes] for k in range(0, slot.data.nbytes - nbytes + 1, stride)]
        return slot.views  # type: ignore[no-any-return]

    def sample(self, steps: int) -> tuple[Kind, Bytes]:
        """An item of the model's own data, a few steps on."""
        if _can_record(self.model):
            stride = _stride(self.model)
            count = max(1, min(steps, MOST_SAMPLED, SAMPLE_NBYTES // stride))
            slot = Slot(map_aligned(count * stride, _RESIDUAL_ALIGNMENT)[1])
            self.record(0, count, slot)
            return Kind.RESIDUALS, slot.data
        self.advance(0, min(steps, MOST_SAMPLED))
        return Kind.SNAPSHOT, self.save(Slot(np.empty(self._fields.nbytes, np.uint8))).data

    def live(self) -> Sequence[Array]:
        """The arrays of the working state."""
        return self.model.state  # type: ignore[no-any-return]


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
        self._current = Slot(np.empty(0, np.uint8), views=list(self.model.state))

    def advance(self, start: int, stop: int) -> int:
        fields, own = self._fields, self._own
        for step in range(start, stop):
            target = own[1] if self._current is own[0] else own[0]
            stepped = self.model.advance_into(step, fields.views(self._current), fields.views(target))
            if self.may_end and stepped is False:
                return step
            self._current = target
        return stop

    def reverse(self, start: int, stop: int) -> None:
        if stop != start + 1:
            raise UsageError("a model with reverse_from reverses one step at a time")
        self.model.reverse_from(start, self._fields.views(self._current))

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
        super().turn()
        for array, kept in zip(self.model.state, self._fields.views(self._current), strict=True):
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
            if super().advance(step, step + 1) == step:
                return step  # the sequence ends here
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


class _Kept:
    """A model's adjoint, for a run that can be resumed.  Implements `longtape.protocols.Durable`."""

    def __init__(self, model: Any) -> None:
        self._model = model

    def _arrays(self) -> list[Array]:
        adjoint = getattr(self._model, "adjoint", ())
        return [adjoint] if isinstance(adjoint, np.ndarray) else list(adjoint)

    def rows(self, start: int, stop: int) -> list[Bytes]:
        return []

    def put_rows(self, start: int, stop: int, arrays: list[Bytes]) -> None:
        pass

    def seed(self) -> str | None:
        return of_bytes(self.adjoint()) if self._arrays() else None

    def adjoint(self) -> list[Bytes]:
        return [_bytes_of(array) for array in self._arrays()]

    def put_adjoint(self, arrays: list[Bytes]) -> None:
        for array, kept in zip(self._arrays(), arrays, strict=True):
            np.copyto(array, kept.view(array.dtype).reshape(array.shape))

    def bars(self, start: int, stop: int) -> list[Bytes]:
        return []

    def put_bars(self, start: int, stop: int, arrays: list[Bytes]) -> None:
        pass


def _bytes_of(array: Array) -> Bytes:
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)


def _fingerprint(model: Any, steps: int | None, kept: _Kept) -> dict[str, str]:
    """What must be the same for a run of this model to be gone on with."""
    kind = type(model)
    code = ("advance", "reverse", "advance_into", "reverse_from", "record", "pull_back")
    more = getattr(model, "fingerprint", "")
    if not isinstance(more, str | bytes):
        raise UsageError(f"model.fingerprint must be a string or bytes, not {type(more).__name__}")
    shapes = [f"{a.dtype}{list(a.shape)}" for a in model.state], [f"{a.dtype}{list(a.shape)}" for a in kept._arrays()]
    more_bytes = np.frombuffer(more.encode() if isinstance(more, str) else more, np.uint8)
    return {
        "front end": "Sweep",
        "model": f"{kind.__module__}.{kind.__qualname__}",
        "code of the model's steps": of_code(*[getattr(kind, name, None) for name in code]),
        "number of steps": str(steps),
        "size of the residuals": str(getattr(model, "residual_nbytes", None)),
        "shape of the state": of_bytes([_text(" ".join(shapes[0]))]),
        "shape of the adjoint": of_bytes([_text(" ".join(shapes[1]))]),
        "initial state": of_bytes(_bytes_of(array) for array in model.state),
        "fingerprint of the model": of_bytes([more_bytes]),
    }


def _text(text: str) -> Bytes:
    return np.frombuffer(text.encode(), np.uint8)


class Sweep:
    """Forward and reverse through `steps` steps of a model, within a memory budget.

    Args:
        model: See `Model`; its buffers hold state 0.
        steps: N, at least 1; None if only the model knows where the sequence ends (see `Model.advance`).
        memory: Most bytes held for snapshots at any moment, such as ``"4GiB"`` or an
            integer.  The model's own buffers are not counted.
        disk: Directory for a private scratch file, or None to recompute in memory only.
        disk_limit: Most bytes of it.
        observers: Objects with `on_action` and `on_transfer`, called as things happen.
        tier: Storage to use in place of a scratch file; left empty and open, for its owner to close.
        costs: Times to plan with; measured on the model when None.
        verify: Compare every state that is computed again, or fetched, with what it was the
            first time, bit for bit.  Takes a hash a step, and 8 bytes an array and step
            beside `memory`.  States inside one `reverse` call are not seen; in a run that is
            resumed, neither are those of the process before.
        stuck_seconds: Wait no longer than this for storage; what it does not deliver is
            recomputed.
        compress: Codec for what goes to storage, used where it is predicted to pay: ``"lz4"``, ``"zstd"``,
            ``"bitshuffle+lz4"`` or ``"bitshuffle+zstd"``.  ``"relative:1e-4+bitshuffle+zstd"`` is lossy:
            it first rounds floating-point numbers, each by at most that share of its size, and the
            adjoint is no longer exact.
        schedule: A `checkpoint_schedules.CheckpointSchedule` to follow, fresh; it is read and
            checked here, and used up.  What it keeps on disk is written and fetched in the
            background.  None: the quickest plan for the budget is chosen.
        resume: Directory that makes the run durable.  After a kill, a loss of power or an exception,
            the same call with a model in its initial state goes on where the run was, forward
            or reverse.  The directory takes the place of `disk`; the files in it are removed
            when `reverse` has ended.  One state of `memory` is set aside for it.
        resume_seconds: Work that may be lost.
        name: Tells runs apart that share the directory.

    Raises:
        BudgetError: `memory` cannot hold one state, or with `resume` two, or what the schedule keeps in memory.
        ScheduleError: The schedule breaks its own rules; says at which action and step.
        ResumeError: What is in `resume` is of another run, or another sweep is working on it.
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
        steps: int | None,
        *,
        memory: int | str,
        disk: str | os.PathLike[str] | None = None,
        disk_limit: int | str | None = None,
        observers: Iterable[Observer] = (),
        tier: Tier | None = None,
        costs: Costs | None = None,
        verify: bool = False,
        stuck_seconds: float = 30.0,
        compress: str | None = None,
        schedule: Any = None,
        resume: str | os.PathLike[str] | None = None,
        resume_seconds: float = DEFAULT_SECONDS,
        name: str = "sweep",
    ) -> None:
        if steps is not None and (isinstance(steps, bool) or not isinstance(steps, int) or steps < 1):
            raise UsageError(f"steps must be an integer of at least 1, or None, not {steps!r}")
        fields = _checked_fields(model)
        if verify:
            refuse_lossy_verification(compress)
        records = _can_record(model)
        if records and steps is None:
            raise UsageError("a model that records does not say where it ends; give steps, or leave out record")
        out_of_place = not records and hasattr(model, "advance_into") and hasattr(model, "reverse_from")
        self._job = _JOBS[out_of_place, verify](model, fields)
        self._job.may_end = steps is None
        self._steps, self._nbytes = steps, fields.nbytes
        span = 1 if out_of_place else getattr(model, "max_reverse", 1)
        if not isinstance(span, int) or span < 1:
            raise UsageError(f"model.max_reverse must be an integer of at least 1, not {span!r}")
        estimate = _checked_seconds(model)
        seconds = check_seconds(resume_seconds)
        if resume is not None:
            refuse_resuming(steps=steps, tier=tier, compress=compress, schedule=schedule)
        home = None if resume is None else Home(resume, name)
        try:
            begun = None if home is None else found_begin(home)
            measured = None if costs is not None or begun is not None else self._measure(estimate)
            assumed = measured is not None and estimate is None
            if begun is None:
                in_steps = schedule is not None or out_of_place or records or span > 1
                by_rows = not in_steps and self._steps_are_tiny(measured)
            else:
                by_rows = begun.front.get("by_rows") is True
            traits = Traits(
                title=type(model).__name__,
                steps=steps,
                state_nbytes=fields.nbytes,
                residual_nbytes=_stride(model) if records else None,
                working_slots=2 if out_of_place else 0,
                max_window=MOST_ROWS if by_rows else span,
                tape_nbytes=fields.nbytes if by_rows else 0,
                reverse_is_assumed=assumed,
                notes=("predicted as if an adjoint step took twice a forward step",) if assumed else (),
                floats=lambda kind, nbytes: fields.floats if kind is Kind.SNAPSHOT else (),
            )
            resumable = None
            if home is not None:
                kept = _Kept(model)
                fingerprint, front = _fingerprint(model, steps, kept), {"by_rows": by_rows}
                resumable = Resumable(home, kept, fingerprint, front, seconds=seconds)
            settings = Settings(
                memory,
                disk=disk,
                disk_limit=disk_limit,
                observers=tuple(observers),
                tier=tier,
                costs=costs,
                stuck_seconds=stuck_seconds,
                compress=compress,
                schedule=schedule,
                resumable=resumable,
            )
            self._run = Run(self._job, traits, settings, measure=None if measured is None else lambda: measured)
        except BaseException:
            if home is not None:
                home.close()
            raise
        if by_rows:
            self._job.keep_rows(self._run.choice.window - 1)
        if isinstance(self._job, _Verified):
            self._job.begin()

    def _steps_are_tiny(self, measured: JobCosts | None) -> bool:
        """Whether deciding step by step would cost more than the steps: then whole windows are reversed at once."""
        is_long = self._steps is None or self._steps >= LONG
        return measured is not None and is_long and measured.forward < TINY_SECONDS

    def _measure(self, reverse: float | None) -> JobCosts:
        """Time a few first steps, and put state 0 back."""
        initial = self._job.initial()
        return _time_steps(self._job, initial, LONG if self._steps is None else self._steps, reverse)

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
        """Seconds a step."""
        job.reset(initial)
        began = clock()
        reached = job.advance(0, count)
        return (clock() - began) / max(1, reached)

    def busy() -> None:
        run(count)

    def restore() -> None:
        job.reset(initial)

    count = 1
    try:
        run(1)  # the first call may compile
        while (seconds := run(count)) * count < 2e-3 and count * 4 <= steps:
            count *= 4
        forward = median([seconds, run(count), run(count)]) / count
        record = _time_records(job, initial, steps) if _can_record(job.model) else None
    finally:
        restore()
    return JobCosts(
        forward=forward,
        reverse=2.0 * forward if reverse is None else reverse,
        record=record,
        pull_back=None if record is None else forward,
        busy=busy,
        restore=restore,
        sample=lambda: job.sample(steps),
    )


def _time_records(job: _InPlaceJob, initial: list[Array], steps: int) -> float:
    """Seconds of a recorded step."""
    stride = _stride(job.model)
    count = max(1, min(steps, MOST_SAMPLED, SAMPLE_NBYTES // stride))
    slot = Slot(map_aligned(count * stride, _RESIDUAL_ALIGNMENT)[1])
    seconds = []
    for _ in range(3):
        job.reset(initial)
        began = time.perf_counter()
        job.record(0, count, slot)
        seconds.append((time.perf_counter() - began) / count)
    return median(seconds)


def _can_record(model: Any) -> bool:
    found = [name for name in ("residual_nbytes", "record", "pull_back") if hasattr(model, name)]
    if found and len(found) < 3:
        raise UsageError(f"a model that records has residual_nbytes, record and pull_back; this one has {found}")
    if found and (not isinstance(model.residual_nbytes, int) or model.residual_nbytes < 1):
        raise UsageError(f"model.residual_nbytes must be an integer of at least 1, not {model.residual_nbytes!r}")
    return bool(found)


def _stride(model: Any) -> int:
    """Bytes from the residuals of one step to those of the next."""
    nbytes: int = model.residual_nbytes
    return -(-nbytes // _RESIDUAL_ALIGNMENT) * _RESIDUAL_ALIGNMENT
