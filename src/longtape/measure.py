"""Times a job's transfers on the very path they will take, codec included, before a plan is chosen."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from statistics import fmean, median, median_low
from time import perf_counter
from typing import NamedTuple, Protocol, Self

import numpy as np

from longtape.actions import Key, Kind
from longtape.engine.workers import Transfer, Workers
from longtape.errors import StorageError
from longtape.plan.costs import Costs
from longtape.protocols import Bytes, Slot, Tier
from longtape.tiers.codecs import Codec
from longtape.tiers.compressed import CompressedTier, FloatsOf
from longtape.tiers.memory import MemoryTier
from longtape.tiers.pool import SlotPool
from longtape.timing import ONCE_SECONDS

_PROBE = Key(Kind.SNAPSHOT, -1)
_REPEATS = 3
_LONG_SECONDS = 0.2
"""Once transfers have taken so long together, they are not repeated."""
_LEAST_OF_BANDWIDTH = 0.05
"""A large transfer takes at least this share of its time for its bytes."""
_BEARABLE_SECONDS = 0.05
"""The larger of two sizes is to take no longer than this."""
LEAST_WINDOWS = 2
"""Windows timed each way; of more, the slowest is left out."""


class Windows(Protocol):
    """Runs windows of a job's steps as its sweeps do; nothing is kept of it."""

    def record(self, slot: Slot, count: int) -> None:
        """So many steps into a block, which has the size that they need."""

    def pull_back(self, slot: Slot, count: int) -> None:
        """The adjoint of the steps that were recorded into this block, or into another and copied to it."""

    def end(self) -> None:
        """Forget them."""


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
    """Puts state 0 back after `busy` and `sample`."""
    sample: Callable[[], tuple[Kind, Bytes]] | None = None
    """An item of the job's own data, some steps on: how small it becomes depends on what it holds."""
    windows: Windows | None = None
    """For a job that records."""


@dataclass(frozen=True, slots=True)
class TierSpeed:
    """What a tier was seen to do.  Bytes per second, and seconds a transfer takes however small."""

    write_bytes_per_second: float
    read_bytes_per_second: float
    write_latency: float
    read_latency: float
    touch_bytes_per_second: float
    """How fast the system provides memory that is used for the first time."""
    handling: float = 0.0
    """Seconds that a transfer costs the steps beside it, however small."""
    handling_per_byte: float = 0.0
    """And for each of its bytes."""
    copy_per_byte: float = 0.0
    """Seconds to copy a byte of an item to other memory."""

    def write_seconds(self, nbytes: int) -> float:
        """To write an item."""
        return self.write_latency + nbytes / self.write_bytes_per_second

    def read_seconds(self, nbytes: int) -> float:
        """To read it back."""
        return self.read_latency + nbytes / self.read_bytes_per_second


@dataclass(frozen=True, slots=True)
class CodecSpeed:
    """What a codec was seen to make of a job's own data, on a worker, beside the job's own steps."""

    stored_fraction: float
    """Bytes stored per byte of the item; 1 where it does not get smaller."""
    encode_bytes_per_second: float
    decode_bytes_per_second: float
    """Of the item, not of what is stored."""
    slowdown: float
    """How many times longer steps take beside the codec; 1 where it has a core to itself."""

    def through(self, costs: Costs) -> Costs:
        """Costs of items that pass the codec on their way: t_w(n) = latency + n/encode + n·fraction/bandwidth."""
        slow, stored = self.slowdown, self.stored_fraction
        write = 1.0 / self.encode_bytes_per_second + stored / costs.write_bytes_per_second
        read = 1.0 / self.decode_bytes_per_second + stored / costs.read_bytes_per_second
        return replace(
            costs,
            forward=slow * costs.forward,
            reverse=slow * costs.reverse,
            record=None if costs.record is None else slow * costs.record,
            pull_back=None if costs.pull_back is None else slow * costs.pull_back,
            write_bytes_per_second=1.0 / write,
            read_bytes_per_second=1.0 / read,
        )


def measure_codec(codec: Codec, sample: tuple[Kind, Bytes], floats: FloatsOf | None, job: JobCosts) -> CodecSpeed:
    """Encode and decode an item of the job's own data a few times, under the job's own load."""
    kind, data = sample
    tier = CompressedTier(MemoryTier(), codec, floats)
    workers = Workers(tier, perf_counter)
    key, slot, during = Key(kind, -1), Slot(data), list[float]()

    def busy() -> None:
        during.append(_seconds_of(job.busy))

    def median_time(*, is_write: bool) -> float:
        transfers = [Transfer(key, slot, is_write=is_write) for _ in range(_REPEATS)]
        return median(_time(workers, transfer, busy if job.busy else None, 30.0) for transfer in transfers)

    try:
        tier.reserve(key, data.nbytes)
        tier.write(key, data)  # the first call may load libraries, and touches memory
        alone = [_seconds_of(job.busy) for _ in range(2 * _REPEATS)]
        encode = median_time(is_write=True)
        slot.data = np.empty_like(data)
        decode = median_time(is_write=False)
        fraction = tier.stored_nbytes / data.nbytes if data.nbytes else 1.0
    finally:
        workers.close(30.0)
        tier.close()
    slowdown = max(1.0, median(during) / max(median(alone), 1e-9)) if during else 1.0
    return CodecSpeed(fraction, data.nbytes / encode, data.nbytes / decode, slowdown)


