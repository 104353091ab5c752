"""What a sweep through Devito operators believes of them, of their arguments and of its clock."""

from __future__ import annotations

import gc
import shutil
import time
import weakref
from typing import Any

import numpy as np
import pytest

pytest.importorskip("devito", reason="Devito is not installed")
pytestmark = [
    pytest.mark.skipif(shutil.which("gcc") is None, reason="Devito needs a C compiler"),
    pytest.mark.filterwarnings("default"),  # Devito's own
]

from devito import Constant, Eq, Function, Inc, Operator, TimeFunction  # noqa: E402

import longtape  # noqa: E402
import longtape.devito  # noqa: E402
from tests.edges.devito_problem import STATE, STEPS, TIMES, assert_right, fresh, run_both  # noqa: E402

FEW = 3 * (STATE + 64)
"""Memory in which times are run again."""


# What changes between forward() and reverse() ------------------------------------------------------


@pytest.mark.parametrize("name", ["c", "src"])
@pytest.mark.parametrize("memory", [FEW, "64MiB"])
def test_what_the_forward_operator_reads_is_changed(name: str, memory: Any) -> None:
    problem = fresh()
    with problem.sweep(memory=memory) as sweep:
        sweep.forward()
        problem.set_residual()
        getattr(problem, name).data[:] *= 1.5
        with pytest.raises(longtape.ReplayError, match=f"{name} changed after forward"):
            sweep.reverse()
        getattr(problem, name).data[:] /= 1.5


def test_what_only_the_reverse_operator_reads_may_change() -> None:
    """A number and an array of its own, set between the sweeps: as with plain `apply`."""
    results = []
    for save in (STEPS + 2, None):
        problem = fresh()
        grid = problem.u.grid
        u = TimeFunction(name="u", grid=grid, time_order=1, space_order=2, save=save)
        grad, w, factor = Function(name="grad", grid=grid), Function(name="w", grid=grid), Constant(name="q", value=1.0)
        v = TimeFunction(name="v", grid=grid, time_order=1)
        u.data[:2] = np.random.default_rng(3).random(grid.shape)
        ahead = Operator([Eq(u.forward, u + 0.1 * u.laplace)], name="Plain")
        back = Operator([Eq(v.backward, 0.9 * v), Inc(grad, factor * w * u * v)], name="Weighted")

        def set_seed(w: Any = w, v: Any = v, factor: Any = factor) -> None:
            w.data[:], v.data[:], factor.data = 3.0, 1.0, 2.5

        if save:
            ahead.apply(**TIMES)
            set_seed()
            back.apply(**TIMES)
        else:
            run = longtape.devito.Sweep(ahead, back, [u], memory=FEW, forward_args=TIMES, reverse_args=TIMES)
            run.forward()
            set_seed()
            run.reverse()
        results.append(np.array(grad.data))
    assert np.any(results[0])
    assert np.array_equal(*results)


def rebind(function: Any) -> None:
    """Other memory with the same content, as unpickling or a careless copy leaves it."""
    content = np.array(function.data_with_halo)
    function._data = None
    function.data_with_halo[:] = content


def test_a_residual_that_is_given_other_memory() -> None:
    problem = fresh()
    sweep = problem.sweep(memory=FEW)
    sweep.forward()
    rebind(problem.residual)
    problem.set_residual()
    sweep.reverse()
    assert_right(problem.results())


def test_receivers_that_are_given_other_memory() -> None:
    problem = fresh()
    with problem.sweep(memory=FEW) as sweep:
        rebind(problem.rec)
        with pytest.raises(longtape.UsageError, match="another rec when the sweep was made"):
            sweep.forward()


def test_a_wavefield_that_is_given_other_memory() -> None:
    problem = fresh()
    with problem.sweep(memory=FEW) as sweep:
        sweep.forward()
        rebind(problem.u)
        problem.set_residual()
        with pytest.raises(longtape.UsageError, match="u was given other memory"):
            sweep.reverse()


class Meddler:
    """Changes what the forward operator reads once the reverse sweep has begun."""

    def __init__(self, array: Any) -> None:
        self.array, self.has_turned, self.is_done = array, False, False

    def on_action(self, action: Any, began: float, ended: float) -> None:
        if self.has_turned and not self.is_done:
            self.array[:] *= 1.001
            self.is_done = True
        self.has_turned |= type(action).__name__ == "Turn"

    def on_transfer(self, kind: str, key: Any, nbytes: int, began: float, ended: float) -> None:
        pass


