"""What a run took, beside what was foreseen of it: its report, and the plan replayed with the times it saw.

Owns how the figures of a run that has ended come together.  Reads the run's trace, mover and
accelerator; changes nothing.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

from longtape.accelerator import Accelerator
from longtape.actions import Action, Key, Kind
from longtape.durable.keeper import Keeper
from longtape.engine.mover import Mover, Traffic
from longtape.engine.trace import Trace
from longtape.plan.asynchronous import Layout
from longtape.plan.binomial import advances
from longtape.plan.choose import Choice
from longtape.plan.costs import Costs, Device
from longtape.plan.simulate import Speeds, simulate
from longtape.report import DeviceReport, Quantities, Replan, Report, Stall, Transfers
from longtape.tiers.compressed import CompressedTier

REPLAY_SECONDS = 8e-6
"""About what an action takes in the event model."""

REPLAY_SHARE, LEAST_REPLAY_SECONDS = 0.002, 0.02
"""A report replays its run in the event model for this share of the run's time, or these seconds, and no longer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Retrospect:
    """A run that has ended, as far as its report must know it.  Seconds, bytes."""

    title: str
    schedule: str
    choice: Choice
    costs: Costs
    layout: Layout | None
    """What its plan was made with; None for one that was given, which the event model does not know."""
    known: bool
    """Whether the length was known when the run began."""
    predicted: Quantities
    trace: Trace
    mover: Mover
    memory_nbytes: int
    tape_nbytes: int
    """Bytes that a window's tape took of the memory."""
    prepare_seconds: float
    forward_seconds: float
    reverse_seconds: float
    forward_stall_seconds: float
    notes: tuple[str, ...]
    early_faults: tuple[str, ...]
    states_verified: int | None
    keeper: Keeper | None
    """What made the run durable."""
    packed: CompressedTier | None
    """The codec that items went through."""
    accelerator: Accelerator | None
    device: Device | None
    """The device whose memory is in front of the run's."""

    @property
    def is_linked(self) -> bool:
        """Whether items were kept behind a device, and not on it."""
        return self.device is not None and not self.choice.on_device

    @property
    def steps(self) -> int:
        """N, as it turned out."""
        return self.mover.stock.steps or 0

    def report(self) -> Report:
        """Predicted against measured."""
        trace, mover, choice, keeper, packed = self.trace, self.mover, self.choice, self.keeper, self.packed
        written, fetched = _total(mover.written.values()), _total(mover.fetched.values())
        measured = self._measured(written, fetched)
        return Report(
            title=self.title,
            steps=self.steps,
            schedule=self.schedule,
            window=choice.window,
            slots=choice.slots,
            memory_budget_bytes=self.memory_nbytes,
            predicted=self.predicted,
            measured=measured,
            prepare_seconds=self.prepare_seconds,
            forward_seconds=self.forward_seconds,
            reverse_seconds=self.reverse_seconds,
            forward_stall_seconds=self.forward_stall_seconds,
            steps_taped_again=trace.steps_retaped,
            steps_recorded=trace.steps_recorded,
            writes=written.count,
            reads=fetched.count,
            write_seconds=written.seconds,
            read_seconds=fetched.seconds,
            overlap_fraction=trace.overlap_fraction(),
            direct_io=getattr(mover.tier, "direct", None),
            faults=(*self.early_faults, *mover.faults, *(() if keeper is None else keeper.faults)),
            costs=self.costs,
            failed_transfers=written.failures + fetched.failures,
            repeated_reads=mover.repeated_reads,
            notes=(*self.notes, *(() if keeper is None else keeper.notes)),
            resumed_from=None if keeper is None else keeper.resumed_from,
            durable_points=None if keeper is None else keeper.durable_points,
            durable_seconds=0.0 if keeper is None else keeper.seconds,
            codec=None if packed is None else packed.codec.name,
            compression_ratio=None if packed is None else packed.ratio,
            lossy_bound=None if packed is None else packed.codec.bound,
            simulated=self._simulated(measured),
            revolve_steps_recomputed=max(0, advances(self.steps + 1, self._slots_for_revolve()) - self.steps),
            transfers=tuple(
                Transfers(kind.value, direction, moved.count, moved.nbytes, moved.seconds, moved.failures)
                for direction, by_kind in (("write", mover.written), ("read", mover.fetched))
                for kind, moved in by_kind.items()
                if moved.count or moved.failures
            ),
            stalls=tuple(
                Stall(*cause, wait.count, wait.seconds, wait.longest, wait.longest_at)
                for cause, wait in sorted(trace.waits.items(), key=lambda found: -found[1].seconds)
            ),
            replans=tuple(Replan(*change) for change in trace.replans),
            replan_count=trace.replan_count,
            states_verified=self.states_verified,
            disk_limit_bytes=choice.disk_nbytes,
            device=self._device_report(),
        )

    def _measured(self, written: Traffic, fetched: Traffic) -> Quantities:
        mover, packed = self.mover, self.packed
        return Quantities(
            seconds=self.forward_seconds + self.reverse_seconds,
            peak_memory_bytes=mover.budget.peak,
            peak_disk_bytes=mover.storage.peak if packed is None else packed.peak_stored_nbytes,
            bytes_written=written.nbytes if packed is None else packed.bytes_stored,
            bytes_read=fetched.nbytes if packed is None else packed.bytes_fetched,
            steps_recomputed=self.trace.steps_replayed,
            stall_seconds=self.trace.seconds("wait"),
        )

    def _device_report(self) -> DeviceReport | None:
        if self.accelerator is None:
            return None
        found, prediction = self.accelerator.usage(), self.choice.prediction
        links = tuple(replace(link, overlap_fraction=self.trace.link_overlap(link.direction)) for link in found.links)
        if self.device is None or not self.is_linked:
            budget, predicted = self.memory_nbytes, prediction.peak_memory_bytes
        else:
            budget, predicted = self.device.memory_nbytes, prediction.peak_device_bytes
        return replace(found, budget_bytes=budget, predicted_peak_bytes=predicted, links=links)

    def _slots_for_revolve(self) -> int:
        return max(1, min(self.steps + 1, self.memory_nbytes // self.mover.nbytes[Kind.SNAPSHOT]))

    def _simulated(self, measured: Quantities) -> Quantities | None:
        """The plan replayed with the mean times of this run, unless that would take long beside it.

        None, too, for a run that was resumed: it saw only part of the plan.
        """
        if self.layout is None or (self.keeper is not None and self.keeper.resumed_from is not None):
            return None
        patience = max(LEAST_REPLAY_SECONDS, REPLAY_SHARE * measured.seconds)
        if not self.steps or self.trace.actions * REPLAY_SECONDS > patience:
            return None
        until = time.thread_time() + patience

        def watch(action: Action) -> None:
            if time.thread_time() > until:
                raise _TakesTooLong

        try:
            return self._replayed(measured, self.layout, watch)
        except _TakesTooLong:
            return None

    def _replayed(self, measured: Quantities, layout: Layout, watch: Callable[[Action], None]) -> Quantities:
        steps, choice, mover = self.steps, self.choice, self.mover
        state, block = mover.nbytes[Kind.SNAPSHOT], mover.nbytes[Kind.RESIDUALS]
        outcome = simulate(
            steps,
            choice.slots,
            self._seen_speeds(),
            layout=layout,
            blocks=choice.blocks,
            known=self.known,
            observe=watch,
        )
        # The model counts items, and which of them are blocks is known only of the run.
        mean_written = measured.bytes_written / max(1, sum(moved.count for moved in mover.written.values()))
        mean_read = measured.bytes_read / max(1, sum(moved.count for moved in mover.fetched.values()))
        return Quantities(
            seconds=outcome.seconds,
            peak_memory_bytes=outcome.peak_slots * state + outcome.peak_blocks * block + self.tape_nbytes,
            peak_disk_bytes=measured.peak_disk_bytes if choice.blocks else outcome.peak_stored * state,
            bytes_written=round(outcome.writes * mean_written),
            bytes_read=round(outcome.reads * mean_read),
            steps_recomputed=max(0, outcome.advances - (steps - min(steps, self.trace.steps_recorded))),
            stall_seconds=outcome.stall_seconds,
        )

    def _seen_speeds(self) -> Speeds:
        """Mean seconds of this run; where something did not happen, what was expected of it."""
        trace, costs, mover = self.trace, self.costs, self.mover
        run = trace.steps_forward + trace.steps_replayed
        if self.choice.blocks and not self.is_linked:
            run += trace.steps_retaped  # recorded, where on a device they are part of a window's adjoint
        forward = (trace.seconds("forward") + trace.seconds("replay")) / max(1, run)
        reverse = trace.seconds("reverse") / self.steps

        def mean(by_kind: dict[Kind, Traffic], otherwise: Callable[[int], float]) -> Callable[[Key], float]:
            found = {
                kind: by_kind[kind].seconds / by_kind[kind].count if by_kind[kind].count else otherwise(nbytes)
                for kind, nbytes in mover.nbytes.items()
            }
            return lambda key: found[key.kind]

        return Speeds(
            **self._seen_link(),
            forward=forward,
            reverse=reverse,
            write=mean(mover.written, costs.write_seconds),
            read=mean(mover.fetched, costs.read_seconds),
            record=forward if self.choice.blocks else None,
            pull_back=reverse if self.choice.blocks else None,
        )

    def _seen_link(self) -> dict[str, Any]:
        """What the link of a device took in this run; nothing without one."""
        if not self.is_linked or self.accelerator is None or self.device is None:
            return {}
        sizes = self.mover.nbytes
        pace = {"out": 1.0 / self.costs.out_bytes_per_second, "in": 1.0 / self.costs.in_bytes_per_second}
        pace |= {way.direction: way.seconds / way.nbytes for way in self.accelerator.usage().links if way.nbytes}
        return {
            "copy_out": lambda key: pace["out"] * sizes[key.kind],
            "copy_in": lambda key: pace["in"] * sizes[key.kind],
            "staging": self.device.staging,
        }


class _TakesTooLong(Exception):
    """A replay has taken as long as a report may."""


def _total(traffic: Iterable[Traffic]) -> Traffic:
    total = Traffic()
    for moved in traffic:
        total.count += moved.count
        total.nbytes += moved.nbytes
        total.seconds += moved.seconds
        total.failures += moved.failures
    return total
