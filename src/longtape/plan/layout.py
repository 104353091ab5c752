"""The choices a plan is made with, and how it treats costs it can only estimate."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Rules:
    """How the plan treats costs it can only estimate.

    The defaults are for real machines; `EXACT` is for costs known to the digit.
    """

    keep_spacing: bool = True
    """Never store closer together than ⌊t_w/t_f⌋ windows, however idle the writer looks."""

    elastic: bool = True
    """Let the write queue grow into free slots while storage stalls, and thin it out when it cannot."""

    margin: float = 1.0
    """Prefetch ahead by (1 + margin) times the expected read, or by less where transfers take much the same time."""

    deep: bool = True
    """Prefetch further restart points into slots the current interval cannot use."""

    grain_seconds: float = 100e-6
    """Look at the writer no more often than this, so that tiny steps are not slowed by the looking."""


EXACT = Rules(keep_spacing=False, elastic=False, margin=0.0, deep=False, grain_seconds=0.0)


@dataclass(frozen=True, slots=True)
class Layout:
    """The choices a plan is made with; all counted in steps."""

    window: int = 1
    """Steps whose adjoint is taken in one go."""

    tail: int = 0
    """The last steps, which the forward sweep already stores as Revolve would.  N: no storage is used."""

    dense: int = 0
    """The last steps of which every state is kept: written, as fast as storage goes, or else in memory."""

    fixed_spacing: int | None = None
    """Store at every such step, waiting for storage where it does not keep up; None: as storage allows."""

    longest_piece: int | None = None
    """Where storage holds few states: cut what is longer as `pieces` says, in both sweeps; None: it is not so."""

    records: bool = False
    """Adjoints are taken from residuals: of windows recorded forward, or re-recorded in reverse."""

    record_fraction: float = 0.0
    """Most of the windows to record in the forward sweep, for storage to carry."""

    plain_run: int | None = None
    """While windows are recorded, store a snapshot every so many plain windows; None: where storage has time."""

    stores: bool = True
    """Whether there is storage to write to."""

    safety: int = 32
    """While windows are recorded, still store a snapshot every so many windows, against lost blocks."""

    staging: int | None = None
    """Forward, hold no more items of a kind in memory than this while stored ones can make room.

    Memory that was never touched costs more to touch than a stored item costs to read back.
    None: fill the memory there is.
    """

    held: int | None = None
    """In reverse, hold no more snapshots in memory than this while storage has kept up; None: fill the memory there is.

    For the same reason.
    """

    final_state: bool = True
    """Whether the forward sweep runs the last window too, because the caller needs the final state."""

    initial_is_free: bool = False
    """The job can restore state 0 by itself, without a slot."""

    pin_initial: bool = False
    """Keep state 0 in its slot throughout, so that no fault of storage can cost it."""

    out_seconds: float = 0.0
    """With a device: what a snapshot takes from there to memory, where it can be written from."""

    in_seconds: float = 0.0
    """With a device: what a snapshot takes from memory to there, after it has been read."""
