"""Carries items between memory and storage, and keeps the books of it.

Owns the slots in use, the transfers under way and the byte reservations of the
budget.  Knows no plan and no job.  Runs on the executor's thread only; workers hand
finished transfers back through a queue.

Invariants: a slot is in the pool, or holds one item, or belongs to one transfer
whose item was given up; the bytes in use never exceed the budget; the memory that a
stuck read may still fill, and the room that a stuck write may still claim, are not used
again before it has answered.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from sys import maxsize

from longtape.actions import Key, Kind
from longtape.engine.workers import Transfer, Workers
from longtape.errors import DeviceError, PlanError, StorageError, StorageFull
from longtape.plan.stock import Status, Stock
from longtape.protocols import Event, Observer, Pool, Slot, Tier


@dataclass(slots=True)
class Traffic:
    """What one direction has moved of one kind of item."""

    count: int = 0
    nbytes: int = 0
    seconds: float = 0.0
    """Time the tier spent in it."""
    failures: int = 0


@dataclass(slots=True)
class Budget:
    """Bytes reserved of a stated limit."""

    limit: int
    in_use: int = 0
    peak: int = 0

    def reserve(self, nbytes: int) -> None:
        """Count bytes in; raises `PlanError` past the limit, for a plan must never get there."""
        self.in_use += nbytes
        self.peak = max(self.peak, self.in_use)
        if self.in_use > self.limit:
            raise PlanError(f"{self.in_use} bytes would be held; the budget is {self.limit}")

    def release(self, nbytes: int) -> None:
        """Count bytes out."""
        self.in_use -= nbytes


@dataclass(slots=True)
class Mover:
    """Slots, transfers and reservations of one run."""

    stock: Stock
    pools: dict[Kind, Pool]
    nbytes: dict[Kind, int]
    """Bytes each kind of item reserves."""
    budget: Budget
    tier: Tier | None
    workers: Workers | None
    stuck_seconds: float
    observers: list[Observer]
    held: dict[Key, Slot] = field(default_factory=dict)
    written: dict[Kind, Traffic] = field(default_factory=lambda: {kind: Traffic() for kind in Kind})
    fetched: dict[Kind, Traffic] = field(default_factory=lambda: {kind: Traffic() for kind in Kind})
    storage: Budget = field(default_factory=lambda: Budget(maxsize))
    """Bytes of storage in use, writes under way included."""
    repeated_reads: int = 0
    """Reads that failed, and were tried once more."""
    faults: list[str] = field(default_factory=list)
    """The first of the failures, in words."""
    on_first_fault: Callable[[str], None] | None = None
    _under_way: dict[Key, Transfer] = field(default_factory=dict)
    _abandoned: set[Transfer] = field(default_factory=set)

    # Memory --------------------------------------------------------------------------------

    def take(self, key: Key) -> Slot:
        """A slot for a new item; `hold` or `drop` it."""
        slot = self.pools[key.kind].take()
        self.budget.reserve(self.nbytes[key.kind])
        return slot

    def hold(self, key: Key, slot: Slot) -> None:
        """The item is in `slot` now."""
        self.stock.put(key)
        self.held[key] = slot

    def _vacate(self, key: Key) -> None:
        self.pools[key.kind].give(self.held.pop(key))
        self.budget.release(self.nbytes[key.kind])

    def give_up(self, key: Key) -> None:
        """Free an item's slot, at once or, where a transfer is using it, as soon as that ends."""
        if key.step not in self.stock.shelf(key.kind).memory:
            return
        transfer = self._under_way.get(key)
        cancelled = transfer is not None and transfer.is_write and transfer.claim()
        if cancelled:
            del self._under_way[key]
            self._release(key)
        if self.stock.free(key, cancelled=cancelled):
            self._vacate(key)

    def forget(self, key: Key) -> None:
        """Give up the stored copy too."""
        stored = key.step in self.stock.shelf(key.kind).stored
        self.stock.forget(key)
        if stored and key not in self._under_way:
            self._release(key)

    def _release(self, key: Key) -> None:
        if self.tier is None:
            return
        self.storage.release(self.nbytes[key.kind])
        try:
            self.tier.release(key)
        except OSError as error:
            self._fault(f"the room of {key} could not be given back: {error}")

    # Transfers -----------------------------------------------------------------------------

    def begin_write(self, key: Key) -> None:
        """Queue a write; a tier with no room for it counts as a failed one."""
        if self.tier is None or self.workers is None:
            raise PlanError(f"{key} is to be written, but the run has no storage")
        self.stock.begin_write(key)
        slot = self.held[key]
        try:
            if self._abandoned:
                raise StorageError("storage has stopped answering")
            self.tier.reserve(key, slot.data.nbytes)
        except OSError as error:
            self.written[key.kind].failures += 1
            self._fault(f"{key} could not be stored: {error}")
            self.stock.end_write(key, ok=False)
            self._note_full(error)
            return
        self.storage.reserve(slot.data.nbytes)
        self._submit(Transfer(key, slot, is_write=True))

    def begin_read(self, key: Key) -> None:
        """Queue a read into a free slot."""
        slot = self.take(key)
        self.stock.begin_read(key)
        self.held[key] = slot
        if self._abandoned:
            self.fetched[key.kind].failures += 1
            self._fault(f"{key} could not be read back: storage has stopped answering")
            self._settle_read(key, ok=False)
        else:
            self._submit(Transfer(key, slot, is_write=False))

    def _submit(self, transfer: Transfer) -> None:
        if self.workers is None:
            raise PlanError("a transfer without workers")
        self._under_way[transfer.key] = transfer
        self.workers.submit(transfer)

    def poll(self) -> None:
        """Take note of every transfer that has ended; never waits."""
        while (self._under_way or self._abandoned) and self.workers is not None:
            transfer = self.workers.next_finished(0)
            if transfer is None:
                return
            self._finish(transfer)

    def wait(self) -> None:
        """Wait until one transfer has ended; give up those that take longer than `stuck_seconds`."""
        if not self._under_way or self.workers is None:
            raise PlanError("waiting for a transfer while none is in progress")
        transfer = self.workers.next_finished(self.stuck_seconds)
        while transfer is None and (guard := self._behind_device()) is not None:
            guard.wait()  # it is the device that takes so long, and not storage
            transfer = self.workers.next_finished(self.stuck_seconds)
        if transfer is not None:
            self._finish(transfer)
        else:
            self._abandon()

    def _behind_device(self) -> Event | None:
        """What a transfer under way waits for before storage is asked for anything."""
        guards = (transfer.slot.guard for transfer in self._under_way.values())
        return next((guard for guard in guards if guard is not None and not guard.is_over()), None)

    def _finish(self, transfer: Transfer) -> None:
        key = transfer.key
        if isinstance(transfer.error, DeviceError):
            raise transfer.error  # no fault of storage: what was to be moved will never be there
        if transfer in self._abandoned:
            self._settle_late(transfer)
            return
        del self._under_way[key]
        ok = transfer.error is None
        again = not ok and self._is_worth_repeating(transfer)
        traffic = (self.written if transfer.is_write else self.fetched)[key.kind]
        traffic.seconds += transfer.seconds
        if ok:
            traffic.count += 1
            traffic.nbytes += transfer.nbytes
        else:
            traffic.failures += 1
            what = "stored" if transfer.is_write else "read back" if again else "read back again"
            self._fault(f"{key} could not be {what}: {transfer.error}")
        for observer in self.observers:
            name = "write" if transfer.is_write else "read"
            observer.on_transfer(name, key, transfer.nbytes, transfer.began, transfer.ended)
        if again:
            self.repeated_reads += 1
            self._submit(Transfer(key, transfer.slot, is_write=False, is_repeat=True))
            return
        if transfer.is_write:
            self._settle_write(key, ok=ok, seconds=transfer.seconds, at=transfer.ended)
            self._note_full(transfer.error)
        else:
            self._settle_read(key, ok=ok, seconds=transfer.seconds)

    def _is_worth_repeating(self, transfer: Transfer) -> bool:
        """A failed read whose item is still wanted is tried once more: not every failure is for good."""
        status = self.stock.shelf(transfer.key.kind).memory.get(transfer.key.step)
        return not transfer.is_write and not transfer.is_repeat and status is Status.READING and not self._abandoned

    def _settle_late(self, transfer: Transfer) -> None:
        """A transfer that was given up has answered after all: what it held is free again."""
        self._abandoned.discard(transfer)
        self._release(transfer.key)
        if not transfer.is_write:
            kind = transfer.key.kind
            self.pools[kind].give(transfer.slot)
            self.budget.release(self.nbytes[kind])
            self.stock.shelf(kind).capacity += 1

    def _settle_write(self, key: Key, *, ok: bool, seconds: float = 0.0, at: float | None = None) -> None:
        freed = self.stock.end_write(key, ok=ok, seconds=seconds, at=at)
        if freed:
            self._vacate(key)
        if freed or not ok:
            self._release(key)

    def _note_full(self, error: Exception | None) -> None:
        if isinstance(error, StorageFull):
            self.stock.found_full()

    def _settle_read(self, key: Key, *, ok: bool, seconds: float = 0.0) -> None:
        if self.stock.end_read(key, ok=ok, seconds=seconds):
            self._vacate(key)
        if key.step not in self.stock.shelf(key.kind).stored:
            self._release(key)

    def _abandon(self) -> None:
        """Storage does not answer: go on without what was under way, and without storage until it does."""
        for key, transfer in list(self._under_way.items()):
            del self._under_way[key]
            self._fault(f"{key}: no answer from storage for {self.stuck_seconds:g} s; going on without it")
            if transfer.claim():  # not started, and now it never will be
                (self._settle_write if transfer.is_write else self._settle_read)(key, ok=False)
                continue
            self._abandoned.add(transfer)
            if transfer.is_write:
                self.written[key.kind].failures += 1
                if self.stock.end_write(key, ok=False):
                    self._vacate(key)
            elif self.stock.end_read(key, ok=False):
                self.fetched[key.kind].failures += 1
                del self.held[key]
                self.stock.shelf(key.kind).capacity -= 1

    def _fault(self, message: str) -> None:
        if not self.faults and self.on_first_fault is not None:
            self.on_first_fault(message)
        if len(self.faults) < 100:
            self.faults.append(message)

    def close(self) -> bool:
        """Stop the workers, after the transfers in progress; False if one is stuck.

        A stuck one is waited for once, `stuck_seconds` at most: its thread is a daemon, and
        ends when the system answers.
        """
        for transfer in self._under_way.values():
            transfer.claim()  # those not started never will be
        ended = self.workers is None or self.workers.close(0.0 if self._abandoned else self.stuck_seconds)
        self._under_way.clear()
        self.held.clear()
        if self.tier is not None:
            self.tier.close()  # as the last worker has done, or is doing, unless one is stuck
        return ended
