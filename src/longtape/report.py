"""What a run was predicted to take and what it took, in one frozen object."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from math import inf
from typing import TYPE_CHECKING, Any

from longtape.sizes import format_bytes, format_seconds

if TYPE_CHECKING:
    from longtape.engine.trace import Trace
    from longtape.plan.costs import Costs


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
class Transfers:
    """What was moved of one kind of item in one direction."""

    kind: str
    """``snapshot`` or ``residuals``."""
    direction: str
    """``write`` or ``read``."""
    count: int
    nbytes: int
    seconds: float
    """Storage was busy with them for so long, failed ones included."""
    failures: int


@dataclass(frozen=True, slots=True)
class Stall:
    """Compute waiting for one cause, all waits together."""

    sweep: str
    """``forward`` or ``reverse``."""
    kind: str
    """``snapshot`` or ``residuals``."""
    lacking: str
    """``item``: it had not been read yet; ``slot``: memory for one was still being written from, or read into."""
    count: int
    seconds: float
    longest_seconds: float
    longest_at: float
    """When the longest wait began, in seconds from the start of the run."""

    def __str__(self) -> str:
        what = f"a {self.kind}" if self.kind == "snapshot" else self.kind
        lacking = f"{what} not read yet" if self.lacking == "item" else f"a free slot for {what}"
        text = f"{format_seconds(self.seconds)} in the {self.sweep} sweep for {lacking}"
        return f"{text} ({self.count:,} waits, the longest {format_seconds(self.longest_seconds)})"


@dataclass(frozen=True, slots=True)
class Replan:
    """The forward sweep began to store at another spacing, because measured times had changed."""

    at_seconds: float
    step: int
    spacing_before: float
    """Steps."""
    spacing_after: float


@dataclass(frozen=True, slots=True)
class Link:
    """What was copied over the link between a device and the host, in one direction."""

    direction: str
    """``out`` of the device or ``in``."""
    count: int
    nbytes: int
    seconds: float
    """The link was busy with them for so long, by the device's events."""
    overlap_fraction: float | None = None
    """Share of that time during which compute went on; None when nothing was copied."""

    @property
    def bytes_per_second(self) -> float:
        """While copying; 0 when nothing was."""
        return self.nbytes / self.seconds if self.seconds > 0 else 0.0

    def __str__(self) -> str:
        way = "out of the device" if self.direction == "out" else "into the device"
        text = f"{self.count:,} copies {way}: {format_bytes(self.nbytes)} in {format_seconds(self.seconds)}"
        if self.seconds > 0:
            text += f" at {format_bytes(self.bytes_per_second)}/s"
        if self.overlap_fraction is not None:
            text += f", {self.overlap_fraction:.1%} of it while compute went on"
        return text


@dataclass(frozen=True, slots=True)
class DeviceReport:
    """What a run took of the device that its steps ran on."""

    name: str
    budget_bytes: int = 0
    """What was allowed there."""
    pool_bytes: int = 0
    """Reserved for snapshots, residuals and buffers; never more than was allowed, but for alignment."""
    peak_bytes: int = 0
    """Most memory in use beyond what was before the run, the step's own included, as the framework counts."""
    predicted_peak_bytes: int = 0
    """Of what is allowed."""
    pinned_bytes: int = 0
    """Memory of the host that was pinned."""
    idle_seconds: float = 0.0
    """Compute stood still on the device for so long because a copy had not been done."""
    links: tuple[Link, ...] = ()

    def lines(self, seconds: float) -> list[str]:
        """For people, beside a run that took so many seconds."""
        pools = f"{format_bytes(self.pool_bytes)} reserved"
        if self.budget_bytes:
            pools += f" of {format_bytes(self.budget_bytes)}"
        found = [f"on {self.name}: {pools}, at most {format_bytes(self.peak_bytes)} in use, the step's own included"]
        found += [f"  {link}" for link in self.links if link.count]
        if self.links:
            share = f" ({self.idle_seconds / seconds:.2%})" if seconds > 0 else ""
            found.append(f"compute stood still for copies for {format_seconds(self.idle_seconds)}{share}")
        if self.pinned_bytes:
            found.append(f"{format_bytes(self.pinned_bytes)} of the host's memory were pinned")
        return found


