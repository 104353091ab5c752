"""A plan's parameters: all that a run is laid out with, decided before anybody is shown it.

Owns `Choice`, what memory it touches, and its translation for the plan generator.  It searches
nothing (`choose` does).

Memory that was never touched costs more to touch than a stored item costs to read back, where
steps are quick beside that.  Such a plan holds no more than a few items that storage has taken,
although there is room for more: `staging` in the forward sweep, `held` in reverse.

Invariant: a run is laid out by `layout_of` and by the slots and blocks of its choice alone.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import ceil
from typing import Literal

from longtape.plan.costs import LEAST_TO_PIN, Costs, Problem
from longtape.plan.layout import Layout
from longtape.plan.predict import Footprint, Prediction
from longtape.plan.recording import safety_windows

Schedule = Literal["store_all", "revolve", "online", "asynchronous", "residuals", "given"]
"""`choose` takes any but the last; *given* is a schedule that the caller brings, see `scheduled`."""

STAGED = 4
"""Two items being written, one being stored, and one to spare."""

FRESH = 4
"""Memory counts as so many times slower to touch than was measured.

What was measured is memory that somebody has just used.  The rest may have to come from further away: on a virtual
machine whose host takes free memory back it took 25 times as long.
"""

UNINSURED = 1 << 62
"""Windows between snapshots against lost blocks, where none can be lost."""


@dataclass(frozen=True, slots=True)
class Choice:
    """A schedule and its parameters, with what they are expected to take."""

    schedule: Schedule
    window: int
    """Steps whose adjoint is taken in one go."""
    spacing: float
    """Mean steps from one stored snapshot to the next.

    For "residuals": the steps of a plain run, which starts from one snapshot.  For
    "store_all": the window.  For "revolve" and "online": N, as nothing is stored.
    """
    slots: int
    """Snapshots in memory, staging and prefetch included."""
    blocks: int
    """Residual blocks of `window` steps in memory; 0: windows are reversed by re-taping."""
    record_fraction: float
    """Fraction of the windows to record in the forward sweep."""
    tail: int
    """Last steps kept in memory only, as Revolve would: N for Revolve, 0 where N is unknown or windows are recorded."""
    stall_spacing: int | None
    """Store at exactly this many steps, waiting for storage where it does not keep up; None: as storage allows."""
    prediction: Prediction
    dense: int = 0
    """Last steps of which every state is kept, on storage or else in memory; then `tail` is 0."""
    alternatives: tuple[tuple[str, Prediction], ...] = ()
    """The best of each other schedule that fits, quickest first."""
    longest_piece: int | None = None
    """Where storage holds few states: the steps beyond which the reverse sweep stores again, see `pieces`."""
    device_slots: int = 0
    """Snapshots on the device by which a window is reversed there, that of its first state included.

    0: all steps of a window are taped or recorded there in one go, or there is no device.
    """
    on_device: bool = False
    """Everything is kept in the device's own memory.

    `slots` and `blocks` are then there, nothing goes over the link, and the host's memory and storage are not used:
    the plan is one for a job without a device whose memory is `Device.memory_nbytes`.
    """

    disk_nbytes: int | None = None
    """Most bytes that storage may take: a stated limit, or what is free there less a reserve.  None: not known."""
    staging: int | None = None
    """Forward, items of a kind in memory while stored ones can make room; None: all that fit."""
    held: int | None = None
    """In reverse, snapshots in memory while storage keeps up; None: all that fit."""
    records: bool = False
    """The plan deals with residuals; behind a device they are part of a window's adjoint."""
    safety: int = 32
    """While windows are recorded, a snapshot is stored every so many, against lost blocks."""
    pins_initial: bool = False
    """State 0 keeps a slot to itself, so that no fault of storage can cost it."""
    initial_is_free: bool = False
    """State 0 takes no slot: the job can restore it by itself."""
    out_seconds: float = 0.0
    """Behind a device: what a snapshot takes over its link, from there."""
    in_seconds: float = 0.0
    """And to there."""

    @property
    def uses_disk(self) -> bool:
        """Whether anything goes to storage."""
        return self.schedule == "asynchronous" or (self.schedule == "residuals" and self.prediction.writes > 0)

    @property
    def paces_itself(self) -> bool:
        """Whether the plan stores as often as storage allows, and so follows the measured times."""
        return self.schedule == "asynchronous" and self.stall_spacing is None and self.longest_piece is None

    @property
    def footprint(self) -> Footprint:
        """How the memory budget is shared out."""
        return Footprint(self.window, self.slots, self.blocks, self.device_slots)


