"""The asynchronous plan: as quick as the reference, legal under any timing."""

import itertools
import json
import random
import tracemalloc
from dataclasses import replace
from math import floor
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longtape.actions import Advance, Key, Kind, Reverse, Store, Turn
from longtape.errors import PlanError
from longtape.plan.asynchronous import EXACT, AsynchronousPlan, Layout, Rules
from longtape.plan.binomial import advances
from longtape.plan.course import Course
from longtape.plan.simulate import Speeds, simulate
from longtape.plan.stock import Stock
from longtape.plan.verify import verify

REFERENCE = json.loads((Path(__file__).parents[1] / "data" / "reference_plans.json").read_text())


def constant(seconds):
    return lambda key: seconds


def speeds(b, write, read):
    return Speeds(1.0, b, constant(write), constant(read))


def test_as_quick_as_the_reference():
    """Its rules differ in the phase of the first store; whichever is ahead, it is by less than two writes."""
    taken, reference = 0.0, 0.0
    for case in REFERENCE:
        costs = speeds(case["tb"], case["tw"], case["tr"])
        layout = Layout(tail=case["M"], final_state=False)
        outcome = simulate(case["N"], case["s"], costs, layout=layout, rules=EXACT)
        assert outcome.seconds <= case["T"] + 2 * case["tw"]
        taken, reference = taken + outcome.seconds, reference + case["T"]
    assert taken <= reference


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 5, 8, 10, 20, 50, 100, 1000])
@pytest.mark.parametrize("slots", [1, 2, 3, 5, 10, 16])
def test_without_storage_it_is_revolve(steps, slots):
    if slots == 1 and steps > 100:
        pytest.skip("quadratic")
    actions = []
    outcome = simulate(
        steps, slots, speeds(2, 1, 1), layout=Layout(tail=steps, final_state=False), observe=actions.append
    )
    assert outcome.advances == (advances(steps, slots) if steps > 1 else 0)
    assert verify(actions, steps, slots=slots, final_state=False).advances == outcome.advances


LAYOUTS = st.fixed_dictionaries(
    {
        "window": st.sampled_from([1, 1, 2, 3, 8]),
        "final_state": st.booleans(),
        "initial_is_free": st.booleans(),
        "safety": st.sampled_from([1, 4, 32]),
        "record_fraction": st.sampled_from([0.0, 0.3, 1.0]),
        "dense": st.sampled_from([0, 0, 9, 60, 240]),
    }
)
RULES = st.sampled_from([EXACT, Rules(), Rules(grain_seconds=3.0), Rules(margin=0.0, elastic=False)])


