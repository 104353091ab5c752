"""Devito operators: a forward operator, a reverse operator, wavefields and a budget in, the gradient out.

Owns what has to be known of Devito: which time levels of a wavefield an operator reads
and writes, where a level lies in the cyclic time buffer (level t at ``t % n``), and how
an operator is run on other memory than its own.  Everything else is a run's.

With τ the time index of a Devito loop, let the forward operator write level τ+w of a
wavefield and read down to τ-r, and the reverse operator read levels τ+a … τ+b of it.

* The *state* before time τ is levels τ-r … τ+w-1 (τ+a … if that is lower), which for a
  wave equation of second order is two of the three levels of the buffer.
* A time buffer of n levels can be reversed through c = n - (b-a) times in one call of
  the reverse operator.  One step of the plan is c times, a *stride*.
* The *residuals* of a stride are the buffer when it holds levels τ+a … τ+c-1+b: all n of
  them, and for a reverse operator that reads one level (a = b) one a time step, each
  once.  The reverse operator is run on the memory they were kept in.

Operators are called through ctypes, which releases the GIL, so that storage works
meanwhile.
"""

from __future__ import annotations

import ctypes
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import numpy as np
import numpy.typing as npt
from devito import Buffer, Operator, TimeFunction
from devito.ir import Expression, FindNodes
from devito.symbolics import retrieve_indexed

from longtape.compose import Run, Settings, Traits
from longtape.engine.trace import Trace
from longtape.errors import UsageError
from longtape.layout import Fields
from longtape.measure import JobCosts
from longtape.plan.choose import Choice
from longtape.plan.costs import Costs
from longtape.protocols import Observer, Slot, Tier
from longtape.report import Report

__all__ = ["Sweep"]

Array = npt.NDArray[Any]

_ALIGNMENT = 64
"""Bytes; generated code takes its arrays to be so aligned."""


@dataclass(frozen=True, slots=True)
class _Access:
    """What an operator does to a function: time levels relative to the loop's time."""

    reads: frozenset[int]
    writes: frozenset[int]


