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
    assert all(cell.simulated <= cell.rival * (1 + 1e-9) for cell in sample)


@pytest.mark.parametrize(("slots", "ratio"), [(2, 100), (2, 1000), (3, 1000), (4, 500), (6, 1000), (8, 500)])
def test_few_stores_for_which_the_sweep_waits_take_what_is_predicted(slots, ratio):
    cell = examine(1000, slots, ratio, 1.0)
    assert abs(cell.error) <= 0.05
    assert cell.simulated <= cell.rival * (1 + 1e-9)


@pytest.mark.parametrize("ratio", [1.25, 1.5])
def test_three_slots_hide_the_reads_of_two_intervals(ratio):
    cell = examine(1000, 3, ratio, 1.0)
    assert cell.simulated <= 1.01 * cell.bound


@pytest.mark.parametrize(("slots", "ratio"), [(64, 1.25), (64, 1.5), (100, 1.25), (100, 1.5)])
def test_many_slots_come_close_to_the_bound_where_storage_is_almost_fast_enough(slots, ratio):
    cell = examine(1000, slots, ratio, 1.0)
    assert cell.simulated <= 1.003 * cell.bound
    assert abs(cell.error) <= 0.003


def test_nothing_is_stored_so_late_that_the_read_below_the_tail_stalls():
    cell = examine(10_000, 32, 33, 2.0)
    assert cell.simulated < cell.rival


def test_the_committed_result_has_its_cells():
    committed = json.loads(RESULT.read_text())
    assert committed["summary"]["cells"] == len(committed["cells"]) >= 1500
    assert committed["summary"]["median_error"] <= 0.01
    assert committed["summary"]["worst_error"] <= 0.1
    assert committed["summary"]["cells_worse_than_a_rival"] == 0
    assert committed["summary"]["cells_2_percent_above_bound"] == 0
    steps, slots, ratio, adjoint, _, predicted, simulated, *_ = committed["cells"][700]
    again = examine(steps, slots, ratio, adjoint)
    assert (again.predicted, again.simulated) == pytest.approx((predicted, simulated))
