"""Forward and reverse operator as a job; its steps are strides of the time buffer.

A stride is recorded by running it in the buffers that are kept.  The next one is
recorded into other buffers: only the state is copied there.  So after `record` the
working state may be in kept buffers, and a few times short of the end of the stride;
`settle` brings it home when anything else is to be done with it.  What was recorded
last is not overwritten before, for only `record` fills buffers in the forward sweep,
and in the reverse sweep they are kept until their adjoint has been taken.

Invariant: what the forward operator writes beside the wavefields is written once for each
time, in order.  Times before `written_before` write it to copies, whoever runs them again.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from longtape.actions import Kind
from longtape.devito.fields import Wavefield, Window
from longtape.devito.kernels import ALIGNMENT, Array, Kernel, bytes_of
from longtape.errors import ReplayError, UsageError
from longtape.known import KnownState
from longtape.layout import Fields
from longtape.measure import JobCosts
from longtape.protocols import Bytes, Floats, Slot
from longtape.timing import MOST_BUSY_SECONDS, ONCE_SECONDS, TIMES
from longtape.witness import Witness

SAMPLED = 16
"""Strides run to see how small a state becomes."""


@dataclass(slots=True, eq=False)
class _Place:
    """Time buffers of the wavefields that are read in reverse, and the operators' arguments for running on them."""

    buffers: list[Array]
    arrays: Mapping[str, Array] = field(default_factory=dict)
    """By name; empty for the wavefields' own buffers."""
    arguments: dict[str, tuple[list[Any], list[Any]]] = field(default_factory=dict)
    """By what is run: arguments, and those for this place that were made from them."""

    def values(self, what: str, kernel: Kernel, base: list[Any]) -> list[Any]:
        """Arguments for running on this place, made anew only for another `base`."""
        if what not in self.arguments or self.arguments[what][0] is not base:
            self.arguments[what] = base, kernel.with_arrays(self.arrays, base)
        return self.arguments[what][1]