def _seconds_of(busy: Callable[[], None] | None) -> float:
    began = perf_counter()
    if busy is not None:
        busy()
    return perf_counter() - began


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

    Slow items are moved less often, and a larger size that would take long is replaced by one that does not.

    Args:
        tier: Where to.
        workers: Who moves them.
        sizes: One or two item sizes in bytes, ascending; with two, latency and bandwidth are told apart.
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
    copy = _copy_seconds(slot.data[: sizes[0]])
    trial = _Trial(tier, workers, busy, stuck_seconds, repeats)
    used, seen = [sizes[0]], [trial.of(Slot(slot.data[: sizes[0]]))]
    while used[-1] < sizes[-1]:  # larger and larger, for where latency is long a little more takes no longer
        bearable = int(_BEARABLE_SECONDS * used[-1] / max(seen[-1].write, seen[-1].read))
        if bearable < 2 * used[-1] and len(used) > 1:
            break
        larger = min(sizes[-1], bearable)
        if larger <= used[-1]:
            break
        used[1:], seen[1:] = [larger], [trial.of(Slot(slot.data[:larger]))]
    pool.give(slot)
    del slot
    pool.close()
    write_latency, write_speed = line_through(used, [both.write for both in seen])
    read_latency, read_speed = line_through(used, [both.read for both in seen])
    handling, per_byte = _rising(used, [both.handling for both in seen])
    return TierSpeed(
        write_speed, read_speed, write_latency, read_latency, touch, handling, per_byte, copy / max(1, sizes[0])
    )


def measure_windows(
    windows: Windows,
    nbytes: int,
    count: int,
    storage: tuple[Tier, Workers] | None,
    *,
    seconds: float,
    handling: float = 0.0,
    stuck_seconds: float = 30.0,
) -> tuple[float, float]:
    """Record windows and pull them back for a while, with storage at work on them as in the sweeps.

    What steps take beside storage is more than what they take alone and what transfers compute together: their
    blocks come from memory and not from a cache, and bandwidth is shared.  No step waits: while a block is on its
    way, windows are run in the other.

    Args:
        windows: The job's steps.
        nbytes: Length of a block.
        count: Steps in it.
        storage: Where blocks go, and who moves them; None: nowhere.
        seconds: How long to go on, each way; `LEAST_WINDOWS` are run in any case.
        handling: Seconds that a transfer costs compute, which are counted elsewhere.
        stuck_seconds: After so long without an answer the tier counts as failed.

    Returns:
        Seconds a step to record and to pull back.

    Raises:
        StorageError: The tier failed; nothing is kept of the attempt.
    """
    pool = SlotPool(1 if storage is None else 2, nbytes, alignment=4096)
    slots = [pool.take() for _ in range(pool.count)]
    for slot in slots:
        slot.data[:] = 0
    try:
        with _Transfers(storage, nbytes, stuck_seconds) as transfers:
            for slot in slots:
                windows.record(slot, count)
            recorded = _beside(transfers, slots, windows.record, count, seconds, handling, is_write=True)
            pulled = _beside(transfers, slots, windows.pull_back, count, seconds, handling, is_write=False)
    finally:
        windows.end()
        del slot
        slots.clear()
        pool.close()
    return recorded, pulled


class _Transfers:
    """One transfer at a time, all under the same key."""

    def __init__(self, storage: tuple[Tier, Workers] | None, nbytes: int, stuck_seconds: float) -> None:
        self._storage, self._nbytes, self._stuck_seconds = storage, nbytes, stuck_seconds
        self.moving: Slot | None = None
        """What is on its way."""
        self._is_stuck = False

    def __enter__(self) -> Self:
        if self._storage is not None:
            self._storage[0].reserve(_PROBE, self._nbytes)
        return self

    def __exit__(self, *exception: object) -> None:
        if self._storage is not None:
            if not self._is_stuck:
                with suppress(OSError):  # if there is one now, something else has gone wrong already
                    self.wait()
            self._storage[0].release(_PROBE)

    def begin(self, slot: Slot, *, is_write: bool) -> bool:
        """Whether another could be begun."""
        if self._storage is None or self.moving is not None:
            return False
        self.moving = slot
        self._storage[1].submit(Transfer(_PROBE, slot, is_write=is_write))
        return True

    def look(self, timeout: float = 0.0) -> None:
        """Note what has finished."""
        if self._storage is None or self.moving is None:
            return
        finished = self._storage[1].next_finished(timeout)
        if finished is not None:
            self.moving = None
            if finished.error is not None:
                raise finished.error

    def wait(self) -> None:
        """Until nothing is on its way."""
        self.look(self._stuck_seconds)
        if self.moving is not None:
            self._is_stuck = True
            raise StorageError(f"to move {self._nbytes} bytes for a trial: no answer for {self._stuck_seconds:g} s")


