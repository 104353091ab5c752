"""Steps run many at a time: the compiled functions of one loop.

Owns what is compiled.  Each function takes up to `size` steps and is told how many, so
that no length of a sequence has it compiled again.  Arrays are raw (see `arrays`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend import core

from longtape.jax.arrays import Kind, is_inexact, raw
from longtape.jax.compiled import compiled, says_all
from longtape.jax.residuals import Adjoint, Leaves
from longtape.jax.traced import Loop

CHUNK_NBYTES = 1 << 20
"""Bytes of residuals, inputs and outputs that a chunk may have, if it is to have more than one step."""

LONGEST = 4096
"""Most steps of a chunk: by then a call costs little beside them."""

_COUNT = jax.ShapeDtypeStruct((), jnp.int32)


class Chunks:
    """The compiled functions of a loop.

    Args:
        loop: What to run.
        wanted_consts: Which consts get a cotangent; None: no cotangents are wanted at all.
        wanted_x: Which leaves of x do.
        most_nbytes: Most bytes of residuals a chunk may have, if it is to have more than one step; 0: it has one.
    """

    def __init__(
        self, loop: Loop, wanted_consts: Sequence[bool] | None, wanted_x: Sequence[bool], most_nbytes: int
    ) -> None:
        self.loop = loop
        self.wanted = list(wanted_consts or []), list(wanted_x)
        """Which consts, and which leaves of x, get a cotangent."""
        self._step = core.jaxpr_as_fun(loop.step)
        consts, carry, x = loop.inputs
        self.consts, self.carry, self.x = [[Kind(aval) for aval in avals] for avals in (consts, carry, x)]
        self.y = [Kind(aval) for aval in loop.outputs[1]]
        self.adjoint = None if wanted_consts is None else Adjoint(loop, wanted_consts, wanted_x)
        made = [] if self.adjoint is None else self.adjoint.constants
        self.constants = [raw(array) for array in made]
        self.kept = [] if self.adjoint is None else self.adjoint.kinds
        self._made = [Kind(array) for array in map(jnp.asarray, made)]
        self.carry_bars = [kind for kind in self.carry if is_inexact(kind.typed)]
        self.y_bars = [kind for kind in self.y if is_inexact(kind.typed)]
        self.const_bars = [kind for kind, wanted in zip(self.consts, wanted_consts or [], strict=False) if wanted]
        self.x_bars = [kind for kind, wanted in zip(self.x, wanted_x, strict=True) if wanted]
        self.residual_nbytes: int = sum(kind.nbytes for kind in self.kept)
        widest = max(self.residual_nbytes, sum(k.nbytes for k in self.x), sum(k.nbytes for k in self.y), 1)
        room = min(CHUNK_NBYTES, most_nbytes)
        self.size = min(LONGEST, 1 << max(0, (room // widest).bit_length() - 1))
        self._shared = says_all(loop.step, loop.condition)

    # Forward ---------------------------------------------------------------------------------

    def _typed(self, kinds: Sequence[Kind], arrays: Leaves) -> Leaves:
        return [kind.restore(array) for kind, array in zip(kinds, arrays, strict=True)]

    def _all_consts(self, consts: Leaves) -> Leaves:
        return self._typed([*self.consts, *self._made], consts)

    def _goes_on(self, condition: Leaves) -> Callable[[Leaves], Any]:
        loop = self.loop
        if loop.condition is None:
            return lambda carry: True
        test = core.jaxpr_as_fun(loop.condition)
        typed = self._typed([Kind(aval) for aval in loop.condition.in_avals[: loop.condition_consts]], condition)
        return lambda carry: test(*typed, *carry)[0]

    def _sweep(self, condition: Leaves, carry: Leaves, stacks: Leaves, count: Any, step: Any) -> Any:
        """Up to `count` steps; returns how many, the carry and the filled stacks."""
        goes_on = self._goes_on(condition)

        def more(state: Any) -> Any:
            index, carry, _ = state
            return jnp.logical_and(index < count, goes_on(self._typed(self.carry, carry)))

        def body(state: Any) -> Any:
            index, carry, stacks = state
            carry, results = step(index, self._typed(self.carry, carry))
            stacks = [
                lax.dynamic_update_index_in_dim(stack, raw(result), index, 0)
                for stack, result in zip(stacks, results, strict=True)
            ]
            return index + 1, [raw(leaf) for leaf in carry], stacks

        return lax.while_loop(more, body, (jnp.int32(0), carry, stacks))

    def _x_at(self, xs: Leaves, index: Any) -> Leaves:
        return self._typed(self.x, [lax.dynamic_index_in_dim(stack, index, keepdims=False) for stack in xs])

    def _advance(self, condition: Leaves, consts: Leaves, carry: Leaves, xs: Leaves, ys: Leaves, count: Any) -> Any:
        typed = self._all_consts(consts)[: len(self.consts)]

        def step(index: Any, carry: Leaves) -> tuple[Leaves, Leaves]:
            results = list(self._step(*typed, *carry, *self._x_at(xs, index)))
            return results[: len(self.carry)], results[len(self.carry) :] if ys else []

        return self._sweep(condition, carry, ys, count, step)

    def _record(
        self, condition: Leaves, consts: Leaves, carry: Leaves, xs: Leaves, ys: Leaves, kept: Leaves, count: Any
    ) -> Any:
        assert self.adjoint is not None
        adjoint, typed = self.adjoint, self._all_consts(consts)

        def step(index: Any, carry: Leaves) -> tuple[Leaves, Leaves]:
            carry, y, residuals = adjoint.record(typed, carry, self._x_at(xs, index))
            return carry, [*(y if ys else []), *residuals]

        reached, carry, stacks = self._sweep(condition, carry, [*ys, *kept], count, step)
        return reached, carry, stacks[: len(ys)], stacks[len(ys) :]

    # Reverse ---------------------------------------------------------------------------------

    def _pull_back(
        self,
        consts: Leaves,
        kept: Leaves,
        xs: Leaves,
        ys_bar: Leaves,
        const_bars: Leaves,
        carry_bar: Leaves,
        xs_bar: Leaves,
        count: Any,
    ) -> Any:
        assert self.adjoint is not None
        adjoint, typed = self.adjoint, self._all_consts(consts)
        prepared = adjoint.prepare(typed)

        def body(turn: Any, state: Any) -> Any:
            const_bars, carry_bar, xs_bar = state
            index = count - 1 - turn
            at = [lax.dynamic_index_in_dim(stack, index, keepdims=False) for stack in kept]
            x = self._x_at(xs, index) if adjoint.needs_x else []
            y_bar = [lax.dynamic_index_in_dim(stack, index, keepdims=False) for stack in ys_bar]
            found = adjoint.pull_back(typed, prepared, self._typed(self.kept, at), x, [*carry_bar, *y_bar])
            of_consts, carry_bar, of_x = found
            const_bars = [total + bar for total, bar in zip(const_bars, of_consts, strict=True)]
            xs_bar = [
                lax.dynamic_update_index_in_dim(stack, bar, index, 0) for stack, bar in zip(xs_bar, of_x, strict=True)
            ]
            return const_bars, carry_bar, xs_bar

        return lax.fori_loop(0, count, body, (const_bars, carry_bar, xs_bar))

    # Compiled --------------------------------------------------------------------------------

    def _condition_types(self) -> Leaves:
        loop = self.loop
        return [] if loop.condition is None else [Kind(a).raw for a in loop.condition.in_avals[: loop.condition_consts]]

    def _compile(self, function: Any, types: tuple[Any, ...], donated: tuple[int, ...]) -> Any:
        weak = tuple(aval.weak_type for aval in self.loop.step.out_avals if hasattr(aval, "weak_type"))
        return compiled(function, types, donated, weak, shared=self._shared)

    def _ahead(self, *, ys: bool) -> tuple[Any, ...]:
        return (
            self._condition_types(),
            [kind.raw for kind in [*self.consts, *self._made]],
            [kind.raw for kind in self.carry],
            self.stacks(self.x),
            self.stacks(self.y) if ys else [],
        )

    def stacks(self, kinds: Sequence[Kind]) -> list[jax.ShapeDtypeStruct]:
        """Types of chunks of these leaves."""
        return [kind.stacked(self.size) for kind in kinds]

    @cached_property
    def advance(self) -> Any:
        """``(condition, consts, carry!, xs, ys!, count) -> (reached, carry, ys)``; ! is donated."""
        return self._compile(self._advance, (*self._ahead(ys=True), _COUNT), (2, 4))

    @cached_property
    def advance_again(self) -> Any:
        """The same without ys: give none."""
        if not self.y:
            return self.advance
        return self._compile(self._advance, (*self._ahead(ys=False), _COUNT), (2, 4))

    @cached_property
    def record(self) -> Any:
        """``(condition, consts, carry!, xs, ys!, kept!, count) -> (reached, carry, ys, kept)``."""
        return self._compile(self._record, (*self._ahead(ys=True), self.stacks(self.kept), _COUNT), (2, 4, 5))

    @cached_property
    def record_again(self) -> Any:
        """The same without ys: give none."""
        if not self.y:
            return self.record
        return self._compile(self._record, (*self._ahead(ys=False), self.stacks(self.kept), _COUNT), (2, 4, 5))

    def _back(self) -> tuple[Any, ...]:
        assert self.adjoint is not None
        return (
            [kind.raw for kind in [*self.consts, *self._made]],
            self.stacks(self.kept),
            self.stacks(self.x) if self.adjoint.needs_x else [],
            self.stacks(self.y_bars),
            [jax.ShapeDtypeStruct(kind.shape, kind.dtype) for kind in self.const_bars],
            [jax.ShapeDtypeStruct(kind.shape, kind.dtype) for kind in self.carry_bars],
            self.stacks(self.x_bars),
            _COUNT,
        )

    @cached_property
    def pull_back(self) -> Any:
        """``(consts, kept, xs, ys_bar, const_bars!, carry_bar!, xs_bar!, count)``; returns the three donated."""
        return self._compile(self._pull_back, self._back(), (4, 5, 6))

    def programs(self) -> list[core.ClosedJaxpr]:
        """What `record` and `pull_back` are compiled from, derivative rules of the user's included."""
        ahead = *self._ahead(ys=True), self.stacks(self.kept), _COUNT
        return [jax.make_jaxpr(self._record)(*ahead), jax.make_jaxpr(self._pull_back)(*self._back())]
