"""The copies that a simulated machine has under way: to storage and back, to a device and back.

Owns when a copy over the link of a device may begin.  Whatever leaves or comes goes through a
few staging buffers on the device.  One that an item leaves from is free again when the item is
in the host's memory; one that an item came into, when compute has taken it.

What comes in ahead of compute, from the moment that an adjoint is taken, is what a reverse
sweep needs next: the highest item kept below it, and if that is a block, further blocks above
the next snapshot; each as soon as it is in the host's memory, and one buffer is left to keep
things with.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Callable
from dataclasses import dataclass, field
from math import inf
from typing import TypedDict

from longtape.actions import Key, Kind
from longtape.plan.costs import BLOCKS_AHEAD

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
    """Both ways between a device and the host's memory.

    Args:
        out: Seconds of an item from the device.
        back: Seconds of an item to the device.
        buffers: On the device, for items either way.
    """

    def __init__(self, out: Duration, back: Duration, buffers: int) -> None:
        self.out, self.back = Channel(out), Channel(back)
        self.below: int | None = None
        """Where the adjoint will stand when the next item is wanted; None until one is taken."""
        self.in_use = 0
        """Buffers from which a window is being pulled back."""
        self._buffers = buffers
        self._leaving: dict[Key, int] = {}
        self._kept: list[tuple[int, bool]] = []
        self._arrived: list[Key] = []
        self._bytes = {"out": 0, "in": 0}
        self._nbytes: dict[Kind, int] = {}

    def _taken(self) -> int:
        under_way = len(self.out.queue) + (self.out.current is not None) + (self.back.current is not None)
        return under_way + len(self._arrived) + self.in_use

    def is_full(self) -> bool:
        """Whether every buffer holds an item on its way."""
        return self._taken() >= self._buffers

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
        if key in self._arrived:
            self._arrived.remove(key)
        if key in self.out.queue:
            self.out.queue.remove(key)
            self._left(key)

    def start(self, now: float, is_resident: Callable[[Key], bool]) -> None:
        """Begin what can begin."""
        self.out.start_next(now)
        if self.below is None or self.back.current is not None or self._taken() >= self._buffers - 1:
            return
        for key in self._wanted(self.below):
            if key not in self._arrived:
                if is_resident(key) and self.is_here(key):
                    self._bring(key, now)
                return

    def _wanted(self, below: int) -> list[Key]:
        index, found = bisect_left(self._kept, (below, False)), list[Key]()
        while index and len(found) < BLOCKS_AHEAD:
            index -= 1
            step, is_block = self._kept[index]
            if not is_block:
                return found or [Key(Kind.SNAPSHOT, step)]
            found.append(Key(Kind.RESIDUALS, step))
        return found

    def has(self, key: Key) -> bool:
        """Whether the item is on the device again."""
        return key in self._arrived

    def ask(self, key: Key, now: float) -> None:
        """Compute waits for this item: it comes next."""
        self.below = None
        self._arrived.clear()
        if self.back.current is None and self.is_here(key) and not self.is_full():
            self._bring(key, now)

    def take(self, key: Key) -> None:
        """Compute has the item now."""
        self._arrived.remove(key)
        self.below = None

    def complete(self, channel: Channel, key: Key) -> None:
        """A copy has ended."""
        self._bytes["out" if channel is self.out else "in"] += self._nbytes[key.kind]
        if channel is self.out:
            self._left(key)
        else:
            self._arrived.append(key)

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
