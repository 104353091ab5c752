"""A C time-stepper behind ctypes: its adjoint is right, and the sweep gives the same bits as keeping everything."""

import shutil
import threading
from itertools import pairwise

import numpy as np
import pytest

import longtape
from examples.compiled.wave import DT2, Wave, compile_wave
from longtape.testing.tier_fakes import GatedTier
from longtape.tiers.memory import MemoryTier

pytestmark = pytest.mark.skipif(shutil.which("cc") is None, reason="there is no C compiler")

SIDE = 12
STATE = 2 * 8 * SIDE * SIDE


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    return compile_wave(tmp_path_factory.mktemp("compiled"))


def initial(side=SIDE, seed=0):
    return np.random.default_rng(seed).random((side, side))


def store_everything(model, steps):
    states = []
    for step in range(steps):
        states.append([array.copy() for array in model.state])
        model.advance(step, step + 1)
    value = model.misfit(steps)
    model.start_adjoint(steps)
    for step in reversed(range(steps)):
        for array, kept in zip(model.state, states[step], strict=True):
            array[:] = kept
        model.reverse(step, step + 1)
    return value, model.gradient


def test_the_step_is_the_formula(library):
    model = Wave(library, initial())
    u, p = model.state[1].copy(), model.state[0].copy()
    model.advance(0, 1)
    laplacian = sum(np.roll(u, shift, axis) for axis in (0, 1) for shift in (1, -1)) - 4 * u
    np.testing.assert_allclose(model.state[0], 2 * u - p + DT2 * (laplacian - u**3), rtol=1e-14)
    assert np.array_equal(model.state[1], u)


@pytest.mark.parametrize("step", [0, 1])
def test_dot_product(library, step):
    """<a, J v> = <Jᵀ a, v> for one step, with J v by central differences."""
    base, v, a = ([initial(seed=seed), initial(seed=seed + 1)] for seed in (0, 2, 4))
    size, ends = 1e-6, []
    for sign in (1, -1):
        model = Wave(library, base[0])
        for array, start, direction in zip(model.state, base, v, strict=True):
            array[:] = start + sign * size * direction
        model.advance(step, step + 1)
        ends.append(model.state)
    model = Wave(library, base[0])
    for array, start in zip(model.state, base, strict=True):
        array[:] = start
    for array, start in zip(model.adjoint, a, strict=True):
        array[:] = start
    model.reverse(step, step + 1)
    pushed = sum(np.vdot(x, (plus - minus) / (2 * size)) for x, plus, minus in zip(a, *ends, strict=True))
    pulled = sum(np.vdot(x, y) for x, y in zip(model.adjoint, v, strict=True))
    assert pushed == pytest.approx(pulled, rel=1e-8)


def test_taylor(library, scratch):
    """The remainder after the first-order term falls as h²."""
    steps, start, direction = 200, initial(), initial(seed=9)
    model = Wave(library, start)
    sweep = longtape.Sweep(model, steps, memory=6 * STATE, disk=scratch)
    sweep.forward()
    value = model.misfit(steps)
    model.start_adjoint(steps)
    sweep.reverse()
    slope = float(np.vdot(model.gradient, direction))

    def remainder(size):
        moved = Wave(library, start + size * direction)
        moved.advance(0, steps)
        return abs(moved.misfit(steps) - value - size * slope)

    orders = [np.log2(coarse / fine) for coarse, fine in pairwise(remainder(0.5**k * 1e-3) for k in range(4))]
    assert orders == pytest.approx([2, 2, 2], abs=0.1)


@pytest.mark.parametrize("steps", [1, 2, 51, 400])
@pytest.mark.parametrize("slots", [2, 3, 8])
def test_same_bits_as_keeping_everything(library, scratch, steps, slots):
    value, gradient = store_everything(Wave(library, initial()), steps)
    model = Wave(library, initial())
    sweep = longtape.Sweep(model, steps, memory=slots * STATE, disk=scratch)
    sweep.forward()
    assert model.misfit(steps) == value
    model.start_adjoint(steps)
    sweep.reverse()
    assert np.array_equal(model.gradient, gradient)
    assert sweep.report.measured.peak_memory_bytes <= slots * STATE


def test_same_bits_under_a_schedule_of_another_package(library, scratch):
    schedules = pytest.importorskip("checkpoint_schedules")
    _, gradient = store_everything(Wave(library, initial()), 100)
    model = Wave(library, initial())
    schedule = schedules.MultistageCheckpointSchedule(100, 3, 5)
    sweep = longtape.Sweep(model, 100, memory=6 * STATE, disk=scratch, schedule=schedule)
    sweep.forward()
    model.start_adjoint(100)
    sweep.reverse()
    assert np.array_equal(model.gradient, gradient)


def test_python_goes_on_while_the_c_code_runs(library):
    """One call of about a second, with the GIL released: another thread runs meanwhile."""
    model, counted, ended = Wave(library, initial(64)), [0, 0], threading.Event()

    def count():
        while not ended.is_set():
            counted[0] += 1

    thread = threading.Thread(target=count)
    thread.start()
    before = counted[0]
    model.advance(0, 20_000)
    counted[1] = counted[0] - before
    ended.set()
    thread.join()
    assert counted[1] > 1_000


def test_storing_overlaps_with_the_steps(library):
    """The forward sweep ends while every write is held up; and on a real run the report measures the overlap."""
    tier = GatedTier(MemoryTier(), holds=("write",))
    model = Wave(library, initial())
    costs = longtape.Costs(1e-3, 2e-3, write_bytes_per_second=2e6, read_bytes_per_second=2e6)
    sweep = longtape.Sweep(model, 60, memory=12 * STATE, tier=tier, costs=costs)
    assert sweep.plan.schedule == "asynchronous"
    sweep.forward()
    tier.open()
    model.start_adjoint(60)
    sweep.reverse()
    assert np.array_equal(model.gradient, store_everything(Wave(library, initial()), 60)[1])


def test_the_report_measures_the_overlap(library, scratch):
    model = Wave(library, initial(256))
    costs = longtape.Costs(1e-3, 2e-3, write_bytes_per_second=1e9, read_bytes_per_second=1e9)
    sweep = longtape.Sweep(model, 150, memory="8MiB", disk=scratch, costs=costs)
    sweep.forward()
    model.start_adjoint(150)
    sweep.reverse()
    assert sweep.report.writes > 0
    assert sweep.report.overlap_fraction > 0.1
