"""What a schedule will take, in closed form: seconds, bytes and steps, before anything runs.

This file owns the predictor for snapshots, and the terms every prediction is made in;
`recording` adds residuals on storage.  It searches nothing (`choose` does) and runs no
plan (`simulate` does).

Everything is counted in *windows* of h steps whose adjoint is taken in one go; the
theory's single step is the case h = 1.  With n = ⌈N/h⌉ windows of mean length N/n, the
symbols are t_F = `Pace.advance`, t_B = `Pace.adjoint`, t_W and t_R = `Pace.write` and
`Pace.read` (of one state), s = `Footprint.slots`, I = spacing in windows and M = tail
in windows.

With a device (`Problem.device`) a window is what is reversed there from one snapshot, by
Revolve on s₁ = `Footprint.inner` snapshots of its own or taped in one go; what is kept, is kept in
the host's memory, and goes over the link, which takes t_out = `Pace.out` and t_in = `Pace.back`
for a state.

Source: the binomial formulas are Griewank and Walther's, ACM TOMS 26 (2000); storing
at a mean spacing while computing follows the idea of Kukreja, Hückelheim and Gorman
(2018).  The rules predicted here are those of `longtape.plan.asynchronous`.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil, floor

from longtape.plan.binomial import advances, capacity, repetitions, split, stores
from longtape.plan.costs import LEAST_TO_PIN, Costs, Problem

HORIZON = 10_000
"""Steps for which a job of unknown length is predicted."""

DENSE_SPARE = 4
"""Slots that a dense tail leaves alone: for two states that are being written, and for noise."""

DENSE_FROM_SECONDS = 1e-5
"""A window that takes less is over before storage has been looked at."""

_TINIEST_STEP = 1e-12
_ROUNDING = 1e-9


@dataclass(frozen=True, slots=True)
class Footprint:
    """How the memory budget is shared out."""

    window: int = 1
    """Steps whose adjoint is taken in one go (h)."""

    slots: int = 1
    """Snapshots in memory, staging and prefetch included (s)."""

    blocks: int = 0
    """Blocks that each hold the residuals of a window; 0: the job is reversed by re-taping."""

    inner: int = 0
    """Snapshots on a device by which a window is reversed there (s₁); 0: its steps are taped in one go."""

    def nbytes(self, problem: Problem) -> int:
        """Bytes of the budget: s·state + blocks·(h·residuals + head), or + (h-1)·tape where there are no blocks.

        The tape of a single step is the step's own working set and is not counted.  With a
        device, windows are taped there.
        """
        if self.blocks:
            tapes = self.blocks * problem.block_nbytes(self.window)
        else:
            tapes = 0 if problem.device else (self.window - 1) * problem.tape_nbytes
        return self.slots * problem.state_nbytes + tapes

    def device_nbytes(self, problem: Problem) -> int:
        """Bytes of the device's budget: staging·max(state, block), and what reversing a window takes.

        That is s₁·state, or the tapes of the window: h of them where the job records, for they
        are laid out as a block; else h-1.
        """
        device = problem.device
        if device is None:
            return 0
        block = problem.block_nbytes(self.window) if self.blocks else 0
        staged = device.staging * max(problem.state_nbytes, block)
        if self.inner:
            return staged + self.inner * problem.state_nbytes
        tapes = self.window - 1 + (self.window > 1 and problem.residual_nbytes is not None)
        return staged + tapes * device.tape_nbytes


@dataclass(frozen=True, slots=True)
class Prediction:
    """What a run is expected to take."""

    time_seconds: float
    ideal_seconds: float
    """The same job with unlimited memory: N·(record + pull_back), or N·(forward + reverse) if it cannot record."""
    peak_memory_bytes: int
    """Most of the budget in use; working states and one step's tape come on top."""
    peak_disk_bytes: int
    advances: int
    """Plain steps, those of the forward sweep included; recorded steps are not plain."""
    writes: int
    """Items written: snapshots and residual blocks."""
    reads: int
    bytes_written: int
    bytes_read: int
    stall_seconds: float
    """Compute waiting for storage; part of `time_seconds`."""
    peak_device_bytes: int = 0
    """Most of the device's budget in use; 0 without one."""
    bytes_out: int = 0
    """Over the link, from the device."""
    bytes_in: int = 0
    """Over the link, to the device."""
    link_stall_seconds: float = 0.0
    """Compute waiting for the link; part of `time_seconds`, beside `stall_seconds`."""

    @property
    def overhead(self) -> float:
        """`time_seconds` / `ideal_seconds`."""
        return self.time_seconds / self.ideal_seconds if self.ideal_seconds > 0 else 1.0