class _Kernel:
    """A compiled operator with all its arguments, run over ranges of time.

    `values` are arguments in order; another list of them runs it on other memory.
    """

    def __init__(self, operator: Any, arguments: Mapping[str, Any]) -> None:
        self.operator, self._given = operator, dict(arguments)
        self.name: str = operator.name
        dimensions = list({d.root for d in operator.dimensions if d.is_Time})
        if len(dimensions) != 1:
            raise UsageError(f"operator {self.name} must loop over one time dimension; it has {len(dimensions)}")
        self.time = dimensions[0]
        prepared = operator.arguments(**self._given)
        names = [parameter.name for parameter in operator.parameters]
        self._from, self._to = names.index(self.time.min_name), names.index(self.time.max_name)
        self.first, self.last = int(prepared[self.time.min_name]), int(prepared[self.time.max_name])
        self.arrays = {
            name: np.asarray(value._obj.underlying_array)
            for name, value in prepared.items()
            if hasattr(getattr(value, "_obj", None), "underlying_array")
        }
        self.values = [prepared[name] for name in names]
        self._names = names
        self.expressions = _expressions(operator)
        self._ranges = _time_ranges(operator, self.time)
        self._function = operator.cfunction

    def with_arrays(self, arrays: Mapping[str, Array], values: list[Any] | None = None) -> list[Any]:
        """Arguments with some arrays replaced by others of the same shape and dtype, aligned to `_ALIGNMENT`."""
        values = list(self.values if values is None else values)
        for name, array in arrays.items():
            place = self._names.index(name)
            old = values[place]._obj
            new = type(old).from_buffer_copy(old)
            new.data = array.ctypes.data
            new.underlying_array, new.owner_of_sizes = array, old  # both must outlive the structure
            values[place] = ctypes.byref(new)
        return values

    def with_copies(self, besides: Iterable[str] = ()) -> list[Any]:
        """Arguments with copies of the arrays that the operator writes: what it does then is not seen."""
        written = {function.name for function in self.written()} - set(besides)
        return self.with_arrays({name: _aligned_copy(self.arrays[name]) for name in written if name in self.arrays})

    def run(self, first: int, last: int, values: list[Any]) -> None:
        """Run over times `first` … `last`; nothing where there are none."""
        if first > last:
            return
        values[self._from], values[self._to] = first, last
        code = self._function(*values)
        if code:
            raise RuntimeError(f"operator {self.name} returned {code} at times {first} to {last}")

    # What it accesses ------------------------------------------------------------------------

    def written(self) -> list[Any]:
        """The functions it writes, each once."""
        found = {e.write.name: e.write for e in self.expressions if e.write is not None and _has_data(e.write)}
        return list(found.values())

    def read(self) -> set[str]:
        """Names of the functions whose values it uses; adding to one is not using it."""
        return {i.function.name for e in self.expressions for i in retrieve_indexed(e.expr.rhs)}

    def added_to(self) -> set[str]:
        """Names of the functions it only ever adds to."""
        plain = {e.write.name for e in self.expressions if e.write is not None and not e.is_reduction}
        return {e.write.name for e in self.expressions if e.write is not None and e.is_reduction} - plain

    def access(self, name: str) -> _Access:
        """The time levels of a function that it reads and writes."""
        reads: set[int] = set()
        writes: set[int] = set()
        added: set[int] = set()
        for expression in self.expressions:
            left = expression.expr.lhs
            if getattr(left, "function", None) is not None and left.function.name == name and left.is_Indexed:
                (added if expression.is_reduction else writes).add(self._level(left))
            reads.update(self._level(i) for i in retrieve_indexed(expression.expr.rhs) if i.function.name == name)
        return _Access(frozenset(reads | (added - writes)), frozenset(writes | added))

    def _level(self, indexed: Any) -> int:
        """The level an access means.  Its index tells it modulo the buffer's length, the data space its range."""
        name, levels = indexed.function.name, len(self.arrays[indexed.function.name])
        lowest, highest = self._ranges[name]
        try:
            offset = int(indexed.indices[0].offset - self.time)
        except (AttributeError, TypeError):
            raise UsageError(
                f"operator {self.name} accesses {indexed}, whose time level cannot be told; "
                "wavefields must have a time buffer, and be indexed by time plus a whole number"
            ) from None
        level = lowest + (offset - lowest) % levels
        if highest - lowest >= levels or level > highest:
            raise UsageError(
                f"operator {self.name} accesses {name} at times {lowest:+d} to {highest:+d}, which a time buffer of "
                f"{levels} levels does not hold together; give {name} save=Buffer({highest - lowest + 2})"
            )
        return level


def _time_ranges(operator: Any, dimension: Any) -> dict[str, tuple[int, int]]:
    """For each function that varies in time, the lowest and highest time it is accessed at, relative to the loop's."""
    found = {}
    for function, intervals in operator._dspace.parts.items():
        for interval in intervals:
            if interval.dim.is_Time and interval.dim.root is dimension:
                found[function.name] = int(interval.lower), int(interval.upper)
    return found


