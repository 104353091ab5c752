"""What it takes to store again and again where storage holds few states, in closed form.

The rules predicted here are those of `pieces`.

Source: Aupy, Herrmann, Hovland and Robert 2016 for counting how often storage is used.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from longtape.plan.binomial import stores
from longtape.plan.costs import Costs, Problem
from longtape.plan.pieces import cut, is_stored
from longtape.plan.predict import Footprint, Pace, Prediction, interval_advances, pace, passage, tally, working_slots

MOST_STATES = 1024
"""States beside the first from which on cutting is not considered: the search would take too long."""


@dataclass(frozen=True, slots=True)
class Effort:
    """What reversing a piece takes."""

    advances: int
    """Windows, those of its first sweep included."""
    stored: int = 0
    """States that go to storage."""
    cuts: int = 0
    stall: float = 0.0
    """Seconds for which reads do not hide, or sweeps within the piece wait for storage."""
    swept: int = 0
    """Windows from the start of the piece to that of the part which is reversed first."""
    queued: int = 0
    """States stored on the way there."""
    wait: float = 0.0
    """Seconds for which that sweep waits."""


def effort(job: Pace, slots: int, room: int, longest: int) -> Effort:
    """What the whole sequence takes, with `room` states on storage, state 0 included.

    The pieces that occur are few: their lengths are binomial numbers and what is left over.
    """
    found: dict[tuple[int, int], Effort] = {}
    pending = [(job.windows, room)]
    while pending:
        length, left = piece = pending[-1]
        at = cut(length, max(1, slots - 1), left, longest)
        if at is None:
            found[piece] = _from_memory(job, length, slots)
            pending.pop()
            continue
        stored = is_stored(length - at, left, longest)
        parts = [(length - at, left - 1 if stored else 0), (at, left)]
        missing = [part for part in parts if part not in found]
        pending += missing
        if not missing:
            found[piece] = _joined(job, slots, at, stored, found[parts[0]], found[parts[1]])
            pending.pop()
    return found[job.windows, room]


def _from_memory(job: Pace, length: int, slots: int) -> Effort:
    again = interval_advances(length, slots, read=job.fetch / job.advance, adjoint=job.adjoint / job.advance)
    hidden = again * job.advance + length * job.adjoint if slots > 1 else 0.0
    return Effort(again, stall=max(0.0, job.fetch - hidden))


def _joined(job: Pace, slots: int, at: int, stored: bool, upper: Effort, lower: Effort) -> Effort:
    """A sweep waits for what the densest part at its end makes storage write, less what memory can hold meanwhile."""
    swept, queued = at + upper.swept, stored + upper.queued
    return Effort(
        advances=at + upper.advances + lower.advances,
        stored=stored + upper.stored + lower.stored,
        cuts=1 + upper.cuts + lower.cuts,
        stall=upper.stall + lower.stall + lower.wait,
        swept=swept,
        queued=queued,
        wait=max(upper.wait, (queued - slots + 1) * job.write - swept * job.advance),
    )


def predict_multistage(problem: Problem, costs: Costs, footprint: Footprint, states: int, longest: int) -> Prediction:
    """T = (what `effort` says + 1)·t_F + n·t_B + stall, and the forward sweep runs the last window too.

    Compute waits where all writes, or all reads, take longer than the whole run.

    Args:
        problem: The job.
        costs: Its times.
        footprint: Window and slots.
        states: Most of them on storage, state 0 included.
        longest: p, in windows.
    """
    job = pace(problem, costs, footprint)
    slots = working_slots(problem, footprint)
    taken = effort(job, slots, states, longest)
    advanced = taken.advances + 1
    moved = passage(job, dense=stores(job.windows, max(1, slots - 1) + states))
    computing = advanced * job.advance + job.windows * job.adjoint + moved.stall
    stalled = max(taken.stall + taken.wait, (taken.stored + 1) * job.write - computing)
    prediction = tally(
        problem,
        costs,
        footprint,
        seconds=computing + stalled,
        advanced=advanced * job.steps + job.windows * job.inner,
        stalled=stalled,
        snapshots_written=taken.stored + 1,
        snapshots_read=taken.cuts,
        moved=moved,
    )
    return replace(prediction, peak_disk_bytes=min(states, taken.stored + 1) * problem.state_nbytes)
