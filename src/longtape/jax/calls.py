"""One call of a JAX loop: its sweeps, and how JAX's autodiff comes to run them.

Owns the joining of a run to `jax.custom_vjp`.  Under `jax.grad` its functions are called
with arrays, and between forward and reverse sweep the run lives in what JAX keeps for the
reverse pass.  Called with anything else they say what stands in the way.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from importlib.metadata import version
from typing import Any

import jax
import numpy as np
from jax.custom_derivatives import SymbolicZero

from longtape.compose import ALIGNMENT, PADDED_FROM, Hooks, Run, Settings, Traits, closed_if_it_fails
from longtape.durable.home import Home
from longtape.durable.keeper import Resumable, found_begin
from longtape.errors import UsageError
from longtape.jax.arrays import Kind, empty, given, host, is_inexact, raw
from longtape.jax.chunks import Chunks
from longtape.jax.durable import DurableLoop, of_arrays, of_program, reached
from longtape.jax.job import LoopJob, VerifiedLoopJob
from longtape.jax.traced import Traced
from longtape.processes import require_independent
from longtape.sizes import parse_bytes
from longtape.timing import TIMES

CHUNK_SHARE = 8
"""A chunk's residuals take at most this part of the memory budget, unless a single step takes more."""


_PRECISION = ("enable_x64", "default_matmul_precision", "default_prng_impl")


@dataclass(frozen=True, slots=True)
class Where:
    """Where a loop is made durable, and how often."""

    directory: str | os.PathLike[str]
    name: str
    seconds: float
    names: list[str]
    """Of the leaves of the carry."""


class Call:
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
        durable: Where | None = None,
    ) -> None:
        self._names, self._durable = names, durable
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

        def forward(*inputs: Any) -> tuple[list[Any], Pending]:
            pending = Pending(self, [given.value for given in inputs], [bool(given.perturbed) for given in inputs])
            return pending.forward(), pending

        def reverse(pending: Pending, bars: list[Any]) -> tuple[Any, ...]:
            with jax.disable_jit(False):
                return tuple(pending.reverse(list(bars)))

        loop.defvjp(forward, reverse, symbolic_zeros=True)

        def call(inputs: list[Any]) -> Sequence[Any]:
            _refuse_forward_mode(inputs)
            with jax.disable_jit(False):  # which lets one look into a step, but a run is made of compiled chunks
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
        require_independent(self._settings.independent)
        home = None if self._durable is None else Home(self._durable.directory, self._durable.name)
        try:
            return self._begin_in(home, chunks, inputs)
        except BaseException:
            if home is not None:
                home.close()
            raise

    def _begin_in(self, home: Home | None, chunks: Chunks, inputs: list[Any]) -> tuple[Run, LoopJob]:
        settings = self._settings
        has_storage = settings.disk is not None or settings.tier is not None
        steps = self._steps if has_storage else self.count(chunks, inputs)
        job = self.job(chunks, inputs, steps)
        found = {} if home is None else self._reached(chunks)  # before a step is run
        state = max(1, job.fields.nbytes)
        padding = ALIGNMENT if state >= PADDED_FROM else 0
        room = parse_bytes(settings.memory) - state - padding - job.head_nbytes
        records = room >= job.stride_nbytes
        notes = () if records else ("memory holds no residuals beside a carry: steps are run again one by one",)
        measures = settings.costs is None and state <= parse_bytes(settings.memory)
        times = TIMES if has_storage or home is not None else 1  # without storage, the plan is the same for all times
        costs = job.measure(times) if measures and (home is None or found_begin(home) is None) else None
        job.load_initial()
        job.begin_at(0)
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
        if home is not None:
            settings = replace(settings, resumable=self._resumable(home, job, inputs, found))
        run = Run(job, traits, settings, measure=None if costs is None else lambda: costs)
        return run, job

    def _reached(self, chunks: Chunks) -> dict[str, str]:
        return reached([self._traced.loop.step, *chunks.programs()])

    def _resumable(self, home: Home, job: LoopJob, inputs: list[Any], found: dict[str, str]) -> Resumable:
        assert self._durable is not None
        loop, chunks = self._traced.loop, job.chunks
        _, consts, init, xs = self.parts(inputs)
        fingerprint = {
            "front end": "longtape.jax.scan",
            "step": of_program(loop.step),
            "adjoint of the step": " ".join(map(of_program, chunks.programs())),
            "set of constants": of_arrays(chunks.constants),
            "number of steps": str(self._steps),
            "direction": "reverse" if self._reverse else "forward",
            "set of wanted gradients (of closed-over arrays)": str(chunks.wanted[0]),
            "set of wanted gradients (of xs)": str(chunks.wanted[1]),
            "number of steps compiled together, which follows from memory": str(chunks.size),
            "initial carry": of_arrays(init),
            "xs": of_arrays(xs),
            "set of parameters": of_arrays(consts),
            "precision": str([getattr(jax.config, f"jax_{name}") for name in _PRECISION]),
            "version of JAX": f"{jax.__version__}, jaxlib {version('jaxlib')}, on {jax.default_backend()}",
            "version of NumPy": np.__version__,
        }
        source = DurableLoop(job, self._durable.names)
        return Resumable(home, source, fingerprint, lambda: self._reached(chunks), found, seconds=self._durable.seconds)

    def tell_plan(self, run: Run) -> None:
        if self._hooks.on_plan is not None:
            self._hooks.on_plan(run.choice)

    def tell_report(self, run: Run) -> None:
        if self._hooks.on_report is not None:
            self._hooks.on_report(run.report)


class Pending:
    """A run between its sweeps, as JAX keeps it for the reverse pass: a pytree without leaves.

    The run releases what it has when JAX drops it.
    """

    def __init__(self, call: Call, inputs: list[Any], perturbed: list[bool]) -> None:
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


jax.tree_util.register_pytree_node(Pending, lambda pending: ((), pending), lambda pending, _: pending)


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
            "a longtape.jax loop is inside jax.jit (or another that traces, such as jax.checkpoint or lax.cond) "
            f"while {when}; what it stores is moved from Python, between compiled chunks of steps. Take the gradient "
            "outside of jax.jit, and compile what comes before and after the loop by itself; steps are compiled anyway"
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
