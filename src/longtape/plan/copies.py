"""The copies that a simulated machine has under way: to storage and back, to a device and back.

Owns when a copy over the link of a device may begin.  A snapshot or block leaves from one
of a few staging buffers, which is free again when it is in the host's memory.  One item
comes in ahead of compute: from the moment that an adjoint is taken, the highest one kept
below it, as soon as it is in the host's memory and a staging buffer is free.  For that is
what a reverse sweep needs next.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Callable
from dataclasses import dataclass, field
from math import inf
from typing import TypedDict

from longtape.actions import Key, Kind

Duration = Callable[[Key], float]


class LinkFigures(TypedDict):
    """What has gone over a link."""

    bytes_out: int
    bytes_in: int
    out_seconds: float
    in_seconds: float


@dataclass(slots=True, eq=False)
class Channel:
    """One way that items go one after the other: the transfer in progress and those that wait."""

    duration: Duration
    current: Key | None = None
    ends: float = inf
    began: float = 0.0
    busy: float = 0.0
    queue: list[Key] = field(default_factory=list)

    def start_next(self, now: float) -> None:
        if self.current is None and self.queue:
            self.current = self.queue.pop(0)
            self.began, self.ends = now, now + self.duration(self.current)

    def end(self) -> tuple[Key, float]:
        """The transfer in progress is over; which one it was, and when it ended."""
        key, ended = self.current, self.ends
        assert key is not None
        self.busy += ended - self.began
        self.current, self.ends = None, inf
        return key, ended


class Link:
    """Both ways between a device and the host's memory."""

    def __init__(self, out: Duration, back: Duration, buffers: int) -> None:
        self.out, self.back = Channel(out), Channel(back)
        self.buffers = buffers
        """Staging buffers, for each way."""
        self.below: int | None = None
        """Where the adjoint will stand when the next item is wanted; None until one is taken."""
        self.in_use = 0
        """Buffers from which a window is being pulled back."""
        self._leaving: dict[Key, int] = {}
        self._kept: list[tuple[int, bool]] = []
        self._arrived: Key | None = None
        self._bytes = {"out": 0, "in": 0}
        self._nbytes: dict[Kind, int] = {}

    def is_full(self) -> bool:
        """Whether every buffer holds an item that has not left yet."""
        return len(self.out.queue) + (self.out.current is not None) >= self.buffers

    def is_here(self, key: Key) -> bool:
        """Whether the item has left the device, so that it can be written or copied back."""
        return not self._leaving.get(key)

    def send(self, key: Key, nbytes: int) -> None:
        """The item is kept, and to leave the device."""
        self._leaving[key] = self._leaving.get(key, 0) + 1
        insort(self._kept, _place(key))
        self.out.queue.append(key)
        self._nbytes[key.kind] = nbytes

    def forget(self, key: Key) -> None:
        """The item is not needed again; if it has not begun to leave, it need not."""
        index = bisect_left(self._kept, _place(key))
        if index < len(self._kept) and self._kept[index] == _place(key):
            del self._kept[index]
        if self._arrived == key:
            self._arrived = None
        if key in self.out.queue:
            self.out.queue.remove(key)
            self._left(key)

    def start(self, now: float, is_resident: Callable[[Key], bool]) -> None:
        """Begin what can begin."""
        self.out.start_next(now)
        if self.below is None or self._arrived is not None or self.back.current is not None:
            return
        index = bisect_left(self._kept, (self.below, False)) - 1
        if index < 0 or self.in_use >= self.buffers:
            return
        step, is_block = self._kept[index]
        key = Key(Kind.RESIDUALS if is_block else Kind.SNAPSHOT, step)
        if is_resident(key) and self.is_here(key):
            self._bring(key, now)

    def has(self, key: Key) -> bool:
        """Whether the item is on the device again."""
        return self._arrived == key

    def ask(self, key: Key, now: float) -> None:
        """Compute waits for this item: it comes next."""
        self.below = self._arrived = None
        if self.back.current is None and self.is_here(key):
            self._bring(key, now)

    def take(self) -> None:
        """Compute has the item that has come."""
        self._arrived = self.below = None

    def complete(self, channel: Channel, key: Key) -> None:
        """A copy has ended."""
        self._bytes["out" if channel is self.out else "in"] += self._nbytes[key.kind]
        if channel is self.out:
            self._left(key)
        else:
            self._arrived = key

    def figures(self) -> LinkFigures:
        """So far."""
        return LinkFigures(
            bytes_out=self._bytes["out"],
            bytes_in=self._bytes["in"],
            out_seconds=self.out.busy,
            in_seconds=self.back.busy,
        )

    def _bring(self, key: Key, now: float) -> None:
        self.back.queue.append(key)
        self.back.start_next(now)

    def _left(self, key: Key) -> None:
        self._leaving[key] -= 1
        if not self._leaving[key]:
            del self._leaving[key]


def _place(key: Key) -> tuple[int, bool]:
    """By step; of a snapshot and a block of the same window, the block is wanted first."""
    return key.step, key.kind is Kind.RESIDUALS
