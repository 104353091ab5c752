"""Sweeps whose model alone knows where the sequence ends, and what happens to a plan when costs change."""

import time

import numpy as np
import pytest

import longtape
import longtape.plan.binomial
from longtape.errors import StepError, UsageError
from longtape.testing.tier_fakes import FailingTier
from longtape.tiers.disk import DiskTier
from tests.faults.sweeps import storing_costs

SIZE = 1000
STATE = 8 * SIZE
ITEM = (-(-STATE // 4096) + 1) * 4096


class Waves:
    """x ← sin(x + k), `count` times."""

    def __init__(self, count):
        self.count = count
        self.state = [np.random.default_rng(0).random(SIZE)]
        self.adjoint = [np.ones(SIZE)]

    def advance(self, start, stop):
        stop = min(stop, self.count)
        for k in range(start, stop):
            np.sin(self.state[0] + k, out=self.state[0])
        return stop

    def reverse(self, start, stop):
        self.adjoint[0] *= np.cos(self.state[0] + start)


class FreeWaves(Waves):
    """The same, from any buffer into any other."""

    def advance_into(self, step, source, target):
        if step >= self.count:
            return False
        np.sin(source[0] + step, out=target[0])

    def reverse_from(self, step, source):
        self.adjoint[0] *= np.cos(source[0] + step)


def exact(count):
    model, states = Waves(count), []
    for k in range(count):
        states.append(model.state[0].copy())
        model.advance(k, k + 1)
    for k in reversed(range(count)):
        model.adjoint[0] *= np.cos(states[k] + k)
    return model.adjoint[0]


def run(kind, count, **settings):
    model = kind(count)
    settings.setdefault("memory", 8 * STATE)
    sweep = longtape.Sweep(model, None, costs=storing_costs(SIZE), **settings)
    sweep.forward()
    model.adjoint[0][:] = 1.0
    sweep.reverse()
    assert np.array_equal(model.adjoint[0], exact(count))
    return sweep.report


@pytest.mark.parametrize("kind", [Waves, FreeWaves])
@pytest.mark.parametrize("count", [0, 1, 2, 50, 333])
@pytest.mark.parametrize("with_disk", [False, True])
def test_the_model_says_where_it_ends(scratch, kind, count, with_disk):
    report = run(kind, count, disk=scratch if with_disk else None)
    assert report.steps == count
    assert report.schedule == ("asynchronous" if with_disk else "online")
    if not with_disk and count:
        assert report.measured.steps_recomputed == pytest.approx(report.predicted.steps_recomputed, rel=0.15, abs=3)


@pytest.mark.parametrize("kind", [Waves, FreeWaves])
@pytest.mark.parametrize("items", [3, 5, 12])
def test_stored_states_are_thinned(scratch, kind, items):
    report = run(kind, 400, disk=scratch, disk_limit=items * ITEM)
    assert report.measured.peak_disk_bytes <= items * ITEM
    assert not report.faults


class Slow(Waves):
    """Steps that take about a millisecond, so that storage keeps up."""

    def advance(self, start, stop):
        stop = min(stop, self.count)
        time.sleep(1e-3 * (stop - start))
        return super().advance(start, stop)


def test_thinning_costs_little_over_uniform_spacing_in_a_real_run(scratch):
    room, steps, slots = 16, 16 * 64, 8
    report = run(Slow, steps, disk=scratch, disk_limit=room * ITEM, memory=slots * STATE)
    spacing = steps // room
    uniform = room * longtape.plan.binomial.advances(spacing, slots)
    assert report.writes > room
    assert report.measured.steps_recomputed - uniform <= 0.2 * steps + slots * spacing


@pytest.mark.parametrize("kind", [Waves, FreeWaves])
@pytest.mark.parametrize("after", [0, 3, 10])
def test_storage_that_dies_costs_no_more_than_having_none(scratch, kind, after):
    """Every write fails from some one on: what is in memory is then kept as if there were no storage."""
    tier = FailingTier(DiskTier(scratch), lambda call: call.operation == "write" and call.index >= after)
    with pytest.warns(RuntimeWarning, match="could not be stored"):
        report = run(kind, 1000, tier=tier)
    alone = run(kind, 1000)
    assert report.measured.steps_recomputed <= 1.15 * alone.measured.steps_recomputed + 100


@pytest.mark.parametrize("returned", [None, -1, 10**9, True, "end"])
def test_what_advance_returns_is_checked(returned):
    class Wrong(Waves):
        def advance(self, start, stop):
            return returned

    with pytest.raises(StepError, match="must return the state reached"):
        run(Wrong, 10)


def test_steps_must_be_a_number_or_none():
    with pytest.raises(UsageError, match="at least 1, or None, not 0"):
        longtape.Sweep(Waves(3), 0, memory="1MiB")