class OperatorsJob:
    """Implements `longtape.protocols.Job`; see above."""

    def __init__(
        self,
        forward: Kernel,
        reverse: Kernel,
        wavefields: Sequence[Wavefield],
        window: Window,
        stride: int,
        *,
        verify: bool = False,
        lossy: bool = False,
    ) -> None:
        self._forward, self._reverse = forward, reverse
        self._fields, self._window, self._stride = wavefields, window, stride
        self._read = [field for field in wavefields if field.reads]
        self._steps = -(-(forward.last - forward.first + 1) // stride)
        self._state = Fields([*(level.nbytes for f in wavefields for level in f.at(0)), 8])
        self._residuals = Fields([field.buffer.nbytes for field in self._read])
        self._home = _Place([field.buffer for field in self._read])
        self._leaves = [f"{f.name}[t{level:+d}]" if level else f"{f.name}[t]" for f in wavefields for level in f.state]
        self._witness = Witness(self._leaves.__getitem__) if verify else None
        self._turned, self._lossy = False, lossy
        self._final: KnownState | None = None
        """The final state, until it has been computed again."""
        self.written_before = forward.first
        """Times before this one have written what they write beside the wavefields."""
        self._copied: list[Any] | None = None
        # The working state is in the buffers `_place`, just before time `_moment`; `_at` is the step it stands for.
        self._place, self._moment, self._at = self._home, forward.first, 0
        self._loaded: Slot | None = None
        """The working state is this snapshot, and not copied from there yet."""

    @property
    def steps(self) -> int:
        """Strides."""
        return self._steps

    @property
    def state_nbytes(self) -> int:
        return self._state.nbytes

    @property
    def residual_nbytes(self) -> int:
        """Of a stride; every one starts aligned."""
        return -(-self._residuals.nbytes // ALIGNMENT) * ALIGNMENT

    @property
    def states_verified(self) -> int | None:
        """States that came out the same when they were computed again or fetched; None: not looked at."""
        return None if self._witness is None else self._witness.compared

    def first(self, step: int) -> int:
        """Time at which a stride begins; N strides end where the next would begin."""
        return min(self._forward.first + step * self._stride, self._forward.last + 1)

    def _last(self, step: int) -> int:
        return self.first(step + 1) - 1

    # Steps -----------------------------------------------------------------------------------

    def advance(self, start: int, stop: int) -> int:
        self.settle()
        self._go(self._last(stop - 1))
        self._at = stop
        if stop == self._steps and self._turned:
            self._check_final()
        return stop

    def settle(self) -> None:
        """Bring the working state to the wavefields' own buffers, and to the end of its stride."""
        self._move(self._home)
        self._go(self.first(self._at) - 1)

    def _go(self, last: int) -> None:
        """Run the forward operator from the working state up to time `last`; not at all if it is there."""
        if self._witness is None:
            self._run(self._moment, last)
            self._moment = max(self._moment, last + 1)
            return
        if self._moment == self._forward.first:
            self._see()
        while self._moment <= last:
            self._run(self._moment, self._moment)
            self._moment += 1
            self._see()

    def _run(self, first: int, last: int) -> None:
        again = min(last, self.written_before - 1)
        if first <= again:
            self._forward.run(first, again, self._ahead(again=True))
        if last > again:
            self._forward.run(max(first, again + 1), last, self._ahead(again=False))
            self.written_before = last + 1

    def _ahead(self, *, again: bool) -> list[Any]:
        kernel = self._forward
        if not again:
            return self._place.values("ahead", kernel, kernel.values)
        if self._copied is None:
            self._copied = kernel.with_arrays(kernel.copies(besides=[field.name for field in self._fields]))
        return self._place.values("again", kernel, self._copied)

    def _back(self, place: _Place) -> list[Any]:
        return place.values("back", self._reverse, self._reverse.values)

    def _move(self, place: _Place) -> None:
        """Go on in other buffers."""
        if self._loaded is not None:
            buffers = {field.name: buffer for field, buffer in zip(self._read, place.buffers, strict=True)}
            targets = [level for f in self._fields for level in f.at(self._moment, buffers.get(f.name))]
            for target, kept in zip(targets, self._views(self._loaded)[0], strict=True):
                np.copyto(target, kept)
            self._loaded = None
        elif place is not self._place:
            for field, target, source in zip(self._read, place.buffers, self._place.buffers, strict=True):
                for new, old in zip(field.at(self._moment, target), field.at(self._moment, source), strict=True):
                    np.copyto(new, old)
        self._place = place

    def turn(self) -> None:
        self.settle()
        self._turned, self._copied = True, None
        self._final = None if self._lossy else KnownState(self._live(self._moment))

    def reverse(self, start: int, stop: int) -> None:
        if stop != start + 1:
            raise UsageError("without residuals, one stride is reversed at a time")
        first, last = self.first(start), self._last(start)
        self.settle()
        self._go(self._window.ready(last))
        self._reverse.run(first, last, self._back(self._home))
        if stop == self._steps and self._final is not None:
            self._go(last)
            self._check_final()
        self._at = start

    def record(self, start: int, stop: int, slot: Slot) -> int:
        for step in range(start, stop):
            self._move(self._block(slot, step - start))
            self._go(self._window.ready(self._last(step)))
            self._at = step + 1
        if stop == self._steps and self._turned and self._final is not None:
            self.settle()
            self._check_final()
        return stop

    def pull_back(self, start: int, stop: int, slot: Slot) -> None:
        for step in range(stop - 1, start - 1, -1):
            self._reverse.run(self.first(step), self._last(step), self._back(self._block(slot, step - start)))

    def _block(self, slot: Slot, index: int) -> _Place:
        """The buffers of one stride in a slot."""
        if slot.views is None:
            slot.views = {}
        found = slot.views.get(index)
        if found is None:
            data = slot.data[index * self.residual_nbytes : (index + 1) * self.residual_nbytes]
            parts = [
                part.view(field.buffer.dtype).reshape(field.buffer.shape)
                for field, part in zip(self._read, self._residuals.split(data), strict=True)
            ]
            arrays = {field.name: part for field, part in zip(self._read, parts, strict=True)}
            found = slot.views[index] = _Place(parts, arrays)
        return found  # type: ignore[no-any-return]

    # State -----------------------------------------------------------------------------------

    def _live(self, moment: int) -> list[Array]:
        """The levels of the state before a time, where the working state is."""
        buffers = {field.name: buffer for field, buffer in zip(self._read, self._place.buffers, strict=True)}
        return [level for field in self._fields for level in field.at(moment, buffers.get(field.name))]

    def _views(self, slot: Slot) -> tuple[list[Array], Array]:
        if slot.views is None:
            *parts, step = self._state.split(slot.data)
            levels = [part.view(a.dtype).reshape(a.shape) for part, a in zip(parts, self._live(0), strict=True)]
            slot.views = levels, step.view(np.int64)
        return slot.views  # type: ignore[no-any-return]

    def save(self, slot: Slot) -> Slot:
        self.settle()
        levels, step = self._views(slot)
        for kept, live in zip(levels, self._live(self._moment), strict=True):
            np.copyto(kept, live)
        step[0] = self._at
        return slot

    def load(self, slot: Slot) -> None:
        self._at = int(self._views(slot)[1][0])
        self._loaded, self._moment = slot, self.first(self._at)
        if self._witness is not None:
            self._witness.see(self._moment, [bytes_of(level) for level in self._views(slot)[0]], kept=True)

    def yield_slot(self, slot: Slot) -> Slot:
        if slot is self._loaded:
            self.settle()
        return slot

    def adopt(self, slots: list[Slot]) -> None:
        raise NotImplementedError

    def load_initial(self) -> None:
        raise NotImplementedError

    # For a run that can be resumed -------------------------------------------------------------

    def state(self) -> list[tuple[str, Bytes]]:
        """The levels of the working state by name."""
        self.settle()
        return list(zip(self._leaves, self._leaf_bytes(), strict=True))

    def buffers(self) -> list[Array]:
        """The wavefields' own."""
        return [field.buffer for field in self._fields]

    def begin_again(self) -> None:
        """They hold state 0."""
        self._place, self._moment, self._at, self._loaded = self._home, self._forward.first, 0, None

    # Whether it does the same again ------------------------------------------------------------

    def _leaf_bytes(self) -> list[Bytes]:
        return [bytes_of(level) for level in self._live(self._moment)]

    def _see(self) -> None:
        assert self._witness is not None
        self._witness.see(self._moment, self._leaf_bytes())

    def _check_final(self) -> None:
        """Hold the final state, computed again in the reverse sweep, against what it was; once."""
        known, self._final = self._final, None
        if known is None:
            return
        if differs := [self._leaves[k] for k in known.differing(self._live(self._moment))]:
            name, last = self._forward.name, self._forward.last
            raise ReplayError(
                f"operator {name}, run again from a stored state to the last time {last}, ended in another "
                f"{', '.join(differs)} than in the forward sweep. The gradient would be that of steps that were never "
                f"run; {name} must do the same each time, and nothing that it reads may change before reverse() ends",
                step=last,
                leaf=differs[0],
            )

    # Measuring -------------------------------------------------------------------------------

    def measure(self) -> JobCosts:
        """Time a stride forward and in reverse, on copies: nothing is seen of it."""
        first, last, clock = self.first(0), self._last(0), time.perf_counter
        levels = [level for field in self._read for level in field.at(first)]
        spare = [np.empty_like(level) for level in levels]

        def copy() -> None:
            for target, level in zip(spare, levels, strict=True):
                np.copyto(target, level)

        back = _seconds(self._reverse, self._reverse.with_arrays(self._reverse.copies()), first, last)
        copies = self._forward.copies()
        forward = self._forward.with_arrays(copies)
        ahead = _seconds(self._forward, forward, first, last)
        copy()
        began = clock()
        copy()
        copied = clock() - began
        again = max(0, self._window.ready(last) - first + 1) / (last - first + 1)
        return JobCosts(
            forward=ahead,
            reverse=back + again * ahead,
            record=ahead + copied,
            pull_back=back,
            busy=None if ahead > MOST_BUSY_SECONDS else lambda: self._forward.run(first, last, forward),
            sample=lambda: self._sample(copies, forward, 1 if ahead * SAMPLED > ONCE_SECONDS else SAMPLED),
        )

    def _sample(self, copies: Mapping[str, Array], values: list[Any], strides: int) -> tuple[Kind, Bytes]:
        """A state some strides on, computed in copies."""
        for wavefield in self._fields:
            np.copyto(copies[wavefield.name], wavefield.buffer)
        stop, slot = min(strides, self._steps), Slot(np.zeros(self._state.nbytes, np.uint8))
        self._forward.run(self.first(0), self._last(stop - 1), values)
        levels = [level for f in self._fields for level in f.at(self.first(stop), copies[f.name])]
        for kept, level in zip(self._views(slot)[0], levels, strict=True):
            np.copyto(kept, level)
        return Kind.SNAPSHOT, slot.data

    def floats(self, kind: Kind, nbytes: int) -> list[Floats]:
        """Where an item holds numbers that a lossy codec may round."""
        if kind is Kind.SNAPSHOT:
            arrays, layout, starts = self._live(0), self._state, [0]
        else:
            arrays, layout = [f.buffer for f in self._read], self._residuals
            starts = list(range(0, nbytes, self.residual_nbytes))
        return [
            Floats(start + offset, start + offset + array.nbytes, array.dtype.itemsize)
            for start in starts
            for offset, array in zip(layout.offsets, arrays, strict=False)  # the number of the step is none
            if array.dtype.char in "fd"
        ]


def _seconds(kernel: Kernel, values: list[Any], first: int, last: int) -> float:
    """That a stride takes; three are run if they are quick, else only two of its times."""

    def run(to: int) -> float:
        began = time.perf_counter()
        kernel.run(first, to, values)
        return time.perf_counter() - began

    run(first)  # what is used for the first time is slow
    expected = (last - first + 1) * run(first)
    return expected if expected > ONCE_SECONDS else min(run(last) for _ in range(TIMES))
