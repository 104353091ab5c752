"""`scan` and `while_loop`: JAX's loops, differentiated in reverse within a fixed memory budget.

Owns the contract with the user and with JAX's transformations.  The sweeps are a run
(`longtape.compose`) of a `LoopJob`, driven from Python: under `jax.grad` the functions of
`jax.custom_vjp` are called with arrays, and between forward and reverse sweep the run
lives in what JAX keeps for the reverse pass.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import jax
import numpy as np
from jax import lax
from jax.custom_derivatives import SymbolicZero

from longtape.compose import ALIGNMENT, PADDED_FROM, Hooks, Run, Settings, Traits, closed_if_it_fails
from longtape.errors import UsageError
from longtape.jax.arrays import Kind, empty, given, host, is_inexact, raw
from longtape.jax.chunks import Chunks
from longtape.jax.job import LoopJob, VerifiedLoopJob
from longtape.jax.traced import Traced
from longtape.plan.choose import Choice
from longtape.plan.costs import Costs
from longtape.protocols import Observer, Tier
from longtape.sizes import parse_bytes

CHUNK_SHARE = 8
"""A chunk's residuals take at most this part of the memory budget, unless a single step takes more."""


def scan(
    f: Callable[[Any, Any], tuple[Any, Any]],
    init: Any,
    xs: Any = None,
    length: int | None = None,
    reverse: bool = False,
    *,
    memory: int | str,
    disk: str | os.PathLike[str] | None = None,
    disk_limit: int | str | None = None,
    observers: Sequence[Observer] = (),
    tier: Tier | None = None,
    costs: Costs | None = None,
    on_plan: Callable[[Choice], None] | None = None,
    on_report: Callable[[Run], None] | None = None,
    verify: bool = False,
    stuck_seconds: float = 30.0,
) -> tuple[Any, Any]:
    """`jax.lax.scan`, so that gradients through it fit in `memory`.

    Contract, results and error messages are those of `jax.lax.scan`.  Reverse-mode
    derivatives reach `init`, `xs` and every array that `f` closes over.  They are taken
    outside of `jax.jit`, by `jax.grad`, `jax.value_and_grad` or `jax.vjp`; the steps are
    compiled, many at a time.  Where no derivative is taken nothing is stored, and
    under `jax.jit` or `jax.vmap` this then is `jax.lax.scan` itself.

    Args:
        f: Takes carry and x, returns carry and y; pytrees of arrays.  It may be run more
            than once on the same arguments, so it must be pure.
        init: The first carry.
        xs: A pytree of arrays whose first dimension is the step, or None, with `length`.
        length: The number of steps, where `xs` does not tell it.
        reverse: Go through `xs` and ys from the last to the first.
        memory: Most bytes held for snapshots, residuals and staging together, such as
            ``"64MiB"``.  The working set of a chunk of steps is not counted (its residuals
            take no more than an eighth of `memory`, or those of one step), nor are `xs`, the
            stacked ys and the gradients returned.
        disk: Directory for a private scratch file; None recomputes within memory.
        disk_limit: Most bytes of it.
        observers: Objects with `on_action` and `on_transfer`.
        tier: Storage to use in place of a scratch file.
        costs: Times to plan with; measured on the first steps when None.
        on_plan: Called with the chosen plan before the forward sweep.
        on_report: Called with the run after each reverse sweep; it has `report` and `trace`.
        verify: Compare every state that is computed again, or fetched, with what it was the first
            time, bit for bit.  Steps then run one by one, and take a hash and 8 bytes a leaf more.
        stuck_seconds: Wait no longer than this for storage; what it does not deliver is recomputed.

    Returns:
        The final carry, and the stacked ys.

    Raises:
        TypeError, ValueError: As `jax.lax.scan`: a carry whose type changes, no length, a traced one.
        BudgetError: `memory` is less than one carry.
        StepError: `f` has side effects.
        UsageError: A derivative is taken within `jax.jit` or `jax.vmap`, in forward mode, or a second time.
        ReplayError: A step gave something else when it was run again, and `verify` is set.
    """
    settings = Settings(memory, disk, disk_limit, tuple(observers), tier, costs, stuck_seconds)
    parse_bytes(memory)

    def call(init: Any, xs: Any) -> Any:
        return lax.scan(f, init, xs, length=length, reverse=reverse)

    if _is_empty(xs, length):
        return call(init, xs)  # type: ignore[no-any-return]
    traced = Traced(call, (init, xs), "scan")
    name = getattr(f, "__name__", type(f).__name__)
    steps = traced.eqn.params["length"]
    hooks, names = Hooks(on_plan, on_report), _names(init) if verify else None
    result = _Call(traced, f"scan of {name}", settings, hooks, steps, reverse=reverse, names=names).run()
    return result  # type: ignore[no-any-return]


