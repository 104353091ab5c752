"""Where a plan stands, and the moves that both sweeps share.

Owns the positions of the working state and of the adjoint, the restart points and the
recorded windows; turns windows into steps, and makes room.  Positions are *windows*
here and in the sweeps; everything that leaves them is in steps.
"""

from __future__ import annotations

from array import array
from collections.abc import Generator, Iterator
from math import inf

from longtape.actions import (
    Action,
    Await,
    Discard,
    Free,
    Key,
    Kind,
    Read,
    Store,
)
from longtape.errors import PlanError, StorageError
from longtape.plan.binomial import advances
from longtape.plan.layout import Layout, Rules
from longtape.plan.pieces import cut, is_stored
from longtape.plan.stock import Shelf, Status, Stock

Actions = Iterator[Action]

DEVIATIONS = 2.0
"""Mean deviations beyond its mean that a read is given time for, as 19 of 20 take no longer if noise is normal."""


class Course:
    """The state of a plan on its way through both sweeps."""

    def __init__(self, stock: Stock, layout: Layout, rules: Rules) -> None:
        self.stock, self.layout, self.rules = stock, layout, rules
        self.work: int | None = 0
        """The window the working state is at; None if there is none."""
        self.adjoint: int | None = None
        """The highest window not yet reversed; None until the sweep turns."""
        self.restarts = array("q")
        """Windows whose start was kept, ascending."""
        self.recorded = array("q")
        """Windows recorded in the forward sweep, ascending."""

    def at(self, window: int) -> int:
        step = window * self.layout.window
        return step if self.stock.steps is None else min(step, self.stock.steps)

    def windows(self, steps: int) -> int:
        return -(-steps // self.layout.window)

    def snapshot(self, window: int) -> Key:
        return Key(Kind.SNAPSHOT, window * self.layout.window)

    def residuals(self, window: int) -> Key:
        return Key(Kind.RESIDUALS, window * self.layout.window)

    def resident(self, window: int) -> bool:
        if window == 0 and self.layout.initial_is_free:
            return True
        return self.stock.snapshots.resident(window * self.layout.window)

    def coming(self, window: int) -> bool:
        """In memory or on its way there."""
        status = self.stock.snapshots.memory.get(window * self.layout.window)
        return self.resident(window) or status is Status.READING

    def stored(self, window: int) -> bool:
        return window * self.layout.window in self.stock.snapshots.stored

    def exists(self, window: int) -> bool:
        return (window == 0 and self.layout.initial_is_free) or self.stock.snapshots.known(window * self.layout.window)

    @property
    def forward_seconds(self) -> float:
        return self.stock.forward.value * self.layout.window

    @property
    def reverse_seconds(self) -> float:
        stock = self.stock
        return (stock.reverse.value if stock.reverse.count else 2.0 * stock.forward.value) * self.layout.window

    @property
    def read_seconds(self) -> float:
        """From storage to where the steps run."""
        return (self.stock.read if self.stock.read.count else self.stock.write).value + self.layout.in_seconds

    @property
    def lead_seconds(self) -> float:
        """How long before it is needed a read is begun: what it takes, and what it may take beyond that."""
        seen = [mean for mean in (self.stock.read, self.stock.write) if mean.count > 1 and mean.value > 0.0]
        noise = max((DEVIATIONS * mean.deviation / mean.value for mean in seen), default=1.0)
        return (1.0 + self.rules.margin * min(1.0, noise)) * self.read_seconds

    def spacing(self) -> float:
        """Windows that pass during one write; 0 while nothing is known of it."""
        step = self.forward_seconds
        return self.stock.write.value / step if step > 0 else 0.0

    def piece_seconds(self, length: int, slots: int) -> float:
        if slots < 1 and length > 1:
            return inf
        recomputed = advances(length, slots) if length > 1 else 0
        return recomputed * self.forward_seconds + length * self.reverse_seconds

    def room(self) -> int:
        """Snapshots that limited storage can still take."""
        stock = self.stock
        if stock.storage_limit == inf or not self.layout.stores:
            return 0
        return max(0, int((stock.storage_limit - stock.occupied()) // stock.item_nbytes[Kind.SNAPSHOT]))

    def cut(self, start: int, length: int) -> int | None:
        """Where to store in the piece of so many windows from `start`; None if memory alone is to reverse it."""
        if self.layout.longest_piece is None:
            return None
        slots = max(1, self.stock.snapshots.capacity - self.layout.pin_initial - 1)
        return cut(length, slots, self._room_above(start), self.windows(self.layout.longest_piece))

    def is_stored(self, start: int, rest: int) -> bool:
        """Whether storage takes the state at a cut in the piece from `start` that leaves so many windows above it."""
        return is_stored(rest, self._room_above(start), self.windows(self.layout.longest_piece or 1))

    def _room_above(self, start: int) -> int:
        """The room, and one more where the start of the piece need not stay in a slot meanwhile."""
        status = self.stock.snapshots.memory.get(start * self.layout.window)
        kept = start == 0 and (self.layout.initial_is_free or self.layout.pin_initial)
        return self.room() + (kept or self.stored(start) or status is Status.WRITING)

    def wait_for_slots(self, length: int) -> Actions:
        """Before a piece is reversed: wait as long as a further slot saves it more than that."""
        stock = self.stock
        while stock.writes and length > 1:
            slots = stock.snapshots.available()
            saved = self.piece_seconds(length, slots) - self.piece_seconds(length, slots + 1)
            if not saved > stock.write_remainder():
                return
            yield Await()

    def evict(self, kind: Kind = Kind.SNAPSHOT) -> Action | None:
        step = self.stock.shelf(kind).evictable()
        return None if step is None else Free(Key(kind, step))

    def reuse(self, kind: Kind) -> Actions:
        """Evict a stored item if there is no free slot, or none that should be touched."""
        shelf, staging = self.stock.shelf(kind), self.layout.staging
        if shelf.free == 0 or (staging is not None and len(shelf.memory) >= staging):
            action = self.evict(kind)
            if action is not None:
                yield action

    def make_room(self, kind: Kind = Kind.SNAPSHOT, *, required: bool = True) -> Generator[Action, None, bool]:
        """Free one slot, waiting for a transfer to end where nothing can be evicted; False if that cannot be.

        It always can, unless reads that never answered have cost the slots it takes.
        """
        shelf = self.stock.shelf(kind)
        while shelf.free == 0:
            action = self.evict(kind)
            if action is None and shelf.spared:
                shelf.spared -= 1
                continue
            action = action or self._give_up(kind)
            if action is None:
                if not self.stock.writes and not self.stock.reads:
                    if required:
                        raise self._no_room(shelf)
                    return False
                action = Await(room=kind)
            yield action
        return True

    def spare_memory(self, windows: int) -> None:
        """After so many windows forward: have the reverse sweep do with as much memory as it was said to need.

        Unless states lie much further apart than was thought, and recomputing what is between them needs more.
        """
        held = self.layout.held
        if held is not None and windows <= held * len(self.restarts):
            self.stock.snapshots.spare(held)

    def _no_room(self, shelf: Shelf) -> Exception:
        if shelf.capacity < shelf.made_with:
            return StorageError(
                f"storage stopped answering in the middle of reading, and holds the memory of "
                f"{shelf.made_with - shelf.capacity} of {shelf.made_with} {shelf.kind.value} items, without which the "
                "sweep cannot go on; give more memory, or another disk"
            )
        return PlanError(f"no {shelf.kind.value} slot can be freed: {sorted(shelf.memory)[:20]} are all in use")

    def _give_up(self, kind: Kind) -> Action | None:
        """An item whose write failed, and which nothing protects, when there is no other way."""
        if self.stock.writes or self.stock.reads:
            return None
        shelf = self.stock.shelf(kind)
        spared = {0} if kind is Kind.SNAPSHOT else set()
        unprotected = [s for s, v in shelf.memory.items() if v is Status.RESIDENT and s not in shelf.protected | spared]
        return Discard(Key(kind, min(unprotected))) if unprotected else None

    def protect(self, window: int) -> None:
        self.stock.snapshots.protected.add(window * self.layout.window)

    def unprotect(self, window: int) -> None:
        self.stock.snapshots.protected.discard(window * self.layout.window)

    def protects(self, window: int) -> bool:
        return window * self.layout.window in self.stock.snapshots.protected

    def push(self, window: int) -> Actions:
        """Keep the working state, which is at `window`, in a slot of its own until its adjoint."""
        if not (window == 0 and self.layout.initial_is_free):
            while window * self.layout.window in self.stock.snapshots.memory:
                yield Await(room=Kind.SNAPSHOT)  # it was given up while it was being written
            yield from self.make_room()
            yield Store(self.at(window))
            self.protect(window)
        self.restarts.append(window)

    def finish(self, window: int) -> Actions:
        """The restart point is not needed again."""
        self.stock.snapshots.protected.discard(window * self.layout.window)
        if self.restarts and self.restarts[-1] == window:
            self.restarts.pop()
        if self.stock.snapshots.known(window * self.layout.window):
            yield Discard(self.snapshot(window))

    def request(self, window: int | None) -> Actions:
        """Have a stored restart point brought into memory, and keep it there."""
        if window is None or not self.exists(window):
            return
        self.protect(window)
        if not self.coming(window) and self.stored(window) and (yield from self.make_room(required=False)):
            yield Read(self.snapshot(window))
