"""Sweeps over storage that misbehaves, and what must hold of every one of them."""

from __future__ import annotations

import contextlib
import functools
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from models import Chaotic, store_everything

import longtape
from longtape.compose import Settings
from longtape.plan.costs import Costs

exact = functools.lru_cache(maxsize=256)(store_everything)

SIZE = 2000
"""Numbers in a state: 16 KB, so that padding and headers are small beside it."""


def nbytes(size: int = SIZE) -> int:
    return 64 * -(-8 * size // 64) + 12


def storing_costs(size: int = SIZE) -> Costs:
    """Times with which a plan stores every second state or so."""
    speed = nbytes(size) / 2e-3
    return Costs(1e-3, 2e-3, write_bytes_per_second=speed, read_bytes_per_second=speed)


def impatient(monkeypatch: Any, seconds: float = 0.05) -> None:
    """Have every sweep wait for storage no longer than this."""
    monkeypatch.setattr(
        "longtape.sweep.Settings", lambda *given, **named: replace(Settings(*given, **named), stuck_seconds=seconds)
    )


@functools.cache
def unhurried(kind: type) -> type:
    """The model with steps that take about as long as a transfer, so that storing is worth it."""

    class Unhurried(kind):
        def advance(self, start: int, stop: int) -> None:
            time.sleep(1e-4 * (stop - start))
            super().advance(start, stop)

        def advance_into(self, step: int, source: Any, target: Any) -> None:
            time.sleep(1e-4)
            super().advance_into(step, source, target)

    if not hasattr(kind, "advance_into"):
        del Unhurried.advance_into
    return Unhurried


def run(
    *,
    kind: type = Chaotic,
    steps: int = 30,
    slots: int = 4,
    size: int = SIZE,
    probing: bool = False,
    between: Callable[[longtape.Sweep], None] = lambda sweep: None,
    **options: Any,
) -> longtape.Sweep:
    """One sweep: the right bits, within the budget, and one warning if and only if something failed."""
    model = unhurried(kind)(size)
    costs = None if probing else storing_costs(size)
    memory = slots * nbytes(size)
    with warnings.catch_warnings(record=True) as caught, contextlib.ExitStack() as stack:
        warnings.simplefilter("always")
        sweep = stack.enter_context(longtape.Sweep(model, steps, memory=memory, costs=costs, **options))
        sweep.forward()
        between(sweep)
        model.start_adjoint()
        sweep.reverse()
    report = sweep.report
    assert model.result() == exact(steps, size), f"wrong bits; {report.faults}"
    assert report.measured.peak_memory_bytes <= memory
    told = [str(w.message) for w in caught if w.category is RuntimeWarning]
    assert len(told) == bool(report.faults), f"{told} for {report.faults}"
    assert [w for w in caught if w.category is not RuntimeWarning] == []
    if report.failed_transfers:
        assert report.faults
    return sweep
