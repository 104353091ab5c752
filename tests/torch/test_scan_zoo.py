"""Steps of many kinds: each scan gives the results and gradients of a plain loop."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from scan_steps import ZOO, Case, assert_same, exact_cases, plain

from longtape.torch import scan


@pytest.fixture(params=ZOO, ids=lambda make: make.__name__)
def case(request: pytest.FixtureRequest) -> Case:
    torch.manual_seed(0)
    make: Callable[[], Case] = request.param
    return make()


@pytest.mark.parametrize("budget", ["least", "plenty"])
def test_a_scan_in_memory_equals_the_plain_loop(case: Case, budget: str) -> None:
    reports: list[Any] = []
    memory = 8192 if budget == "least" else 1 << 24  # a carry, with the state of the random numbers
    got = case.outcome(scan, memory=memory, capture=False, on_report=reports.append)
    assert_same(got, case.outcome(plain))
    assert reports[0].measured.peak_memory_bytes <= memory
    assert not reports[0].notes


def test_a_scan_with_disk_equals_the_plain_loop(case: Case, scratch: Path) -> None:
    got = case.outcome(scan, memory=30_000, disk=scratch, capture=False)
    assert_same(got, case.outcome(plain))


def test_a_captured_scan_equals_the_plain_loop_or_says_why_it_is_not_captured(case: Case, scratch: Path) -> None:
    reports: list[Any] = []
    for memory, disk in ((1 << 24, None), (60_000, scratch)):
        got = case.outcome(scan, memory=memory, disk=disk, capture=True, on_report=reports.append)
        assert_same(got, case.outcome(plain))
        report = reports.pop()
        assert report.measured.peak_memory_bytes <= memory
        if case.captures:
            assert all("last bits" in note for note in report.notes)
            assert report.steps_recorded or disk is not None
        else:
            assert "could not be captured" in report.notes[0]


@pytest.mark.parametrize("width", [16, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", ["lstm", "gru", "residual chain", "Runge-Kutta", "dropout"])
def test_gradients_have_the_bits_of_a_plain_loop_s(name: str, dtype: torch.dtype, width: int, scratch: Path) -> None:
    torch.manual_seed(0)
    case = exact_cases(dtype, width)[name]()
    expected = case.outcome(plain)
    for memory, disk in ((1 << 24, None), (200_000, scratch)):
        reports: list[Any] = []
        got = case.outcome(scan, memory=memory, disk=disk, on_report=reports.append)
        assert_same(got, expected, exact=True)
        if reports[0].notes:
            # On rows of 16 numbers, operators in place round otherwise than on contiguous memory.
            assert (name, dtype, width) == ("gru", torch.float32, 16)
            assert "last bits" in reports[0].notes[0]
