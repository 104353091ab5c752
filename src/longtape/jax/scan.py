"""`scan` and `while_loop`: JAX's loops, differentiated in reverse within a fixed memory budget.

Owns the contract with the user.  The sweeps are driven from Python by a call (`calls`).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax import lax

from longtape.compose import Hooks, Settings, refuse_resuming
from longtape.durable.keeper import DEFAULT_SECONDS, check_seconds
from longtape.errors import UsageError
from longtape.jax.calls import Call, Where
from longtape.jax.traced import Traced
from longtape.plan.choose import Choice
from longtape.plan.costs import Costs
from longtape.protocols import Observer, Tier
from longtape.report import Report
from longtape.sizes import parse_bytes, whole_number


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
    on_report: Callable[[Report], None] | None = None,
    verify: bool = False,
    stuck_seconds: float = 30.0,
    resume: str | os.PathLike[str] | None = None,
    resume_seconds: float = DEFAULT_SECONDS,
    name: str = "scan",
    independent: bool = False,
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
        disk: Existing directory for a private scratch file; None recomputes within memory.
        disk_limit: Most bytes of it.
        observers: Objects with `on_action` and `on_transfer`.
        tier: Storage to use in place of a scratch file; left empty and open, for its owner to close.
        costs: Times to plan with; measured on the first steps when None.
        on_plan: Called with the chosen plan before the forward sweep.
        on_report: Called with the report of each reverse sweep; its `trace` tells what happened when.
        verify: Compare every state that is computed again, or fetched, with what it was the first
            time, bit for bit.  Steps then run one by one, and take a hash and 8 bytes a leaf more.
            In a scan that is resumed, states of the process before were not seen.
        stuck_seconds: Wait no longer than this for storage; what it does not deliver is recomputed.
        resume: Existing directory that makes the sweeps durable, in place of `disk`.  After a kill, a loss of
            power or an exception, the same call goes on where they were: a scan whose forward
            sweep had ended returns at once, and its reverse sweep, for the same cotangents, goes on
            below what it had done.  The files are removed when it has ended.  Where no derivative
            is taken nothing is made durable.  A scan that was begun with another program, other arrays,
            inputs or wanted gradients, or host functions of `jax.pure_callback` that reach something
            else, is refused, and so is one whose steps, a few of which are run again, do other than
            they did.
        resume_seconds: Work that may be lost.
        name: Finds the scan again among others in the directory.
        independent: The ranks are independent: no step communicates.  Without it, a run beside other ranks of MPI,
            `torch.distributed` or JAX is refused.

    Returns:
        The final carry, and the stacked ys.

    Raises:
        TypeError, ValueError: As `jax.lax.scan`: a carry whose type changes, no length, a traced one.
        BudgetError: `memory` is less than one carry, or with `resume` two.
        ResumeError: What is in `resume` under this name is of another scan, other parameters or
            inputs included, or another process is working on it.
        StepError: `f` has side effects.
        UsageError: A derivative is taken within `jax.jit` or `jax.vmap`, in forward mode, or a second time.
        ReplayError: A step gave something else when it was run again, and `verify` is set.
    """
    settings = Settings(
        memory,
        disk=disk,
        disk_limit=disk_limit,
        observers=tuple(observers),
        tier=tier,
        costs=costs,
        stuck_seconds=stuck_seconds,
        independent=independent,
    )
    parse_bytes(memory)
    seconds = check_seconds(resume_seconds)
    if resume is not None:
        refuse_resuming(steps=0, tier=tier, compress=None, disk=disk)

    def call(init: Any, xs: Any) -> Any:
        return lax.scan(f, init, xs, length=length, reverse=reverse)

    if _is_empty(xs, length):
        return call(init, xs)  # type: ignore[no-any-return]
    traced = Traced(call, (init, xs), "scan")
    title = f"scan of {getattr(f, '__name__', type(f).__name__)}"
    steps = traced.eqn.params["length"]
    hooks, names = Hooks(on_plan, on_report), _names(init) if verify else None
    durable = None if resume is None else Where(resume, name, seconds, _names(init))
    result = Call(traced, title, settings, hooks, steps, reverse=reverse, names=names, durable=durable).run()
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
    on_report: Callable[[Report], None] | None = None,
    verify: bool = False,
    stuck_seconds: float = 30.0,
    independent: bool = False,
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
        tier: Storage to use in place of a scratch file; left empty and open, for its owner to close.
        costs: Times to plan with.
        on_plan: Called with the chosen plan.
        on_report: Called with the report of each reverse sweep.
        verify: Compare states with what they were.
        stuck_seconds: Wait no longer than this for storage.
        independent: The ranks are independent: no step communicates.

    Returns:
        The final carry.

    Raises:
        TypeError, ValueError: As `jax.lax.while_loop`.
        BudgetError, StepError, UsageError: As `scan`.
        StorageError: Storage does not work.
    """
    if max_steps is not None:
        most = whole_number(max_steps)
        if most is None or most < 0:
            raise UsageError(f"max_steps must be an integer of at least 0, not {max_steps!r}")
        max_steps = most
    settings = Settings(
        memory,
        disk=disk,
        disk_limit=disk_limit,
        observers=tuple(observers),
        tier=tier,
        costs=costs,
        stuck_seconds=stuck_seconds,
        independent=independent,
    )
    parse_bytes(memory)

    def call(init: Any) -> Any:
        return lax.while_loop(cond_fun, body_fun, init)

    traced = Traced(call, (init_val,), "while")
    name = getattr(body_fun, "__name__", type(body_fun).__name__)
    hooks, names = Hooks(on_plan, on_report), _names(init_val) if verify else None
    return Call(traced, f"while_loop of {name}", settings, hooks, None, most=max_steps, names=names).run()


def _names(carry: Any) -> list[str]:
    """What to call each leaf of a carry: its key path."""
    found, _ = jax.tree_util.tree_flatten_with_path(carry)
    return ["carry" + jax.tree_util.keystr(path) for path, _ in found]


def _is_empty(xs: Any, length: Any) -> bool:
    """Whether there is no step: nothing to store, and nothing to run."""
    leaves = jax.tree.leaves(xs)
    return any(np.shape(leaf)[:1] == (0,) for leaf in leaves) or (not leaves and whole_number(length) == 0)
