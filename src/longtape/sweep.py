"""`Sweep`: adjoint models that own NumPy buffers.

Thin: it checks a model, tries its first steps where something depends on them, and hands the rest to a run.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable
from functools import partial
from types import TracebackType
from typing import Any, Self

import numpy as np

from longtape.actions import Kind
from longtape.compose import Run, Settings, Traits, refuse_lossy_verification, refuse_resuming
from longtape.durable.fingerprints import bounded, of_bytes, of_code
from longtape.durable.home import Home
from longtape.durable.resumable import DEFAULT_SECONDS, Resumable, check_seconds, found_begin
from longtape.engine.trace import Trace
from longtape.errors import UsageError
from longtape.measure import JobCosts
from longtape.model.first_steps import QUICK_SECONDS, FirstSteps
from longtape.model.job import InPlaceJob, OutOfPlaceJob, StateFields
from longtape.model.protocol import (
    Array,
    Model,
    bytes_of,
    can_record,
    check_arrays,
    check_methods,
    checked_count,
    checked_seconds,
    listed,
    residual_stride,
    runs_out_of_place,
)
from longtape.plan.choose import Choice
from longtape.plan.costs import Costs
from longtape.processes import require_independent
from longtape.protocols import Bytes, Observer, Slot, Tier
from longtape.reach import digests
from longtape.report import Report
from longtape.sizes import parse_bytes
from longtape.tiers.codecs import parse_codec
from longtape.witness import Witness

__all__ = ["Model", "Sweep"]

TINY_SECONDS = 1e-3
"""Shorter steps may be reversed in windows, whose states are kept beside the slots: fewer, larger transfers."""

LONG = 10_000
"""Steps from which on that matters."""

MOST_ROWS = 64
"""Steps of a window whose states are kept beside the slots, within the budget."""

FEW = 100
"""With fewer steps, the first one is not run before the sweep only to predict its time."""


class _Kept:
    """A model's adjoint and outputs, for a run that can be resumed.  Implements `longtape.protocols.Durable`."""

    def __init__(self, model: Any, job: InPlaceJob) -> None:
        self._model, self._job, self._outputs = model, job, job.outputs

    def state(self) -> list[tuple[str, Bytes]]:
        return [(f"state[{k}]", bytes_of(array)) for k, array in enumerate(self._job.live())]

    def run_again(self, start: int, stop: int) -> None:
        self._job.run_again(start, stop)

    def put_initial(self, slot: Slot) -> None:
        self._job.put_initial(slot)

    def _arrays(self) -> list[Array]:
        return listed(self._model, "adjoint")

    def rows(self, start: int, stop: int) -> list[Bytes]:
        return self._outputs.saved(start, stop)

    def put_rows(self, start: int, stop: int, arrays: list[Bytes]) -> None:
        self._outputs.take(arrays)

    def initial(self) -> Iterable[Bytes]:
        """What must be the same of the outputs for the run to go on."""
        return self._outputs.initial()

    def seed(self) -> str | None:
        return of_bytes(self.adjoint()) if self._arrays() else None

    def adjoint(self) -> list[Bytes]:
        return [bytes_of(array) for array in self._arrays()]

    def put_adjoint(self, arrays: list[Bytes]) -> None:
        for array, kept in zip(self._arrays(), arrays, strict=True):
            np.copyto(array, kept.view(array.dtype).reshape(array.shape))

    def bars(self, start: int, stop: int) -> list[Bytes]:
        return []

    def put_bars(self, start: int, stop: int, arrays: list[Bytes]) -> None:
        pass


_CODE = ("advance", "reverse", "advance_into", "reverse_from", "record", "pull_back")


def _fingerprint(model: Any, steps: int | None, kept: _Kept) -> dict[str, str]:
    """What must be the same for a run of this model to be gone on with, beside what its methods can reach."""
    kind = type(model)
    more = getattr(model, "fingerprint", "")
    if not isinstance(more, str | bytes):
        raise UsageError(f"model.fingerprint must be a string or bytes, not {type(more).__name__}")
    more_bytes = np.frombuffer(more.encode() if isinstance(more, str) else more, np.uint8)
    shapes = [" ".join(f"{a.dtype}{list(a.shape)}" for a in arrays) for arrays in (model.state, kept._arrays())]
    return {
        "front end": "Sweep",
        "model": f"{kind.__module__}.{kind.__qualname__}",
        "code of the model's steps": of_code(*[getattr(model, name, None) for name in _CODE]),
        "number of steps": str(steps),
        "size of the residuals": str(getattr(model, "residual_nbytes", None)),
        "most steps that reverse takes": str(getattr(model, "max_reverse", 1)),
        "shape of the state": shapes[0],
        "shape of the adjoint": shapes[1],
        "initial state": of_bytes(bytes_of(array) for array in model.state),
        "outputs and initial sums": of_bytes(kept.initial()),
        "fingerprint of the model": of_bytes([more_bytes]),
        "version of NumPy": np.__version__,
    }


