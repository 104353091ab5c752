"""An independent judge of plans: replays actions and checks every one of them.

Shares no code with the plan or with the bookkeeping of those who run it.  It knows
no time: an item whose write or read was begun is taken to be under way, and room is
counted from the action that claims it to the action that gives it up.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from longtape.actions import (
    Action,
    Advance,
    Await,
    Discard,
    Free,
    Key,
    Kind,
    PullBack,
    Read,
    Record,
    Restore,
    Reverse,
    Store,
    Turn,
    Write,
)
from longtape.errors import PlanError


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a legal plan amounts to."""

    advances: int
    """Plain steps run."""
    recorded: int
    """Steps run while recording."""
    most_repeats: int
    """How often the most repeated step was run plainly or recorded."""
    peak_slots: int
    peak_blocks: int
    writes: int
    reads: int


@dataclass(slots=True)
class _Replay:
    steps: int
    adjoint: int
    initial_is_free: bool
    final_state: bool
    work: int | None = 0
    turned: bool = False
    reached: int = 0
    memory: set[Key] = field(default_factory=set)
    stored: set[Key] = field(default_factory=set)
    runs: dict[int, int] = field(default_factory=dict)
    advances: int = 0
    recorded: int = 0
    writes: int = 0
    reads: int = 0
    peak: dict[Kind, int] = field(default_factory=lambda: {Kind.SNAPSHOT: 0, Kind.RESIDUALS: 0})

    def need(self, condition: bool, action: Action, why: str) -> None:
        if not condition:
            raise PlanError(f"illegal action {action}: {why} (working state {self.work}, adjoint at {self.adjoint})")

    def claim(self, key: Key, action: Action) -> None:
        self.need(key not in self.memory, action, f"{key} is in memory already")
        self.memory.add(key)
        held = sum(1 for k in self.memory if k.kind is key.kind)
        self.peak[key.kind] = max(self.peak[key.kind], held)

    def run(self, start: int, stop: int, action: Action) -> None:
        self.need(self.work == start < stop <= self.steps, action, "it does not continue the working state")
        self.need(start < self.adjoint, action, "its adjoint is already taken")
        for step in range(start, stop):
            self.runs[step] = self.runs.get(step, 0) + 1
        self.work = stop
        self.reached = max(self.reached, stop)

    def come_down(self, start: int, stop: int, action: Action) -> None:
        self.need(self.turned, action, "the sweep has not turned")
        self.need(stop == self.adjoint, action, "adjoints must come down without a gap")
        self.adjoint, self.work = start, None

    def perform(self, action: Action) -> None:  # noqa: C901 - one case an action
        match action:
            case Advance(start, stop):
                self.run(start, stop, action)
                self.advances += stop - start
            case Record(start, stop):
                self.claim(Key(Kind.RESIDUALS, start), action)
                self.run(start, stop, action)
                self.recorded += stop - start
            case Reverse(start, stop):
                self.need(self.work == start, action, "the working state is another one")
                self.come_down(start, stop, action)
            case PullBack(start, stop):
                self.need(Key(Kind.RESIDUALS, start) in self.memory, action, "its residuals are not in memory")
                self.come_down(start, stop, action)
            case Store(step):
                self.need(self.work == step, action, "the working state is another one")
                self.claim(Key(Kind.SNAPSHOT, step), action)
            case Restore(step):
                free = self.initial_is_free and step == 0
                self.need(free or Key(Kind.SNAPSHOT, step) in self.memory, action, "the snapshot is not in memory")
                self.work = step
            case Write(key):
                self.need(key in self.memory and key not in self.stored, action, "not in memory, or already stored")
                self.stored.add(key)
                self.writes += 1
            case Read(key):
                self.need(key in self.stored, action, "it was never written")
                self.claim(key, action)
                self.reads += 1
            case Free(key):
                self.need(key in self.memory and key in self.stored, action, "not in memory, or held nowhere else")
                self.memory.discard(key)
            case Discard(key):
                self.need(key in self.memory or key in self.stored, action, "it is kept nowhere")
                self.memory.discard(key)
                self.stored.discard(key)
            case Turn():
                self.need(not self.turned, action, "it has turned before")
                self.need(self.work == self.steps or not self.final_state, action, "this is not the final state")
                self.turned = True
            case Await():
                pass


def verify(
    actions: Iterable[Action],
    steps: int,
    *,
    slots: int,
    blocks: int = 0,
    initial_is_free: bool = False,
    final_state: bool = True,
) -> Verdict:
    """Replay a whole plan and check it.

    Args:
        actions: The plan.
        steps: N.
        slots: Most snapshots in memory.
        blocks: Most residual blocks in memory.
        initial_is_free: State 0 may be restored without a slot.
        final_state: The working state must be the final one when the sweep turns.

    Raises:
        PlanError: The first illegal action, a budget exceeded, or something left undone.
    """
    replay = _Replay(steps, steps, initial_is_free, final_state)
    for action in actions:
        replay.perform(action)
    if replay.adjoint != 0 or not replay.turned:
        raise PlanError(f"the plan ends with the adjoint at step {replay.adjoint}")
    for kind, limit in ((Kind.SNAPSHOT, slots), (Kind.RESIDUALS, blocks)):
        if replay.peak[kind] > limit:
            raise PlanError(f"the plan holds {replay.peak[kind]} {kind.value} items at once; {limit} were allowed")
    left = replay.memory | replay.stored
    if left - {Key(Kind.SNAPSHOT, 0)}:
        raise PlanError(f"the plan leaves items behind: {sorted(map(str, left))[:5]}")
    return Verdict(
        advances=replay.advances,
        recorded=replay.recorded,
        most_repeats=max(replay.runs.values(), default=0),
        peak_slots=replay.peak[Kind.SNAPSHOT],
        peak_blocks=replay.peak[Kind.RESIDUALS],
        writes=replay.writes,
        reads=replay.reads,
    )
