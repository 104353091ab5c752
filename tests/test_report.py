"""The report tells what happened, and why."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from models import Chaotic, OutOfPlace

import longtape
from longtape.actions import Action, Advance, Await, Key, Kind, Turn
from longtape.engine.trace import MOST_REPLANS, Trace
from longtape.plan.binomial import advances
from longtape.testing.tiers import ThrottledTier
from longtape.tiers.memory import MemoryTier

SIZE = 500
STATE = 8 * 512 + 12


class Slow(Chaotic):
    """Steps of a fifth of a millisecond."""

    def advance(self, start: int, stop: int) -> None:
        time.sleep(2e-4 * (stop - start))
        super().advance(start, stop)


def run(model: Any, steps: int, **options: Any) -> longtape.Sweep:
    with longtape.Sweep(model, steps, **options) as sweep:
        sweep.forward()
        model.start_adjoint()
        sweep.reverse()
    return sweep


def told(seconds: float) -> longtape.Costs:
    return longtape.Costs(2e-4, 4e-4, write_latency=seconds, read_latency=seconds)


def slow_tier(seconds: float) -> ThrottledTier:
    return ThrottledTier(MemoryTier(), latency=seconds)


def test_transfers_are_told_by_kind() -> None:
    report = run(Slow(SIZE), 200, memory=4 * STATE, tier=slow_tier(1e-3), costs=told(1e-3)).report
    moved = {(found.kind, found.direction): found for found in report.transfers}
    assert moved.keys() == {("snapshot", "write"), ("snapshot", "read")}
    assert moved["snapshot", "write"].count == report.writes
    assert sum(found.nbytes for found in report.transfers if found.direction == "read") == report.measured.bytes_read
    assert moved["snapshot", "write"].seconds >= 1e-3 * report.writes
    assert "snapshots written" in str(report)


def test_residuals_are_told_apart_from_snapshots() -> None:
    torch = pytest.importorskip("torch")
    import longtape.torch as lt

    cell = torch.nn.LSTMCell(8, 8)
    carry = (torch.zeros(2, 8, requires_grad=True), torch.zeros(2, 8))
    reports: list[Any] = []
    out, _ = lt.scan(
        lambda carry, x: (cell(x, carry), None),
        carry,
        torch.ones(600, 2, 8),
        memory=60_000,
        tier=MemoryTier(),
        capture=True,
        on_report=reports.append,
    )
    out[0].sum().backward()
    (report,) = reports
    assert report.schedule == "residuals"
    assert {("residuals", "write"), ("residuals", "read")} <= {(m.kind, m.direction) for m in report.transfers}
    assert sum(moved.count for moved in report.transfers if moved.direction == "write") == report.writes


def test_waiting_has_a_cause() -> None:
    """Reads take ten times longer than the plan was told, so that the reverse sweep waits for snapshots."""
    tier = ThrottledTier(MemoryTier(), read_bytes_per_second=STATE / 20e-3)
    report = run(Slow(SIZE), 100, memory=3 * STATE, tier=tier, costs=told(2e-3)).report
    assert sum(stall.seconds for stall in report.stalls) == pytest.approx(report.measured.stall_seconds)
    worst = report.stalls[0]
    assert (worst.sweep, worst.kind, worst.lacking) == ("reverse", "snapshot", "item")
    assert 0 < worst.longest_seconds <= worst.seconds
    assert worst.longest_at <= report.measured.seconds
    assert "in the reverse sweep for a snapshot not read yet" in str(report)
    assert report.forward_stall_seconds == 0


def watched(actions: list[tuple[Action, float]], spacing: Any = None) -> Trace:
    trace, now = Trace(0.0, lambda: (0, 0), spacing), 0.0
    for action, seconds in actions:
        trace.on_action(action, now, now + seconds)
        now += seconds
    return trace


def test_causes_are_told_by_sweep_kind_and_what_is_lacking() -> None:
    trace = watched(
        [
            (Await(room=Kind.RESIDUALS), 1.0),
            (Turn(), 0.0),
            (Await(Key(Kind.RESIDUALS, 3)), 2.0),
            (Await(Key(Kind.RESIDUALS, 2)), 4.0),
            (Await(room=Kind.SNAPSHOT), 8.0),
        ]
    )
    found = {tuple(cause): (wait.count, wait.seconds, wait.longest_at) for cause, wait in trace.waits.items()}
    assert found == {
        ("forward", "residuals", "slot"): (1, 1.0, 0.0),
        ("reverse", "residuals", "item"): (2, 6.0, 3.0),
        ("reverse", "snapshot", "slot"): (1, 8.0, 7.0),
    }


def test_a_spacing_that_changes_by_half_is_a_new_plan() -> None:
    spacings = iter([10.0, 11.0, 14.0, 16.0, 16.0, 9.0, 9.0])
    trace = watched([(Advance(k, k + 1), 1.0) for k in range(6)], lambda: next(spacings))
    assert [(change.step, change.spacing_before, change.spacing_after) for change in trace.replans] == [
        (3, 10.0, 16.0),
        (5, 16.0, 9.0),
    ]


def test_changes_are_counted_but_only_the_first_are_kept() -> None:
    values = iter([1.0, *(1.0 + 9.0 * (k % 2) for k in range(1, 301))])
    trace = watched([(Advance(k, k + 1), 1.0) for k in range(300)], lambda: next(values))
    assert trace.replan_count > MOST_REPLANS == len(trace.replans)


class Slower(Chaotic):
    """Steps of a millisecond."""

    def advance(self, start: int, stop: int) -> None:
        time.sleep(1e-3 * (stop - start))
        super().advance(start, stop)


def test_a_disk_slower_than_told_shows_as_a_new_spacing() -> None:
    costs = longtape.Costs(1e-3, 2e-3, write_latency=4e-3, read_latency=4e-3)
    report = run(Slower(SIZE), 1000, memory=6 * STATE, tier=slow_tier(80e-3), costs=costs).report
    assert report.replan_count >= 1
    # One transfer may change the mean by a limited factor only, so that the disk is believed in several changes.
    assert report.replans[-1].spacing_after > 3 * report.replans[0].spacing_before
    assert all(0 < change.step <= 1000 for change in report.replans)
    assert "replanned at step" in str(report)


def test_recomputing_is_set_beside_the_optimum() -> None:
    report = run(OutOfPlace(), 300, memory=5 * (64 + 12)).report
    assert report.revolve_steps_recomputed == advances(301, 5) - 300 == report.measured.steps_recomputed
    assert report.simulated is not None
    assert report.simulated.steps_recomputed == report.measured.steps_recomputed
    assert report.simulated.peak_memory_bytes == report.measured.peak_memory_bytes
    assert report.simulated.seconds <= report.measured.seconds


def test_a_replay_that_takes_too_long_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("longtape.retrospect.REPLAY_SECONDS", 0.0)
    monkeypatch.setattr("longtape.retrospect.REPLAY_SHARE", 0.0)
    monkeypatch.setattr("longtape.retrospect.LEAST_REPLAY_SECONDS", 1e-9)
    assert run(Slow(SIZE), 400, memory=6 * STATE, tier=slow_tier(1e-3), costs=told(1e-3)).report.simulated is None


def test_with_storage_the_replayed_plan_is_near_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("longtape.retrospect.LEAST_REPLAY_SECONDS", 10.0)  # however slow this machine is
    report = run(Slow(SIZE), 400, memory=6 * STATE, tier=slow_tier(1e-3), costs=told(1e-3)).report
    assert report.simulated is not None
    # The model knows no cost of the executor, nor other work of the machine.
    assert 0.4 * report.measured.seconds < report.simulated.seconds < 1.1 * report.measured.seconds
    assert report.measured.steps_recomputed < report.revolve_steps_recomputed


def test_a_long_run_of_tiny_steps_is_not_replayed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("longtape.retrospect.simulate", None)  # not even begun
    costs = longtape.Costs(1e-9, 2e-9)
    assert run(Chaotic(), 20_000, memory=200 * 80, costs=costs).report.simulated is None


def test_reports_as_json_lines(tmp_path: Path) -> None:
    path = tmp_path / "runs.jsonl"
    for steps in (10, 20):
        run(Chaotic(), steps, memory=400).report.append_to(path)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["steps"] for line in lines] == [10, 20]
    assert {"predicted", "measured", "simulated", "transfers", "stalls", "replans", "faults"} <= lines[0].keys()


class Steady(OutOfPlace):
    reverse_seconds = 3e-3


def test_a_model_may_say_what_its_adjoint_takes() -> None:
    with longtape.Sweep(Steady(), 100, memory=100 * 80) as sweep:
        assert sweep.plan.prediction.time_seconds == pytest.approx(0.3, rel=0.1)
    assert not [note for note in run(Steady(), 20, memory=400).report.notes if "predicted as if" in note]
    assert [note for note in run(Chaotic(), 200, memory=400).report.notes if "predicted as if" in note]


@pytest.mark.parametrize("seconds", [0, -1.0, float("nan"), "long", True])
def test_an_adjoint_takes_a_time(seconds: Any) -> None:
    model = Chaotic()
    model.reverse_seconds = seconds
    with pytest.raises(longtape.UsageError, match="reverse_seconds"):
        longtape.Sweep(model, 10, memory=400)


@pytest.mark.parametrize("seconds", [0, -1.0, float("nan")])
def test_storage_must_be_given_some_time(seconds: float) -> None:
    with pytest.raises(longtape.UsageError, match="stuck_seconds"):
        longtape.Sweep(Chaotic(), 10, memory=400, stuck_seconds=seconds)


def test_an_observer_that_raises_stops_the_run_and_leaves_nothing(scratch: Path) -> None:
    class Broken:
        def on_action(self, action: Action, began: float, ended: float) -> None:
            if isinstance(action, Turn):
                raise ZeroDivisionError("mine")

        def on_transfer(self, *_: Any) -> None:
            pass

    with pytest.raises(ZeroDivisionError, match="mine"):
        run(Chaotic(), 50, memory=400, disk=scratch, observers=[Broken()])


@settings(max_examples=200, deadline=None)
@given(
    steps=st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), max_size=12),
    transfers=st.lists(st.tuples(st.integers(0, 5), st.integers(1, 5)), min_size=1, max_size=12),
)
def test_overlap_is_the_share_of_transfers_beside_steps(
    steps: list[tuple[int, int]], transfers: list[tuple[int, int]]
) -> None:
    """Counted second by second; each step and write begins so long after the last, and takes so long."""
    trace, stepping, writing = Trace(0.0, lambda: (0, 0)), set[int](), set[int]()
    for began, ended in laid_out(steps):
        trace.on_action(Advance(began, began + 1), began, ended)
        stepping.update(range(began, ended))
    for began, ended in laid_out(transfers):
        trace.on_transfer("write", Key(Kind.SNAPSHOT, began), 1, began, ended)
        writing.update(range(began, ended))
    assert trace.overlap_fraction() == pytest.approx(len(stepping & writing) / len(writing))


def laid_out(spans: list[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    now = 0
    for gap, length in spans:
        yield now + gap, now + gap + length
        now += gap + length
