"""A clock that the test controls, and costs that vary about a known value."""

from __future__ import annotations

import random
import threading
import time

import pytest

TRUE_SECONDS = [5e-6, 1e-4, 2e-3, 5e-2]
SPIKES = range(12)
"""Which of the calls takes ten times as long."""


class Clock:
    """Stands still but for what is spent."""

    def __init__(self) -> None:
        self._now, self._lock = 0.0, threading.Lock()

    def __call__(self) -> float:
        return self._now

    def spend(self, seconds: float) -> None:
        with self._lock:
            self._now += seconds


class Varying:
    """A cost of which each time differs by up to a tenth, and one is ten times as high."""

    def __init__(self, seconds: float, spike: int | None = None) -> None:
        self.seconds, self._spike, self._calls = seconds, spike, 0
        self._chance = random.Random(spike)

    def __call__(self) -> float:
        times = 10.0 if self._calls == self._spike else self._chance.uniform(0.9, 1.1)
        self._calls += 1
        return times * self.seconds


def controlled(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """Everything that is timed is timed by this clock."""
    clock = Clock()
    monkeypatch.setattr(time, "perf_counter", clock)
    monkeypatch.setattr("longtape.measure.perf_counter", clock)
    return clock


def near(true: float) -> object:
    """Within 20 % of the true value, or half a microsecond."""
    return pytest.approx(true, rel=0.2, abs=5e-7)
