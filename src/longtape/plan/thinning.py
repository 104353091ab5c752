"""Room on limited storage for a sweep whose length is not known: what is stored is thinned as it goes on.

Owns which stored item is given up for a new one.  Snapshots are thinned progressively:
the leftmost one between two gaps g goes, and further ones are stored 2g apart; when
none is left between two such gaps, g is doubled.  So gaps are g or 2g, but for
an odd one left over when g was doubled, and room is made one item at a time.  While recorded windows take more
than half of the room, the lowest of them goes instead, and is run again in reverse.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Generator
from math import ceil

from longtape.actions import Action, Discard, Kind
from longtape.plan.course import Course


class Thinning:
    """Gives up stored items of a course; entered by the forward sweep only."""

    def __init__(self, course: Course) -> None:
        self._course = course
        self._gap = 0
        """g, in windows; 0 until storage was full for the first time."""
        self._index = 1
        """The restart point that is considered next."""

    @property
    def least_gap(self) -> int:
        """Windows that must lie between snapshots from now on: 2g."""
        return 2 * self._gap

    def make_room(self, kind: Kind) -> Generator[Action, None, bool]:
        """Give items up until one more of this kind fits on storage; False if nothing more can go."""
        stock = self._course.stock
        while not stock.has_room(kind):
            action = self._next()
            if action is None:
                return False
            occupied = stock.occupied()
            yield action
            if stock.occupied() == occupied:
                return False  # its room is free once the write in progress has ended
        return True

    def _next(self) -> Action | None:
        stock = self._course.stock
        blocks = (len(stock.residuals.stored) + stock.unwritten(Kind.RESIDUALS)) * stock.item_nbytes[Kind.RESIDUALS]
        if 2 * blocks > stock.storage_limit:
            return self._lowest_block() or self.snapshot()
        return self.snapshot() or self._lowest_block()

    def _lowest_block(self) -> Action | None:
        recorded = self._course.recorded
        return Discard(self._course.residuals(recorded.pop(0))) if recorded else None

    def snapshot(self) -> Action | None:
        restarts = self._course.restarts
        if len(restarts) < 3:
            return None
        span = restarts[-1] - restarts[0]
        if not self._gap:
            self._gap = max(1, ceil(span / (len(restarts) - 1)))
        while self._gap <= span:
            while self._index < len(restarts) - 1:
                index = self._index
                self._index += 1
                if self._is_between_small_gaps(index):
                    return Discard(self._course.snapshot(restarts.pop(index)))
            self._gap, self._index = 2 * self._gap, 1
        return None

    def _is_between_small_gaps(self, index: int) -> bool:
        """Whether the gap that is left is 2g at most, and no plain window loses its start behind a recorded one."""
        restarts, recorded = self._course.restarts, self._course.recorded
        before, after = restarts[index - 1], restarts[index + 1]
        if after - before > 2 * self._gap or not self._course.exists(restarts[index]):
            return False
        return bisect_left(recorded, before) == bisect_left(recorded, after)