def _reached(model: Any) -> dict[str, str]:
    """What the model's methods can reach, but for the arrays that a sweep takes care of."""
    own = [array for name in ("state", "adjoint", "outputs", "sums") for array in listed(model, name)]
    methods = [getattr(model, name) for name in _CODE if hasattr(model, name)]
    return bounded(digests(methods, bytes_of, but=own))


_ROWS, _RANGES = "way of reversing", "way of running steps"
"""Of the fingerprint: what the process that begins finds out by trying steps, and others go by."""


class Sweep:
    """Forward and reverse through `steps` steps of a model, within a memory budget.

    Args:
        model: See `Model`; its buffers hold state 0.
        steps: N, at least 1; None if only the model knows where the sequence ends (see `Model.advance`).
        memory: Most bytes held for snapshots at any moment, such as ``"4GiB"`` or an
            integer.  The model's own buffers are not counted, nor are two states that a model with `advance_into`
            works in, nor up to 4 MiB of outputs that are put aside while steps run again.
        disk: Existing directory for a private scratch file, or None to recompute in memory only.
        disk_limit: Most bytes of it.
        observers: Objects with `on_action` and `on_transfer`, called as things happen.
        tier: Storage to use in place of a scratch file; left empty and open, for its owner to close.
        costs: Times to plan with, such as `costs` of an earlier sweep of the same model.  If None, the first steps
            are run and timed: a step of more than 0.25 s once, others for about as long.  Compile beforehand what
            compiles at its first call.  No step is run before the sweep if nothing depends on its time, as where
            all states of fewer than 100 steps fit `memory`.
        verify: Compare every state that is computed again, or fetched, with what it was the
            first time, bit for bit, and every range of steps with the same steps one at a time.  Takes a hash a step,
            a second run of steps of less than 50 ms, and a state and 8 bytes an array and step beside `memory`.
            States inside one `reverse` call are not seen; in a run that is resumed, neither are those of the process
            before.  Without it, a few states are compared.
        stuck_seconds: Wait no longer than this for storage; what it does not deliver is
            recomputed.
        compress: Codec for what goes to storage, used where it is predicted to pay: ``"lz4"``, ``"zstd"``,
            ``"bitshuffle+lz4"`` or ``"bitshuffle+zstd"``.  ``"relative:1e-4+bitshuffle+zstd"`` is lossy:
            it first rounds floating-point numbers, each by at most that share of its size, and the
            adjoint is no longer exact.
        schedule: A `checkpoint_schedules.CheckpointSchedule` to follow, fresh; it is read and
            checked here, and used up.  What it keeps on disk is written and fetched in the
            background.  None: the quickest plan for the budget is chosen.
        resume: Existing directory that makes the run durable.  After a kill, a loss of power or an
            exception, the same call with a model in its initial state goes on where the run was,
            forward or reverse.  The directory takes the place of `disk`; the files in it are removed
            when `reverse` has ended.  One state of `memory` is set aside for it.  A run that was begun
            with anything else the model's methods can reach (closures, globals, attributes, arrays by
            content) is refused, and so is one whose steps, a few of which are run again, do other
            than they did.  Work arrays count unless steps write to them: make them zeros, not `empty`.
        resume_seconds: Work that may be lost.
        name: Tells runs apart that share the directory.
        independent: The ranks are independent: no step communicates.  Without it, a run beside other ranks of MPI,
            `torch.distributed` or JAX is refused.

    Raises:
        BudgetError: `memory` cannot hold one state, or with `resume` two, or what the schedule keeps in memory.
        ScheduleError: The schedule breaks its own rules; says at which action and step.
        StepError: The first steps break the contract of `Model`; `ReplayError` if they do not repeat.
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
        independent: bool = False,
    ) -> None:
        require_independent(independent)
        if steps is not None:
            steps = checked_count("steps", steps, ", or None")
        check_methods(model)
        check_arrays(model, steps)
        records, out_of_place = can_record(model), runs_out_of_place(model)
        if records and steps is None:
            raise UsageError("a model that records does not say where it ends; give steps, or leave out record")
        if verify:
            refuse_lossy_verification(compress)
        span = 1 if out_of_place else checked_count("model.max_reverse", getattr(model, "max_reverse", 1))
        estimate = checked_seconds(model)
        seconds = check_seconds(resume_seconds)
        if resume is not None:
            refuse_resuming(steps=steps, tier=tier, compress=compress, schedule=schedule, disk=disk)
            _warn_of_outputs(model)
        fields = StateFields(model.state)
        self._model, self._steps, self._estimate = model, steps, estimate
        self._job = (OutOfPlaceJob if out_of_place else InPlaceJob)(model, fields, steps)
        if compress is not None and parse_codec(compress).bound is not None:
            self._job.replays.give_up()
        home = None if resume is None else Home(resume, name)
        try:
            begun = None if home is None else found_begin(home)
            reached = {} if home is None else _reached(model)  # before a step is run
            measured, notes = None, list[str]()
            if begun is None:
                stores = disk is not None or tier is not None or resume is not None
                fits = steps is not None and steps * fields.nbytes <= parse_bytes(memory)
                matters = schedule is None and (span > 1 or records or (stores and not fits))
                measured, notes = self._first_steps(parse_bytes(memory), fields.nbytes, costs, matters=matters)
                in_steps = schedule is not None or out_of_place or records or span > 1
                by_rows = not in_steps and self._steps_are_tiny(measured)
            else:
                by_rows = begun.fingerprint.get(_ROWS) == "by rows"
                self._job.by_steps = begun.fingerprint.get(_RANGES) != "in ranges"
            traits = Traits(
                title=type(model).__name__,
                steps=steps,
                state_nbytes=fields.nbytes,
                residual_nbytes=residual_stride(model) if records else None,
                working_slots=2 if out_of_place else 0,
                max_window=MOST_ROWS if by_rows else span,
                tape_nbytes=fields.nbytes if by_rows else 0,
                reverse_is_assumed=estimate is None and costs is None and begun is None,
                notes=tuple(notes),
                floats=lambda kind, nbytes: fields.floats if kind is Kind.SNAPSHOT else (),
            )
            resumable = None
            if home is not None:
                kept = _Kept(model, self._job)
                fingerprint = _fingerprint(model, steps, kept) | {
                    _ROWS: "by rows" if by_rows else "by steps",
                    _RANGES: "one by one" if self._job.by_steps else "in ranges",
                }
                resumable = Resumable(home, kept, fingerprint, partial(_reached, model), reached, seconds=seconds)
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
                independent=independent,
            )
            self._run = Run(self._job, traits, settings, measure=None if measured is None else lambda: measured)
        except BaseException:
            if home is not None:
                home.close()
            raise
        window = self._run.choice.window
        if by_rows:
            self._job.keep_rows(window - 1)
        else:
            self._job.replays.window = window
        if verify:
            self._job.witness = Witness("state[{}]".format)

    def _first_steps(
        self, memory: int, state: int, costs: Costs | None, *, matters: bool
    ) -> tuple[JobCosts | None, list[str]]:
        """Try the first steps, and time them if something depends on it; what a report should say of it."""
        trial = FirstSteps(self._job, LONG if self._steps is None else self._steps, memory)
        wanted = matters or self._estimate is not None or self._steps is None or self._steps >= FEW
        self._job.untried = True
        if memory < state:
            return None, []  # which the run refuses
        if costs is not None:
            if costs.forward < QUICK_SECONDS:
                self._job.untried = False
                trial.check()
            return None, trial.notes
        if not wanted:
            return None, ["no step was timed before the sweep, for nothing depends on it"]
        self._job.untried = False
        measured = trial.measure(self._estimate)
        assumed = [] if self._estimate is not None else ["predicted as if an adjoint step took twice a forward step"]
        return measured, trial.notes + assumed

    def _steps_are_tiny(self, measured: JobCosts | None) -> bool:
        """Whether deciding step by step would cost more than the steps: then whole windows are reversed at once."""
        is_long = self._steps is None or self._steps >= LONG
        return measured is not None and is_long and measured.forward < TINY_SECONDS

    @property
    def plan(self) -> Choice:
        """The chosen plan, with predicted time and bytes."""
        return self._run.choice

    @property
    def costs(self) -> Costs:
        """The times that it was chosen with, for further sweeps of models as costly; 0 where no step was timed."""
        return self._run.costs

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
        self._warn_unseeded()
        self._run.reverse()

    def _warn_unseeded(self) -> None:
        adjoint, outputs = listed(self._model, "adjoint"), self._job.outputs
        if self._job.replays.turned and adjoint and not outputs and not any(bytes_of(array).any() for array in adjoint):
            warnings.warn(
                "longtape: model.adjoint is all zeros, and so will the gradient be unless reverse adds to it; set it "
                "to the final condition before reverse()",
                RuntimeWarning,
                stacklevel=3,
            )

    def close(self) -> None:
        """Give up a sweep that is not wanted any more; `reverse` does so by itself."""
        self._run.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def _warn_of_outputs(model: Any) -> None:
    if listed(model, "adjoint") and not hasattr(model, "outputs") and not hasattr(model, "sums"):
        warnings.warn(
            "longtape: a run that can be resumed stores model.state and model.adjoint, and nothing else that steps "
            "write; list receivers and the like in model.outputs (a row a step), misfits in model.sums, or say "
            "model.outputs = [] if there are none",
            RuntimeWarning,
            stacklevel=3,
        )
