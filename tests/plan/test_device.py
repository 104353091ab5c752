"""A device in front: what is predicted for its windows and its link, and that nothing exceeds its memory."""

from dataclasses import replace
from itertools import pairwise
from math import ceil, inf
from time import perf_counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from plan.test_choose import MIB, RECORDED, STEP, disk, problems

from longtape.errors import BudgetError, UsageError
from longtape.foresee import foresee, layout_of, time_against_memory
from longtape.plan import nested
from longtape.plan.binomial import advances, capacity
from longtape.plan.choose import choose, predict_again
from longtape.plan.costs import Costs, Device, Problem
from longtape.plan.predict import HORIZON, Footprint, can_record, pace, passage, predict_revolve, recorded_seconds
from longtape.plan.recording import Recording, predict_residuals

STATE = 1000


def link(costs, out, back=None, latency=0.0):
    return replace(
        costs, out_bytes_per_second=out, in_bytes_per_second=out if back is None else back, link_latency=latency
    )


def device_job(steps, inner, slots, *, copy=1.0, back=None, **more):
    """A plain step takes one second, a state `copy` seconds over the link; so many slots beside staging."""
    problem = Problem(steps, STATE, slots * STATE, device=Device((4 + inner) * STATE), **more)
    return problem, link(Costs(1.0, 2.0), STATE / copy, STATE / (copy if back is None else back))


def recording_job(steps, copy, *, staging=4, back=None):
    """Blocks of one step that take `copy` seconds over the link, and are recorded in 1.25 s."""
    device = Device(10**9, 4 * STATE, staging)
    problem = Problem(steps, STATE, 10**9, residual_nbytes=4 * STATE, device=device)
    costs = Costs(1.0, 2.0, record=1.25, pull_back=1.0)
    back = copy if back is None else back
    return problem, link(costs, 4 * STATE / copy, 4 * STATE / back), Footprint(1, 4, 3)


# Sizes


def test_a_copy_takes_latency_and_bandwidth():
    costs = link(STEP, 1e6, 2e6, 0.25)
    assert costs.out_seconds(10**6) == 1.25
    assert costs.in_seconds(10**6) == 0.75


def test_the_device_holds_staging_and_one_window():
    problem = Problem(100, 1000, 10_000, tape_nbytes=7, max_window=100, device=Device(10**6, 50))
    assert Footprint(1, 3).device_nbytes(problem) == 4 * 1000
    assert Footprint(5, 3).device_nbytes(problem) == 4 * 1000 + 4 * 50
    assert Footprint(5, 3, inner=2).device_nbytes(problem) == 4 * 1000 + 2 * 1000
    assert Footprint(5, 3).nbytes(problem) == 3 * 1000  # and the host no tape of it
    assert Footprint(5, 3).device_nbytes(replace(problem, device=None)) == 0
    records = replace(problem, residual_nbytes=400, device=Device(10**6, 400, 6))
    assert Footprint(5, 3).device_nbytes(records) == 6 * 1000 + 5 * 400
    assert Footprint(5, 3, 2).device_nbytes(records) == 6 * 5 * 400 + 5 * 400
    assert Footprint(5, 3, 2).nbytes(records) == 3 * 1000 + 2 * 5 * 400


def test_the_shortest_window_hides_a_state_both_ways():
    problem, costs = device_job(1000, 4, 8, copy=2.5)
    assert nested.least_window(problem, costs) == 3
    assert nested.least_window(problem, link(costs, STATE / 2.5, STATE / 8.2)) == 5  # t_b is 2
    assert nested.least_window(problem, link(costs, STATE / 2.0)) == 2
    assert nested.least_window(problem, link(costs, inf)) == 1
    assert nested.least_window(problem, link(costs, inf, latency=6.5)) == 7
    assert nested.least_window(problem, link(costs, 1e-9)) == 1000
    assert nested.least_window(replace(problem, steps=None), replace(costs, forward=0.0)) == HORIZON


