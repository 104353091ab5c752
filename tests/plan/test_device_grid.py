"""Plans behind a device in the event model: as predicted, and never worse than with a tier less."""

import itertools
from dataclasses import replace
from math import ceil
from statistics import median

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from plan.test_unknown import within

from longtape.actions import Advance, Key, Kind, PullBack, Record, Reverse, Store, Turn
from longtape.foresee import Foresight, layout_of, replay
from longtape.plan import simulate as simulation
from longtape.plan.asynchronous import EXACT, Layout
from longtape.plan.binomial import advances, repetitions, split, stores
from longtape.plan.choose import choose
from longtape.plan.copies import Link
from longtape.plan.costs import Costs, Device, Problem
from longtape.plan.simulate import Speeds, simulate
from longtape.plan.verify import verify

pytestmark = pytest.mark.slow

STATE = 1000
RULES = replace(EXACT, deep=True)


def constant(seconds):
    return lambda key: seconds


def tiers(steps, inner, slots, copy, write=None, *, b=2.0, **more):
    """Steps of one second; `inner` states beside staging on the device, `slots` in the host's memory."""
    problem = Problem(steps, STATE, slots * STATE, write is not None, device=Device((4 + inner) * STATE), **more)
    costs = Costs(1.0, b, out_bytes_per_second=STATE / copy, in_bytes_per_second=STATE / copy)
    if write is not None:
        costs = replace(costs, write_bytes_per_second=STATE / write, read_bytes_per_second=STATE / write)
    return problem, costs


def played(problem, costs):
    choice = choose(problem, costs)
    return choice, replay(Foresight(problem, costs, choice, ()), RULES)


def error(choice, outcome):
    return abs(choice.prediction.time_seconds / outcome.seconds - 1.0)


# The grid


CELLS = [
    *itertools.product((100, 1000), (1, 3, 8), (2, 4, 32), (0.3, 2.5, 10), (None, 30, 300)),
    *itertools.product((100,), (3,), (64,), (0.3, 2.5), (None,)),
    *itertools.product((10_000,), (3,), (4, 32), (1.0, 10), (None, 100)),
]


@pytest.fixture(scope="module")
def grid():
    return {cell: played(*tiers(*cell)) for cell in CELLS}


def test_snapshots_take_what_is_predicted(grid):
    errors = [error(*found) for found in grid.values()]
    assert median(errors) <= 0.01
    assert max(errors) <= 0.1
    assert {choice.on_device for choice, _ in grid.values()} == {False, True}
    assert {choice.schedule for choice, _ in grid.values()} == {"store_all", "revolve", "asynchronous"}


def test_the_host_never_harms(grid):
    """Against Revolve in all of the device's memory, without host and disk."""
    for (steps, inner, *_), (_, outcome) in grid.items():
        slots = min(inner + 4, steps)
        alone = advances(steps, slots) + repetitions(steps + 1, slots) + 2.0 * steps
        assert outcome.seconds <= alone * 1.0001


