"""A sample of the grid of plans against the event model, and its committed result."""

import json

import pytest

from benchmarks.grid import RESULT, cells, examine, summary


@pytest.fixture(scope="module")
def sample():
    return [examine(*cell) for cell in cells(quick=True)]


def test_predictions_are_close(sample):
    figures = summary(sample)
    assert figures["median_error"] <= 0.01
    assert figures["worst_error"] <= 0.1


def test_plans_are_not_worse_than_the_others(sample):
    assert all(cell.simulated <= 1.001 * cell.rival for cell in sample if cell.ratio * cell.slots < cell.steps)


def test_the_committed_result_has_its_cells():
    committed = json.loads(RESULT.read_text())
    assert committed["summary"]["cells"] == len(committed["cells"]) >= 1500
    assert committed["summary"]["median_error"] <= 0.01
    steps, slots, ratio, adjoint, _, predicted, simulated, *_ = committed["cells"][700]
    again = examine(steps, slots, ratio, adjoint)
    assert (again.predicted, again.simulated) == pytest.approx((predicted, simulated))
