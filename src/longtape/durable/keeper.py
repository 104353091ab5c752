"""Makes a run durable: decides when, collects what, and has a thread of its own sync and record it.

Owns the points a run can be gone on from, from the first to the removal of its files.
Knows no plan: it sees the run as a job does, through `DurableJob`.  Runs on the executor's
thread; what it hands to its own thread writes, syncs and appends, in this order.

Invariants: a record is appended only after all that it names is on the device; at most one point
is under way; nothing that the last durable point names is given up before the next one
is durable.
"""

from __future__ import annotations

import errno
import os
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from math import inf
from typing import Any

from longtape.actions import Key, Kind
from longtape.durable import points, proof, sense
from longtape.durable.fingerprints import differences, of_leaves
from longtape.durable.home import Home, UnreadableJournal
from longtape.durable.parts import label, pack, unpack
from longtape.durable.points import Begin, OddRecord, Point, Stretch
from longtape.engine.workers import Aside
from longtape.errors import DamagedBlock, ResumeError, StorageError, UsageError
from longtape.plan.choose import Choice
from longtape.plan.costs import Costs, Problem
from longtape.plan.stock import Stock
from longtape.protocols import Bytes, Durable, Job, Slot, Standing
from longtape.tiers import owned
from longtape.tiers.named import NamedDiskTier

DEFAULT_SECONDS = 60.0
"""Of work that may be lost."""

LEAST_ITEM_NBYTES = 4096
"""The least that an item takes in the scratch file."""


@dataclass(frozen=True, slots=True)
class Resumable:
    """What a front end brings for its run to be resumable."""

    home: Home
    source: Durable
    fingerprint: dict[str, str]
    """By a name for people: what must be the same for the run to be gone on with."""
    reach: Callable[[], dict[str, str]] = dict
    """The same of what the steps can reach, as it is when this is called."""
    reached: dict[str, str] = field(default_factory=dict)
    """What `reach` returned before any step was run."""
    extra: bytes = b""
    seconds: float = DEFAULT_SECONDS
    standing: Standing | None = None


def found_begin(home: Home) -> Begin | None:
    """What the run is that an earlier process began here; None if there is none.

    Raises:
        ResumeError: It is of another version, or cannot be believed.
    """
    if home.first is None:
        return None
    try:
        return points.read_begin(home.first)
    except OddRecord as error:
        raise odd(home, error) from None


def odd(home: Home, what: object) -> ResumeError:
    """A journal that says what cannot be."""
    return ResumeError(
        f"the journal of the run {home.name!r} in {home.directory} {what}; give this run another name, or remove that "
        f"one (longtape clean {home.directory})"
    )


def forget(directory: str | os.PathLike[str], name: str, run_id: bytes) -> None:
    """Remove what is durable of a run of this process that was closed, unless another one has its place now."""
    home = Home(directory, name)
    try:
        if home.first is not None and home.first.run_id == run_id:
            home.clear()
    finally:
        home.close()


def check_seconds(seconds: Any) -> float:
    """The option as a number, of Python or of a framework.  Raises `UsageError`."""
    if isinstance(seconds, bool | str) or not hasattr(seconds, "__float__") or not float(seconds) > 0:
        raise UsageError(f"resume_seconds is the work in seconds that may be lost, more than 0; not {seconds!r}")
    return float(seconds)


@dataclass(slots=True, eq=False)
class _Attempt:
    """One point under way."""

    point: Point
    changes: dict[str, Stretch | None]
    blocks: list[tuple[Key, Bytes]]
    keep: list[Key]
    """Keys that the record names."""
    fresh: list[Key]
    """Keys to give up if it fails."""
    retired: int
    anew: bool
    """The reverse sweep has no point yet: what the journal says of one counts no more."""
    written: threading.Event = field(default_factory=threading.Event)
    done: threading.Event = field(default_factory=threading.Event)
    abandoned: bool = False
    error: Exception | None = None
    sequences: dict[Key, int] = field(default_factory=dict)


