"""Runs inside a memory limit."""

from __future__ import annotations

import contextlib
import os
import random
import resource
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import common
from benchmarks.campaigns import ROOT

GROUP = Path("/sys/fs/cgroup")


STATE = 8 << 20
SCANS = {"scan": False, "captured scan": True}
"""By name: whether the step is captured."""


def limit(count: int, chance: random.Random) -> dict[str, Any]:
    """Runs in a control group that allows baseline + budget + working set + 64 MiB, and no page more."""
    outcomes = []
    for budget_mib in (64, 128)[: max(1, count)]:
        for what in ("sweep", *SCANS):
            for how in ("disk", "resume"):
                outcomes.append(_limited(what, budget_mib << 20, how))
    return {"runs": outcomes}


def _limited(what: str, budget: int, how: str) -> dict[str, Any]:
    baseline, working = common.apart(_baseline, what)
    allowed = baseline + budget + working + (64 << 20)
    kind, path = _make_group(allowed)
    try:
        report = common.apart(_in_group, str(path) if path else None, allowed, what, budget, how)
    finally:
        if path is not None:
            path.rmdir()
    return {
        "what": what,
        "means": kind,
        "how": how,
        "budget_bytes": budget,
        "baseline_bytes": baseline,
        "working_set_bytes": working,
        "limit_bytes": allowed,
        **report,
    }


def _baseline(what: str) -> tuple[int, int]:
    """Of a process that has what it takes to run steps, and their working set; bytes.

    A scan's is what one of four steps takes beside what the scan itself counts.
    """
    import longtape  # noqa: F401

    if what == "sweep":
        common.reset_peak()
        return common.peak(), 4 * STATE
    import torch

    from longtape.torch import scan

    torch.set_num_threads(1)
    small = torch.ones(8, requires_grad=True)
    carry, _ = scan(_decay, small, torch.zeros(400, 1), memory="4MiB", capture=SCANS[what])
    carry.sum().backward()  # what is imported for a scan, captured or not
    before = common.reset_peak()
    _, report = _scan(what, 64 << 20, {}, steps=4)
    return before, common.peak() - before - report.measured.peak_memory_bytes


def _decay(carry: Any, x: Any) -> tuple[Any, None]:
    return carry * 0.999 + 1e-3, None


def _make_group(allowed: int) -> tuple[str, Path | None]:
    for kind, root, name in (
        ("control group, version 2", GROUP, "memory.max"),
        ("control group, version 1", GROUP / "memory", "memory.limit_in_bytes"),
    ):
        path = root / f"longtape-{os.getpid()}"
        try:
            path.mkdir()
        except OSError:
            continue
        if (path / name).exists():
            with contextlib.suppress(OSError):
                (path / name).write_text(str(allowed))
                return kind, path
        path.rmdir()
    return "RLIMIT_DATA, for there is no memory controller", None


class _Drifting:
    """A state of many megabytes; a step and its adjoint allocate nothing."""

    def __init__(self, nbytes: int) -> None:
        self.state = [np.ones(nbytes // 8)]
        self.adjoint = [np.ones(nbytes // 8)]

    def advance(self, start: int, stop: int) -> None:
        for _ in range(start, stop):
            self.state[0] *= 0.999
            self.state[0] += 1e-3

    def reverse(self, start: int, stop: int) -> None:
        self.adjoint[0] *= 0.999


def _in_group(path: str | None, allowed: int, what: str, budget: int, how: str) -> dict[str, Any]:
    import longtape  # noqa: F401

    if path is None:
        resource.setrlimit(resource.RLIMIT_DATA, (allowed, allowed))
    else:
        Path(path, "cgroup.procs").write_text(str(os.getpid()))
    expected = np.ones(1)
    for _ in range(400):
        expected *= 0.999
    with tempfile.TemporaryDirectory(dir=ROOT) as there:
        gradient, report = _sweep(budget, {how: there}) if what == "sweep" else _scan(what, budget, {how: there})
    assert (gradient == expected[0]).all()
    if path is not None:
        Path(path).parent.joinpath("cgroup.procs").write_text(str(os.getpid()))
    return {
        "schedule": report.schedule,
        "bytes_written": report.measured.bytes_written,
        "peak_resident_bytes": common.peak(),
        "faults": list(report.faults),
        "completed": True,
    }


def _sweep(budget: int, given: Any) -> tuple[Any, Any]:
    import longtape

    model = _Drifting(STATE)
    sweep = longtape.Sweep(model, 400, memory=budget, **given)
    sweep.forward()
    sweep.reverse()
    return model.adjoint[0], sweep.report


def _scan(what: str, budget: int, given: Any, steps: int = 400) -> tuple[Any, Any]:
    import torch

    from longtape.torch import scan

    torch.set_num_threads(1)
    reports: list[Any] = []
    init = torch.ones(STATE // 8, dtype=torch.float64, requires_grad=True)
    carry, _ = scan(
        _decay, init, torch.zeros(steps, 1), memory=budget, capture=SCANS[what], on_report=reports.append, **given
    )
    carry.sum().backward()
    assert init.grad is not None
    return init.grad.numpy(), reports[0]