def test_times_that_are_run_again_end_in_another_state() -> None:
    problem = fresh()
    sweep = problem.sweep(memory=FEW, observers=[Meddler(problem.c.data)])
    sweep.forward()
    problem.set_residual()
    with pytest.raises(longtape.ReplayError, match=f"Ahead, run again from a stored state to the last time {STEPS}"):
        sweep.reverse()


def test_the_reverse_operator_changes_what_the_forward_operator_reads() -> None:
    problem = fresh()
    back = Operator([Eq(problem.v.backward, problem.v), Inc(problem.c, problem.u * problem.v)], name="Greedy")
    with pytest.raises(longtape.UsageError, match="Greedy writes c, which operator Ahead reads as c"):
        longtape.devito.Sweep(problem.forward, back, [problem.u], memory="1MiB", forward_args=TIMES, reverse_args=TIMES)


def test_an_adjoint_that_was_never_seeded() -> None:
    problem = fresh()
    sweep = problem.sweep(memory=FEW)
    sweep.forward()
    with pytest.warns(RuntimeWarning, match="residual and v hold only zeros"):
        sweep.reverse()


# Numbers -----------------------------------------------------------------------------------------


def test_numpy_integers_as_times() -> None:
    problem = fresh()
    times = {"time_m": np.int64(1), "time_M": np.int32(STEPS)}
    run_both(problem, problem.sweep(memory=np.int64(FEW), forward_args=times, reverse_args=times))
    assert_right(problem.results())


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_single_and_double_precision(dtype: Any) -> None:
    results = []
    for save in (STEPS + 2, None):
        from devito import Grid

        grid = Grid(shape=(16, 16), dtype=dtype)
        u = TimeFunction(name="u", grid=grid, time_order=1, space_order=2, save=save)
        v, grad = TimeFunction(name="v", grid=grid, time_order=1), Function(name="grad", grid=grid)
        u.data[:2], v.data[:] = np.random.default_rng(3).random(grid.shape), 1.0
        ahead = Operator([Eq(u.forward, u + 1e-4 * u.laplace)], name="Plain")
        back = Operator([Eq(v.backward, 0.9 * v), Inc(grad, u * v)], name="Product")
        if save:
            ahead.apply(**TIMES)
            back.apply(**TIMES)
        else:
            run = longtape.devito.Sweep(
                ahead, back, [u], memory=u.data.nbytes * 3, forward_args=TIMES, reverse_args=TIMES
            )
            run.forward()
            run.reverse()
        results.append(np.array(grad.data))
    assert results[0].dtype == dtype
    assert np.any(results[0])
    assert np.array_equal(*results)


# Times -------------------------------------------------------------------------------------------


class Clock:
    """The time that operators take, and nothing else does."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, seconds: dict[str, float]) -> None:
        self.now, self.times_run = 0.0, dict.fromkeys(seconds, 0)
        monkeypatch.setattr(time, "perf_counter", lambda: self.now)
        compiled = Operator.cfunction.fget

        def cfunction(operator: Any) -> Any:
            run, names = compiled(operator), [parameter.name for parameter in operator.parameters]

            def timed(*values: Any) -> Any:
                count = values[names.index("time_M")] - values[names.index("time_m")] + 1
                self.times_run[operator.name] += count
                self.now += count * seconds[operator.name]
                return run(*values)

            return timed

        monkeypatch.setattr(Operator, "cfunction", property(cfunction))


@pytest.mark.parametrize("seconds", [5e-6, 5e-4, 5e-2, 3.0])
@pytest.mark.parametrize("levels", [None, 5])
def test_what_is_believed_of_an_operator_is_true(
    seconds: float, levels: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    problem = fresh(levels)
    stride = levels or 3
    clock = Clock(monkeypatch, {"Ahead": seconds, "Back": 2 * seconds})
    with problem.sweep(memory=FEW * 2) as sweep:
        costs = sweep.costs
        assert costs.forward == pytest.approx(stride * seconds, rel=0.01)
        assert costs.pull_back == pytest.approx(stride * 2 * seconds, rel=0.01)
        assert costs.record == pytest.approx(stride * seconds, rel=0.01)
        again = stride - 1  # the reverse operator reads u at its own time, which the time before has written
        assert costs.reverse == pytest.approx((again + 2 * stride) * seconds, rel=0.01)
        most = 2 if seconds * stride > 1 else 3 * stride + 2
        assert max(clock.times_run.values()) <= most


def test_a_dropped_sweep_holds_nothing() -> None:
    problem = fresh()
    sweep = problem.sweep(memory="1MiB")
    sweep.forward()
    job = weakref.ref(sweep._job)
    del sweep
    gc.collect()
    assert job() is None
