"""How a job's steps are timed before the sweeps: few times, and what is long once.

Owns what all front ends do alike.  A step is the user's, who may wait for it for minutes, or count how often it is
called; so each is run a handful of times at most.
"""

from __future__ import annotations

from collections.abc import Callable
from math import ceil

import numpy as np

ONCE_SECONDS = 1.0
"""What takes longer than this is timed once."""

TIMES = 3

ENOUGH_SECONDS = 0.02
"""Many short steps are timed together, about as long as this."""

MOST_BUSY_SECONDS = 0.1
"""Steps that take longer than this are not run while storage is measured: something as busy with memory is."""

_COPIED_NBYTES = 4 << 20


def least_seconds(timed: Callable[[], float], times: int = TIMES) -> float:
    """The least of a few timings: what comes between, or is done for the first time, only makes one longer.

    Args:
        timed: Does it once; returns the seconds that it took.
        times: How often, unless it takes more than `ONCE_SECONDS`.
    """
    least = timed()
    for _ in range(times - 1):
        if least > ONCE_SECONDS:
            break
        least = min(least, timed())
    return least


def count_together(seconds: float, most: int) -> int:
    """How many steps to time together, where one takes so long: `most` at most."""
    return max(1, min(most, ceil(ENOUGH_SECONDS / max(seconds, 1e-9))))


def copying(nbytes: int) -> Callable[[], None]:
    """Something to do while storage is measured, in place of steps: it copies some of so many bytes of memory."""
    source = np.zeros(max(1, min(nbytes, _COPIED_NBYTES)), np.uint8)
    target = np.empty_like(source)
    return lambda: np.copyto(target, source)
