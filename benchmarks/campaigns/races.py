"""Interleavings of compute, writer and reader."""

from __future__ import annotations

import random
from typing import Any


def races(count: int, chance: random.Random) -> dict[str, Any]:
    """Interleavings of compute, writer and reader, drawn by Hypothesis; see `tests/faults/test_scripted.py`."""
    from hypothesis import HealthCheck, given, seed, settings

    from tests.faults.test_scripted import attempt, cases

    tried = 0

    @seed(chance.randrange(1 << 30))
    @settings(max_examples=count, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(cases())
    def search(case: Any) -> None:
        nonlocal tried
        tried += 1
        attempt(case)

    search()
    return {"interleavings": tried, "wrong": 0}
