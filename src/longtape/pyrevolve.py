"""pyrevolve's interface, run by Longtape: import this in its place.

Thin: it lays the arrays of a user's `Checkpoint` out in a slot and back, turns numbers
of checkpoints into bytes, and hands the rest to a run.  Names, order of arguments and
the protocol of calls are those of pyrevolve 2.2.8 (Kukreja et al.,
https://github.com/devitocodes/pyrevolve); what is new is given by keyword.

The protocol, for N steps.  ``apply_forward`` runs every step once with
``fwd_operator.apply(t_start=…, t_end=…)``.  ``apply_reverse`` goes through the steps from
the last to the first; it calls ``fwd_operator.apply(t_start=k, t_end=k+1)`` and then
``rev_operator.apply(t_start=k, t_end=k+1)``, so that all levels of a cyclic time buffer
are there.  ``checkpoint.get_data(k)`` gives the arrays that make up state k, which
exists before step k, and ``checkpoint.get_data_location(k)`` where they go; with cyclic
buffers these depend on k.

``apply_forward`` calls the forward operator for each of the first two steps alone, and
times the second; then for longer ranges.  It runs no step twice.  ``apply_reverse`` runs
steps again, so an operator that adds up a misfit or counts its calls must do so in
``apply_forward`` only.  Three states are held beside the stated memory until the first
two steps have been stored.

What differs from pyrevolve: the state is what `get_data` returns, in any number of
arrays and dtypes, and `Checkpoint.size` is not relied on; which states are kept, and
where, is chosen from measured costs; storage that fails costs time and not the gradient.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import comb, inf
from typing import Any

import numpy as np
import numpy.typing as npt

from longtape.actions import Action, Advance, Restore, Reverse, Store, Turn
from longtape.compose import ALIGNMENT, Run, Settings, Traits
from longtape.engine.trace import Trace
from longtape.errors import ReplayError, StateError, StepError, UsageError
from longtape.known import KnownState
from longtape.layout import Fields
from longtape.measure import JobCosts
from longtape.plan.choose import Choice
from longtape.plan.costs import Costs
from longtape.processes import require_independent
from longtape.protocols import Observer, Slot, Tier
from longtape.report import Report
from longtape.witness import Witness

__all__ = [
    "BaseRevolver",
    "BytesStorage",
    "Checkpoint",
    "DiskRevolver",
    "DiskStorage",
    "MemoryRevolver",
    "MultiLevelRevolver",
    "NumpyStorage",
    "Operator",
    "Profiler",
    "Revolver",
    "SingleLevelRevolver",
    "adjust",
    "install",
]

__version__ = "2.2.8"
"""The version of pyrevolve whose interface this is."""

Array = npt.NDArray[Any]

STATES_BESIDE_DISK = 4
"""States in memory where only disk was asked for: one each to keep, to write, to read and to reverse from."""

_NAMES: dict[type, str] = {Advance: "advance", Store: "takeshot", Restore: "restore", Reverse: "reverse"}
"""Actions as pyrevolve's profiler calls them."""

_TIMED_STEPS = 2
_CHECKED_LOADS = 3
_REVERSE_OVER_FORWARD = 1.5


def install() -> None:
    """Have ``import pyrevolve`` give this module, here and in libraries such as Devito.

    Raises:
        StateError: pyrevolve, or Devito, was imported before: what they hold on to would not change.
    """
    here = sys.modules[__name__]
    if sys.modules.get("pyrevolve") is here:
        return
    for name in ("pyrevolve", "devito"):
        if name in sys.modules:
            raise StateError(f"{name} is imported already; call longtape.pyrevolve.install() before it is")
    sys.modules["pyrevolve"] = here


def adjust(n_timesteps: int) -> int:
    """Checkpoints that pyrevolve takes by default: the least s with C(2s, s) ≥ N."""
    slots = 1
    while comb(2 * slots, slots) < n_timesteps:
        slots += 1
    return slots


class Operator:
    """Base of forward and reverse operators."""

    def apply(self, **kwargs: Any) -> Any:
        """Run steps ``t_start … t_end - 1``, in either direction."""
        raise NotImplementedError(f"{type(self).__name__}.apply(t_start, t_end)")


