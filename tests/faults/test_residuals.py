"""A job that records residuals, over storage that loses them: `compose.Run` as a framework's front end drives it."""

import random
import time
import warnings
from contextlib import closing

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longtape.compose import Run, Settings, Traits
from longtape.plan.costs import Costs
from longtape.testing.tiers import DamagingTier, FailingTier
from longtape.tiers.memory import MemoryTier
from tests.faults.scripted import BLOCK, STATE, Clock, CountingJob
from tests.faults.test_stuck import Jamming


class RecordingJob(CountingJob):
    step_seconds = 2e-5

    def record(self, start, stop, slot):
        time.sleep(self.step_seconds * (stop - start))
        return super().record(start, stop, slot)


def sweep(
    tier, *, steps=60, memory=6 * (STATE + BLOCK), initial_is_free=False, bandwidth=1e9, stuck_seconds=0.05, step=2e-5
):
    job = RecordingJob(steps, Clock(), forward_seconds=0.0)
    job.step_seconds = step
    traits = Traits("recording", steps, STATE, residual_nbytes=BLOCK, max_window=4, initial_is_free=initial_is_free)
    costs = Costs(
        1e-3, 4e-3, record=1.1e-3, pull_back=2e-3, write_bytes_per_second=bandwidth, read_bytes_per_second=bandwidth
    )
    run = Run(job, traits, Settings(memory, tier=tier, costs=costs, stuck_seconds=stuck_seconds))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            run.forward()
            assert job.work == steps
            run.reverse()
        finally:
            run.close()
    assert job.adjoint == 0
    report = run.report
    assert report.measured.peak_memory_bytes <= memory
    assert len(caught) == bool(report.faults)
    return report, job


def test_nothing_fails():
    report, _ = sweep(MemoryTier(), step=1e-3)  # as the plan believes, so that storage keeps up
    assert report.schedule == "residuals"
    assert report.steps_recorded == 60
    assert not report.faults


@pytest.mark.parametrize("initial_is_free", [False, True])
@pytest.mark.parametrize("operation", ["reserve", "write", "read"])
def test_each_call_fails_in_turn(operation, initial_is_free):
    for k in range(0, 60, 2):
        for last in (k, k + 6, 10**9):
            tier = FailingTier(
                MemoryTier(), lambda call, k=k, last=last: call.operation == operation and k <= call.index <= last
            )
            sweep(tier, initial_is_free=initial_is_free)


@settings(max_examples=100, deadline=None)
@given(
    steps=st.integers(1, 80),
    units=st.integers(4, 20),
    initial_is_free=st.booleans(),
    bandwidth=st.sampled_from([1e9, 3e4, 1e4]),
    likely=st.sampled_from([0.05, 0.4, 1.0]),
    seed=st.integers(0, 1000),
)
def test_lost_at_random(steps, units, initial_is_free, bandwidth, likely, seed):
    chance = random.Random(seed)
    failing = FailingTier(MemoryTier(), lambda call: call.operation != "release" and chance.random() < likely / 3)
    tier = DamagingTier(failing, lambda call: chance.random() < likely, detected=True, seed=seed)
    sweep(tier, steps=steps, memory=units * BLOCK, initial_is_free=initial_is_free, bandwidth=bandwidth)


@pytest.mark.parametrize("holds", [("write",), ("read",), ("write", "read")])
def test_storage_jams(holds):
    for at in (0, 1, 4, 11, 20):
        with closing(Jamming(at, holds)) as tier:
            sweep(tier, stuck_seconds=0.03)
