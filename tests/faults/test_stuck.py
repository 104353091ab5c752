"""Storage that does not answer: the sweep goes on without it, in bounded time."""

import time
from contextlib import closing

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from models import Chaotic, OutOfPlace, Spanning

from longtape.testing.tiers import GatedTier
from longtape.tiers.memory import MemoryTier
from tests.faults.sweeps import impatient, run


class Jamming(GatedTier):
    """The n-th transfer, and all after it, wait at the gate until it is opened."""

    def __init__(self, jams_at, holds=("write", "read")):
        super().__init__(MemoryTier(), is_open=True, holds=holds)
        self._left = jams_at
        self._kinds = holds

    def write(self, key, data):
        self._count("write")
        super().write(key, data)

    def read(self, key, out):
        self._count("read")
        super().read(key, out)

    def _count(self, operation):
        if operation in self._kinds:
            self._left -= 1
            if self._left < 0:
                self.shut()


@pytest.mark.parametrize("kind", [Chaotic, OutOfPlace, Spanning])
@pytest.mark.parametrize("holds", [("write",), ("read",), ("write", "read")])
def test_whenever_it_jams(monkeypatch, kind, holds):
    impatient(monkeypatch, 0.05)
    for at in (0, 1, 2, 5, 9, 14):
        with closing(Jamming(at, holds)) as tier:
            began = time.monotonic()
            report = run(kind=kind, tier=tier).report
            assert time.monotonic() - began < 3.0
        assert report.measured.stall_seconds < 1.0


@pytest.mark.parametrize("holds", [("write",), ("read",)])
def test_it_jams_while_it_is_tried(monkeypatch, holds):
    impatient(monkeypatch, 0.1)
    with closing(Jamming(0, holds)) as tier:
        report = run(tier=tier, probing=True).report
    assert "no answer" in report.faults[0]
    assert report.schedule in ("revolve", "store_all")


def test_a_jam_that_dissolves_in_between(monkeypatch):
    """What is stuck at the turn answers later: its memory and its room are used again."""
    impatient(monkeypatch, 0.02)
    for at in (3, 6, 9):
        tier = Jamming(at, ("write",))

        def open_gate(sweep, tier=tier):
            tier._left = 10**9
            tier.open()

        with closing(tier):
            run(tier=tier, between=open_gate, steps=60)


@settings(max_examples=40, deadline=None)
@given(
    kind=st.sampled_from([Chaotic, OutOfPlace]),
    slots=st.integers(3, 8),
    steps=st.integers(2, 40),
    at=st.integers(0, 20),
    held=st.lists(st.integers(1, 3), max_size=6),
)
def test_interleavings(kind, slots, steps, at, held):
    """The gate opens a little whenever an action ends, by counts that are drawn."""
    tier = Jamming(at)
    counts = iter([*held * 1000])

    class Opener:
        def on_action(self, action, began, ended):
            tier.let(next(counts, 1))

        def on_transfer(self, kind, key, nbytes, began, ended):
            pass

    # While the plan waits no action ends: the last ones come by a count that is large enough.
    def flood(sweep):
        tier.let(10_000)

    with closing(tier):
        report = run(kind=kind, slots=slots, steps=steps, tier=tier, observers=[Opener()], between=flood).report
    assert not report.faults
