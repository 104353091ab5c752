"""Watches a run: what happened when, and how much was held.

Owns the record of a run in bounded memory, whatever the number of steps: spans of
the same kind that touch are merged, and when there are still too many, gaps shorter
than a growing resolution are closed.  Knows no plan and decides nothing.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from longtape.actions import Action, Advance, Await, Key, PullBack, Record, Restore, Reverse, Store, Turn

MOST_SPANS = 1 << 16
MOST_REPLANS = 64
MATERIAL = 1.5
"""A spacing that has changed by less is still the same plan."""

MOST_LEVELS = 1 << 12

COMPUTE = ("forward", "replay", "reverse", "copy")
TRANSFERS = ("write", "read")
LINK = ("out", "in")
"""Copies from a device and to it."""

LANES = (*COMPUTE, "wait", *TRANSFERS, *LINK, "idle")
"""``idle``: a device's compute stood still for a copy."""


class Span(NamedTuple):
    """One thing that went on for a while; seconds from the start of the run."""

    lane: str
    began: float
    ended: float


class Level(NamedTuple):
    """Bytes held at one moment."""

    seconds: float
    memory_nbytes: int
    disk_nbytes: int


class Cause(NamedTuple):
    """What compute waited for."""

    sweep: str
    """``forward`` or ``reverse``."""
    kind: str
    """``snapshot`` or ``residuals``."""
    lacking: str
    """``item``: it was not there yet; ``slot``: no slot for one could be freed."""


@dataclass(slots=True)
class Wait:
    """All waiting of one cause."""

    count: int = 0
    seconds: float = 0.0
    longest: float = 0.0
    longest_at: float = 0.0
    """When the longest began, in seconds from the start of the run."""


class Pace(NamedTuple):
    """The plan's spacing changed: its running means say that storage, or a step, takes another time than before."""

    seconds: float
    step: int
    spacing_before: float
    """Steps from one stored snapshot to the next."""
    spacing_after: float


@dataclass(slots=True)
class _Lane:
    """The spans of one lane, ascending, and the total time in them."""

    began: array[float] = field(default_factory=lambda: array("d"))
    ended: array[float] = field(default_factory=lambda: array("d"))
    seconds: float = 0.0
    resolution: float = 20e-6

    def add(self, began: float, ended: float) -> None:
        self.seconds += ended - began
        if self.ended and began - self.ended[-1] < self.resolution:
            self.ended[-1] = max(self.ended[-1], ended)
            return
        self.began.append(began)
        self.ended.append(ended)
        if len(self.began) > MOST_SPANS:
            self._coarsen()

    def covered(self) -> float:
        """Time between the ends of the spans kept."""
        return sum(self.ended) - sum(self.began)

    def _coarsen(self) -> None:
        while len(self.began) > MOST_SPANS // 2:
            self.resolution *= 2
            old = list(zip(self.began, self.ended, strict=True))
            del self.began[:], self.ended[:]
            for began, ended in old:
                if self.ended and began - self.ended[-1] < self.resolution:
                    self.ended[-1] = ended
                else:
                    self.began.append(began)
                    self.ended.append(ended)


