"""The tape of one run of a captured step: advance, record, pull back.

This file owns what must be remembered of a run besides the residuals' bytes: which
graph each step took, the closed-over tensors it took with it, and the gradients that
accumulate for them.  It knows nothing of plans, tiers, or the order of calls.

Invariants:

* carry leaves that can have a gradient always require grad inside the step, whatever
  the caller passes, so that what is traced does not depend on it;
* programs run with gradients and autocast off: casts are part of the graph;
* what is kept per step is one small integer; closed-over tensors are held once.

Called from one thread at a time.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from longtape.errors import UsageError
from longtape.torch.blocks import Block, Bytes, RoomExceeded, Staging
from longtape.torch.capture import Call, CapturedStep, Leaves, below_autograd
from longtape.torch.compiled import compiled_backward
from longtape.torch.graphs import StepGraph
from longtape.torch.programs import backward_program

Tensors = list[torch.Tensor | None]

Cotangent = torch.Tensor | tuple[torch.Tensor, ...] | None
"""Of one leaf: undefined, a tensor, or contributions that are yet to be added from the left."""


class Accumulator:
    """The gradient of one closed-over tensor, summed in place over the steps."""

    __slots__ = ("tensor", "total")

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor
        self.total: torch.Tensor | None = None

    def add(self, contribution: torch.Tensor) -> None:
        """Add a contribution; it may share memory with anything."""
        if self.total is None:
            self.total = contribution.clone(memory_format=torch.contiguous_format)
        else:
            self.total.add_(contribution)


@dataclass(frozen=True, slots=True, eq=False)
class _Entry:
    """What steps have in common that took one graph with the same closed-over tensors."""

    graph: StepGraph
    before: StepGraph | None
    """The graph of the step before, where its residuals hold some of this step's."""
    closed: tuple[torch.Tensor, ...]
    versions: tuple[int, ...]
    accumulators: tuple[Accumulator | None, ...]


