"""`scan`: a differentiable loop over steps, in a fixed memory budget.

Owns the contract with the user and with autograd.  The sweeps are a run
(`longtape.compose`) of a `ScanJob`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from longtape.compose import (
    ALIGNMENT,
    Hooks,
    Run,
    Settings,
    Traits,
    closed_if_it_fails,
    refuse_lossy_verification,
    refuse_resuming,
)
from longtape.durable.home import Home
from longtape.durable.resumable import DEFAULT_SECONDS, Resumable, check_seconds, forget, found_begin
from longtape.errors import StateError, UsageError
from longtape.plan.choose import Choice
from longtape.processes import require_independent
from longtape.protocols import Device, Observer, Tier
from longtape.report import Report
from longtape.sizes import format_bytes, parse_bytes
from longtape.tiers.codecs import parse_codec
from longtape.torch.autocast import Ambient
from longtape.torch.believed import Believed
from longtape.torch.blocks import RoomExceeded
from longtape.torch.captured import CapturedSteps
from longtape.torch.devices import device_of
from longtape.torch.durable import RANDOM, WAY, DurableScan, fingerprint, reached
from longtape.torch.eager import Cotangents, EagerStep, GradientWanted, differentiable
from longtape.torch.empty import scan_nothing
from longtape.torch.graphs import CaptureFailed
from longtape.torch.inputs import Inputs, as_inputs, check_init
from longtape.torch.job import Ends, Randomness, RandomnessAppeared, ScanJob, VerifiedScanJob
from longtape.torch.linked import Linked
from longtape.torch.on_device import STATE_ALIGNMENT, OnDevice, aligned
from longtape.torch.places import HostPlace
from longtape.torch.structure import Leaves, Structure, flatten, paths
from longtape.torch.transforms import graph_break, hidden_from_hooks, refuse_batched, refuse_transforms

Step = Callable[[Any, Any], tuple[Any, Any]]

CAPTURED_FROM = 256
"""Steps from which on it pays to spend the seconds that capturing a step takes."""

_MANY_STEPS = 1 << 20

MOST_RESTARTS = 10
"""How often a forward sweep may begin anew because a step showed something new."""


@graph_break
def scan(
    step: Step,
    init: Any,
    xs: Any = None,
    length: int | None = None,
    *,
    memory: int | str,
    host_memory: int | str | None = None,
    disk: str | os.PathLike[str] | None = None,
    disk_limit: int | str | None = None,
    observers: Sequence[Observer] = (),
    tier: Tier | None = None,
    on_plan: Callable[[Choice], None] | None = None,
    on_report: Callable[[Report], None] | None = None,
    capture: bool | None = None,
    verify: bool = False,
    stuck_seconds: float = 30.0,
    compress: str | None = None,
    compile: bool = False,
    resume: str | os.PathLike[str] | None = None,
    resume_seconds: float = DEFAULT_SECONDS,
    name: str = "scan",
    independent: bool = False,
) -> tuple[Any, Any]:
    """Run ``carry, y = step(carry, x)`` over all steps, so that gradients fit in `memory`.

    The contract is that of ``jax.lax.scan``.  Gradients reach `init`, stacked `xs` and every
    tensor the step closes over, which are found without being listed.  Where no gradient
    is wanted this is a plain loop, and nothing is stored.

    First derivatives only, by `backward` or `torch.autograd.grad`.  Inside `torch.func` transformations,
    forward-mode AD or `vmap` it raises; inside the step they work.  `torch.compile` breaks its graph here.
    Under `torch.utils.checkpoint` gradients are right, but with ``use_reentrant=False`` what is
    stored for them stays stored meanwhile, and `resume` is refused.

    Args:
        step: Takes and returns pytrees of tensors.  It may be run more than once on the
            same arguments, so it must not count, log or change anything else that it reaches;
            random numbers of PyTorch's default generators and autocast are replayed, as are
            those of a generator that the step itself makes or seeds.  Functions that it
            compiles run uncompiled, unless the step is captured.  Under autocast each step
            casts its weights anew, and their gradients are summed in the weights' dtype; where
            casts are costly, close over weights cast before the scan.  It may update its carry
            in place, but neither its x nor what it closes over (such as running statistics),
            and must keep nothing that it computes but in the carry.  What the caller binds
            anew before backward (flags, attributes, globals, closure variables) does not
            matter: the steps are run again with what they found the first time.  Before the
            sweep step 0 is run a few times to check and time it: six at most, and some four more with
            `compress` or `resume`; once each way to time it where that takes more than a second, or no
            plan depends on it.
        init: The first carry; a pytree of tensors.  Never modified.
        xs: A pytree of tensors whose first dimension is the step; or an object with ``len``
            and indexing that returns the x of one step, the same whenever it is asked, read
            as needed and never held whole;
            or None, with `length`.  A list of tensors is ambiguous, and refused unless `length` is given.
        length: The number of steps, where `xs` does not tell it.  With none the carry is returned as it is.
        memory: Most bytes held for snapshots, residuals and staging together, such as
            ``"64MiB"``.  The step's own working set is not counted, nor are `xs`, the stacked
            ys and the gradients returned.  For a carry on a CUDA device this is memory of the device.
        host_memory: For a carry on a CUDA device: most bytes of pinned host memory behind it, from and
            to which items are copied while the steps run.  None: none, or with `disk` as little as
            a way there needs.  The device is experimental, see ``docs/gpu.md``.
        disk: Existing directory for a private scratch file; None recomputes within memory.
        disk_limit: Most bytes of it.
        observers: Objects with `on_action` and `on_transfer`.
        tier: Storage to use in place of a scratch file; left empty and open, for its owner to close.
        on_plan: Called with the chosen plan before the forward sweep.
        on_report: Called with the report of each reverse sweep; its `trace` tells what happened when.
        capture: Turn the step into explicit forward and backward graphs, so that residuals can be
            stored and nothing is run twice where storage keeps up.  Takes seconds once a step;
            None does so from 256 steps on.  A step that cannot be captured is run as it is, and
            the report says why; so is, for None, one whose graphs give other bits than itself.
        verify: Compare every state that is computed again, or fetched, with what it was the first
            time, bit for bit.  Takes a hash a step, and 8 bytes a leaf and step beside `memory`.
            In a scan that is resumed, states of the process before were not seen.
        stuck_seconds: Wait no longer than this for storage; what it does not deliver is recomputed.
        compress: Codec for what goes to storage, used where it is predicted to pay: ``"lz4"``, ``"zstd"``,
            ``"bitshuffle+lz4"`` or ``"bitshuffle+zstd"``.  ``"relative:1e-4+bitshuffle+zstd"`` is lossy:
            it first rounds floating-point numbers, each by at most that share of its size, and
            gradients are no longer exact.  Integers, flags and random states are never rounded.
        compile: Hand the captured graphs to PyTorch's compiler, which fuses operators: quicker where they are
            small, after a minute or so of compiling.  Needs a C++ compiler, and implies ``capture=True``;
            results differ from the step's own in the last bits.
        resume: Existing directory that makes the sweeps durable, in place of `disk`.  After a kill, a loss of
            power or an exception, the same call goes on where they were: a scan whose forward
            sweep had ended returns at once, and backward, for the same cotangents, goes on below
            what it had done.  The files are removed when backward has ended.  Without a gradient
            nothing is made durable.  A scan that was begun with anything else the step can reach
            (closures, defaults, globals, helpers, attributes, tensors and arrays by content), other
            inputs or other wanted gradients is refused, and so is one whose steps, a few of which are
            run again, do other than they did.  Of `xs` read lazily the first, the last and some 50
            between are looked at, all if they are not more than 64; of installed packages nothing is.
        resume_seconds: Work that may be lost.
        name: Finds the scan again among others in the directory.
        independent: The ranks are independent: no step communicates.  Without it, a run beside other ranks of MPI,
            `torch.distributed` or JAX is refused.

    Returns:
        The final carry, and the ys stacked along a new first dimension.

    Raises:
        UsageError: An argument that cannot be honoured, a transformation that would lose gradients, or a
            step that breaks the contract; in backward, a tensor or an array that the steps read was changed
            in place.
        BudgetError: `memory` is less than one carry, or with `resume` two; or so much memory cannot be had of
            the device, or pinned.
        DeviceError: The device failed while the sweeps were running.
        ResumeError: What is in `resume` under this name is of another scan, other parameters or
            inputs included, or another process is working on it.
        StepError: The step changes or keeps what it must not, or returns something else than
            before; names the place.
        ReplayError: The last step gave something else when it was run again; or any step, and `verify` is set.
        StateError: At a second derivative.
        Exception: Whatever the step raises, with a note naming the step.
    """
    refuse_transforms("scan")
    inputs, steps = as_inputs(xs, length)
    init_leaves, carry = flatten(init)
    for position, leaf in enumerate(init_leaves):
        check_init(position, leaf)
    if steps < 0:
        raise UsageError(f"length={steps}: a scan cannot have fewer than no steps")
    if verify:
        refuse_lossy_verification(compress)
    settings = Settings(
        memory,
        disk=disk,
        disk_limit=disk_limit,
        observers=tuple(observers),
        tier=tier,
        compress=compress,
        stuck_seconds=stuck_seconds,
        independent=independent,
    )
    where = Where.of(init_leaves, memory, host_memory, pipes=disk is not None or tier is not None)
    if steps == 0:
        return scan_nothing(step, init, inputs)
    call = Call(step, init_leaves, carry, inputs, steps, settings, Hooks(on_plan, on_report), where)
    call.names = paths(init, "carry") if verify else None
    call.use_graphs(capture, compiles=compile, pays=steps >= CAPTURED_FROM)
    seconds = check_seconds(resume_seconds)
    if resume is not None:
        refuse_resuming(steps=steps, tier=tier, compress=compress, disk=disk)
        if where.device is not None:
            raise UsageError("a scan on a device cannot be resumed yet; leave out resume, or move the carry to the CPU")
        call.durable = _Durable(resume, name, seconds)
    return call.run()


@dataclass(frozen=True, slots=True)
class _Durable:
    """Where a scan is made durable, and how often."""

    directory: str | os.PathLike[str]
    name: str
    seconds: float


PIPE_STATES, PIPE_BLOCKS_NBYTES = 6, 64 << 20
"""What is pinned where the host's memory is only the way to storage: states, and room for residual blocks."""


