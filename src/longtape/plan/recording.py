"""What recording windows onto storage will take: the part of them that storage carries, the rest recomputed.

This file owns the balance of a sweep's time against its transfers, and the
prediction made from it.  Windows, symbols and units are those of `predict`; φ is the
fraction of the windows recorded, k = `Recording.run` the plain windows between them.

Everything is linear in φ once k is given, so that the best φ is where one of the
balances is just met, or 1.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

from longtape.plan.binomial import advances
from longtape.plan.costs import Costs, Problem
from longtape.plan.predict import Footprint, Pace, Prediction, pace, recorded_seconds, tally, working_slots

_SAFETY_WINDOWS = 32
_ROUNDING = 1e-9


def safety_windows(problem: Problem, window: int) -> int:
    """Windows between snapshots that insure recorded windows against lost blocks.

    Never closer than 32, nor so close that snapshots are more than 1/32 of the bytes.
    """
    block = max(1, window * (problem.residual_nbytes or 0))
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

    @property
    def job(self) -> Pace:
        """The job in windows."""
        return pace(self.problem, self.costs, self.footprint)

    @property
    def block_nbytes(self) -> int:
        """Bytes of the residuals of a full window."""
        return self.footprint.window * (self.problem.residual_nbytes or 0)

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
        """Snapshots written per window, recorded or not."""
        return Loads(1.0 / self.run, 1.0 / safety_windows(self.problem, self.footprint.window))

    def forward(self) -> Loads:
        """Time to spare for the writes: n·(t_F or h·record) - writes.

        Where every window is recorded the last ones may still wait to be written:
        depth·t_w(block) more.  Otherwise no queue may build up before the snapshots.
        """
        job, block, snapshots = self.job, self.costs.write_seconds(self.block_nbytes), self.snapshots()
        none = job.windows * (job.advance - snapshots.none * job.write)
        record = job.steps * (self.costs.record or 0.0)
        every = job.windows * (record - block - snapshots.all * job.write)
        return Loads(none, 0.0 if -self.depth * block <= every <= 0.0 else every)

    def reverse(self) -> Loads:
        """Time to spare for the reads: n·(t_B + again·t_F, or h·pull_back) + depth·t_r(block) - reads."""
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
        if limit is None:
            return Loads(0.0, 0.0)
        windows, state, snapshots = self.job.windows, self.problem.state_nbytes, self.snapshots()
        return Loads(
            none=limit - windows * snapshots.none * state,
            all=limit - windows * (self.block_nbytes + snapshots.all * state),
        )


def predict_residuals(recording: Recording, fraction: float) -> Prediction:
    """A fraction φ of the windows recorded, their residuals on storage; the rest recomputed.

    A recorded window costs h·record + h·pull_back; a plain one t_F + t_B, and its share
    of t(k, s-1) re-advances in a run of k.  The forward sweep never waits (what storage
    cannot carry is not recorded: keep φ ≤ `Recording.forward`'s largest); the reverse
    sweep stalls for the reads that its own time, and the blocks still in memory, do not
    cover.
    """
    job, costs = recording.job, recording.costs
    recorded, plain = fraction * job.windows, (1.0 - fraction) * job.windows
    stalled = max(0.0, -recording.reverse().spare(fraction))
    advanced = plain * (1.0 + recording.again)
    seconds = recorded * job.steps * recorded_seconds(costs) + advanced * job.advance + plain * job.adjoint + stalled
    runs = plain / recording.run
    return tally(
        recording.problem,
        costs,
        recording.footprint,
        seconds=seconds,
        advanced=advanced * job.steps,
        stalled=stalled,
        snapshots_written=ceil(job.windows * recording.snapshots().spare(fraction) - _ROUNDING),
        snapshots_read=ceil(runs - _ROUNDING),
        blocks_written=ceil(recorded - _ROUNDING),
        blocks_read=max(0, ceil(recorded - _ROUNDING) - recording.depth),
    )
