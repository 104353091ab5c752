"""Revolvers: pyrevolve's arguments become bytes, and the rest is a run's."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import comb
from typing import Any

import numpy as np

from longtape.compose import ALIGNMENT, Run, Settings, Traits
from longtape.engine.trace import Trace
from longtape.errors import StateError, UsageError
from longtape.plan.choose import Choice
from longtape.plan.costs import Costs
from longtape.processes import require_independent
from longtape.protocols import Observer, Tier
from longtape.pyrevolve.interface import BytesStorage, DiskStorage, NumpyStorage, Profiler, Storage, refuse_compression
from longtape.pyrevolve.job import REVERSE_OVER_FORWARD, OperatorsJob
from longtape.report import Report

STATES_BESIDE_DISK = 4
"""States in memory where only disk was asked for: one each to keep, to write, to read and to reverse from."""


def adjust(n_timesteps: int) -> int:
    """Checkpoints that pyrevolve takes by default: the least s with C(2s, s) ≥ N."""
    slots = 1
    while comb(2 * slots, slots) < n_timesteps:
        slots += 1
    return slots


@dataclass(frozen=True, slots=True)
class _Allowance:
    """What may be held: numbers of states where pyrevolve's arguments said it, bytes where ours did."""

    memory_states: int
    memory: int | str | None = None
    disk: str | os.PathLike[str] | None = None
    disk_states: int | None = None
    disk_limit: int | str | None = None

    def nbytes(self, state_nbytes: int) -> tuple[int | str, int | str | None]:
        """Memory, and disk or None for all there is."""
        whole = -(-state_nbytes // ALIGNMENT) * ALIGNMENT
        memory = self.memory if self.memory is not None else self.memory_states * whole
        limit = self.disk_limit
        if limit is None and self.disk_states is not None:
            limit = self.disk_states * (whole + ALIGNMENT)  # each is stored with a header
        return memory, limit


class BaseRevolver:
    """What all revolvers share; not made by users.

    `plan`, `trace` and `report` are there once `apply_forward` has begun, has run, and
    once `apply_reverse` has ended.
    """

    def __init__(
        self,
        checkpoint: Any,
        fwd_operator: Any,
        rev_operator: Any,
        n_checkpoints: int,
        n_timesteps: int | None,
        allowance: _Allowance,
        *,
        timings: Any = None,
        profiler: Any = None,
        max_reverse: int = 1,
        verify: bool = False,
        stuck_seconds: float = 30.0,
        observers: Iterable[Observer] = (),
        tier: Tier | None = None,
        costs: Costs | None = None,
        independent: bool = False,
    ) -> None:
        require_independent(independent)
        _require(checkpoint, "checkpoint", "get_data", "get_data_location")
        _require(fwd_operator, "fwd_operator", "apply")
        _require(rev_operator, "rev_operator", "apply")
        self.checkpoint, self.fwd_operator, self.rev_operator = checkpoint, fwd_operator, rev_operator
        self.n_timesteps = _count(n_timesteps, "n_timesteps")
        self.n_checkpoints = n_checkpoints
        self.timings = timings
        self.profiler = Profiler() if profiler is None else profiler
        self._allowance, self._tier, self._costs = allowance, tier, costs
        self._verify, self._stuck_seconds, self._independent = verify, stuck_seconds, independent
        self._max_reverse = _count(max_reverse, "max_reverse")
        watched = [self.profiler] if hasattr(self.profiler, "on_action") else []
        self._observers: list[Observer] = [*watched, *observers]
        self._run: Run | None = None

    def apply_forward(self) -> None:
        """Run every step, keeping states; the live arrays then hold the final state.

        Raises:
            BudgetError: The memory does not hold one state.
            StepError: A state does not have the arrays that state 0 had.
            StateError: Called twice.
        """
        if self._run is not None:
            raise StateError("apply_forward() runs once; make a new revolver to run again")
        self._prepare().forward()

    def apply_reverse(self) -> None:
        """Reverse every step, last to first; everything kept is released.

        Raises:
            StateError: Called before `apply_forward`, or twice.
            StepError: What was restored is not what the operators see.
        """
        self._begun().reverse()

    def close(self) -> None:
        """Give up what is kept; `apply_reverse` does so by itself, and so does dropping the revolver."""
        if self._run is not None:
            self._run.close()

    def _prepare(self) -> Run:
        job = OperatorsJob(self.checkpoint, self.fwd_operator, self.rev_operator, self.n_timesteps, verify=self._verify)
        nbytes, costs = job.arrays.nbytes, self._costs
        traits = Traits(
            title=type(self.fwd_operator).__name__,
            steps=self.n_timesteps,
            state_nbytes=nbytes,
            max_window=self._max_reverse,
            reverse_is_assumed=costs is None,
            notes=() if costs else (f"predicted as if a reverse step took {REVERSE_OVER_FORWARD} forward steps",),
        )
        memory, limit = self._allowance.nbytes(nbytes)
        settings = Settings(
            memory,
            disk=self._allowance.disk,
            disk_limit=limit,
            observers=tuple(self._observers),
            tier=self._tier,
            costs=costs,
            stuck_seconds=self._stuck_seconds,
            independent=self._independent,
        )
        self._run = Run(job, traits, settings, measure=None if costs else job.measure)
        return self._run

    def _begun(self) -> Run:
        if self._run is None:
            raise StateError("call apply_forward() first")
        return self._run

    @property
    def plan(self) -> Choice:
        """The chosen plan, with predicted time and bytes."""
        return self._begun().choice

    @property
    def report(self) -> Report:
        """Predicted against measured."""
        return self._begun().report

    @property
    def trace(self) -> Trace:
        """What happened when."""
        return self._begun().trace

    @property
    def ratio(self) -> float:
        """Forward steps over N, as the plan expects them, those within reversing not counted."""
        return self.plan.prediction.advances / self.n_timesteps

    @property
    def makespan(self) -> float:
        """Seconds that the plan expects for both sweeps."""
        return self.plan.prediction.time_seconds


class SingleLevelRevolver(BaseRevolver):
    """Checkpoints in memory, or with ``diskstorage=True`` on disk, or with `disk` in both.

    Args:
        checkpoint: Says where the live state is; see `Checkpoint`.
        fwd_operator: Runs steps; see `Operator`.
        rev_operator: Reverses steps.
        n_checkpoints: How many states may be kept; None: as many as pyrevolve would keep (`adjust`).
        n_timesteps: N.
        timings: Ignored.
        profiler: A `Profiler`, or None.
        compression_params: None, or ``{"scheme": None}``.
        diskstorage: Keep the checkpoints on disk, in `filedir`.
        filedir: For the scratch file.
        singlefile: Ignored: there is one file, without a name.
        memory: Most bytes held for states, such as ``"4GiB"``, in place of `n_checkpoints`.
        disk: Directory for a private scratch file, beside what is kept in memory.
        disk_limit: Most bytes of it.
        max_reverse: Most steps that one call of `rev_operator` may take.  `fwd_operator` is
            then run through all of them first, so its buffers must hold as many time levels.
        verify: Run every step on its own, and compare each state that is computed again, or
            fetched, with what it was the first time, bit for bit; 8 bytes an array and step.
        stuck_seconds: Wait no longer for storage than this; what it does not deliver is recomputed.
        observers: Objects with `on_action` and `on_transfer`, called as things happen.
        tier: Storage to use in place of a scratch file; left empty and open, for its owner to close.
        costs: Times to plan with; measured on the first steps when None.
        independent: The ranks are independent: no operator communicates.  Without it, a run beside other ranks is
            refused.

    Raises:
        UsageError: An argument that cannot be honoured.
    """

    def __init__(
        self,
        checkpoint: Any,
        fwd_operator: Any,
        rev_operator: Any,
        n_checkpoints: int | None,
        n_timesteps: int,
        timings: Any = None,
        profiler: Any = None,
        compression_params: Any = None,
        diskstorage: bool = False,
        filedir: str | os.PathLike[str] | None = "./",
        singlefile: bool = True,
        *,
        memory: int | str | None = None,
        disk: str | os.PathLike[str] | None = None,
        disk_limit: int | str | None = None,
        **options: Any,
    ) -> None:
        refuse_compression(compression_params)
        steps = _count(n_timesteps, "n_timesteps")
        kept = adjust(steps) if n_checkpoints is None else _count(n_checkpoints, "n_checkpoints")
        if diskstorage:
            where = disk if disk is not None else filedir if filedir is not None else "./"
            allowance = _Allowance(STATES_BESIDE_DISK, memory, where, kept, disk_limit)
        else:
            allowance = _Allowance(kept, memory, disk, None, disk_limit)
        operators = checkpoint, fwd_operator, rev_operator
        super().__init__(*operators, kept, steps, allowance, timings=timings, profiler=profiler, **options)


class MemoryRevolver(SingleLevelRevolver):
    """Checkpoints in memory, and with `disk` there as well.  Arguments as for `SingleLevelRevolver`."""

    def __init__(
        self,
        checkpoint: Any,
        fwd_operator: Any,
        rev_operator: Any,
        n_checkpoints: int | None,
        n_timesteps: int,
        timings: Any = None,
        profiler: Any = None,
        compression_params: Any = None,
        **options: Any,
    ) -> None:
        operators = checkpoint, fwd_operator, rev_operator
        super().__init__(*operators, n_checkpoints, n_timesteps, timings, profiler, compression_params, **options)


class DiskRevolver(SingleLevelRevolver):
    """Checkpoints on disk, and a few states in memory.  Arguments as for `SingleLevelRevolver`."""

    def __init__(
        self,
        checkpoint: Any,
        fwd_operator: Any,
        rev_operator: Any,
        n_checkpoints: int | None,
        n_timesteps: int,
        timings: Any = None,
        profiler: Any = None,
        filedir: str | os.PathLike[str] | None = "./",
        singlefile: bool = True,
        **options: Any,
    ) -> None:
        operators = checkpoint, fwd_operator, rev_operator
        super().__init__(
            *operators,
            n_checkpoints,
            n_timesteps,
            timings,
            profiler,
            diskstorage=True,
            filedir=filedir,
            singlefile=singlefile,
            **options,
        )


class MultiLevelRevolver(BaseRevolver):
    """Checkpoints in memory and on disk, as the storages in `storage_list` allow.

    Args:
        checkpoint: Says where the live state is; see `Checkpoint`.
        fwd_operator: Runs steps; see `Operator`.
        rev_operator: Reverses steps.
        n_timesteps: N.
        storage_list: Storages in memory, whose checkpoints add up, and at most one on disk.
        timings: Ignored.
        profiler: A `Profiler`, or None.
        uf: Ignored, as are `ub` and `up`: costs are measured.
        ub: Ignored.
        up: Ignored.
        options: As for `SingleLevelRevolver`.

    Raises:
        UsageError: An argument that cannot be honoured.
    """

    def __init__(
        self,
        checkpoint: Any,
        fwd_operator: Any,
        rev_operator: Any,
        n_timesteps: int,
        storage_list: Sequence[Storage],
        timings: Any = None,
        profiler: Any = None,
        uf: float = 1,
        ub: float = 1,
        up: float = 1,
        *,
        memory: int | str | None = None,
        disk_limit: int | str | None = None,
        **options: Any,
    ) -> None:
        self.storage_list = list(storage_list or ())
        strays = [s for s in self.storage_list if not isinstance(s, (NumpyStorage, BytesStorage, DiskStorage))]
        disks = [storage for storage in self.storage_list if isinstance(storage, DiskStorage)]
        if strays or not self.storage_list or len(disks) > 1:
            raise UsageError(
                "storage_list must hold NumpyStorage, BytesStorage and at most one DiskStorage of longtape.pyrevolve, "
                f"and not be empty; it is {[type(storage).__name__ for storage in self.storage_list]}"
            )
        in_memory = sum(_count(s.n_ckp, "n_ckp") for s in self.storage_list if s not in disks)
        disk = disks[0] if disks else None
        allowance = _Allowance(
            in_memory or STATES_BESIDE_DISK,
            memory,
            None if disk is None else disk.filedir,
            None if disk is None else disk.n_ckp,
            disk_limit,
        )
        kept = sum(storage.n_ckp for storage in self.storage_list)
        operators = checkpoint, fwd_operator, rev_operator
        super().__init__(*operators, kept, n_timesteps, allowance, timings=timings, profiler=profiler, **options)


Revolver = MemoryRevolver


def _count(value: Any, name: str) -> int:
    whole = isinstance(value, (int, np.integer)) and not isinstance(value, bool)
    if not whole or value < 1:
        raise UsageError(f"{name} must be an integer of at least 1, not {value!r}")
    return int(value)


def _require(found: Any, role: str, *methods: str) -> None:
    missing = [name for name in methods if not callable(getattr(found, name, None))]
    if missing:
        raise UsageError(f"{role} must have the method {' and '.join(missing)}; {type(found).__name__} has not")
