"""What a run was predicted to take and what it took, in one frozen object."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

from longtape.sizes import format_bytes, format_seconds


@dataclass(frozen=True, slots=True)
class Quantities:
    """The figures a prediction and a measurement have in common.  Seconds, bytes, counts."""

    seconds: float
    peak_memory_bytes: int
    """Most bytes held for snapshots, residuals and staging together, at any moment."""
    peak_disk_bytes: int
    bytes_written: int
    bytes_read: int
    steps_recomputed: int
    """Plain steps run again after the first sweep; the taped run of a step for its adjoint is not one."""
    stall_seconds: float
    """Seconds compute waited for transfers."""


@dataclass(frozen=True, slots=True)
class Report:
    """Predicted against measured, and whether storing really went on behind compute."""

    title: str
    steps: int
    schedule: str
    """``store_all``, ``revolve``, ``asynchronous`` or ``residuals``."""
    window: int
    """Steps whose adjoint is taken in one go."""
    slots: int
    """Snapshots that fit in memory."""
    memory_budget_bytes: int
    predicted: Quantities
    measured: Quantities
    prepare_seconds: float
    """Timing steps and storage, choosing the plan and allocating, before the sweeps; not part of `measured`."""
    forward_seconds: float
    reverse_seconds: float
    forward_stall_seconds: float
    """The part of the waiting that fell in the forward sweep."""
    steps_taped_again: int
    """Steps run a second time, while taping, for their adjoint."""
    steps_recorded: int
    """Steps whose residuals were kept in the forward sweep, so that nothing of them was run again."""
    writes: int
    reads: int
    write_seconds: float
    """Seconds storage was busy writing."""
    read_seconds: float
    overlap_fraction: float | None
    """Share of the transfer time during which compute went on; None when nothing was transferred."""
    direct_io: bool | None
    """Whether transfers bypassed the page cache; None without storage."""
    faults: tuple[str, ...]
    """Transfers that failed and what became of them; each cost time only."""
    notes: tuple[str, ...]
    """Things worth knowing, such as why a step could not be captured."""
    failed_transfers: int = 0
    """How many transfers failed, repeated ones included; `faults` tells of the first of them."""
    repeated_reads: int = 0
    """Reads that failed and were tried once more.  An item whose read fails twice is recomputed."""
    codec: str | None = None
    """What items were compressed with on their way to storage; None: not."""
    compression_ratio: float | None = None
    """Bytes of the items written over bytes that were stored of them."""
    lossy_bound: float | None = None
    """Largest relative error of each floating-point number that came back from storage; None: every byte came back."""

    def to_json(self) -> str:
        """One line of JSON."""
        return json.dumps(asdict(self))

    def __str__(self) -> str:
        rows = [
            ("time", *self._both("seconds", format_seconds)),
            ("peak memory", *self._both("peak_memory_bytes", format_bytes)),
            ("peak disk", *self._both("peak_disk_bytes", format_bytes)),
            ("bytes written", *self._both("bytes_written", format_bytes)),
            ("bytes read", *self._both("bytes_read", format_bytes)),
            ("steps recomputed", *self._both("steps_recomputed", lambda n: f"{n:,}")),
            ("compute waited", *self._both("stall_seconds", format_seconds)),
        ]
        lines = [f"{self.title}: {self.steps:,} steps, schedule {self.schedule}", ""]
        lines.append(f"{'':<18}{'predicted':>14}{'measured':>14}")
        lines += [f"{name:<18}{predicted:>14}{measured:>14}" for name, predicted, measured in rows]
        lines += ["", *self._remarks()]
        return "\n".join(lines)

    def _both(self, name: str, text) -> tuple[str, str]:  # type: ignore[no-untyped-def]
        return text(getattr(self.predicted, name)), text(getattr(self.measured, name))

    def _remarks(self) -> list[str]:
        sweeps = f"forward {format_seconds(self.forward_seconds)}, reverse {format_seconds(self.reverse_seconds)}"
        lines = [f"{sweeps}; preparing took {format_seconds(self.prepare_seconds)} more"]
        if self.overlap_fraction is not None:
            busy = format_seconds(self.write_seconds + self.read_seconds)
            io = "direct I/O" if self.direct_io else "buffered I/O"
            lines.append(
                f"storage was busy for {busy} ({self.writes:,} writes, {self.reads:,} reads, {io}); "
                f"{self.overlap_fraction:.1%} of it while compute went on"
            )
        if self.codec is not None:
            times = "nothing was written" if self.compression_ratio is None else f"{self.compression_ratio:.2f} to 1"
            lines.append(f"compressed with {self.codec}: {times}")
        if self.lossy_bound is not None:
            lines.append(
                f"LOSSY: floating-point numbers came back from storage with relative errors of up to "
                f"{self.lossy_bound:g}; the gradient is not exact, and not the same bit for bit from run to run"
            )
        lines += [f"fault: {fault}" for fault in self.faults[:10]]
        if len(self.faults) > 10:
            lines.append(f"... and {len(self.faults) - 10} more faults")
        return lines + [f"note: {note}" for note in self.notes]
