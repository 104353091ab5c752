"""Stand-ins for system calls that do less than they were asked."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from itertools import chain, repeat

import numpy as np
import pytest

Fault = int | OSError | None
"""At most so many bytes, an error, or nothing out of the ordinary."""


class Cut:
    """Replaces ``os.pwritev`` or ``os.preadv``; the n-th call meets the n-th fault, later ones none."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, name: str, *faults: Fault) -> None:
        self.real: Callable[..., int] = getattr(os, name)
        self.faults: Iterator[Fault] = chain(faults, repeat(None))
        self.offsets: list[int] = []
        monkeypatch.setattr(os, name, self)

    def __call__(self, fd: int, buffers: Sequence[np.ndarray], offset: int, flags: int = 0) -> int:
        self.offsets.append(offset)
        fault = next(self.faults)
        if isinstance(fault, OSError):
            raise fault
        if fault is None:
            return self.real(fd, buffers, offset)
        parts: list[np.ndarray] = []
        for buffer in buffers:
            part = buffer[: max(0, fault - sum(p.nbytes for p in parts))]
            if part.nbytes:
                parts.append(part)
        return self.real(fd, parts, offset) if parts else 0
