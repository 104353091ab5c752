"""Wavefields: which time levels make up a state, and through how many times one call can be reversed.

With τ the time index of a Devito loop, let the forward operator write level τ+w of a
wavefield and read down to τ-r, and the reverse operator read levels τ+a … τ+b of it.

* The *state* before time τ is levels τ-r … τ+w-1 (τ+a … if that is lower), which for a
  wave equation of second order is two of the three levels of the buffer.
* A time buffer of n levels can be reversed through c = n - (b-a) times in one call of
  the reverse operator.  One step of the plan is c times, a *stride*.
* The *residuals* of a stride are the buffer when it holds levels τ+a … τ+c-1+b: all n of
  them, and for a reverse operator that reads one level (a = b) one a time step, each
  once.  The reverse operator is run on the memory they were kept in.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from devito import Buffer, TimeFunction

from longtape.devito.kernels import Array, Kernel
from longtape.errors import UsageError


class Wavefield:
    """One wavefield: its time buffer, the levels that make up its state, and those the reverse operator reads."""

    def __init__(self, function: Any, forward: Kernel, reverse: Kernel) -> None:
        self.name: str = function.name
        name = self.name
        if not isinstance(function, TimeFunction):
            raise UsageError(f"wavefields must be TimeFunctions, not {type(function).__name__} ({name})")
        self.buffer = forward.arrays[name]
        self.levels = len(self.buffer)
        if _is_saved(function):
            raise UsageError(f"wavefield {name} saves every time step; it must have a time buffer: leave out save=")
        if name in reverse.arrays and not self.is_in(reverse):
            raise UsageError(f"operators {forward.name} and {reverse.name} must be given the same {name}")
        ahead, behind = forward.access(name), reverse.access(name)
        if not ahead.writes:
            raise UsageError(f"operator {forward.name} does not update the wavefield {name}; leave it out")
        if behind.writes:
            raise UsageError(f"operator {reverse.name} writes the wavefield {name}, which it may only read")
        self.newest = max(ahead.writes)
        self.reads = behind.reads
        self.state = range(min([*ahead.reads, *behind.reads, self.newest - 1]), self.newest)

    def is_in(self, kernel: Kernel) -> bool:
        """Whether the operator works on this buffer."""
        found = kernel.arrays[self.name]
        return found.ctypes.data == self.buffer.ctypes.data and found.shape == self.buffer.shape

    def at(self, moment: int, buffer: Array | None = None) -> list[Array]:
        """The levels that are the state before a time, in the wavefield's own buffer or in another."""
        buffer = self.buffer if buffer is None else buffer
        return [buffer[(moment + level) % self.levels] for level in self.state]


class Window:
    """The time levels that the reverse operator reads, of all wavefields alike, and how many times that bridges."""

    def __init__(self, fields: Sequence[Wavefield], reverse: Kernel) -> None:
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


def check_names(forward: Any, wavefields: Mapping[str, Any]) -> None:
    """Raise `UsageError` for a wavefield that the operator does not have."""
    has = {parameter.name for parameter in forward.parameters}
    if strays := [name for name in wavefields if name not in has]:
        raise UsageError(f"operator {forward.name} does not have the wavefield {', '.join(strays)}; leave it out")


def known(operator: Any, functions: Mapping[str, Any]) -> dict[str, Any]:
    """Those functions that the operator has."""
    names = {parameter.name for parameter in operator.parameters}
    return {name: function for name, function in functions.items() if name in names}


def check_complete(forward: Kernel, reverse: Kernel, wavefields: Mapping[str, Any]) -> None:
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


def check_apart(forward: Kernel, reverse: Kernel) -> None:
    """What the forward operator reads must still be there when steps are run again."""
    written = [function.name for function in reverse.written()]
    for name in forward.inputs():
        for other in written:
            if other in reverse.arrays and np.may_share_memory(forward.arrays[name], reverse.arrays[other]):
                raise UsageError(
                    f"operator {reverse.name} writes {other}, which operator {forward.name} reads as {name}: steps "
                    f"that are run again would compute other states. Have {reverse.name} write to a function of its own"
                )


def _is_saved(function: Any) -> bool:
    """Whether every time has memory of its own."""
    return isinstance(function.save, (int, np.integer)) and not isinstance(function.save, Buffer)
