"""Where the parts of an item lie in its bytes."""

from __future__ import annotations

from collections.abc import Sequence

from longtape.protocols import Bytes

_FIELD_ALIGNMENT = 64
"""So that every part can be viewed as any dtype, and starts on a cache line."""


class Fields:
    """Parts of given sizes, one after the other, each aligned.

    A single part is not padded, so that a state of one array takes exactly its bytes.
    """

    def __init__(self, sizes: Sequence[int]) -> None:
        self.sizes = list(sizes)
        self.offsets: list[int] = []
        end = 0
        for size in self.sizes:
            start = -(-end // _FIELD_ALIGNMENT) * _FIELD_ALIGNMENT
            self.offsets.append(start)
            end = start + size
        self.nbytes = end

    def split(self, data: Bytes) -> list[Bytes]:
        """Views of the parts."""
        return [data[start : start + size] for start, size in zip(self.offsets, self.sizes, strict=True)]
