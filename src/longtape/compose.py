"""Joins plan, tiers and engine into one run of one job.

Owns the order of things: measure, choose a plan, allocate, run forward, run in
reverse, release.  Front ends bring a `Job` and its `Traits`; everything else is
here.  Runs on the caller's thread.
"""

from __future__ import annotations

import os
import time
import warnings
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import KW_ONLY, dataclass, replace
from functools import partial
from math import ceil, inf
from typing import Any

from longtape.accelerator import Accelerator
from longtape.actions import Action, Kind
from longtape.durable.keeper import Keeper
from longtape.durable.resumable import Resumable
from longtape.engine.executor import Executor
from longtape.engine.mover import Budget, Mover
from longtape.engine.trace import Trace
from longtape.engine.workers import Aside, Workers
from longtape.errors import BudgetError, ResumeError, StateError, StorageError, UsageError
from longtape.measure import LEAST_WINDOWS, CodecSpeed, JobCosts, Windows, measure_codec, measure_tier, measure_windows
from longtape.plan.asynchronous import AsynchronousPlan, Layout
from longtape.plan.choice import STAGED, layout_of
from longtape.plan.choose import LARGEST_BLOCK, Choice, choose, predict_again
from longtape.plan.costs import Costs, Problem
from longtape.plan.scheduled import ScheduledPlan, settle
from longtape.plan.stock import Stock
from longtape.plan.transcript import Transcript, transcribe
from longtape.processes import require_independent
from longtape.protocols import Bytes, Job, Observer, Tier
from longtape.report import Quantities, Report
from longtape.retrospect import Retrospect
from longtape.settled import measure_settled
from longtape.sizes import format_bytes, parse_bytes
from longtape.tiers.aligned import HUGE_PAGE, provide
from longtape.tiers.codecs import parse_codec
from longtape.tiers.compressed import CompressedTier, FloatsOf
from longtape.tiers.disk import DiskTier
from longtape.tiers.lent import LentTier
from longtape.tiers.pool import SlotPool
from longtape.timing import copying

ALIGNMENT = 4096
PADDED_FROM = 64 * 1024
"""States at least this large are padded to whole pages, so that direct I/O needs no second copy of them."""

CODEC_ITEMS = 3
"""Items' worth of memory that a codec's buffers may take: two to make an item smaller, one to bring one back."""

LEAST_CODEC_GAIN = 0.01
"""Share of the time that a codec must be predicted to save before it is used."""

MOST_SMALL_NBYTES = 1 << 20
"""Of two sizes whose transfers are timed, the smaller one has no more than this, nor than a quarter of the other."""

_PATIENCE_SECONDS = 1.0
"""How long idle workers may take to end."""

DURABLE_STATES = 4
"""Room on storage that a plan leaves to a run that can be resumed: two restart points, the final state, an adjoint."""

TRIAL_SHARE, MOST_TRIAL_SECONDS = 0.005, 0.2
"""Windows are tried beside storage for this share of the predicted time each way, and no longer than these seconds."""


@dataclass(frozen=True, slots=True)
class Traits:
    """What a front end says of its job."""

    title: str
    steps: int | None
    state_nbytes: int
    residual_nbytes: int | None = None
    """Bytes `Job.record` needs a step; None: the job cannot record."""
    residual_head_nbytes: int = 0
    """Bytes each residual block takes beyond those of its steps."""
    tape_nbytes: int = 0
    """For a job that reverses several steps at once: bytes each further taped step holds meanwhile."""
    max_window: int = 1
    initial_is_free: bool = False
    reverse_is_assumed: bool = False
    """The time of an adjoint step is a guess, and the first that is measured takes its place."""
    working_slots: int = 0
    """Slots the job works in beside those of the budget; given to its `adopt` before the sweep."""
    notes: tuple[str, ...] = ()
    floats: FloatsOf | None = None
    """Where items hold floating-point numbers that a lossy codec may round; None: nowhere."""
    accelerator: Accelerator | None = None
    """The device that steps run on, where the front end keeps items in memory of its making."""


@dataclass(frozen=True, slots=True)
class Settings:
    """What the user asked for."""

    memory: int | str
    _: KW_ONLY
    disk: str | os.PathLike[str] | None = None
    disk_limit: int | str | None = None
    observers: Sequence[Observer] = ()
    tier: Tier | None = None
    """A tier to use in place of a scratch file in `disk`; its owner closes it."""
    costs: Costs | None = None
    """Times to plan with; measured on the job when None."""
    compress: str | None = None
    """Codec for what goes to storage, used where it is predicted to pay; None: none."""
    stuck_seconds: float = 30.0
    """Wait no longer for storage than this; what it does not deliver is recomputed."""
    resumable: Resumable | None = None
    """Make the run durable, and go on with one that was stopped; its files take the place of `disk`."""
    schedule: Any = None
    """A `checkpoint_schedules.CheckpointSchedule` to follow; None: the quickest plan is chosen."""
    independent: bool = False
    """The ranks are independent: no step communicates.  See `processes`."""


