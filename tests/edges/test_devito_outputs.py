"""What Devito's operators write beside the wavefields is written once, however often a time is run again."""

from __future__ import annotations

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
from tests.edges.devito_problem import STATE, STEPS, assert_right, fresh, reference, run_both  # noqa: E402


def costs(*, record: bool) -> longtape.Costs:
    each = 1e-3 if record else None
    return longtape.Costs(1e-3, 3e-3, each, each, write_bytes_per_second=1e12, read_bytes_per_second=1e12)


WAYS: dict[str, dict[str, Any]] = {
    "recomputed": {"memory": 3 * (STATE + 64)},
    "kept": {"memory": "64MiB"},
    "states stored": {"memory": 6 * (STATE + 64), "costs": costs(record=False), "disk": True},
    "recorded": {"memory": 30 * STATE, "costs": costs(record=True), "disk": True},
}


def made(problem: Any, way: str, scratch: Path) -> Any:
    options = dict(WAYS[way])
    if options.pop("disk", False):
        options["disk"] = scratch
    return problem.sweep(**options)


@pytest.mark.parametrize("levels", [None, 5])
@pytest.mark.parametrize("way", WAYS)
def test_outputs_are_those_of_apply(way: str, levels: int | None, scratch: Path) -> None:
    problem = fresh(levels)
    sweep = made(problem, way, scratch)
    assert not any(np.any(array) for array in problem.results().values())  # timing leaves nothing
    sweep.forward()
    assert_right(problem.outputs())  # and what was recorded in other buffers wrote here
    problem.set_residual()
    sweep.reverse()
    assert_right(problem.results())


@pytest.mark.parametrize("way", WAYS)
def test_receivers_may_become_the_residual_in_place(way: str, scratch: Path) -> None:
    """Times that are run again do not overwrite what the caller makes of the receivers."""
    problem = fresh()
    sweep = made(problem, way, scratch)
    sweep.forward()
    problem.set_residual()
    problem.rec.data[:], problem.light.data[:] = -7.0, -7.0
    sweep.reverse()
    assert np.all(problem.rec.data == -7.0)
    assert np.all(problem.light.data == -7.0)
    assert np.array_equal(problem.grad.data, reference()["grad"])


@pytest.mark.parametrize("memory", [3 * (STATE + 64), "64MiB"])
def test_a_whole_history_that_the_forward_operator_goes_on_from(memory: Any) -> None:
    """All times of q are in memory, and times that are run again read what was there."""
    from devito import Eq, Function, Inc, Operator, TimeFunction

    import longtape.devito

    results = []
    for save in (STEPS + 2, None):
        model = fresh()
        grid = model.u.grid
        u = TimeFunction(name="u", grid=grid, time_order=1, space_order=2, save=save)
        q = TimeFunction(name="q", grid=grid, time_order=1, save=STEPS + 2)
        grad, w = Function(name="grad", grid=grid), TimeFunction(name="w", grid=grid, time_order=1)
        u.data[0], w.data[:] = np.random.default_rng(3).random(grid.shape), 1.0
        ahead = Operator([Eq(q.forward, q + 0.01 * u), Eq(u.forward, u + 0.1 * u.laplace + 0.001 * q)], name="Drift")
        back = Operator([Eq(w.backward, 0.9 * w), Inc(grad, u * w)], name="DriftBack")
        times = {"time_m": 0, "time_M": STEPS}
        if save:
            ahead.apply(**times)
            back.apply(**times)
        else:
            with longtape.devito.Sweep(ahead, back, [u], memory=memory, forward_args=times, reverse_args=times) as run:
                run.forward()
                run.reverse()
        results.append((np.array(grad.data), np.array(q.data)))
    for ours, theirs in zip(results[1], results[0], strict=True):
        assert np.array_equal(ours, theirs)


@pytest.mark.parametrize("where", ["after the loop", "before the loop"])
@pytest.mark.parametrize("which", ["forward", "reverse"])
def test_an_operator_that_works_outside_its_loop_over_time(which: str, where: str) -> None:
    """It would do so at every call, of which nobody knows how many there are."""
    from devito import Eq, Inc, Operator

    problem = fresh()
    u, v, total = problem.u, problem.v, problem.light if which == "forward" else problem.grad
    loop = Eq(u.forward, 0.5 * u) if which == "forward" else Eq(v.backward, 0.5 * v)
    equations = [loop, Inc(total, u)]
    equations = [*equations, Eq(total, 2 * total)] if where == "after the loop" else [Eq(total, 0), *equations]
    operator = Operator(equations, name="Outside")
    given = {"forward": problem.forward, "reverse": problem.reverse, which: operator}
    import longtape.devito

    arguments = {"time_m": 1, "time_M": STEPS}
    with pytest.raises(longtape.UsageError, match=f"Outside writes {total.name} before or after its loop over time"):
        longtape.devito.Sweep(
            given["forward"], given["reverse"], [u], memory="1MiB", forward_args=arguments, reverse_args=arguments
        )


def test_states_are_compared_if_asked(scratch: Path) -> None:
    for way in WAYS:
        problem = fresh()
        options = {**WAYS[way], "verify": True}
        if options.pop("disk", False):
            options["disk"] = scratch
        sweep = problem.sweep(**options)
        run_both(problem, sweep)
        assert_right(problem.results())
        assert sweep.report.states_verified is not None
        assert way != "recomputed" or sweep.report.states_verified > STEPS


@pytest.mark.parametrize("record", [False, True])
def test_packed(record: bool, scratch: Path) -> None:
    gradients = {}
    for codec in ("zstd", "relative:1e-3+zstd"):
        problem = fresh()
        memory = (30 if record else 10) * (STATE + 64)
        sweep = problem.sweep(memory=memory, disk=scratch, compress=codec, costs=costs(record=record))
        run_both(problem, sweep)
        assert sweep.report.codec == codec
        gradients[codec] = problem.results()
    assert_right(gradients["zstd"])
    exact, rounded = gradients["zstd"]["grad"], gradients["relative:1e-3+zstd"]["grad"]
    assert not record or not np.array_equal(exact, rounded)
    assert np.linalg.norm(exact - rounded) < 0.01 * np.linalg.norm(exact)


def test_whether_a_codec_is_used_is_measured(scratch: Path) -> None:
    problem = fresh()
    sweep = problem.sweep(memory=8 * (STATE + 64), disk=scratch, compress="lz4")
    run_both(problem, sweep)
    assert_right(problem.results())


def test_a_lossy_codec_cannot_be_verified() -> None:
    problem = fresh()
    with pytest.raises(longtape.UsageError, match="verify"):
        problem.sweep(memory="1MiB", compress="relative:1e-3+zstd", verify=True)