class Trace:
    """An observer that remembers.

    `clock_zero` is the clock's reading at the start of the run; `held` tells the bytes
    in memory and on storage when asked; `spacing` the steps that pass during a write of a
    snapshot, as the plan believes now.
    """

    def __init__(
        self,
        clock_zero: float,
        held: Callable[[], tuple[int, int]] | None = None,
        spacing: Callable[[], float] | None = None,
    ) -> None:
        self.zero = clock_zero
        self.held = held
        self._spacing = spacing
        self._paced = 0.0 if spacing is None else spacing()
        self.waits: dict[Cause, Wait] = {}
        """What compute waited for, and for how long."""
        self.replans: list[Pace] = []
        """Material changes of the forward sweep's spacing, the first of them."""
        self.replan_count = 0
        self._lanes = {name: _Lane() for name in LANES}
        self._forward, self._reverse, self._copy = (self._lanes[name] for name in ("forward", "reverse", "copy"))
        self._levels: list[Level] = []
        self._level_every = 1
        self._level_count = 0
        self.turned_at: float | None = None
        self.actions = 0
        """Of every kind."""
        self.steps_forward = 0
        """Steps of the first sweep, plain or recorded."""
        self.steps_replayed = 0
        """Plain steps run again after the first sweep."""
        self.steps_retaped = 0
        """Steps run again while taping, for their adjoint."""
        self.steps_recorded = 0
        """Steps whose residuals were kept in the first sweep."""
        self._reached = 0

    def begin_at(self, step: int) -> None:
        """An earlier process has run the steps below this one."""
        self._reached = step

    def end(self) -> None:
        """The run is over: what is remembered stays, and nothing of the run is referred to."""
        self.held = self._spacing = None

    # Observer ------------------------------------------------------------------------------

    def on_action(self, action: Action, began: float, ended: float) -> None:
        """Note a compute action, a copy or a wait; only count the others."""
        self.actions += 1
        kind = type(action)
        if kind is Advance or kind is Record:
            self._ran(action, began, ended)  # type: ignore[arg-type]
        elif kind is Reverse or kind is PullBack:
            self._reverse.add(began - self.zero, ended - self.zero)
            if kind is Reverse:
                self.steps_retaped += action.stop - action.start  # type: ignore[union-attr]
        elif kind is Store or kind is Restore:
            self._copy.add(began - self.zero, ended - self.zero)
            self._note_levels(ended)
        elif kind is Await:
            self._waited(action, began, ended)  # type: ignore[arg-type]
        elif kind is Turn:
            self.turned_at = ended - self.zero

    def _ran(self, action: Advance | Record, began: float, ended: float) -> None:
        count, stop = action.stop - action.start, action.stop
        fresh = min(count, max(0, stop - self._reached))
        if fresh:
            self._forward.add(began - self.zero, ended - self.zero)
            self._reached = stop
            self.steps_forward += fresh
        else:
            self._span("replay", began, ended)
        if type(action) is Record:
            self.steps_recorded += fresh
            self.steps_retaped += count - fresh
        else:
            self.steps_replayed += count - fresh

        if self._spacing is not None and fresh and self.turned_at is None:
            self._note_pace(self._spacing(), ended, action.stop)

    def _note_pace(self, spacing: float, now: float, step: int) -> None:
        before = self._paced
        if before <= 0.0:
            self._paced = spacing
        elif not before / MATERIAL < spacing < before * MATERIAL:
            self._paced = spacing
            self.replan_count += 1
            if len(self.replans) < MOST_REPLANS:
                self.replans.append(Pace(now - self.zero, step, before, spacing))

    def _waited(self, action: Await, began: float, ended: float) -> None:
        self._span("wait", began, ended)
        kind = action.room if action.key is None else action.key.kind
        sweep = "forward" if self.turned_at is None else "reverse"
        cause = Cause(sweep, "item" if kind is None else kind.value, "slot" if action.key is None else "item")
        wait = self.waits.setdefault(cause, Wait())
        wait.count += 1
        wait.seconds += ended - began
        if ended - began > wait.longest:
            wait.longest, wait.longest_at = ended - began, began - self.zero

    def on_transfer(self, kind: str, key: Key, nbytes: int, began: float, ended: float) -> None:
        """Note a transfer."""
        self._span(kind, began, ended)
        self._note_levels(ended)

    def on_link(self, lane: str, began: float, ended: float) -> None:
        """Note a copy over the link to a device, or compute waiting for one."""
        self._span(lane, began, ended)

    def skip(self, seconds: float) -> None:
        """Leave out a pause that is not part of the run, such as the caller's own work between the sweeps."""
        self.zero += seconds

    def _note_levels(self, now: float) -> None:
        """Note the bytes held now; thinned so that at most `MOST_LEVELS` are kept."""
        self._level_count += 1
        if self.held is None or self._level_count % self._level_every:
            return
        self._levels.append(Level(now - self.zero, *self.held()))
        if len(self._levels) >= MOST_LEVELS:
            del self._levels[1::2]
            self._level_every *= 2

    def _span(self, lane: str, began: float, ended: float) -> None:
        self._lanes[lane].add(began - self.zero, ended - self.zero)

    # What was seen ---------------------------------------------------------------------------

    def seconds(self, lane: str) -> float:
        """Total time in a lane."""
        return self._lanes[lane].seconds

    def overlap_fraction(self) -> float | None:
        """Share of the time spent transferring during which steps ran; None when nothing was transferred.

        Measured from the spans, not inferred: the time in which a transfer and a step went on at once.
        """
        return self._overlap(TRANSFERS)

    def link_overlap(self, lane: str) -> float | None:
        """The same for copies over the link in one direction."""
        return self._overlap((lane,))

    def _overlap(self, names: tuple[str, ...]) -> float | None:
        transfers = [self._lanes[name] for name in names]
        total = sum(lane.covered() for lane in transfers)
        if total <= 0.0:
            return None
        both = sum(_common(lane, self._lanes[name]) for lane in transfers for name in COMPUTE)
        both -= sum(_common(lane, self._lanes["idle"]) for lane in transfers)  # while an action was waiting
        return min(1.0, max(0.0, both) / total)

    @property
    def spans(self) -> Iterator[Span]:
        """Every span, lane by lane."""
        for name, lane in self._lanes.items():
            for began, ended in zip(lane.began, lane.ended, strict=True):
                yield Span(name, began, ended)

    @property
    def levels(self) -> list[Level]:
        """Bytes held over time."""
        return self._levels


def _common(a: _Lane, b: _Lane) -> float:
    """Time that two lanes have in common."""
    if not a.began or not b.began:
        return 0.0
    edges = np.column_stack((b.began, b.ended)).ravel()
    covered = np.zeros(edges.size)  # by `b`, up to each of its edges
    covered[1::2] = np.cumsum(edges[1::2] - edges[::2])
    covered[2::2] = covered[1:-1:2]
    return float(np.sum(np.interp(a.ended, edges, covered) - np.interp(a.began, edges, covered)))