class Checkpoint:
    """Base of what says where the live state is."""

    @property
    def dtype(self) -> Any:
        """Of all arrays; not relied on."""
        raise NotImplementedError

    @property
    def size(self) -> int:
        """Entries of one state; not relied on."""
        raise NotImplementedError

    @property
    def nbytes(self) -> int:
        """Bytes of one state, from `size` and `dtype`; not relied on."""
        return int(self.size * np.dtype(self.dtype).itemsize)

    def get_data(self, timestep: int) -> Iterable[Array]:
        """The arrays that hold state `timestep`; they are read at once."""
        raise NotImplementedError

    def get_data_location(self, timestep: int) -> Iterable[Array]:
        """The live arrays that state `timestep` is to be put into."""
        return self.get_data(timestep)


class Profiler:
    """Milliseconds and calls of what a revolver did, by section and action, as pyrevolve reports them."""

    def __init__(self) -> None:
        self.timings: dict[str, dict[str, float]] = {}
        self.counts: dict[str, dict[str, int]] = {}
        self._section = "forward"

    def on_action(self, action: Action, began: float, ended: float) -> None:
        if isinstance(action, Turn):
            self._section = "reverse"
        elif name := _NAMES.get(type(action)):
            timings, counts = self.timings.setdefault(self._section, {}), self.counts.setdefault(self._section, {})
            timings[name] = timings.get(name, 0.0) + 1e3 * (ended - began)
            counts[name] = counts.get(name, 0) + 1

    def on_transfer(self, kind: str, key: Any, nbytes: int, began: float, ended: float) -> None:
        pass

    def summary(self) -> str:
        """For people."""
        lines = ["*" * 16]
        for section, actions in self.timings.items():
            lines.append(f"In section {section}:")
            lines += [f"\tAction {name}: {ms:f} ({self.counts[section][name]})" for name, ms in actions.items()]
        return "\n".join([*lines, "*" * 16])


class Storage:
    """A number of checkpoints that may be kept somewhere; holds nothing itself.

    Args:
        size_ckp: Entries of a checkpoint; what `get_data` returns is what counts.
        n_ckp: How many checkpoints.
        dtype: Of the entries.
        profiler: Ignored, as are `wd`, `rd` (costs are measured) and `name`.
        wd: Write cost.
        rd: Read cost.
        name: For people.
    """

    def __init__(
        self, size_ckp: int, n_ckp: int, dtype: Any, profiler: Any = None, wd: float = 0, rd: float = 0, name: str = ""
    ) -> None:
        self.size_ckp, self.n_ckp, self.dtype = size_ckp, n_ckp, dtype
        self.profiler, self.wd, self.rd, self.name = profiler, wd, rd, name


class NumpyStorage(Storage):
    """Checkpoints in memory."""


class BytesStorage(Storage):
    """Checkpoints in memory, uncompressed.

    Args:
        size_ckp: As for `Storage`.
        n_ckp: As for `Storage`.
        dtype: As for `Storage`.
        compression: Must be None.
        auto_pickle: Ignored: nothing is pickled.
        profiler: Ignored.
        wd: Ignored.
        rd: Ignored.
        name: For people.
    """

    def __init__(
        self,
        size_ckp: int,
        n_ckp: int,
        dtype: Any,
        compression: Any = None,
        auto_pickle: bool = False,
        profiler: Any = None,
        wd: float = 0,
        rd: float = 0,
        name: str = "ByteStorage",
    ) -> None:
        _refuse_compression(compression)
        super().__init__(size_ckp, n_ckp, dtype, profiler, wd, rd, name)


class DiskStorage(Storage):
    """Checkpoints in one anonymous scratch file in `filedir`; `singlefile` and `keepfiles` change nothing."""

    def __init__(
        self,
        size_ckp: int,
        n_ckp: int,
        dtype: Any,
        profiler: Any = None,
        filedir: str | os.PathLike[str] | None = "./",
        singlefile: bool = True,
        wd: float = 0,
        rd: float = 0,
        name: str = "DiskStorage",
        keepfiles: bool = False,
    ) -> None:
        super().__init__(size_ckp, n_ckp, dtype, profiler, wd, rd, name)
        self.filedir = "./" if filedir is None else filedir


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