class Keeper:
    """Keeps one run resumable.

    Args:
        resumable: What the front end brings.
        limit: Most bytes of the scratch file.
        stuck_seconds: Wait no longer for the disk than this.

    Raises:
        ResumeError: What is there is of another run.
        StorageError: The files cannot be made.
    """

    def __init__(self, resumable: Resumable, *, limit: int | None, stuck_seconds: float) -> None:
        self._resumable, self._home, self._source = resumable, resumable.home, resumable.source
        self._stuck_seconds, self._clock = stuck_seconds, time.perf_counter
        self._process = os.getpid()
        self.faults: list[str] = []
        self.notes: list[str] = []
        self.durable_points = 0
        self.seconds = 0.0
        """For which the run stood still to be made durable."""
        self.resumed_from: str | None = None
        self._aside = Aside("durable")
        self._aside.start()  # which fails now, or never
        self._attempt: _Attempt | None = None
        self._stuck: threading.Event | None = None
        """Set once a read that was given up has ended, which until then may still fill our slot."""
        self._own: set[Key] = set()
        """Items of our own that are written, or being written."""
        self._known: dict[Key, int] = {}
        """What the journal names, with the number of its write."""
        self._serial = 0
        self.begin = found_begin(self._home)
        self._begin_header: dict[str, Any] | None = None
        """What the journal has yet to begin with."""
        self._point = Point()
        self._lost = self._is_busy = False
        self.snapshots: set[int] = set()
        self.residuals: set[int] = set()
        try:
            if self.begin is not None:
                self._check(self.begin)
            self.tier = self._open_tier(limit)
        except BaseException:
            self._aside.close(0.0)
            raise
        self._data = owned.identity(self.tier.fileno())
        # A point begins after half the time, so that it is durable before all of it has passed.
        self._every = resumable.seconds / 2
        self._due = self._clock() + self._every
        self._pace = 0.0

    # Finding a run ---------------------------------------------------------------------------

    def _check(self, begin: Begin) -> None:
        ours = {**self._resumable.fingerprint, **self._resumable.reached}
        differs = differences(begin.fingerprint, ours, but=begin.written)
        if differs:
            raise ResumeError(
                f"the run {self._home.name!r} in {self._home.directory} was begun with another {differs}; "
                "go on with what it was begun with, or give this run another name, or remove the old one "
                f"(longtape clean {self._home.directory})"
            )

    def _open_tier(self, limit: int | None) -> NamedDiskTier:
        lost = f"{self._home.journal_path} is damaged where it begins" if self._home.is_damaged else None
        if self.begin is not None:
            if self._home.torn_nbytes:
                self.notes.append(f"the last {self._home.torn_nbytes:,} bytes of the journal could not be read")
            most = 2 * self._home.data_nbytes // LEAST_ITEM_NBYTES
            try:
                self._point = points.read_point(self._home.later(), self.begin, most=most)
                return self._take_up(self.begin, limit)
            except OddRecord as error:
                raise odd(self._home, error) from None
            except UnreadableJournal:
                raise
            except StorageError as error:
                if not isinstance(error, DamagedBlock) and error.errno != errno.ENOENT:
                    raise self._unreadable(error) from error
                self.snapshots, self.residuals = set(), set()
                lost = f"what an earlier process has made durable cannot be used: {error}"
        self.begin, self._point = None, Point()
        self._known, self._own, self._serial = {}, set(), 0
        self._home.clear()
        if lost is not None:
            self._fault(f"{lost}; so the run begins anew")
        self._run_id = os.urandom(16)
        self._journal = self._home.journal(self._run_id)
        return NamedDiskTier(self._home.data_path, run_id=self._run_id, is_new=True, limit=limit)

    def _unreadable(self, error: OSError) -> StorageError:
        """Which says nothing of what is there: another call may go on with it."""
        return StorageError(
            error.errno,
            f"what an earlier process has made durable cannot be read now: {error}; try again, or remove it "
            f"(longtape clean {self._home.directory})",
        )

    def _take_up(self, begin: Begin, limit: int | None) -> NamedDiskTier:
        point, self._run_id = self._point, begin.run_id
        tier = NamedDiskTier(self._home.data_path, run_id=begin.run_id, is_new=False, limit=limit)
        try:
            if tier.block_nbytes != begin.block:
                raise OddRecord(
                    f"was written in blocks of {begin.block} bytes, and this disk wants {tier.block_nbytes}; go on "
                    "with it on a disk such as it was begun on"
                )
            if point.count and bool(point.rows) != bool(self._source.rows(0, 0)):
                raise OddRecord(f"says that there are {'' if point.rows else 'no '}rows, which cannot be")
            if point.count and bool(point.standing) != (self._resumable.standing is not None):
                raise OddRecord(f"says that there are {'' if point.standing else 'no '}sums, which cannot be")
            self._known = {key: place.sequence for key, place in point.items.items()}
            entered = tier.enter(self._renamed(point).items())
            self._own = {key for key in entered if key.kind in (Kind.RESTART, Kind.PARTS)}
            self._serial = 1 + max((key.step for key in point.items if key.kind is Kind.PARTS), default=-1)
            self.snapshots = {key.step for key in entered if key.kind is Kind.SNAPSHOT}
            self.residuals = {key.step for key in entered if key.kind is Kind.RESIDUALS}
            self._journal = self._home.journal(begin.run_id)
            for stretch in point.rows:
                # Only what is put back by this thread comes back in time, or not at all.
                self._source.put_rows(stretch.start, stretch.stop, self._fetched(tier, stretch, "rows"))
            if point.standing is not None and self._resumable.standing is not None:
                self._resumable.standing.put_standing(self._fetched(tier, point.standing, "standing"))
        except BaseException:
            tier.close()
            raise
        return tier

    def _renamed(self, point: Point) -> dict[Key, Any]:
        """Where the items lie: restart points as snapshots, which they are for a plan that takes them up."""
        items = dict(point.items)
        for key in [k for k in items if k.kind is Kind.RESTART and not (point.turned and k.step == point.reached)]:
            place = items.pop(key)
            items.setdefault(Key(Kind.SNAPSHOT, key.step), place)
        items.pop(Key(Kind.SNAPSHOT, 0), None)  # the caller has it
        return items

    def _fetched(self, tier: NamedDiskTier, stretch: Stretch, what: str) -> list[Bytes]:
        found: list[list[Bytes]] = []
        self._aside_wait(lambda: found.append(self._parts(tier, stretch)))
        if found[0][0].tobytes() != label(what, stretch.start, stretch.stop).tobytes():
            raise odd(
                self._home,
                f"says that there are {what} of steps {stretch.start:,} to {stretch.stop:,}, where its data has others",
            )
        return found[0][1:]

    def _parts(self, tier: NamedDiskTier, stretch: Stretch) -> list[Bytes]:
        keys = stretch.names()
        places = tier.places(keys)
        sizes = [place.written for place in places if place is not None]
        if len(sizes) < len(keys):
            raise DamagedBlock("parts of what was made durable are missing")
        return unpack(sizes, lambda number, out: tier.read(keys[number], out))

    def _aside_wait(self, task: Callable[[], None]) -> None:
        """Have our thread read something, and wait no longer than for anything else of the disk.

        As every read that fails it is tried once more.  Raises what it raises.
        """
        done, failure = threading.Event(), []

        def run() -> None:
            try:
                try:
                    task()
                except OSError:
                    task()
            except Exception as error:
                failure.append(error)
            finally:
                done.set()

        self._aside.submit(run)
        if not done.wait(self._stuck_seconds):
            self._stuck = done
            raise StorageError(f"no answer from storage for {self._stuck_seconds:g} s")
        if failure:
            raise failure[0]

    # Joining a run ---------------------------------------------------------------------------

    def chosen(self, choice: Choice, costs: Costs, *, title: str, steps: int) -> None:
        """A new run begins with this plan."""
        resumable = self._resumable
        self.begin = Begin(
            self._run_id,
            {**resumable.fingerprint, **resumable.reached},
            [],
            None,
            resumable.extra,
            choice,
            costs,
            title,
            steps,
            self.tier.block_nbytes,
            time.time(),
        )
        self._begin_header = points.begin_header(self.begin)

    def check_plan(self, problem: Problem) -> None:
        """Refuse a plan from the journal that cannot be one for this problem.  Raises `ResumeError`."""
        assert self.begin is not None
        fault = sense.of_plan_for(self.begin.choice, problem)
        fault = fault or (None if self.begin.steps == problem.steps else f"that the run has {self.begin.steps:,} steps")
        if fault is not None:
            raise odd(self._home, f"says {fault}, which cannot be")

    def attach(
        self,
        job: Job,
        stock: Stock,
        slots: tuple[Slot, Slot],
        *,
        nbytes: Mapping[Kind, int],
        window: int,
        keeps_all: bool,
        steps: int,
    ) -> DurableJob:
        """Join the run.

        Args:
            job: Whose steps are to be watched.
            stock: Of the run; is told what an earlier process has left.
            slots: Room for two snapshots: one for us to keep, and one only until we return.
            nbytes: Of a snapshot, and of a residual block.
            window: Steps; restart points lie on multiples of it.
            keeps_all: Keep every restart point, because the plan itself stores none.
            steps: N.

        Returns:
            The job to run in its place.
        """
        self._job, self._stock, self._slot = job, stock, slots[0]
        self._window, self._keeps_all, self._steps = window, keeps_all, steps
        self._rows_from = max((stretch.stop for stretch in self._point.rows), default=0)
        self._adjoint_at = steps
        self._bars_from = steps
        self._seed: str | None = None
        self._final: Key | None = None
        point = self._point
        if point.count:
            for key, place in point.items.items():
                due = nbytes.get(Kind.SNAPSHOT if key.kind is Kind.RESTART else key.kind, place.written)
                if place.written != due:
                    raise odd(self._home, f"says that {key} has {place.written:,} bytes, where {due:,} are due")
            self._prove(slots[1])
            self._tell(stock, point)
        self._home.is_believed = True
        return DurableJob(job, self)

    def _prove(self, spare: Slot) -> None:
        """Run some steps again that an earlier process has run, to see that this one does the same."""
        assert self.begin is not None
        stored = {step: Key(Kind.SNAPSHOT, step) for step in self.snapshots}
        stored |= {key.step: key for key in self._own if key.kind is Kind.RESTART}
        forward, seconds = self.begin.costs.forward, self._resumable.seconds
        ran = proof.prove(
            proof.Again(self._job, self._source, (self._slot, spare), self._read_state),
            stored,
            self.begin.witness,
            most=seconds / forward if forward else inf,
        )
        self.notes += [] if ran is None else [ran]

    def _read_state(self, key: Key, slot: Slot) -> bool:
        """Fill a slot with a stored state; False where it is lost.  Raises `StorageError` where none answers."""
        try:
            self._aside_wait(lambda: self.tier.read(key, slot.data))
        except OSError as error:
            if self._stuck is not None:  # the slot may still be filled
                raise self._unreadable(error) from error
            return False
        return True

    def _tell(self, stock: Stock, point: Point) -> None:
        """What there is goes onto the shelves."""
        stock.snapshots.stored |= self.snapshots
        stock.residuals.stored |= self.residuals
        stock.reached = point.reached
        if point.turned:
            final = Key(Kind.RESTART, point.reached)
            try:
                if final not in self._own:
                    raise DamagedBlock("it is not in the file")
                self._aside_wait(lambda: self.tier.read(final, self._slot.data))
                self._final = final
            except OSError as error:
                self._fault(f"the final state cannot be read back, and is computed again: {error}")
                self._drop(key for key in [final] if key in self._own)
                self._forget_adjoint(point)
                stock.reached = max(self.snapshots, default=0)
        self.resumed_from = f"step {stock.reached:,} of the forward sweep" if self._final is None else "the turn"

    @property
    def run_id(self) -> bytes:
        """Of the run."""
        return self._run_id

    @property
    def reached(self) -> int:
        """The step from which the forward sweep goes on."""
        return self._stock.reached or 0

    # Watching ----------------------------------------------------------------------------------

    def piece(self, start: int, stop: int) -> int:
        """How far to run before we look at the clock again: a tenth of the time between points, in whole windows."""
        if stop - start <= self._window or self._pace <= 0.0:
            return min(stop, start + self._window)
        steps = int(self._every / 10 / self._pace)
        if start + steps >= stop:
            return stop
        return min(stop, max(start + self._window, (start + steps) // self._window * self._window))

    def ran(self, steps: int, seconds: float) -> None:
        """So many steps took so long."""
        self._pace = seconds / steps if steps else self._pace

    def passed(self, step: int, *, turned: bool) -> None:
        """The working state is at `step`."""
        header = self._begin_header
        if header is not None and header["witness"] is None and not turned:
            header["witness"] = {"state": step, "leaves": of_leaves(self._source.state())}
        if self._clock() < self._due or step % self._window or step >= self._steps:
            return
        if not turned:
            self._save(state=step, reached=step)
        elif self._can_save_adjoint():
            self._save(state=step, adjoint=True)

    def came_down(self, step: int) -> None:
        """The adjoint is at `step`."""
        self._adjoint_at = step
        if self._clock() >= self._due and self._can_save_adjoint() and step > 0:
            self._save(adjoint=True)

    def _can_save_adjoint(self) -> bool:
        self._settle_attempt(wait=False)
        return self._seed is not None and self._final is not None

    def turning(self) -> None:
        """The working state is the final one."""
        if self._final is not None:
            self._job.load(self._slot)
            return
        self._settle_attempt(wait=True)
        self._save(state=self._steps, reached=self._steps, is_final=True)

    def begin_reverse(self) -> None:
        """The adjoint of the end is set: go on from a durable one if it came from the same."""
        self._due = self._clock() + self._every
        self._settle_attempt(wait=False)
        self._seed = self._source.seed()
        point = self._point
        if self._seed is None:
            self.notes.append("only the forward sweep can be resumed, for the model has no adjoint arrays to keep")
            return
        if point.adjoint is None:
            return
        if point.seed != self._seed:
            self._fault(
                "the adjoint at the end is another one than that of the run that is resumed, so its reverse sweep "
                "begins anew"
            )
        else:
            try:
                adjoint = self._fetched(self.tier, point.adjoint, "adjoint")
                bars = [(stretch, self._fetched(self.tier, stretch, "bars")) for stretch in point.bars]
                has_begun = point.adjoint.start < self._steps
                if has_begun and bool(bars) != bool(self._source.bars(self._steps, self._steps)):
                    raise DamagedBlock("cotangents of rows are missing")
            except OSError as error:
                self._fault(f"the adjoint cannot be read back, so the reverse sweep begins anew: {error}")
            else:
                # From here on nothing may fail but loudly: the adjoint of the end is overwritten.
                self._source.put_adjoint(adjoint)
                for stretch, parts in bars:
                    self._source.put_bars(stretch.start, stretch.stop, parts)
                self._stock.adjoint = self._adjoint_at = self._bars_from = point.adjoint.start
                self.resumed_from = f"the adjoint of step {point.adjoint.start:,}"
                return
        self._forget_adjoint(point)

    def _forget_adjoint(self, point: Point) -> None:
        """The reverse sweep begins at the end."""
        for stretch in [point.adjoint, *point.bars]:
            if stretch is not None:
                self._drop(key for key in stretch.names() if key in self._own)
        point.adjoint, point.bars, point.seed = None, [], None

    # Making a point --------------------------------------------------------------------------

    def _save(
        self, *, state: int | None = None, reached: int | None = None, adjoint: bool = False, is_final: bool = False
    ) -> None:
        if os.getpid() != self._process or not self._settle_attempt(wait=False):
            return
        if self._stuck is not None and not self._stuck.is_set():
            return
        if self._is_lost():
            return
        self._leave_out_written()
        began = self._clock()
        fresh: list[Key] = []
        try:
            attempt = self._collect(fresh, state=state, reached=reached, adjoint=adjoint, is_final=is_final)
        except OSError as error:
            self._drop(fresh)
            self._fault(f"the run could not be made durable: {error}")
        else:
            self._attempt = attempt
            self._aside.submit(lambda: self._carry_out(attempt))
            if not attempt.written.wait(self._stuck_seconds):
                attempt.abandoned = True
                self._fault(f"the run could not be made durable: no answer from storage for {self._stuck_seconds:g} s")
        now = self._clock()
        self.seconds += now - began
        self._due = now + self._every

    def _is_lost(self) -> bool:
        """Whether the files are not where the next process would look for them."""
        if not self._lost and not self._home.is_in_place(self._data):
            self._lost = True
            self._fault(
                f"the run is no longer durable: its files in {self._home.directory} were moved, removed or replaced",
                always=True,
            )
        return self._lost

    def _leave_out_written(self) -> None:
        """What steps have changed already is theirs to change, and no part of the fingerprint."""
        header = self._begin_header
        if header is None or header["written"] or not self._resumable.reached:
            return
        before, now = self._resumable.reached, self._resumable.reach()
        header["written"] = written = [name for name in before if now.get(name) != before[name]]
        header["fingerprint"] = {k: v for k, v in header["fingerprint"].items() if k not in written}

    def _collect(
        self, fresh: list[Key], *, state: int | None, reached: int | None, adjoint: bool, is_final: bool
    ) -> _Attempt:
        """Everything that a point holds; adds the keys it reserves to `fresh`."""
        old, source, tier = self._point, self._source, self.tier
        point = replace(old, rows=list(old.rows), bars=list(old.bars), items={}, count=old.count + 1)
        blocks: list[tuple[Key, Bytes]] = []

        def parts(what: str, arrays: list[Bytes], start: int, stop: int) -> Stretch | None:
            if not arrays:
                return None
            packed = pack([label(what, start, stop), *arrays])
            stretch = Stretch(self._serial, len(packed), start, stop)
            self._serial += len(packed)
            for key, data in zip(stretch.names(), packed, strict=True):
                tier.reserve(key, data.nbytes)
                fresh.append(key)
                blocks.append((key, data))
            return stretch

        changes: dict[str, Stretch | None] = {"adjoint": None, "rows": None, "bars": None, "standing": None}
        if reached is not None:
            point.reached, point.turned = reached, is_final
            if reached > self._rows_from:
                changes["rows"] = parts("rows", source.rows(self._rows_from, reached), self._rows_from, reached)
            if self._resumable.standing is not None:
                found = self._resumable.standing.standing()
                changes["standing"] = point.standing = parts("standing", found, reached, reached)
        if adjoint and (old.adjoint is None or old.adjoint.start != self._adjoint_at):
            changes["adjoint"] = point.adjoint = parts("adjoint", source.adjoint(), self._adjoint_at, self._adjoint_at)
            point.seed = self._seed
            if self._adjoint_at < self._bars_from:
                found = source.bars(self._adjoint_at, self._bars_from)
                changes["bars"] = parts("bars", found, self._adjoint_at, self._bars_from)
        for kind in ("rows", "bars"):
            stretch = changes[kind]
            if stretch is not None:
                getattr(point, kind).append(stretch)
        if state is not None and Key(Kind.RESTART, state) not in self._own:
            key = Key(Kind.RESTART, state)
            tier.reserve(key, self._slot.data.nbytes)
            fresh.append(key)
            self._slot = self._job.save(self._slot)
            if self._slot.guard is not None:
                self._slot.guard.wait()
            blocks.append((key, self._slot.data))
        needed = self._needed(point, state)
        anew = old.adjoint is None
        return _Attempt(point, changes, blocks, [*self._stored(), *needed], fresh, tier.retired, anew)

    def _needed(self, point: Point, state: int | None) -> list[Key]:
        """The items of our own that this point needs."""
        keys = [key for stretch in point.stretches for key in stretch.names()]
        restarts = {key for key in self._own if key.kind is Kind.RESTART}
        if not self._keeps_all:
            newest = max((key.step for key in restarts if key != self._final), default=None)
            restarts = {key for key in restarts if key == self._final or (state is None and key.step == newest)}
        if point.adjoint is not None:
            restarts = {key for key in restarts if key == self._final or key.step < point.adjoint.start}
        return [*keys, *restarts, *([] if state is None else [Key(Kind.RESTART, state)])]

    def _stored(self) -> list[Key]:
        shelves = (self._stock.snapshots, self._stock.residuals)
        return [Key(shelf.kind, step) for shelf in shelves for step in shelf.stored]

    def _carry_out(self, attempt: _Attempt) -> None:
        """On our own thread: data, then the record that names it."""
        try:
            for key, data in attempt.blocks:
                self.tier.write(key, data)
            attempt.blocks = []
            attempt.written.set()
            if not attempt.abandoned:
                with self._home.in_use():
                    self._record(attempt)
        except Exception as error:  # dealt with on the executor's thread
            attempt.error = error
        finally:
            attempt.written.set()
            attempt.done.set()

    def _record(self, attempt: _Attempt) -> None:
        places = self.tier.places(attempt.keep)
        there = {place.key: place for place in places if place is not None}
        new = [(key, place) for key, place in there.items() if self._known.get(key) != place.sequence]
        gone = [key for key in self._known if key not in there]
        self.tier.sync()
        if self._begin_header is not None:
            self._journal.append(self._begin_header, self._resumable.extra)
            self._begin_header = None
            self._home.sync_directory()
        header = points.point_header(attempt.point, anew=attempt.anew, **attempt.changes)
        self._journal.append(header, points.items_payload(new, gone))
        attempt.sequences = {key: place.sequence for key, place in there.items()}

    def _settle_attempt(self, *, wait: bool) -> bool:
        """Take note of how the point under way has ended; False if it has not."""
        attempt = self._attempt
        if attempt is None:
            return True
        if not attempt.done.wait(self._stuck_seconds if wait and not attempt.abandoned else 0.0):
            return False
        self._attempt = None
        if attempt.abandoned or attempt.error is not None:
            if attempt.error is not None:
                self._fault(f"the run could not be made durable: {attempt.error}")
            self._drop(attempt.fresh)
            return True
        point, needed = attempt.point, set(attempt.keep)
        self._point, self._known = point, attempt.sequences
        self.durable_points += 1
        if point.turned:
            self._final = Key(Kind.RESTART, point.reached)
        self._rows_from = max((stretch.stop for stretch in point.rows), default=0)
        if point.adjoint is not None:
            self._bars_from = point.adjoint.start
        self._own |= set(attempt.fresh)
        self._drop([key for key in self._own if key not in needed])
        # What the last record named and this one does not may be overwritten now, and what was given back before it.
        self.tier.settle(attempt.retired)
        return True

    def _drop(self, keys: Iterable[Key]) -> None:
        for key in list(keys):
            self._own.discard(key)
            self.tier.release(key)

    def _fault(self, message: str, *, always: bool = False) -> None:
        if always or not self.faults:
            warnings.warn(f"longtape: {message}", RuntimeWarning, stacklevel=3)
        self.faults.append(message)

    # The end -----------------------------------------------------------------------------------

    def last_words(self) -> Callable[[], None]:
        """Closes what a keeper that nobody refers to leaves behind, without a reference to it; waits for nothing."""
        return partial(self._aside.let_go, self._home.close)

    def stop(self) -> None:
        """Let the point under way end; no further one is made.  Idempotent; before the tier is closed."""
        self._settle_attempt(wait=True)
        attempt, self._attempt = self._attempt, None
        if attempt is not None:
            attempt.abandoned = True
        self._is_busy |= attempt is not None or (self._stuck is not None and not self._stuck.is_set())
        self._aside.close(0.0 if self._is_busy else self._stuck_seconds)

    def finish(self) -> None:
        """The run has ended well: remove its files.  Before the tier is closed, which gives back their room."""
        self.stop()
        self._is_lost()
        left = self._home.remove(self._data)
        if left:
            self._fault(
                f"{' and '.join(left)} could not be removed; remove what is left with "
                f"longtape clean {self._home.directory}"
            )
        self._home.close()

    def close(self) -> None:
        """The run is given up: leave its files, to be gone on with, if there is anything to go on from."""
        self.stop()
        if self._begin_header is not None and not self._is_busy:
            self._home.remove(self._data)
        self._home.close()


class DurableJob:
    """A job whose keeper looks on: long ranges are run in pieces, after each of which a point may be made."""

    def __init__(self, job: Job, keeper: Keeper) -> None:
        self._job, self._keeper = job, keeper
        self._turned = False
        self.save, self.load, self.yield_slot = job.save, job.load, job.yield_slot
        self.adopt, self.load_initial = job.adopt, job.load_initial

    def advance(self, start: int, stop: int) -> int:
        keeper = self._keeper
        while start < stop:
            piece = keeper.piece(start, stop)
            began = time.perf_counter()
            reached = self._job.advance(start, piece)
            keeper.ran(piece - start, time.perf_counter() - began)
            if reached != piece:
                return reached
            keeper.passed(piece, turned=self._turned)
            start = piece
        return stop

    def record(self, start: int, stop: int, slot: Slot) -> int:
        reached = self._job.record(start, stop, slot)
        self._keeper.passed(reached, turned=self._turned)
        return reached

    def reverse(self, start: int, stop: int) -> None:
        self._job.reverse(start, stop)
        self._keeper.came_down(start)

    def pull_back(self, start: int, stop: int, slot: Slot) -> None:
        self._job.pull_back(start, stop, slot)
        self._keeper.came_down(start)

    def turn(self) -> None:
        self._keeper.turning()
        self._job.turn()
        self._turned = True
