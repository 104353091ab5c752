"""Times a job's transfers on the very path they will take, before a plan is chosen."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import inf
from statistics import median
from time import perf_counter

from longtape.actions import Key, Kind
from longtape.engine.workers import Transfer, Workers
from longtape.errors import StorageError
from longtape.protocols import Slot, Tier
from longtape.tiers.pool import SlotPool

_PROBE = Key(Kind.SNAPSHOT, -1)
_REPEATS = 3


@dataclass(frozen=True, slots=True)
class JobCosts:
    """A job's own times in seconds per step; zero where it could not be timed beforehand."""

    forward: float = 0.0
    reverse: float = 0.0
    record: float | None = None
    pull_back: float | None = None
    busy: Callable[[], None] | None = None
    """Runs some steps whose results are thrown away, so that transfers can be timed under load."""
    restore: Callable[[], None] | None = None
    """Puts state 0 back after `busy`."""


@dataclass(frozen=True, slots=True)
class TierSpeed:
    """What a tier was seen to do.  Bytes per second, and seconds a transfer takes however small."""

    write_bytes_per_second: float
    read_bytes_per_second: float
    write_latency: float
    read_latency: float
    touch_bytes_per_second: float
    """How fast the system provides memory that is used for the first time."""


def measure_tier(
    tier: Tier,
    workers: Workers,
    sizes: Sequence[int],
    *,
    busy: Callable[[], None] | None = None,
    stuck_seconds: float = 30.0,
    repeats: int = _REPEATS,
) -> TierSpeed:
    """Write and read back items of the given sizes, under the job's own load where `busy` provides it.

    Args:
        tier: Where to.
        workers: Who moves them.
        sizes: One or two item sizes in bytes; with two, latency and bandwidth are told apart.
        busy: Called over and over while a transfer is in progress.
        stuck_seconds: After so long without an answer the tier counts as failed.
        repeats: How often each item is written, and read; the median counts.

    Raises:
        StorageError: The tier failed; nothing is kept of the attempt.
    """
    pool = SlotPool(1, max(sizes), alignment=4096)
    slot = pool.take()
    began = perf_counter()
    slot.data[:] = 0
    touch = slot.data.nbytes / max(perf_counter() - began, 1e-9)
    times = [_time_both(tier, workers, Slot(slot.data[:nbytes]), busy, stuck_seconds, repeats) for nbytes in sizes]
    pool.give(slot)
    del slot
    pool.close()
    write_latency, write_speed = _line(sizes, [t[0] for t in times])
    read_latency, read_speed = _line(sizes, [t[1] for t in times])
    return TierSpeed(write_speed, read_speed, write_latency, read_latency, touch)


def _time_both(
    tier: Tier, workers: Workers, slot: Slot, busy: Callable[[], None] | None, stuck_seconds: float, repeats: int
) -> tuple[float, float]:
    def median_time(*, is_write: bool) -> float:
        transfers = [Transfer(_PROBE, slot, is_write=is_write) for _ in range(repeats)]
        return median(_time(workers, transfer, busy, stuck_seconds) for transfer in transfers)

    tier.reserve(_PROBE, slot.data.nbytes)
    try:
        return median_time(is_write=True), median_time(is_write=False)
    finally:
        tier.release(_PROBE)


def _time(workers: Workers, transfer: Transfer, busy: Callable[[], None] | None, stuck_seconds: float) -> float:
    workers.submit(transfer)
    until = perf_counter() + stuck_seconds
    finished = None
    while finished is None:
        if busy is not None:
            busy()
        finished = workers.next_finished(0 if busy is not None else max(0.0, until - perf_counter()))
        if finished is None and perf_counter() >= until:
            verb = "write" if transfer.is_write else "read"
            raise StorageError(f"to {verb} {transfer.nbytes} bytes for a trial: no answer for {stuck_seconds:g} s")
    if finished.error is not None:
        raise finished.error
    return max(finished.seconds, 1e-9)


def _line(sizes: Sequence[int], seconds: Sequence[float]) -> tuple[float, float]:
    """Latency and bytes per second of the line through one or two points."""
    if len(sizes) < 2 or sizes[0] == sizes[-1]:
        return 0.0, sizes[0] / seconds[0]
    slope = (seconds[-1] - seconds[0]) / (sizes[-1] - sizes[0])
    if slope <= 0:
        return 0.0, max(n / s for n, s in zip(sizes, seconds, strict=True))
    latency = max(0.0, seconds[0] - slope * sizes[0])
    return latency, 1.0 / slope if slope > 0 else inf