@settings(max_examples=400, deadline=None)
@given(
    steps=st.integers(1, 240),
    slots=st.integers(1, 12),
    blocks=st.integers(0, 4),
    ratio=st.sampled_from([0.1, 0.5, 1, 1.5, 2.5, 4, 10, 33, 200]),
    b=st.sampled_from([1, 2, 3.5]),
    layout=LAYOUTS,
    rules=RULES,
    tail=st.integers(0, 240),
    known=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_is_legal_whatever_the_timing(steps, slots, blocks, ratio, b, layout, rules, tail, known, seed):
    """Noisy transfers, any mix of storing and recording: the verifier and the event model find no fault."""
    noise = random.Random(seed)

    def duration(key):
        return ratio * noise.lognormvariate(0, 1) * (3 if key.kind is Kind.RESIDUALS else 1)

    layout["record_fraction"] *= blocks > 1
    chosen = Layout(**layout, records=blocks > 0, tail=min(tail, steps) if known else 0)
    known = known or not chosen.final_state
    actions = []
    outcome = simulate(
        steps,
        slots,
        Speeds(1.0, b, duration, duration, 1.0, b / 2),
        layout=chosen,
        rules=rules,
        blocks=blocks,
        known=known,
        observe=actions.append,
    )
    assert outcome.peak_slots <= slots
    assert outcome.peak_blocks <= blocks
    assert outcome.forward_stall_seconds == 0.0, "compute waited in the forward sweep"
    if known:
        verdict = verify(
            actions,
            steps,
            slots=slots,
            blocks=blocks,
            initial_is_free=chosen.initial_is_free,
            final_state=chosen.final_state,
        )
        assert verdict.advances == outcome.advances


@pytest.mark.parametrize(("slots", "write", "read"), [(4, 18.0, 33.0), (3, 5.0, 5.0), (6, 30.0, 30.0)])
def test_steady_storage_is_read_no_earlier_than_it_must_be(slots, write, read):
    """Rules for real machines find out that these transfers are punctual, and give no slot up before its time."""
    costs, layout = speeds(2, write, read), Layout(tail=10)
    exact = simulate(1000, slots, costs, layout=layout, rules=Rules(margin=0.0))
    assert simulate(1000, slots, costs, layout=layout).seconds == pytest.approx(exact.seconds, rel=1e-3)


def test_unsteady_storage_is_read_early():
    """Reads take up to three times their mean, and few are waited for."""

    def outcome(rules):
        noise = random.Random(1)

        def duration(key):
            return 10.0 * noise.choice([0.2, 0.4, 0.6, 0.8, 3.0])

        return simulate(4000, 4, Speeds(1.0, 2.0, constant(10.0), duration), layout=Layout(tail=10), rules=rules)

    careful, careless = outcome(Rules()), outcome(Rules(margin=0.0))
    assert careful.stall_seconds < 0.5 * careless.stall_seconds
    assert careful.seconds < 0.97 * careless.seconds


@pytest.mark.parametrize("read", [0.1, 3.0])
def test_reverse_sweep_does_with_the_memory_it_was_said_to_need(read):
    costs = speeds(2, 3.0, read)
    free = simulate(400, 40, costs, layout=Layout(tail=4))
    spared = simulate(400, 40, costs, layout=Layout(tail=4, staging=4, held=7))
    assert (free.peak_slots, spared.peak_slots) == (40, 7)
    assert spared.seconds < 1.02 * free.seconds


def test_memory_is_used_where_states_lie_further_apart_than_was_thought():
    """Storage is ten times slower than the plan believed: to recompute in 7 slots what 40 hold would be dear."""
    costs = speeds(2, 30.0, 30.0)
    free = simulate(1200, 40, costs, layout=Layout(tail=4))
    spared = simulate(1200, 40, costs, layout=Layout(tail=4, staging=4, held=7))
    assert spared.peak_slots > 7
    assert spared.seconds < 1.01 * free.seconds


def test_spared_memory_is_there_when_nothing_else_makes_room():
    stock = Stock(4, steps=100)
    course = Course(stock, Layout(held=2), Rules())
    for step in (0, 5):
        stock.put(Key(Kind.SNAPSHOT, step))
        course.protect(step)
    stock.snapshots.spare(2)
    assert stock.snapshots.free == 0
    assert list(course.make_room()) == []
    assert stock.snapshots.free == 1


def test_recording_everything_recomputes_nothing():
    outcome = simulate(
        1000,
        4,
        Speeds(1.0, 3.0, constant(0.5), constant(0.5), 1.0, 2.0),
        layout=Layout(window=4, records=True, record_fraction=1.0),
        blocks=4,
    )
    assert (outcome.advances, outcome.recorded) == (0, 1000)
    assert outcome.seconds == pytest.approx(3000)
    assert outcome.stall_seconds == 0.0


def test_overhead_is_constant_in_the_length():
    per_step = [simulate(n, 16, speeds(2, 4, 4), layout=Layout(tail=0)).seconds / n for n in (1000, 4000, 16000)]
    assert max(per_step) / min(per_step) < 1.01


@pytest.mark.parametrize(
    ("slots", "ratio", "dense"), [(64, 1.25, 300), (100, 1.5, 288), (100, 2.5, 160), (20, 1.25, 80)]
)
def test_a_dense_end_is_run_once(slots, ratio, dense):
    """Where writes take r steps, storage takes one state in r and memory the others of the last L = (s-4)·r/(r-1)."""
    steps = 1000
    times = [0] * steps

    def count(action):
        if isinstance(action, Advance):
            for step in range(action.start, action.stop):
                times[step] += 1

    rules = replace(EXACT, deep=True)
    outcome = simulate(steps, slots, speeds(1, ratio, ratio), layout=Layout(dense=dense), rules=rules, observe=count)
    assert times[-dense:] == [1] * dense
    assert outcome.stall_seconds < 0.01 * steps
    bound = 2 * steps + max(0, steps - slots - floor(steps / ratio))
    assert outcome.seconds <= 1.005 * bound


@pytest.mark.parametrize("slower", [2.0, 10.0, 400.0])
@pytest.mark.parametrize("rules", [EXACT, Rules(grain_seconds=0.0)])
def test_a_dense_end_that_storage_cannot_keep_up_with_is_thinned(slower, rules):
    """A plan made for r = 1.25 that meets another disk stays near to one without the dense end."""

    def run(layout):
        actual = Speeds(1.0, 2.0, constant(1.25 * slower), constant(1.25 * slower))
        believed = Speeds(1.0, 2.0, constant(1.25), constant(1.25))
        return simulate(1000, 64, actual, layout=layout, rules=rules, believed=believed)

    dense, greedy = run(Layout(dense=300)), run(Layout(tail=64))
    assert dense.forward_stall_seconds == 0.0
    assert dense.seconds <= 1.05 * greedy.seconds


def test_a_billion_steps_cost_no_memory():
    tracemalloc.start()
    stock = Stock(64, steps=10**9)
    plan = iter(AsynchronousPlan(stock, Layout(tail=10**9)))
    first = list(itertools.islice(plan, 20))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert first
    assert peak < 1_000_000


def test_an_unknown_length_ends_where_the_job_says():
    actions = []
    simulate(37, 4, speeds(2, 3, 3), known=False, observe=actions.append)
    turn = next(i for i, action in enumerate(actions) if isinstance(action, Turn))
    assert max(a.stop for a in actions[:turn] if isinstance(a, Advance)) >= 37


def test_the_verifier_sees_what_is_wrong():
    actions = []
    simulate(20, 3, speeds(2, 2, 2), layout=Layout(tail=20), observe=actions.append)
    verify(actions, 20, slots=3)
    with pytest.raises(PlanError, match="at once"):
        verify(actions, 20, slots=2)
    needed = [i for i, action in enumerate(actions) if isinstance(action, (Advance, Reverse, Store, Turn))]
    for index in needed:
        with pytest.raises(PlanError):
            verify(actions[:index] + actions[index + 1 :], 20, slots=3)
