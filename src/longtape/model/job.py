"""Jobs: a model's steps and working state, as the executor drives them.

Implements `longtape.protocols.Job` for models that own NumPy buffers.  Every step of a sweep runs
through `InPlaceJob.advance` or `record`, so that outputs are written once and replays are compared.
Runs on the executor's thread.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from longtape.errors import ReplayError, StepError, UsageError
from longtape.layout import Fields
from longtape.model.outputs import Outputs
from longtape.model.protocol import Array, bytes_of, residual_stride
from longtape.model.rebinding import Rebinding
from longtape.model.replays import Replays
from longtape.protocols import Bytes, Floats, Slot
from longtape.witness import Witness, hashes_of


class StateFields:
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


class InPlaceJob:
    """A model that works on its own buffers: snapshots are copied out and in."""

    runs_ranges = True
    """Whether the model is handed ranges of steps, and not one after the other."""

    def __init__(self, model: Any, fields: StateFields, steps: int | None) -> None:
        self.model, self.outputs = model, Outputs(model)
        self._has_outputs = bool(self.outputs)
        self.by_steps = True
        """Call the model for one step at a time: nobody has seen that it runs the range that it is asked for."""
        self.may_end = steps is None
        """Whether the model says where the sequence ends: in the forward sweep of a length not known."""
        self.replays = Replays(self.live, steps)
        self.witness: Witness | None = None
        """With ``verify=True``: compares every state."""
        self.untried = False
        """Whether no step has run before the sweep, so that the first one is to be checked in it."""
        self._fields = fields
        self._step = 0
        self._rows: list[list[Array]] = []
        self._rebinding: Rebinding | None = None
        self._loaded = True
        self._residual_hashes: dict[int, list[int]] = {}

    def live(self) -> Sequence[Array]:
        """The arrays of the working state."""
        return self.model.state  # type: ignore[no-any-return]

    def keep_rows(self, count: int) -> None:
        """Reverse windows of up to `count` + 1 steps, one step at a time, keeping the states of a window here."""
        self._rows = [[np.empty_like(array) for array in self.model.state] for _ in range(count)]

    def leave(self) -> None:
        """The sweeps are over: hold no memory."""
        self._rows = []

    def initial(self) -> list[Array]:
        """State 0, to go back to after steps that are only tried."""
        return [array.copy() for array in self.model.state]

    def reset(self, kept: Sequence[Array]) -> None:
        """Make these the working state."""
        for array, value in zip(self.model.state, kept, strict=True):
            np.copyto(array, value, casting="no")

    def forget(self) -> None:
        """Release what steps were tried in."""

    # Steps -----------------------------------------------------------------------------------

    def advance(self, start: int, stop: int) -> int:
        mark = self.replays.begin(start, stop)
        if mark is not None or self.by_steps or self.untried or self.witness is not None or self._has_outputs:
            return self._advance_in_parts(start, stop, mark)
        reached = self.run(start, stop)
        self.replays.passed(reached)
        return reached

    def _advance_in_parts(self, start: int, stop: int, mark: int | None) -> int:
        before, began = None, start
        self._look()
        if self.witness is not None:
            self._see_loaded(start)
            if self.runs_ranges and not self.by_steps and stop > start + 1:
                before = self.initial()
        while start < stop:
            end = self._end(start, stop, mark)
            with self.outputs.running(start, end):
                reached = self.run(start, end)
            self._ran(reached)
            if reached == mark:
                self.replays.note(reached)
            if reached != end:
                stop = reached  # the sequence ends here
            start = end
        if before is not None:
            self._check_asked(before, began, stop)
        return stop

    def _end(self, start: int, stop: int, mark: int | None) -> int:
        """How far the model runs in one call."""
        if self.by_steps or self.witness is not None:
            return start + 1
        end = stop if mark is None or mark <= start else mark
        return self.outputs.end(start, end)

    def _look(self) -> None:
        if self.untried:
            self.untried, self._rebinding = False, Rebinding(self.model) if self.runs_ranges else None

    def _ran(self, reached: int) -> None:
        if self._rebinding is not None:
            self._rebinding.check()
            self._rebinding = None
        self.replays.passed(reached)
        if self.witness is not None:
            self.see(reached)

    def run(self, start: int, stop: int) -> int:
        """Have the model run steps; the state reached."""
        reached = self.model.advance(start, stop)
        self._step = self._checked_end(reached, start, stop)
        return self._step

    def _checked_end(self, reached: Any, start: int, stop: int) -> int:
        if reached is None and not self.may_end:
            return stop
        is_count = isinstance(reached, (int, np.integer)) and not isinstance(reached, bool)
        if self.may_end:
            if not is_count or not start <= reached <= stop:
                raise StepError(
                    f"advance({start}, {stop}) returned {reached!r}; with steps=None it must return the state "
                    f"reached, which is {stop} unless the sequence ends before"
                )
            return int(reached)
        if is_count and reached != stop:
            raise StepError(
                f"advance({start}, {stop}) returned {reached!r}, but the sweep was told how many steps there are; "
                f"return None or {stop}, or give steps=None if the model says where the sequence ends"
            )
        return stop

    def reverse(self, start: int, stop: int) -> None:
        self._see_loaded(start)
        if self._rows and stop > start + 1:
            self._reverse_by_rows(start, stop)
        else:
            self.model.reverse(start, stop)
        self._step = start

    def _reverse_by_rows(self, start: int, stop: int) -> None:
        model, rows = self.model, self._rows
        is_watched = self.witness is not None or self._has_outputs
        advance = self.advance if is_watched else self.run  # steps are tiny, and here is where most of them run
        for row, step in zip(rows, range(start, stop - 1), strict=False):
            for kept, array in zip(row, model.state, strict=True):
                np.copyto(kept, array)
            advance(step, step + 1)
        self.replays.passed(stop - 1)
        model.reverse(stop - 1, stop)
        for step in range(stop - 2, start - 1, -1):
            self.reset(rows[step - start])
            model.reverse(step, step + 1)

    def record(self, start: int, stop: int, slot: Slot) -> int:
        self._look()
        if start == 0:
            self.replays.begin(0, 1)
        self._see_loaded(start)
        for step, residuals in zip(range(start, stop), self._residuals(slot), strict=False):
            with self.outputs.running(step, step + 1):
                self.model.record(step, residuals)
            self._step = step + 1
            self._ran(step + 1)
            if self.witness is not None:
                self._residual_hashes[step] = hashes_of([residuals])
        return stop

    def run_recording(self, start: int, stop: int, slot: Slot) -> None:
        """Have the model record steps, seen by nobody."""
        for step, residuals in zip(range(start, stop), self._residuals(slot), strict=False):
            self.model.record(step, residuals)

    def pull_back(self, start: int, stop: int, slot: Slot) -> None:
        rows = self._residuals(slot)
        for step in range(stop - 1, start - 1, -1):
            if self._residual_hashes.pop(step, None) not in (None, hashes_of([rows[step - start]])):
                raise ReplayError(
                    f"the residuals of step {step} are not what record left: storage brought other bytes back, or a "
                    "step wrote to those of another one",
                    step=step,
                    leaf="residuals",
                )
            self.model.pull_back(step, rows[step - start])

    def _residuals(self, slot: Slot) -> list[Bytes]:
        """The part of each step in a block; made once a slot."""
        if slot.views is None:
            nbytes, stride = int(self.model.residual_nbytes), residual_stride(self.model)
            slot.views = [slot.data[k : k + nbytes] for k in range(0, slot.data.nbytes - nbytes + 1, stride)]
        return slot.views  # type: ignore[no-any-return]

    def turn(self) -> None:
        self.may_end = False
        self.replays.turn()

    # Snapshots -------------------------------------------------------------------------------

    def save(self, slot: Slot) -> Slot:
        self.replays.kept = self._step
        return self._copy_to(slot)

    def copied(self) -> Slot:
        """A copy of the working state, laid out as in a slot."""
        return self._copy_to(Slot(np.empty(self._fields.nbytes, np.uint8)))

    def _copy_to(self, slot: Slot) -> Slot:
        arrays = self.live()
        self._fields.check(arrays, self._step)
        for kept, array in zip(self._fields.views(slot), arrays, strict=True):
            np.copyto(kept, array, casting="no")
        return slot

    def load(self, slot: Slot) -> None:
        self.reset(self._fields.views(slot))
        self._loaded, self.replays.kept = True, None

    def run_again(self, start: int, stop: int) -> None:
        """Run steps that were run before; neither outputs nor checks see them."""
        while start < stop:
            end = start + 1 if self.by_steps else self.outputs.end(start, stop)
            with self.outputs.undone(start, end):
                start = self.run(start, end)

    def put_initial(self, slot: Slot) -> None:
        """State 0, of which the slot has a copy, is the working state as if nothing had been run."""
        self.reset(self._fields.views(slot))
        self._loaded, self._step, self.replays.kept = True, 0, 0

    def yield_slot(self, slot: Slot) -> Slot:
        return slot

    def adopt(self, slots: list[Slot]) -> None:
        raise NotImplementedError

    def load_initial(self) -> None:
        raise NotImplementedError

    # With verify=True ------------------------------------------------------------------------

    @property
    def states_verified(self) -> int | None:
        """States that came out the same when they were computed again or fetched."""
        return None if self.witness is None else self.witness.compared

    def see(self, state: int, *, kept: bool = False) -> None:
        assert self.witness is not None
        self.witness.see(state, [bytes_of(array) for array in self.live()], kept=kept)

    def _see_loaded(self, start: int) -> None:
        if self._loaded and self.witness is not None:
            self._loaded = False
            self.see(start, kept=True)

    def _check_asked(self, before: list[Array], start: int, stop: int) -> None:
        """Go back and run a range in one call, as without `verify`: it must end as its steps have, one by one."""
        singly = self.hashes()
        self.reset(before)
        with self.outputs.undone(start, stop):
            self.run(start, stop)
            differs = [f"state[{k}]" for k, (a, b) in enumerate(zip(singly, self.hashes(), strict=True)) if a != b]
            if differs:
                self.reset(before)
                for step in range(start, stop):
                    self.run(step, step + 1)
                    self.see(step + 1)  # raises if it is a step that does not repeat
                raise not_as_asked(start, stop, differs[0])

    def hashes(self) -> list[int]:
        """Of the arrays of the working state."""
        return hashes_of([bytes_of(array) for array in self.live()])


def not_as_asked(start: int, stop: int, leaf: str) -> StepError:
    """The error for a model whose ranges are not its steps."""
    return StepError(
        f"advance({start}, {stop}) does not give the state that the same steps give one at a time: {leaf} differs. "
        "advance(start, stop) must run exactly the steps from start to stop - 1, however many they are"
    )


class OutOfPlaceJob(InPlaceJob):
    """A model that runs from any buffer into any other: snapshots change hands, and are never copied.

    The job works in two slots beside those of the budget.  The working state is in one
    of them, or in a kept snapshot (borrowed) until the next step leaves it.
    """

    runs_ranges = False

    def __init__(self, model: Any, fields: StateFields, steps: int | None) -> None:
        super().__init__(model, fields, steps)
        self.by_steps = False
        self.adopt([])

    def live(self) -> Sequence[Array]:
        return self._fields.views(self._current)

    def adopt(self, slots: list[Slot]) -> None:
        self._own = slots
        self.reset([])

    def initial(self) -> list[Array]:
        return []  # steps leave the model's own arrays alone until the sweep turns

    def reset(self, kept: Sequence[Array]) -> None:
        # State 0 stays where it is: the first step reads it there.
        self._current = Slot(np.empty(0, np.uint8), views=list(self.model.state))

    def forget(self) -> None:
        self.adopt([])

    def run(self, start: int, stop: int) -> int:
        fields = self._fields
        if not self._own:  # before there is a pool to take slots from
            self._own = [Slot(np.empty(fields.nbytes, np.uint8)) for _ in range(2)]
        own = self._own
        for step in range(start, stop):
            target = own[1] if self._current is own[0] else own[0]
            if self.model.advance_into(step, fields.views(self._current), fields.views(target)) is False:
                if self.may_end:
                    stop = step
                    break
                raise StepError(
                    f"advance_into({step}, ...) returned False, which ends the sequence, but the sweep was told how "
                    "many steps there are; give steps=None if the model says where the sequence ends"
                )
            self._current = target
        self._step = stop
        return stop

    def reverse(self, start: int, stop: int) -> None:
        if stop != start + 1:
            raise UsageError("a model with reverse_from reverses one step at a time")
        self._see_loaded(start)
        self.model.reverse_from(start, self.live())

    def save(self, slot: Slot) -> Slot:
        self.replays.kept = self._step
        if self._current not in self._own:
            return self._copy_to(slot)
        kept = self._current
        self._own[self._own.index(kept)] = slot
        return kept

    def load(self, slot: Slot) -> None:
        self._current = slot
        self._loaded, self.replays.kept = True, None

    def yield_slot(self, slot: Slot) -> Slot:
        if self._current is not slot:
            return slot
        given = self._own[0]
        self._own[0] = slot
        return given

    def turn(self) -> None:
        super().turn()
        for array, kept in zip(self.model.state, self.live(), strict=True):
            if array is not kept:
                np.copyto(array, kept, casting="no")
