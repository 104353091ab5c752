"""What recording windows onto storage will take: the part of them that storage carries, the rest recomputed.

This file owns the balance of a sweep's time against its transfers, and the
prediction made from it.  Windows, symbols and units are those of `predict`; φ is the
fraction of the windows recorded, k = `Recording.run` the plain windows between them.

Everything is linear in φ once k is given, so that the best φ is where one of the
balances is just met, or 1.  With a device in front, what goes over the link is linear between
`Recording.turning_points` too.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from math import ceil, floor

from longtape.plan.binomial import advances, stores
from longtape.plan.costs import BLOCKS_AHEAD, Costs, Problem
from longtape.plan.predict import Footprint, Pace, Passage, Prediction, pace, recorded_seconds, tally, working_slots

_SAFETY_WINDOWS = 32
_ROUNDING = 1e-9


def safety_windows(problem: Problem, window: int) -> int:
    """Windows between snapshots that insure recorded windows against lost blocks.

    Never closer than 32, nor so close that snapshots are more than 1/32 of the bytes.
    """
    block = max(1, problem.block_nbytes(window))
    return max(_SAFETY_WINDOWS, ceil(_SAFETY_WINDOWS * problem.state_nbytes / block))


@dataclass(frozen=True, slots=True)
class Loads:
    """What a sweep's storage traffic needs against what it has, if no window is recorded, and if every one is.

    Linear in between.  Seconds (or bytes) to spare; negative: missing.
    """

    none: float
    all: float

    def spare(self, fraction: float) -> float:
        """To spare with a fraction φ recorded: (1-φ)·none + φ·all."""
        return (1.0 - fraction) * self.none + fraction * self.all

    def largest_fraction(self) -> float:
        """The largest φ that leaves nothing missing; 0 where there is none."""
        if self.all >= 0.0:
            return 1.0
        return 0.0 if self.none <= 0.0 else self.none / (self.none - self.all)


@dataclass(frozen=True, slots=True)
class Recording:
    """Recording a fraction of the windows, the rest in runs that each start from a snapshot."""

    problem: Problem
    costs: Costs
    footprint: Footprint
    run: int = 1
    """Plain windows from one snapshot to the next."""
    stored: bool = True
    """Residuals go to storage; else to memory alone, which then holds all of them."""

    job: Pace = field(init=False, repr=False)
    """The job in windows."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "job", pace(self.problem, self.costs, self.footprint))

    @property
    def block_nbytes(self) -> int:
        """Bytes of the residuals of a full window."""
        return self.problem.block_nbytes(self.footprint.window)

    @property
    def depth(self) -> int:
        """Recorded windows that need not have been written, or be read: all blocks but the two in use.

        It only helps where the end is known; else 0.
        """
        return 0 if self.problem.steps is None else max(0, self.footprint.blocks - 2)

    @property
    def again(self) -> float:
        """Windows advanced again per plain window: t(k, s-1)/k in a run of k; one slot takes the prefetch."""
        return advances(self.run, max(1, working_slots(self.problem, self.footprint) - 1)) / self.run

    def snapshots(self) -> Loads:
        """Snapshots kept per window, recorded or not; what memory holds needs no insurance."""
        insuring = 1.0 / safety_windows(self.problem, self.footprint.window) if self.stored else 0.0
        return Loads(1.0 / self.run, insuring)

    def forward(self) -> Loads:
        """Time to spare for the writes: n·(t_F or h·record) - writes.

        Where every window is recorded the last ones may still wait to be written:
        depth·t_w(block) more.  Otherwise no queue may build up before the snapshots.
        """
        if not self.stored:
            return Loads(0.0, 0.0)
        job, block, snapshots = self.job, self.costs.write_seconds(self.block_nbytes), self.snapshots()
        none = job.windows * (job.advance - snapshots.none * job.write)
        record = job.steps * (self.costs.record or 0.0)
        every = job.windows * (record - block - snapshots.all * job.write)
        return Loads(none, 0.0 if -self.depth * block <= every <= 0.0 else every)

    def reverse(self) -> Loads:
        """Time to spare for the reads: n·(t_B + again·t_F, or h·pull_back) + depth·t_r(block) - reads."""
        if not self.stored:
            return Loads(0.0, 0.0)
        job, block = self.job, self.costs.read_seconds(self.block_nbytes)
        kept = self.depth * block
        pull_back = job.steps * (self.costs.pull_back or 0.0)
        return Loads(
            none=kept + job.windows * (job.adjoint + self.again * job.advance - job.read / self.run),
            all=kept + job.windows * (pull_back - block),
        )

    def disk(self) -> Loads:
        """Bytes to spare on storage; without a stated limit, plenty."""
        limit = self.problem.disk_nbytes
        if limit is None or not self.stored:
            return Loads(0.0, 0.0)
        windows, state, snapshots = self.job.windows, self.problem.state_nbytes, self.snapshots()
        return Loads(
            none=limit - windows * snapshots.none * state,
            all=limit - windows * (self.block_nbytes + snapshots.all * state),
        )

    # In memory alone --------------------------------------------------------------------------

    def memory(self) -> Loads:
        """Bytes of memory to spare if it holds all residuals, and the snapshots from which plain runs start.

        A run takes k slots more while it is reversed.
        """
        windows, state, limit = self.job.windows, self.problem.state_nbytes, self.problem.memory_nbytes
        return Loads(
            none=limit - (windows / self.run + self.run) * state,
            all=limit - windows * self.block_nbytes - state,
        )

    def holding(self, fraction: float) -> Recording | None:
        """The same with the slots and blocks that hold everything; None where they do not fit."""
        windows = self.job.windows
        slots = min(windows, ceil(self.snapshots_between(fraction) - _ROUNDING) + 1 + self.run)
        blocks = max(1, floor(fraction * windows + _ROUNDING))
        footprint = replace(self.footprint, slots=1 if fraction == 1.0 else slots, blocks=blocks)
        fits = footprint.nbytes(self.problem) <= self.problem.memory_nbytes
        return replace(self, footprint=footprint) if fits else None

    # The link of a device --------------------------------------------------------------------

    def gaps(self, fraction: float) -> list[tuple[int, float]]:
        """Plain windows that follow a recorded one, 1/φ - 1 in the mean, and how many windows each length follows."""
        if fraction <= 0.0:
            return []
        recorded = fraction * self.job.windows
        mean = 1.0 / fraction - 1.0
        below = floor(mean + _ROUNDING)
        return [(below, recorded * (below + 1.0 - mean)), (below + 1, recorded * max(0.0, mean - below))]

    def snapshots_between(self, fraction: float) -> float:
        """Snapshots that plain windows start from: ⌈g/k⌉ in a gap of g."""
        return sum(count * ceil(gap / self.run) for gap, count in self.gaps(fraction)) if fraction else self.job.windows

    def link_out(self) -> Loads:
        """Time to spare for the copies out of the device: n·(t_F or h·record) - copies."""
        job, block, snapshots = self.job, self.costs.out_seconds(self.block_nbytes), self.snapshots()
        record = job.steps * (self.costs.record or 0.0)
        return Loads(
            none=job.windows * (job.advance - snapshots.none * job.out),
            all=job.windows * (record - block - snapshots.all * job.out),
        )

    def link_forward(self, fraction: float) -> float:
        """Seconds for which the forward sweep waits for the link: what `link_out` lacks, or for want of buffers.

        A block must have left when as many items have followed it as there are other buffers.
        If these are snapshots, it hides behind k·t_F for each; if the next is a block again,
        behind the gap.
        """
        device, job, block = self.problem.device, self.job, self.costs.out_seconds(self.block_nbytes)
        if device is None:
            return 0.0
        others, waited = device.staging - 1, 0.0
        for gap, count in self.gaps(fraction):
            if ceil(gap / self.run) >= others:
                waited += count * max(0.0, block - min(others * self.run, gap) * job.advance)
            elif others == 1:
                waited += count * max(0.0, block - job.steps * (self.costs.record or 0.0))
        sparse = (1.0 - fraction) * job.windows / self.run * max(0.0, job.out - self.run * job.advance)
        return max(waited, sparse, -self.link_out().spare(fraction))

    def link_reverse(self, fraction: float) -> float:
        """Seconds for which the reverse sweep waits for the link.

        A snapshot that a run keeps on the way hides behind t_F.  Of m = φ/(1-φ) recorded
        windows in a row (one, where φ ≤ 1/2), the blocks come while the adjoint of the plain
        window above them is taken, two at most, and behind h·pull_back each: they lack
        m·t_in - min(t_B, 2·t_in) - (m-1)·h·pull_back.  The snapshot below them hides behind
        h·pull_back, that below a plain window behind t_B; what comes first, behind nothing.
        """
        device, job, block = self.problem.device, self.job, self.costs.in_seconds(self.block_nbytes)
        if device is None:
            return 0.0
        # With two buffers, one is in use, and the other is left for what is kept.
        pull_back = self._pull_back_hides()
        recorded, plain = fraction * job.windows, (1.0 - fraction) * job.windows
        rows = min(recorded, plain)
        row = recorded / rows if rows else 0.0
        lacks = row * block - min(job.adjoint, self._ahead() * block) - (row - 1.0) * pull_back
        waited = rows * max(0.0, lacks, block - job.adjoint) if rows else recorded * max(0.0, block - pull_back)
        return (
            waited
            + rows * max(0.0, job.back - pull_back)
            + (plain - rows) * max(0.0, job.back - job.adjoint)
            + (block if fraction > 0.5 else job.back)
            + self._kept_by_runs(fraction) * max(0.0, job.out - job.advance)
        )

    def _ahead(self) -> int:
        device = self.problem.device
        return min(BLOCKS_AHEAD, device.staging - 1) if device else 0

    def _pull_back_hides(self) -> float:
        device = self.problem.device
        return self.job.steps * (self.costs.pull_back or 0.0) if device and device.staging > 2 else 0.0

    def _kept_by_runs(self, fraction: float) -> float:
        """Snapshots that plain runs keep besides the one they start from."""
        kept = stores(self.run, max(1, working_slots(self.problem, self.footprint) - 1)) - 1.0
        return kept * (1.0 - fraction) * self.job.windows / self.run

    def turning_points(self) -> set[float]:
        """The fractions between which the time that the link takes is linear in φ."""
        device, job = self.problem.device, self.job
        if device is None:
            return set()
        out, back = self.costs.out_seconds(self.block_nbytes), self.costs.in_seconds(self.block_nbytes)
        others = (device.staging - 1) * self.run
        gaps = {1, others, others + 1, ceil(min(out / job.advance, 1e9) - _ROUNDING)}
        points = {0.5, self.link_out().largest_fraction(), *(1.0 / (1.0 + gap) for gap in gaps if gap >= 0)}
        pull_back = self._pull_back_hides()
        if back > pull_back:
            row = (min(job.adjoint, self._ahead() * back) - pull_back) / (back - pull_back)
            points.add(row / (1.0 + row) if row > 1.0 else 0.5)
        return points

    def passage(self, fraction: float) -> Passage:
        """Snapshots over the link: those stored, those that runs keep besides, and one in for each plain window."""
        plain = (1.0 - fraction) * self.job.windows
        out = self.job.windows * self.snapshots().spare(fraction) + self._kept_by_runs(fraction)
        return Passage(out, plain, self.link_forward(fraction) + self.link_reverse(fraction))