class _Arrays:
    """How the arrays of a state, and the number of its step, lie in a slot."""

    def __init__(self, arrays: Sequence[Array]) -> None:
        self.shapes = [(array.dtype, array.shape) for array in arrays]
        self._layout = Fields([*(array.nbytes for array in arrays), 8])
        self.nbytes = self._layout.nbytes

    def views(self, slot: Slot) -> tuple[list[Array], Array]:
        """The arrays of a snapshot, and its step, as views of the slot; made once a slot."""
        if slot.views is None:
            *parts, step = self._layout.split(slot.data)
            arrays = [p.view(dtype).reshape(shape) for p, (dtype, shape) in zip(parts, self.shapes, strict=True)]
            slot.views = arrays, step.view(np.int64)
        return slot.views  # type: ignore[no-any-return]

    def check(self, arrays: Sequence[Array], call: str) -> None:
        """Raise `StepError` unless the arrays are like those of state 0."""
        if len(arrays) != len(self.shapes):
            raise StepError(f"{call} returned {len(arrays)} arrays, but get_data(0) returned {len(self.shapes)}")
        for index, (array, (dtype, shape)) in enumerate(zip(arrays, self.shapes, strict=True)):
            if array.dtype != dtype or array.shape != shape:
                raise StepError(
                    f"{call}[{index}] is {array.dtype}{list(array.shape)}, but get_data(0)[{index}] was "
                    f"{dtype}{list(shape)}; all states must have the same shapes and dtypes"
                )


