"""Scans on a simulated device, by plans that are told rather than chosen."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest

from longtape.plan.choice import completed
from longtape.plan.choose import Choice, choose
from longtape.plan.costs import Costs, Problem
from longtape.plan.predict import Prediction
from longtape.testing.device import SimulatedDevice, at_once
from longtape.torch.devices import standing_in

Delay = Callable[[str], float]
NOTHING = Prediction(1.0, 1.0, 0, 0, 0, 0, 0, 0, 0, 0.0)


def plan(
    schedule: str,
    *,
    window: int = 1,
    slots: int = 2,
    blocks: int = 0,
    device_slots: int = 0,
    fraction: float = 0.0,
    spacing: float = 2.0,
    stores: bool = False,
) -> Callable[[Problem, Costs], Choice]:
    """A planner that always says the same; `spacing` is in windows, and `stores` for blocks that go to disk."""

    def told(problem: Problem, costs: Costs) -> Choice:
        steps = problem.steps or 0
        found = Choice(
            schedule=schedule,  # type: ignore[arg-type]
            window=window,
            spacing=spacing * window,
            slots=slots,
            blocks=blocks,
            record_fraction=fraction,
            tail=0 if schedule == "residuals" else steps if schedule in ("revolve", "store_all") else 2 * window,
            stall_spacing=None,
            prediction=replace(NOTHING, writes=1) if stores else NOTHING,
            device_slots=device_slots,
        )
        return completed(found, problem, costs)

    return told


def storing_everything(window: int) -> Callable[[Problem, Costs], Choice]:
    """Residuals of every step in the host's memory."""

    def told(problem: Problem, costs: Costs) -> Choice:
        assert problem.steps is not None
        blocks = -(-problem.steps // window)
        choice = plan("store_all", window=window, slots=1, blocks=blocks, fraction=1.0)(problem, costs)
        return completed(replace(choice, spacing=float(problem.steps)), problem, costs)

    return told


@contextmanager
def simulated(delay: Delay = at_once, **options: Any) -> Iterator[SimulatedDevice]:
    """A device that scans within run on; afterwards nothing of it is pinned any more."""
    with SimulatedDevice(delay, **options) as device:
        with standing_in(device):
            yield device
        assert not device.pinned


def use_plan(monkeypatch: pytest.MonkeyPatch, planner: Callable[[Problem, Costs], Choice] | None) -> None:
    """Have runs planned by this one."""
    monkeypatch.setattr("longtape.compose.choose", planner or choose)


def quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    """Time steps once, which is enough where nobody looks at the times."""
    monkeypatch.setattr("longtape.torch.job.least_seconds", lambda timed, times: timed())