@dataclass(frozen=True, slots=True)
class Hooks:
    """What the caller of a scan wants to be told."""

    on_plan: Callable[[Choice], None] | None
    on_report: Callable[[Report], None] | None


class Run:
    """One forward and one reverse sweep of a job.

    Args:
        job: What to run.
        traits: What the job needs.
        settings: What the user allows.
        measure: Times the job's own steps; None if it cannot, or need not, be timed beforehand.

    Raises:
        BudgetError: `memory` cannot hold one state.
        UsageError: Any other setting that cannot be honoured.
        ScheduleError: The given schedule breaks its own rules.
        StorageError: Storage does not work, and cannot be done without: the given schedule uses it.
    """

    def __init__(
        self,
        job: Job,
        traits: Traits,
        settings: Settings,
        *,
        measure: Callable[[], JobCosts] | None = None,
    ) -> None:
        require_independent(settings.independent)
        self._job, self._traits = job, traits
        self._settings = settings
        self._clock = time.perf_counter
        began = self._clock()
        self._state = "new"
        self._turned_at = 0.0
        self._forward_stall = 0.0
        self._process = os.getpid()
        self._early_faults: tuple[str, ...] = ()
        self._keeper: Keeper | None = None
        self._report: Report | None = None
        self._codec = None if settings.compress is None else parse_codec(settings.compress)
        self._compressed: CompressedTier | None = None
        self._codec_nbytes, self._stored_fraction = 0, 1.0
        self._codec_notes: tuple[str, ...] = ()
        self._accelerator = traits.accelerator
        self._limits = None if traits.accelerator is None else traits.accelerator.limits
        self._pools: dict[Kind, Any] = {}
        self.choice: Choice
        self.costs: Costs
        self._tier: Tier | None = None
        self._workers: Workers | None = None
        self._wanted = deque[Bytes]()
        self._providing = Aside("memory")
        self._releases: list[Callable[[], object]] = [
            self._wanted.clear,
            self._providing.let_go,
            partial(_release_memory, self._accelerator, self._pools),
        ]
        weakref.finalize(self, _let_go, os.getpid(), self._releases).atexit = False
        memory = parse_bytes(settings.memory)
        if not settings.stuck_seconds > 0:
            raise UsageError(
                f"stuck_seconds={settings.stuck_seconds} gives storage no time to answer; give seconds above 0"
            )
        if traits.steps is not None and traits.steps < 1:
            raise UsageError(f"steps must be at least 1, not {traits.steps}")
        if memory < traits.state_nbytes and self._limits is None:
            raise BudgetError(
                f"memory={format_bytes(memory)} cannot hold one state of this model, which takes "
                f"{traits.state_nbytes} bytes; give at least {format_bytes(traits.state_nbytes)}"
            )
        self.memory_nbytes = memory
        self._transcript = self._transcribed()
        try:
            self._keeper = self._open_keeper()
            self._tier = self._open_tier()
            self._workers = self._open_workers()
            begun = self._begun()
            if begun is None:
                self._choose(measure)
                if self._keeper is not None:
                    self._keeper.chosen(self.choice, self.costs, title=traits.title, steps=traits.steps or 0)
            else:
                self.choice, self.costs = begun
            self._assemble()
        except BaseException:
            if self._keeper is not None and self._keeper.begin is None:
                self._keeper.finish()  # nothing has begun that could be gone on with
            elif self._keeper is not None:
                self._keeper.close()
            self._release_memory()
            self._release_storage(self._settings.stuck_seconds)
            raise
        self.prepare_seconds = self._clock() - began

    # Putting it together -----------------------------------------------------------------------

    def _transcribed(self) -> Transcript | None:
        """The given schedule, checked before anything else is done."""
        settings, steps = self._settings, self._traits.steps
        if settings.schedule is None or steps is None:
            return None
        if self._codec is not None:
            raise UsageError("a given schedule says what is stored as it is; leave out compress, or schedule")
        transcript = transcribe(settings.schedule, steps)
        if transcript.uses_disk and settings.disk is None and settings.tier is None:
            raise UsageError(
                f"{transcript.name} keeps {transcript.disk_items} states on disk; say where, with disk='/scratch'"
            )
        return transcript

    def _choose(self, measure: Callable[[], JobCosts] | None) -> None:
        """Measure, and choose a plan; the codec is used where the plan gains by it."""
        stated = self._settings.costs
        job = JobCosts() if stated is not None or measure is None else measure()
        if job.busy is None and self._tier is not None:
            job = replace(job, busy=copying(self._traits.state_nbytes))
        costs = stated or self._measure(job)
        if stated is None and self._accelerator is not None:
            costs = self._accelerator.with_link(costs, self._item_nbytes(self._traits.state_nbytes))
        self.costs = costs
        if self._transcript is not None:
            self.choice = settle(self._transcript, self._problem(), costs)
            return
        self.choice = choice = choose(self._problem(), costs)
        if choice.on_device:
            assert self._limits is not None
            self.memory_nbytes = self._limits.memory_nbytes
        if self._codec is not None and self._tier is not None and not choice.on_device:
            self._choose_packed(job, stated)
        if job.windows is not None and self._compressed is None:
            self._try_windows(job.windows)
            if job.restore is not None:
                job.restore()

    def _choose_packed(self, job: JobCosts, stated: Costs | None) -> None:
        """Use the codec, if the plan gains by it."""
        assert self._codec is not None
        assert self._tier is not None
        costs = self.costs
        speed = CodecSpeed(1.0, inf, inf, 1.0)  # stated costs are those of items, codec included
        if stated is None and job.sample is not None:
            try:
                speed = measure_codec(self._codec, job.sample(), self._floats(), job)
            finally:
                if job.restore is not None:
                    job.restore()
        through = speed.through(costs)
        found = self._packed_choice(through, speed.stored_fraction)
        if found is None or not found.uses_disk or (stated is None and not self._gains(found)):
            why = f" ({_seen(speed)})" if stated is None else ""
            self._codec_notes = (f"compress={self._codec.name!r} is not used, for it would save no time{why}",)
            return
        self.costs, self.choice, self._stored_fraction = through, found, speed.stored_fraction
        self._codec_nbytes = CODEC_ITEMS * self._largest_item(found)
        self._compressed = CompressedTier(self._tier, self._codec, self._floats())
        assert self._workers is not None
        self._tier = self._compressed
        self._workers.move_to(self._tier)

    def _try_windows(self, windows: Windows) -> None:
        """Run some windows of the chosen plan, beside storage if it is used, and choose by what their steps take."""
        choice, costs = self.choice, self.costs
        if self._keeper is not None or not costs.record or not costs.pull_back or not choice.prediction.time_seconds:
            return
        records, expected = choice.schedule == "residuals", choice.prediction.time_seconds
        block, steps = self._block_nbytes(choice), choice.window
        if block > LARGEST_BLOCK and not records:
            steps = max(1, steps * LARGEST_BLOCK // block)
            block = self._block_nbytes(replace(choice, window=steps))
        storage = (self._tier, self._workers) if self._tier and self._workers and records and choice.uses_disk else None
        least = steps * ((LEAST_WINDOWS + 2) * costs.record + LEAST_WINDOWS * costs.pull_back)
        if storage:
            least += costs.write_seconds(block) + costs.read_seconds(block)
        if least > 4 * TRIAL_SHARE * expected:
            return
        try:
            record, pull_back = measure_windows(
                windows,
                block,
                steps,
                storage,
                seconds=min(MOST_TRIAL_SECONDS, TRIAL_SHARE * expected),
                handling=costs.handling_seconds(block),
                stuck_seconds=self._settings.stuck_seconds,
            )
        except OSError as error:
            self._go_without_storage(error)
            self.choice = choose(self._problem(), costs)
            return
        if not record or not pull_back:
            return
        forward = costs.forward * record / costs.record
        self.costs = replace(costs, forward=forward, reverse=record + pull_back, record=record, pull_back=pull_back)
        self.choice = choose(self._problem(), self.costs)

    def _gains(self, found: Choice) -> bool:
        before, after = self.choice.prediction.time_seconds, found.prediction.time_seconds
        return after < (1.0 - LEAST_CODEC_GAIN) * before

    def _packed_choice(self, costs: Costs, fraction: float) -> Choice | None:
        """The best plan if items pass the codec, whose own buffers count; None where they leave no room."""
        item = self._item_nbytes(self._traits.state_nbytes)
        while (choice := self._choice_beside(CODEC_ITEMS * item, costs, fraction)) is not None:
            largest = self._largest_item(choice)
            if largest <= item:
                break
            item = largest  # and once more, with buffers for the blocks that were chosen
        if choice is None:
            return None
        stored = choice.prediction
        return replace(
            choice,
            disk_nbytes=self._room_on_disk(),
            prediction=replace(
                stored,
                peak_memory_bytes=stored.peak_memory_bytes + CODEC_ITEMS * self._largest_item(choice),
                peak_disk_bytes=ceil(fraction * stored.peak_disk_bytes),
                bytes_written=ceil(fraction * stored.bytes_written),
                bytes_read=ceil(fraction * stored.bytes_read),
            ),
        )

    def _choice_beside(self, taken: int, costs: Costs, fraction: float) -> Choice | None:
        """The best plan for items of which a fraction is stored, with less memory."""
        problem, memory = self._problem(), self.memory_nbytes - taken
        limit = None if problem.disk_nbytes is None else int(problem.disk_nbytes / fraction)
        try:
            choice = choose(replace(problem, memory_nbytes=memory, disk_nbytes=limit), costs)
        except BudgetError:
            return None
        return None if choice.on_device else choice

    def _largest_item(self, choice: Choice) -> int:
        block = self._block_nbytes(choice) if choice.blocks else 0
        return max(self._item_nbytes(self._traits.state_nbytes), block)

    def _floats(self) -> FloatsOf | None:
        return self._traits.floats if self._codec is not None and self._codec.bound is not None else None

    def _open_tier(self) -> Tier | None:
        settings = self._settings
        if self._keeper is not None:
            return self._keeper.tier
        if self._transcript is not None and not self._transcript.uses_disk:
            return None
        if settings.tier is not None:
            return LentTier(settings.tier, self, settings.stuck_seconds)
        if settings.disk is None:
            return None
        limit = None if settings.disk_limit is None else parse_bytes(settings.disk_limit)
        try:
            return DiskTier(settings.disk, limit=limit)
        except StorageError as error:
            self._go_without_storage(error)
            return None

    def _open_workers(self) -> Workers | None:
        if self._tier is None:
            return None
        try:
            workers = Workers(self._tier, self._clock)
        except StorageError as error:
            self._go_without_storage(error)
            return None
        self._releases.append(workers.let_go)
        return workers

    def _open_keeper(self) -> Keeper | None:
        settings = self._settings
        if settings.resumable is None:
            return None
        limit = None if settings.disk_limit is None else parse_bytes(settings.disk_limit)
        keeper = Keeper(settings.resumable, limit=limit, stuck_seconds=settings.stuck_seconds)
        self._releases.append(keeper.last_words())
        return keeper

    def _begun(self) -> tuple[Choice, Costs] | None:
        """The plan of the run that is gone on with; None for one that begins."""
        begin = None if self._keeper is None else self._keeper.begin
        if begin is None:
            return None
        assert self._keeper is not None
        self._keeper.check_plan(self._problem())
        choice = begin.choice
        needed = choice.slots * self._item_nbytes(self._traits.state_nbytes) + self._spared()
        needed += choice.blocks * self._block_nbytes(choice)
        if needed > self.memory_nbytes:
            raise ResumeError(
                f"the run that is to be resumed was planned with {format_bytes(needed)} of memory, and now has "
                f"{format_bytes(self.memory_nbytes)}; give as much as before, or begin it anew"
            )
        return choice, begin.costs

    def _spared(self) -> int:
        """Bytes of the budget for the copy of a state that is being made durable."""
        return 0 if self._settings.resumable is None else self._item_nbytes(self._traits.state_nbytes)

    def _go_without_storage(self, error: OSError) -> None:
        """Storage failed before the run began: recompute within memory instead, and say so."""
        if self._keeper is not None or self._transcript is not None:
            raise error
        self._release_storage(_PATIENCE_SECONDS)
        self._tier = self._workers = None
        self._early_faults = (f"storage does not work and is not used: {error}",)
        _warn(self._early_faults[0])

    def _item_nbytes(self, nbytes: int) -> int:
        """Bytes an item takes in memory: whole pages where that costs little and saves a copy."""
        if self._tier is None or nbytes < PADDED_FROM:
            return nbytes
        padded = -(-nbytes // ALIGNMENT) * ALIGNMENT
        return padded if padded <= self.memory_nbytes else nbytes

    def _problem(self) -> Problem:
        traits = self._traits
        return Problem(
            steps=traits.steps,
            state_nbytes=self._item_nbytes(traits.state_nbytes),
            memory_nbytes=self.memory_nbytes - self._spared(),
            has_disk=self._tier is not None,
            disk_nbytes=self._room_on_disk(),
            residual_nbytes=traits.residual_nbytes,
            residual_head_nbytes=traits.residual_head_nbytes,
            tape_nbytes=traits.tape_nbytes,
            max_window=traits.max_window,
            pins_initial=not traits.initial_is_free,
            initial_is_free=traits.initial_is_free,
            device=self._limits,
        )

    def _disk_limit(self) -> int | None:
        """Most bytes on storage: the stated limit, and what is free there, less what makes a run durable."""
        stated = self._settings.disk_limit
        limits = (None if stated is None else parse_bytes(stated), getattr(self._tier, "limit", None))
        limit = min((nbytes for nbytes in limits if nbytes is not None), default=None)
        if limit is None or self._keeper is None:
            return limit
        state = self._stored_nbytes(self._item_nbytes(self._traits.state_nbytes))
        return max(state, limit - DURABLE_STATES * state)

    def _room_on_disk(self) -> int | None:
        """That limit, less what the headers of snapshots take of it."""
        limit, state = self._disk_limit(), self._item_nbytes(self._traits.state_nbytes)
        return None if limit is None else limit // self._stored_nbytes(state) * state

    def _stored_nbytes(self, nbytes: int) -> int:
        """What an item of so many bytes takes on storage."""
        of_tier = getattr(self._tier, "item_nbytes", None)
        return nbytes if of_tier is None else int(of_tier(nbytes))

    def _measure(self, job: JobCosts) -> Costs:
        without = Costs(job.forward, job.reverse, job.record, job.pull_back)
        if self._tier is None or self._workers is None or self._keeps_every_state():
            return without
        state = self._item_nbytes(self._traits.state_nbytes)
        # A slot, a copy of it, and the front end's copy of state 0 are held meanwhile.
        room = max(min(self.memory_nbytes // 4, (self.memory_nbytes - state) // 2), PADDED_FROM)
        sizes = [min(state, room // ALIGNMENT * ALIGNMENT)]
        if self._traits.residual_nbytes:
            large = max(sizes[0], min(4 << 20, self.memory_nbytes // 4))
            # Of two sizes that are close to each other, noise would tell latency from bandwidth.
            sizes = [max(1, min(sizes[0], MOST_SMALL_NBYTES, large // 4)), large]
        try:
            stuck_seconds = self._settings.stuck_seconds
            measure = partial(
                measure_tier, self._tier, self._workers, sizes, busy=job.busy, stuck_seconds=stuck_seconds
            )
            disk = self._tier.directory if isinstance(self._tier, DiskTier) else None
            speed = measure() if disk is None else measure_settled(measure, disk, sizes)
        except OSError as error:
            self._go_without_storage(error)
            return without
        finally:
            if job.restore is not None:
                job.restore()
        return Costs(
            job.forward,
            job.reverse,
            job.record,
            job.pull_back,
            write_bytes_per_second=speed.write_bytes_per_second,
            read_bytes_per_second=speed.read_bytes_per_second,
            touch_bytes_per_second=speed.touch_bytes_per_second if self._accelerator is None else inf,
            write_latency=speed.write_latency,
            read_latency=speed.read_latency,
            handling=speed.handling,
            handling_per_byte=speed.handling_per_byte,
            save=0.0 if self._traits.working_slots else speed.copy_per_byte * state,
        )

    def _keeps_every_state(self) -> bool:
        """Whether memory holds whatever storage could, so that no time of it changes the plan."""
        traits = self._traits
        if traits.steps is None or traits.residual_nbytes or self._keeper is not None or self._transcript is not None:
            return False
        return self._limits is None and traits.steps * self._item_nbytes(traits.state_nbytes) <= self.memory_nbytes

    def _block_nbytes(self, choice: Choice) -> int:
        return self._traits.residual_head_nbytes + choice.window * (self._traits.residual_nbytes or 0)

    def _assemble(self) -> None:
        choice, costs = self.choice, self.costs
        state = self._item_nbytes(self._traits.state_nbytes)
        block = self._block_nbytes(choice)
        alignment = ALIGNMENT if self._tier is not None and state >= PADDED_FROM else 64
        stock = Stock(choice.slots, choice.blocks, steps=self._traits.steps, clock=self._clock)
        if costs.forward > 0:
            stock.forward.add(costs.forward)
        if not self._traits.reverse_is_assumed:
            stock.reverse.add(costs.reverse)
        if self._tier is not None:
            stock.item_nbytes = {
                k: self._stored_nbytes(n) for k, n in ((Kind.SNAPSHOT, state), (Kind.RESIDUALS, block))
            }
            limit = self._disk_limit()
            if limit is not None:
                stock.storage_limit = limit / max(self._stored_fraction, 1e-9)  # the tier counts what is stored
            stock.write.add(costs.write_seconds(state))
            stock.read.add(costs.read_seconds(state))
            stock.block_write.add(costs.write_seconds(block))
            stock.block_read.add(costs.read_seconds(block))
        self._stock = stock
        self._make_pools(state, block, alignment)
        if self._traits.working_slots:
            self._job.adopt([self._pools[Kind.SNAPSHOT].take() for _ in range(self._traits.working_slots)])
        self._budget = Budget(self.memory_nbytes)
        self._budget.reserve(self._codec_nbytes)
        self._budget.reserve(self._tape_nbytes())
        self._trace = Trace(self._clock(), spacing=partial(_spacing, stock) if choice.paces_itself else None)
        observers: list[Observer] = [self._trace, *self._settings.observers]
        self._mover = Mover(
            stock=stock,
            pools=dict(self._pools),
            nbytes={Kind.SNAPSHOT: state, Kind.RESIDUALS: block},
            budget=self._budget,
            tier=self._tier,
            workers=self._workers,
            stuck_seconds=self._settings.stuck_seconds,
            observers=observers,
            on_first_fault=_warn,
        )
        self._trace.held = partial(_held, self._budget, self._compressed or self._mover.storage)
        layout = layout_of(choice)
        job = self._job if self._keeper is None else self._attached(self._keeper, layout)
        accelerator = self._accelerator
        if accelerator is not None:
            accelerator.watch(self._trace.on_link)
        self._executor = Executor(
            self._plan(stock, layout),
            job,
            self._mover,
            clock=self._clock,
            observers=observers,
            meter=None if accelerator is None else accelerator.meter,
            ahead=None if self._limits is None else accelerator,
        )

    def _make_pools(self, state: int, block: int, alignment: int) -> None:
        choice, accelerator = self.choice, self._accelerator
        states = choice.slots + self._traits.working_slots + (self._keeper is not None)
        if accelerator is not None:  # which provides what it makes
            accelerator.settle(choice, max(state, block) if choice.blocks else state)
            self._pools[Kind.SNAPSHOT] = accelerator.pool(states, state, alignment, is_state=True)
            self._pools[Kind.RESIDUALS] = accelerator.pool(choice.blocks, max(1, block), ALIGNMENT, is_state=False)
            return
        self._pools[Kind.SNAPSHOT] = SlotPool(states, state, alignment=alignment)
        self._pools[Kind.RESIDUALS] = SlotPool(choice.blocks, max(1, block), alignment=ALIGNMENT)
        self._touch_slots()

    def _tape_nbytes(self) -> int:
        """What a window's tape takes of the memory that items are kept in."""
        choice, limits = self.choice, self._limits
        if choice.blocks or (limits is not None and not choice.on_device):
            return 0
        return (choice.window - 1) * (self._traits.tape_nbytes if limits is None else limits.tape_nbytes)

    def _plan(self, stock: Stock, layout: Layout) -> Iterator[Action]:
        if self._transcript is not None:
            return iter(ScheduledPlan(stock, self._transcript))
        return iter(AsynchronousPlan(stock, layout))

    def _attached(self, keeper: Keeper, layout: Layout) -> Job:
        self._budget.reserve(self._spared())
        pool = self._pools[Kind.SNAPSHOT]
        slot, spare = pool.take(), pool.take()
        job = keeper.attach(
            self._job,
            self._stock,
            (slot, spare),
            nbytes=self._mover.nbytes,
            window=layout.window,
            keeps_all=not layout.stores,
            steps=self._traits.steps or 0,
        )
        pool.give(spare)
        self._mover.storage.in_use = sum(
            len(self._stock.shelf(kind).stored) * self._mover.nbytes[kind] for kind in (Kind.SNAPSHOT, Kind.RESIDUALS)
        )
        self._trace.begin_at(self._stock.reached or 0)
        return job

    def _touch_slots(self) -> None:
        """Have the system provide the memory the sweeps will use before they do, and beside the first steps."""
        choice = self.choice
        interval = ceil(choice.spacing / choice.window) if choice.uses_disk and not choice.record_fraction else 0
        wanted = choice.held or (interval + 2 * STAGED if choice.uses_disk else choice.slots)
        for kind, most in ((Kind.SNAPSHOT, self._traits.working_slots + wanted), (Kind.RESIDUALS, 2 * STAGED)):
            memory = self._pools[kind].memory(most)
            if memory.nbytes and not provide(memory[:HUGE_PAGE]):
                memory[::ALIGNMENT] = 0
            else:
                self._wanted.extend(memory[k : k + HUGE_PAGE] for k in range(HUGE_PAGE, memory.nbytes, HUGE_PAGE))
        if self._wanted:
            try:
                self._providing.submit(partial(_provide_all, self._wanted))
            except StorageError:  # no thread for it: it comes as it is used
                self._wanted.clear()

    # Running -------------------------------------------------------------------------------------

    def forward(self) -> None:
        """Run the forward sweep; the job's working state is then the final one."""
        self._enter("new", "forward() can run once; make a new sweep to run again")
        began = self._begin_sweep()
        self._trace.skip(began - self._trace.zero)
        self._execute(until_turn=True)
        self._turned_at = self._clock()
        self.forward_seconds = self._turned_at - began
        self._forward_stall = self._trace.seconds("wait")
        self._state = "turned"

    def reverse(self) -> None:
        """Run the reverse sweep and release everything."""
        self._enter("turned", "reverse() runs once, after forward()")
        if self._keeper is not None:
            self._keeper.begin_reverse()
        began = self._begin_sweep()
        self._trace.skip(began - self._turned_at)
        self._execute(until_turn=False)
        self.reverse_seconds = self._clock() - began
        self._state = "reversed"
        if self._keeper is not None:
            self._keeper.finish()
        self._release()

    def _enter(self, state: str, otherwise: str) -> None:
        if os.getpid() != self._process:
            raise StateError(
                f"this sweep belongs to process {self._process}, whose threads and scratch file process {os.getpid()} "
                "has not; make a new one here"
            )
        if self._state != state:
            raise StateError(f"{otherwise} (the sweep is {self._state})")
        self._state = "failed"

    def _begin_sweep(self) -> float:
        """The time at which a sweep begins, on the device too."""
        if self._accelerator is not None:
            self._accelerator.begin_sweep()
        return self._clock()

    def _execute(self, *, until_turn: bool) -> None:
        try:
            self._executor.run(until_turn=until_turn)
            if self._accelerator is not None:
                self._accelerator.end_sweep()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Join the threads, remove the scratch file, release the memory.  Idempotent."""
        if self._state != "reversed":
            self._state = "closed"
        self._release()
        if self._keeper is not None and os.getpid() == self._process:
            self._keeper.close()

    def _release(self) -> None:
        if os.getpid() != self._process:
            return  # a fork: locks and files are the parent's, whose workers may be holding them
        if self._keeper is not None:
            self._keeper.stop()
        self._mover.close()
        if hasattr(self._job, "leave"):
            self._job.leave()
        self._release_memory()
        self._trace.end()

    def _release_memory(self) -> None:
        self._wanted.clear()
        self._providing.close(_PATIENCE_SECONDS)
        _release_memory(self._accelerator, self._pools)

    def _release_storage(self, timeout: float) -> None:
        if self._workers is not None:
            self._workers.close(timeout)
        if self._tier is not None:
            self._tier.close()

    @property
    def run_id(self) -> bytes | None:
        """Of the files of a run that can be resumed."""
        return None if self._keeper is None else self._keeper.run_id

    # Afterwards --------------------------------------------------------------------------------

    @property
    def trace(self) -> Trace:
        """What happened when."""
        return self._trace

    @property
    def report(self) -> Report:
        """Predicted against measured.

        Raises:
            StateError: The reverse sweep has not ended.
        """
        if self._state != "reversed":
            raise StateError(f"there is a report once reverse() has ended (the sweep is {self._state})")
        if self._report is None:
            self._report = replace(self._retrospect().report(), trace=self._trace)
        return self._report

    def _retrospect(self) -> Retrospect:
        given = self._transcript
        return Retrospect(
            title=self._traits.title,
            schedule=self.choice.schedule if given is None else given.name,
            choice=self.choice,
            costs=self.costs,
            layout=layout_of(self.choice) if given is None else None,
            known=self._traits.steps is not None,
            predicted=self.predicted,
            trace=self._trace,
            mover=self._mover,
            memory_nbytes=self.memory_nbytes,
            tape_nbytes=self._tape_nbytes(),
            prepare_seconds=self.prepare_seconds,
            forward_seconds=self.forward_seconds,
            reverse_seconds=self.reverse_seconds,
            forward_stall_seconds=self._forward_stall,
            notes=(*self._traits.notes, *self._tier_notes(), *self._codec_notes),
            early_faults=self._early_faults,
            states_verified=getattr(self._job, "states_verified", None),
            keeper=self._keeper,
            packed=self._compressed,
            accelerator=self._accelerator,
            device=self._limits,
        )

    def _tier_notes(self) -> tuple[str, ...]:
        reason = getattr(self._tier, "fallback_reason", None)
        return () if reason is None else (f"storage is buffered: {reason}",)

    @property
    def predicted(self) -> Quantities:
        """What the plan says the run will take."""
        prediction, steps = self.choice.prediction, self._stock.steps or 0
        if self._traits.steps is None and steps:  # the plan was made for a length that was only assumed
            again = predict_again(self.choice, replace(self._problem(), steps=steps), self.costs)
            prediction = replace(again, peak_memory_bytes=again.peak_memory_bytes + self._codec_nbytes)
        return Quantities(
            seconds=prediction.time_seconds,
            peak_memory_bytes=prediction.peak_memory_bytes,
            peak_disk_bytes=prediction.peak_disk_bytes,
            bytes_written=prediction.bytes_written,
            bytes_read=prediction.bytes_read,
            steps_recomputed=max(0, prediction.advances - round((1.0 - self.choice.record_fraction) * steps)),
            stall_seconds=prediction.stall_seconds,
        )


def refuse_resuming(
    *,
    steps: int | None,
    tier: Tier | None,
    compress: str | None,
    disk: str | os.PathLike[str] | None,
    schedule: Any = None,
) -> None:
    """What cannot be combined with a run that can be resumed.

    Raises:
        UsageError: The length is not known, items go to a tier of the caller's own or through a codec,
            the schedule is given, or `disk` as well.
    """
    if disk is not None:
        raise UsageError(
            f"the files of a run that can be resumed take the place of the scratch file in disk={os.fspath(disk)!r}; "
            "give either resume or disk"
        )
    if steps is None:
        raise UsageError("a run of unknown length cannot be resumed; give the number of steps, or leave out resume")
    if tier is not None:
        raise UsageError("a run in a tier of your own cannot be resumed; leave out tier, or resume")
    if compress is not None:
        raise UsageError(
            "a run that can be resumed stores its items as they are, for how long a packed one is, is known to its "
            "process alone; leave out compress, or resume"
        )
    if schedule is not None:
        raise UsageError("a given schedule begins at state 0 and cannot be resumed; leave out schedule, or resume")


def refuse_lossy_verification(compress: str | None) -> None:
    """States that come back rounded cannot be the same bit for bit.

    Raises:
        UsageError: `compress` names a lossy codec.
    """
    if compress is not None and parse_codec(compress).bound is not None:
        raise UsageError(f"verify=True compares bit for bit, and compress={compress!r} rounds; leave one out")


@contextmanager
def closed_if_it_fails(run: Run) -> Iterator[None]:
    """Give the run up when what is done with it raises."""
    try:
        yield
    except BaseException:
        run.close()
        raise


def _let_go(process: int, releases: list[Callable[[], object]]) -> None:
    """A run that nobody has closed is garbage: give back what it has, by calls that do not refer to it.

    Called on any thread, in the middle of anything: waits for no thread, and takes no lock that somebody may hold.
    """
    if os.getpid() == process:  # in a fork all of it is the parent's
        for release in releases:
            release()


def _release_memory(accelerator: Accelerator | None, pools: dict[Kind, Any]) -> None:
    if accelerator is not None:
        accelerator.close()
    for pool in pools.values():
        pool.close()


# What a run's trace asks refers to no run: it may be kept for long.


def _held(memory: Budget, storage: Budget | CompressedTier) -> tuple[int, int]:
    return memory.in_use, storage.in_use if isinstance(storage, Budget) else storage.stored_nbytes


def _spacing(stock: Stock) -> float:
    return stock.write.value / stock.forward.value if stock.forward.value > 0 else 0.0


def _provide_all(wanted: deque[Bytes]) -> None:
    while wanted:
        with suppress(IndexError):  # nobody wants the rest any more
            provide(wanted.popleft())


def _warn(message: str) -> None:
    """Once a run: what storage does costs time, and the user should know where it went."""
    warnings.warn(f"longtape: {message}; the run goes on without, and takes longer", RuntimeWarning, stacklevel=3)


def _seen(speed: CodecSpeed) -> str:
    times = 1.0 / speed.stored_fraction if speed.stored_fraction else inf
    rates = [
        f"{format_bytes(min(rate, 1e15))}/s" for rate in (speed.encode_bytes_per_second, speed.decode_bytes_per_second)
    ]
    slow = f", and steps took {speed.slowdown:.2f} times as long beside it" if speed.slowdown > 1.005 else ""
    return f"an item of this job became {times:.2f} times smaller, at {rates[0]} out and {rates[1]} back{slow}"


def _on_disk(choice: Choice) -> str:
    """What is written over the whole run, which wears the drive, and what of it is there at once."""
    prediction, most = choice.prediction, choice.disk_nbytes
    allowed = "" if most is None else f" of the {format_bytes(most)} there is room for"
    written, held = format_bytes(prediction.bytes_written), format_bytes(prediction.peak_disk_bytes)
    return f"{written} written to disk in all and {held} at once{allowed}"


def describe(choice: Choice) -> str:
    """The plan in one line, for people."""
    parts = [f"{choice.schedule}: {choice.slots:,} snapshots {'on the device' if choice.on_device else 'in memory'}"]
    if choice.blocks:
        parts.append(f"{choice.blocks} residual blocks of {choice.window} steps")
    if choice.schedule == "given" and choice.prediction.writes:
        parts.append(f"{choice.prediction.writes:,} stored on disk")
    if choice.schedule == "asynchronous":
        parts.append(f"one stored every {choice.spacing:.1f} steps")
    if choice.prediction.writes:
        parts.append(_on_disk(choice))
    if choice.dense:
        parts.append(f"every state of the last {choice.dense:,} steps kept")
    if choice.record_fraction:
        parts.append(f"{choice.record_fraction:.0%} of the steps recorded")
    if choice.on_device:
        parts.append("all on the device")
    elif choice.device_slots:
        parts.append(
            f"windows of {choice.window:,} steps reversed on the device with {choice.device_slots:,} snapshots"
        )
    return ", ".join(parts)
