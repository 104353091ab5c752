"""How fast a directory stores and fetches, through the very path the disk tier uses."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass

import numpy as np

from longtape.engine.workers import Workers
from longtape.errors import UsageError
from longtape.measure import measure_tier
from longtape.sizes import parse_bytes
from longtape.tiers.disk import DiskTier

_SMALL = 64 * 1024
_REPEATS = 5
LARGEST_ITEM_NBYTES = 128 << 20
"""Larger items are not moved: what is written stays below (1 + repeats) times this, whatever is asked for."""


@dataclass(frozen=True, slots=True)
class Probe:
    """What a directory was seen to do, while one core computed."""

    directory: str
    direct_io: bool
    fallback_reason: str | None
    """Why transfers go through the page cache, where they do."""
    item_nbytes: int
    """Size of the larger items that were moved."""
    block_nbytes: int
    """What offsets and lengths in the file are multiples of."""
    queue_depth: int
    """Transfers of a kind under way at once: one, as in a run."""
    write_bytes_per_second: float
    read_bytes_per_second: float
    write_latency: float
    """Seconds a write takes however small."""
    read_latency: float
    bytes_written: int
    seconds: float


def probe(directory: str | os.PathLike[str], *, item: int | str = "16MiB") -> Probe:
    """Measure a directory in a second or two, writing a few items and leaving nothing behind.

    Args:
        directory: Where to; must exist and be writable.
        item: Size of the items to move, such as the state of the model to come; 128 MiB stand for
            all that is larger.

    Raises:
        UsageError: The directory is missing or not writable, or the size makes no sense.
        StorageError: It could not be written or read, for example because it is full.
    """
    nbytes = parse_bytes(item)
    if nbytes < 1:
        raise UsageError(f"an item of {nbytes} bytes cannot be moved; give at least 1")
    nbytes = min(nbytes, LARGEST_ITEM_NBYTES)
    began = time.perf_counter()
    tier = DiskTier(directory)
    try:
        workers = Workers(tier, time.perf_counter)
        try:
            speed = measure_tier(tier, workers, [min(_SMALL, nbytes), nbytes], busy=_work, repeats=_REPEATS)
        finally:
            workers.close(30.0)
        return Probe(
            directory=os.fspath(directory),
            direct_io=tier.direct,
            fallback_reason=tier.fallback_reason,
            item_nbytes=nbytes,
            block_nbytes=tier.block_nbytes,
            queue_depth=1,
            write_bytes_per_second=speed.write_bytes_per_second,
            read_bytes_per_second=speed.read_bytes_per_second,
            write_latency=speed.write_latency,
            read_latency=speed.read_latency,
            bytes_written=tier.bytes_written,
            seconds=time.perf_counter() - began,
        )
    finally:
        tier.close()


_FIELD = np.ones(1 << 18)


def _work() -> None:
    """A millisecond of memory-bound computing that lets other threads run."""
    np.multiply(_FIELD, 1.0, out=_FIELD)
