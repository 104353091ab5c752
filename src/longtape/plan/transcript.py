"""Reads a schedule in the vocabulary of the package checkpoint_schedules, checks it, and notes it down compactly.

Owns the rules of that vocabulary (Forward, Reverse, Copy, Move, EndForward, EndReverse)
and what follows from knowing all actions in advance: how long each copy is needed, and
how many there are at once.  Knows actions by the names of their classes, so that the
package itself is not needed here.

What the vocabulary calls *adjoint dependencies* of a step is here the state before it:
the adjoint of a step runs the step again from there.  So restart data and adjoint
dependencies of step n are the same item, a snapshot of state n, and a unit of storage is
one snapshot.

Invariants of a transcript: steps are run from the working state they need; an item is
kept from the action that stores it to the last one that uses it, and not at all if none
does; the adjoint comes down one step at a time.

Source of the rules: Dolci, Maddison, Ham, Pallez and Herrmann, *checkpoint_schedules*,
JOSS 9 (2024).
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import IntEnum, IntFlag
from typing import Any, NamedTuple

from longtape.errors import ScheduleError, UsageError


class Op(IntEnum):
    """What one entry of a transcript says."""

    ADVANCE = 0
    """Run steps [first, second)."""
    KEEP = 1
    """Keep the working state, which is state `first`, in `place`."""
    COPY = 2
    """Keep state `first` in `place` too; it is in `second`."""
    LOAD = 3
    """Make state `first`, which is kept in `place`, the working state."""
    REVERSE = 4
    """Take the adjoint of step `first`; the working state is state `first`."""
    TURN = 5
    """The forward sweep is over."""


class Place(IntFlag):
    """Where a schedule keeps data; an item may be in several places."""

    NOWHERE = 0
    RAM = 1
    DISK = 2
    WORK = 4
    """Working storage: the adjoint dependencies of steps about to be reversed."""

    MEMORY = 5
    """RAM or working storage: both are slots here."""


class Entry(NamedTuple):
    """One entry of a transcript; see `Op`."""

    op: Op
    first: int
    second: int
    place: Place
    last: bool
    """For LOAD and COPY: the source is not used again."""
    needed: bool
    """False for KEEP and COPY whose copy is never used."""

    @property
    def source(self) -> Place:
        """Where LOAD and COPY take the state from."""
        return _PLACES[self.second] if self.op is Op.COPY else self.place


_LAST, _UNUSED = 8, 16
_OPS = tuple(Op)
_PLACES = tuple(Place(bits) for bits in range(8))
"""Looked up, for calling an enumeration takes longer than all the rest of an entry."""


@dataclass(slots=True)
class Transcript:
    """A checked schedule: what to do, and what it takes."""

    name: str
    steps: int
    reverses: bool = True
    """False for a schedule that only runs forward."""
    advances: int = 0
    """Plain steps, the first sweep included."""
    writes: int = 0
    """Copies on disk, as far as they are used."""
    reads: int = 0
    memory_items: int = 0
    """Most snapshots in RAM and working storage at once."""
    disk_items: int = 0
    """Most snapshots on disk at once."""
    disk_loads: array[int] = field(default_factory=lambda: array("q"))
    """Positions of the entries that use an item on disk, ascending."""
    _ops: bytearray = field(default_factory=bytearray)
    _marks: bytearray = field(default_factory=bytearray)
    _first: array[int] = field(default_factory=lambda: array("q"))
    _second: array[int] = field(default_factory=lambda: array("q"))

    def __len__(self) -> int:
        return len(self._ops)

    def __getitem__(self, index: int) -> Entry:
        marks = self._marks[index]
        return Entry(
            _OPS[self._ops[index]],
            self._first[index],
            self._second[index],
            _PLACES[marks & 7],
            bool(marks & _LAST),
            not marks & _UNUSED,
        )

    def __iter__(self) -> Iterator[Entry]:
        return (self[index] for index in range(len(self)))

    @property
    def uses_disk(self) -> bool:
        """Whether anything is kept on disk."""
        return self.disk_items > 0

    def step_of(self, index: int) -> int:
        """The step that entry `index` is about."""
        return self._first[index]

    # Written by the reader below -------------------------------------------------------------

    def add(self, op: Op, first: int, second: int = 0, place: Place = Place.NOWHERE) -> None:
        """Append an entry."""
        self._ops.append(op)
        self._marks.append(place)
        self._first.append(first)
        self._second.append(second)

    def take_back_taping(self, step: int) -> bool:
        """Whether the last entries only kept state `step` for its own adjoint, which comes next; they are removed."""
        if len(self) < 2 or self._ops[-2] != Op.KEEP or self._ops[-1] != Op.ADVANCE:
            return False
        if self._marks[-2] != Place.WORK or self._first[-2] != step or self._first[-1] != step:
            return False
        for column in (self._ops, self._marks, self._first, self._second):
            del column[-2:]
        return True

    def settle(self) -> None:
        """Mark the last use of every copy and those that have none, then count."""
        self._mark_uses()
        on_disk, in_memory = int(Place.DISK), int(Place.MEMORY)
        kept: dict[int, int] = {}
        memory = disk = 0
        for index, (op, step, second, marks) in enumerate(
            zip(self._ops, self._first, self._second, self._marks, strict=True)
        ):
            if op == Op.ADVANCE:
                self.advances += second - step
            if marks & _UNUSED or op not in (Op.KEEP, Op.COPY, Op.LOAD):
                continue
            place, before = marks & 7, kept.get(step, 0)
            source = 0 if op == Op.KEEP else second if op == Op.COPY else place
            if source & on_disk:
                self.reads += 1
                self.disk_loads.append(index)
            after = before if op == Op.LOAD else before | place
            if after != before:
                self.writes += bool(after & ~before & on_disk)
                memory += bool(after & in_memory) - bool(before & in_memory)
                disk += bool(after & on_disk) - bool(before & on_disk)
                self.memory_items, self.disk_items = max(self.memory_items, memory), max(self.disk_items, disk)
            left = after & ~source if marks & _LAST else after
            memory -= bool(after & in_memory) - bool(left & in_memory)
            disk -= bool(after & on_disk) - bool(left & on_disk)
            if left:
                kept[step] = left
            else:
                kept.pop(step, None)

    def _mark_uses(self) -> None:
        wanted: set[tuple[int, int]] = set()

        def use(index: int, item: tuple[int, int]) -> None:
            if item not in wanted:
                self._marks[index] |= _LAST
                wanted.add(item)

        for index in range(len(self) - 1, -1, -1):
            op, step, place = self._ops[index], self._first[index], self._marks[index]
            if op == Op.LOAD:
                use(index, (step, place))
            elif op in (Op.KEEP, Op.COPY):
                if (step, place) not in wanted:
                    self._marks[index] |= _UNUSED
                    continue
                wanted.discard((step, place))
                if op == Op.COPY:
                    use(index, (step, self._second[index]))


def transcribe(schedule: Any, steps: int) -> Transcript:
    """Read one forward and one adjoint calculation out of a schedule.

    Args:
        schedule: A `checkpoint_schedules.CheckpointSchedule`, fresh; it is used up.
        steps: N.  An online schedule is told it when the forward calculation gets there.

    Returns:
        Its transcript: about 18 bytes an entry, and two to four entries an adjoint step.

    Raises:
        ScheduleError: The schedule broke its rules; says at which action, and which step.
        UsageError: This is no schedule, it was used before, or it is for another number of steps.
    """
    for name in ("max_n", "n", "r"):
        if not hasattr(schedule, name):
            raise UsageError(f"schedule must be a checkpoint_schedules.CheckpointSchedule, not {schedule!r}")
    title = type(schedule).__name__
    if schedule.n != 0 or schedule.r != 0:
        raise UsageError(f"this {title} has been used already: it stands at step {schedule.n}; make a new one")
    if schedule.max_n is not None and schedule.max_n != steps:
        raise UsageError(f"this {title} is for {schedule.max_n} steps, but the sweep has {steps}")
    return _Reader(schedule, Transcript(title, steps)).read()


class _Reader:
    """Follows the schedule with the marks of that vocabulary, and refuses what its rules forbid."""

    def __init__(self, schedule: Any, transcript: Transcript) -> None:
        self._schedule, self._transcript = schedule, transcript
        self._steps = self._adjoint = transcript.steps
        self._forward: int | None = 0
        self._ended_forward = False
        self._restart: dict[int, Place] = {}
        """Steps whose restart data is kept, and where."""
        self._taped: dict[int, Place] = {}
        """Steps whose adjoint dependencies are kept, and where."""
        self._count = 0
        self._action: Any = None

    def read(self) -> Transcript:
        performers = {
            "Forward": self._on_forward,
            "Reverse": self._on_reverse,
            "Copy": self._on_copy,
            "Move": self._on_copy,
            "EndForward": self._on_end_forward,
        }
        for action in self._schedule:
            self._action, name = action, type(action).__name__
            if name == "EndReverse":
                self._need(self._adjoint == 0, f"ends with the adjoint at step {self._adjoint}")
                break
            if name not in performers:
                raise self._wrong("which is no action of that vocabulary")
            performers[name](action)
            self._count += 1
        else:
            self._action = None
            self._need(self._ended_forward, "it ended before the forward calculation did")
            self._need(self._adjoint == self._steps, f"it ended with the adjoint at step {self._adjoint}")
            self._transcript.reverses = False
        self._transcript.settle()
        return self._transcript

    def _wrong(self, why: str) -> ScheduleError:
        what = "at its end" if self._action is None else f"action {self._count}, {self._action!r}"
        return ScheduleError(
            f"{self._transcript.name} over {self._steps} steps: {what}: {why} "
            f"(forward at {self._forward}, adjoint at {self._adjoint}). The schedule breaks its own rules; "
            "use another, or report it to its authors"
        )

    def _need(self, condition: bool, why: str) -> None:
        if not condition:
            raise self._wrong(why)

    def _place(self, storage: Any) -> Place:
        name = getattr(storage, "name", None)
        if name == "NONE":
            return Place.NOWHERE
        if name not in ("RAM", "DISK", "WORK"):
            raise self._wrong(f"{storage!r} is no storage type")
        return Place[name]

    def _on_forward(self, action: Any) -> None:
        start, stop, note = action.n0, action.n1, self._transcript
        place = self._place(action.storage)
        self._need(self._forward == start, f"the forward is not at step {start}")
        if not self._ended_forward and stop >= self._steps:
            stop = self._steps
            if self._schedule.max_n is None:
                self._schedule.finalize(stop)
        self._need(start < stop, "it has no step")
        self._need(stop <= self._adjoint, "it goes beyond the adjoint")
        if action.write_ics:
            self._need(bool(place & (Place.RAM | Place.DISK)), "restart data can be kept in RAM or on disk only")
            note.add(Op.KEEP, start, place=place)
            self._restart[start] = self._restart.get(start, Place.NOWHERE) | place
        if action.write_adj_deps:
            self._need(place is not Place.NOWHERE, "adjoint dependencies need a storage")
            for step in range(start, stop):
                note.add(Op.KEEP, step, place=place)
                note.add(Op.ADVANCE, step, step + 1)
                self._taped[step] = self._taped.get(step, Place.NOWHERE) | place
        else:
            note.add(Op.ADVANCE, start, stop)
        self._forward = stop

    def _on_reverse(self, action: Any) -> None:
        start, stop, note = action.n0, action.n1, self._transcript
        self._need(self._ended_forward, "the forward calculation has not ended")
        self._need(start < stop == self._adjoint, "it does not continue the adjoint")
        for step in range(stop - 1, start - 1, -1):
            places = self._taped.get(step, Place.NOWHERE)
            self._need(bool(places & Place.WORK), f"the adjoint dependencies of step {step} are not in working storage")
            if not note.take_back_taping(step):
                note.add(Op.LOAD, step, place=Place.WORK)
            note.add(Op.REVERSE, step)
            if action.clear_adj_deps:
                self._forget(self._taped, step, Place.WORK)
        self._adjoint = start
        self._forward = None

    def _on_copy(self, action: Any) -> None:
        step, note = action.n, self._transcript
        source, target = self._place(action.from_storage), self._place(action.to_storage)
        restarts = bool(source & self._restart.get(step, Place.NOWHERE))
        tapes = bool(source & self._taped.get(step, Place.NOWHERE))
        self._need(restarts or tapes, f"nothing of step {step} is kept there")
        self._need(step < self._adjoint or not target, f"the adjoint of step {step} has been taken")
        if target is Place.WORK:
            if tapes:
                note.add(Op.COPY, step, source, Place.WORK)
                self._taped[step] |= Place.WORK
            if restarts:
                note.add(Op.LOAD, step, place=source)
            self._forward = step if restarts else None
        elif target:
            note.add(Op.COPY, step, source, target)
            for kept, there in ((self._restart, restarts), (self._taped, tapes)):
                if there:
                    kept[step] |= target
        else:
            self._need(type(action).__name__ == "Move", "a copy needs somewhere to go")
        if type(action).__name__ == "Move":
            self._forget(self._restart, step, source)
            self._forget(self._taped, step, source)

    def _forget(self, kept: dict[int, Place], step: int, place: Place) -> None:
        left = kept.get(step, Place.NOWHERE) & ~place
        if left:
            kept[step] = left
        else:
            kept.pop(step, None)

    def _on_end_forward(self, action: Any) -> None:
        self._need(not self._ended_forward, "the forward calculation has ended before")
        self._need(self._forward == self._steps, f"the forward calculation has not reached step {self._steps}")
        self._ended_forward = True
        self._transcript.add(Op.TURN, self._steps)
