"""From costs and a budget in bytes to a schedule: the shortest predicted run among all that fit.

This file owns the search; the formulas are in `predict` and `recording`.  Candidates are

* everything in memory, as snapshots or as residuals;
* Revolve within memory; where the length is unknown, restart points chosen as the sweep goes on ("online");
* snapshots to storage as often as it takes them, or at a fixed spacing for which the
  forward sweep waits, with Revolve in between;
* snapshots to little storage, again and again in both sweeps, as Revolve would;
* residuals to storage for as many windows as it carries.

With a device in front, the same candidates are tried with windows that are reversed there
(`nested`), with residuals in the host's memory for as many windows as the link carries, and with
everything in the device's own memory.

Each is tried with those window lengths that can matter, a few hundred at most, so that
the choice takes milliseconds however long the job.

Invariants: slots, blocks and tapes together never exceed the budget; the choice is
never predicted to take longer than the best Revolve; storage is used only where it is
predicted to save at least a hundredth of the time, and for some windows' residuals only
where that saves a twentieth.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from math import ceil, inf, isfinite

from longtape.errors import BudgetError, UsageError
from longtape.plan import nested
from longtape.plan.binomial import capacity
from longtape.plan.choice import STAGED, Choice, Schedule, completed, is_costly_to_touch
from longtape.plan.costs import Costs, Problem
from longtape.plan.multistage import MOST_STATES, predict_multistage
from longtape.plan.nested import grid
from longtape.plan.predict import (
    Footprint,
    Prediction,
    best_tail,
    can_record,
    dense_tail,
    horizon,
    pace,
    predict_asynchronous,
    predict_recorded,
    predict_revolve,
    spaced,
    working_slots,
)
from longtape.plan.recording import Recording, predict_residuals

__all__ = ["LARGEST_BLOCK", "Choice", "Schedule", "choose", "predict_again"]

LARGEST_BLOCK = 8 * 2**20
"""Bytes beyond which a larger residual block gains nothing: each costs compute some 0.4 ms, whatever its size."""

BLOCKS_OF_LARGEST = 8
"""How many of these must fit the memory; where they do not, blocks are smaller."""

SMALLEST_GOOD_BLOCK = 2**20
"""Bytes below which storage does not reach its bandwidth."""

ENOUGH_BLOCKS = 64
"""Blocks that ride out the noise of storage; more are taken only where the prediction gains by it."""

_SIMPLEST_FIRST: tuple[Schedule, ...] = ("store_all", "revolve", "online", "asynchronous", "residuals")
_LATENCY_SHARE = 0.25
_LEAST_GAIN = 0.01
_LEAST_GAIN_BY_WAITING = 0.01
_LEAST_GAIN_BY_REWRITING = 0.05
_LEAST_GAIN_BY_MIXING = 0.05
"""Recording only some windows gains by how compute and storage compare, and loses where that is seen wrongly."""
_LEAST_GAIN_BY_DENSITY = 0.002
_SAME_TIME = 1.0 + 1e-9
_ALMOST_SAME_TIME = 1.02
"""A plan that lacks less may be predicted to take so much longer: without room for it, noise costs many times that."""
_ROUNDING_SECONDS = 1e-9
_MOST_REPEATS = 8
_FEW_STORES = 8
_SLOTS_BESIDE_BLOCKS = (1, 2, 3, 4, 6, 8, 12, 16, 32)
_RUNS = range(1, 17)
_LEAST_BLOCKS_BEHIND = 6
"""Blocks in the host's memory behind a device: they are longer on their way, over the link and to storage."""
_LEAST_SLOTS_BEHIND = 4
"""Slots beside these for the snapshots that wait behind blocks for both."""
_FEWER_RUNS = (1, 2, 3, 4, 6, 8, 12, 16)


