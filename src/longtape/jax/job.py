"""A JAX loop as a job: carries as working state, snapshots and residuals as bytes, many steps a call.

Owns the working carry, the stacked results and the cotangents of one loop.  Every method
that an action calls returns when its results are there, so that measured times are true
and no computation still reads a slot.  Bytes that leave a device for a slot may come later,
which the slot's guard says.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from longtape.errors import PlanError
from longtape.jax.arrays import Array, Kind, copied, empty, host, rows
from longtape.jax.chunks import Chunks
from longtape.jax.leaving import WayOut, pinned_beside
from longtape.layout import Fields
from longtape.measure import JobCosts
from longtape.protocols import Slot
from longtape.timing import MOST_BUSY_SECONDS, ONCE_SECONDS, TIMES, count_together, least_seconds, step_seconds
from longtape.witness import Witness


class LoopJob:
    """The `Job` of a loop.

    Args:
        chunks: The compiled loop.
        condition: What its condition closes over; raw.
        consts: What its step closes over; raw.
        init: State 0; raw, and never modified.
        xs: Stacked inputs; views of them, in the order of the steps.
        steps: N; None: found by the condition.
        most: Where a loop of unknown length ends in any case.
    """

    def __init__(
        self,
        chunks: Chunks,
        condition: list[Any],
        consts: list[Any],
        init: list[Any],
        xs: list[Array],
        steps: int | None,
        most: int | None = None,
    ) -> None:
        self.chunks, self.init, self._xs = chunks, init, xs
        self._condition, self._consts = condition, [*consts, *chunks.constants]
        self.fields = Fields([kind.nbytes for kind in chunks.carry])
        pinned = pinned_beside(init)
        self._way_out = None if pinned is None else WayOut(pinned)
        self.ys = [empty((steps or 0, *kind.shape), kind.dtype) for kind in chunks.y]
        """Stacked outputs; a caller may put a view in another order here."""
        self.steps = steps
        self._most = most
        self.carry: list[Any] = []
        self._reached = 0
        self._turned = False
        self._y_stage = self._zeros(chunks.y)
        self._kept_stage: list[Any] | None = None
        self._const_bars: list[Any] = []
        self._carry_bar: list[Any] = []
        self._ys_bar: list[Array | None] = []
        self._no_ys_bar: list[Any] = []
        self._x_stage: list[Any] = []
        self.xs_bar: list[Array] = []
        self._hand: tuple[int, int] | None = None
        """The chunk (first step, steps) whose residuals are where they were computed, and in no slot."""

    def _zeros(self, kinds: Sequence[Kind]) -> list[Any]:
        return [jnp.zeros(kind.shape, kind.dtype) for kind in self.chunks.stacks(kinds)]

    @property
    def stride_nbytes(self) -> int:
        """Bytes of the residuals of one step."""
        return max(1, self.chunks.residual_nbytes)

    @property
    def head_nbytes(self) -> int:
        """Bytes of a block beyond those of its steps: what aligning its parts may take."""
        return 64 * len(self.chunks.kept)

    # State -----------------------------------------------------------------------------------

    def _views(self, slot: Slot) -> list[Array]:
        if slot.views is None:
            parts = zip(self.chunks.carry, self.fields.split(slot.data), strict=True)
            slot.views = [kind.view(part) for kind, part in parts]
        return slot.views  # type: ignore[no-any-return]

    def save(self, slot: Slot) -> Slot:
        send = self._sender(slot)
        for view, leaf in zip(self._views(slot), self.carry, strict=True):
            send(leaf, view)
        return slot

    def _sender(self, slot: Slot) -> Callable[[Any, Array], None]:
        """Puts arrays into the slot, or the first rows of them: at once, or behind the steps that follow."""
        return _put_at_once if self._way_out is None else self._way_out.send(slot)

    def load(self, slot: Slot) -> None:
        if slot.guard is not None:
            slot.guard.wait()
        self.carry = jax.block_until_ready([copied(view) for view in self._views(slot)])

    def load_initial(self) -> None:
        # A copy, for the carry is donated to the steps and the caller's arrays are not ours to give.
        self.carry = [copied(leaf) for leaf in self.init]

    def yield_slot(self, slot: Slot) -> Slot:
        return slot

    def adopt(self, slots: list[Slot]) -> None:
        raise NotImplementedError

    def turn(self) -> None:
        self._turned = True

    # Steps -----------------------------------------------------------------------------------

    def _parts(self, start: int, stop: int) -> Iterator[tuple[int, int]]:
        size = self.chunks.size
        stop = stop if self._most is None else min(stop, self._most)
        for first in range(start, stop, size):
            yield first, min(size, stop - first)

    def _x_chunk(self, first: int, count: int) -> list[Array]:
        return [rows(stack, first, count, self.chunks.size) for stack in self._xs]

    def _put(self, first: int, count: int, ys: list[Any]) -> None:
        self._reached = first + count
        for stack, chunk in zip(self.ys, ys, strict=True):
            stack[first : first + count] = host(chunk)[:count]

    def _settled(self, first: int, count: int, reached: Any) -> int:
        """The state reached by a chunk."""
        return first + count if self.chunks.loop.condition is None else first + int(reached)

    def advance(self, start: int, stop: int) -> int:
        state = start
        for first, count in self._parts(start, stop):
            fresh = bool(self.chunks.y) and first + count > self._reached and not self._turned
            given = self._y_stage if fresh else []
            run = self.chunks.advance if fresh else self.chunks.advance_again
            xs = self._x_chunk(first, count)
            reached, self.carry, ys = run(self._condition, self._consts, self.carry, xs, given, np.int32(count))
            state = self._settled(first, count, reached)
            if fresh:
                self._y_stage = ys
                self._put(first, state - first, ys)
            if state < first + count:
                break
        jax.block_until_ready(self.carry)
        return state

    def reverse(self, start: int, stop: int) -> None:
        assert stop - start <= self.chunks.size
        self._record_chunk(start, stop - start)
        self._pull_back_chunk(start, stop - start, self._stage())

    # Residuals -------------------------------------------------------------------------------

    def _stage(self) -> list[Any]:
        if self._kept_stage is None:
            self._kept_stage = self._zeros(self.chunks.kept)
        return self._kept_stage

    def _block(self, slot: Slot) -> list[Array]:
        """The stacks of a block, one for each residual, as long as the slot has room for."""
        if slot.views is None:
            steps = (slot.data.nbytes - self.head_nbytes) // self.stride_nbytes
            kinds = self.chunks.kept
            parts = Fields([kind.nbytes * steps for kind in kinds]).split(slot.data)
            slot.views = [kind.view(part, steps) for kind, part in zip(kinds, parts, strict=True)]
        return slot.views  # type: ignore[no-any-return]

    def _record_chunk(self, first: int, count: int) -> int:
        fresh = bool(self.chunks.y) and first + count > self._reached and not self._turned
        given = self._y_stage if fresh else []
        run = self.chunks.record if fresh else self.chunks.record_again
        stage, self._kept_stage = self._stage(), None
        xs = self._x_chunk(first, count)
        reached, self.carry, ys, self._kept_stage = run(
            self._condition, self._consts, self.carry, xs, given, stage, np.int32(count)
        )
        state = self._settled(first, count, reached)
        if fresh:
            self._y_stage = ys
            self._put(first, state - first, ys)
        return state

    def record(self, start: int, stop: int, slot: Slot) -> int:
        """As the protocol says; but after the turn the last chunk stays where it was computed.

        A plan then pulls the window back at once, and nothing is copied.
        """
        self._hand = None
        block, state, send = self._block(slot), start, self._sender(slot)
        for first, count in self._parts(start, stop):
            state = self._record_chunk(first, count)
            if self._turned and first + count == stop:
                self._hand = first, count
                break
            for stack, chunk in zip(block, self._stage(), strict=True):
                send(chunk, stack[first - start : state - start])
            if state < first + count:
                break
        jax.block_until_ready(self.carry)
        return state

    def pull_back(self, start: int, stop: int, slot: Slot) -> None:
        block, hand = self._block(slot), self._hand
        if slot.guard is not None:
            slot.guard.wait()
        parts = list(self._parts(start, stop))
        if hand is not None and hand != parts[-1]:
            raise PlanError(f"steps {start} to {stop - 1} are pulled back, but steps {hand} were recorded last")
        for first, count in reversed(parts):
            if (first, count) == hand:
                kept = self._stage()
            else:
                kept = [rows(stack, first - start, count, self.chunks.size) for stack in block]
            self._pull_back_chunk(first, count, kept)
        self._hand = None

    def _pull_back_chunk(self, first: int, count: int, kept: list[Any]) -> None:
        chunks = self.chunks
        assert chunks.adjoint is not None
        xs = self._x_chunk(first, count) if chunks.adjoint.needs_x else []
        ys_bar = [
            zeros if stack is None else rows(stack, first, count, chunks.size)
            for stack, zeros in zip(self._ys_bar, self._no_ys_bar, strict=True)
        ]
        self._const_bars, self._carry_bar, self._x_stage = jax.block_until_ready(
            chunks.pull_back(
                self._consts, kept, xs, ys_bar, self._const_bars, self._carry_bar, self._x_stage, np.int32(count)
            )
        )
        for stack, chunk in zip(self.xs_bar, self._x_stage, strict=True):
            stack[first : first + count] = host(chunk)[:count]

    # Cotangents ------------------------------------------------------------------------------

    def begin_reverse(self, carry_bar: Sequence[Any], ys_bar: Sequence[Array | None], xs_bar: list[Array]) -> None:
        """Set the cotangents of the final carry and the stacked ys, of those leaves that have any (None: zero).

        Args:
            carry_bar: One for each leaf of the carry that may have a cotangent.
            ys_bar: One for each leaf of y that may have one, in the order of the steps.
            xs_bar: Where to put the cotangents of xs.
        """
        chunks = self.chunks
        self._ys_bar, self.xs_bar = list(ys_bar), xs_bar
        self._carry_bar = [
            jnp.zeros(kind.shape, kind.dtype) if bar is None else copied(jnp.asarray(bar, kind.dtype))
            for kind, bar in zip(chunks.carry_bars, carry_bar, strict=True)
        ]
        self._const_bars = [jnp.zeros(kind.shape, kind.dtype) for kind in chunks.const_bars]
        self._x_stage = self._zeros(chunks.x_bars)
        self._no_ys_bar = self._zeros(chunks.y_bars)

    def end_reverse(self) -> tuple[list[Any], list[Any]]:
        """Cotangents so far, in the end of the consts and of init, of those leaves that have any."""
        return self._const_bars, self._carry_bar

    # For a run that can be resumed -------------------------------------------------------------

    def begin_at(self, step: int) -> None:
        """The ys of the steps below this one are there."""
        self._reached = step

    def cotangents(self) -> tuple[list[Any], list[Array | None]]:
        """Of the carry as far as the adjoint has come, and of the ys."""
        return self._carry_bar, self._ys_bar

    def go_on_with(self, const_bars: list[Any], carry_bar: list[Any]) -> None:
        """Go on from these cotangents, which belong to the job now."""
        self._const_bars, self._carry_bar = const_bars, carry_bar

    # Measuring -------------------------------------------------------------------------------

    def measure(self, times: int = TIMES) -> JobCosts:
        """Time some first steps forward and through their adjoint, so many times; nothing is kept of it."""
        most = self.chunks.size if self.steps is None else min(self.chunks.size, self.steps)
        chunks, clock = self.chunks, time.perf_counter
        self.begin_reverse(
            [None] * len(chunks.carry_bars),
            [None] * len(chunks.y_bars),
            [np.zeros(k.shape, k.dtype) for k in chunks.stacks(chunks.x_bars)],
        )
        count = reached = 1

        def restore() -> None:
            self._reached = 0  # the first ys are computed once more
            self.load_initial()

        def advance() -> float:
            nonlocal reached
            restore()
            began = clock()
            reached = max(1, self.advance(0, count))
            return clock() - began

        def record() -> float:
            nonlocal reached
            restore()
            began = clock()
            reached = max(1, self._record_chunk(0, count))
            jax.block_until_ready(self.carry)
            return clock() - began

        def pull_back() -> float:
            began = clock()
            self._pull_back_chunk(0, reached, self._stage())
            return clock() - began

        def timed(run: Callable[[], float]) -> float:
            return least_seconds(run, times) / reached

        chunks.advance, chunks.record, chunks.pull_back  # noqa: B018  (compiled, before anything is timed)
        forward, times = step_seconds(advance, times)
        if forward <= ONCE_SECONDS:
            count = count_together(forward, most)
            forward = timed(advance)
        recorded, pulled = timed(record), timed(pull_back)
        restore()

        def busy() -> None:
            advance()

        return JobCosts(
            forward=forward,
            reverse=recorded + pulled,
            record=recorded,
            pull_back=pulled,
            busy=busy if count * forward <= MOST_BUSY_SECONDS else None,
            restore=restore,
        )


def _put_at_once(array: Any, target: Array) -> None:
    arrived = host(array)
    np.copyto(target, arrived if arrived.shape == target.shape else arrived[: len(target)])


class VerifiedLoopJob(LoopJob):
    """A loop whose states are compared with what they were the first time, bit for bit.

    Its chunks must have one step each, so that every state passes here.
    """

    _witness: Witness | None = None
    _loaded = True

    def watch(self, names: Sequence[str]) -> None:
        """Compare from now on.

        Args:
            names: What the leaves of the carry are called.
        """
        self._witness = Witness(names.__getitem__)

    @property
    def states_verified(self) -> int:
        """States that came out the same when they were computed again or fetched."""
        return 0 if self._witness is None else self._witness.compared

    def _see(self, state: int, *, kept: bool = False) -> None:
        if self._witness is not None:
            leaves = [host(leaf).reshape(-1).view(np.uint8) for leaf in self.carry]
            self._witness.see(state, leaves, kept=kept)

    def _see_loaded(self, start: int) -> None:
        if self._loaded:
            self._loaded = False
            self._see(start, kept=True)

    def _settled(self, first: int, count: int, reached: Any) -> int:
        state = super()._settled(first, count, reached)
        if state > first:
            self._see(state)
        return state

    def load(self, slot: Slot) -> None:
        super().load(slot)
        self._loaded = True

    def load_initial(self) -> None:
        super().load_initial()
        self._loaded = True

    def advance(self, start: int, stop: int) -> int:
        self._see_loaded(start)
        return super().advance(start, stop)

    def record(self, start: int, stop: int, slot: Slot) -> int:
        self._see_loaded(start)
        return super().record(start, stop, slot)

    def reverse(self, start: int, stop: int) -> None:
        self._see_loaded(start)
        super().reverse(start, stop)
