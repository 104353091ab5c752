"""Scans on a simulated device whose copies come at any time."""

from __future__ import annotations

import random
from collections import Counter
from typing import Any


def device(count: int, chance: random.Random) -> dict[str, Any]:
    """Scans of any kind by any plan; see `tests/random_scans.py`.  Each gives the bits of the plain loop."""
    import torch

    from tests.random_scans import attempt

    torch.set_num_threads(1)
    seen: Counter[str] = Counter()
    for _ in range(count):
        attempt(random.Random(chance.getrandbits(40)), seen)
    return {"scans": count, "wrong": 0, **dict(sorted(seen.items()))}