@dataclass(frozen=True, slots=True)
class Where:
    """On which device a scan runs, and in which memory it keeps its items."""

    device: Device | None
    memory_nbytes: int
    """On the device, where there is one."""
    host_nbytes: int | None
    """Pinned memory behind it; None: as much as it takes to be a way to storage, if there is storage."""
    has_storage: bool

    @classmethod
    def of(cls, init: Leaves, memory: int | str, host_memory: int | str | None, *, pipes: bool) -> Where:
        """Understand the options.

        Raises:
            UsageError: `host_memory` without a device, or tensors on several.
        """
        device = device_of(init, host_memory)
        host = None if host_memory is None else parse_bytes(host_memory)
        return cls(device, parse_bytes(memory), host, pipes)

    def place(self) -> HostPlace | OnDevice | Linked:
        """Where a job keeps its items."""
        if self.device is None:
            return HostPlace()
        if self.host_nbytes is None and not self.has_storage:
            return OnDevice(self.device)
        return Linked(self.device, self.memory_nbytes)

    def settings(self, settings: Settings, job: ScanJob) -> Settings:
        """The settings of the run, whose memory is the host's where a device is in front of it."""
        if not isinstance(job.place, Linked):
            return settings
        if self.host_nbytes is not None:
            return replace(settings, memory=self.host_nbytes)
        blocks = PIPE_BLOCKS_NBYTES if isinstance(job.stepper, CapturedSteps) else 0
        return replace(settings, memory=PIPE_STATES * max(1, job.layout().nbytes) + blocks)