class Tape:
    """One run of a step under a `CapturedStep`, or with `new_run` off a trial within one."""

    def __init__(self, captured: CapturedStep, step: Callable[..., object], *, new_run: bool = True) -> None:
        self.captured = captured
        if new_run:
            captured.begin()
        self._step = step
        self._entries: list[_Entry] = []
        self._entries_of: dict[tuple[StepGraph, StepGraph | None], list[int]] = {}
        self._accumulators: dict[int, Accumulator] = {}
        self._staging: dict[object, Staging] = {}

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Hold this around each sweep: calls outside it work, and are slower."""
        with self.captured.settings():
            try:
                yield
            finally:
                self.captured.forget()

    def block(self, data: Bytes | torch.Tensor) -> Block:
        """Typed access to a buffer of `CapturedStep.block_nbytes` bytes, its start a multiple of 64.

        A tensor of bytes is a buffer on a device.

        Needs a first call of the step.  Making one costs little, its views are made when
        first used: keep it with the buffer.
        """
        return Block(data, self.captured.head_nbytes, self.captured.stride_nbytes, self._staging)

    # --- forward ---

    def advance(self, carry: Leaves, x: Leaves) -> tuple[Tensors, Tensors]:
        """Run one step, keeping nothing.

        Args:
            carry: leaves without a graph: detached, or what the last step returned.
            x: leaves without a graph; those that are to get a cotangent require grad.

        Returns:
            The leaves of the new carry and of y.  Some may share memory with each other,
            with arguments or with closed-over tensors: read them, copy them, do not
            change them.  Carry leaves may require grad; none has a graph.

        Raises:
            CaptureFailed: nothing was run; run the step as it is, here and from here on.
        """
        call = self.captured.run(self._step, _ready(carry), x, saving=False)
        graph = call.graph
        assert graph is not None
        self._intern(graph, None, call.inputs)
        return _take(call, graph)

    def record(self, carry: Leaves, x: Leaves, block: Block, position: int) -> tuple[Tensors, Tensors, int]:
        """Run one step and copy its residuals to its place in `block`.

        Args:
            carry: as in `advance`.  Where it is what the step at ``position - 1`` returned,
                leaves stored there are not stored again.
            x: as in `advance`.
            block: from `block`; positions are filled in order from 0.
            position: of this step in the block.

        Returns:
            The leaves of the new carry and of y, as in `advance`, and the number that
            `pull_back` wants for this step.  Equal steps have equal numbers.

        Raises:
            CaptureFailed: as in `advance`.
            RoomExceeded: the step was run, its residuals did not fit.
        """
        ready = _ready(carry)
        call = self.captured.run(self._step, ready, x, saving=True)
        graph = call.graph
        assert graph is not None
        before = block.linked(position, graph, ready)
        number = self._intern(graph, before, call.inputs)
        residuals, call.residuals = call.residuals, []
        new_carry, y = _take(call, graph)
        try:
            with below_autograd():
                block.store(position, graph, residuals, linked=before is not None)
        except RoomExceeded as error:
            error.carry, error.y = new_carry, y
            raise
        block.remember(position, graph, new_carry)
        return new_carry, y, number

    # --- reverse ---

    def needs_x(self, number: int) -> bool:
        """Whether pulling back through this step reads x."""
        return self._entries[number].graph.needs_x

    def pull_back(
        self,
        number: int,
        block: Block,
        position: int,
        *,
        x: Leaves,
        carry_cotangents: Sequence[Cotangent],
        y_cotangents: Sequence[Cotangent],
    ) -> tuple[list[Cotangent], list[Cotangent]]:
        """Take cotangents back through one recorded step; runs no forward code, builds no graph.

        Args:
            number: from `record`.
            block: holds the bytes that the block given to `record` held.
            position: as in `record`.
            x: what `record` was given; not read unless `needs_x`.
            carry_cotangents: per leaf of the step's new carry, as `pull_back` returned them for the step after.
            y_cotangents: per leaf of y.

        Returns:
            Cotangents of the leaves of the step's carry and x; `total` turns one into a
            tensor.  They may share memory with arguments.  Those of closed-over tensors
            are added to `gradients`.
        """
        entry = self._entries[number]
        graph = entry.graph
        pattern, flat = _pattern(graph, carry_cotangents, y_cotangents)
        program = (compiled_backward if self.captured.compiled else backward_program)(graph, pattern)
        residuals = block.load(position, graph, entry.before)
        with below_autograd():
            if torch._C._is_any_autocast_enabled():
                with torch._C._DisableAutocast():
                    result = program(residuals, entry.closed, x, flat, entry.accumulators)
            else:
                result = program(residuals, entry.closed, x, flat, entry.accumulators)
        carry, of_x = result
        return carry, of_x

    def gradients(self) -> list[tuple[torch.Tensor, torch.Tensor | None]]:
        """The closed-over tensors that require grad, in the order first met, each with its gradient so far.

        Complete in tensors after the forward sweep, in gradients after the reverse one.  A
        gradient belongs to the caller once the reverse sweep is over.
        """
        return [(a.tensor, a.total) for a in self._accumulators.values()]

    def put_gradients(self, gradients: Sequence[torch.Tensor | None]) -> None:
        """Go on accumulating from these, in the order of `gradients`; they belong to the tape now."""
        for accumulator, gradient in zip(self._accumulators.values(), gradients, strict=True):
            accumulator.total = gradient

    def marks(self) -> list[str]:
        """For each number that `record` has given, what the residuals of such a step are, in words.

        Steps with equal marks leave residuals that can stand for each other, also across processes.
        """
        known = {id(a.tensor): k for k, a in enumerate(self._accumulators.values())}

        def mark(graph: StepGraph | None) -> str:
            if graph is None:
                return "none"
            nodes = [
                f"{n.op} {n.target} {n.args} {n.kwargs}" for n in [*graph.placeholders, *graph.forward, *graph.backward]
            ]
            laid_out = [f"{r.node} {r.offset} {r.nbytes} {r.size} {r.stride} {r.dtype}" for r in graph.residuals]
            operands = [f"{o.role} {o.index}" for o in graph.operands]
            return repr((nodes, laid_out, operands, graph.linkable, sorted(graph.stored_carry.items())))

        return [
            repr((mark(e.graph), mark(e.before), [(known.get(id(t)), tuple(t.shape), str(t.dtype)) for t in e.closed]))
            for e in self._entries
        ]

    def check_unmodified(self) -> None:
        """Raise if a closed-over tensor was changed in place since a step first used it; call before reversing."""
        for entry in self._entries:
            for tensor, version in zip(entry.closed, entry.versions, strict=True):
                if tensor._version != version:
                    raise UsageError(
                        f"a tensor of shape {tuple(tensor.shape)} that the step closes over was changed in place "
                        "between the forward and the reverse sweep; its gradient would be wrong: change it after "
                        "backward, or give the step a copy"
                    )

    # --- closed-over tensors ---

    def _intern(self, graph: StepGraph, before: StepGraph | None, inputs: tuple[torch.Tensor, ...]) -> int:
        """The number of the entry for a graph and the closed-over tensors of a call."""
        closed = tuple([inputs[k] for k in graph.closed_inputs])
        numbers = self._entries_of.setdefault((graph, before), [])
        for number in reversed(numbers):
            held = self._entries[number].closed
            if all(map(_is_same, closed, held)):
                return number
        entry = _Entry(
            graph, before, closed, tuple(t._version for t in closed), tuple(self._accumulator(t) for t in closed)
        )
        self._entries.append(entry)
        numbers.append(len(self._entries) - 1)
        return numbers[-1]

    def _accumulator(self, tensor: torch.Tensor) -> Accumulator | None:
        if not tensor.requires_grad:
            return None
        return self._accumulators.setdefault(id(tensor), Accumulator(tensor))  # which holds the tensor, so the id lasts


def total(cotangent: Cotangent) -> torch.Tensor | None:
    """A cotangent as one tensor: contributions added from the left."""
    if not isinstance(cotangent, tuple):
        return cotangent
    result = cotangent[0]
    with torch.no_grad():
        for contribution in cotangent[1:]:
            result = result + contribution
    return result


def _is_same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two closed-over tensors are one: an object, or, without gradient, the same memory seen alike.

    A NumPy array comes as a new tensor at each call.  `b` is held, so its memory is not another's.
    """
    if a is b:
        return True
    return (
        not a.requires_grad
        and not b.requires_grad
        and a.data_ptr() == b.data_ptr()
        and (a.shape, a.stride(), a.dtype, a.device) == (b.shape, b.stride(), b.dtype, b.device)
    )