def while_loop(
    cond_fun: Callable[[Any], Any],
    body_fun: Callable[[Any], Any],
    init_val: Any,
    *,
    memory: int | str,
    disk: str | os.PathLike[str] | None = None,
    disk_limit: int | str | None = None,
    max_steps: int | None = None,
    observers: Sequence[Observer] = (),
    tier: Tier | None = None,
    costs: Costs | None = None,
    on_plan: Callable[[Choice], None] | None = None,
    on_report: Callable[[Run], None] | None = None,
    verify: bool = False,
    stuck_seconds: float = 30.0,
) -> Any:
    """`jax.lax.while_loop` with reverse-mode derivatives, in a memory budget.

    The number of steps need not be known.  With storage the forward sweep stores as it
    goes; without, the loop is run once to count the steps before they are planned.

    Args:
        cond_fun: Takes the carry; whether there is another step.
        body_fun: Takes a carry, returns the next.
        init_val: The first carry.
        memory: As in `scan`, like all that follow.
        disk: Directory for a private scratch file.
        disk_limit: Most bytes of it.
        max_steps: Stop after so many steps in any case.
        observers: Objects with `on_action` and `on_transfer`.
        tier: Storage to use in place of a scratch file.
        costs: Times to plan with.
        on_plan: Called with the chosen plan.
        on_report: Called with the run after each reverse sweep.
        verify: Compare states with what they were.
        stuck_seconds: Wait no longer than this for storage.

    Returns:
        The final carry.

    Raises:
        TypeError, ValueError: As `jax.lax.while_loop`.
        BudgetError, StepError, UsageError: As `scan`.
        StorageError: Storage does not work.
    """
    if max_steps is not None and (isinstance(max_steps, bool) or not isinstance(max_steps, int) or max_steps < 0):
        raise UsageError(f"max_steps must be an integer of at least 0, not {max_steps!r}")
    settings = Settings(memory, disk, disk_limit, tuple(observers), tier, costs, stuck_seconds)
    parse_bytes(memory)

    def call(init: Any) -> Any:
        return lax.while_loop(cond_fun, body_fun, init)

    traced = Traced(call, (init_val,), "while")
    name = getattr(body_fun, "__name__", type(body_fun).__name__)
    hooks, names = Hooks(on_plan, on_report), _names(init_val) if verify else None
    return _Call(traced, f"while_loop of {name}", settings, hooks, None, most=max_steps, names=names).run()


def _names(carry: Any) -> list[str]:
    """What to call each leaf of a carry: its key path."""
    found, _ = jax.tree_util.tree_flatten_with_path(carry)
    return ["carry" + jax.tree_util.keystr(path) for path, _ in found]


def _is_empty(xs: Any, length: Any) -> bool:
    """Whether there is no step: nothing to store, and nothing to run."""
    leaves = jax.tree.leaves(xs)
    return any(np.shape(leaf)[:1] == (0,) for leaf in leaves) or (not leaves and type(length) is int and length == 0)