class Call:
    """One call of `scan`, or of what is built upon it: what is needed to run its sweeps, again if must be."""

    captures = False
    """Whether to run captured graphs; turned off for good where the step cannot be captured."""
    durable: _Durable | None = None
    """Where to make the sweeps durable; None: nowhere."""

    title = "scan"
    ends: Ends | None = None
    """Tells from the carry whether the sequence ends before a step; where its length is not known."""

    names: Sequence[str] | None = None
    """What the leaves of the carry are called, where states are to be verified."""
    exactly = True
    """Whether captured graphs must give the very bits that the step itself gives on step 0."""

    compiles = False
    """Whether graphs go through PyTorch's compiler."""

    def __init__(
        self,
        step: Step,
        init: Leaves,
        carry: Structure,
        inputs: Inputs,
        steps: int | None,
        settings: Settings,
        hooks: Hooks,
        where: Where,
    ) -> None:
        self._where = where
        self.init, self.inputs, self.steps = init, inputs, steps
        self._step, self._carry, self._settings, self._hooks = step, carry, settings, hooks
        self._ambient = Ambient(leaf.device.type for leaf in [*init, *inputs.stacked] or [torch.empty(0)])
        self._randomness = Randomness(leaf.device for leaf in [*init, *inputs.stacked])
        self._notes: list[str] = []
        self.roots: Sequence[Any] = [step]
        self.closed: Leaves = []
        self.pending: _Pending | None = None
        self._reached: dict[str, str] = {}
        self._run_id: bytes | None = None

    def use_graphs(self, capture: bool | None, *, compiles: bool, pays: bool) -> None:
        """Say whether to run captured graphs, and which; None where it pays.

        Raises:
            UsageError: Graphs are to be compiled that must not be captured.
        """
        if compiles and capture is False:
            raise UsageError(
                "compile=True hands captured graphs to the compiler, but capture=False makes none; leave one out"
            )
        asked = capture is not None or compiles
        self.captures = capture is not False if asked else pays
        self.exactly, self.compiles = not asked, compiles

    def run(self) -> tuple[Any, Any]:
        if self.durable is not None:
            self._reached = reached(self._step)  # before a step is run
        self.believed = Believed(self.roots, self.init, self.inputs)
        if not self._wants_gradient():
            job = self._new_job()
            if self._finds_none(job):
                return self._results(job, job.carry, job.outputs.leaves or [])
        require_independent(self._settings.independent)
        self.inputs.check_repeatable()
        with hidden_from_hooks():
            self.pending = self._forward()
            job = self.pending.job
            self.closed = job.stepper.closed_over()
            given = [*self.init, *self.inputs.stacked, *self.closed]
            results = [*job.carry, *(job.outputs.leaves or [])]
            job.outputs.leaves = None  # they are the caller's, to keep or to drop
            outputs = _Scan.apply(self, results, job.stepper.outside(), *given)
        count = len(self.init)
        self.believed.give_back(outputs)
        return self._results(job, list(outputs[:count]), list(outputs[count:]))

    def _new_job(self, *, capture: bool = False) -> ScanJob:
        first = self.inputs.leaves(0)
        # Inputs read lazily get no cotangent.
        wants = [leaf.requires_grad for leaf in self.inputs.stacked] or [False] * len(first)
        place = self._where.place()
        stepper: EagerStep | CapturedSteps

        def as_it_is() -> EagerStep:
            return EagerStep(self._step, self.inputs, self._carry, self._ambient, wants)

        if capture:
            stepper = CapturedSteps(
                self._step,
                self.inputs,
                self._carry,
                self.init,
                wants,
                as_it_is=as_it_is,
                exactly=self.exactly,
                compiled=self.compiles,
                room=place.room,
            )
        else:
            stepper = as_it_is()
        given = (stepper, self.init, self.inputs, self.steps, self._randomness)
        if self.names is None:
            job = ScanJob(*given, ends=self.ends, place=place)
        else:
            job = VerifiedScanJob(*given, ends=self.ends, place=place, names=self.names)
        job.layout()
        return job

    def _wants_gradient(self) -> bool:
        return torch.is_grad_enabled() and any(leaf.requires_grad for leaf in [*self.init, *self.inputs.stacked])

    def _finds_none(self, job: ScanJob) -> bool:
        """Run the plain loop, unless it meets a tensor that requires a gradient; the sweeps then begin as it did."""
        assert isinstance(job.stepper, EagerStep)
        job.stepper.closures = None
        try:
            self._run_plainly(job)
        except GradientWanted:
            self._randomness.note()
            self.believed.begin_anew()
            return False
        return True

    def _run_plainly(self, job: ScanJob) -> None:
        """Run all steps, to the end wherever that is."""
        if self.steps is not None:
            job.run_plainly(0, self.steps)
            return
        start = 0
        while job.run_plainly(start, start + _MANY_STEPS) == start + _MANY_STEPS:
            start += _MANY_STEPS

    def _results(self, job: ScanJob, carry: Leaves, ys: Leaves) -> tuple[Any, Any]:
        assert job.stepper.y is not None
        carry = [leaf if leaf.grad_fn else leaf.detach() for leaf in carry]
        return self._carry.build(carry), job.stepper.y.build(ys)

    # Sweeps --------------------------------------------------------------------------------------

    def _forward(self) -> _Pending:
        """Run the forward sweep, through captured graphs if they can be had."""
        home = None if self.durable is None else Home(self.durable.directory, self.durable.name)
        try:
            begun = None if home is None else found_begin(home)
            if begun is not None:
                self.captures = self.captures and begun.fingerprint.get(WAY) != "as it is"
                if begun.fingerprint.get(RANDOM) == "drawn":
                    self._randomness.go_back(begun.extra)
            return self._forward_in(home)
        except BaseException:
            if home is not None:
                home.close()
            raise

    def _forward_in(self, home: Home | None) -> _Pending:
        for _ in range(MOST_RESTARTS):
            try:
                job = self._new_job(capture=self.captures)
                with self._around(job):
                    return self._forward_of(job, home)
            except CaptureFailed as error:
                self.captures = False
                self._notes.append(f"the step is run as it is, because it could not be captured: {error}")
            except RandomnessAppeared:
                self._randomness.used = True
            except RoomExceeded:
                pass  # a step took another path; the graphs now know how much room it needs
            if home is not None:
                home.reopen()
                if home.is_believed:
                    home.clear()
        self.captures = False
        self._notes.append("the step is run as it is, because it takes another path again and again")
        job = self._new_job()
        with self._around(job):
            return self._forward_of(job, home)

    def _around(self, job: ScanJob) -> AbstractContextManager[None]:
        return job.stepper.running() if isinstance(job.stepper, CapturedSteps) else nullcontext()

    def _forward_of(self, job: ScanJob, home: Home | None) -> _Pending:
        with self._ambient() if isinstance(job.stepper, CapturedSteps) else nullcontext():
            self.believed.examine(job)
            costs = job.measure(once=not self._times_matter(job))
            if isinstance(job.stepper, CapturedSteps) and job.stepper.rounding is not None:
                self._notes.append(f"captured, although {job.stepper.rounding} in the last bits")
            self._randomness.note()
            job.load_initial()
            layout = job.layout()
            if isinstance(job.stepper, CapturedSteps):
                least = layout.nbytes + job.stepper.block_nbytes(1) + 4096
                if least > self._where.memory_nbytes:
                    raise CaptureFailed(f"a carry and the residuals of one step take {format_bytes(least)} of memory")
            if self._settings.compress is not None and parse_codec(self._settings.compress).bound is not None:
                job.round_blocks()
            captured = job.stepper if isinstance(job.stepper, CapturedSteps) else None
            accelerator = job.place if isinstance(job.place, OnDevice | Linked) else None
            linked = job.place if isinstance(job.place, Linked) else None
            if linked is not None:
                linked.limit_tapes(job.tape_nbytes if captured is None else captured.stride_nbytes)
            traits = Traits(
                title=self.title,
                steps=self.steps,
                state_nbytes=max(1, layout.nbytes if accelerator is None else aligned(layout.nbytes, STATE_ALIGNMENT)),
                residual_nbytes=None if captured is None else captured.stride_nbytes,
                residual_head_nbytes=0 if captured is None else captured.block_nbytes(0),
                tape_nbytes=0 if linked is not None else job.tape_nbytes,
                max_window=1 if captured is not None else min(self.steps or _MANY_STEPS, 256),
                initial_is_free=True,
                notes=tuple(self._notes),
                floats=job.floats,
                accelerator=accelerator,
            )
            settings = self._where.settings(self._settings, job)
            if home is not None:
                settings = replace(settings, resumable=self._resumable(job, home))
            run = Run(job, traits, settings, measure=lambda: costs)
            self._run_id = run.run_id
            pending = _Pending(run, job)
            with closed_if_it_fails(run):
                if self._hooks.on_plan is not None:
                    self._hooks.on_plan(run.choice)
                run.forward()
                self.believed.hold(job)
        return pending

    def _times_matter(self, job: ScanJob) -> bool:
        """Whether the plan depends on times: not without storage, nor where memory holds every state."""
        state = aligned(job.layout().nbytes, ALIGNMENT)
        fits = self.steps is not None and self.steps * state <= self._where.memory_nbytes
        has_storage = self._where.has_storage and not (fits and isinstance(job.stepper, EagerStep))
        return has_storage or self.durable is not None or isinstance(job.place, Linked)

    def _resumable(self, job: ScanJob, home: Home) -> Resumable:
        job.rehearse()
        assert self.durable is not None
        captures = isinstance(job.stepper, CapturedSteps)
        way = "as it is" if not captures else "compiled" if self.compiles else "captured"
        found = fingerprint(self._step, job, self.init, self._carry) | {
            WAY: way,
            RANDOM: "drawn" if self._randomness.used else "none",
            "autocast": str(self._ambient),
        }
        start = self._randomness.at_start.numpy().tobytes()
        return Resumable(
            home,
            DurableScan(job, paths(self._carry.build(self.init), "carry")),
            found,
            partial(reached, self._step),
            self._reached,
            start,
            self.durable.seconds,
        )

    @graph_break
    def reverse(self, carry_bar: Cotangents, ys_bar: Cotangents, wants: list[bool]) -> list[torch.Tensor | None]:
        """Cotangents of init, the stacked xs and the closed-over tensors."""
        refuse_batched([*carry_bar, *ys_bar])
        after = self._randomness.state()
        try:
            with (
                self.believed.restored(),
                torch.inference_mode(False),
                torch.no_grad(),
                self._ambient.off(),
                hidden_from_hooks(),
            ):
                run, found = self._reverse_twice([*map(_kept, carry_bar)], [*map(_kept, ys_bar)], wants)
        finally:
            self._randomness.set(after)
        if self._hooks.on_report is not None:
            self._hooks.on_report(run.report)
        return found

    def _reverse_twice(
        self, carry_bar: Cotangents, ys_bar: Cotangents, wants: list[bool]
    ) -> tuple[Run, list[torch.Tensor | None]]:
        try:
            return self._reverse(carry_bar, ys_bar, wants)
        except (CaptureFailed, RoomExceeded) as error:
            # What was pulled back so far is dropped with its job, and the sweeps are run again.
            self.captures = False
            self._notes.append(f"the sweeps were run again without captured graphs: {error}")
            if self.durable is not None and self._run_id is not None:
                forget(self.durable.directory, self.durable.name, self._run_id)
            return self._reverse(carry_bar, ys_bar, wants)

    def _reverse(
        self, carry_bar: Cotangents, ys_bar: Cotangents, wants: list[bool]
    ) -> tuple[Run, list[torch.Tensor | None]]:
        if self.pending is None:
            # Autograd goes through this graph once more: what was stored is gone, state 0 is not.
            self.pending = self._forward()
        pending, self.pending = self.pending, None
        job = pending.job
        first, second = len(self.init), len(self.init) + len(self.inputs.stacked)
        ambient = self._ambient() if isinstance(job.stepper, CapturedSteps) else nullcontext()
        with self._around(job), self._ambient.defaults.restored(), ambient, closed_if_it_fails(pending.run):
            job.begin_reverse(carry_bar, ys_bar, self.closed, wants[first:second])
            pending.run.reverse()
        if isinstance(job.stepper, EagerStep):
            self.believed.check_nothing_left()
        init_bar, xs_bar, closed_bar = job.end_reverse(self.closed)
        return pending.run, [*init_bar, *xs_bar, *closed_bar]


