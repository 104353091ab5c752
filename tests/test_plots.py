"""Pictures are drawn, from few spans and from many, and their sums are exact."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from longtape import plots
from longtape.errors import UsageError
from longtape.report import Quantities, Report

PNG = b"\x89PNG"


@dataclass
class FakeTrace:
    """The spans of a run whose every step stores its state, and fetches it again."""

    steps: int
    spans: list[tuple[str, float, float]] = field(default_factory=list)
    levels: list[tuple[float, int, int]] = field(default_factory=list)
    turned_at: float | None = None

    def __post_init__(self) -> None:
        for step in range(self.steps):
            self.spans += [
                ("forward", step, step + 0.9),
                ("copy", step + 0.9, step + 1),
                ("write", step + 0.5, step + 1.4),
            ]
            self.levels.append((step + 1, 1 << 20, step << 20))
        self.turned_at = float(self.steps)
        for step in range(self.steps):
            began = self.steps + 3.0 * step
            self.spans += [("read", began - 0.5, began + 0.3), ("wait", began, began + 0.3)]
            self.spans += [("replay", began + 0.3, began + 1), ("reverse", began + 1, began + 3)]
            self.levels.append((began + 3, 2 << 20, (self.steps - 1 - step) << 20))


def report(trace: FakeTrace) -> Report:
    quantities = Quantities(4.0 * trace.steps, 2 << 20, trace.steps << 20, 0, 0, 0, 0.3 * trace.steps)
    return Report(
        title="A test",
        steps=trace.steps,
        schedule="asynchronous",
        window=1,
        slots=2,
        memory_budget_bytes=4 << 20,
        predicted=quantities,
        measured=quantities,
        prepare_seconds=0.1,
        forward_seconds=float(trace.steps),
        reverse_seconds=3.0 * trace.steps,
        forward_stall_seconds=0.0,
        steps_taped_again=trace.steps,
        steps_recorded=0,
        writes=trace.steps,
        reads=trace.steps,
        write_seconds=0.9 * trace.steps,
        read_seconds=0.8 * trace.steps,
        overlap_fraction=0.8,
        direct_io=True,
        faults=(),
        notes=(),
    )


@pytest.mark.parametrize("steps", [5, 3000])
def test_a_timeline_is_drawn_from_few_and_from_many_spans(steps: int, tmp_path: Path) -> None:
    trace = FakeTrace(steps)
    plots.timeline(trace, tmp_path / "run.png", report=report(trace))
    assert (tmp_path / "run.png").read_bytes().startswith(PNG)


def test_a_window_of_a_timeline_is_drawn_without_a_report(tmp_path: Path) -> None:
    plots.timeline(FakeTrace(50), tmp_path / "window.svg", window=(10.0, 20.0))
    text = (tmp_path / "window.svg").read_text()
    assert text.lstrip().startswith("<?xml")


def test_an_empty_window_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="nothing happened"):
        plots.timeline(FakeTrace(5), tmp_path / "none.png", window=(1000.0, 2000.0))
    assert not (tmp_path / "none.png").exists()


def test_drawing_touches_no_global_figure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)  # importing it fails
    plots.timeline(FakeTrace(5), tmp_path / "run.png")
    assert (tmp_path / "run.png").stat().st_size


def test_time_against_memory_is_drawn(tmp_path: Path) -> None:
    candidates = [
        plots.Candidate(family, 2.0**k, 100.0 / k) for family in ("revolve", "asynchronous") for k in (20, 25, 30)
    ]
    plots.time_against_memory(candidates, candidates[4], tmp_path / "choice.png", ideal_seconds=3.0)
    assert (tmp_path / "choice.png").read_bytes().startswith(PNG)


def test_without_matplotlib_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"longtape\[plot\]"):
        plots.timeline(FakeTrace(5), tmp_path / "run.png")


def test_merging_counts_overlaps_once() -> None:
    union = plots._merge([np.array([[0.0, 2.0], [5.0, 6.0]]), np.array([[1.0, 3.0], [6.0, 7.0]])])
    assert union.tolist() == [[0.0, 3.0], [5.0, 7.0]]


def test_the_shares_of_the_columns_add_up_to_the_time_spent() -> None:
    rng = np.random.default_rng(0)
    edges = np.sort(rng.uniform(0, 10, 400)).reshape(-1, 2)
    columns = np.linspace(0, 10, 38)
    shares = np.diff(plots._busy_until(edges, columns))
    assert shares.sum() == pytest.approx(np.diff(edges).sum())
    brute = [np.clip(edges[:, 1], a, b).sum() - np.clip(edges[:, 0], a, b).sum() for a, b in pairwise(columns)]
    assert shares == pytest.approx(brute)


def test_a_short_peak_survives_the_columns() -> None:
    times = np.array([0.0, 5.0, 5.0001])
    low, high, _ = plots._envelope(times, np.array([1.0, 9.0, 1.0]), 0.0, 10.0)
    assert high.max() == 9.0
    assert np.sort(high)[-2] == 1.0
    assert low[1:].min() == 1.0


def test_a_device_has_lanes_for_its_link(tmp_path: Path) -> None:
    trace = FakeTrace(4)
    plots.timeline(trace, tmp_path / "without.svg")
    trace.spans += [("out", 0.1, 0.4), ("in", 5.0, 5.2), ("idle", 5.0, 5.1)]
    plots.timeline(trace, tmp_path / "with.svg")
    assert "link out" in (tmp_path / "with.svg").read_text()
    assert "link out" not in (tmp_path / "without.svg").read_text()
