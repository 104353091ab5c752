"""A job whose keeper looks on."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from longtape.protocols import Job, Slot

if TYPE_CHECKING:
    from longtape.durable.keeper import Keeper


class DurableJob:
    """A job whose keeper looks on: long ranges are run in pieces, after each of which a point may be made."""

    def __init__(self, job: Job, keeper: Keeper) -> None:
        self._job, self._keeper = job, keeper
        self._turned = False
        self.save, self.load, self.yield_slot = job.save, job.load, job.yield_slot
        self.adopt, self.load_initial = job.adopt, job.load_initial

    def advance(self, start: int, stop: int) -> int:
        keeper = self._keeper
        while start < stop:
            piece = keeper.piece(start, stop)
            began = time.perf_counter()
            reached = self._job.advance(start, piece)
            keeper.ran(piece - start, time.perf_counter() - began)
            if reached != piece:
                return reached
            keeper.passed(piece, turned=self._turned)
            start = piece
        return stop

    def record(self, start: int, stop: int, slot: Slot) -> int:
        reached = self._job.record(start, stop, slot)
        self._keeper.passed(reached, turned=self._turned)
        return reached

    def reverse(self, start: int, stop: int) -> None:
        self._job.reverse(start, stop)
        self._keeper.came_down(start)

    def pull_back(self, start: int, stop: int, slot: Slot) -> None:
        self._job.pull_back(start, stop, slot)
        self._keeper.came_down(start)

    def turn(self) -> None:
        self._keeper.turning()
        self._job.turn()
        self._turned = True