def _kept(bar: torch.Tensor | None) -> torch.Tensor | None:
    """A cotangent that sweeps may add to, as they may not to one of a backward pass in inference mode."""
    return bar.clone() if bar is not None and bar.is_inference() else bar


@dataclass(frozen=True, slots=True)
class _Pending:
    """A run between its sweeps; it releases what it has when the graph that waits for it is dropped."""

    run: Run
    job: ScanJob


class _Scan(torch.autograd.Function):
    """Joins a finished forward sweep to autograd's graph."""

    @staticmethod
    def forward(
        ctx: Any, call: Call, results: Leaves, outside: Leaves, *given: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        ctx.call = call
        ctx.set_materialize_grads(False)
        token = torch.empty(0)  # which lives as long as autograd's graph can be gone through
        call.believed.hold_while_alive(token)
        # So that they live, and autograd notices what is written to; it does not count changes of inference tensors.
        ctx.save_for_backward(*[tensor for tensor in [*given, *outside] if not tensor.is_inference()], token)
        outputs = tuple(leaf.detach() for leaf in results)
        ctx.mark_non_differentiable(*[leaf for leaf in outputs if not differentiable(leaf)])
        return outputs

    @staticmethod
    def backward(ctx: Any, *bars: torch.Tensor | None) -> tuple[Any, ...]:
        wants = list(ctx.needs_input_grad[3:])
        call: Call = ctx.call
        call.believed.check_unchanged()
        sources = ctx.saved_tensors[:-1]
        count = len(call.init)
        found = call.reverse(list(bars[:count]), list(bars[count:]), wants)
        gradients = [bar if wanted else None for bar, wanted in zip(found, wants, strict=True)]
        if torch.is_grad_enabled():  # create_graph=True
            there = [bar for bar in gradients if bar is not None]
            once = iter(_OnceOnly.apply(there, *sources, *[bar for bar in bars if bar is not None]) if there else ())
            gradients = [None if bar is None else next(once) for bar in gradients]
        return None, None, None, *gradients


class _OnceOnly(torch.autograd.Function):
    """Lets gradients pass, and says so when they are to be differentiated again."""

    @staticmethod
    def forward(ctx: Any, gradients: Leaves, *sources: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(gradient.view_as(gradient) for gradient in gradients)

    @staticmethod
    def backward(ctx: Any, *bars: torch.Tensor | None) -> tuple[Any, ...]:
        raise StateError(
            "longtape.torch.scan has first derivatives only: what a backward pass with create_graph=True returns "
            "cannot be differentiated through it again; use a plain loop over the steps for second derivatives"
        )