@dataclass(frozen=True, slots=True)
class Report:
    """Predicted against measured, and whether storing really went on behind compute."""

    title: str
    steps: int
    schedule: str
    """``store_all``, ``revolve``, ``asynchronous`` or ``residuals``; for a given schedule, the name of its class."""
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
    costs: Costs | None = None
    """The times that the plan was made with."""
    failed_transfers: int = 0
    """How many transfers failed, repeated ones included; `faults` tells of the first of them."""
    repeated_reads: int = 0
    """Reads that failed and were tried once more.  An item whose read fails twice is recomputed."""
    resumed_from: str | None = None
    """Where an earlier process was stopped and this one went on, in words; None: the run began here."""
    durable_points: int | None = None
    """Moments from which this run could have been resumed; None for a run that cannot."""
    durable_seconds: float = 0.0
    """For which compute stood still so that the run could be resumed; part of `measured`."""
    simulated: Quantities | None = None
    """The same plan in the event model, where every step and transfer takes the mean time it took in this run.

    What `measured` lacks of it was lost to noise; what `predicted` lacks, to costs that were
    estimated wrongly.  None where replaying would take long beside the run.
    """
    revolve_steps_recomputed: int = 0
    """What the optimum within the same memory, and without storage, would have run again (Revolve)."""
    transfers: tuple[Transfers, ...] = ()
    stalls: tuple[Stall, ...] = ()
    """The longest first; `measured.stall_seconds` is their sum."""
    replans: tuple[Replan, ...] = ()
    """Changes of the spacing by half or more, the first of them."""
    replan_count: int = 0
    states_verified: int | None = None
    """States found the same when they were computed again or fetched; None without ``verify=True``."""
    codec: str | None = None
    """What items were compressed with on their way to storage; None: not."""
    compression_ratio: float | None = None
    """Bytes of the items written over bytes that were stored of them."""
    lossy_bound: float | None = None
    """Largest relative error of each floating-point number that came back from storage; None: every byte came back."""
    disk_limit_bytes: int | None = None
    """Most bytes that storage might take: a stated limit, or what was free there less a reserve; None: not known."""
    device: DeviceReport | None = None
    """Where steps ran on a device.  Memory is then the host's, pinned, if anything was copied there."""
    trace: Trace | None = field(default=None, repr=False, compare=False)
    """What happened when; neither printed nor written as JSON."""

    def to_dict(self) -> dict[str, Any]:
        """All but the trace, as JSON can hold it."""
        found = asdict(replace(self, trace=None))
        del found["trace"]
        if self.costs is not None:  # what takes no time has an infinite speed, for which JSON has no word
            found["costs"] = {name: value for name, value in found["costs"].items() if value != inf}
        return found

    def to_json(self) -> str:
        """One line of JSON."""
        return json.dumps(self.to_dict())

    def append_to(self, path: str | os.PathLike[str]) -> None:
        """Add the report to a file of JSON lines, one line a run; the file is made if it is not there."""
        with open(path, "a", encoding="utf-8") as file:
            file.write(self.to_json() + "\n")

    def __str__(self) -> str:
        rows = [
            ("time", *self._all("seconds", format_seconds)),
            ("peak memory", *self._all("peak_memory_bytes", format_bytes)),
            ("peak disk", *self._all("peak_disk_bytes", format_bytes)),
            ("bytes written", *self._all("bytes_written", format_bytes)),
            ("bytes read", *self._all("bytes_read", format_bytes)),
            ("steps recomputed", *self._all("steps_recomputed", lambda n: f"{n:,}")),
            ("compute waited", *self._all("stall_seconds", format_seconds)),
        ]
        lines = [f"{self.title}: {self.steps:,} steps, schedule {self.schedule}", ""]
        headings = ("predicted", "measured", *(("simulated",) if self.simulated is not None else ()))
        lines.append(f"{'':<18}" + "".join(f"{heading:>14}" for heading in headings))
        lines += [f"{name:<18}" + "".join(f"{text:>14}" for text in texts) for name, *texts in rows]
        lines += ["", *self._remarks()]
        return "\n".join(lines)

    def _all(self, name: str, text: Callable[[Any], str]) -> list[str]:
        columns = (self.predicted, self.measured, self.simulated)
        return [text(getattr(quantities, name)) for quantities in columns if quantities is not None]

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
        if self.durable_points is not None:
            begun = f"resumed from {self.resumed_from}; " if self.resumed_from else ""
            held = format_seconds(self.durable_seconds)
            lines.append(f"{begun}made durable {self.durable_points:,} times, for which compute stood still for {held}")
        lines += [f"  {what}" for what in map(_transfers_line, self.transfers) if what]
        if self.writes and self.disk_limit_bytes is not None:
            held, written = format_bytes(self.measured.peak_disk_bytes), format_bytes(self.measured.bytes_written)
            limit = format_bytes(self.disk_limit_bytes)
            lines.append(f"on disk: {held} at most, of {limit} there was room for; {written} were written in all")
        if self.device is not None:
            lines += self.device.lines(self.measured.seconds)
        if self.measured.steps_recomputed or self.revolve_steps_recomputed:
            lines.append(
                f"{self.measured.steps_recomputed:,} steps were run again; without storage the least is "
                f"{self.revolve_steps_recomputed:,} (Revolve in the same memory)"
            )
        lines += [f"waited {stall}" for stall in self.stalls if stall.seconds > 1e-3 * self.measured.seconds]
        lines += [
            f"replanned at step {plan.step:,}: a snapshot every {plan.spacing_before:.3g} steps became every "
            f"{plan.spacing_after:.3g}"
            for plan in self.replans[:5]
        ]
        if self.replan_count > 5:
            lines.append(f"... and {self.replan_count - 5} more changes of the spacing")
        if self.states_verified is not None:
            lines.append(f"verified: {self.states_verified:,} states came out the same again")
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


def _transfers_line(moved: Transfers) -> str | None:
    """What was moved, and how fast; None where nothing was."""
    if not moved.count:
        return None
    verb = "written" if moved.direction == "write" else "read"
    what = "snapshots" if moved.kind == "snapshot" else "blocks of residuals"
    pace = f" at {format_bytes(moved.nbytes / moved.seconds)}/s" if moved.seconds > 0 else ""
    return f"{moved.count:,} {what} {verb}: {format_bytes(moved.nbytes)} in {format_seconds(moved.seconds)}{pace}"