@dataclass(frozen=True, slots=True)
class Pace:
    """A job counted in windows.  Seconds per window or per transfer of one state."""

    windows: int
    steps: float
    """Mean steps of a window."""
    advance: float
    adjoint: float
    """From the window's first state: re-taped, or recorded again into a block and pulled back."""
    write: float
    read: float
    inner: float = 0.0
    """Steps advanced again within a window's adjoint, on the device; part of `adjoint`."""
    out: float = 0.0
    """Over the link, from the device; 0 without one."""
    back: float = 0.0
    """Over the link, to the device."""

    @property
    def fetch(self) -> float:
        """From storage to where the steps run."""
        return self.read + self.back


@dataclass(frozen=True, slots=True)
class Spaced:
    """The cost of storing at a mean spacing, per window: what it adds in each sweep."""

    spacing: float
    """Windows (I)."""
    forward_stall: float
    """Seconds."""
    advances: float
    """Windows advanced again in the reverse sweep (a/I)."""
    reverse_stall: float
    """Seconds."""


def horizon(problem: Problem) -> int:
    """N, or the length an unknown one is predicted for."""
    return HORIZON if problem.steps is None else problem.steps


def can_record(problem: Problem, costs: Costs) -> bool:
    """Whether residuals can be laid out as bytes, and it is known what that takes."""
    return problem.residual_nbytes is not None and costs.record is not None and costs.pull_back is not None


def recorded_seconds(costs: Costs) -> float:
    """One step recorded and pulled back: `record` + `pull_back`, or `forward` + `reverse` if it cannot be."""
    if costs.record is None or costs.pull_back is None:
        return costs.forward + costs.reverse
    return costs.record + costs.pull_back