def predict_residuals(recording: Recording, fraction: float) -> Prediction:
    """A fraction φ of the windows recorded, their residuals on storage; the rest recomputed.

    A recorded window costs h·record + h·pull_back; a plain one t_F + t_B, and its share
    of t(k, s-1) re-advances in a run of k.  The forward sweep never waits (what storage
    cannot carry is not recorded: keep φ ≤ `Recording.forward`'s largest); the reverse
    sweep stalls for the reads that its own time, and the blocks still in memory, do not
    cover.  With a device both sweeps may wait for the link.
    """
    job, costs = recording.job, recording.costs
    recorded, plain = fraction * job.windows, (1.0 - fraction) * job.windows
    moved = recording.passage(fraction)
    stalled = max(0.0, -recording.reverse().spare(fraction) - recording.link_reverse(fraction))
    advanced = plain * (1.0 + recording.again)
    seconds = recorded * job.steps * recorded_seconds(costs) + advanced * job.advance + plain * job.adjoint + stalled
    runs = plain / recording.run if recording.stored else 0.0
    windows, blocks = (job.windows, ceil(recorded - _ROUNDING)) if recording.stored else (0, 0)
    return tally(
        recording.problem,
        costs,
        recording.footprint,
        seconds=seconds + moved.stall,
        advanced=advanced * job.steps + plain * job.inner,
        stalled=stalled,
        snapshots_written=ceil(windows * recording.snapshots().spare(fraction) - _ROUNDING),
        snapshots_read=ceil(runs - _ROUNDING),
        blocks_written=blocks,
        blocks_read=max(0, blocks - recording.depth),
        moved=moved,
        blocks_moved=ceil(recorded - _ROUNDING),
    )
