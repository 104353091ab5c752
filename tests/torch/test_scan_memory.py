"""What a scan holds: within the budget by its own count, and by that of the operating system."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from scan_steps import Case, assert_same, leaf, plain

from longtape.torch import scan

MIB = 1 << 20

LONG_LSTM = """
import json, resource, sys
import torch
from longtape.torch import scan

torch.set_num_threads(1)
torch.manual_seed(0)
budget, disk, capture = int(sys.argv[1]), sys.argv[2] or None, sys.argv[3] == "True"
cell = torch.nn.LSTMCell(16, 512)

class Inputs:
    def __len__(self):
        return int(sys.argv[4])

    def __getitem__(self, k):
        return torch.full((16, 16), (k % 7) / 7)

def run(steps_of):
    reports = []
    start = (torch.zeros(16, 512), torch.zeros(16, 512))
    carry, _ = scan(lambda c, x: (cell(x, c), None), start, steps_of, memory=budget, disk=disk, capture=capture,
                    on_report=reports.append)
    carry[0].sum().backward()
    return reports[0]

class Few(Inputs):
    def __len__(self):
        return 8

run(Few())  # what libraries allocate once
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
report = run(Inputs())
grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
print(json.dumps([grown * 1024, report.measured.peak_memory_bytes, list(report.notes)]))
"""


@pytest.mark.slow
@pytest.mark.parametrize(("capture", "disk"), [(False, False), (True, False), (True, True)])
def test_resident_memory_grows_by_no_more_than_the_budget(capture: bool, disk: bool, scratch: Path) -> None:
    budget, steps = 24 * MIB, 2000  # the states alone would take 128 MiB, the residuals four times that
    command = [sys.executable, "-c", LONG_LSTM, str(budget), str(scratch) if disk else "", str(capture), str(steps)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=110, check=False)
    assert result.returncode == 0, result.stderr
    grown, counted, notes = json.loads(result.stdout)
    working_set = 4 * MIB  # the weights' gradients and one step
    assert not notes
    assert counted <= budget
    assert grown <= budget + working_set + 48 * MIB


@pytest.mark.parametrize("step", [lambda h, x: (h * 0.999, None), lambda h, x: (h + x, h.detach())])
def test_a_tape_counts_though_autograd_saves_nothing(step: Any) -> None:
    """A linear step's graph saves no tensor, and yet a tape of many steps holds the carry of each."""
    init, reports = leaf(4, 4096), []
    scan(step, init, torch.zeros(60, 4, 1), memory=8 * 4 * 4096 * 8, capture=False, on_report=reports.append)[
        0
    ].sum().backward()
    assert reports[0].window <= 8


@pytest.mark.parametrize("capture", [False, True])
@pytest.mark.parametrize("states", [1, 2, 3, 7, 40, 1000])
def test_every_budget_gives_the_same_gradients(states: int, capture: bool, tmp_path: Path) -> None:
    weight, init, xs = leaf(64, 64, scale=0.1), leaf(2, 64), leaf(60, 2, 64)
    case = Case(lambda h, x: (torch.tanh(h @ weight + x), h[0, :2]), init, xs, None, [weight])
    state = 2 * 64 * 8
    expected = case.outcome(plain)
    for disk in (None, tmp_path):
        reports: list[Any] = []
        memory = states * state
        assert_same(case.outcome(scan, memory=memory, disk=disk, capture=capture, on_report=reports.append), expected)
        report = reports[0]
        assert report.measured.peak_memory_bytes <= memory
        assert not report.faults
        if capture and states < 3:
            assert "residuals of one step" in report.notes[0]