class _OperatorsJob:
    """Two operators and a checkpoint as a job.

    A user's forward operator may do more than advance the state, such as add up an
    illumination, so every step is run exactly once going forward: the first steps are
    timed as they are run, before there is a plan, and the states that they started from
    are kept aside until the plan has come as far (`_aside`).
    """

    def __init__(self, checkpoint: Any, forward: Any, reverse: Any, steps: int, *, verify: bool) -> None:
        self._checkpoint, self._forward, self._reverse, self._steps = checkpoint, forward, reverse, steps
        self._at = self._ran = 0
        self._turned = self._has_run_many = False
        self._aside: dict[int, list[Array]] = {}
        self._loads = 0
        self._witness = Witness("get_data(…)[{}]".format) if verify else None
        self.arrays = _Arrays(_live(checkpoint.get_data(0), "get_data(0)"))
        before = self._last_arrays()
        self._before = None if before is None else KnownState(before)
        """What the arrays of the final state held at first."""
        self._known: dict[int, KnownState] = {}
        """The final state, and the last one that was reached by several steps in one call."""
        self._see(0)

    @property
    def states_verified(self) -> int | None:
        """States that came out the same when they were computed again or fetched; None: not looked at."""
        return None if self._witness is None else self._witness.compared

    def _see(self, state: int, *, kept: bool = False) -> None:
        if self._witness is not None:
            self._witness.see(state, [_bytes(array) for array in self._data(state)], kept=kept)

    def _data(self, step: int) -> list[Array]:
        arrays = _live(self._checkpoint.get_data(step), f"get_data({step})")
        self.arrays.check(arrays, f"get_data({step})")
        return arrays

    def measure(self) -> JobCosts:
        """Run the first steps; the quickest counts, for the first may compile."""
        clock, seconds = time.perf_counter, inf
        for step in range(min(_TIMED_STEPS, self._steps)):
            self._aside[step] = [array.copy() for array in self._data(step)]
            began = clock()
            try:
                self._forward.apply(t_start=step, t_end=step + 1)
            except Exception as error:
                error.add_note(f"longtape: while running steps {step} to {step} (forward sweep)")
                raise
            seconds = min(seconds, clock() - began)
            self._ran = step + 1
            self._see(step + 1)
        live = self._data(self._ran)
        spare = [np.empty_like(array) for array in live]

        def busy() -> None:
            for target, source in zip(spare, live, strict=True):
                np.copyto(target, source)

        return JobCosts(forward=seconds, reverse=(1 + _REVERSE_OVER_FORWARD) * seconds, busy=busy)

    def advance(self, start: int, stop: int) -> int:
        if self._aside:
            start = min(stop, self._ran)
            if stop >= self._ran:
                self._aside.clear()
        self._run(start, stop)
        self._at = stop
        return stop

    def _run(self, start: int, stop: int) -> None:
        self._apply(start, stop)
        if self._turned:
            self._check(stop)
        elif stop > start + 1:
            self._known = {stop: KnownState(self._data(stop))}

    def _apply(self, start: int, stop: int) -> None:
        if self._witness is None:
            if start < stop:
                self._forward.apply(t_start=start, t_end=stop)
            return
        many = self._turned and not self._has_run_many and stop > start + 1
        for step in range(start, stop, stop - start if many else 1):
            end = stop if many else step + 1
            self._forward.apply(t_start=step, t_end=end)
            self._see(end)
        self._has_run_many |= many  # once as without verification: an operator may not do what it is told

    def reverse(self, start: int, stop: int) -> None:
        self._run(start, stop)
        self._reverse.apply(t_start=start, t_end=stop)

    def _last_arrays(self) -> list[Array] | None:
        """Those of the final state; None if the checkpoint does not give them, as nobody has promised."""
        try:
            return self._data(self._steps)
        except Exception:
            return None

    def _check(self, state: int) -> None:
        """Hold a state that was computed again against what it was, where that is known; rounding aside."""
        known = self._known.get(state)
        if known is not None and (differs := known.differing(self._data(state))):
            raise ReplayError(
                f"steps up to {state - 1}, run again from a stored state, ended in another get_data({state})"
                f"[{differs[0]}] than in apply_forward(). The gradient would be that of steps that were never run. "
                f"{type(self._forward).__name__}.apply must run exactly the steps t_start to t_end - 1, however they "
                "are divided among calls, and nothing that it reads may change before apply_reverse() ends",
                step=state - 1,
                leaf=f"get_data(…)[{differs[0]}]",
            )

    def save(self, slot: Slot) -> Slot:
        views, step = self.arrays.views(slot)
        for kept, array in zip(views, self._aside.get(self._at) or self._data(self._at), strict=True):
            np.copyto(kept, array)
        step[0] = self._at
        return slot

    def load(self, slot: Slot) -> None:
        views, kept_step = self.arrays.views(slot)
        step = self._at = int(kept_step[0])
        call = f"get_data_location({step})"
        live = _live(self._checkpoint.get_data_location(step), call)
        self.arrays.check(live, call)
        for array, kept in zip(live, views, strict=True):
            np.copyto(array, kept)
        self._loads += 1
        if self._loads <= _CHECKED_LOADS:
            self._check_restored(step, views)
        self._see(step, kept=True)

    def _check_restored(self, step: int, views: Sequence[Array]) -> None:
        for index, (array, kept) in enumerate(zip(self._data(step), views, strict=True)):
            if not np.array_equal(_bytes(array), _bytes(kept)):
                raise StepError(
                    f"state {step} was put into get_data_location({step})[{index}], but get_data({step})[{index}] does "
                    "not give it back: both must be the live arrays that the operators work on, not copies, and no "
                    "two of them may overlap"
                )

    def yield_slot(self, slot: Slot) -> Slot:
        return slot

    def turn(self) -> None:
        self._turned, arrays = True, self._last_arrays()
        if arrays is None:
            return
        self._known[self._steps] = final = KnownState(arrays)
        if self._before is None or not final.is_same(self._before):
            return
        if any(np.any(array) for array in [*arrays, *self._data(0)]):
            raise StepError(
                f"after {self._steps} steps get_data({self._steps}) holds the bits that it held at first: nothing has "
                f"changed in the arrays that {type(self._checkpoint).__name__} gives. If the operators assign new "
                "arrays, get_data must look them up at each call"
            )

    def adopt(self, slots: list[Slot]) -> None:
        raise NotImplementedError

    def load_initial(self) -> None:
        raise NotImplementedError

    def record(self, start: int, stop: int, slot: Slot) -> int:
        raise NotImplementedError

    def pull_back(self, start: int, stop: int, slot: Slot) -> None:
        raise NotImplementedError


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
        job = _OperatorsJob(
            self.checkpoint, self.fwd_operator, self.rev_operator, self.n_timesteps, verify=self._verify
        )
        nbytes, costs = job.arrays.nbytes, self._costs
        traits = Traits(
            title=type(self.fwd_operator).__name__,
            steps=self.n_timesteps,
            state_nbytes=nbytes,
            max_window=self._max_reverse,
            reverse_is_assumed=costs is None,
            notes=() if costs else (f"predicted as if a reverse step took {_REVERSE_OVER_FORWARD} forward steps",),
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
        _refuse_compression(compression_params)
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


def _refuse_compression(compression: Any) -> None:
    if compression is not None and (not isinstance(compression, dict) or compression.get("scheme") is not None):
        raise UsageError(f"states are kept as they are: compression must be None, not {compression!r}")


def _live(arrays: Iterable[Any], call: str) -> list[Array]:
    """The arrays as plain views, whatever subclass they are of."""
    found = list(arrays)
    for index, array in enumerate(found):
        if not isinstance(array, np.ndarray) or array.dtype.hasobject:
            raise UsageError(f"{call}[{index}] must be a NumPy array of plain numbers, not {type(array).__name__}")
    return [np.asarray(array) for array in found]


def _bytes(array: Array) -> Array:
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)
