"""A user's operators and checkpoint as a job, and what is checked of them as they run."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from math import inf
from typing import Any

import numpy as np
import numpy.typing as npt

from longtape.errors import ReplayError, StepError, UsageError
from longtape.known import KnownState
from longtape.layout import Fields
from longtape.measure import JobCosts
from longtape.protocols import Slot
from longtape.witness import Witness

Array = npt.NDArray[Any]

TIMED_STEPS = 2
CHECKED_LOADS = 3
REVERSE_OVER_FORWARD = 1.5


class _Arrays:
    """How the arrays of a state, and the number of its step, lie in a slot."""

    def __init__(self, arrays: Sequence[Array]) -> None:
        self.shapes = [(array.dtype, array.shape) for array in arrays]
        self._layout = Fields([*(array.nbytes for array in arrays), 8])
        self.nbytes = self._layout.nbytes

    def views(self, slot: Slot) -> tuple[list[Array], Array]:
        """The arrays of a snapshot, and its step, as views of the slot; made once a slot."""
        if slot.views is None:
            *parts, step = self._layout.split(slot.data)
            arrays = [p.view(dtype).reshape(shape) for p, (dtype, shape) in zip(parts, self.shapes, strict=True)]
            slot.views = arrays, step.view(np.int64)
        return slot.views  # type: ignore[no-any-return]

    def check(self, arrays: Sequence[Array], call: str) -> None:
        """Raise `StepError` unless the arrays are like those of state 0."""
        if len(arrays) != len(self.shapes):
            raise StepError(f"{call} returned {len(arrays)} arrays, but get_data(0) returned {len(self.shapes)}")
        for index, (array, (dtype, shape)) in enumerate(zip(arrays, self.shapes, strict=True)):
            if array.dtype != dtype or array.shape != shape:
                raise StepError(
                    f"{call}[{index}] is {array.dtype}{list(array.shape)}, but get_data(0)[{index}] was "
                    f"{dtype}{list(shape)}; all states must have the same shapes and dtypes"
                )


class OperatorsJob:
    """Two operators and a checkpoint as a job.

    A user's forward operator may do more than advance the state, such as add up an
    illumination, so every step is run exactly once going forward: the first steps are
    timed as they are run, before there is a plan, and the states that they started from
    are kept aside until the plan has come as far (`_aside`).
    """

    def __init__(self, checkpoint: Any, forward: Any, reverse: Any, steps: int, *, verify: bool) -> None:
        self._checkpoint, self._forward, self._reverse, self._steps = checkpoint, forward, reverse, steps
        self._at = self._ran = 0
        self._turned = self._has_run_many = False
        self._aside: dict[int, list[Array]] = {}
        self._loads = 0
        self._witness = Witness("get_data(…)[{}]".format) if verify else None
        self.arrays = _Arrays(_live(checkpoint.get_data(0), "get_data(0)"))
        before = self._last_arrays()
        self._before = None if before is None else KnownState(before)
        """What the arrays of the final state held at first."""
        self._known: dict[int, KnownState] = {}
        """The final state, and the last one that was reached by several steps in one call."""
        self._see(0)

    @property
    def states_verified(self) -> int | None:
        """States that came out the same when they were computed again or fetched; None: not looked at."""
        return None if self._witness is None else self._witness.compared

    def _see(self, state: int, *, kept: bool = False) -> None:
        if self._witness is not None:
            self._witness.see(state, [_bytes(array) for array in self._data(state)], kept=kept)

    def _data(self, step: int) -> list[Array]:
        arrays = _live(self._checkpoint.get_data(step), f"get_data({step})")
        self.arrays.check(arrays, f"get_data({step})")
        return arrays

    def measure(self) -> JobCosts:
        """Run the first steps; the quickest counts, for the first may compile."""
        clock, seconds = time.perf_counter, inf
        for step in range(min(TIMED_STEPS, self._steps)):
            self._aside[step] = [array.copy() for array in self._data(step)]
            began = clock()
            try:
                self._forward.apply(t_start=step, t_end=step + 1)
            except Exception as error:
                error.add_note(f"longtape: while running steps {step} to {step} (forward sweep)")
                raise
            seconds = min(seconds, clock() - began)
            self._ran = step + 1
            self._see(step + 1)
        live = self._data(self._ran)
        spare = [np.empty_like(array) for array in live]

        def busy() -> None:
            for target, source in zip(spare, live, strict=True):
                np.copyto(target, source)

        return JobCosts(forward=seconds, reverse=(1 + REVERSE_OVER_FORWARD) * seconds, busy=busy)

    def advance(self, start: int, stop: int) -> int:
        if self._aside:
            start = min(stop, self._ran)
            if stop >= self._ran:
                self._aside.clear()
        self._run(start, stop)
        self._at = stop
        return stop

    def _run(self, start: int, stop: int) -> None:
        self._apply(start, stop)
        if self._turned:
            self._check(stop)
        elif stop > start + 1:
            self._known = {stop: KnownState(self._data(stop))}

    def _apply(self, start: int, stop: int) -> None:
        if self._witness is None:
            if start < stop:
                self._forward.apply(t_start=start, t_end=stop)
            return
        many = self._turned and not self._has_run_many and stop > start + 1
        for step in range(start, stop, stop - start if many else 1):
            end = stop if many else step + 1
            self._forward.apply(t_start=step, t_end=end)
            self._see(end)
        self._has_run_many |= many  # once as without verification: an operator may not do what it is told

    def reverse(self, start: int, stop: int) -> None:
        self._run(start, stop)
        self._reverse.apply(t_start=start, t_end=stop)

    def _last_arrays(self) -> list[Array] | None:
        """Those of the final state; None if the checkpoint does not give them, as nobody has promised."""
        try:
            return self._data(self._steps)
        except Exception:
            return None

    def _check(self, state: int) -> None:
        """Hold a state that was computed again against what it was, where that is known; rounding aside."""
        known = self._known.get(state)
        if known is not None and (differs := known.differing(self._data(state))):
            raise ReplayError(
                f"steps up to {state - 1}, run again from a stored state, ended in another get_data({state})"
                f"[{differs[0]}] than in apply_forward(). The gradient would be that of steps that were never run. "
                f"{type(self._forward).__name__}.apply must run exactly the steps t_start to t_end - 1, however they "
                "are divided among calls, and nothing that it reads may change before apply_reverse() ends",
                step=state - 1,
                leaf=f"get_data(…)[{differs[0]}]",
            )

    def save(self, slot: Slot) -> Slot:
        views, step = self.arrays.views(slot)
        for kept, array in zip(views, self._aside.get(self._at) or self._data(self._at), strict=True):
            np.copyto(kept, array)
        step[0] = self._at
        return slot

    def load(self, slot: Slot) -> None:
        views, kept_step = self.arrays.views(slot)
        step = self._at = int(kept_step[0])
        call = f"get_data_location({step})"
        live = _live(self._checkpoint.get_data_location(step), call)
        self.arrays.check(live, call)
        for array, kept in zip(live, views, strict=True):
            np.copyto(array, kept)
        self._loads += 1
        if self._loads <= CHECKED_LOADS:
            self._check_restored(step, views)
        self._see(step, kept=True)

    def _check_restored(self, step: int, views: Sequence[Array]) -> None:
        for index, (array, kept) in enumerate(zip(self._data(step), views, strict=True)):
            if not np.array_equal(_bytes(array), _bytes(kept)):
                raise StepError(
                    f"state {step} was put into get_data_location({step})[{index}], but get_data({step})[{index}] does "
                    "not give it back: both must be the live arrays that the operators work on, not copies, and no "
                    "two of them may overlap"
                )

    def yield_slot(self, slot: Slot) -> Slot:
        return slot

    def turn(self) -> None:
        self._turned, arrays = True, self._last_arrays()
        if arrays is None:
            return
        self._known[self._steps] = final = KnownState(arrays)
        if self._before is None or not final.is_same(self._before):
            return
        if any(np.any(array) for array in [*arrays, *self._data(0)]):
            raise StepError(
                f"after {self._steps} steps get_data({self._steps}) holds the bits that it held at first: nothing has "
                f"changed in the arrays that {type(self._checkpoint).__name__} gives. If the operators assign new "
                "arrays, get_data must look them up at each call"
            )

    def adopt(self, slots: list[Slot]) -> None:
        raise NotImplementedError

    def load_initial(self) -> None:
        raise NotImplementedError

    def record(self, start: int, stop: int, slot: Slot) -> int:
        raise NotImplementedError

    def pull_back(self, start: int, stop: int, slot: Slot) -> None:
        raise NotImplementedError


def _live(arrays: Iterable[Any], call: str) -> list[Array]:
    """The arrays as plain views, whatever subclass they are of."""
    found = list(arrays)
    for index, array in enumerate(found):
        if not isinstance(array, np.ndarray) or array.dtype.hasobject:
            raise UsageError(f"{call}[{index}] must be a NumPy array of plain numbers, not {type(array).__name__}")
    return [np.asarray(array) for array in found]


def _bytes(array: Array) -> Array:
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)
