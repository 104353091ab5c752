"""The gradient of an acoustic wave equation under Devito: pyrevolve, Longtape and ``save=True`` side by side.

    m u_tt - lap u + damp u_t = source            forward in time
    m v_tt - lap v - damp v_t = residual          back in time;  gradient: -sum_t u v_tt

with Devito's second-order time stepping: a time buffer of three levels, two of which are
the state.  The residual is the recorded data itself.  Each case runs in a process of its
own; both sweeps are timed, building and compiling the operators is not.

    python -m benchmarks.devito_acoustic 2d [--repeats 3] [--disk DIRECTORY]
    python -m benchmarks.devito_acoustic 3d [--repeats 1] [--disk DIRECTORY]
    python -m benchmarks.devito_acoustic 2d 3d --quick

``ideal`` is both operators run once over all times, with nothing kept: no gradient, and
the least time there is.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from benchmarks import common

Field = npt.NDArray[np.float32]
Outcome = dict[str, Any]


@dataclass(frozen=True)
class Size:
    """A grid, its stencil and how many time steps."""

    shape: tuple[int, ...]
    space_order: int
    steps: int
    budgets: tuple[int, ...]
    """Memory for so many states; the first is what pyrevolve takes by default."""


SIZES = {
    "2d": Size((1000, 1000), 8, 1000, (7, 16)),
    "3d": Size((160, 160, 160), 4, 1000, (7,)),
}
QUICK = {
    "2d": Size((120, 120), 8, 100, (5,)),
    "3d": Size((32, 32, 32), 4, 60, (4,)),
}


class Acoustic:
    """Operators and data for one gradient.

    Args:
        shape: Grid points.
        space_order: Of the Laplacian.
        steps: N; the operators run over times 1 … N.
        save: Keep every time level of the forward wavefield.
        levels: Time levels of the buffer of the forward wavefield, in place of Devito's own three.
        damped: Points of the absorbing layer on each side.
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        space_order: int,
        steps: int,
        *,
        save: bool = False,
        levels: int | None = None,
        damped: int = 8,
    ) -> None:
        import devito

        devito.configuration["log-level"] = "ERROR"
        spacing, fast = 10.0, 2.5
        grid = devito.Grid(shape=shape, extent=tuple(spacing * (n - 1) for n in shape), dtype=np.float32)
        self.dt = np.float32(0.4 * spacing / fast / np.sqrt(len(shape)))
        self.steps, times = steps, steps + 2
        m = devito.Function(name="m", grid=grid, space_order=space_order)
        m.data[:] = 1 / 1.5**2
        m.data[..., shape[-1] // 2 :] = 1 / fast**2
        damp = devito.Function(name="damp", grid=grid, space_order=space_order)
        damp.data[:] = _absorbing(shape, damped)
        kept: dict[str, Any] = {"save": times} if save else {"save": devito.Buffer(levels)} if levels else {}
        self.u = devito.TimeFunction(name="u", grid=grid, time_order=2, space_order=space_order, **kept)
        self.v = devito.TimeFunction(name="v", grid=grid, time_order=2, space_order=space_order)
        self.gradient = devito.Function(name="grad", grid=grid)
        self.src = devito.SparseTimeFunction(name="src", grid=grid, npoint=1, nt=times)
        self.src.coordinates.data[:] = [*(spacing * n / 2 for n in shape[:-1]), 4 * spacing]
        self.src.data[:, 0] = _ricker(np.arange(times) * self.dt, 0.02)
        self.rec, self.residual = (
            devito.SparseTimeFunction(name=name, grid=grid, npoint=16, nt=times) for name in ("rec", "residual")
        )
        for receivers in (self.rec, self.residual):
            receivers.coordinates.data[:] = self.src.coordinates.data[0]
            receivers.coordinates.data[:, 0] = np.linspace(3 / 8, 5 / 8, 16) * shape[0] * spacing
        s, u, v = grid.stepping_dim.spacing, self.u, self.v
        ahead = devito.solve(m * u.dt2 - u.laplace + damp * u.dt, u.forward)
        back = devito.solve(m * v.dt2 - v.laplace + damp * v.dt.T, v.backward)
        self.forward = devito.Operator(
            [
                devito.Eq(u.forward, ahead),
                self.src.inject(field=u.forward, expr=self.src * s**2 / m),
                self.rec.interpolate(expr=u),
            ],
            name="Forward",
        )
        self.reverse = devito.Operator(
            [
                devito.Eq(v.backward, back),
                self.residual.inject(field=v.backward, expr=self.residual * s**2 / m),
                devito.Inc(self.gradient, -u * v.dt2),
            ],
            name="Gradient",
        )

    @property
    def state_nbytes(self) -> int:
        """Two levels of the time buffer."""
        return int(2 * self.u._data_allocated[0].nbytes)

    def set_residual(self) -> None:
        """What the reverse operator injects."""
        self.residual.data[:] = self.rec.data

    def result(self) -> Field:
        """The gradient, for every grid point."""
        return np.array(self.gradient.data)

    def warm_up(self) -> None:
        """Compile, and use every array once; nothing is left of it."""
        for operator in (self.forward, self.reverse):
            operator.apply(dt=self.dt, time_m=1, time_M=2)
        for function in (self.u, self.v, self.gradient, self.rec):
            function.data_with_halo[:] = 0


def _ricker(times: npt.NDArray[Any], frequency: float) -> npt.NDArray[Any]:
    squares = (np.pi * frequency * (times - 1 / frequency)) ** 2
    return (1 - 2 * squares) * np.exp(-squares)


def _absorbing(shape: tuple[int, ...], width: int) -> Field:
    damping = np.zeros(shape, np.float32)
    for axis, count in enumerate(shape):
        at = np.arange(count)
        depth = np.maximum(0, width - np.minimum(at, count - 1 - at)) / max(1, width)
        damping += (0.05 * depth**2).reshape([-1 if a == axis else 1 for a in range(len(shape))]).astype(np.float32)
    return damping


# Cases: each takes a size, and returns what it took and the gradient -----------------------------


def ideal(size: Size) -> Outcome:
    """Both operators once, with nothing kept."""
    problem = Acoustic(size.shape, size.space_order, size.steps)
    problem.warm_up()
    meter = common.Meter()
    meter.start()
    problem.forward.apply(dt=problem.dt)
    problem.set_residual()
    problem.reverse.apply(dt=problem.dt)
    return {**meter.stop(), "gradient": None}


def save_all(size: Size) -> Outcome:
    """Devito's own way: every time level kept in memory."""
    problem = Acoustic(size.shape, size.space_order, size.steps, save=True)
    _ = problem.u.data  # allocates, and touches, all of it: not counted
    problem.forward.apply(dt=problem.dt, time_m=1, time_M=2)
    problem.reverse.apply(dt=problem.dt, time_m=1, time_M=2)
    for function in (problem.v, problem.gradient):
        function.data_with_halo[:] = 0
    problem.u.data_with_halo[:4] = 0
    meter = common.Meter()
    meter.start()
    problem.forward.apply(dt=problem.dt)
    problem.set_residual()
    problem.reverse.apply(dt=problem.dt)
    stored = problem.u._data_allocated.nbytes
    return {**meter.stop(), "memory_bytes": stored, "gradient": problem.result()}


def pyrevolve(size: Size, states: int | None) -> Outcome:
    """Pyrevolve through Devito's checkpointing, with so many checkpoints; None: its default."""
    import pyrevolve as package

    problem, operators = _wrapped(size)
    revolver = package.Revolver(*operators, states, size.steps)
    meter = common.Meter()
    outcome = _both(problem, revolver.apply_forward, revolver.apply_reverse, meter)
    return {**outcome, "memory_bytes": revolver.n_checkpoints * problem.state_nbytes}


def drop_in(size: Size, states: int, disk: str | None, max_reverse: int = 1) -> Outcome:
    """`longtape.pyrevolve` in its place, with memory for so many states.

    The reverse operator reads one level, so that two steps are reversed in a buffer of three.
    """
    import longtape.pyrevolve

    problem, operators = _wrapped(size)
    memory = _budget(problem, states)
    revolver = longtape.pyrevolve.Revolver(
        *operators, None, size.steps, memory=memory, disk=disk, max_reverse=max_reverse
    )
    meter = common.Meter()
    outcome = _both(problem, revolver.apply_forward, revolver.apply_reverse, meter)
    return {**outcome, **_told(revolver)}


def front_end(size: Size, states: int, disk: str | None, levels: int | None = None) -> Outcome:
    """`longtape.devito`, with memory for so many states."""
    import longtape.devito

    problem = Acoustic(size.shape, size.space_order, size.steps, levels=levels)
    problem.warm_up()
    began, dt = time.perf_counter(), {"dt": problem.dt}
    meter = common.Meter()
    sweep = longtape.devito.Sweep(
        problem.forward,
        problem.reverse,
        [problem.u],
        memory=_budget(problem, states),
        disk=disk,
        forward_args=dt,
        reverse_args=dt,
    )
    prepared = time.perf_counter() - began
    outcome = _both(problem, sweep.forward, sweep.reverse, meter)
    return {**outcome, "prepare_seconds": prepared, **_told(sweep)}


def _wrapped(size: Size) -> tuple[Acoustic, tuple[Any, Any, Any]]:
    import devito

    problem = Acoustic(size.shape, size.space_order, size.steps)
    problem.warm_up()
    forward = devito.CheckpointOperator(problem.forward, dt=problem.dt, u=problem.u)
    reverse = devito.CheckpointOperator(problem.reverse, dt=problem.dt, u=problem.u)
    return problem, (devito.DevitoCheckpoint([problem.u]), forward, reverse)


def _budget(problem: Acoustic, states: int) -> int:
    """Memory for so many states, rounded up to whole pages each as direct I/O takes them."""
    return states * (-(-(problem.state_nbytes + 64) // 4096) * 4096)


def _both(problem: Acoustic, ahead: Callable[[], None], back: Callable[[], None], meter: common.Meter) -> Outcome:
    meter.start()
    ahead()
    turned = time.perf_counter()
    problem.set_residual()
    back()
    reverse_seconds = time.perf_counter() - turned
    return {**meter.stop(), "reverse_seconds": reverse_seconds, "gradient": problem.result()}


def _told(run: Any) -> Outcome:
    report, plan = run.report, run.plan
    measured = report.measured
    return {
        "memory_bytes": measured.peak_memory_bytes,
        "disk_bytes": measured.peak_disk_bytes,
        "schedule": plan.schedule,
        "spacing": plan.spacing,
        "record_fraction": plan.record_fraction,
        "predicted_seconds": report.predicted.seconds,
        "stall_seconds": measured.stall_seconds,
        "overlap_fraction": report.overlap_fraction,
        "write_seconds": report.write_seconds,
        "read_seconds": report.read_seconds,
        "direct_io": report.direct_io,
        "faults": list(report.faults),
    }


# The comparison ----------------------------------------------------------------------------------


def cases(size: Size, disk: str) -> dict[str, tuple[Callable[..., Outcome], tuple[Any, ...]]]:
    """Everything to compare on one grid; ``save=True`` where two thirds of the free memory hold it."""
    found: dict[str, tuple[Callable[..., Outcome], tuple[Any, ...]]] = {"ideal": (ideal, (size,))}
    levels = (size.steps + 2) * 4 * int(np.prod([n + 2 * size.space_order for n in size.shape]))
    if levels < common_available() * 2 // 3:
        found["save=True"] = (save_all, (size,))
    found["pyrevolve, default"] = (pyrevolve, (size, None))
    for states in size.budgets:
        if states != size.budgets[0]:
            found[f"pyrevolve, {states} states"] = (pyrevolve, (size, states))
        found[f"longtape.pyrevolve, {states} states"] = (drop_in, (size, states, disk))
        found[f"longtape.pyrevolve by twos, {states} states"] = (drop_in, (size, states, disk, 2))
        found[f"longtape.devito, {states} states"] = (front_end, (size, states, disk))
        if states >= 14:  # three more levels in the operators' own buffer, and so two states less beside it
            found[f"longtape.devito with a buffer of 6, {states} states"] = (front_end, (size, states - 2, disk, 6))
    return found


def common_available() -> int:
    """Bytes of memory that the system can give."""
    with open("/proc/meminfo", encoding="utf-8") as lines:
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))


def compare(size: Size, disk: str, repeats: int) -> dict[str, Any]:
    """Medians, and their ratios to the ideal, to pyrevolve at equal memory and to ``save=True``."""
    outcomes = common.interleave_apart(cases(size, disk), repeats=repeats)
    reference = outcomes.get("save=True", outcomes["pyrevolve, default"])[0]["gradient"]
    rows: dict[str, Any] = {}
    for name, runs in outcomes.items():
        gradients = [run.pop("gradient") for run in runs]
        rows[name] = {
            "seconds": common.summary([run["seconds"] for run in runs]),
            "gradient_error": max(
                (_difference(gradient, reference) for gradient in gradients if gradient is not None), default=None
            ),
            "runs": runs,
        }
    return {"cases": rows, "ratios": _ratios({name: row["seconds"]["median"] for name, row in rows.items()})}


def _difference(gradient: Field, reference: Field) -> float:
    """Relative, in the Euclidean norm."""
    return float(np.linalg.norm(gradient - reference) / np.linalg.norm(reference))


def _ratios(seconds: Mapping[str, float]) -> dict[str, dict[str, float]]:
    found: dict[str, dict[str, float]] = {}
    for name, took in seconds.items():
        ratios = {"over ideal": took / seconds["ideal"]}
        if name.startswith("longtape"):
            equal = "pyrevolve, " + name.split(", ")[1]
            ratios["pyrevolve at equal memory over this"] = seconds.get(equal, seconds["pyrevolve, default"]) / took
            ratios["pyrevolve by default over this"] = seconds["pyrevolve, default"] / took
            if "save=True" in seconds:
                ratios["over save=True"] = took / seconds["save=True"]
        found[name] = ratios
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description="Acoustic gradients under Devito")
    parser.add_argument("what", nargs="+", choices=sorted(SIZES))
    parser.add_argument("--quick", action="store_true", help="grids of no interest, to see that it works")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--disk", help="directory for the scratch file; default: the system's")
    arguments = parser.parse_args()
    with contextlib.ExitStack() as stack:
        disk = arguments.disk or stack.enter_context(tempfile.TemporaryDirectory())
        for what in arguments.what:
            size = (QUICK if arguments.quick else SIZES)[what]
            results = compare(size, disk, arguments.repeats)
            if arguments.quick:
                print(json.dumps(results, indent=2))
            else:
                common.write(f"devito_acoustic_{what}", {**asdict(size), "repeats": arguments.repeats}, results)


if __name__ == "__main__":
    main()