def _aligned_copy(array: Array) -> Array:
    room = np.empty(array.nbytes + _ALIGNMENT, np.uint8)
    start = -room.ctypes.data % _ALIGNMENT
    copy = room[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
    np.copyto(copy, array)
    return copy


def _expressions(operator: Any) -> list[Any]:
    roots = [operator, *(entry.root for entry in operator._func_table.values() if entry.root is not None)]
    return [expression for root in roots for expression in FindNodes(Expression).visit(root)]


def _has_data(function: Any) -> bool:
    return bool(getattr(function, "is_DiscreteFunction", False)) and not getattr(function, "is_TempFunction", False)


class _Wavefield:
    """One wavefield: its time buffer, the levels that make up its state, and those the reverse operator reads."""

    def __init__(self, function: Any, forward: _Kernel, reverse: _Kernel) -> None:
        self.name: str = function.name
        name = self.name
        if not isinstance(function, TimeFunction):
            raise UsageError(f"wavefields must be TimeFunctions, not {type(function).__name__} ({name})")
        self.buffer = forward.arrays[name]
        self.levels = len(self.buffer)
        if _is_saved(function):
            raise UsageError(f"wavefield {name} saves every time step; it must have a time buffer: leave out save=")
        if name in reverse.arrays and not np.shares_memory(self.buffer, reverse.arrays[name]):
            raise UsageError(f"operators {forward.name} and {reverse.name} must be given the same {name}")
        ahead, behind = forward.access(name), reverse.access(name)
        if not ahead.writes:
            raise UsageError(f"operator {forward.name} does not update the wavefield {name}; leave it out")
        if behind.writes:
            raise UsageError(f"operator {reverse.name} writes the wavefield {name}, which it may only read")
        self.newest = max(ahead.writes)
        self.reads = behind.reads
        self.state = range(min([*ahead.reads, *behind.reads, self.newest - 1]), self.newest)

    def at(self, moment: int, buffer: Array | None = None) -> list[Array]:
        """The levels that are the state before a time, in the wavefield's own buffer or in another."""
        buffer = self.buffer if buffer is None else buffer
        return [buffer[(moment + level) % self.levels] for level in self.state]


class _Window:
    """The time levels that the reverse operator reads, of all wavefields alike, and how many times that bridges."""

    def __init__(self, fields: Sequence[_Wavefield], reverse: _Kernel) -> None:
        read = [field for field in fields if field.reads] or list(fields)
        levels = {level for field in read for level in field.reads} or {0}
        self.lowest, self.highest = min(levels), max(levels)
        newest = {field.newest for field in read}
        self.written = min(newest)
        self.is_even = len(newest) == 1
        """All wavefields hold just what is read at the same time, so that buffers can be kept whole."""
        buffer = min(field.levels for field in read)
        missing = max(field.newest for field in read) - self.lowest
        self.stride = buffer - (self.highest - self.lowest) - (max(newest) - min(newest))
        if self.highest > self.written or missing > buffer or self.stride < 1:
            raise UsageError(
                f"operator {reverse.name} reads {', '.join(field.name for field in read)} at times {self.lowest:+d} to "
                f"{self.highest:+d}, which a time buffer of {buffer} levels, written at {max(newest):+d}, does not "
                f"hold together; give the wavefields save=Buffer({1 + max(missing, self.highest - self.lowest + 1)})"
            )

    def ready(self, last: int) -> int:
        """The time after which the buffers hold what reversing up to time `last` reads."""
        return last + self.highest - self.written


@dataclass(slots=True)
class _Place:
    """Time buffers of the wavefields that are read in reverse, and the operators' arguments for running on them."""

    buffers: list[Array]
    ahead: list[Any]
    back: list[Any]


class _OperatorsJob:
    """Forward and reverse operator as a job; its steps are strides of the time buffer.

    A stride is recorded by running it in the buffers that are kept.  The next one is
    recorded into other buffers: only the state is copied there.  So after `record` the
    working state may be in kept buffers, and a few times short of the end of the stride;
    `_settle` brings it home when anything else is to be done with it.  What was recorded
    last is not overwritten before, for only `record` fills buffers in the forward sweep,
    and in the reverse sweep they are kept until their adjoint has been taken.
    """

    def __init__(
        self, forward: _Kernel, reverse: _Kernel, wavefields: Sequence[_Wavefield], window: _Window, stride: int
    ) -> None:
        self._forward, self._reverse = forward, reverse
        self._fields, self._window, self._stride = wavefields, window, stride
        self._read = [field for field in wavefields if field.reads]
        self._steps = -(-(forward.last - forward.first + 1) // stride)
        self._outputs = forward.values
        self._state = Fields([*(level.nbytes for f in wavefields for level in f.at(0)), 8])
        self._residuals = Fields([field.buffer.nbytes for field in self._read])
        self._home = _Place([field.buffer for field in self._read], forward.values, reverse.values)
        self._turned = False
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
        return -(-self._residuals.nbytes // _ALIGNMENT) * _ALIGNMENT

    def _first(self, step: int) -> int:
        """Time at which a stride begins; N strides end where the next would begin."""
        return min(self._forward.first + step * self._stride, self._forward.last + 1)

    def _last(self, step: int) -> int:
        return self._first(step + 1) - 1

    # Steps -----------------------------------------------------------------------------------

    def advance(self, start: int, stop: int) -> int:
        self._settle()
        self._forward.run(self._moment, self._last(stop - 1), self._home.ahead)
        self._at, self._moment = stop, self._first(stop)
        return stop

    def _settle(self) -> None:
        """Bring the working state to the wavefields' own buffers, and to the end of its stride."""
        self._move(self._home)
        self._forward.run(self._moment, self._first(self._at) - 1, self._home.ahead)
        self._moment = self._first(self._at)

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
        self._settle()
        # Steps that are run again must not add to, nor overwrite, what the forward sweep left in other functions.
        self._outputs = self._forward.with_copies(besides=[field.name for field in self._fields])
        self._home.ahead = self._outputs
        self._turned = True

    def reverse(self, start: int, stop: int) -> None:
        if stop != start + 1:
            raise UsageError("without residuals, one stride is reversed at a time")
        first, last = self._first(start), self._last(start)
        self._settle()
        self._forward.run(first, self._window.ready(last), self._home.ahead)
        self._reverse.run(first, last, self._home.back)

    def record(self, start: int, stop: int, slot: Slot) -> int:
        for step in range(start, stop):
            place = self._block(slot, step - start)
            self._move(place)
            ready = self._window.ready(self._last(step))
            if ready >= self._moment:
                self._forward.run(self._moment, ready, place.ahead)
                self._moment = ready + 1
            self._at = step + 1
        return stop

    def pull_back(self, start: int, stop: int, slot: Slot) -> None:
        for step in range(stop - 1, start - 1, -1):
            self._reverse.run(self._first(step), self._last(step), self._block(slot, step - start).back)

    def _block(self, slot: Slot, index: int) -> _Place:
        """The buffers of one stride in a slot."""
        if slot.views is None:
            slot.views = {}
        found = slot.views.get((index, self._turned))
        if found is None:
            data = slot.data[index * self.residual_nbytes : (index + 1) * self.residual_nbytes]
            parts = [
                part.view(field.buffer.dtype).reshape(field.buffer.shape)
                for field, part in zip(self._read, self._residuals.split(data), strict=True)
            ]
            arrays = {field.name: part for field, part in zip(self._read, parts, strict=True)}
            ahead = self._forward.with_arrays(arrays, self._outputs)
            found = slot.views[index, self._turned] = _Place(parts, ahead, self._reverse.with_arrays(arrays))
        return found  # type: ignore[no-any-return]

    def leave(self) -> None:
        """The sweeps are over: be in no slot."""
        self._place, self._loaded = self._home, None

    # State -----------------------------------------------------------------------------------

    def _live(self, step: int) -> list[Array]:
        moment = self._first(step)
        return [level for field in self._fields for level in field.at(moment)]

    def _views(self, slot: Slot) -> tuple[list[Array], Array]:
        if slot.views is None:
            *parts, step = self._state.split(slot.data)
            levels = [part.view(a.dtype).reshape(a.shape) for part, a in zip(parts, self._live(0), strict=True)]
            slot.views = levels, step.view(np.int64)
        return slot.views  # type: ignore[no-any-return]

    def save(self, slot: Slot) -> Slot:
        self._settle()
        levels, step = self._views(slot)
        for kept, live in zip(levels, self._live(self._at), strict=True):
            np.copyto(kept, live)
        step[0] = self._at
        return slot

    def load(self, slot: Slot) -> None:
        self._at = int(self._views(slot)[1][0])
        self._loaded, self._moment = slot, self._first(self._at)

    def yield_slot(self, slot: Slot) -> Slot:
        if slot is self._loaded:
            self._settle()
        return slot

    def adopt(self, slots: list[Slot]) -> None:
        raise NotImplementedError

    def load_initial(self) -> None:
        raise NotImplementedError

    # Measuring -------------------------------------------------------------------------------

    def measure(self) -> JobCosts:
        """Time a stride forward and in reverse, on copies: nothing is seen of it."""
        first, last, clock = self._first(0), self._last(0), time.perf_counter
        forward, reverse = self._forward.with_copies(), self._reverse.with_copies()
        levels = [level for field in self._read for level in field.at(first)]
        spare = [np.empty_like(level) for level in levels]

        def copy() -> None:
            for target, level in zip(spare, levels, strict=True):
                np.copyto(target, level)

        def seconds(kernel: _Kernel, values: list[Any]) -> float:
            kernel.run(first, last, values)  # what is used for the first time is slow
            times = []
            for _ in range(3):
                began = clock()
                kernel.run(first, last, values)
                times.append(clock() - began)
            return min(times)

        ahead, back = seconds(self._forward, forward), seconds(self._reverse, reverse)
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
            busy=lambda: self._forward.run(first, last, forward),
        )


class Sweep:
    """A forward operator run over all times, and a reverse operator back, within a memory budget.

    The operators are Devito's own, written with time buffers (no ``save=``) as if the
    whole of each wavefield were there in reverse.  Both run over the same times.

    Args:
        forward: Updates the wavefields from one time to the next.
        reverse: Goes back in time; reads the wavefields and writes what the caller wants
            of it, such as an adjoint wavefield and a gradient.
        wavefields: Every TimeFunction that `forward` updates.
        memory: Most bytes held at any moment beside the operators' own arrays, such as ``"4GiB"``.
        disk: Directory for a private scratch file, or None to recompute in memory only.
        disk_limit: Most bytes of it.
        forward_args: What ``forward.apply`` would be given, such as ``{"dt": dt, "src": src}``.
        reverse_args: What ``reverse.apply`` would be given.  Values of their arrays may
            change until `reverse` is called, the arrays may not.
        observers: Objects with `on_action` and `on_transfer`, called as things happen.
        tier: Storage to use in place of a scratch file; left empty and open, for its owner to close.
        stuck_seconds: Wait no longer for storage than this; what it does not deliver is recomputed.
        costs: Times to plan with, such as `costs` of an earlier sweep through the same
            operators; measured when None, without touching the operators' arrays.

    Raises:
        BudgetError: `memory` cannot hold one state.
        UsageError: Operators or wavefields that do not fit together, and any other
            argument that cannot be honoured.

    Example::

        sweep = longtape.devito.Sweep(forward, gradient, [u], memory="1GiB", disk="/scratch",
                                      forward_args={"dt": dt}, reverse_args={"dt": dt, "rec": residual})
        sweep.forward()
        residual.data[:] = rec.data - observed
        sweep.reverse()
    """

    def __init__(
        self,
        forward: Operator,
        reverse: Operator,
        wavefields: Sequence[TimeFunction],
        *,
        memory: int | str,
        disk: str | os.PathLike[str] | None = None,
        disk_limit: int | str | None = None,
        forward_args: Mapping[str, Any] | None = None,
        reverse_args: Mapping[str, Any] | None = None,
        observers: Iterable[Observer] = (),
        tier: Tier | None = None,
        costs: Costs | None = None,
        stuck_seconds: float = 30.0,
    ) -> None:
        if not wavefields:
            raise UsageError("give the TimeFunctions that the forward operator updates as wavefields")
        own = {function.name: function for function in wavefields}
        _check_names(forward, own)
        ahead = _Kernel(forward, {**own, **(forward_args or {})})
        back = _Kernel(reverse, _known(reverse, own) | dict(reverse_args or {}))
        if (ahead.first, ahead.last) != (back.first, back.last):
            raise UsageError(
                f"{ahead.name} runs over times {ahead.first} to {ahead.last}, {back.name} over {back.first} to "
                f"{back.last}; they must be the same: give {ahead.time.min_name} and {ahead.time.max_name} to both"
            )
        if ahead.last < ahead.first:
            raise UsageError(f"{ahead.name} would run over no time at all: {ahead.first} to {ahead.last}")
        fields = [_Wavefield(function, ahead, back) for function in wavefields]
        _check_complete(ahead, back, own)
        window = _Window(fields, back)
        stride = min(window.stride, ahead.last - ahead.first + 1)
        self._job = _OperatorsJob(ahead, back, fields, window, stride)
        can_record = window.is_even and self._job.residual_nbytes > 0
        traits = Traits(
            title=f"{ahead.name} and {back.name}",
            steps=self._job.steps,
            state_nbytes=self._job.state_nbytes,
            residual_nbytes=self._job.residual_nbytes if can_record else None,
            notes=(f"a step is {stride} time steps, which the time buffer holds at once",) if stride > 1 else (),
        )
        settings = Settings(
            memory,
            disk=disk,
            disk_limit=disk_limit,
            observers=tuple(observers),
            tier=tier,
            costs=costs,
            stuck_seconds=stuck_seconds,
        )
        self._run = Run(self._job, traits, settings, measure=None if costs is not None else self._job.measure)

    @property
    def plan(self) -> Choice:
        """The chosen plan, with predicted time and bytes.  Its steps are strides of the time buffer."""
        return self._run.choice

    @property
    def costs(self) -> Costs:
        """The times that it was chosen with, for further sweeps through operators as costly."""
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
        """Run the forward operator over all times; the wavefields and all it writes are then as after `apply`."""
        self._run.forward()

    def reverse(self) -> None:
        """Run the reverse operator over all times; the wavefields then hold no particular state.

        What else the forward operator writes, such as receivers, is left as `forward` left it.
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


def _check_names(forward: Any, wavefields: Mapping[str, Any]) -> None:
    known = {parameter.name for parameter in forward.parameters}
    if strays := [name for name in wavefields if name not in known]:
        raise UsageError(f"operator {forward.name} does not have the wavefield {', '.join(strays)}; leave it out")


def _known(operator: Any, functions: Mapping[str, Any]) -> dict[str, Any]:
    """Those functions that the operator has."""
    names = {parameter.name for parameter in operator.parameters}
    return {name: function for name, function in functions.items() if name in names}


def _check_complete(forward: _Kernel, reverse: _Kernel, wavefields: Mapping[str, Any]) -> None:
    """What a step takes over from the step before, and what the reverse operator looks up, must be wavefields."""
    read, added, looked_up = forward.read(), forward.added_to(), reverse.read()
    for function in forward.written():
        name = function.name
        varies = isinstance(function, TimeFunction)
        if name in wavefields or getattr(function, "is_SparseFunction", False) or (varies and _is_saved(function)):
            continue
        if varies and name in looked_up:
            raise UsageError(
                f"operator {forward.name} updates {name} and operator {reverse.name} reads it; give {name} as one of "
                "the wavefields"
            )
        if name in read and name not in added:
            access = forward.access(name) if varies else None
            if access is None or access.reads - access.writes:
                raise UsageError(
                    f"operator {forward.name} updates {name} and reads what the time before left in it, so it is part "
                    "of the state; give it as one of the wavefields (a TimeFunction)"
                )


def _is_saved(function: Any) -> bool:
    """Whether every time has memory of its own."""
    return isinstance(function.save, (int, np.integer)) and not isinstance(function.save, Buffer)