def choose(problem: Problem, costs: Costs) -> Choice:
    """The schedule with the shortest predicted time among those that fit the budget.

    A job of unknown length is compared over `predict.HORIZON` steps.

    Args:
        problem: What is asked, and the budget.
        costs: Measured or stated times.

    Raises:
        BudgetError: The memory budget does not hold a single state, or the device not what goes over its link.
        UsageError: Fewer than one step, or times that cannot be.
    """
    _check(problem, costs)
    found = [*_within_memory(problem, costs), *_with_snapshots(problem, costs), *_with_residuals(problem, costs)]
    if problem.device is not None:
        found += _on_device(problem, costs)
    best = {name: _quickest(found, name) for name in _SIMPLEST_FIRST if any(c.schedule == name for c in found)}
    chosen = next(iter(best.values()))
    for choice in best.values():
        if _seconds(choice) < (1.0 - _least_gain(choice)) * _seconds(chosen):
            chosen = choice
    others = sorted((c for c in best.values() if c is not chosen), key=_seconds)
    alternatives = tuple((c.schedule, c.prediction) for c in others)
    return completed(replace(chosen, alternatives=alternatives), problem, costs)


def predict_again(choice: Choice, problem: Problem, costs: Costs) -> Prediction:
    """What a choice made for an unknown length takes, now that the problem says how long it is."""
    again = replace(choice, prediction=_predict_again(choice, problem, costs))
    return completed(again, problem, costs).prediction


