"""Windows that are reversed on a device: how long they have to be, and how they fit its memory.

Each tier is fast memory for the next.  Owns the sizes that come of that; what they take
is predicted as everything else is, for a window is a step to the tiers behind it.

With t_out and t_in the times of one state over the link, windows of
h ≥ max(t_out/t_f, t_in/t_b) steps hide it; shorter ones would wait for it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from math import ceil, inf

from longtape.plan.binomial import capacity
from longtape.plan.costs import Costs, Problem
from longtape.plan.predict import Footprint, can_record, horizon, recorded_seconds

_MOST_REPEATS = 8
_TINIEST_STEP = 1e-12
_ROUNDING = 1e-9


def grid(limit: int, start: int = 1) -> Iterator[int]:
    """`start` … `limit`: every number up to 32 at first, then steps of a sixteenth."""
    value = start
    while value <= limit:
        yield value
        value += max(1, value // 16)


def alone(problem: Problem) -> Problem:
    """The job without a host's memory and storage: everything in the device's."""
    device = problem.device
    assert device is not None
    return replace(
        problem,
        memory_nbytes=device.memory_nbytes,
        tape_nbytes=device.tape_nbytes,
        device=None,
        has_disk=False,
        disk_nbytes=None,
        pins_initial=False,
    )


def least_device_nbytes(problem: Problem) -> int:
    """The least that lets states go over the link, while windows of one step are reversed."""
    return problem.device.staging * problem.state_nbytes if problem.device else 0


def least_window(problem: Problem, costs: Costs) -> int:
    """The shortest window in which a state goes either way over the link unnoticed; N where there is none.

    ⌈max(t_out/t_f, t_in/t_b)⌉, with t_b the quicker of re-taping and recording.
    """
    out, back = costs.out_seconds(problem.state_nbytes), costs.in_seconds(problem.state_nbytes)
    adjoint = min(costs.reverse, recorded_seconds(costs) if can_record(problem, costs) else inf)
    steps = max(out / max(costs.forward, _TINIEST_STEP), back / max(adjoint, _TINIEST_STEP))
    return max(1, ceil(min(steps, float(horizon(problem))) - _ROUNDING))


def footprint(problem: Problem, costs: Costs, window: int, slots: int, blocks: int = 0) -> Footprint | None:
    """How a window is reversed the quickest in the device's memory beside staging; None where it does not fit.

    Its steps are taped in one go if they can be, and fit; else Revolve takes all snapshots
    that fit, but no more than make it run every step twice.
    """
    device = problem.device
    assert device is not None
    taped = Footprint(window, slots, blocks)
    together = window <= problem.max_window or can_record(problem, costs)
    if together and taped.device_nbytes(problem) <= device.memory_nbytes:
        return taped
    room = device.memory_nbytes - replace(taped, inner=1).device_nbytes(problem)
    if room < 0 or window == 1:
        return None
    inner = 1 + (room // problem.state_nbytes if problem.state_nbytes else window)
    return replace(taped, inner=max(1, min(inner, window - 1)))


def footprints(problem: Problem, costs: Costs) -> Iterator[Footprint]:
    """One for each window length that may be the best: all of the host's memory to slots."""
    for window in sorted(_windows(problem, costs)):
        windows = -(-horizon(problem) // window)
        slots = problem.memory_nbytes // problem.state_nbytes if problem.state_nbytes else windows
        if slots and (found := footprint(problem, costs, window, min(slots, windows))):
            yield found


def _windows(problem: Problem, costs: Costs) -> set[int]:
    """The shortest that hides the link and longer ones, up to the whole sequence.

    Among them those at which Revolve's repetitions step up, in front of the link and behind it, the
    longest that is taped in one go, and with storage those of which a few pass during one write.
    """
    device, state = problem.device, problem.state_nbytes
    assert device is not None
    steps, shortest = horizon(problem), least_window(problem, costs)
    found = {steps, *grid(steps, shortest)}
    if state:
        host, here = min(problem.memory_nbytes // state, steps), device.memory_nbytes // state - device.staging
        found.update(-(-steps // capacity(host, repeats)) for repeats in range(1, _MOST_REPEATS))
        found.update(capacity(min(here, steps), repeats) for repeats in range(1, _MOST_REPEATS))
    if device.tape_nbytes:
        room = device.memory_nbytes - least_device_nbytes(problem)
        found.add(room // device.tape_nbytes + (problem.residual_nbytes is None))
    if problem.has_disk:
        passed = costs.write_seconds(state) / max(costs.forward, _TINIEST_STEP)
        found.update(ceil(min(steps, passed) / parts) for parts in range(1, 9))
    if problem.residual_nbytes is None:
        found.add(problem.max_window)
    return {window for window in found if shortest <= window <= steps}


def longest_block(problem: Problem) -> int:
    """Steps of the longest residual block of which the device can stage as many as it has to."""
    device = problem.device
    if device is None or not problem.residual_nbytes:
        return horizon(problem)
    # One more state lets a window be reversed that is not recorded, or was lost.
    room = max(0, device.memory_nbytes - problem.state_nbytes - device.staging * problem.residual_head_nbytes)
    return max(1, room // max(1, device.staging * problem.residual_nbytes))
