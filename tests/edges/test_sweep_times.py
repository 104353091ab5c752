"""What a `Sweep` believes of a model's times, and what it costs to find out."""

from __future__ import annotations

import time
import tracemalloc
from typing import Any

import numpy as np
import pytest
from models import Chaotic, OutOfPlace, Recording

import longtape

STATE = 64 + 12


class Clock:
    """Time that passes only where a step says so."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(time, "perf_counter", clock)
    return clock


def ticking(kind: type, clock: Clock, seconds: float, *, first: float = 0.0, record: float = 0.0) -> Any:
    """A model whose steps take so long, the very first call of all longer."""

    class Ticking(kind):  # type: ignore[misc]
        called = 0

        def spend(self, amount: float) -> None:
            clock.now += amount + (0 if self.called else first)
            self.called += 1

        def advance(self, start: int, stop: int) -> None:
            self.spend((stop - start) * seconds)
            super().advance(start, stop)

        def advance_into(self, step: int, source: Any, target: Any) -> None:
            self.spend(seconds)
            super().advance_into(step, source, target)

        def record(self, step: int, residuals: Any) -> None:
            self.spend(record - seconds)
            super().record(step, residuals)

    for name in ("advance_into", "record"):
        if not hasattr(kind, name):
            delattr(Ticking, name)
    return Ticking()


def believed(sweep: longtape.Sweep) -> longtape.Costs:
    with sweep:
        return getattr(sweep, "costs", None) or sweep._run.costs


@pytest.mark.parametrize("kind", [Chaotic, OutOfPlace, Recording])
@pytest.mark.parametrize("seconds", [5e-6, 1.7e-5, 1e-4, 3e-4, 1e-3, 1.9e-3, 2.1e-3, 1e-2, 4.9e-2, 5e-2])
@pytest.mark.parametrize("steps", [150, 20_000])
def test_a_step_is_believed_to_take_what_it_takes(clock: Clock, kind: type, seconds: float, steps: int) -> None:
    model = ticking(kind, clock, seconds, record=1.5 * seconds)
    costs = believed(longtape.Sweep(model, steps, memory=50 * STATE))
    assert costs.forward == pytest.approx(seconds, rel=0.2)
    assert costs.reverse == pytest.approx(2 * seconds, rel=0.2)
    if kind is Recording:
        assert costs.record == pytest.approx(1.5 * seconds, rel=0.2)
        assert costs.pull_back == pytest.approx(seconds, rel=0.2)


@pytest.mark.parametrize("seconds", [5e-6, 1e-3, 2e-2])
def test_a_first_call_that_compiles_does_not_count(clock: Clock, seconds: float) -> None:
    costs = believed(longtape.Sweep(ticking(Chaotic, clock, seconds, first=0.2), 150, memory=5 * STATE))
    assert costs.forward == pytest.approx(seconds, rel=0.2)


@pytest.mark.parametrize(("seconds", "tiny"), [(5e-6, True), (5e-3, False)])
def test_only_tiny_steps_are_reversed_in_windows(clock: Clock, seconds: float, tiny: bool) -> None:
    with longtape.Sweep(ticking(Chaotic, clock, seconds), 20_000, memory=300 * STATE) as sweep:
        assert (sweep.plan.window > 1) is tiny


def test_the_predicted_time_is_that_of_the_steps(clock: Clock) -> None:
    with longtape.Sweep(ticking(Chaotic, clock, 1e-4), 1000, memory=1000 * STATE) as sweep:
        assert sweep.plan.prediction.time_seconds == pytest.approx(0.3, rel=0.2)


# What it costs --------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [Chaotic, OutOfPlace, Recording])
@pytest.mark.parametrize(
    ("seconds", "most_steps", "most_seconds"), [(60.0, 1, 60.0), (0.3, 1, 0.3), (0.2, 2, 0.5), (0.04, 8, 0.35)]
)
def test_costly_steps_are_run_once_or_a_few_times(
    clock: Clock, kind: type, seconds: float, most_steps: int, most_seconds: float
) -> None:
    model = ticking(kind, clock, seconds, record=seconds)
    began = clock.now
    with longtape.Sweep(model, 1000, memory=50 * STATE):
        assert clock.now - began <= most_seconds * 1.0001
        assert model.advanced + getattr(model, "recorded", 0) <= most_steps


@pytest.mark.parametrize("compress", [None, "zstd"])
def test_nor_are_they_run_beside_storage(clock: Clock, scratch: Any, compress: str | None) -> None:
    model = ticking(Chaotic, clock, 60.0)
    with longtape.Sweep(model, 1000, memory=50 * STATE, disk=scratch, compress=compress):
        assert model.advanced == 1


@pytest.mark.parametrize(
    "options",
    [
        {"memory": 40 * STATE},
        {"memory": 40 * STATE, "disk": "."},
        {"memory": 5 * STATE},  # Revolve, whatever a step takes
        {"memory": 5 * STATE, "costs": longtape.Costs(60.0, 120.0)},
    ],
)
def test_where_nothing_depends_on_it_no_step_is_run(options: dict[str, Any], tmp_path: Any) -> None:
    model = Chaotic()
    if "disk" in options:
        options = options | {"disk": tmp_path}
    with longtape.Sweep(model, 40, **options) as sweep:
        assert model.advanced == 0
        sweep.forward()
        assert model.advanced == 40
        model.start_adjoint()
        sweep.reverse()
    assert model.advanced >= 40


def test_costly_steps_are_asked_for_one_by_one(clock: Clock) -> None:
    model, asked = ticking(Chaotic, clock, 0.06), []
    with longtape.Sweep(model, 100, memory=5 * STATE) as sweep:
        advance = model.advance
        model.advance = lambda start, stop: (asked.append(stop - start), advance(start, stop))[1]
        sweep.forward()
    assert set(asked) == {1}


@pytest.mark.parametrize("kind", [Chaotic, Recording])
@pytest.mark.parametrize("slots", [2, 3, 4, 10])
def test_trying_steps_and_storage_stays_within_the_budget(scratch: Any, kind: type, slots: int) -> None:
    """Beside the model's own temporaries, of which this one has two."""
    size = 200_000
    model = kind(size)
    model.advance(0, 0)
    nbytes, temporaries = model.state[0].nbytes, 2.5
    tracemalloc.start()
    try:
        longtape.Sweep(model, 1000, memory=slots * (nbytes + 4096), disk=scratch).close()
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak <= (slots + temporaries) * nbytes + (1 << 20)


def test_an_out_of_place_model_takes_two_states_beside_the_budget(scratch: Any) -> None:
    model = OutOfPlace(200_000)
    nbytes = model.state[0].nbytes
    tracemalloc.start()
    try:
        longtape.Sweep(model, 1000, memory=2 * (nbytes + 4096), disk=scratch).close()
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak <= (2 + 2 + 2.5) * nbytes + (1 << 20)


def test_the_state_is_the_first_one_afterwards() -> None:
    model, untouched = Chaotic(), Chaotic()
    with longtape.Sweep(model, 1000, memory=5 * STATE):
        assert all(np.array_equal(a, b) for a, b in zip(model.state, untouched.state, strict=True))
