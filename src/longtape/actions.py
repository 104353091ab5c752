"""The vocabulary in which a plan speaks to whoever runs it.

This file owns the actions and nothing else: no clock, no array, no thread.

Conventions, used everywhere in Longtape:

* *state i* exists before step i; step i turns state i into state i+1; a
  sequence of N steps has states 0 … N;
* intervals of steps are half-open: ``[start, stop)`` holds steps
  ``start, …, stop-1``;
* the *working state* is the one the user's step acts on.  It is not counted in
  the memory budget; everything named by a `Key` is.

Read aloud, ``Advance(0, 3), Store(3), Advance(3, 5), Reverse(5, 6),
Restore(3)`` says: run steps 0, 1, 2; copy state 3; run steps 3 and 4; take the
adjoint of step 5, for which the working state is state 5; go back to state 3.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple


class Kind(Enum):
    """What a kept item holds."""

    SNAPSHOT = "snapshot"
    """The restart state before a step."""

    RESIDUALS = "residuals"
    """What the adjoint of a window of steps needs (the tape of the window)."""

    RESTART = "restart"
    """A snapshot that a resumable run keeps beside those of its plan; no action names it."""

    PARTS = "parts"
    """Anything else that a resumable run keeps, such as its adjoint; `Key.step` is a number only."""

    # Members are singletons: the identity hash (in C) keeps look-ups by `Key` cheap.
    __hash__ = object.__hash__


class Key(NamedTuple):
    """Names one kept item: a snapshot of state `step`, or the residuals of the window that starts at `step`."""

    kind: Kind
    step: int

    def __str__(self) -> str:
        return f"{self.kind.value} {self.step}"


@dataclass(frozen=True, slots=True)
class Advance:
    """Run steps ``[start, stop)`` on the working state, keeping nothing.

    Example: ``Advance(2, 5)`` needs working state 2 and leaves working state 5.
    """

    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class Record:
    """Run steps ``[start, stop)`` and keep their residuals in memory as ``Key(RESIDUALS, start)``.

    Example: ``Record(8, 12)`` needs working state 8 and leaves working state 12
    and a residual block from which ``PullBack(8, 12)`` takes the adjoint.
    """

    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class Reverse:
    """Take the adjoint of steps ``stop-1, …, start``; the working state must be `start`.

    The steps are run again while taping.  Afterwards there is no working state.

    Example: ``Reverse(7, 8)`` needs working state 7, and that the adjoint has
    come down to step 7.
    """

    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class PullBack:
    """Take the adjoint of steps ``stop-1, …, start`` from residuals in memory; no working state is needed.

    Example: ``PullBack(8, 12)`` needs ``Key(RESIDUALS, 8)`` in memory.
    """

    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class Store:
    """Copy the working state, which is state `step`, into a free slot of memory."""

    step: int


@dataclass(frozen=True, slots=True)
class Restore:
    """Make the snapshot `step`, which is in memory, the working state; it stays in memory."""

    step: int


@dataclass(frozen=True, slots=True)
class Write:
    """Begin to copy an item from memory to storage; returns at once."""

    key: Key


@dataclass(frozen=True, slots=True)
class Read:
    """Begin to bring an item from storage into free memory; returns at once."""

    key: Key


@dataclass(frozen=True, slots=True)
class Free:
    """Give up the memory of an item; a stored copy stays.  An unstarted write of it is cancelled."""

    key: Key


@dataclass(frozen=True, slots=True)
class Discard:
    """Give up an item everywhere: it will not be needed again."""

    key: Key


@dataclass(frozen=True, slots=True)
class Await:
    """Wait until at least one transfer in progress has ended.  The only action that may wait."""

    key: Key | None = None
    """The item the plan cannot go on without; None when any free slot would do."""

    room: Kind | None = None
    """Without a key: what the slot is wanted for."""


@dataclass(frozen=True, slots=True)
class Turn:
    """The forward sweep is over: the working state is the final one, and the adjoint may be set."""


Action = Advance | Record | Reverse | PullBack | Store | Restore | Write | Read | Free | Discard | Await | Turn
