"""A small wave equation whose operators write much beside their wavefields, and what plain `apply` makes of it."""

from __future__ import annotations

import functools
import os
import signal
from typing import Any

import devito
import numpy as np
from devito import ConditionalDimension, Eq, Function, Grid, Inc, Operator, SparseTimeFunction, TimeFunction

SHAPE, STEPS, EVERY = (22, 18), 60, 4
TIMES = {"time_m": 1, "time_M": STEPS}
STATE = 2 * 4 * (SHAPE[0] + 4) * (SHAPE[1] + 4)


class Problem:
    """Forward: receivers, an illumination and every fourth wavefield.  Reverse: gradient and adjoint receivers."""

    def __init__(self, *, save: bool = False, levels: int | None = None) -> None:
        devito.configuration["log-level"] = "ERROR"
        grid = Grid(shape=SHAPE, extent=(SHAPE[0] - 1.0, SHAPE[1] - 1.0), dtype=np.float32)
        kept = {"save": STEPS + 2} if save else {"save": devito.Buffer(levels)} if levels else {}
        self.u = u = TimeFunction(name="u", grid=grid, time_order=2, space_order=2, **kept)
        self.v = v = TimeFunction(name="v", grid=grid, time_order=2, space_order=2)
        self.c, self.light, self.grad = (Function(name=name, grid=grid) for name in ("c", "light", "grad"))
        subsampled = ConditionalDimension("ts", parent=grid.time_dim, factor=EVERY)
        self.snaps = TimeFunction(name="snaps", grid=grid, time_order=0, save=STEPS // EVERY + 1, time_dim=subsampled)
        self.src, self.rec, self.residual, self.back = (
            SparseTimeFunction(name=name, grid=grid, npoint=3, nt=STEPS + 2)
            for name in ("src", "rec", "residual", "back")
        )
        for k, points in enumerate((self.src, self.rec, self.residual, self.back)):
            points.coordinates.data[:] = [[4.3 + k, 3.1], [11.7, 8.2 + k], [16.4, 13.9]]
        ahead = 2.0 * u - u.backward + self.c * u.laplace
        behind = 2.0 * v - v.forward + self.c * v.laplace
        self.forward = Operator(
            [
                Eq(u.forward, ahead),
                self.src.inject(field=u.forward, expr=self.src),
                self.rec.interpolate(expr=u),
                Inc(self.light, u**2),
                Eq(self.snaps, u),
            ],
            name="Ahead",
        )
        self.reverse = Operator(
            [
                Eq(v.backward, behind),
                self.residual.inject(field=v.backward, expr=self.residual),
                Inc(self.grad, u * v.laplace),
                self.back.interpolate(expr=v),
            ],
            name="Back",
        )
        self.reset()

    def reset(self) -> None:
        for name in ("u", "v", "light", "grad", "snaps", "rec", "residual", "back"):
            getattr(self, name).data_with_halo[:] = 0
        self.c.data[:] = 0.1 + 0.1 * np.random.default_rng(0).random(SHAPE)
        self.src.data[:] = np.random.default_rng(1).standard_normal(self.src.data.shape)

    def set_residual(self) -> None:
        self.residual.data[:] = 0.5 * self.rec.data

    def outputs(self) -> dict[str, np.ndarray]:
        return {name: np.array(getattr(self, name).data) for name in ("rec", "light", "snaps")}

    def results(self) -> dict[str, np.ndarray]:
        return {**self.outputs(), **{name: np.array(getattr(self, name).data) for name in ("grad", "back")}}

    def sweep(self, **options: Any) -> Any:
        import longtape.devito

        arguments = {"forward_args": TIMES, "reverse_args": TIMES} | options
        return longtape.devito.Sweep(self.forward, self.reverse, [self.u], **arguments)


@functools.cache
def _built(levels: int | None) -> Problem:
    problem = Problem(levels=levels)
    with problem.sweep(memory="64MiB"):  # compiled here, and not in every process that is forked
        return problem


def fresh(levels: int | None = None) -> Problem:
    """Operators take a second to build: those of an earlier test, with everything set as at first."""
    problem = _built(levels)
    problem.reset()
    return problem


@functools.cache
def reference() -> dict[str, np.ndarray]:
    """What plain `apply` gives, with every level of the wavefield saved."""
    problem = Problem(save=True)
    problem.forward.apply(**TIMES)
    problem.set_residual()
    problem.reverse.apply(**TIMES)
    assert all(np.any(array) for array in problem.results().values())
    return problem.results()


def assert_right(found: dict[str, np.ndarray]) -> None:
    """Bit for bit."""
    expected = reference()
    wrong = [name for name, array in found.items() if not np.array_equal(array, expected[name])]
    assert not wrong


def run_both(problem: Problem, sweep: Any) -> None:
    sweep.forward()
    problem.set_residual()
    sweep.reverse()


class Killer:
    """An observer that ends the process after so many runs of steps, or adjoints.

    Points under way are durable by then.
    """

    def __init__(self, phase: str, at: int) -> None:
        self.phase, self.at = phase, at
        self.seen = {"forward": 0, "reverse": 0}
        self.sweep: Any = None

    def on_action(self, action: Any, began: float, ended: float) -> None:
        attempt = self.sweep._run._keeper._attempt
        if attempt is not None:
            attempt.done.wait(30.0)
        name = type(action).__name__
        self.seen["forward"] += name in ("Advance", "Record")
        self.seen["reverse"] += name in ("Reverse", "PullBack")
        if name in ("Advance", "Record", "Reverse", "PullBack") and self.seen[self.phase] == self.at:
            os.kill(os.getpid(), signal.SIGKILL)

    def on_transfer(self, kind: str, key: Any, nbytes: int, began: float, ended: float) -> None:
        pass
