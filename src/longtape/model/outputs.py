"""What steps write beside the state: rows by step, and sums.  Written once, however often a step runs.

Owns no array.  Knows nothing of plans: it is told which steps run, and puts back what steps that ran
before have written again.  Runs on the executor's thread.

Invariant: rows of steps before `done`, and the sums, are as the first run of steps 0 … done-1 left them,
or as the caller has changed them since.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from longtape.errors import DamagedBlock
from longtape.model.protocol import bytes_of, listed
from longtape.protocols import Bytes

MOST_KEPT_NBYTES = 4 << 20
"""Rows are put aside for at most so many bytes at a time, or for one step."""


class Outputs:
    """The outputs and sums of one model."""

    def __init__(self, model: Any) -> None:
        self.rows, self.sums = listed(model, "outputs"), listed(model, "sums")
        self.done = 0
        """Steps that have run."""
        self.row_nbytes = sum(array[:1].nbytes for array in self.rows)
        self._most_steps = max(1, MOST_KEPT_NBYTES // max(1, self.row_nbytes))

    def __bool__(self) -> bool:
        return bool(self.rows or self.sums)

    def end(self, start: int, stop: int) -> int:
        """How far steps from `start` on may run in one go: those that ran before are kept apart from new ones."""
        if not self or start >= self.done:
            return stop
        return min(stop, self.done, start + self._most_steps)

    @contextmanager
    def running(self, start: int, stop: int) -> Iterator[None]:
        """Around steps ``[start, stop)``, which have all run before, or none of them has."""
        if start >= self.done:
            yield
            self.done = stop
        else:
            with self.undone(start, stop):
                yield

    @contextmanager
    def undone(self, start: int, stop: int) -> Iterator[None]:
        """Around steps ``[start, stop)`` of which nothing is to be seen here."""
        places = [*(array[start:stop] for array in self.rows), *(array[...] for array in self.sums)]
        kept = [place.copy() for place in places]
        try:
            yield
        finally:
            for place, before in zip(places, kept, strict=True):
                np.copyto(place, before)

    # For a run that can be resumed ---------------------------------------------------------------

    def saved(self, start: int, stop: int) -> list[Bytes]:
        """The rows from `start` on and the sums, up to `stop` or as far as steps have run."""
        if not self:
            return []
        end = max(stop, self.done)
        span = np.array([start, end], "<i8").view(np.uint8)
        return [span, *(bytes_of(array[start:end]) for array in self.rows), *map(bytes_of, self.sums)]

    def take(self, arrays: list[Bytes]) -> None:
        """Take back what `saved` gave; raise `DamagedBlock` if it cannot be."""
        if not self and not arrays:
            return
        start, end = arrays[0].view("<i8").tolist() if arrays and arrays[0].nbytes == 16 else (0, -1)
        places = [*(array[max(0, start) : max(0, end)] for array in self.rows), *(array[...] for array in self.sums)]
        if not 0 <= start <= min(self.done, end) or [p.nbytes for p in places] != [a.nbytes for a in arrays[1:]]:
            raise DamagedBlock("the outputs that were made durable are not those of this model")
        for place, kept in zip(places, arrays[1:], strict=True):
            np.copyto(place, kept.view(place.dtype).reshape(place.shape))
        self.done = end

    def initial(self) -> Iterator[Bytes]:
        """The sums as they are, and shapes: what has to be the same for a run to go on."""
        shapes = " ".join(f"{array.dtype}{list(array.shape)}" for array in (*self.rows, *self.sums))
        yield np.frombuffer(shapes.encode(), np.uint8)
        yield from map(bytes_of, self.sums)
