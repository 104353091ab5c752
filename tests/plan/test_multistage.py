"""Little storage and a known length: Revolve on memory and storage together, never beyond the limit."""

import time
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import longtape
from longtape.foresee import foresee, layout_of, replay
from longtape.plan import choose as module
from longtape.plan.asynchronous import EXACT, Layout, Rules
from longtape.plan.binomial import advances
from longtape.plan.choose import choose
from longtape.plan.costs import Costs, Problem
from longtape.plan.multistage import effort
from longtape.plan.predict import Pace
from longtape.plan.simulate import Speeds, simulate
from longtape.plan.verify import verify
from tests.test_unknown_length import ITEM, SIZE, STATE, FreeWaves, Waves, exact, storing_costs


def job(steps, slots, states, ratio):
    problem = Problem(steps, 1000, 1000 * slots, has_disk=True, disk_nbytes=1000 * states)
    return problem, Costs(1.0, 2.0, write_bytes_per_second=1000 / ratio, read_bytes_per_second=1000 / ratio)


@settings(max_examples=300, deadline=None)
@given(
    steps=st.integers(1, 400),
    slots=st.integers(1, 8),
    states=st.integers(0, 12),
    longest=st.integers(1, 60),
    window=st.sampled_from([1, 1, 3]),
    write=st.sampled_from([0.1, 1.0, 3.0, 40.0]),
    free=st.booleans(),
    pinned=st.booleans(),
    final=st.booleans(),
    rules=st.sampled_from([EXACT, Rules(), Rules(margin=0.0, elastic=False)]),
)
def test_legal_and_within_the_limit(steps, slots, states, longest, window, write, free, pinned, final, rules):
    if slots == 1:
        steps = min(steps, 60)
    layout = Layout(
        window=window,
        tail=longest,
        longest_piece=longest * window,
        initial_is_free=free,
        pin_initial=pinned and slots >= 3 and not free,
        final_state=final,
    )
    actions = []
    speeds = Speeds(1.0, 2.0, lambda key: write, lambda key: write)
    outcome = simulate(steps, slots, speeds, layout=layout, rules=rules, storage_limit=states, observe=actions.append)
    verdict = verify(actions, steps, slots=slots, initial_is_free=free, final_state=final)
    assert verdict.advances == outcome.advances
    assert outcome.peak_stored <= states


@pytest.mark.parametrize("steps", [30, 500, 10_000])
@pytest.mark.parametrize("slots", [2, 4, 9])
@pytest.mark.parametrize("states", [2, 7, 40])
def test_fast_storage_is_as_good_as_memory(steps, slots, states):
    """Revolve with s-1+d slots, at most: the one that is not counted may hold the read."""
    fast = Pace(steps, 1.0, 1.0, 2.0, 0.0, 0.0)
    both = slots - 1 + states
    assert advances(steps, both + 1) <= effort(fast, slots, states, 1).advances <= advances(steps, both)


@pytest.mark.parametrize("slots", [4, 8])
@pytest.mark.parametrize("states", [4, 16, 64])
@pytest.mark.parametrize("ratio", [0.5, 2, 10])
def test_predicted_and_never_slower(slots, states, ratio, monkeypatch):
    foresight = foresee(*job(2000, slots, states, ratio))
    outcome = replay(foresight)
    assert foresight.choice.prediction.time_seconds == pytest.approx(outcome.seconds, rel=0.08)
    assert outcome.peak_stored <= states
    monkeypatch.setattr(module, "_cut_again", lambda *given: iter(()))
    once = replay(foresee(*job(2000, slots, states, ratio)))
    assert outcome.seconds <= once.seconds * (1 + 1e-9)
    if slots == 4 and states <= 16:
        assert outcome.seconds <= 0.9 * once.seconds


def test_not_where_storage_has_room():
    assert choose(*job(2000, 4, 16, 2)).longest_piece is not None
    assert choose(*job(2000, 4, 2000, 2)).longest_piece is None
    problem, costs = job(2000, 4, 16, 2)
    assert choose(replace(problem, steps=None), costs).longest_piece is None
    assert layout_of(choose(problem, costs)).longest_piece is not None


def test_the_choice_is_quick():
    problem, costs = job(10**9, 8, 1000, 2)
    began = time.perf_counter()
    assert choose(problem, costs).longest_piece is not None
    assert time.perf_counter() - began < 5.0


@pytest.mark.parametrize("kind", [Waves, FreeWaves])
@pytest.mark.parametrize("items", [2, 5, 16])
@pytest.mark.parametrize("slots", [3, 6])
def test_the_same_bits_in_a_real_run(scratch, kind, items, slots):
    model = kind(600)
    options = {"memory": slots * STATE, "disk": scratch, "disk_limit": items * ITEM, "costs": storing_costs(SIZE)}
    sweep = longtape.Sweep(model, 600, **options)
    sweep.forward()
    model.adjoint[0][:] = 1.0
    sweep.reverse()
    assert np.array_equal(model.adjoint[0], exact(600))
    report = sweep.report
    assert not report.faults
    assert report.measured.peak_disk_bytes <= items * ITEM
    assert report.writes > items  # more than it holds
    # Steps are much shorter than stated here, so that transfers hold slots for longer.
    assert report.measured.steps_recomputed <= 1.5 * report.predicted.steps_recomputed