def test_a_window_is_taped_in_one_go_if_it_can_be():
    device = Device(4 * 1000 + 300, 100)
    problem, costs = Problem(50, 1000, 9000, max_window=10, device=device), STEP
    assert nested.footprint(problem, costs, 4, 9) == Footprint(4, 9)
    assert nested.footprint(problem, costs, 5, 9) is None
    larger = replace(problem, device=replace(device, memory_nbytes=6500))
    assert nested.footprint(larger, costs, 10, 9) == Footprint(10, 9)
    assert nested.footprint(larger, costs, 11, 9) == Footprint(11, 9, inner=2)  # more than one call may take
    assert nested.footprint(larger, costs, 3, 9) == Footprint(3, 9)
    largest = replace(problem, max_window=1, device=replace(device, memory_nbytes=10**6))
    assert nested.footprint(largest, costs, 5, 9) == Footprint(5, 9, inner=4)


# Times


@given(st.integers(1, 500), st.integers(1, 30), st.integers(1, 6))
def test_the_adjoint_of_a_window_is_revolve_on_the_device(steps, window, inner):
    problem, costs = device_job(steps, inner, 4)
    job = pace(problem, costs, Footprint(window, 4, inner=inner))
    full, rest = divmod(steps, window)
    again = full * advances(window, inner) + advances(rest, inner)
    assert job.windows * job.adjoint == pytest.approx(steps * costs.reverse + again)
    assert job.windows * job.inner == pytest.approx(again)


def test_the_adjoint_of_a_taped_window():
    problem, costs = Problem(100, STATE, 9 * STATE, max_window=9, device=Device(10**6, 5)), STEP
    assert pace(problem, costs, Footprint(5, 9)).adjoint == pytest.approx(5 * costs.reverse)
    records = replace(problem, residual_nbytes=5)
    assert pace(records, RECORDED, Footprint(5, 9)).adjoint == pytest.approx(5 * (1.2e-3 + 1e-3))
    assert pace(records, RECORDED, Footprint(5, 9, inner=2)).adjoint == pytest.approx(5 * 2e-3 + 6e-3)
    assert pace(records, RECORDED, Footprint(1, 9)).adjoint == pytest.approx(2e-3)


def test_snapshots_hide_behind_windows():
    problem, costs = device_job(100, 2, 4, copy=6.0, back=25.0)
    job = pace(problem, costs, Footprint(5, 4, inner=2))
    assert (job.out, job.back) == (6.0, 25.0)
    assert job.adjoint == 10.0 + 6.0
    moved = passage(job, sparse=3.0, gap=1.1, dense=4.0)
    assert moved.out == 7.0
    assert moved.back == 20
    assert moved.stall == pytest.approx(25.0 + 3 * (6.0 - 5.5) + 4 * (6.0 - 5.0) + 20 * (25.0 - 16.0))
    hidden = pace(problem, link(costs, STATE / 5.0), Footprint(5, 4, inner=2))
    assert passage(hidden, dense=20.0).stall == 5.0


def test_a_window_is_a_step_to_what_is_behind():
    """THEORY: 1 + t(m, s)/m + t(h, s₁)/h + b a step, here with Revolve on all windows."""
    problem, costs = device_job(1000, 3, 5)
    prediction = predict_revolve(problem, costs, Footprint(10, 5, inner=3), final_state=False)
    steps = 10 * advances(100, 5) + 100 * advances(10, 3)
    assert prediction.advances == steps
    assert prediction.time_seconds == pytest.approx(steps + 2 * 1000 + 1.0)  # the first state comes back unhidden
    assert prediction.peak_device_bytes == 7 * STATE
    assert prediction.peak_memory_bytes == 5 * STATE
    assert prediction.bytes_in == 100 * STATE


