"""Runs a model's first steps before the sweep: checks that they do as they are asked, and times them.

Owns a copy of state 0 while it needs one; state, outputs and sums are as before afterwards.  Costs at most the
first step and about a quarter of a second more: of a step that takes that long there is no second run.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from statistics import median

from longtape.actions import Kind
from longtape.errors import ReplayError
from longtape.known import KnownState
from longtape.measure import JobCosts
from longtape.model.job import InPlaceJob, not_as_asked
from longtape.model.protocol import RESIDUAL_ALIGNMENT, Array, can_record, residual_stride
from longtape.model.rebinding import Rebinding
from longtape.protocols import Bytes, Slot
from longtape.tiers.aligned import map_aligned

MOST_SECONDS = 0.25
"""What running steps may take, beside the first one."""

QUICK_SECONDS = 0.05
"""A step that takes longer is always asked for alone, so that its ranges need no check."""

_TIMED_SECONDS = 2e-3
"""Steps that take less are timed several at once."""

_BUSY_SECONDS = 0.02
"""Steps that take longer are not run beside transfers that are being timed."""

MOST_SAMPLED = 16
"""Steps run to see how small the model's data becomes, or how long it takes to record one."""

_SAMPLE_NBYTES = 4 << 20


class FirstSteps:
    """Tries the first steps of one model.

    Args:
        job: Its state is state 0, and is again after each call.
        steps: Most that may be run at once.
        memory_nbytes: Bytes that may be allocated meanwhile; at least one state, for the copy of state 0.
    """

    def __init__(self, job: InPlaceJob, steps: int, memory_nbytes: int) -> None:
        self._job, self._steps, self._clock = job, steps, time.perf_counter
        self._memory, self._state = memory_nbytes, sum(array.nbytes for array in job.model.state)
        self._part = max(0, memory_nbytes - self._state) // 4
        if row := job.outputs.row_nbytes:
            self._steps = min(steps, max(2, self._part // row))
        self._initial: list[Array] | None = None
        self._left = MOST_SECONDS
        self._count = 1
        """Steps that are timed at once."""
        self.notes: list[str] = []

    def check(self) -> float:
        """Run the first step, and if it is quick the first two, alone and together.

        Returns:
            Seconds a step.

        Raises:
            StepError: A step rebinds an attribute or does not repeat, or a range is not the steps that it names.
        """
        try:
            return self._check()
        finally:
            self.restore()

    def _check(self) -> float:
        job, rebinding = self._job, Rebinding(self._job.model)
        seconds, reached = self._run(0, 1)
        self._left = MOST_SECONDS
        if not reached:
            return seconds
        if not job.runs_ranges:
            rebinding.check_untouched()
        elif not rebinding.check():
            self.notes.append("the first step changed no byte of model.state")
        if seconds > MOST_SECONDS:
            return seconds
        once = KnownState(job.live())
        seconds, _ = self._run(0, 1)
        self._check_repeats(once)
        if seconds >= QUICK_SECONDS or self._steps < 2:
            return seconds
        found = [seconds, self._run(1, 2)[0]]
        if job.runs_ranges:
            singly = KnownState(job.live())
            found.append(self._run(0, 2)[0])
            if leaf := _difference(singly, job.live()):
                raise not_as_asked(0, 2, leaf)
        job.by_steps = False
        return median(found)

    def _check_repeats(self, before: KnownState) -> None:
        if leaf := _difference(before, self._job.live()):
            raise ReplayError(
                f"step 0 does not do the same each time: run again from the same state, it gave another {leaf}. A "
                "sweep runs most steps again; make the step depend on model.state, its number and constants alone, "
                "and list in model.state whatever a step leaves for the next one",
                step=0,
                leaf=leaf,
            )

    def measure(self, reverse: float | None) -> JobCosts:
        """Check, and time forward steps and recorded ones."""
        forward = self.check()
        try:
            if forward < _TIMED_SECONDS:
                forward = self._time_many()
            record = self._time_records(forward) if can_record(self._job.model) else None
        finally:
            self.restore()
        return JobCosts(
            forward=forward,
            reverse=2.0 * forward if reverse is None else reverse,
            record=record,
            pull_back=None if record is None else forward,
            busy=self._busy if forward * self._count <= _BUSY_SECONDS else None,
            restore=self.restore,
            sample=(lambda: self._sample(forward)) if 4 * self._state <= self._memory else None,
        )

    def restore(self) -> None:
        """Put state 0 back, and release its copy."""
        if self._initial is not None:
            self._job.reset(self._initial)
            self._initial = None
            self._job.forget()

    def _reset(self) -> None:
        if self._initial is None:
            self._initial = self._job.initial()
        self._job.reset(self._initial)

    def _run(self, start: int, stop: int) -> tuple[float, int]:
        """Seconds a step, and the state reached: from state 0, or from the working state if that is another."""
        if start == 0:
            self._reset()
        with self._job.outputs.undone(start, stop):
            began = self._clock()
            reached = self._job.run(start, stop)
            seconds = self._clock() - began
        self._left -= seconds
        return seconds / max(1, reached - start), reached

    def _time_many(self) -> float:
        """Seconds of a step, from as many as take long enough to be timed."""
        while (seconds := self._run(0, self._count)[0]) * self._count < _TIMED_SECONDS:
            if self._count * 4 > self._steps:
                break
            self._count *= 4
        return median([seconds, self._run(0, self._count)[0], self._run(0, self._count)[0]])

    def _time_records(self, forward: float) -> float:
        """Seconds of a recorded step; those of a plain one where there is no time or room to try."""
        stride, affordable = residual_stride(self._job.model), self._affordable(forward)
        if not affordable or self._state + stride > self._memory:
            return forward
        count, times = (affordable // 3, 3) if affordable >= 3 else (1, 1)
        count = min(count, max(1, min(_SAMPLE_NBYTES, self._part) // stride))
        slot = _block(count * stride)
        return median(self._record(count, slot) for _ in range(times))

    def _record(self, count: int, slot: Slot) -> float:
        self._reset()
        with self._job.outputs.undone(0, count):
            began = self._clock()
            self._job.run_recording(0, count, slot)
            return (self._clock() - began) / count

    def _affordable(self, forward: float) -> int:
        """Steps that may still be run."""
        return int(min(self._steps, 3 * MOST_SAMPLED, max(0.0, self._left) / max(forward, 1e-9)))

    def _busy(self) -> None:
        left = self._left
        self._run(0, self._count)
        self._left = left

    def _sample(self, forward: float) -> tuple[Kind, Bytes]:
        """An item of the model's own data, as many steps on as may be run."""
        count = min(MOST_SAMPLED, self._affordable(forward))
        if count and can_record(self._job.model):
            stride = residual_stride(self._job.model)
            count = min(count, max(1, min(_SAMPLE_NBYTES, self._part) // stride))
            slot = _block(count * stride)
            self._record(count, slot)
            return Kind.RESIDUALS, slot.data
        if count:
            self._run(0, count)
        return Kind.SNAPSHOT, self._job.copied().data


def _block(nbytes: int) -> Slot:
    return Slot(map_aligned(nbytes, RESIDUAL_ALIGNMENT)[1])


def _difference(before: KnownState, now: Sequence[Array]) -> str | None:
    """The first array that is another one, rounding aside."""
    return next((f"state[{index}]" for index in before.differing(now)), None)