class _Call:
    """One call: what is needed to run its sweeps, again if must be."""

    def __init__(
        self,
        traced: Traced,
        title: str,
        settings: Settings,
        hooks: Hooks,
        steps: int | None,
        *,
        reverse: bool = False,
        most: int | None = None,
        names: list[str] | None = None,
    ) -> None:
        self._names = names
        self._traced, self._title, self._settings, self._hooks = traced, title, settings, hooks
        self._steps, self._reverse, self._most = steps, reverse, most
        loop = traced.loop
        self._ends = loop.condition_consts, loop.condition_consts + loop.consts
        self.kinds = [Kind(aval) for avals in loop.outputs for aval in avals]

    def run(self) -> Any:
        """The results, joined to whatever JAX transforms."""
        return self._traced.run(self._differentiable())

    def _differentiable(self) -> Callable[[list[Any]], Sequence[Any]]:
        @jax.custom_vjp
        def loop(*inputs: Any) -> list[Any]:
            return self.plain(list(inputs))

        def forward(*inputs: Any) -> tuple[list[Any], _Pending]:
            pending = _Pending(self, [given.value for given in inputs], [bool(given.perturbed) for given in inputs])
            return pending.forward(), pending

        def reverse(pending: _Pending, bars: list[Any]) -> tuple[Any, ...]:
            return tuple(pending.reverse(list(bars)))

        loop.defvjp(forward, reverse, symbolic_zeros=True)

        def call(inputs: list[Any]) -> Sequence[Any]:
            _refuse_forward_mode(inputs)
            return loop(*inputs)

        return call

    def parts(self, inputs: list[Any]) -> tuple[list[Any], list[Any], list[Any], list[Any]]:
        """What the condition closes over, what the step does, init and xs."""
        first, second = self._ends
        third = second + self._traced.loop.carry
        return inputs[:first], inputs[first:second], inputs[second:third], inputs[third:]

    def chunks(self, perturbed: list[bool] | None) -> Chunks:
        """The compiled loop; without derivatives if nothing says what they are of."""
        loop = self._traced.loop
        most = parse_bytes(self._settings.memory) // CHUNK_SHARE
        most = most if self._names is None else 0
        if perturbed is None:
            return Chunks(loop, None, [False] * len(loop.inputs[2]), most)
        _, consts, _, xs = self.parts(perturbed)
        wanted = [
            [w and is_inexact(a) for w, a in zip(ws, avals, strict=True)]
            for ws, avals in ((consts, loop.inputs[0]), (xs, loop.inputs[2]))
        ]
        return Chunks(loop, wanted[0], wanted[1], most)

    def job(self, chunks: Chunks, inputs: list[Any], steps: int | None) -> LoopJob:
        """The loop on these arrays."""
        condition, consts, init, xs = [[raw(leaf) for leaf in part] for part in self.parts(inputs)]
        views = [self.in_order(host(stack)) for stack in xs]
        kind = LoopJob if self._names is None else VerifiedLoopJob
        return kind(chunks, condition, consts, init, views, steps, self._most)

    def in_order(self, stack: Any) -> Any:
        """A stack as the steps go through it, and back."""
        return stack[::-1] if self._reverse else stack

    def results(self, job: LoopJob) -> list[Any]:
        """Carry and ys for the caller."""
        raws = [*job.carry, *[given(self.in_order(stack)) for stack in job.ys]]
        job.ys = []
        return [kind.restore(array) for kind, array in zip(self.kinds, raws, strict=True)]

    def plain(self, inputs: list[Any]) -> list[Any]:
        """The results where no derivative is wanted."""
        if any(isinstance(leaf, jax.core.Tracer) for leaf in inputs):
            if self._most is None:
                return self._traced.plain(inputs)
            raise UsageError("longtape.jax.while_loop with max_steps cannot be traced; call it outside of jax.jit")
        job = self.job(self.chunks(None), inputs, self._steps)
        job.load_initial()
        self._run_plainly(job)
        return self.results(job)

    def _run_plainly(self, job: LoopJob) -> int:
        if self._steps is not None:
            return job.advance(0, self._steps)
        start, stop = 0, job.chunks.size
        while (reached := job.advance(start, stop)) == stop:
            start, stop = stop, stop + job.chunks.size
        return reached

    def count(self, chunks: Chunks, inputs: list[Any]) -> int:
        """The number of steps, by running them."""
        if self._steps is not None:
            return self._steps
        job = self.job(chunks, inputs, None)
        job.load_initial()
        return self._run_plainly(job)

    def is_over(self, inputs: list[Any]) -> bool:
        """Whether there is not even one step."""
        condition, _, init, _ = self.parts(inputs)
        test = self._traced.loop.condition
        return test is not None and (
            self._most == 0 or not bool(jax.extend.core.jaxpr_as_fun(test)(*condition, *init)[0])
        )

    def begin(self, chunks: Chunks, inputs: list[Any]) -> tuple[Run, LoopJob]:
        """Measure and plan; the run is ready for its forward sweep."""
        settings = self._settings
        has_storage = settings.disk is not None or settings.tier is not None
        steps = self._steps if has_storage else self.count(chunks, inputs)
        job = self.job(chunks, inputs, steps)
        state = max(1, job.fields.nbytes)
        padding = ALIGNMENT if state >= PADDED_FROM else 0
        room = parse_bytes(settings.memory) - state - padding - job.head_nbytes
        records = room >= job.stride_nbytes
        notes = () if records else ("memory holds no residuals beside a carry: steps are run again one by one",)
        costs = job.measure() if settings.costs is None and state <= parse_bytes(settings.memory) else None
        job.load_initial()
        if isinstance(job, VerifiedLoopJob) and self._names is not None:
            job.watch(self._names)
        traits = Traits(
            title=self._title,
            steps=steps,
            state_nbytes=state,
            residual_nbytes=job.stride_nbytes if records else None,
            residual_head_nbytes=job.head_nbytes if records else 0,
            initial_is_free=True,
            notes=notes,
        )
        run = Run(job, traits, settings, measure=None if costs is None else lambda: costs)
        return run, job

    def tell_plan(self, run: Run) -> None:
        if self._hooks.on_plan is not None:
            self._hooks.on_plan(run.choice)

    def tell_report(self, run: Run) -> None:
        if self._hooks.on_report is not None:
            self._hooks.on_report(run)