def test_a_link_that_carries_every_window_recomputes_nothing():
    problem, costs, footprint = recording_job(1000, copy=1.0)
    recording = Recording(problem, costs, footprint, stored=False)
    assert recording.link_forward(1.0) == 0.0
    assert recording.link_reverse(1.0) == 1.0  # the first block
    prediction = predict_residuals(recording, 1.0)
    assert prediction.time_seconds == pytest.approx(1000 * 2.25 + 1.0)
    assert prediction.bytes_out == prediction.bytes_in == 1000 * 4 * STATE
    assert (prediction.writes, prediction.bytes_written, prediction.advances) == (0, 0, 0)


def test_recorded_windows_are_bound_by_the_slower_of_compute_and_link():
    """max(record, t_out) and max(pull_back, t_in) a window."""
    problem, costs, footprint = recording_job(1000, copy=1.5, back=1.75)
    prediction = predict_residuals(Recording(problem, costs, footprint, stored=False), 1.0)
    assert prediction.time_seconds == pytest.approx(1000 * (1.5 + 1.75) + 1.75)
    assert prediction.link_stall_seconds == pytest.approx(1000 * (0.25 + 0.75) + 1.75)
    few = replace(problem, device=replace(problem.device, staging=2))
    prediction = predict_residuals(Recording(few, costs, footprint, stored=False), 1.0)
    assert prediction.time_seconds == pytest.approx(1000 * (1.5 + 1.0 + 1.75) + 1.75)  # none comes ahead


def test_plain_windows_give_the_link_time_for_blocks():
    """With enough buffers, it is only the sum that has to fit."""
    problem, costs, footprint = recording_job(1200, copy=2.5)
    recording = Recording(problem, costs, footprint, run=2, stored=False)
    loads = recording.link_out()
    assert (loads.none, loads.all) == (pytest.approx(1200 * (1 - 0.625 / 2)), pytest.approx(1200 * (1.25 - 2.5)))
    carried = loads.largest_fraction()
    assert 1 / 3 < carried < 0.5
    assert recording.link_forward(carried) == pytest.approx(0.0, abs=1e-9)
    assert loads.spare(0.5) < 0.0
    assert recording.link_forward(0.5) == pytest.approx(-loads.spare(0.5))
    assert carried in recording.turning_points()


def test_few_buffers_make_a_block_hide_behind_what_follows_it():
    problem, costs, footprint = recording_job(1200, copy=2.5, staging=2)
    recording = Recording(problem, costs, footprint, run=2, stored=False)
    assert recording.gaps(1 / 3) == [(2, pytest.approx(400.0)), (3, 0.0)]
    assert recording.link_forward(1 / 3) == pytest.approx(400 * (2.5 - 2.0))
    assert recording.link_forward(0.25) == pytest.approx(300 * (2.5 - 2.0))  # the second snapshot wants the buffer
    assert replace(recording, run=1).link_forward(1 / 3) == pytest.approx(400 * (2.5 - 1.0))
    assert recording.link_forward(1.0) == pytest.approx(1200 * (2.5 - 1.25))
    three = replace(recording, problem=replace(problem, device=replace(problem.device, staging=3)), run=1)
    assert three.link_forward(0.25) == pytest.approx(300 * (2.5 - 2.0))  # behind two snapshots, not behind three


def test_blocks_come_back_behind_the_adjoint_above_them():
    problem, costs, footprint = recording_job(1200, copy=1.0, back=2.5)
    recording = Recording(problem, costs, footprint, stored=False)
    assert recording.link_reverse(0.25) == pytest.approx(300 * (2.5 - 2.0) + 0.625)
    # Of three in a row the first one has 2 s, the others 1 s more.
    assert recording.link_reverse(0.75) == pytest.approx(300 * (3 * 2.5 - 2.0 - 2 * 1.0) + 2.5)
    quick = recording_job(1200, copy=1.0, back=1.2)
    recording = Recording(*quick, stored=False)
    assert recording.link_reverse(0.5) == pytest.approx(0.3)
    assert recording.link_reverse(0.75) == pytest.approx(300 * max(0.0, 3 * 1.2 - 2.0 - 2.0) + 1.2)
    row = (2.0 - 1.0) / 0.2  # as many in a row are hidden
    assert recording.link_reverse(row / (1 + row)) == pytest.approx(1.2)
    assert any(point == pytest.approx(row / (1 + row)) for point in recording.turning_points())
    assert recording.link_reverse(0.95) == pytest.approx(60 * (19 * 1.2 - 2.0 - 18.0) + 1.2)