def _ready(carry: Leaves) -> Leaves:
    """The carry with every leaf that can have a gradient requiring one."""
    if all(leaf is None or leaf.requires_grad or not _can_have_gradient(leaf) for leaf in carry):
        return carry
    return [
        leaf if leaf is None or leaf.requires_grad or not _can_have_gradient(leaf) else leaf.detach().requires_grad_()
        for leaf in carry
    ]


def _can_have_gradient(tensor: torch.Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()


def _take(call: Call, graph: StepGraph) -> tuple[Tensors, Tensors]:
    """The results of the call as leaves; leaves no reference behind, so that memory is reused at once."""
    outputs = call.outputs
    call.outputs, call.inputs, call.leaves = (), (), ((), ())
    assert graph.y_slots is not None
    carry = [None if k is None else outputs[k] for k in graph.carry_slots]
    for leaf in carry:
        if leaf is not None and _can_have_gradient(leaf):
            leaf.requires_grad_()
    return carry, [None if k is None else outputs[k] for k in graph.y_slots]


def _pattern(
    graph: StepGraph, carry: Sequence[Cotangent], y: Sequence[Cotangent]
) -> tuple[tuple[int, ...], list[torch.Tensor]]:
    """How many contributions each output has, and all of them."""
    assert graph.y_slots is not None
    counts: list[int] = []
    flat: list[torch.Tensor] = []
    for slots, cotangents in ((graph.carry_slots, carry), (graph.y_slots, y)):
        for slot, cotangent in zip(slots, cotangents, strict=True):
            if slot is None:
                continue
            if cotangent is None or graph.tangents[slot] is None:
                counts.append(0)
            elif isinstance(cotangent, tuple):
                counts.append(len(cotangent))
                flat += cotangent
            else:
                counts.append(1)
                flat.append(cotangent)
    return tuple(counts), flat