class _Pending:
    """A run between its sweeps, as JAX keeps it for the reverse pass: a pytree without leaves.

    Releases the run when JAX drops it.
    """

    def __init__(self, call: _Call, inputs: list[Any], perturbed: list[bool]) -> None:
        _refuse_tracers(inputs, "its derivative is taken")
        self._call, self._inputs, self._perturbed = call, inputs, perturbed
        self._run: tuple[Run, LoopJob] | None = None
        self._over = call.is_over(inputs)

    @cached_property
    def _chunks(self) -> Chunks:
        return self._call.chunks(self._perturbed)

    def forward(self) -> list[Any]:
        """Run the forward sweep; returns carry and ys."""
        if self._over:
            return self._call.parts(self._inputs)[2]
        run, job = self._call.begin(self._chunks, self._inputs)
        weakref.finalize(self, run.close)
        with closed_if_it_fails(run):
            self._call.tell_plan(run)
            run.forward()
        self._run = run, job
        return self._call.results(job)

    def reverse(self, bars: list[Any]) -> list[Any]:
        """Run the reverse sweep; returns a cotangent for each input, None where it has none."""
        _refuse_tracers(bars, "cotangents are pulled back")
        carry_count = len(self._call.parts(self._inputs)[2])
        if self._over:
            condition, consts, _, _ = self._call.parts(self._inputs)
            return [*[None] * (len(condition) + len(consts)), *[_or_none(bar) for bar in bars]]
        if self._run is None:
            self.forward()  # cotangents are pulled back once more: what was stored is gone, state 0 is not
        assert self._run is not None
        (run, job), self._run = self._run, None
        call, chunks = self._call, self._chunks
        known = [_or_none(bar) for bar, kind in zip(bars, call.kinds, strict=True) if is_inexact(kind.typed)]
        split = len(chunks.carry_bars)
        assert split <= carry_count
        ys_bar = [None if bar is None else call.in_order(host(bar)) for bar in known[split:]]
        steps = 0 if job.steps is None else job.steps
        xs_bar = [empty((steps, *kind.shape), kind.dtype) for kind in chunks.x_bars]
        with closed_if_it_fails(run):
            job.begin_reverse(known[:split], ys_bar, [call.in_order(stack) for stack in xs_bar])
            run.reverse()
        const_bars, carry_bar = job.end_reverse()
        job.xs_bar = []
        call.tell_report(run)
        return self._joined(const_bars, carry_bar, [given(stack) for stack in xs_bar])

    def _joined(self, const_bars: list[Any], carry_bar: list[Any], xs_bar: list[Any]) -> list[Any]:
        found = iter([*const_bars, *carry_bar, *xs_bar])
        condition, consts, init, xs = self._call.parts(self._inputs)
        flags = self._call.parts(self._perturbed)
        result: list[Any] = [None] * len(condition)
        for leaves, wanted in ((consts, flags[1]), (init, [True] * len(init)), (xs, flags[3])):
            result += [next(found) if w and is_inexact(leaf) else None for leaf, w in zip(leaves, wanted, strict=True)]
        return result


jax.tree_util.register_pytree_node(_Pending, lambda pending: ((), pending), lambda pending, _: pending)


def _or_none(bar: Any) -> Any:
    return None if isinstance(bar, SymbolicZero) else bar


def _tracers(leaves: list[Any]) -> list[str]:
    return [type(leaf).__name__ for leaf in leaves if isinstance(leaf, jax.core.Tracer)]


def _refuse_tracers(leaves: list[Any], when: str) -> None:
    """Sweeps store and fetch from Python, on arrays; say what stands in the way of having them."""
    names = _tracers(leaves)
    if not names:
        return
    if any("Batch" in name or "Vmap" in name for name in names):
        raise UsageError(
            f"a longtape.jax loop is inside jax.vmap (or jax.jacrev, which uses it) while {when}; map inside the step "
            "instead, so that one loop carries the whole batch, or call it once for each element"
        )
    if any("Dynamic" in name or "Jit" in name or name == "JaxprTracer" for name in names):
        raise UsageError(
            f"a longtape.jax loop is inside jax.jit (or another function that traces) while {when}; what it stores is "
            "moved from Python, between compiled chunks of steps. Take the gradient outside of jax.jit, and compile "
            "what comes before and after the loop by itself; the steps are compiled anyway"
        )
    raise UsageError(
        f"a longtape.jax loop is differentiated a second time: first derivatives in reverse mode are all it has "
        f"(it met a {names[0]} while {when}); use jax.lax.scan for higher derivatives"
    )


def _refuse_forward_mode(inputs: list[Any]) -> None:
    for leaf in inputs:
        if type(leaf).__name__ == "JVPTracer" and type(leaf.tangent).__name__ != "JaxprTracer":
            raise UsageError(
                "a longtape.jax loop has no forward-mode derivative (jax.jvp, jax.jacfwd, jax.hessian); "
                "use jax.grad or jax.vjp, or jax.lax.scan, whose forward mode stores nothing"
            )