def test_memory_behind_a_device_holds_what_is_recorded_and_where_plain_runs_start():
    problem, costs, footprint = recording_job(1200, copy=1.0)
    for memory in (900 * 4 * STATE, 400 * 4 * STATE):
        recording = Recording(replace(problem, memory_nbytes=memory), costs, footprint, stored=False)
        fraction = recording.memory().largest_fraction()
        assert 1200 * STATE * (4 * fraction + 1 - fraction) == pytest.approx(memory, rel=0.002)
        held = recording.holding(0.99 * fraction)
        assert 0.97 * memory < held.footprint.nbytes(held.problem) <= memory
        assert recording.holding(min(1.0, 1.02 * fraction)) is None


# The choice


@st.composite
def device_problems(draw):
    """The jobs of `problems`, behind devices and links of every kind."""
    problem, costs = draw(problems())
    staging = draw(st.sampled_from([2, 4, 8]))
    least = max(staging * problem.state_nbytes, 1)
    tape = draw(st.sampled_from([0, 1, problem.state_nbytes, 5 * problem.state_nbytes]))
    device = Device(
        least + draw(st.sampled_from([0, 1, 3, 20, 1000])) * problem.state_nbytes + draw(st.integers(0, 100)),
        tape if problem.residual_nbytes is None else problem.residual_nbytes,
        staging,
    )
    speeds = st.sampled_from([1e5, 1e8, 2e10, inf])
    costs = link(costs, draw(speeds), draw(speeds), draw(st.sampled_from([0.0, 1e-5, 1.0])))
    return replace(problem, device=device), costs


@settings(max_examples=60)
@given(device_problems())
def test_neither_memory_is_exceeded(asked):
    problem, costs = asked
    choice = choose(problem, costs)
    for prediction in (choice.prediction, *(other for _, other in choice.alternatives)):
        assert prediction.peak_memory_bytes <= problem.memory_nbytes
        assert prediction.peak_device_bytes <= problem.device.memory_nbytes
    if choice.on_device:
        assert choice.footprint.nbytes(nested.alone(problem)) <= problem.device.memory_nbytes
        assert choice.prediction.bytes_out == choice.prediction.bytes_in == choice.prediction.peak_memory_bytes == 0
        return
    assert choice.footprint.nbytes(problem) <= problem.memory_nbytes
    assert choice.footprint.device_nbytes(problem) <= problem.device.memory_nbytes
    assert choice.device_slots < choice.window or choice.device_slots == choice.window == 1
    if choice.window > 1 and not choice.device_slots:
        assert can_record(problem, costs) or choice.window <= problem.max_window
    if choice.record_fraction and problem.disk_nbytes is not None:
        assert choice.prediction.peak_disk_bytes <= problem.disk_nbytes


@settings(max_examples=60)
@given(device_problems())
def test_never_predicted_worse_than_without_the_host(asked):
    problem, costs = asked
    alone = choose(nested.alone(problem), costs).prediction
    assert choose(problem, costs).prediction.time_seconds <= alone.time_seconds * (1 + 1e-6)


@settings(max_examples=25)
@given(device_problems())
def test_a_plan_is_laid_out(asked):
    problem, costs = asked
    choice = choose(problem, costs)
    layout = layout_of(choice)
    assert layout.records == (choice.blocks > 0 and choice.on_device)
    assert layout.stores == choice.uses_disk
    assert (layout.in_seconds > 0.0) == (not choice.on_device and costs.in_seconds(problem.state_nbytes) > 0.0)