def is_costly_to_touch(problem: Problem, costs: Costs) -> bool:
    """Whether a snapshot's memory takes longer to touch for the first time than a step."""
    return FRESH * problem.state_nbytes / costs.touch_bytes_per_second > costs.forward


def completed(choice: Choice, problem: Problem, costs: Costs) -> Choice:
    """The choice with all that follows from it, and predicted to hold what it holds while storage keeps up."""
    linked = problem.device is not None and not choice.on_device
    # Where every window is recorded, snapshots only insure them, and one of state 0 does that best.
    least = LEAST_TO_PIN if choice.record_fraction < 1.0 else 1
    # What memory holds needs no insurance against storage.
    insured = choice.uses_disk or problem.device is None
    stages = choice.uses_disk and (choice.record_fraction > 0.0 or is_costly_to_touch(problem, costs))
    found = replace(
        choice,
        disk_nbytes=problem.disk_nbytes,
        staging=STAGED if stages else None,
        held=_held(choice) if stages and choice.paces_itself and problem.device is None else None,
        records=choice.blocks > 0 and not linked,
        safety=safety_windows(problem, choice.window) if insured else UNINSURED,
        pins_initial=problem.pins_initial and choice.uses_disk and choice.slots >= least,
        initial_is_free=problem.initial_is_free,
        out_seconds=costs.out_seconds(problem.state_nbytes) if linked else 0.0,
        in_seconds=costs.in_seconds(problem.state_nbytes) if linked else 0.0,
    )
    return replace(found, prediction=replace(found.prediction, peak_memory_bytes=_peak_nbytes(found, problem)))


def _held(choice: Choice) -> int:
    """The snapshots of an interval, and a few read ahead."""
    return min(choice.slots, ceil(choice.spacing / choice.window) + STAGED)


def _peak_nbytes(choice: Choice, problem: Problem) -> int:
    """What is held while storage keeps up; the rest of the budget is for when it does not."""
    peak, state = choice.prediction.peak_memory_bytes, problem.state_nbytes
    if choice.held is not None:
        return peak - (choice.slots - choice.held) * state
    if choice.schedule == "residuals" and problem.device is None:
        # A plan that records only some windows does so as fast as storage goes, and all blocks wait to be written.
        blocks = min(choice.blocks, 2 * STAGED) if choice.record_fraction == 1.0 else choice.blocks
        return min(peak, blocks * problem.block_nbytes(choice.window) + min(choice.slots, STAGED) * state)
    return peak


def layout_of(choice: Choice) -> Layout:
    """The choice in the terms of the plan generator."""
    return Layout(
        window=choice.window,
        tail=choice.tail,
        dense=choice.dense,
        fixed_spacing=choice.stall_spacing,
        longest_piece=choice.longest_piece,
        records=choice.records,
        record_fraction=choice.record_fraction,
        plain_run=round(choice.spacing / choice.window) if 0.0 < choice.record_fraction < 1.0 else None,
        stores=choice.uses_disk,
        safety=choice.safety,
        staging=choice.staging,
        held=choice.held,
        initial_is_free=choice.initial_is_free,
        pin_initial=choice.pins_initial,
        out_seconds=choice.out_seconds,
        in_seconds=choice.in_seconds,
    )
