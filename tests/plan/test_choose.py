"""The choice: always within the budget, never worse than Revolve, quick however long the job."""

from dataclasses import replace
from itertools import pairwise
from math import ceil, inf
from time import perf_counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from longtape.actions import Kind
from longtape.errors import BudgetError, UsageError
from longtape.foresee import layout_of
from longtape.plan import choose as module
from longtape.plan.choose import Choice, choose, predict_again
from longtape.plan.costs import Costs, Problem
from longtape.plan.predict import HORIZON, Footprint, can_record, predict_asynchronous, predict_revolve
from longtape.plan.simulate import Speeds, simulate

MIB = 2**20
STEP = Costs(1e-3, 2e-3)
RECORDED = replace(STEP, record=1.2e-3, pull_back=1e-3)


def disk(costs, speed, latency=0.0):
    return replace(
        costs,
        write_bytes_per_second=speed,
        read_bytes_per_second=speed,
        write_latency=latency,
        read_latency=latency,
    )


@st.composite
def problems(draw):
    """Jobs of every kind; sizes and times over many orders of magnitude."""
    state = draw(st.sampled_from([1, 8, 1000, 4096, MIB, 3 * MIB + 17, 10**9]))
    slots = draw(st.sampled_from([1, 2, 3, 5, 16, 100, 10_000]))
    records = draw(st.booleans())
    with_disk = draw(st.booleans())
    known = draw(st.booleans()) or not with_disk
    problem = Problem(
        steps=draw(st.one_of(st.integers(1, 300), st.sampled_from([10**4, 10**6, 10**9]))) if known else None,
        state_nbytes=state,
        memory_nbytes=slots * state + draw(st.integers(0, state - 1)),
        has_disk=with_disk,
        disk_nbytes=draw(st.sampled_from([None, 0, 3 * state, 1000 * state])),
        residual_nbytes=draw(st.sampled_from([1, state // 2 + 1, state, 4 * state])) if records else None,
        tape_nbytes=draw(st.sampled_from([0, 1, state, 5 * state])),
        max_window=draw(st.sampled_from([1, 2, 50, 10**6])),
    )
    forward = draw(st.sampled_from([1e-6, 1e-3, 1.0]))
    costs = Costs(
        forward=forward,
        reverse=forward * draw(st.sampled_from([1.0, 2.0, 3.5])),
        record=forward * 1.2 if records else None,
        pull_back=forward * draw(st.sampled_from([0.5, 1.0, 2.0])) if records else None,
        write_bytes_per_second=draw(st.sampled_from([1e5, 1e8, 3e9, inf])),
        read_bytes_per_second=draw(st.sampled_from([1e5, 1e8, 3e9, inf])),
        write_latency=draw(st.sampled_from([0.0, 1e-4])),
        read_latency=draw(st.sampled_from([0.0, 1e-4])),
    )
    return problem, costs


@given(problems())
def test_memory_is_never_exceeded(asked):
    problem, costs = asked
    choice = choose(problem, costs)
    assert choice.footprint.nbytes(problem) <= problem.memory_nbytes
    assert choice.prediction.peak_memory_bytes <= problem.memory_nbytes
    assert all(prediction.peak_memory_bytes <= problem.memory_nbytes for _, prediction in choice.alternatives)


@given(problems())
def test_never_predicted_worse_than_revolve(asked):
    problem, costs = asked
    if problem.steps is None:
        return
    slots = min(problem.steps, problem.memory_nbytes // problem.state_nbytes)
    revolve = predict_revolve(problem, costs, Footprint(1, slots))
    choice = choose(problem, costs)
    assert choice.prediction.time_seconds <= revolve.time_seconds * (1 + 1e-6)
    for schedule, prediction in choice.alternatives:
        storage = schedule in ("asynchronous", "residuals")
        assert choice.prediction.time_seconds <= prediction.time_seconds * (1.02 if storage else 1 + 1e-6)


@given(problems())
def test_parameters_are_consistent(asked):
    problem, costs = asked
    choice = choose(problem, costs)
    assert choice.window >= 1
    assert choice.slots >= 1
    assert 0 <= choice.tail <= (problem.steps or 0)
    assert choice.stall_spacing is None or choice.stall_spacing % choice.window == 0
    assert 0.0 <= choice.record_fraction <= 1.0
    if not can_record(problem, costs):
        assert choice.window <= problem.max_window
        assert choice.blocks == choice.record_fraction == 0
    if not problem.has_disk:
        assert not choice.uses_disk
    if choice.window > 1 and can_record(problem, costs):
        assert choice.blocks >= 1
    if choice.schedule == "residuals":
        assert choice.blocks >= (2 if choice.record_fraction == 1.0 else 3)
        assert choice.window == 1 or choice.window * (problem.residual_nbytes or 0) <= module.LARGEST_BLOCK
    if choice.uses_disk and problem.steps is not None and problem.disk_nbytes is not None:
        assert choice.prediction.peak_disk_bytes <= problem.disk_nbytes + problem.state_nbytes
    assert len({choice.schedule, *(name for name, _ in choice.alternatives)}) == 1 + len(choice.alternatives)


def test_everything_fits():
    choice = choose(Problem(10, MIB, 64 * MIB), STEP)
    assert (choice.schedule, choice.slots, choice.blocks, choice.tail) == ("store_all", 10, 0, 10)
    assert choice.prediction.overhead == 1.0


def test_residuals_that_fit_are_all_kept():
    choice = choose(Problem(10, MIB, 64 * MIB, residual_nbytes=4 * MIB), RECORDED)
    assert (choice.schedule, choice.record_fraction) == ("store_all", 1.0)
    assert choice.blocks * choice.window >= 10
    assert choice.prediction.overhead == 1.0


def test_memory_alone_is_revolve():
    choice = choose(Problem(1000, MIB, 16 * MIB), STEP)
    assert (choice.schedule, choice.window, choice.slots, choice.tail) == ("revolve", 1, 16, 1000)
    assert choice.prediction.advances == pytest.approx(2860, abs=5)


def test_memory_alone_profits_from_windows():
    plain = choose(Problem(10_000, MIB, 16 * MIB), STEP)
    taping = choose(Problem(10_000, MIB, 16 * MIB, tape_nbytes=MIB // 4, max_window=1000), STEP)
    recording = choose(Problem(10_000, MIB, 16 * MIB, residual_nbytes=MIB // 4), RECORDED)
    assert taping.window > 1
    assert taping.blocks == 0
    assert taping.prediction.time_seconds < 0.8 * plain.prediction.time_seconds
    assert (recording.schedule, recording.blocks) == ("revolve", 1)
    assert recording.window > 1


def test_storage_that_keeps_up_gives_the_mean_spacing():
    choice = choose(Problem(100_000, MIB, 16 * MIB, has_disk=True), disk(STEP, 4e8))
    assert (choice.schedule, choice.stall_spacing) == ("asynchronous", None)
    assert choice.spacing == pytest.approx(MIB / 4e8 / 1e-3)
    assert 0 < choice.tail < 1000
    assert [name for name, _ in choice.alternatives] == ["revolve"]


def test_an_interval_whose_tapes_fit_is_one_window():
    """Cost falls from 2 - 1/r + b to 1 + b a step."""
    problem = Problem(100_000, MIB, 64 * MIB, has_disk=True, tape_nbytes=MIB // 4, max_window=1000)
    choice = choose(problem, disk(STEP, 1e8))
    assert choice.window == ceil(MIB / 1e8 / 1e-3)
    assert choice.prediction.overhead == pytest.approx(1.0, abs=1e-3)


def test_slow_storage_and_few_slots_wait():
    problem = Problem(10_000, MIB, 4 * MIB, has_disk=True)
    choice = choose(problem, disk(STEP, MIB / 0.1))
    assert choice.schedule == "asynchronous"
    assert choice.stall_spacing is not None
    assert choice.stall_spacing < 100
    assert choice.spacing == choice.stall_spacing
    assert choice.prediction.stall_seconds > 0


def test_storage_must_earn_its_keep():
    problem = Problem(1000, MIB, 16 * MIB, has_disk=True)
    assert choose(problem, disk(STEP, MIB / 1.0)).schedule == "revolve"


def test_fast_storage_carries_all_residuals():
    problem = Problem(100_000, MIB, 64 * MIB, has_disk=True, residual_nbytes=MIB)
    choice = choose(problem, disk(RECORDED, 3e9, 1e-4))
    assert (choice.schedule, choice.record_fraction, choice.tail) == ("residuals", 1.0, 0)
    assert choice.prediction.overhead == pytest.approx(1.0, abs=1e-3)
    assert choice.window * MIB >= 3e9 * 1e-4 / 0.25 / 2  # latency is unimportant
    assert choice.blocks >= 3


def test_half_fast_storage_carries_some_residuals():
    problem = Problem(100_000, MIB // 4, 64 * MIB, has_disk=True, residual_nbytes=MIB)
    choice = choose(problem, disk(RECORDED, 7e8))
    assert choice.schedule == "residuals"
    assert 0.5 < choice.record_fraction < 1.0
    assert 1.0 < choice.prediction.overhead < 1.3
    assert choice.blocks >= 3


def test_more_bandwidth_is_never_worse():
    problem = Problem(100_000, MIB, 64 * MIB, has_disk=True, residual_nbytes=4 * MIB)
    times = [choose(problem, disk(RECORDED, 2.0**e * 1e6)).prediction.time_seconds for e in range(16)]
    assert all(later <= earlier * 1.02 for earlier, later in pairwise(times))
    assert times[-1] < 0.5 * times[0]


def test_storage_is_used_only_for_a_hundredth_of_the_time():
    small_gains = 0
    for exponent in range(200):
        problem = Problem(1000, MIB, 16 * MIB, has_disk=True)
        choice = choose(problem, disk(STEP, 1e5 * 1.05**exponent))
        predictions = {choice.schedule: choice.prediction, **dict(choice.alternatives)}
        gain = 1 - predictions["asynchronous"].time_seconds / predictions["revolve"].time_seconds
        assert choice.schedule == ("asynchronous" if gain > 0.01 else "revolve")
        small_gains += 0 < gain <= 0.01
    assert small_gains > 0


def test_recording_a_part_needs_a_third_block():
    """One block takes the tapes of the plain windows, two the transfers."""
    costs = disk(RECORDED, 7e8)
    for blocks in (1, 2, 3):
        problem = Problem(100_000, MIB // 4, MIB + blocks * MIB, has_disk=True, residual_nbytes=MIB)
        choice = choose(problem, costs)
        offered = [choice.schedule, *(name for name, _ in choice.alternatives)]
        assert ("residuals" in offered) == (blocks > 2)


@pytest.mark.parametrize(("slots", "tape"), [(2, 3), (3, 30), (3, 3), (5, 500), (20, 100), (200, 1000)])
@pytest.mark.parametrize("steps", [50, 300, 5000])
@pytest.mark.parametrize("records", [False, True])
def test_memory_alone_finds_the_best_window(steps, slots, tape, records):
    problem = Problem(
        steps, 1000, 1000 * slots + 366, residual_nbytes=tape if records else None, tape_nbytes=tape, max_window=10**6
    )
    costs = Costs(1.0, 2.0, *([1.0, 1.0] if records else []))
    times = []
    for window in range(1, steps + 1):
        blocks = int(records and window > 1)
        left = (problem.memory_nbytes - Footprint(window, 0, blocks).nbytes(problem)) // 1000
        if left >= 1:
            times.append(predict_revolve(problem, costs, Footprint(window, left, blocks)).time_seconds)
    assert choose(problem, costs).prediction.time_seconds <= min(times) * 1.001


def test_limited_storage_is_kept_to():
    problem = Problem(10_000, MIB, 8 * MIB, has_disk=True, disk_nbytes=50 * MIB)
    choice = choose(problem, disk(STEP, 1e9))
    assert choice.schedule == "asynchronous"
    assert choice.longest_piece is not None
    assert choice.prediction.peak_disk_bytes <= 50 * MIB
    assert choice.prediction.peak_disk_bytes > 40 * MIB


def test_unknown_length():
    choice = choose(Problem(None, MIB, 8 * MIB, has_disk=True), disk(STEP, 1e9))
    assert (choice.schedule, choice.tail) == ("asynchronous", 0)
    assert choose(Problem(None, MIB, 8 * MIB), STEP).schedule == "online"


def test_unknown_length_is_predicted_within_the_disk_limit():
    problem = Problem(None, MIB, 8 * MIB, has_disk=True, disk_nbytes=50 * MIB)
    choice = choose(problem, disk(STEP, 1e9))
    assert (choice.schedule, choice.stall_spacing) == ("asynchronous", None)
    assert 40 * MIB < choice.prediction.peak_disk_bytes <= 50 * MIB
    assert choose(replace(problem, disk_nbytes=MIB // 2), disk(STEP, 1e9)).schedule == "online"


@pytest.mark.parametrize(("limit", "speed"), [(None, 3e8), (50 * MIB, 3e8), (None, 3e7)])
@pytest.mark.parametrize("records", [False, True])
def test_once_the_length_is_known_it_is_predicted_again(limit, speed, records):
    problem = Problem(None, MIB, 8 * MIB, True, limit, residual_nbytes=MIB // 2 if records else None)
    costs = disk(RECORDED if records else STEP, speed)
    choice = choose(problem, costs)
    assert predict_again(choice, replace(problem, steps=HORIZON), costs) == choice.prediction
    shorter = predict_again(choice, replace(problem, steps=HORIZON // 2), costs)
    assert 0.3 < shorter.time_seconds / choice.prediction.time_seconds < 0.6


@pytest.mark.parametrize("speed", [3e9, 4e8, 3e8])
@pytest.mark.parametrize("steps", [300, 4_000])
def test_recorded_windows_of_a_known_length_are_predicted_again_as_they_were(speed, steps):
    problem, costs = Problem(steps, MIB, 24 * MIB, True, residual_nbytes=MIB // 2), disk(RECORDED, speed)
    choice = choose(problem, costs)
    assert choice.schedule == "residuals"
    assert predict_again(choice, problem, costs) == choice.prediction


def test_too_little_memory_says_the_least():
    with pytest.raises(BudgetError, match=r"999 bytes was asked for.* 1000 bytes, which is the least"):
        choose(Problem(10, 1000, 999), STEP)
    assert choose(Problem(10, 1000, 1000), STEP).slots == 1


@pytest.mark.parametrize(
    ("problem", "costs"),
    [
        (Problem(0, 1, 1), STEP),
        (Problem(10, 1, 1), replace(STEP, forward=-1.0)),
        (Problem(10, 1, 1), replace(STEP, reverse=inf)),
        (Problem(10, 1, 1, has_disk=True), replace(STEP, read_bytes_per_second=0.0)),
    ],
)
def test_nonsense_is_refused(problem, costs):
    with pytest.raises(UsageError):
        choose(problem, costs)


def test_states_of_no_size_and_steps_of_no_time():
    assert choose(Problem(10, 0, 0), STEP).schedule == "store_all"
    assert choose(Problem(10, 1, 1), Costs(0.0, 0.0)).prediction.overhead == 1.0


@pytest.mark.parametrize("slots", [2, 4, 8, 50])
@pytest.mark.parametrize("write", [3, 40, 150])
def test_close_to_the_best_of_all_windows_and_spacings(slots, write):
    problem = Problem(5000, 1000, 1000 * slots + 500, has_disk=True, tape_nbytes=100, max_window=100)
    costs = Costs(1.0, 2.0, write_bytes_per_second=1000 / write, read_bytes_per_second=1000 / write)
    best = inf
    for window in range(1, 101):
        left = (problem.memory_nbytes - 100 * (window - 1)) // 1000
        if left < 1:
            break
        footprint = Footprint(window, left)
        best = min(best, predict_revolve(problem, costs, footprint).time_seconds)
        enough = 5000 // window // (4 * left)  # fewer stores would not wait but fill the slots
        for fixed in (None, *range(1, min(enough + 1, ceil(write / window)), 2)):
            best = min(best, predict_asynchronous(problem, costs, footprint, fixed=fixed).time_seconds)
    assert choose(problem, costs).prediction.time_seconds <= 1.02 * best


HARD = [
    (Problem(None, MIB, 16 * MIB), STEP),
    (Problem(None, MIB, 16 * MIB, has_disk=True), disk(STEP, 1e8)),
    (Problem(None, MIB, 2 * MIB + 5, has_disk=True, residual_nbytes=4), disk(RECORDED, 1e5, 1e-4)),
    (Problem(None, MIB, 3 * MIB, has_disk=True), disk(Costs(1e-6, 2e-6), 1e3)),
    (Problem(None, MIB, 2 * MIB, has_disk=True), disk(Costs(1e-6, 2e-6), 1e3)),
    (Problem(None, 10**9, 16 * 10**9, has_disk=True), disk(Costs(1e-6, 2e-6), 1e5)),
    (Problem(None, MIB, 64 * MIB, has_disk=True, residual_nbytes=4 * MIB), disk(RECORDED, 1e9, 1e-4)),
    (Problem(None, 8, 16 * MIB, has_disk=True, residual_nbytes=64), disk(RECORDED, 1e9, 1e-4)),
    (Problem(None, 8, 8 * 10**6, has_disk=True, tape_nbytes=1, max_window=10**9), disk(STEP, 1e6, 1e-2)),
]


@pytest.mark.parametrize(("steps", "seconds"), [(10**6, 0.1), (10**9, 1.0)])
@pytest.mark.parametrize("case", range(len(HARD)))
def test_quick(steps, seconds, case):
    problem, costs = HARD[case]
    problem = replace(problem, steps=steps)
    times = []
    for _ in range(3):
        began = perf_counter()
        assert isinstance(choose(problem, costs), Choice)
        times.append(perf_counter() - began)
    assert min(times) < seconds


def test_a_disk_limit_holds_to_the_last_item():
    """Whole snapshots may take a little more than the balance of fractions says; the limit holds all the same."""
    problem = Problem(10**6, 1000, 16_000, has_disk=True, disk_nbytes=10**6, residual_nbytes=1)
    choice = choose(problem, Costs(1e-6, 1e-6, 1.2e-6, 5e-7, 1e8, 1e8))
    assert choice.schedule == "residuals"
    assert choice.prediction.peak_disk_bytes <= problem.disk_nbytes


# What a transfer costs compute


def test_small_steps_are_stored_in_larger_windows_where_transfers_cost_compute():
    """A transfer that costs as much as a step is not made for every step."""
    problem = Problem(4000, 128 * 1024, 16 * MIB, has_disk=True, residual_nbytes=448 * 1024)
    costs = Costs(5e-4, 15e-4, 6e-4, 9e-4, write_bytes_per_second=2e8, read_bytes_per_second=2e8)
    free, dear = (choose(problem, replace(costs, handling=handling)) for handling in (0.0, 1e-3))
    assert dear.prediction.writes < free.prediction.writes / 2
    assert dear.prediction.time_seconds > free.prediction.time_seconds


@pytest.mark.parametrize("bandwidth", [115e6, 180e6, 230e6, 300e6])
def test_plans_with_recorded_windows_have_slots_for_what_has_to_be_run_again(bandwidth):
    """On storage a third slower than believed, no stretch is run again and again: with two slots most steps were."""
    problem = Problem(2000, 128 * 1024, 16 * MIB, has_disk=True, residual_nbytes=448 * 1024)
    speed = dict.fromkeys(("write_bytes_per_second", "read_bytes_per_second"), bandwidth)
    handling = {"handling": 1.5e-4, "handling_per_byte": 1e-11, "save": 2e-5}
    costs = Costs(14e-4, 36e-4, 16e-4, 2e-3, write_latency=1e-4, read_latency=1e-4, **speed, **handling)
    choice = choose(problem, costs)
    assert choice.schedule == "residuals"
    assert choice.slots >= choice.blocks + 2
    block = choice.window * problem.residual_nbytes

    def taken(slower):
        def seconds(key):
            return slower * costs.write_seconds(problem.state_nbytes if key.kind is Kind.SNAPSHOT else block)

        speeds = Speeds(costs.forward, costs.reverse, seconds, seconds, costs.record, costs.pull_back)
        layout = layout_of(choice)
        return simulate(2000, choice.slots, speeds, layout=layout, blocks=choice.blocks).seconds

    assert taken(1.35) < 1.15 * taken(1.0)


def test_only_some_windows_are_recorded_where_that_gains_enough():
    problem = Problem(4_000, MIB, 24 * MIB, True, residual_nbytes=MIB // 2)
    for speed in (5e8, 4e8, 3e8, 2e8, 1.5e8, 1e8):
        choice = choose(problem, disk(RECORDED, speed))
        others = dict(choice.alternatives)
        if 0.0 < choice.record_fraction < 1.0:
            assert choice.prediction.time_seconds < 0.95 * others["asynchronous"].time_seconds
        elif choice.schedule == "asynchronous":
            assert others["residuals"].time_seconds > 0.95 * choice.prediction.time_seconds