def test_what_fits_the_device_stays_there():
    choice = choose(Problem(20, MIB, 64 * MIB, device=Device(64 * MIB)), link(STEP, 1e10))
    assert (choice.on_device, choice.schedule, choice.slots, choice.device_slots) == (True, "store_all", 20, 0)
    assert choice.prediction.overhead == 1.0
    records = Problem(20, MIB, 64 * MIB, residual_nbytes=2 * MIB, device=Device(64 * MIB, 2 * MIB))
    choice = choose(records, link(RECORDED, 1e10))
    assert (choice.on_device, choice.record_fraction) == (True, 1.0)


def test_states_of_windows_go_to_the_host():
    """One more plain pass within each window; nothing else, as the host holds a state of each."""
    problem = Problem(10_000, 512 * MIB, 512 * 400 * MIB, device=Device(512 * 40 * MIB))
    costs = link(Costs(5e-3, 1.5e-2), 2e10)
    choice = choose(problem, costs)
    assert (choice.schedule, choice.on_device) == ("store_all", False)
    assert choice.window >= 512 * MIB / 2e10 / 5e-3
    assert choice.device_slots == choice.window - 1
    assert choice.prediction.overhead == pytest.approx((2 + 3) / 4, abs=0.02)


def test_a_link_that_carries_residuals_takes_them_all():
    problem = Problem(10_000, MIB, 50_000 * MIB, residual_nbytes=4 * MIB, device=Device(300 * MIB, 4 * MIB))
    choice = choose(problem, link(RECORDED, 5e9, 5e9, 1e-5))
    assert (choice.schedule, choice.record_fraction, choice.uses_disk) == ("store_all", 1.0, False)
    assert choice.prediction.overhead == pytest.approx(1.0, abs=1e-3)
    assert choice.prediction.bytes_out >= 10_000 * 4 * MIB
    behind = replace(problem, memory_nbytes=1000 * MIB, has_disk=True)
    choice = choose(behind, disk(link(RECORDED, 5e9, 5e9, 1e-5), 5e9))
    assert (choice.schedule, choice.record_fraction, choice.uses_disk) == ("residuals", 1.0, True)
    assert choice.prediction.overhead == pytest.approx(1.0, abs=1e-3)


@pytest.mark.parametrize("with_disk", [False, True])
def test_a_faster_link_is_never_worse(with_disk):
    memory = (2_000 if with_disk else 50_000) * MIB
    problem = Problem(10_000, MIB, memory, with_disk, residual_nbytes=4 * MIB, device=Device(100 * MIB, 4 * MIB))
    times = [choose(problem, disk(link(RECORDED, 2.0**e * 1e7), 1e10)).prediction.time_seconds for e in range(11)]
    assert all(later <= earlier * 1.001 for earlier, later in pairwise(times))
    assert times[-1] < 0.75 * times[0]
    assert times[-1] == pytest.approx(10_000 * recorded_seconds(RECORDED), rel=0.01)