def test_the_device_never_harms(grid):
    """Against windows that are as short as the link lets them be, with no snapshots within."""
    for cell, (_, outcome) in grid.items():
        _, _, slots, copy, write = cell
        if write is None:
            shortest = ceil(copy)
            windows, again = -(-cell[0] // shortest), advances(shortest, 1) / shortest
            pipe = advances(windows, slots) + repetitions(windows + 1, slots)
            assert outcome.seconds <= (pipe * shortest + cell[0] * (again + 2.0)) * 1.01 + copy


def test_the_middle_tier_does_more_than_a_pipe(grid):
    """1 + t(m, s₂-2)/m + t(I₂, s₁-1)/I₂ + b and 1 + t(I₃, s₁-1)/I₃ + b a step, for long sequences; s₁-1 are `inner`."""
    compared = 0
    for (steps, inner, slots, copy, write), (_, outcome) in grid.items():
        if write is None or steps < 20 * write or slots < 3:
            continue
        shortest, longest = ceil(copy), ceil(max(copy, write))
        formulas = [1 + advances(longest, inner) / longest + 2.0]
        for between in range(shortest, longest + 1):
            count = ceil(longest / between)
            formulas.append(1 + advances(count, slots - 2) / count + advances(between, inner) / between + 2.0)
        assert outcome.seconds <= steps * min(formulas) * 1.01 + 2 * write
        compared += 1
    assert compared >= 20


def test_bytes_over_the_link_are_those_predicted(grid):
    near = [(c.prediction, o) for c, o in grid.values() if not c.on_device and c.prediction.bytes_in > 50 * STATE]
    assert len(near) > 30
    for prediction, outcome in near:
        assert prediction.bytes_in == pytest.approx(outcome.bytes_in, rel=0.05, abs=5 * STATE)
    off = [abs(prediction.bytes_out / outcome.bytes_out - 1.0) for prediction, outcome in near]
    assert median(off) <= 0.03
    assert max(off) <= 0.3


def test_the_link_delays_nothing(grid):
    for (_, _, _, copy, _), (choice, outcome) in grid.items():
        assert choice.on_device or outcome.link_stall_seconds <= max(3 * copy, 0.02 * outcome.seconds)


RESIDUALS = [
    *itertools.product((600,), (20, 60), (60, 20_000), (0.5, 4), (0.5, 1.1, 2, 4), (0.8, 1.3), (None, 0.8)),
]


@pytest.fixture(scope="module")
def recorded():
    found = []
    for steps, here, host, size, out, back, write in RESIDUALS:
        block = round(size * STATE)
        problem = Problem(steps, STATE, host * STATE, write is not None, residual_nbytes=block)
        problem = replace(problem, device=Device(here * STATE, block))
        costs = Costs(1.0, 2.2, 1.2, 1.0)
        costs = replace(costs, out_bytes_per_second=block / out, in_bytes_per_second=block / (out * back))
        if write is not None:
            costs = replace(costs, write_bytes_per_second=block / write, read_bytes_per_second=block / write)
        found.append(played(problem, costs))
    return found


def test_residuals_take_what_is_predicted(recorded):
    errors = [error(*found) for found in recorded]
    assert median(errors) <= 0.01
    assert max(errors) <= 0.1
    kinds = {(choice.schedule, choice.uses_disk) for choice, _ in recorded if choice.record_fraction}
    assert kinds == {("store_all", False), ("residuals", False), ("residuals", True)}
    assert any(0.0 < choice.record_fraction < 1.0 for choice, _ in recorded)


@settings(max_examples=40)
@given(
    st.integers(1, 200),
    st.integers(0, 6),
    st.integers(1, 12),
    st.sampled_from([0.3, 1.0, 2.5, 10.0]),
    st.sampled_from([None, 0.5, 3.0, 30.0]),
    st.booleans(),
    st.booleans(),
)
def test_every_plan_is_legal(steps, inner, slots, copy, write, records, known):
    problem, costs = tiers(steps, inner, slots, copy, write, residual_nbytes=2 * STATE if records else None)
    problem = replace(problem, device=replace(problem.device, tape_nbytes=2 * STATE if records else 0))
    if records:
        costs = replace(costs, record=1.2, pull_back=1.0)
    choice = choose(problem if known else replace(problem, steps=None), costs)
    actions, block = [], choice.window * 2 * STATE
    size = {Kind.SNAPSHOT: STATE, Kind.RESIDUALS: block}
    outcome = simulate(
        steps,
        choice.slots,
        Speeds(
            1.0,
            2.0,
            lambda key: costs.write_seconds(size[key.kind]),
            lambda key: costs.read_seconds(size[key.kind]),
            costs.record,
            costs.pull_back,
            lambda key: costs.out_seconds(size[key.kind]),
            lambda key: costs.in_seconds(size[key.kind]),
            device_slots=choice.device_slots,
        ),
        layout=layout_of(choice),
        blocks=choice.blocks,
        known=known,
        observe=actions.append,
    )
    verdict = verify(within(actions, steps), steps, slots=choice.slots, blocks=choice.blocks)
    assert outcome.advances == verdict.advances or choice.device_slots
    assert outcome.recorded == verdict.recorded


# The link in the event model


def times(steps, slots, speeds, layout, **more):
    """When each action began, and the outcome."""
    seen, perform = [], simulation._Machine.perform

    def noting(machine, action):
        seen.append((action, machine.now))
        perform(machine, action)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(simulation._Machine, "perform", noting)
        return seen, simulate(steps, slots, speeds, layout=layout, rules=EXACT, **more)


def test_copies_out_hide_behind_steps():
    speeds = Speeds(1.0, 2.0, constant(0), constant(0), copy_out=constant(1.0), copy_in=constant(0.0))
    outcome = simulate(10, 10, speeds, layout=Layout(tail=10), rules=EXACT)
    assert (outcome.seconds, outcome.link_stall_seconds) == (30.0, 0.0)
    assert (outcome.bytes_out, outcome.out_seconds) == (10, 10.0)


@pytest.mark.parametrize("staging", [2, 4, 7, 8])
def test_compute_waits_only_when_every_buffer_is_under_way(staging):
    """The last store waits for copy 9 - staging, which ends at 3·(10 - staging)."""
    speeds = Speeds(1.0, 2.0, constant(0), constant(0), copy_out=constant(3.0), copy_in=constant(0.0), staging=staging)
    seen, _ = times(10, 10, speeds, Layout(tail=10))
    turned = next(now for action, now in seen if isinstance(action, Turn))
    assert turned == 1.0 + max(9.0, 3.0 * (10 - staging))


def test_copies_in_hide_behind_adjoints():
    speeds = Speeds(1.0, 2.0, constant(0), constant(0), copy_out=constant(0.5), copy_in=constant(2.0))
    outcome = simulate(10, 10, speeds, layout=Layout(tail=10), rules=EXACT)
    assert outcome.link_stall_seconds == 2.0  # the first one has nothing to hide behind
    assert (outcome.bytes_in, outcome.in_seconds) == (10, 20.0)
    outcome = simulate(10, 10, replace(speeds, copy_in=constant(2.5)), layout=Layout(tail=10), rules=EXACT)
    assert outcome.link_stall_seconds == 2.5 + 9 * 0.5


def test_an_item_comes_back_no_sooner_than_it_has_left():
    speeds = Speeds(1.0, 2.0, constant(0), constant(0), copy_out=constant(5.0), copy_in=constant(1.0))
    outcome = simulate(1, 1, speeds, layout=Layout(tail=1), rules=EXACT)
    assert outcome.seconds == 5.0 + 1.0 + 2.0


def test_a_write_begins_when_its_item_has_left():
    """State 0 leaves by 3, and is written by 8; the sweep is over at 4 and waits for nothing else."""
    speeds = Speeds(1.0, 2.0, constant(5.0), constant(1.0), copy_out=constant(3.0), copy_in=constant(0.0))
    seen, outcome = times(4, 4, speeds, Layout(tail=1, fixed_spacing=1))
    begun = [now for action, now in seen if isinstance(action, Store)]
    assert begun == [0.0, 1.0, 2.0, 3.0]
    assert outcome.writes >= 1
    single, outcome = times(2, 1, speeds, Layout(tail=1, fixed_spacing=1))
    turned = next(now for action, now in single if isinstance(action, Turn))
    assert turned >= 3.0 + 5.0  # the one slot is free only then


def test_windows_recorded_and_pulled_back_run_at_the_pace_of_the_link():
    speeds = Speeds(1.0, 2.0, constant(0), constant(0), 1.0, 1.0, constant(1.5), constant(1.75))
    layout = Layout(record_fraction=1.0, stores=False)
    seen, outcome = times(40, 1, speeds, layout, blocks=40)
    recorded = [now for action, now in seen if isinstance(action, Record)]
    pulled = [now for action, now in seen if isinstance(action, PullBack)]
    assert recorded[30] - recorded[20] == pytest.approx(10 * 1.5)
    assert pulled[30] - pulled[20] == pytest.approx(10 * 1.75)
    assert outcome.bytes_out == 41
    assert outcome.bytes_in == 40
    fast = replace(speeds, copy_out=constant(0.9), copy_in=constant(0.9))
    assert simulate(40, 1, fast, layout=layout, blocks=40).link_stall_seconds == pytest.approx(0.9 + 0.9)  # at the turn


def test_a_window_is_reversed_by_revolve_on_the_device():
    speeds = Speeds(1.0, 2.0, constant(0), constant(0), copy_out=constant(0), copy_in=constant(0), device_slots=2)
    seen, outcome = times(25, 3, speeds, Layout(window=10, tail=25))
    plain = sum(action.stop - action.start for action, _ in seen if isinstance(action, Advance))
    assert outcome.advances == plain + 2 * advances(10, 2) + advances(5, 2)
    began = dict(seen)
    last, turned = Reverse(20, 25), next(now for action, now in seen if isinstance(action, Turn))
    assert began[last] == turned
    assert outcome.seconds == outcome.advances + 25 * 2.0


def test_blocks_come_ahead_up_to_the_next_snapshot():
    snapshot, block = (lambda step: Key(Kind.SNAPSHOT, step)), (lambda step: Key(Kind.RESIDUALS, step))
    link = Link(constant(1.0), constant(1.0), 4)
    for key in (snapshot(0), block(1), block(2), block(3), snapshot(3), block(5)):
        link.send(key, 1)
        link.out.start_next(0.0)
        link.complete(link.out, link.out.end()[0])
    assert link._wanted(6) == [block(5), block(3)]
    link.forget(block(3))
    assert link._wanted(6) == [block(5)]
    assert link._wanted(4) == [snapshot(3)]
    link.forget(snapshot(3))
    assert link._wanted(6) == [block(5), block(2)]
    assert link._wanted(1) == [snapshot(0)]
    link.forget(snapshot(0))
    assert link._wanted(1) == []


@pytest.mark.parametrize("slots", [2, 3, 5, 9])
def test_states_kept_by_revolve(slots):
    def kept(length, c):
        c = max(1, min(c, length - 1))
        if length <= 1 or c == 1:
            return 0
        cut = split(length, c)
        return 1 + kept(length - cut, c - 1) + kept(cut, c)

    for length in (1, 2, 3, 7, 20, 56, 84, 126, 300):
        assert stores(length, slots) == pytest.approx(1 + kept(length, slots), abs=1.0, rel=0.08)
