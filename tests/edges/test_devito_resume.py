"""Kill a sweep through Devito operators anywhere, call it again: the same bits, outputs and sums included."""

from __future__ import annotations

import pickle
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("devito", reason="Devito is not installed")
pytestmark = [
    pytest.mark.skipif(shutil.which("gcc") is None, reason="Devito needs a C compiler"),
    pytest.mark.filterwarnings("default"),  # Devito's own
]

import longtape  # noqa: E402
from tests.durable.programs import forked  # noqa: E402
from tests.edges.devito_problem import STATE, TIMES, Killer, Problem, assert_right, fresh, run_both  # noqa: E402

QUICK_DISK = longtape.Costs(1e-3, 3e-3, write_bytes_per_second=4e9, read_bytes_per_second=4e9)
RECORDING = longtape.Costs(1e-3, 3e-3, 1e-3, 1e-3, write_bytes_per_second=1e12, read_bytes_per_second=1e12)
SLOW_DISK = longtape.Costs(1e-3, 3e-3, write_bytes_per_second=1.0, read_bytes_per_second=1.0)
PLANS: dict[str, dict[str, Any]] = {
    "states stored": {"memory": 6 * (STATE + 64), "costs": QUICK_DISK},
    "recorded": {"memory": 40 * STATE, "costs": RECORDING},
    "in memory": {"memory": 5 * (STATE + 64), "costs": SLOW_DISK},
}


def resumed(directory: Path, plan: str, **options: Any) -> tuple[Problem, Any]:
    problem = fresh()
    return problem, problem.sweep(resume=directory, resume_seconds=1e-6, **{**PLANS[plan], **options})


def killed(directory: Path, plan: str, phase: str, at: int) -> bool:
    """Whether the run was killed after so many runs of steps, or adjoints; else it has ended."""
    killer = Killer(phase, at)

    def body() -> bytes:
        problem, killer.sweep = resumed(directory, plan, observers=[killer])
        run_both(problem, killer.sweep)
        return b"ended"

    try:
        return forked(body) is None
    except AssertionError as error:
        assert "the run failed" in str(error)  # which is how a signal looks
        return True


def finished(directory: Path, plan: str) -> tuple[dict[str, np.ndarray], str | None]:
    def body() -> bytes:
        problem, sweep = resumed(directory, plan)
        run_both(problem, sweep)
        assert not sweep.report.faults
        return pickle.dumps((problem.results(), sweep.report.resumed_from))

    found = forked(body)
    assert found is not None
    return pickle.loads(found)


KILLS = {
    "forward sweep": [("forward", 2), ("forward", 1)],
    "adjoint": [("forward", 2), ("reverse", 2), ("reverse", 1)],
}
"""Where a run is killed, time after time, and where it is then gone on with."""


@pytest.mark.parametrize("phase", KILLS)
@pytest.mark.parametrize("plan", PLANS)
def test_killed_and_gone_on_with(tmp_path: Path, plan: str, phase: str) -> None:
    fresh()  # built once, before the processes are forked
    for kill in KILLS[phase]:
        assert killed(tmp_path, plan, *kill)
    found, told = finished(tmp_path, plan)
    assert phase in str(told)
    assert_right(found)
    assert not list(tmp_path.iterdir())


def begin(directory: Path) -> None:
    """A run that has turned, and is then given up."""
    _, sweep = resumed(directory, "states stored")
    with sweep:
        sweep.forward()


def test_outputs_are_there_when_it_has_turned(tmp_path: Path) -> None:
    begin(tmp_path)
    problem, sweep = resumed(tmp_path, "states stored")
    assert not np.any(problem.light.data)  # nothing is touched before the sweep is asked for
    sweep.forward()
    assert_right(problem.outputs())
    problem.set_residual()
    sweep.reverse()
    assert_right(problem.results())
    assert sweep.report.resumed_from == "the turn"


def test_another_residual_begins_the_reverse_sweep_anew(tmp_path: Path) -> None:
    fresh()
    assert killed(tmp_path, "states stored", "reverse", 3)
    problem, sweep = resumed(tmp_path, "states stored")
    sweep.forward()
    problem.residual.data[:] = 0.25 * problem.rec.data
    with pytest.warns(RuntimeWarning, match="the adjoint at the end is another one"):
        sweep.reverse()
    whole = Problem(save=True)
    whole.forward.apply(**TIMES)
    whole.residual.data[:] = 0.25 * whole.rec.data
    whole.reverse.apply(**TIMES)
    assert np.array_equal(problem.grad.data, whole.grad.data)


CHANGES: dict[str, Any] = {
    "array c": lambda p: p.c.data.__setitem__((3, 3), 0.15),
    "array src": lambda p: p.src.data.__setitem__((5, 1), 2.0),
    "array src_coords": lambda p: p.src.coordinates.data.__setitem__((0, 0), 5.5),
    "array u": lambda p: p.u.data.__setitem__((0, 2, 2), 1.0),
    "array light": lambda p: p.light.data.__setitem__((2, 2), 1.0),
    "numbers such as dt": lambda p: {"forward_args": {**TIMES, "h_x": 1.5}},
    "code of the reverse operator": lambda p: {"reverse": 2.0},
}


@pytest.mark.parametrize("what", CHANGES)
def test_another_run_is_refused(tmp_path: Path, what: str) -> None:
    from devito import Eq, Inc, Operator

    begin(tmp_path)
    problem = fresh()
    before = np.array(problem.src.coordinates.data)
    options = CHANGES[what](problem)
    options = options if isinstance(options, dict) else {}
    reverse = problem.reverse
    try:
        if factor := options.pop("reverse", None):
            v = problem.v
            problem.reverse = Operator([Eq(v.backward, v), Inc(problem.grad, factor * problem.u * v)], name="Back")
        with pytest.raises(longtape.ResumeError, match=what):
            problem.sweep(resume=tmp_path, **{**PLANS["states stored"], **options})
    finally:
        problem.reverse = reverse
        problem.src.coordinates.data[:] = before


def test_what_changes_between_making_and_running(tmp_path: Path) -> None:
    problem, sweep = resumed(tmp_path, "states stored")
    problem.c.data[4, 4] += 0.01
    with sweep, pytest.raises(longtape.UsageError, match="c changed after the sweep was made"):
        sweep.forward()


def test_what_cannot_be_combined_with_resume(tmp_path: Path) -> None:
    problem = fresh()
    with pytest.raises(longtape.UsageError, match="compress"):
        problem.sweep(memory="1MiB", resume=tmp_path, compress="lz4")
    with pytest.raises(longtape.UsageError, match="resume_seconds"):
        problem.sweep(memory="1MiB", resume=tmp_path, resume_seconds=0)
