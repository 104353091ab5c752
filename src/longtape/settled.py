"""Measures storage that an earlier run of this process has used, once it has come to rest.

A file system may take a second and more to give back the room of a file of some
gigabytes, and for so long it does little else.  A run that begins then would take a quick
disk for one of a hundredth of its speed, and choose a plan for that.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from longtape.measure import TierSpeed

MUCH_SLOWER = 2.0
"""Times as long as an earlier run saw: storage is not believed at once."""

PATIENCE_SHARE, MOST_PATIENCE_SECONDS = 0.05, 5.0
"""It is given this share of the time since that run began, and no more than these seconds."""

_PAUSE_SECONDS = 0.1


@dataclass(frozen=True, slots=True)
class _Seen:
    speed: TierSpeed
    at: float


_seen: dict[str, _Seen] = {}


def measure_settled(
    measure: Callable[[], TierSpeed],
    directory: str,
    sizes: Sequence[int],
    *,
    clock: Callable[[], float] = time.perf_counter,
    sleep: Callable[[float], None] = time.sleep,
) -> TierSpeed:
    """Measure a directory; again for a while, where it is much slower than when it was measured last.

    Args:
        measure: Measures it.
        directory: Which; what is seen of it is kept for the next run of this process.
        sizes: Of the items that count, in bytes.
        clock: Seconds.
        sleep: Waits for so many.

    Returns:
        The last that was seen.
    """
    found, before = measure(), _seen.get(directory)
    if before is not None:
        now = clock()
        until = now + min(MOST_PATIENCE_SECONDS, PATIENCE_SHARE * (now - before.at))
        while _is_much_slower(found, before.speed, sizes) and clock() < until:
            sleep(_PAUSE_SECONDS)
            found = measure()
    _seen[directory] = _Seen(found, clock())
    return found


def _is_much_slower(now: TierSpeed, before: TierSpeed, sizes: Sequence[int]) -> bool:
    return any(
        now.write_seconds(nbytes) > MUCH_SLOWER * before.write_seconds(nbytes)
        or now.read_seconds(nbytes) > MUCH_SLOWER * before.read_seconds(nbytes)
        for nbytes in sizes
    )
