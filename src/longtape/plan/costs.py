"""What a plan is made from: the times of one job on one machine, and what is asked of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import inf


@dataclass(frozen=True, slots=True)
class Costs:
    """Measured or stated times.  Seconds, bytes, bytes per second.

    Symbols of the theory: t_f is `forward`, t_b is `reverse` (which includes
    running the step again while taping), t_w and t_r come from `write_seconds` and
    `read_seconds`.
    """

    forward: float
    """One plain step."""

    reverse: float
    """The adjoint of one step, the taped re-run included (t_b)."""

    record: float | None = None
    """One step run while its residuals are kept; None: the job cannot record."""

    pull_back: float | None = None
    """The adjoint of one step from its residuals; None: the job cannot record."""

    write_bytes_per_second: float = inf
    read_bytes_per_second: float = inf
    touch_bytes_per_second: float = inf
    """How fast the system provides memory that is used for the first time."""
    write_latency: float = 0.0
    read_latency: float = 0.0
    handling: float = 0.0
    """What each transfer costs compute, whatever its size: handing it over, and the moments in which a worker holds
    the interpreter's lock."""
    handling_per_byte: float = 0.0
    """And for each of its bytes: memory bandwidth that it takes from the steps."""
    save: float = 0.0
    """To copy a state to a slot or back; 0 where slots change hands."""

    def handling_seconds(self, nbytes: int) -> float:
        """Compute lost to one transfer of `nbytes`."""
        return self.handling + nbytes * self.handling_per_byte

    out_bytes_per_second: float = inf
    """Over the link from a device to the memory that items are kept in."""
    in_bytes_per_second: float = inf
    """Over the link from that memory back to the device."""
    link_latency: float = 0.0
    """What a copy over the link takes however small, either way."""

    def write_seconds(self, nbytes: int) -> float:
        """Time to store one item of `nbytes`."""
        return self.write_latency + nbytes / self.write_bytes_per_second

    def read_seconds(self, nbytes: int) -> float:
        """Time to fetch one item of `nbytes`."""
        return self.read_latency + nbytes / self.read_bytes_per_second

    def out_seconds(self, nbytes: int) -> float:
        """Time to copy one item of `nbytes` out of the device."""
        return self.link_latency + nbytes / self.out_bytes_per_second

    def in_seconds(self, nbytes: int) -> float:
        """Time to copy one item of `nbytes` into the device."""
        return self.link_latency + nbytes / self.in_bytes_per_second


@dataclass(frozen=True, slots=True)
class Device:
    """The memory of an accelerator in front of the memory that items are kept in.

    A window is then reversed on the device from one snapshot: either all its steps are
    taped there, or it is reversed by Revolve on snapshots of its own.
    """

    memory_nbytes: int
    """Budget on the device: staging, and the tapes or the inner snapshots of one window."""

    tape_nbytes: int = 0
    """What each further taped step of a window holds there; `residual_nbytes` where the job records."""

    staging: int = 4
    """Items of the largest kind on their way over the link, out or in: buffers that all kinds share."""


@dataclass(frozen=True, slots=True)
class Problem:
    """What is asked: how long, how large, within what."""

    steps: int | None
    """None: not known in advance."""

    state_nbytes: int
    memory_nbytes: int
    """Most bytes held for snapshots, residuals and staging together."""

    has_disk: bool = False
    disk_nbytes: int | None = None
    """Most bytes on storage: a stated limit, or what is free there less a reserve; None: there is no limit."""

    residual_nbytes: int | None = None
    """Residuals of one step; None: they cannot be laid out as bytes (no `record`)."""

    residual_head_nbytes: int = 0
    """Bytes that a block of residuals takes beyond those of its steps."""

    tape_nbytes: int = 0
    """For jobs that cannot record but can reverse several steps in one go: memory one further taped step takes."""

    max_window: int = 1
    """Most steps one reverse call may take."""

    pins_initial: bool = False
    """With storage, state 0 keeps a slot to itself throughout, if there are `LEAST_TO_PIN` of them."""

    initial_is_free: bool = False
    """The job can restore state 0 by itself, without a slot."""

    device: Device | None = None
    """Where the steps run, if that is not where items are kept; `memory_nbytes` is then the host's, pinned."""

    def block_nbytes(self, window: int) -> int:
        """Bytes of the residuals of so many steps."""
        return self.residual_head_nbytes + window * (self.residual_nbytes or 0)


BLOCKS_AHEAD = 2
"""Residual blocks that are copied to a device ahead of the adjoint, if there are no snapshots between them."""

LEAST_TO_PIN = 3
"""Slots from which state 0 keeps its own throughout, so that no fault of storage can cost it.

With fewer, storing would hardly be possible beside it.
"""


@dataclass(slots=True)
class RunningMean:
    """Exponentially weighted mean that follows changes but starts as a plain mean."""

    value: float = 0.0
    deviation: float = 0.0
    """Running mean of how far samples were from the mean before them."""
    count: int = 0
    memory: int = field(default=16)

    def add(self, sample: float) -> None:
        """Take one more sample."""
        off = sample - self.value
        if self.count:
            self.deviation += (abs(off) - self.deviation) / min(self.count, self.memory)
        self.count += 1
        self.value += off / min(self.count, self.memory)
