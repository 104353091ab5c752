"""The user's step run as captured graphs, with residuals laid out as bytes.

Thin: joins a `Tape` (which owns the graphs) to what a scan job asks of a stepper, and
keeps the captured graphs of steps seen before.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch

from longtape.errors import StepError
from longtape.protocols import Bytes
from longtape.torch.agreement import disagreement, outcome
from longtape.torch.autocast import without_autocast
from longtape.torch.blocks import Block
from longtape.torch.capture import CapturedStep, rng_states, set_back
from longtape.torch.eager import Cotangents, EagerStep, ones_like
from longtape.torch.graphs import CaptureFailed, StepGraph
from longtape.torch.inputs import Inputs
from longtape.torch.structure import Leaves, Structure
from longtape.torch.tape import Cotangent, Tape, total

_MOST_KEPT = 64
_kept: OrderedDict[Any, CapturedStep] = OrderedDict()


def _captured(step: Callable[..., Any], carry: Structure, x: Structure, leaves: Leaves, compiled: bool) -> CapturedStep:
    """The graphs of this step for leaves of these shapes, from an earlier call where there was one."""
    step = getattr(step, "users_step", step)  # what a loop makes of it shares its code with all others
    owner = getattr(step, "__func__", step)
    like = tuple((leaf.shape, leaf.dtype, leaf.device) for leaf in leaves)
    key = (getattr(owner, "__code__", type(step)), carry.spec, carry.present, x.spec, x.present, like, compiled)
    if key in _kept:
        _kept.move_to_end(key)
    else:
        _kept[key] = CapturedStep(carry.spec, x.spec, compiled=compiled)
        if len(_kept) > _MOST_KEPT:
            _kept.popitem(last=False)
    return _kept[key]


class CapturedSteps:
    """One user's step, called through its graphs.

    Args:
        step: ``step(carry, x) -> (carry, y)``.
        inputs: x of every step.
        carry: Structure of the carry.
        like: Leaves of one carry.
        wants_x: Which leaves of x need a cotangent.
        as_it_is: Makes what runs the step as it is; each graph is compared with it where it first answers.
        exactly: Whether graphs must give the very bits of the step.
        compiled: Hand the graphs to PyTorch's compiler.
        room: Gives memory for the residuals of steps that are only tried.

    Raises:
        CaptureFailed: The step was found impossible to capture before.
    """

    def __init__(
        self,
        step: Callable[..., Any],
        inputs: Inputs,
        carry: Structure,
        like: Leaves,
        wants_x: list[bool],
        *,
        as_it_is: Callable[[], EagerStep],
        exactly: bool = False,
        compiled: bool = False,
        room: Callable[[int], Bytes | torch.Tensor],
    ) -> None:
        self._room, self._as_it_is, self._exactly = room, as_it_is, exactly
        self._trusted: set[StepGraph] = set()
        self._comparing = False
        x = inputs.leaves(0)
        self._captured = _captured(step, carry, inputs.structure, [*like, *x], compiled)
        if self._captured.failure is not None:
            raise CaptureFailed(self._captured.failure)
        self._step = step
        self._tape = Tape(self._captured, step)
        self._carry, self._inputs, self._wants_x = carry, inputs, wants_x
        self._like = [(leaf.shape, leaf.dtype) for leaf in like]
        self._first = True
        self._y_leaves: Leaves = []
        self.y: Structure | None = None
        """Of what steps return beside the carry; None before the first call."""

    @property
    def rounding(self) -> str | None:
        """What differs from the step run as it is by no more than rounding, if anything does."""
        return next((graph.rounding for graph in self._trusted if graph.rounding is not None), None)

    def as_block(self, memory: Bytes | torch.Tensor) -> Block:
        """Memory of `block_nbytes` bytes as a residual block; keep it with the memory."""
        return self._tape.block(memory)

    def spare_block(self, steps: int = 1) -> Block:
        """Room for the residuals of some steps, outside any budget."""
        return self.as_block(self._room(self.block_nbytes(steps)))

    @property
    def only_graph(self) -> StepGraph | None:
        """The graph that all steps so far took; None where there were several."""
        graphs = self._captured.graphs
        return graphs[0] if len(graphs) == 1 else None

    def try_step(
        self, index: int, carry: Leaves, x: Leaves
    ) -> tuple[Leaves, Leaves, list[torch.Tensor | None], list[torch.Tensor | None]]:
        """Results of a step, and the cotangents of carry and x for cotangents of one."""
        block = self.spare_block()
        new_carry, y, number = self.record(index, carry, x, block, 0)
        ones = ones_like([*new_carry, *y])
        with without_autocast():
            bars = self.pull_back(number, block, 0, x, list(ones[: len(new_carry)]), list(ones[len(new_carry) :]))
        return new_carry, y, totals(bars[0]), totals(bars[1])

    def _trust(self, index: int, carry: Leaves, x: Leaves) -> None:
        """Compare the graph that has just answered with the step itself, once, at this very state.

        Raises:
            CaptureFailed: They disagree; or by rounding, where the very bits are wanted.
        """
        graph = self._captured.answer
        if graph in self._trusted or self._comparing:
            return
        if not graph.compared:
            wrong, graph.rounding = self._compare(index, carry, x)
            if wrong is not None:
                self._captured.failure = wrong
                raise CaptureFailed(wrong)
            graph.compared = True
        if graph.rounding is not None and self._exactly:
            raise CaptureFailed(f"{graph.rounding} in the last bits; capture=True accepts that")
        self._trusted.add(graph)

    def _compare(self, index: int, carry: Leaves, x: Leaves) -> tuple[str | None, str | None]:
        """Run the step both ways, from the same random state, on a tape of its own; see `disagreement`."""
        states, tape, step = rng_states([*carry, *x]), self._tape, self._as_it_is()
        self._tape, self._comparing = Tape(self._captured, self._step, new_run=False), True
        try:
            ours = outcome(self, index, carry, x)
            with self._captured.outside_settings():
                set_back(states)
                step.advance(index, _copies(carry), _copies(x))  # which finds what it closes over
                set_back(states)
                theirs = outcome(step, index, _copies(carry), _copies(x))
        finally:
            self._tape, self._comparing = tape, False
            set_back(states)
        return disagreement(ours, theirs, index)

    def forget(self) -> None:
        """Start anew, as if no step had been run: what was pulled back so far does not count."""
        self._tape = Tape(self._captured, self._step)

    def running(self) -> AbstractContextManager[None]:
        """Hold this around each sweep."""
        return self._tape.running()

    def _x(self, x: Leaves) -> list[Any]:
        if any(self._wants_x):
            for leaf, wants in zip(x, self._wants_x, strict=True):
                leaf.requires_grad_(wants)
        return self._inputs.structure.expand(x)

    def _leaves(self, index: int, carry: list[Any], y: list[Any]) -> tuple[Leaves, Leaves]:
        if self._first:
            self._learn(index, carry, y)
        return self._carry.contract(carry), [leaf for leaf in y if leaf is not None]

    def _learn(self, index: int, carry: list[Any], y: list[Any]) -> None:
        """Check the first results; the graphs are guarded, so later ones are like them."""
        for position, (leaf, like) in enumerate(zip(self._carry.contract(carry), self._like, strict=True)):
            if (leaf.shape, leaf.dtype) != like:
                raise StepError(
                    f"step {index} changed carry leaf {position} from {like[1]}{list(like[0])} to "
                    f"{leaf.dtype}{list(leaf.shape)}; a carry keeps its type"
                )
        self.y = Structure(self._captured.y_spec, tuple(leaf is not None for leaf in y))
        self._first = False

    def advance(self, index: int, carry: Leaves, x: Leaves) -> tuple[Leaves, Leaves]:
        """Run one step, keeping nothing."""
        results = self._leaves(index, *self._tape.advance(self._carry.expand(carry), self._x(x)))
        self._trust(index, carry, x)
        return results

    def record(self, index: int, carry: Leaves, x: Leaves, block: Block, position: int) -> tuple[Leaves, Leaves, int]:
        """Run one step and keep its residuals; the number names the graph it took."""
        new_carry, y, number = self._tape.record(self._carry.expand(carry), self._x(x), block, position)
        results = self._leaves(index, new_carry, y)
        self._trust(index, carry, x)
        return *results, number

    def pull_back(
        self, number: int, block: Block, position: int, x: Leaves, carry_bar: list[Cotangent], y_bar: Cotangents
    ) -> tuple[list[Cotangent], list[Cotangent]]:
        """Cotangents of the carry and x of one step, from its residuals."""
        assert self.y is not None
        carry, of_x = self._tape.pull_back(
            number,
            block,
            position,
            x=self._inputs.structure.expand(x),
            carry_cotangents=self._carry.expand(carry_bar),
            y_cotangents=self.y.expand(y_bar),
        )
        return self._carry.contract(carry), self._inputs.structure.contract(of_x)

    def needs_x(self, number: int) -> bool:
        """Whether `pull_back` reads x."""
        return self._tape.needs_x(number)

    def block_nbytes(self, steps: int) -> int:
        """Bytes of a block of consecutive steps; known after the first call."""
        return self._captured.block_nbytes(steps)

    @property
    def stride_nbytes(self) -> int:
        """Bytes each further step of a block takes."""
        return self._captured.stride_nbytes

    def rehearse(self, carry: Leaves, xs: list[Leaves]) -> None:
        """Run the first steps every way there is, to know what they close over, return and leave."""
        block, start = self.spare_block(len(xs)), carry
        for index, x in enumerate(xs):
            carry, self._y_leaves, _ = self.record(index, carry, x, block, index)
        self.advance(0, start, xs[0])

    @property
    def y_leaves(self) -> Leaves:
        """What a rehearsed step returned beside the carry."""
        return self._y_leaves

    def marks(self) -> list[str]:
        """Of the graphs that steps run so far took, in the order of their numbers; equal marks, equal residuals."""
        return self._tape.marks()

    def accumulated(self) -> list[torch.Tensor | None]:
        """What `pull_back` has accumulated so far, in the order of the closed-over tensors."""
        return self.gradients()

    def put_accumulated(self, gradients: list[torch.Tensor | None]) -> None:
        """Go on from these."""
        self._tape.put_gradients(gradients)

    def closed_over(self) -> Leaves:
        """Every tensor requiring a gradient that steps run so far have used, beside carry and x."""
        return [tensor for tensor, _ in self._tape.gradients()]

    def outside(self) -> Leaves:
        """Every tensor that steps run so far have read, beside carry and x."""
        return [tensor for entry in self._tape._entries for tensor in entry.closed]

    def begin_reverse(self, closed: Leaves) -> None:
        """Check that nothing was changed since; the tape accumulates by itself."""
        self._tape.check_unmodified()

    def gradients(self) -> list[torch.Tensor | None]:
        """What `pull_back` has accumulated, in the order of `closed_over`."""
        return [gradient for _, gradient in self._tape.gradients()]


def _copies(leaves: Leaves) -> Leaves:
    return [leaf.detach().clone() for leaf in leaves]


def totals(cotangents: list[Cotangent]) -> list[torch.Tensor | None]:
    """Cotangents as plain tensors."""
    return [total(cotangent) for cotangent in cotangents]
