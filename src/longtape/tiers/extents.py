"""Which stretches of the scratch file are taken.

Owns the arithmetic only: no file, no I/O.  Entered by the executor's thread.

Invariants: extents in use never overlap and lie below `end`; every byte below `end`
belongs to exactly one extent, in use or free.
"""

from __future__ import annotations


class Extents:
    """Hands out stretches of a file.  All sizes in bytes; sizes must be positive."""

    def __init__(self) -> None:
        self.end = 0
        """Nothing lies at or beyond this offset."""
        self.in_use = 0
        self.peak = 0
        """The most bytes that were in use at once."""
        self._free: dict[int, list[int]] = {}
        self._fragmented = False

    def reuse(self, size: int) -> int | None:
        """The offset of a free extent of just this size; the one freed last."""
        offsets = self._free.get(size)
        if not offsets:
            return None
        self._count(size)
        return offsets.pop()

    def append(self, size: int) -> int:
        """The offset of a new extent at the end."""
        offset = self.end
        self.end += size
        self._count(size)
        return offset

    def carve(self, size: int) -> int | None:
        """The offset of a piece of a larger free stretch, neighbours taken together; None if there is none.

        For when the file can grow no more.  May lower `end`, so that `append` fits again.
        """
        self._merge()
        larger = [have for have, offsets in self._free.items() if offsets and have >= size]
        if not larger:
            return None
        have = min(larger)
        offset = self._free[have].pop()
        if have > size:
            self._free.setdefault(have - size, []).append(offset + size)
        self._count(size)
        return offset

    def give_back(self, offset: int, size: int) -> None:
        """The extent is free again."""
        self._free.setdefault(size, []).append(offset)
        self.in_use -= size
        self._fragmented = True

    def claim(self, taken: list[tuple[int, int]]) -> None:
        """Begin with these extents in use, as (offset, size); what lies between them is free.

        They must not overlap.  Only for an object that has given nothing out.
        """
        for offset, size in sorted(taken):
            if offset > self.end:
                self._free.setdefault(offset - self.end, []).append(self.end)
            self.end = offset + size
            self._count(size)
        self._fragmented = True

    def _count(self, size: int) -> None:
        self.in_use += size
        self.peak = max(self.peak, self.in_use)

    def _merge(self) -> None:
        """Make one free extent of neighbouring ones, and none of those at the end."""
        if not self._fragmented:
            return
        self._fragmented = False
        stretches: list[list[int]] = []
        for offset, size in sorted((o, size) for size, offsets in self._free.items() for o in offsets):
            if stretches and sum(stretches[-1]) == offset:
                stretches[-1][1] += size
            else:
                stretches.append([offset, size])
        if stretches and sum(stretches[-1]) == self.end:
            self.end = stretches.pop()[0]
        self._free = {}
        for offset, size in reversed(stretches):  # the lowest offset is taken first
            self._free.setdefault(size, []).append(offset)
