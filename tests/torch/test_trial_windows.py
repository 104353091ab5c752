"""Windows that are tried before a scan: nothing of them is left, and storage that fails meanwhile costs time only."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch

from longtape import compose
from longtape.compose import Run
from longtape.measure import _PROBE
from longtape.plan.choose import predict_again
from longtape.plan.predict import predict_revolve
from longtape.testing.tiers import FailingTier
from longtape.tiers.memory import MemoryTier
from longtape.torch import scan

STEPS, UNITS, BATCH = 300, 16, 8


def gradients(tier: Any = None, memory: int = 96 << 10, **settings: Any) -> tuple[list[torch.Tensor], Run]:
    torch.manual_seed(3)
    cell = torch.nn.GRUCell(4, UNITS)
    xs = torch.randn(STEPS, BATCH, 4)
    start = torch.zeros(BATCH, UNITS, requires_grad=True)
    runs: list[Run] = []

    def noting(*arguments: Any, **options: Any) -> Run:
        runs.append(Run(*arguments, **options))
        return runs[-1]

    with mock.patch("longtape.torch.scan.Run", noting):
        carry, _ = scan(
            lambda h, x: (torch.nn.functional.dropout(cell(x, h), 0.1), None),
            start,
            xs,
            memory=memory,
            tier=tier,
            capture=True,
            **settings,
        )
    found = torch.autograd.grad(carry.square().sum(), [start, *cell.parameters()])
    return list(found), runs[0]


@pytest.fixture
def tried(monkeypatch: pytest.MonkeyPatch) -> list[tuple[float, float]]:
    """What trials found; every plan is tried, however short the run."""
    found = []
    measure = compose.measure_windows

    def noting(*args: Any, **kwargs: Any) -> tuple[float, float]:
        found.append(measure(*args, **kwargs))
        return found[-1]

    monkeypatch.setattr(compose, "measure_windows", noting)
    monkeypatch.setattr(compose, "TRIAL_SHARE", 1.0)
    monkeypatch.setattr(compose, "MOST_TRIAL_SECONDS", 0.01)
    return found


def same(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_a_trial_leaves_nothing_behind(tried: list[tuple[float, float]], monkeypatch: pytest.MonkeyPatch) -> None:
    ours, run = gradients(MemoryTier())
    assert run.report.schedule == "residuals"
    assert len(tried) == 1
    assert run.costs.record == tried[0][0]
    assert run.costs.pull_back == tried[0][1]
    again = predict_again(run.choice, run._problem(), run.costs)
    assert run.choice.prediction.time_seconds == pytest.approx(again.time_seconds)
    assert run.choice.prediction.ideal_seconds == pytest.approx(again.ideal_seconds)
    monkeypatch.setattr(compose, "TRIAL_SHARE", 0.0)
    theirs, _ = gradients(MemoryTier())
    assert len(tried) == 1
    assert same(ours, theirs)


def test_a_plan_in_memory_alone_is_tried_too(tried: list[tuple[float, float]]) -> None:
    _, run = gradients()
    assert run.report.schedule == "revolve"
    assert run.costs.record == tried[0][0]
    again = predict_revolve(run._problem(), run.costs, run.choice.footprint)
    assert run.choice.prediction.time_seconds == pytest.approx(again.time_seconds)


@pytest.mark.parametrize("way", ["write", "read"])
def test_storage_that_fails_in_a_trial_is_done_without(tried: list[tuple[float, float]], way: str) -> None:
    blocks = 0

    def fails(call: Any) -> bool:
        nonlocal blocks
        # Single items are timed first, of two sizes and three times each.
        blocks += call.operation == way and call.key == _PROBE
        return blocks > 6

    with pytest.warns(RuntimeWarning, match="goes on without"):
        ours, run = gradients(FailingTier(MemoryTier(), fails))
    assert not tried
    assert run.report.schedule == "revolve"
    assert "storage does not work" in run.report.faults[0]
    theirs, _ = gradients(MemoryTier())
    assert same(ours, theirs)
