"""Scans on a simulated device, of any kind, by any plan, with copies that come at any time."""

from __future__ import annotations

import random
import tempfile
from collections import Counter
from contextlib import ExitStack
from functools import cache
from typing import Any
from unittest import mock

import torch
from scan_steps import Case, attention, dropout, leaf, plain
from simulated import Delay, plan, simulated, storing_everything
from torch import Tensor, nn

from longtape.plan.choose import choose
from longtape.testing.device import at_once, drawn, when_wanted
from longtape.torch import scan


def long_lstm(steps: int) -> Case:
    cell = nn.LSTMCell(3, 5).double()
    step = lambda carry, x: ((new := cell(x, carry)), new[0] * 2)  # noqa: E731
    return Case(step, (leaf(2, 5), leaf(2, 5)), leaf(steps, 2, 3), None, list(cell.parameters()))


def long_dropout(steps: int) -> Case:
    case = dropout()
    return Case(case.step, case.init, leaf(steps, 2, 6), None, case.parameters)


def long_attention(steps: int) -> Case:
    case = attention()
    return Case(case.step, case.init, leaf(steps, 2, 3, 8), None, case.parameters)


def gated(steps: int) -> Case:
    """Like a GRU, with a counter beside the state, updated in place."""
    weights = [leaf(4, 4) for _ in range(3)]

    def step(carry: tuple[Tensor, Tensor], x: Tensor) -> tuple[tuple[Tensor, Tensor], Tensor]:
        h, count = carry
        update, reset = torch.sigmoid(h @ weights[0] + x), torch.sigmoid(h @ weights[1] - x)
        new = update * h + (1 - update) * torch.tanh((reset * h) @ weights[2] + x)
        return (new, count + 1), new.sum() * count

    return Case(step, (leaf(3, 4), torch.tensor(1)), leaf(steps, 3, 4), None, weights)


KINDS = {"lstm": long_lstm, "gated": gated, "dropout": long_dropout, "attention": long_attention}
LENGTHS = (1, 2, 9, 24, 33)
STATE_NBYTES = {"lstm": 256, "gated": 256, "dropout": 5300, "attention": 5500}
"""About; random states included."""


@cache
def case_of(kind: str, steps: int) -> tuple[Case, list[Tensor | None]]:
    """A case, and what the plain loop makes of it."""
    torch.manual_seed(len(kind) + steps)
    case = KINDS[kind](steps)
    return case, case.outcome(plain)


def draw_plan(chance: random.Random, steps: int, capture: bool, disk: bool) -> Any:
    """The real planner, or one that says something odd."""
    kind = chance.choice(("chosen", "chosen", "revolve", "inner", "stored", "recorded"))
    window = min(steps, chance.choice((1, 1, 2, 3, 5)))
    if kind == "chosen":
        return choose
    if kind == "stored" and disk:
        inner = chance.choice((0, 0, 1, 2))
        slots = chance.randint(2, 4)
        return plan("asynchronous", window=window, slots=slots, device_slots=inner, spacing=chance.randint(1, 3))
    if kind == "recorded" and capture and disk:
        return plan("residuals", window=window, slots=2, blocks=chance.randint(2, 4), fraction=1.0, stores=True)
    if kind == "recorded" and capture:
        return storing_everything(window)
    return plan(
        "revolve",
        window=window,
        slots=chance.randint(1, 16),
        device_slots=chance.randint(1, 3) if kind == "inner" else 0,
    )


def attempt(chance: random.Random, seen: Counter[str] | None = None) -> None:
    """One scan; raises unless it gives the plain loop's bits within its budget, and leaves nothing."""
    kind, steps = chance.choice(list(KINDS)), chance.choice(LENGTHS)
    capture, disk, verify = chance.random() < 0.5, chance.random() < 0.4, chance.random() < 0.2
    case, expected = case_of(kind, steps)
    planner = draw_plan(chance, steps, capture, disk)
    state = STATE_NBYTES[kind]
    memory = state * chance.choice((4, 5, 6, 8, 30)) if planner is choose else 1 << 20
    host = state * chance.randint(1, 30) if planner is choose else 1 << 20
    delay: Delay = chance.choice((at_once, when_wanted, drawn(chance.getrandbits(30)), drawn(chance.getrandbits(30))))
    options: dict[str, Any] = {"memory": memory, "host_memory": host, "capture": capture, "verify": verify}
    plans: list[Any] = []
    reports: list[Any] = []
    with ExitStack() as stack:
        stack.enter_context(mock.patch("longtape.compose.choose", planner))
        stack.enter_context(mock.patch("longtape.torch.job.least_seconds", lambda timed, times: timed()))
        stack.enter_context(mock.patch("longtape.engine.meter.MOST_AHEAD", chance.choice((1, 2, 8))))
        if planner is not choose:  # as few buffers as there may be
            stack.enter_context(mock.patch("longtape.torch.linked.STAGING", chance.choice((2, 3, 4))))
        if disk:
            options["disk"] = stack.enter_context(tempfile.TemporaryDirectory())
        device = stack.enter_context(simulated(delay))
        found = case.outcome(scan, on_plan=plans.append, on_report=reports.append, **options)
    report = reports[-1]
    for ours, theirs in zip(found, expected, strict=True):
        same = ours is theirs if ours is None or theirs is None else torch.equal(ours, theirs)
        zero = all(part is None or not part.any() for part in (ours, theirs))
        if not same and not zero:
            raise AssertionError(f"other bits: {kind}, {steps} steps, {options}, {plans[-1]}")
    assert report.device.pool_bytes <= report.device.budget_bytes, (kind, report.device, plans[-1])
    assert report.measured.peak_memory_bytes <= report.memory_budget_bytes
    assert device.copies >= sum(link.count for link in report.device.links)
    if seen is not None:
        seen[plans[-1].schedule] += 1
        seen["copies"] += sum(link.count for link in report.device.links)
        seen["captured"] += capture
        seen["inner snapshots"] += plans[-1].device_slots > 0
        seen["on the device alone"] += plans[-1].on_device
