"""A state that is remembered without keeping it, to recognise it when it is computed again.

Owns the line between rounding and another state.  Threads that add to the same number do so in any order, so
correct steps may give other last bits when they are run again.  Knows no framework.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash

Array = npt.NDArray[Any]

SAMPLED = 4096
"""Numbers of each array that are kept."""

ROUNDING = 256
"""Differences of so many units in the last place of the largest number are rounding."""


class KnownState:
    """Hashes of a state's arrays, and a sample of their numbers: 32 KiB an array."""

    def __init__(self, arrays: Sequence[Array]) -> None:
        self._hashes = [_hash(array) for array in arrays]
        self._samples = [_sample(array) for array in arrays]

    def is_same(self, other: KnownState) -> bool:
        """Whether both states have the same bits."""
        return self._hashes == other._hashes

    def differing(self, arrays: Sequence[Array]) -> list[int]:
        """Positions of arrays that are not what they were, rounding aside."""
        known = zip(self._hashes, self._samples, arrays, strict=True)
        return [k for k, (then, sample, array) in enumerate(known) if _hash(array) != then and _differs(sample, array)]


def _hash(array: Array) -> int:
    return xxhash.xxh3_64_intdigest(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)


def _sample(array: Array) -> Array:
    return array.reshape(-1)[:: max(1, array.size // SAMPLED)].copy()


def _differs(then: Array, array: Array) -> bool:
    now = _sample(array)
    if now.dtype.kind not in "fc":
        return True
    largest = max((np.max(np.abs(a), where=np.isfinite(a), initial=0.0) for a in (then, now)), default=0.0)
    close = np.isclose(now, then, rtol=0.0, atol=ROUNDING * np.finfo(now.dtype).eps * largest, equal_nan=True)
    return not bool(np.all(close))