def _beside(
    transfers: _Transfers,
    slots: Sequence[Slot],
    run: Callable[[Slot, int], None],
    count: int,
    seconds: float,
    handling: float,
    *,
    is_write: bool,
) -> float:
    """Seconds a step of windows, each run while the one before it is on its way, if nothing else is."""
    spent, begun, mine = list[float](), 0, 0
    while len(spent) < LEAST_WINDOWS or sum(spent) < seconds:
        began = perf_counter()
        other = (mine + 1) % len(slots)
        begun += transfers.begin(slots[other], is_write=is_write)
        run(slots[mine], count)
        transfers.look()
        spent.append(perf_counter() - began)
        if transfers.moving is not slots[other]:
            mine = other
    transfers.wait()
    handled = begun / len(spent) * handling
    if len(spent) > LEAST_WINDOWS:
        spent.remove(max(spent))
    return max(0.0, fmean(spent) - handled) / count


def _copy_seconds(data: Bytes) -> float:
    """To copy an item between places that have been touched before."""
    other = np.zeros_like(data)
    seconds = []
    for _ in range(_REPEATS):
        began = perf_counter()
        other[:] = data
        seconds.append(perf_counter() - began)
    return median(seconds)


class _Both(NamedTuple):
    """Median seconds of a write, of a read, and those that either costs compute."""

    write: float
    read: float
    handling: float


@dataclass(frozen=True, slots=True)
class _Trial:
    """Moves an item back and forth.

    A transfer costs compute what its worker computes, which holds the interpreter's lock or takes memory
    bandwidth, and what handing it over takes.  How much longer steps take beside it would be the better
    measure, but is lost in what they differ by anyway.
    """

    tier: Tier
    workers: Workers
    busy: Callable[[], None] | None
    stuck_seconds: float
    repeats: int

    def of(self, slot: Slot) -> _Both:
        self.tier.reserve(_PROBE, slot.data.nbytes)
        try:
            write, handling_writes = self._medians(slot, is_write=True)
            read, handling_reads = self._medians(slot, is_write=False)
        finally:
            self.tier.release(_PROBE)
        return _Both(write, read, (handling_writes + handling_reads) / 2.0)

    def _medians(self, slot: Slot, *, is_write: bool) -> tuple[float, float]:
        seconds, handling = list[float](), list[float]()
        while len(seconds) < self._wanted(seconds):
            transfer = Transfer(_PROBE, slot, is_write=is_write)
            seconds.append(_time(self.workers, transfer, self.busy, self.stuck_seconds))
            handling.append(transfer.cpu_seconds + transfer.handover_seconds)
        return median_low(seconds), median(handling)

    def _wanted(self, seconds: list[float]) -> int:
        """Repetitions in all, going by those done: fewer of those that take long."""
        if sum(seconds) < _LONG_SECONDS:
            return self.repeats
        return min(self.repeats, 1 if seconds[0] > ONCE_SECONDS else 2)


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


def _rising(sizes: Sequence[int], seconds: Sequence[float]) -> tuple[float, float]:
    """The line through one or two points: what is there for a size of 0, and what each byte adds; neither negative."""
    if len(sizes) < 2 or seconds[-1] <= seconds[0]:
        return sum(seconds) / len(seconds), 0.0
    slope = min((seconds[-1] - seconds[0]) / (sizes[-1] - sizes[0]), seconds[-1] / sizes[-1])
    return max(0.0, seconds[0] - slope * sizes[0]), slope


def line_through(sizes: Sequence[int], seconds: Sequence[float]) -> tuple[float, float]:
    """Latency and bytes per second of the line through one or two points; where noise hides the slope, a low one."""
    if len(sizes) < 2 or sizes[0] == sizes[-1]:
        return 0.0, sizes[0] / seconds[0]
    slope, steepest = (seconds[-1] - seconds[0]) / (sizes[-1] - sizes[0]), seconds[-1] / sizes[-1]
    slope = min(max(slope, _LEAST_OF_BANDWIDTH * steepest), steepest)
    return max(0.0, seconds[0] - slope * sizes[0]), 1.0 / slope
