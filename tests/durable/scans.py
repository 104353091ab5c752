"""Scans that are killed and gone on with; a program of its own, for PyTorch does not like to be forked in use."""

from __future__ import annotations

import sys
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn

from longtape.plan.costs import Costs
from longtape.torch import scan

STEPS, WIDTH = 300, 24


class Problem:
    """A small recurrence with ys, closed-over parameters, and random numbers if asked for."""

    def __init__(self, *, dropout: bool = False, steps: int = STEPS) -> None:
        torch.manual_seed(1)
        self.cell = nn.GRUCell(8, WIDTH)
        self.scale = torch.rand(WIDTH).requires_grad_()
        self.xs = torch.randn(steps, 4, 8).requires_grad_()
        self.init = torch.randn(4, WIDTH).requires_grad_()
        self.dropout = dropout

    def step(self, carry: torch.Tensor, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        carry = self.cell(x, carry) * self.scale
        if self.dropout:
            carry = nn.functional.dropout(carry, 0.1)
        return carry, carry[:, :3] * 2

    def run(self, scanned: Any) -> bytes:
        carry, ys = scanned(self.step, self.init, self.xs)
        loss = carry.square().sum() + (ys**2).mean() * 3
        wanted = [self.init, self.xs, self.scale, *self.cell.parameters()]
        found = [carry, ys, *torch.autograd.grad(loss, wanted), torch.rand(3)]
        return b"".join(t.detach().numpy().tobytes() for t in found)


class Slow:
    """An observer that takes its time, so that there is something to interrupt."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def on_action(self, action: Any, began: float, ended: float) -> None:
        if self.seconds:
            time.sleep(self.seconds)

    def on_transfer(self, *_: Any) -> None:
        pass


def costs(kind: str) -> Costs:
    if kind == "captured":  # residuals are stored
        return Costs(1e-3, 4e-3, 1.1e-3, 2e-3, write_bytes_per_second=1e9, read_bytes_per_second=1e9)
    speed = 4 * WIDTH * 4 / 2e-3
    return Costs(1e-3, 3e-3, write_bytes_per_second=speed, read_bytes_per_second=speed)


def options(kind: str, pause: float) -> dict[str, Any]:
    memory = 400_000 if kind == "captured" else 12 * 4 * WIDTH * 4 + 40_000
    return {"memory": memory, "capture": kind == "captured", "costs": costs(kind), "observers": [Slow(pause)]}


def gradient(
    kind: str,
    directory: str | None,
    seconds: float,
    pause: float = 1e-3,
    *,
    steps: int = STEPS,
    observers: Any = (),
    **more: Any,
) -> tuple[bytes, Any]:
    """The bits of a gradient, and the report; `more` goes to `scan`."""
    reports: list[Any] = []
    problem = Problem(dropout=kind == "random", steps=steps)
    given = {**options(kind, pause), **more}
    given["observers"] = [*given["observers"], *observers]
    planned = given.pop("costs")

    def scanned(step: Any, init: Any, xs: Any) -> Any:
        with _planned(planned):
            return scan(step, init, xs, resume=directory, resume_seconds=seconds, on_report=reports.append, **given)

    bits = problem.run(scanned)
    return bits, reports[0]


class _planned:
    """Has scans planned with given costs, for measured ones would differ from run to run."""

    def __init__(self, planned: Costs) -> None:
        self._planned = planned

    def __enter__(self) -> None:
        from longtape.torch import scan as _  # noqa: F401

        self._module: Any = sys.modules["longtape.torch.scan"]
        self._before = self._module.Settings
        planned = self._planned
        self._module.Settings = lambda *a, **k: self._before(*a, **{**k, "costs": planned})

    def __exit__(self, *_: object) -> None:
        self._module.Settings = self._before


if __name__ == "__main__":
    kind, directory, seconds, out = sys.argv[1:5]
    torch.set_num_threads(1)
    warnings.simplefilter("error", RuntimeWarning)
    found, report = gradient(kind, directory, float(seconds))
    Path(out + ".new").write_bytes(found)
    Path(out + ".txt").write_text(f"{report.resumed_from} {report.durable_points} {report.schedule} {report.faults}")
    Path(out + ".new").rename(out)