def _predict_again(choice: Choice, problem: Problem, costs: Costs) -> Prediction:
    footprint = choice.footprint
    if choice.on_device:
        return _device_alone(_predict_again(replace(choice, on_device=False), nested.alone(problem), costs))
    if choice.schedule == "online":
        return predict_revolve(problem, costs, footprint)
    if choice.schedule == "residuals":
        recording = Recording(problem, costs, footprint, round(choice.spacing / choice.window))
        return predict_residuals(recording, min(choice.record_fraction, recording.disk().largest_fraction()))
    windows = -(-horizon(problem) // choice.window)
    spacing = None if choice.stall_spacing is None else choice.stall_spacing // choice.window
    prediction = predict_asynchronous(problem, costs, footprint, fixed=spacing, tail=1)
    if problem.disk_nbytes is not None and prediction.peak_disk_bytes > problem.disk_nbytes:
        states = max(1, problem.disk_nbytes // max(1, problem.state_nbytes))
        prediction = predict_asynchronous(problem, costs, footprint, fixed=-(-windows // states), tail=1)
    return prediction


def _least_gain(choice: Choice) -> float:
    """The share of the time that a choice has to save for a simpler one to be left."""
    if not choice.uses_disk:
        return 0.0
    return _LEAST_GAIN_BY_MIXING if 0.0 < choice.record_fraction < 1.0 else _LEAST_GAIN


def _check(problem: Problem, costs: Costs) -> None:
    if problem.steps is not None and problem.steps < 1:
        raise UsageError(f"a plan for {problem.steps} steps was asked for; there must be at least one")
    if problem.memory_nbytes < problem.state_nbytes and problem.device is None:
        raise BudgetError(
            f"a memory budget of {problem.memory_nbytes} bytes was asked for, but one state takes "
            f"{problem.state_nbytes} bytes, which is the least that would do; raise the budget to at least that"
        )
    times = [costs.forward, costs.reverse, costs.record or 0.0, costs.pull_back or 0.0]
    times += [costs.write_latency, costs.read_latency, costs.link_latency, costs.handling, costs.handling_per_byte]
    times.append(costs.save)
    if not all(isfinite(t) and t >= 0.0 for t in times):
        raise UsageError(f"times must be finite and not negative, but the costs are {costs}")
    if problem.has_disk and not min(costs.write_bytes_per_second, costs.read_bytes_per_second) > 0.0:
        raise UsageError(f"storage must move more than 0 bytes per second, but the costs are {costs}")
    if problem.device is not None:
        _check_device(problem, costs)


def _check_device(problem: Problem, costs: Costs) -> None:
    device = problem.device
    assert device is not None
    if device.staging < 2:
        raise UsageError(f"a device needs 2 staging buffers at least, one each way, not {device.staging}")
    if device.tape_nbytes < 0:
        raise UsageError(f"the tape of a step on the device takes 0 bytes or more, not {device.tape_nbytes}")
    if not min(costs.out_bytes_per_second, costs.in_bytes_per_second) > 0.0:
        raise UsageError(f"a link must move more than 0 bytes per second, but the costs are {costs}")
    least = nested.least_device_nbytes(problem)
    if device.memory_nbytes >= least and problem.memory_nbytes >= problem.state_nbytes:
        return
    if any(choice.schedule == "store_all" for choice in _on_device(problem, costs)):
        return
    raise BudgetError(
        f"a budget of {device.memory_nbytes} bytes on the device and of {problem.memory_nbytes} bytes in the host's "
        f"memory was asked for, but one state takes {problem.state_nbytes} bytes: the least that would do is "
        f"{least} bytes on the device, for {device.staging} states on their way over the link, and "
        f"{problem.state_nbytes} bytes in the host's memory; raise what is below that"
    )


def _seconds(choice: Choice) -> float:
    return choice.prediction.time_seconds


def _quickest(choices: list[Choice], schedule: Schedule) -> Choice:
    """The shortest of a schedule; among the equally short, the first found that is `_kindest`."""
    of_schedule = [choice for choice in choices if choice.schedule == schedule]
    if within := [choice for choice in of_schedule if not choice.uses_disk]:
        limit = min(map(_seconds, within)) * (1.0 - _LEAST_GAIN)
        of_schedule = [choice for choice in of_schedule if not choice.uses_disk or _seconds(choice) < limit]
    if free := [choice for choice in of_schedule if choice.stall_spacing is None]:
        # Storage that turns out slower than believed delays a plan that waits for it, and no other.
        limit = min(map(_seconds, free)) * (1.0 - _LEAST_GAIN_BY_WAITING)
        of_schedule = [choice for choice in of_schedule if choice.stall_spacing is None or _seconds(choice) < limit]
    if schedule == "residuals":
        limit = min(map(_seconds, of_schedule)) * _ALMOST_SAME_TIME
        about = [choice for choice in of_schedule if _seconds(choice) <= limit]
        least = min(map(_lacks, about))
        of_schedule = [choice for choice in about if _lacks(choice) == least]
    limit = min(map(_seconds, of_schedule)) * _SAME_TIME
    return min((choice for choice in of_schedule if _seconds(choice) <= limit), key=_kindest)


def _lacks(choice: Choice) -> int:
    """What a plan with recorded windows lacks to bear noise: blocks, a slot for insurance, slots for what waits.

    Snapshots wait behind the blocks that are to be written before them.  So they do in a plan that records every
    window, where storage turns out slower than believed and windows have to be run again after all.
    """
    return 4 * (choice.blocks < 3) + 2 * (choice.slots < 2) + (choice.slots < choice.blocks + 2)


def _kindest(choice: Choice) -> int:
    """Without storage, the one that touches least memory; with it, one with room for noise and for insurance."""
    if not choice.uses_disk:
        return choice.prediction.peak_memory_bytes
    if choice.schedule != "residuals":
        return int(choice.slots < 2)
    return -min(choice.blocks, ENOUGH_BLOCKS) if choice.record_fraction < 1.0 else 0


# Windows that can matter ------------------------------------------------------------------------


def _footprint(problem: Problem, costs: Costs, window: int) -> Footprint | None:
    """All memory to slots, beside what taping one window takes; None if no slot is left."""
    blocks = 1 if window > 1 and can_record(problem, costs) else 0
    tape = Footprint(window, 0, blocks).nbytes(problem)
    windows, room = -(-horizon(problem) // window), problem.memory_nbytes - tape
    slots = room // problem.state_nbytes if problem.state_nbytes else windows
    return None if room < 0 or slots < 1 else Footprint(window, min(slots, windows), blocks)


def _longest_window(problem: Problem, costs: Costs) -> int:
    steps, room = horizon(problem), problem.memory_nbytes - problem.state_nbytes
    if can_record(problem, costs):
        step = problem.residual_nbytes or 0
        return max(1, steps if step == 0 else min(steps, (room - problem.residual_head_nbytes) // step))
    longest = max(1, min(steps, problem.max_window))
    return longest if problem.tape_nbytes == 0 else min(longest, 1 + room // problem.tape_nbytes)


def _footprints(problem: Problem, costs: Costs) -> list[Footprint]:
    """One for each window length that may be the best for Revolve or between stored snapshots."""
    if problem.device is not None:
        return list(nested.footprints(problem, costs))
    longest = _longest_window(problem, costs)
    windows = {longest, *grid(longest), *_fullest_windows(problem, costs)}
    if problem.has_disk:
        steps = costs.write_seconds(problem.state_nbytes) / max(costs.forward, 1e-12)
        windows.update(ceil(min(steps, longest) / parts) for parts in range(1, 9))
    found = (_footprint(problem, costs, window) for window in sorted(windows) if 1 <= window <= longest)
    return [footprint for footprint in found if footprint is not None]


def _powers_of_two(limit: int) -> list[int]:
    return [1 << exponent for exponent in range(limit.bit_length())]


def _fullest_windows(problem: Problem, costs: Costs) -> Iterator[int]:
    """The longest window that still leaves s slots, for every s up to 16 and then in steps of a sixteenth.

    With the same slots, Revolve on fewer windows is never slower: t(n, s)/n grows with n.
    """
    records = can_record(problem, costs)
    tape = (problem.residual_nbytes or 0) if records else problem.tape_nbytes
    memory = problem.memory_nbytes - (problem.residual_head_nbytes if records else 0)
    if tape == 0 or problem.state_nbytes == 0:
        return
    for slots in grid(min(problem.memory_nbytes // problem.state_nbytes, horizon(problem))):
        extra = (memory - slots * problem.state_nbytes) // tape
        yield extra if records else 1 + extra


# Memory alone -----------------------------------------------------------------------------------


def _within_memory(problem: Problem, costs: Costs) -> Iterator[Choice]:
    if problem.steps is None:
        for footprint in _footprints(problem, costs):
            prediction = predict_revolve(problem, costs, footprint)
            yield _choice("online", footprint, prediction, spacing=float(horizon(problem)))
        return
    recorded = _all_recorded(problem, costs)
    if recorded is not None:
        yield recorded
    for footprint in _footprints(problem, costs):
        everything = footprint.slots * footprint.window >= problem.steps
        yield _choice(
            "store_all" if everything else "revolve",
            footprint,
            predict_revolve(problem, costs, footprint),
            spacing=float(footprint.window if everything else problem.steps),
            tail=problem.steps,
        )


def _all_recorded(problem: Problem, costs: Costs) -> Choice | None:
    """Every window's residuals in memory, in blocks as large as fit well."""
    if problem.steps is None or not can_record(problem, costs) or problem.device is not None:
        return None
    step = max(1, problem.residual_nbytes or 0)
    for window in reversed(_powers_of_two(min(problem.steps, max(1, LARGEST_BLOCK // step)))):
        footprint = Footprint(window, 1, -(-problem.steps // window))
        if footprint.nbytes(problem) <= problem.memory_nbytes:
            prediction = predict_recorded(problem, costs, footprint)
            spacing = float(problem.steps)
            return _choice("store_all", footprint, prediction, spacing=spacing, fraction=1.0)
    return None


def _on_device(problem: Problem, costs: Costs) -> list[Choice]:
    """The plans for a job whose memory is the device's; the host's is not used."""
    return [
        replace(choice, on_device=True, prediction=_device_alone(choice.prediction))
        for choice in _within_memory(nested.alone(problem), costs)
    ]


def _device_alone(prediction: Prediction) -> Prediction:
    return replace(prediction, peak_memory_bytes=0, peak_device_bytes=prediction.peak_memory_bytes)


# Snapshots on storage ---------------------------------------------------------------------------


def _with_snapshots(problem: Problem, costs: Costs) -> Iterator[Choice]:
    if not problem.has_disk:
        return
    greedy: list[Choice] = []
    limited: list[Choice] = []
    for footprint in _footprints(problem, costs):
        choice = _densest(problem, costs, _spaced_choice(problem, costs, footprint, None))
        if _fits_disk(problem, choice):
            greedy.append(choice)
        elif problem.steps is None:  # what is stored will be thinned to that spacing
            greedy += [replace(sparser, stall_spacing=None) for sparser in _sparser(problem, costs, choice)[:1]]
        else:
            greedy += _sparser(problem, costs, choice)
            limited.append(choice)
    yield from greedy
    enough = (1.0 - _LEAST_GAIN_BY_REWRITING) * min(map(_seconds, greedy), default=inf)
    for choice in _promising(limited):
        yield from (cut for cut in _cut_again(problem, costs, choice) if _seconds(cut) < enough)
    for choice in _promising(greedy):
        for fixed, tail in _closer_spacings(choice, -(-horizon(problem) // choice.window)):
            stalled = _spaced_choice(problem, costs, choice.footprint, fixed, tail)
            if _fits_disk(problem, stalled):
                yield stalled


def _promising(choices: list[Choice]) -> list[Choice]:
    """The few windows for which it is worth trying many spacings."""
    return sorted(choices, key=_seconds)[:3] + [choice for choice in choices if choice.window == 1]


def _spaced_choice(
    problem: Problem, costs: Costs, footprint: Footprint, fixed: int | None, tail: int | None = None
) -> Choice:
    job = pace(problem, costs, footprint)
    slots = working_slots(problem, footprint)
    interior = spaced(job, slots, fixed=fixed)
    if tail is None or problem.steps is None:
        tail = 1 if problem.steps is None else best_tail(job, slots, interior)
    if is_costly_to_touch(problem, costs):
        tail = min(tail, STAGED)
    return _choice(
        "asynchronous",
        footprint,
        predict_asynchronous(problem, costs, footprint, fixed=fixed, tail=tail),
        spacing=interior.spacing * footprint.window,
        tail=0 if problem.steps is None else min(problem.steps, tail * footprint.window),
        stall_spacing=None if fixed is None else fixed * footprint.window,
    )


def _densest(problem: Problem, costs: Costs, choice: Choice) -> Choice:
    """The choice, or one that keeps every state of its end where storage is almost fast enough for all of them."""
    if problem.steps is None or is_costly_to_touch(problem, costs):
        return choice
    job, slots = pace(problem, costs, choice.footprint), working_slots(problem, choice.footprint)
    dense = dense_tail(job, slots, spaced(job, slots))
    if dense * choice.window <= choice.tail:
        return choice
    prediction = predict_asynchronous(problem, costs, choice.footprint, dense=dense)
    found = replace(choice, dense=min(problem.steps, dense * choice.window), tail=0, prediction=prediction)
    gains = _seconds(found) < (1.0 - _LEAST_GAIN_BY_DENSITY) * _seconds(choice)
    return found if gains and _fits_disk(problem, found) else choice


def _fits_disk(problem: Problem, choice: Choice) -> bool:
    limit = problem.disk_nbytes
    return limit is None or choice.prediction.peak_disk_bytes <= limit


def _sparser(problem: Problem, costs: Costs, greedy: Choice) -> list[Choice]:
    """The closest spacings that a limited storage holds: for the whole sequence, and for all but its tail."""
    states = (problem.disk_nbytes or 0) // max(1, problem.state_nbytes)
    if states < 1:
        return []
    least, windows = ceil(greedy.spacing / greedy.window), -(-horizon(problem) // greedy.window)
    whole = _spaced_choice(problem, costs, greedy.footprint, max(least, -(-windows // states)))
    interior = windows - whole.tail // greedy.window
    partly = _spaced_choice(problem, costs, greedy.footprint, max(least, -(-interior // states)))
    return [choice for choice in (whole, partly) if _fits_disk(problem, choice)]


def _closer_spacings(choice: Choice, windows: int) -> Iterator[tuple[int, int | None]]:
    """Spacings in windows below the one at which storage keeps up, for which the forward sweep would wait; and tails.

    The re-advances of an interval rise with a slope that steps up at β(s, ρ) and
    β(s-1, ρ), while the wait falls smoothly: the best spacing is often one of these.
    With few stores the tail is to be as long as the other intervals, or as Revolve likes it.
    """
    below, slots = ceil(choice.spacing / choice.window) - 1, choice.slots
    lengths = {capacity(c, k) for k in range(1, _MOST_REPEATS) for c in (slots, slots - 1)}
    lengths = {length for length in lengths if length <= windows}
    for spacing in sorted({below, *grid(below)} | lengths):
        if 1 <= spacing <= below:
            yield spacing, None
    for stores in range(1, _FEW_STORES + 1):
        even = windows // (stores + 1)
        for tail in sorted({even, max((length for length in lengths if length <= even), default=even)}):
            spacing = (windows - tail) // stores
            if 1 <= spacing <= below and tail >= 1:
                yield spacing, windows - spacing * stores


def _cut_again(problem: Problem, costs: Costs, choice: Choice) -> Iterator[Choice]:
    """Pieces short enough for memory, by the lengths at which Revolve's repetitions step up."""
    footprint, states = choice.footprint, (problem.disk_nbytes or 0) // max(1, problem.state_nbytes)
    if problem.steps is None or not 2 <= states <= MOST_STATES:
        return
    windows = -(-problem.steps // footprint.window)
    most = choice.tail if is_costly_to_touch(problem, costs) else problem.steps
    lengths = {capacity(c, k) for k in range(_MOST_REPEATS) for c in (footprint.slots, max(1, footprint.slots - 1))}
    for longest in sorted(lengths):
        if longest < windows:
            prediction = predict_multistage(problem, costs, footprint, states, longest)
            yield replace(
                choice,
                spacing=problem.steps / prediction.writes,
                tail=min(most, longest * footprint.window),
                longest_piece=longest * footprint.window,
                prediction=prediction,
            )


# Residuals on storage ---------------------------------------------------------------------------


def _with_residuals(problem: Problem, costs: Costs) -> Iterator[Choice]:
    if not can_record(problem, costs):
        return
    if problem.device is not None and problem.steps is not None:
        yield from _with_residuals_in_memory(problem, costs)
    if not problem.has_disk:
        return
    for window in _block_windows(problem, costs):
        for footprint in _block_footprints(problem, costs, window):
            for run in _RUNS if problem.device is None else _FEWER_RUNS:
                found = list(_recorded_choices(Recording(problem, costs, footprint, run)))
                yield from found
                if [choice.record_fraction for choice in found] == [1.0]:
                    break  # storage carries every window in both sweeps, so that there are no plain runs


def _with_residuals_in_memory(problem: Problem, costs: Costs) -> Iterator[Choice]:
    """Behind a device: as many windows as its link carries, or as the host's memory holds."""
    for window in _block_windows(problem, costs):
        shape = nested.footprint(problem, costs, window, 1, 1)
        if shape is None:
            continue
        for run in _FEWER_RUNS:
            recording = Recording(problem, costs, shape, run, stored=False)
            most = min(recording.memory().largest_fraction(), 1.0 / run)
            for fraction in sorted({most, *(point for point in recording.turning_points() if point < most)}):
                held = recording.holding(fraction)
                if held is not None and fraction > 0.0:
                    everything = fraction == 1.0
                    spacing = float(problem.steps or 0) if everything else float(run * window)
                    yield _choice(
                        "store_all" if everything else "residuals",
                        held.footprint,
                        predict_residuals(held, fraction),
                        spacing=spacing,
                        fraction=fraction,
                    )


def _block_windows(problem: Problem, costs: Costs) -> list[int]:
    """Blocks so large that latency is below a quarter of the transfer, or eight fit; then smaller ones.

    The plan takes the first of those that are predicted to be equally quick.
    """
    step = max(1, problem.residual_nbytes or 0)
    room = (problem.memory_nbytes - problem.state_nbytes) // 2 - problem.residual_head_nbytes
    largest = max(1, min(LARGEST_BLOCK, room) // step)
    latencies: list[tuple[float, float]] = []
    if problem.has_disk:
        latencies.append((costs.write_latency, costs.write_bytes_per_second))
        latencies.append((costs.read_latency, costs.read_bytes_per_second))
    if problem.device is not None:
        latencies.append((costs.link_latency, costs.out_bytes_per_second))
        latencies.append((costs.link_latency, costs.in_bytes_per_second))
    unimportant = max(latency * speed if latency else 0.0 for latency, speed in latencies) / _LATENCY_SHARE
    good = ceil(min(float(LARGEST_BLOCK), max(unimportant, float(SMALLEST_GOOD_BLOCK))) / step)
    roomy = min(LARGEST_BLOCK, problem.memory_nbytes // BLOCKS_OF_LARGEST) // step
    longest = min(largest, horizon(problem), nested.longest_block(problem))
    good = min(longest, max(good, roomy))
    hidden = {min(longest, nested.least_window(problem, costs))} if problem.device is not None else set()
    return sorted({max(1, good // parts) for parts in (1, 2, 4, 8)} | hidden, reverse=True)


def _block_footprints(problem: Problem, costs: Costs, window: int) -> Iterator[Footprint]:
    """A few slots for the plain runs, the rest to blocks: enough, all that fit, or so few that snapshots can wait."""
    block = max(1, problem.block_nbytes(window))
    most = -(-horizon(problem) // window)
    for slots in _SLOTS_BESIDE_BLOCKS:
        blocks = min(most, (problem.memory_nbytes - slots * problem.state_nbytes) // block)
        if blocks < 2:
            return
        few = 3 if problem.device is None else _LEAST_BLOCKS_BEHIND
        for taken in dict.fromkeys((min(blocks, ENOUGH_BLOCKS), blocks, min(blocks, max(few, slots - 2)))):
            if problem.device is None:
                yield Footprint(window, slots, taken)
            elif found := nested.footprint(problem, costs, window, slots, taken):
                yield found


def _recorded_choices(recording: Recording) -> Iterator[Choice]:
    """The fractions between which time is linear: all that can be written, and all that can also be read in time.

    Spread evenly, fractions of up to 1/k leave plain runs of k windows or more, which are cut
    into runs of k that start from one snapshot each.
    """
    run, footprint = recording.run, recording.footprint
    forward, disk = recording.forward(), recording.disk()
    most = min(forward.largest_fraction(), disk.largest_fraction(), 1.0 / run)
    points = {point for point in recording.turning_points() if point < most}
    for fraction in sorted({most, min(most, recording.reverse().largest_fraction())} | points):
        fits = forward.spare(fraction) >= -_ROUNDING_SECONDS and disk.spare(fraction) >= -1.0
        enough = fraction == 1.0 or (footprint.slots >= 2 and footprint.blocks >= 3)
        if recording.problem.device is not None:
            enough = footprint.blocks >= _LEAST_BLOCKS_BEHIND
            enough &= fraction == 1.0 or footprint.slots >= _LEAST_SLOTS_BEHIND
        if fits and enough:
            choice = _within_disk(recording, fraction)
            if choice is not None and choice.record_fraction > 0.0:
                yield choice


def _within_disk(recording: Recording, fraction: float) -> Choice | None:
    """The fraction as a choice, made smaller where whole items take more storage than the balance says."""
    problem, footprint = recording.problem, recording.footprint
    for _ in range(4):
        prediction = predict_residuals(recording, fraction)
        choice = _choice(
            "residuals",
            footprint,
            prediction,
            spacing=float(recording.run * footprint.window),
            fraction=fraction,
        )
        if _fits_disk(problem, choice):
            return choice
        fraction *= (problem.disk_nbytes or 0) / prediction.peak_disk_bytes
    return None


def _choice(
    schedule: Schedule,
    footprint: Footprint,
    prediction: Prediction,
    *,
    spacing: float,
    tail: int = 0,
    fraction: float = 0.0,
    stall_spacing: int | None = None,
) -> Choice:
    return Choice(
        schedule=schedule,
        window=footprint.window,
        spacing=spacing,
        slots=footprint.slots,
        blocks=footprint.blocks,
        record_fraction=fraction,
        tail=tail,
        stall_spacing=stall_spacing,
        prediction=prediction,
        device_slots=footprint.inner,
    )