def pace(problem: Problem, costs: Costs, footprint: Footprint) -> Pace:
    """The job in windows: n = ⌈N/h⌉ of mean length N/n.

    t_F = h·t_f.  t_B = h·t_b where a window is re-taped; h·(record + pull_back) where
    there are blocks to record it into.  On a device t_B = h·(record + pull_back) for a job
    that records and windows of more than one step, whose tapes are all there; else
    t_B = h·t_b + t(h, s₁)·t_f, where the last term is for Revolve within the window.
    """
    windows = -(-horizon(problem) // footprint.window)
    steps = horizon(problem) / windows
    forward = max(costs.forward, _TINIEST_STEP)
    within = _within_windows(problem, footprint)
    records = footprint.blocks > 0
    if problem.device is not None:
        records = footprint.window > 1 and not footprint.inner and can_record(problem, costs)
    return Pace(
        windows=windows,
        steps=steps,
        advance=steps * forward,
        adjoint=steps * (recorded_seconds(costs) if records else costs.reverse) + within * forward,
        write=costs.write_seconds(problem.state_nbytes),
        read=costs.read_seconds(problem.state_nbytes),
        inner=within,
        out=costs.out_seconds(problem.state_nbytes) if problem.device else 0.0,
        back=costs.in_seconds(problem.state_nbytes) if problem.device else 0.0,
    )


def _within_windows(problem: Problem, footprint: Footprint) -> float:
    """t(h, s₁), the mean over all windows: the last one may be shorter."""
    if not footprint.inner:
        return 0.0
    full, rest = divmod(horizon(problem), footprint.window)
    again = full * advances(footprint.window, footprint.inner) + advances(rest, footprint.inner)
    return again / (full + (rest > 0))


# A device in front ------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Passage:
    """Snapshots that go over the link between a device and the host's memory."""

    out: float = 0.0
    """Copied out."""
    back: float = 0.0
    """Copied in: one for each window that is reversed."""
    stall: float = 0.0
    """Seconds for which compute waits for them."""


def passage(job: Pace, *, sparse: float = 0.0, gap: float = 1.0, dense: float = 0.0) -> Passage:
    """Snapshots that each hide behind what follows: one out behind the windows to the next, one in behind an adjoint.

    Stall = t_in + sparse·max(0, t_out - gap·t_F) + dense·max(0, t_out - t_F) + n·max(0, t_in - t_B),
    of which t_in alone, for the first snapshot that comes back, is left where windows have
    h ≥ max(t_out/t_f, t_in/t_b) steps.

    Args:
        job: The job in windows.
        sparse: Snapshots kept at a distance of `gap` windows.
        gap: That distance.
        dense: Snapshots kept within intervals, where the next one may follow after a window.
    """
    waited = sparse * max(0.0, job.out - gap * job.advance) + dense * max(0.0, job.out - job.advance)
    waited += job.windows * max(0.0, job.back - job.adjoint)
    return Passage(sparse + dense, job.windows, job.back + waited)


# Memory alone -----------------------------------------------------------------------------------


def predict_recorded(problem: Problem, costs: Costs, footprint: Footprint) -> Prediction:
    """Every window recorded, its block kept in memory: T = N·(record + pull_back)."""
    return tally(problem, costs, footprint, seconds=horizon(problem) * recorded_seconds(costs), advanced=0.0)


def predict_revolve(problem: Problem, costs: Costs, footprint: Footprint, *, final_state: bool = True) -> Prediction:
    """Revolve on n windows with s slots: T = t(n, s)·t_F + n·t_B; s ≥ n recomputes nothing.

    Args:
        problem: The job.
        costs: Its times.
        footprint: Window and slots.
        final_state: The forward sweep has to reach state N before the adjoint begins,
            which adds ρ(n+1, s) windows: the chain is one longer, less its last adjoint.
    """
    job = pace(problem, costs, footprint)
    advanced = advances(job.windows, footprint.slots) + _final_windows(job.windows, footprint.slots, final_state)
    kept = job.windows if footprint.slots >= job.windows else stores(job.windows, footprint.slots)
    moved = passage(job, dense=kept)
    seconds = advanced * job.advance + job.windows * job.adjoint + moved.stall
    steps = advanced * job.steps + job.windows * job.inner
    return tally(problem, costs, footprint, seconds=seconds, advanced=steps, moved=moved)


def _final_windows(windows: int, slots: int, final_state: bool) -> int:
    return repetitions(windows + 1, slots) if final_state else 0


# Snapshots on storage ---------------------------------------------------------------------------


def working_slots(problem: Problem, footprint: Footprint) -> int:
    """Slots that intervals can use: all but the one that state 0 may keep to itself."""
    return footprint.slots - (problem.pins_initial and footprint.slots >= LEAST_TO_PIN)


def interval_advances(length: int, slots: int, *, read: float, adjoint: float) -> int:
    """a(l): advances that reverse an interval while the restart point below it is read just in time.

    Revolve on `slots` slots, of which one is given up when the read has to begin: as
    late as the rest of the interval still hides it.

    Args:
        length: l, windows from one restart point to the next.
        slots: c ≥ 1, the slot of the interval's first state included.
        read: t_R/t_F, time of the read to hide.
        adjoint: t_B/t_F.
    """
    length, done = _before_the_read(length, slots, read, adjoint)
    while length > 1:
        if slots == 1 or advances(length, slots) == advances(length, slots - 1):
            return done + advances(length, slots)
        cut = split(length, slots)
        lower = advances(cut, slots - 1) + cut * adjoint
        if lower + adjoint < read:
            later = _latest_cut(length, slots, cut, read - adjoint, adjoint)
            if later is None:
                return done + advances(length, slots - 1)
            cut = later
            lower = advances(cut, slots - 1) + cut * adjoint
        done += cut + advances(length - cut, slots - 1)
        if lower < read:
            return done + advances(cut, slots - 1)
        length = cut
    return done


def _before_the_read(length: int, slots: int, read: float, adjoint: float) -> tuple[int, int]:
    """What is left of an interval when the read must begin, and the advances done by then.

    Up to there the splits are Revolve's, so the advances are t(l, c) less t(what is left, c).
    Splitting β(c, ρ-1) + d steps again and again at the highest optimal position leaves
    β(c, q-1) + min(d, β(c-1, q)) steps of repetition q, for q = ρ-1, ρ-2, …, 1.
    """
    if slots == 1:
        return length, 0
    repeats = repetitions(length, slots)
    beyond = length - capacity(slots, repeats - 1)
    left, low, high = length, 1, repeats
    while low < high:
        middle = (low + high) // 2
        rest = capacity(slots, middle - 1) + min(beyond, capacity(slots - 1, middle))
        if advances(rest, slots - 1) + rest * adjoint >= read:
            left, high = rest, middle
        else:
            low = middle + 1
    return left, advances(length, slots) - advances(left, slots)


def _latest_cut(length: int, slots: int, lowest: int, needed: float, adjoint: float) -> int | None:
    """Smallest split whose lower part takes `needed`; None where it costs more than a slot less throughout."""
    low, high = lowest, length
    while low < high:
        middle = (low + high) // 2
        if advances(middle, slots - 1) + middle * adjoint >= needed:
            high = middle
        else:
            low = middle + 1
    if low >= length:
        return None
    moved = low + advances(length - low, slots - 1) + advances(low, slots - 1)
    return low if moved <= advances(length, slots - 1) else None


def spaced(job: Pace, slots: int, *, fixed: int | None = None) -> Spaced:
    """Storing at a mean spacing of I windows.

    I = max(1, t_W/t_F), or `fixed`, in which case the forward sweep waits where storage
    does not keep up: t_W/I - t_F a window.  In reverse an interval of l windows costs
    a(l) advances, and stalls max(0, t_R - a(l)·t_F - l·t_B); with one slot nothing
    overlaps and it stalls t_R.  With a device t_R + t_in is in place of t_R.  A spacing
    between integers is a mixture of the two; with a slot to spare, which takes reads further
    ahead, what one interval has left over hides the next one's read.
    """
    ratio = job.write / job.advance
    spacing = float(min(max(1.0, ratio) if fixed is None else fixed, job.windows))
    below, above = floor(spacing + _ROUNDING), ceil(spacing - _ROUNDING)
    share_below = 1.0 if below == above else above - spacing
    advanced = stalled = spare = 0.0
    for length, share in ((below, share_below), (above, 1.0 - share_below)):
        if share <= 0.0:
            continue
        again = interval_advances(length, slots, read=job.fetch / job.advance, adjoint=job.adjoint / job.advance)
        hidden = again * job.advance + length * job.adjoint if slots > 1 else 0.0
        advanced += share * again
        stalled += share * max(0.0, job.fetch - hidden)
        spare += share * (hidden - job.read)
    if slots > above:
        stalled = max(0.0, -spare)
    forward = 0.0 if fixed is None else max(0.0, job.write / spacing - job.advance)
    return Spaced(spacing, forward, advanced / spacing, stalled / spacing)


def best_tail(job: Pace, slots: int, interior: Spaced) -> int:
    """M = min(n, β(s-1, ⌊1+p⌋)) windows: as long as Revolve repeats no step more often than the interior does.

    p is what the interior adds to one plain pass, in units of t_F: re-advances and stalls.
    """
    if slots < 2:
        return 1
    added = interior.advances + (interior.forward_stall + interior.reverse_stall) / job.advance
    repeats = floor(1.0 + added + _ROUNDING)
    if repetitions(job.windows, slots - 1) <= repeats:
        return job.windows
    return capacity(slots - 1, repeats)


def dense_tail(job: Pace, slots: int, interior: Spaced) -> int:
    """L = min(n, ⌊(s-4)·I/(I-1)⌋) last windows, every state of which is kept; 0 where that is not to be.

    With a device two slots more are left alone, for states on their way to where they are written from.
    Storage takes one in I of them, and memory holds the others.  Where states are I ≤ 1 apart
    all of them are stored anyway; steps that take next to no time leave none to look at storage.
    """
    if interior.spacing <= 1.0 + _ROUNDING or interior.forward_stall > 0.0 or job.advance < DENSE_FROM_SECONDS:
        return 0
    spare = DENSE_SPARE + (2 if job.out > 0.0 else 0)
    length = floor((slots - spare) * interior.spacing / (interior.spacing - 1.0) + _ROUNDING)
    return max(0, min(job.windows, length))


def _filling(job: Pace, slots: int, spacing: float, tail: int) -> tuple[float, int]:
    """Seconds that the forward sweep waits at a fixed spacing, and the slots that are then left to the tail.

    Store j waits for the end of write j-s, and while writes take longer than intervals they
    follow each other: it comes at max(j·I·t_F, (j-s+1)·t_W).  The tail waits for a
    further slot as long as that saves it more.
    """
    writes = _writes(job.windows - tail, spacing)
    if writes == 0:
        return 0.0, slots
    last = (writes - 1) * spacing * job.advance
    slower = job.write > spacing * job.advance
    waited = max(0.0, (writes - slots) * job.write - last) if slower else 0.0
    now = (job.windows - tail) * job.advance + waited
    left = int(last + job.write > now)
    if slower:
        left = max(0, min(slots, writes - floor(now / job.write + _ROUNDING)))
    free, began = slots - left, now
    while left and tail > 1:
        ends = (writes - left + 1) * job.write if slower else last + job.write
        if free and (advances(tail, free) - advances(tail, free + 1)) * job.advance <= ends - now:
            break
        now, free, left = max(now, ends), free + 1, left - 1
    return waited + now - began, max(1, free)


def _draining(job: Pace, slots: int, interior: Spaced, writes: int, now: float) -> float:
    """Windows advanced for want of the slots in which states still wait to be written, after the tail.

    They are written in order, while the intervals are reversed from the last.
    """
    length = round(interior.spacing)
    if job.write <= length * job.advance:
        return 0.0
    extra = 0.0
    for below in range(writes - 1, 0, -1):
        waiting = below - floor(now / job.write + _ROUNDING)
        if waiting <= 0 or slots - waiting >= length - 1:
            break
        again = advances(length, max(1, slots - waiting))
        extra += again - interior.advances * interior.spacing
        now += again * job.advance + length * job.adjoint
    return extra


def _writes(windows: int, spacing: float) -> int:
    """States stored on the way through so many windows."""
    return ceil(windows / spacing - _ROUNDING)


def predict_asynchronous(
    problem: Problem,
    costs: Costs,
    footprint: Footprint,
    *,
    fixed: int | None = None,
    tail: int | None = None,
    dense: int = 0,
    final_state: bool = True,
) -> Prediction:
    """Snapshots to storage as often as it takes them, Revolve in between.

    T = (n-M)·(1+p)·t_F + t(M, s-1)·t_F + n·t_B, with p as in `best_tail`, and with
    `final_state` ρ(M+1, s-1) windows more.  On storage lie at most ⌈(n-M)/I⌉ states.
    With a dense tail of L windows instead, T = (n-L)·(1+p)·t_F + (L-1)·t_F + n·t_B, one window more
    with `final_state`, and ⌈n/I⌉ states.

    Args:
        problem: The job.
        costs: Its times.
        footprint: Window and slots.
        fixed: Spacing in windows kept even where storage makes it wait; None: as storage allows.
        tail: M in windows, at least 1; None: the best where N is known, else 1.
        dense: L in windows; takes the place of M where it is not 0.
        final_state: The forward sweep has to reach state N before the adjoint begins.
    """
    job = pace(problem, costs, footprint)
    slots = working_slots(problem, footprint)
    interior = spaced(job, slots, fixed=fixed)
    if dense:
        return _predict_dense(problem, costs, footprint, interior, dense, final_state=final_state)
    if tail is None:
        tail = 1 if problem.steps is None else best_tail(job, slots, interior)
    greedy = job.windows - tail
    waited, memory_slots, drained = 0.0, max(1, slots - 1), 0.0
    if fixed is not None:
        waited, memory_slots = _filling(job, slots, interior.spacing, tail)
        turned = greedy * job.advance + waited + advances(tail, memory_slots) * job.advance + tail * job.adjoint
        drained = _draining(job, slots, interior, _writes(greedy, interior.spacing), turned)
    advanced = greedy * (1.0 + interior.advances) + advances(tail, memory_slots) + drained
    advanced += _final_windows(tail, memory_slots, final_state)
    stalled = waited + greedy * interior.reverse_stall
    writes = _writes(greedy, interior.spacing)
    moved = _moved_between(job, slots, interior, writes, tail)
    # The last interval starts from memory; where intervals leave slots over, some more do.
    spared = 1 if tail > 1 else 1 + floor((slots - 1) / max(1.0, interior.spacing))
    return tally(
        problem,
        costs,
        footprint,
        seconds=advanced * job.advance + job.windows * job.adjoint + stalled + moved.stall,
        advanced=advanced * job.steps + job.windows * job.inner,
        stalled=stalled,
        snapshots_written=writes,
        snapshots_read=max(0, writes - spared),
        moved=moved,
    )


def _moved_between(
    job: Pace, slots: int, interior: Spaced, writes: int, tail: int, *, keeps_all: bool = False
) -> Passage:
    """Over the link: what is stored on the way, and what Revolve keeps between and after, or all states of the end."""
    # On one slot less from when the read of the next interval begins.
    length = max(1, round(interior.spacing))
    within = 0.5 * (stores(length, slots) + stores(length, max(1, slots - 1))) - 1.0
    dense = writes * within + (tail if keeps_all else stores(tail, max(1, slots - 1)))
    return passage(job, sparse=writes, gap=interior.spacing, dense=dense)


def _predict_dense(
    problem: Problem, costs: Costs, footprint: Footprint, interior: Spaced, dense: int, *, final_state: bool
) -> Prediction:
    job = pace(problem, costs, footprint)
    greedy = job.windows - dense
    advanced = greedy * (1.0 + interior.advances) + dense - (not final_state)
    writes = _writes(job.windows, interior.spacing)
    read_again = floor(dense / interior.spacing)
    stalled = greedy * interior.reverse_stall + max(0.0, read_again * job.read - dense * job.adjoint)
    moved = _moved_between(
        job, working_slots(problem, footprint), interior, _writes(greedy, interior.spacing), dense, keeps_all=True
    )
    return tally(
        problem,
        costs,
        footprint,
        seconds=advanced * job.advance + job.windows * job.adjoint + stalled + moved.stall,
        advanced=advanced * job.steps + job.windows * job.inner,
        stalled=stalled,
        snapshots_written=writes,
        snapshots_read=max(0, writes - 1),
        moved=moved,
    )


def tally(
    problem: Problem,
    costs: Costs,
    footprint: Footprint,
    *,
    seconds: float,
    advanced: float,
    stalled: float = 0.0,
    snapshots_written: int = 0,
    snapshots_read: int = 0,
    blocks_written: int = 0,
    blocks_read: int = 0,
    moved: Passage | None = None,
    blocks_moved: int = 0,
) -> Prediction:
    """A prediction from seconds, steps advanced and items moved, to and from storage and over the link.

    Each transfer to or from storage adds what it costs compute.
    """
    state, block = problem.state_nbytes, problem.block_nbytes(footprint.window)
    seconds += (snapshots_written + snapshots_read) * (costs.handling_seconds(state) + costs.save)
    seconds += (blocks_written + blocks_read) * costs.handling_seconds(block)
    written = snapshots_written * state + blocks_written * block
    link = moved if moved is not None and problem.device is not None else Passage()
    return Prediction(
        time_seconds=seconds,
        ideal_seconds=horizon(problem) * recorded_seconds(costs),
        peak_memory_bytes=footprint.nbytes(problem),
        peak_disk_bytes=written,
        advances=round(advanced),
        writes=snapshots_written + blocks_written,
        reads=snapshots_read + blocks_read,
        bytes_written=written,
        bytes_read=snapshots_read * state + blocks_read * block,
        stall_seconds=stalled,
        peak_device_bytes=footprint.device_nbytes(problem),
        bytes_out=round(link.out * state) + blocks_moved * block,
        bytes_in=round(link.back * state) + blocks_moved * block,
        link_stall_seconds=link.stall,
    )
