"""Plans for a length not known: thinning on limited storage, and restart points in memory alone."""

import random
from itertools import pairwise
from math import ceil, inf

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longtape.actions import Advance, Kind, Record, Turn
from longtape.plan.asynchronous import EXACT, AsynchronousPlan, Layout, Rules
from longtape.plan.binomial import advances, repetitions
from longtape.plan.online import cheapest_drop
from longtape.plan.simulate import Speeds, simulate
from longtape.plan.stock import Stock
from longtape.plan.verify import verify


def constant(seconds):
    return lambda key: seconds


def run(steps, slots, write=1.0, **more):
    return simulate(steps, slots, Speeds(1.0, 2.0, constant(write), constant(write)), known=False, **more)


def within(actions, steps):
    """The actions, with the run that found the end cut off there."""
    for action in actions:
        if isinstance(action, (Advance, Record)) and action.stop > steps:
            action = type(action)(action.start, steps)
        if not isinstance(action, Advance) or action.start < action.stop:
            yield action


# Limited storage


@pytest.mark.parametrize("slots", [4, 8, 16])
@pytest.mark.parametrize("write", [1, 2.5])
@pytest.mark.parametrize("rules", [EXACT, Rules()])
def test_thinning_costs_little_over_uniform_spacing(slots, write, rules):
    """With room for 64 states and N = 64·64·⌈r⌉: at most 0.2 advances a step more."""
    steps, room = 64 * 64 * ceil(write), 64
    outcome = run(steps, slots, write, layout=Layout(), rules=rules, storage_limit=room)
    uniform = run(steps, slots, write, layout=Layout(fixed_spacing=steps // room), rules=rules)
    assert uniform.peak_stored <= room + 1
    assert outcome.peak_stored <= room
    assert outcome.forward_stall_seconds == 0.0
    assert outcome.advances - uniform.advances <= 0.2 * steps


@settings(max_examples=60, deadline=None)
@given(st.integers(50, 3000), st.integers(3, 40), st.sampled_from([0.5, 1, 2.5, 7]))
def test_gaps_stay_alike(steps, room, write):
    restarts = []

    def observe(action):
        if isinstance(action, Turn):
            restarts.extend(plan_of[0]._course.restarts)

    plan_of = []
    made = AsynchronousPlan.__init__

    def remember(self, *arguments):
        made(self, *arguments)
        plan_of.append(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(AsynchronousPlan, "__init__", remember)
        run(steps, 8, write, rules=EXACT, storage_limit=room, observe=observe)
    gaps = [after - before for before, after in pairwise([*restarts, steps])]
    inner = gaps[:-1]
    assert len(restarts) <= room + 8
    if len(restarts) > 2 and steps > 4 * room * max(1, write):
        # g and 2g, but for an odd g left over when g was doubled.
        assert max(inner) <= 4 * min(inner) + 2 * ceil(write)
        assert gaps[-1] <= 2 * max(inner) + 2 * ceil(write)


@settings(max_examples=300, deadline=None)
@given(
    steps=st.integers(1, 200),
    slots=st.integers(1, 8),
    blocks=st.sampled_from([0, 2, 3, 4]),
    block_nbytes=st.sampled_from([1, 2, 5]),
    room=st.integers(0, 40),
    ratio=st.sampled_from([0.1, 0.5, 1, 2.5, 7, 30]),
    window=st.sampled_from([1, 1, 2, 3]),
    fraction=st.sampled_from([0.0, 0.3, 0.5, 1.0]),
    safety=st.sampled_from([1, 4, 32]),
    free=st.booleans(),
    stores=st.booleans(),
    rules=st.sampled_from([EXACT, Rules()]),
    seed=st.integers(0, 1000),
)
def test_a_limit_is_kept_to_whatever_the_timing(
    steps, slots, blocks, block_nbytes, room, ratio, window, fraction, safety, free, stores, rules, seed
):
    """The event model refuses a write for which there is no room."""
    noise = random.Random(seed)
    nbytes = {Kind.SNAPSHOT: 1, Kind.RESIDUALS: block_nbytes}

    def duration(key):
        return ratio * noise.lognormvariate(0, 1) * nbytes[key.kind]

    layout = Layout(
        window=window,
        records=blocks > 0,
        record_fraction=fraction * (blocks > 0),
        safety=safety,
        initial_is_free=free,
        stores=stores,
    )
    actions = []
    outcome = simulate(
        steps,
        slots,
        Speeds(1.0, 2.0, duration, duration, 1.0, 1.0),
        layout=layout,
        rules=rules,
        blocks=blocks,
        known=False,
        storage_limit=room,
        item_nbytes=nbytes,
        observe=actions.append,
    )
    assert outcome.forward_stall_seconds == 0.0
    verify(within(actions, steps), steps, slots=slots, blocks=blocks, initial_is_free=free)


# Memory alone


def reversal(restarts, slots):
    """Advances that reverse everything below the last position, the k-th interval on s-k slots."""
    return sum(advances(after - before, max(1, slots - k)) for k, (before, after) in enumerate(pairwise(restarts)))


@given(st.sets(st.integers(1, 500), min_size=1, max_size=9), st.integers(0, 4))
def test_the_cheapest_drop_is_the_cheapest(positions, spare):
    restarts = [0, *sorted(positions)]
    slots = max(1, len(restarts) - 1 + spare)
    totals = {
        k: reversal(restarts[:k] + restarts[k + 1 :] + ([restarts[-1]] if k == len(restarts) - 1 else []), slots)
        for k in range(1, len(restarts))
    }
    assert totals[cheapest_drop(restarts, slots)] == min(totals.values())


@pytest.mark.parametrize(
    ("slots", "worst"), [(1, 1.06), (2, 1.12), (3, 1.11), (5, 1.12), (10, 1.07), (20, 1.04), (50, 1.02)]
)
@pytest.mark.parametrize("free", [False, True])
def test_memory_alone_is_close_to_the_offline_optimum(slots, worst, free):
    """t(N, s) + ρ(N+1, s) is the least with N known and the final state wanted."""
    for steps in (1, 2, 3, 7, 20, 50, 100, 300, 1000, 2000):
        if slots == 1 and steps > 300:
            continue
        actions = []
        outcome = run(steps, slots, layout=Layout(stores=False, initial_is_free=free), observe=actions.append)
        assert (outcome.writes, outcome.reads) == (0, 0)
        least = advances(steps, slots + free) + repetitions(steps + 1, slots + free)
        assert outcome.advances <= worst * least
        verify(within(actions, steps), steps, slots=slots, initial_is_free=free)


@pytest.mark.parametrize("slots", [65, 100, 300])
def test_many_slots_keep_gaps_alike(slots):
    for steps in (50, 300, 700, 2000, 5000):
        outcome = run(steps, slots, layout=Layout(stores=False))
        assert outcome.advances <= 1.15 * (advances(steps, slots) + repetitions(steps + 1, slots))


def test_levels_of_checkpoints_cost_more():
    """Wang, Moin and Iaccarino (2009): least repetition number, but more advances and many more copies."""
    ours, theirs = [], []
    for slots in (3, 6, 10, 20):
        for steps in (100, 300, 700, 1500):
            least = advances(steps, slots) + repetitions(steps + 1, slots)
            ours.append(run(steps, slots, layout=Layout(stores=False)).advances / least)
            theirs.append((steps + reversal([*levels(steps, slots), steps], slots)) / least)
    assert sum(ours) / len(ours) < 1.02
    assert sum(theirs) / len(theirs) > 1.04
    assert max(ours) < max(theirs)


def levels(steps, slots):
    """The checkpoints that the dynamic algorithm holds at the end."""
    held = [(0, inf)]
    for step in range(1, steps):
        if len(held) < slots:
            held.append((step, 0))
            continue
        highest, dispensable = -1.0, None
        for k in range(len(held) - 1, 0, -1):
            if held[k][1] < highest:
                dispensable = k
                break
            highest = max(highest, held[k][1])
        level = 0 if dispensable is not None else held[-1][1] + 1
        del held[dispensable if dispensable is not None else -1]
        held.append((step, level))
    return [step for step, _ in held]


def test_a_billion_steps_in_memory_alone_cost_no_memory():
    plan = iter(AsynchronousPlan(Stock(50), Layout(stores=False)))
    looked = 0
    for action in plan:
        looked += isinstance(action, Advance)
        if isinstance(action, Advance) and action.stop > 10**9:
            break
    assert looked < 20_000
