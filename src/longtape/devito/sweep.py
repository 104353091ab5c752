"""`Sweep`: what the caller sees.

Thin: it checks that operators and wavefields fit together, and hands the rest to a run.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Mapping, Sequence
from types import TracebackType
from typing import Any, Self

import numpy as np
from devito import Operator, TimeFunction

from longtape.compose import Run, Settings, Traits, refuse_lossy_verification, refuse_resuming
from longtape.devito.durable import Kept, fingerprint
from longtape.devito.fields import Wavefield, Window, check_apart, check_complete, check_names, known
from longtape.devito.job import OperatorsJob
from longtape.devito.kernels import Kernel
from longtape.durable.home import Home
from longtape.durable.keeper import DEFAULT_SECONDS, Resumable, check_seconds, found_begin
from longtape.engine.trace import Trace
from longtape.errors import ReplayError, UsageError
from longtape.plan.choose import Choice
from longtape.plan.costs import Costs
from longtape.processes import require_independent
from longtape.protocols import Observer, Tier
from longtape.report import Report
from longtape.tiers.codecs import parse_codec


class Sweep:
    """A forward operator run over all times, and a reverse operator back, within a memory budget.

    The operators are Devito's own, written with time buffers (no ``save=``) as if the
    whole of each wavefield were there in reverse.  Both run over the same times.

    What `forward` writes beside the wavefields, such as receivers or an illumination, is
    written once for each time.  Times that are run again write to copies, which take as
    much memory again, beside `memory`; so does timing for a moment, and for what
    `reverse` writes.

    Args:
        forward: Updates the wavefields from one time to the next.
        reverse: Goes back in time; reads the wavefields and writes what the caller wants
            of it, such as an adjoint wavefield and a gradient.
        wavefields: Every TimeFunction that `forward` updates.
        memory: Most bytes held at any moment beside the operators' own arrays, such as ``"4GiB"``.
        disk: Existing directory for a private scratch file, or None to recompute in memory only.
        disk_limit: Most bytes of it.
        forward_args: What ``forward.apply`` would be given, such as ``{"dt": dt, "src": src}``.
        reverse_args: What ``reverse.apply`` would be given.  What only `reverse` reads may
            change until it is called; what `forward` reads may not.
        observers: Objects with `on_action` and `on_transfer`, called as things happen.
        tier: Storage to use in place of a scratch file; left empty and open, for its owner to close.
        stuck_seconds: Wait no longer for storage than this; what it does not deliver is recomputed.
        costs: Times to plan with, such as `costs` of an earlier sweep through the same
            operators; measured when None, without touching the operators' arrays.
        verify: Run one time at a call, and compare every state that is computed again, or
            fetched, with what it was the first time, bit for bit.  Without it that is done
            for the final state only, rounding aside.
        compress: Codec for what goes to storage, as for `longtape.Sweep`.
        resume: Existing directory that makes the run durable.  After a kill, a loss of power or an exception, the
            same call with everything set as at first goes on where the run was, forward or
            reverse.  Outputs of `forward` and all that `reverse` writes are brought back.  The
            directory takes the place of `disk`; one state of `memory` is set aside for it, and while
            some times are run again, to see that they do what they did, copies of the time buffers are held.
        resume_seconds: Work that may be lost.
        name: Tells runs apart that share the directory.
        independent: The ranks are independent: no operator exchanges halos.  Without it, a run beside other ranks
            of MPI, or with Devito's MPI on, is refused.

    Raises:
        BudgetError: `memory` cannot hold one state, or with `resume` two.
        ResumeError: What is in `resume` is of another run, or another sweep is working on it.
        UsageError: Operators or wavefields that do not fit together, and any other
            argument that cannot be honoured.

    Example::

        sweep = longtape.devito.Sweep(forward, gradient, [u], memory="1GiB", disk="/scratch",
                                      forward_args={"dt": dt}, reverse_args={"dt": dt, "rec": residual})
        sweep.forward()
        residual.data[:] = rec.data - observed
        sweep.reverse()
    """

    def __init__(
        self,
        forward: Operator,
        reverse: Operator,
        wavefields: Sequence[TimeFunction],
        *,
        memory: int | str,
        disk: str | os.PathLike[str] | None = None,
        disk_limit: int | str | None = None,
        forward_args: Mapping[str, Any] | None = None,
        reverse_args: Mapping[str, Any] | None = None,
        observers: Iterable[Observer] = (),
        tier: Tier | None = None,
        costs: Costs | None = None,
        stuck_seconds: float = 30.0,
        verify: bool = False,
        compress: str | None = None,
        resume: str | os.PathLike[str] | None = None,
        resume_seconds: float = DEFAULT_SECONDS,
        name: str = "sweep",
        independent: bool = False,
    ) -> None:
        require_independent(independent)
        lossy = compress is not None and parse_codec(compress).bound is not None
        if verify:
            refuse_lossy_verification(compress)
        if resume is not None:
            refuse_resuming(steps=1, tier=tier, compress=compress, disk=disk)
        seconds = check_seconds(resume_seconds)
        if not wavefields:
            raise UsageError("give the TimeFunctions that the forward operator updates as wavefields")
        own = {function.name: function for function in wavefields}
        check_names(forward, own)
        ahead = Kernel(forward, {**own, **(forward_args or {})})
        back = Kernel(reverse, known(reverse, own) | dict(reverse_args or {}))
        if (ahead.first, ahead.last) != (back.first, back.last):
            raise UsageError(
                f"{ahead.name} runs over times {ahead.first} to {ahead.last}, {back.name} over {back.first} to "
                f"{back.last}; they must be the same: give {ahead.time.min_name} and {ahead.time.max_name} to both"
            )
        if ahead.last < ahead.first:
            raise UsageError(f"{ahead.name} would run over no time at all: {ahead.first} to {ahead.last}")
        fields = [Wavefield(function, ahead, back) for function in wavefields]
        check_complete(ahead, back, own)
        check_apart(ahead, back)
        window = Window(fields, back)
        stride = min(window.stride, ahead.last - ahead.first + 1)
        self._forward, self._reverse, self._fields = ahead, back, fields
        self._prints: dict[str, str] = {}
        self._job = OperatorsJob(ahead, back, fields, window, stride, verify=verify, lossy=lossy)
        self._kept = Kept(ahead, back, own, self._job)
        can_record = window.is_even and self._job.residual_nbytes > 0
        traits = Traits(
            title=f"{ahead.name} and {back.name}",
            steps=self._job.steps,
            state_nbytes=self._job.state_nbytes,
            residual_nbytes=self._job.residual_nbytes if can_record else None,
            notes=(f"a step is {stride} time steps, which the time buffer holds at once",) if stride > 1 else (),
            floats=self._job.floats,
        )
        home = None if resume is None else Home(resume, name)
        try:
            begun, resumable = None, None
            if home is not None:
                begun = found_begin(home)
                self._prints = self._read_first()
                same = fingerprint(ahead, back, stride, self._prints)
                resumable = Resumable(home, self._kept, same, seconds=seconds, standing=self._kept)
            settings = Settings(
                memory,
                disk=disk,
                disk_limit=disk_limit,
                observers=tuple(observers),
                tier=tier,
                costs=costs,
                compress=compress,
                stuck_seconds=stuck_seconds,
                resumable=resumable,
                independent=independent,
            )
            is_timed = costs is None and begun is None
            self._run = Run(self._job, traits, settings, measure=self._job.measure if is_timed else None)
        except BaseException:
            if home is not None:
                home.close()
            raise

    def _read_first(self) -> dict[str, str]:
        """Fingerprints of all that the forward operator looks at; outputs that it only overwrites are none of it."""
        kernel = self._forward
        looked_at = {*kernel.inputs(), *kernel.read(), *kernel.added_to(), *(field.name for field in self._fields)}
        return kernel.prints(name for name in sorted(kernel.arrays) if name in looked_at)

    @property
    def plan(self) -> Choice:
        """The chosen plan, with predicted time and bytes.  Its steps are strides of the time buffer."""
        return self._run.choice

    @property
    def costs(self) -> Costs:
        """The times that it was chosen with, for further sweeps through operators as costly."""
        return self._run.costs

    @property
    def report(self) -> Report:
        """Predicted against measured, once `reverse` has ended."""
        return self._run.report

    @property
    def trace(self) -> Trace:
        """What happened when."""
        return self._run.trace

    def forward(self) -> None:
        """Run the forward operator over all times; the wavefields and all it writes are then as after `apply`.

        Raises:
            UsageError: Other arrays or numbers would be used than when the sweep was made.
        """
        if moved := self._forward.changed():
            raise UsageError(
                f"operator {self._forward.name} was given another {', '.join(moved)} when the sweep was made; make the "
                "sweep once the functions have their memory and the constants their values"
            )
        if self._prints and (moved := _differing(self._prints, self._read_first())):
            raise UsageError(
                f"{', '.join(moved)} changed after the sweep was made, and the files in resume name what it was; "
                "make the sweep once everything is set"
            )
        self._prints = self._forward.prints(self._forward.inputs())
        self._kept.begin()
        self._run.forward()

    def reverse(self) -> None:
        """Run the reverse operator over all times; the wavefields then hold no particular state.

        What else the forward operator writes, such as receivers, is left as `forward` left it.

        Raises:
            ReplayError: What the forward operator reads has changed since `forward`, or it does not do the same
                each time.
            UsageError: A wavefield has been given other memory.
        """
        self._check_unchanged()
        self._reverse.prepare()
        for field in self._fields:
            if field.name in self._reverse.arrays and not field.is_in(self._reverse):
                raise UsageError(
                    f"{field.name} was given other memory after the sweep was made, which operator "
                    f"{self._forward.name} has not written; change its values in place"
                )
        self._warn_if_unseeded()
        self._run.reverse()

    def _check_unchanged(self) -> None:
        if changed := _differing(self._prints, self._forward.prints(self._prints)):
            name = self._forward.name
            raise ReplayError(
                f"{', '.join(changed)} changed after forward(), and operator {name} reads it: times that are run "
                "again would give other states, and the gradient would belong to neither. Put the values back before "
                "reverse(), or give the operator that needs the new ones a function of its own",
                step=self._forward.first,
                leaf=changed[0],
            )

    def _warn_if_unseeded(self) -> None:
        seeds = self._reverse.seeds(besides=[field.name for field in self._fields])
        if seeds and not any(np.any(self._reverse.arrays[name]) for name in seeds):
            warnings.warn(
                f"longtape: {' and '.join(seeds)} hold only zeros, so operator {self._reverse.name} starts from "
                "a zero adjoint, and the gradient will be zero. Set them between forward() and reverse()",
                RuntimeWarning,
                stacklevel=3,
            )

    def close(self) -> None:
        """Give up a sweep that is not wanted any more; `reverse` does so by itself."""
        self._run.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def _differing(then: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    return [name for name, value in then.items() if now[name] != value]