def test_a_part_of_the_windows_is_recorded_where_the_link_carries_no_more():
    problem = Problem(10_000, MIB // 8, 50_000 * MIB, residual_nbytes=MIB, device=Device(20 * MIB, MIB))
    choice = choose(problem, link(RECORDED, MIB / 1.9e-3))
    assert choice.schedule == "residuals"
    assert not choice.uses_disk
    assert 0.4 < choice.record_fraction < 0.6
    whole = choose(problem, link(RECORDED, MIB / 1e-3)).prediction.time_seconds
    none = choose(problem, link(RECORDED, MIB / 1e-1)).prediction.time_seconds
    assert 1.03 * whole < choice.prediction.time_seconds < none / 1.03


@pytest.mark.parametrize("with_disk", [False, True])
def test_unknown_length(with_disk):
    problem = Problem(None, MIB, 64 * MIB, has_disk=with_disk, device=Device(16 * MIB))
    costs = disk(link(STEP, 5e8), 1e8)
    choice = choose(problem, costs)
    assert choice.schedule == ("asynchronous" if with_disk else "online")
    assert not choice.on_device
    known = replace(problem, steps=HORIZON)
    assert predict_again(choice, known, costs) == choice.prediction
    short = choose(replace(problem, device=Device(10**6 * MIB)), costs)
    assert short.on_device
    assert predict_again(short, replace(known, device=Device(10**6 * MIB)), costs) == short.prediction


def test_too_little_memory_says_the_least_of_both():
    costs = link(STEP, 1e9)
    for here, host in ((3999, 1000), (4000, 999), (1, 1)):
        with pytest.raises(
            BudgetError, match=r"least that would do is 4000 bytes on the device.* 1000 bytes in the host"
        ):
            choose(Problem(1000, 1000, host, device=Device(here)), costs)
    assert choose(Problem(1000, 1000, 1000, device=Device(4000)), costs).slots >= 1
    assert choose(Problem(3, 1000, 0, device=Device(3000)), costs).on_device


@pytest.mark.parametrize(
    ("device", "costs"),
    [
        (Device(10**6), link(STEP, 0.0)),
        (Device(10**6), link(STEP, 1e9, -1.0)),
        (Device(10**6), link(STEP, 1e9, latency=-1.0)),
        (Device(10**6), link(STEP, 1e9, latency=inf)),
        (Device(10**6, staging=1), link(STEP, 1e9)),
        (Device(10**6, tape_nbytes=-1), link(STEP, 1e9)),
    ],
)
def test_nonsense_is_refused(device, costs):
    with pytest.raises(UsageError):
        choose(Problem(10, 1000, 10**6, device=device), costs)


def test_close_to_the_best_of_all_windows():
    for inner, slots, copy in ((1, 3, 2.5), (3, 8, 4), (10, 30, 20)):
        problem, costs = device_job(2000, inner, slots, copy=copy)
        best = inf
        for window in range(ceil(copy), 2001):
            here = replace(Footprint(window, min(slots, -(-2000 // window))), inner=min(inner, max(1, window - 1)))
            best = min(best, predict_revolve(problem, costs, here).time_seconds)
        assert choose(problem, costs).prediction.time_seconds <= 1.005 * best


@pytest.mark.parametrize("steps", [10**6, None])
@pytest.mark.parametrize("records", [False, True])
def test_quick(steps, records):
    problem = Problem(
        steps, MIB, 10_000 * MIB, True, residual_nbytes=4 * MIB if records else None, device=Device(900 * MIB, 4 * MIB)
    )
    costs, times = disk(link(RECORDED, 1e10, latency=1e-5), 1e9, 1e-4), []
    for _ in range(3):
        began = perf_counter()
        choose(problem, costs)
        times.append(perf_counter() - began)
    assert min(times) < 0.2


def test_what_would_be_better_names_each_memory_and_the_link():
    problem = Problem(2_000, 64 * MIB, 1024 * MIB, device=Device(384 * MIB))
    found = foresee(problem, link(STEP, 2e9))
    named = {gain.what for gain in found.improvements}
    assert {"twice the device memory", "twice the host memory", "a link twice as fast", "storage at 1 GB/s"} & named
    assert all("the memory" not in what for what in named)
    everything = [other for other in found.alternatives if not other.fits]
    assert [other.schedule for other in everything] == ["store_all"]
    assert everything[0].time_seconds == pytest.approx(found.choice.prediction.ideal_seconds)


def test_time_falls_with_the_memory_of_the_device():
    problem = Problem(2_000, 64 * MIB, 1024 * MIB, device=Device(384 * MIB))
    points = time_against_memory(problem, link(STEP, 2e9), points=8)
    best = {}
    for _, nbytes, seconds in points:
        best[nbytes] = min(seconds, best.get(nbytes, inf))
    assert min(best) == 4 * 64 * MIB
    assert all(later <= earlier * 1.001 for earlier, later in pairwise(best[nbytes] for nbytes in sorted(best)))


def test_the_lengths_at_which_repetitions_step_up_are_tried():
    problem, costs = device_job(5000, 3, 7, copy=2.0)
    windows = {footprint.window for footprint in nested.footprints(problem, costs)}
    assert {capacity(3, 2), capacity(3, 4), ceil(5000 / capacity(7, 3)), 2, 5000} <= windows
