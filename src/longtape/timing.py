"""How a job's steps are timed before the sweeps: few times, and what is long once.

Owns what all front ends do alike.  A step is the user's, who may wait for it for minutes, or count how often it is
called; so each is run a handful of times at most.
"""

from __future__ import annotations

from collections.abc import Callable
from math import ceil

import numpy as np

ONCE_SECONDS = 1.0
"""A step that takes longer than this is timed once."""

TIMES = 3

ENOUGH_SECONDS = 0.02
"""Many short steps are timed together, about as long as this."""

MOST_BUSY_SECONDS = 0.1
"""Steps that take longer than this are not run while storage is measured: something as busy with memory is."""

_COPIED_NBYTES = 4 << 20


def least_seconds(timed: Callable[[], float], times: int) -> float:
    """The least of so many timings: what comes between, or is done for the first time, only makes one longer."""
    return min(timed() for _ in range(times))


def step_seconds(timed: Callable[[], float], times: int) -> tuple[float, int]:
    """The seconds of a step, and how often to time what else is done with it: once, if it is long.

    Args:
        timed: Runs it; returns the seconds that it took.
        times: How often, if it is not long.
    """
    first = timed()
    if first > ONCE_SECONDS or times == 1:
        return first, 1
    return min(first, least_seconds(timed, times - 1)), times


def count_together(seconds: float, most: int) -> int:
    """How many steps to time together, where one takes so long: `most` at most."""
    return max(1, min(most, ceil(ENOUGH_SECONDS / max(seconds, 1e-9))))


def copying(nbytes: int) -> Callable[[], None]:
    """Something to do while storage is measured, in place of steps: it copies some of so many bytes of memory."""
    source = np.zeros(max(1, min(nbytes, _COPIED_NBYTES)), np.uint8)
    target = np.empty_like(source)
    return lambda: np.copyto(target, source)
