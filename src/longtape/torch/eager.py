"""The user's step run as it is: plain calls forward, plain autograd for the adjoint.

Owns how a step is called, how the tensors it closes over are found, and how its
adjoint is taken.  Knows no sweep, slot or plan.

Closed-over tensors are found in the forward sweep (`closures`).  When the adjoint is
taken, the step's graph is walked: an edge that leaves it towards a tensor not found
before is an error, never a lost gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from longtape.errors import StepError
from longtape.torch.autocast import Ambient, without_autocast
from longtape.torch.closures import Closures, Created
from longtape.torch.compiling import uncompiled
from longtape.torch.contract import another_structure, is_dense, no_array, not_a_pair
from longtape.torch.inputs import Inputs
from longtape.torch.structure import Leaves, Structure, flatten
from longtape.torch.transforms import without_hooks

Cotangents = list[torch.Tensor | None]


def differentiable(tensor: torch.Tensor) -> bool:
    """Whether a tensor of this dtype can have a gradient."""
    return tensor.is_floating_point() or tensor.is_complex()


def ones_like(leaves: Leaves) -> Cotangents:
    """Cotangents of one for the leaves that can have any."""
    return [torch.ones_like(leaf, requires_grad=False) if differentiable(leaf) else None for leaf in leaves]


@dataclass(slots=True)
class Tape:
    """The autograd graph of one step, waiting for its adjoint."""

    step: int
    carry_in: Leaves
    x_in: Leaves
    carry_out: Leaves
    y_out: Leaves


class GradientWanted(Exception):
    """A plain loop met a tensor that requires a gradient."""


class EagerStep:
    """One user's step, called on leaves.

    Args:
        step: ``step(carry, x) -> (carry, y)``.
        inputs: Rebuilds x from its leaves.
        carry: Rebuilds the carry from its leaves.
        ambient: Autocast state to run under.
        wants_x: Which leaves of x need a cotangent.
    """

    def __init__(
        self, step: Callable[[Any, Any], Any], inputs: Inputs, carry: Structure, ambient: Ambient, wants_x: list[bool]
    ) -> None:
        self._step, self._inputs, self._ambient = step, inputs, ambient
        self._carry = carry
        self._wants_x = wants_x
        self.y: Structure | None = None
        """Of what steps return beside the carry; None before the first call."""
        self._y_like: list[tuple[torch.Size, torch.dtype]] | None = None
        self.closures: Closures | None = Closures()
        """Watches the forward sweep; None to run as the plain loop does, where no gradient is wanted."""
        self._mutates_carry = False
        self._gradients: dict[int, torch.Tensor] = {}
        self._owned: set[int] = set()
        self._closed: Leaves = []
        self._stand_ins: dict[int, torch.Tensor] = {}
        self._known: set[int] = set()
        self._outside_edges: set[tuple[Any, int]] = set()
        self._y_leaves: Leaves = []

    # Calling ---------------------------------------------------------------------------------

    def _call(self, index: int, carry: Leaves, x: Leaves) -> tuple[Leaves, Leaves]:
        versions = _versions(carry), _versions(x)
        result = self._step(self._carry.build(carry), self._inputs.structure.build(x))
        if not isinstance(result, tuple) or len(result) != 2:
            raise StepError(not_a_pair(index, result))
        carry_out = self._check_carry(index, result[0], carry)
        y_out = self._check_y(index, result[1])
        if _versions(x) != versions[1]:
            raise StepError(f"step {index} modifies its input x in place, which would change what it is run on again")
        self._mutates_carry |= _versions(carry) != versions[0]
        return carry_out, y_out

    def _check_carry(self, index: int, tree: Any, carry: Leaves) -> Leaves:
        leaves, structure = flatten(tree)
        if structure != self._carry:
            raise StepError(another_structure(index, tree, self._carry))
        for position, (leaf, before) in enumerate(zip(leaves, carry, strict=True)):
            if not isinstance(leaf, torch.Tensor):
                raise StepError(f"step {index} returned a {type(leaf).__name__} as carry leaf {position}, not a tensor")
            if wrong := no_array(leaf):
                raise StepError(f"step {index} returned as carry leaf {position} {wrong}")
            if leaf.shape != before.shape or leaf.dtype != before.dtype or leaf.device != before.device:
                raise StepError(
                    f"step {index} changed carry leaf {position} from {before.dtype}{list(before.shape)} on "
                    f"{before.device} to {leaf.dtype}{list(leaf.shape)} on {leaf.device}; a carry keeps its type"
                    + (
                        f": where autocast changes it, return leaf.to({before.dtype})"
                        if leaf.dtype != before.dtype
                        else ""
                    )
                )
        return leaves

    def _check_y(self, index: int, tree: Any) -> Leaves:
        leaves, structure = flatten(tree)
        for leaf in leaves:
            if not isinstance(leaf, torch.Tensor):
                raise StepError(
                    f"step {index} returned a {type(leaf).__name__} in y, not a tensor; use torch.as_tensor"
                )
            if not is_dense(leaf):
                raise StepError(f"step {index} returned in y {no_array(leaf)}")
        like = [(leaf.shape, leaf.dtype) for leaf in leaves]
        if self._y_like is None:
            self.y, self._y_like = structure, like
        elif like != self._y_like or structure != self.y:
            raise StepError(f"step {index} returned y as {like}; earlier steps returned {self._y_like}")
        return leaves

    def advance(self, index: int, carry: Leaves, x: Leaves) -> tuple[Leaves, Leaves]:
        """Run one step without gradients.

        Raises:
            GradientWanted: The step was run as the plain loop runs it, and uses a tensor that requires a gradient.
        """
        watched = self.closures
        if watched is None:
            with self._ambient():
                carry, y = self._call(index, carry, x)
            if torch.is_grad_enabled() and any(leaf.requires_grad for leaf in [*carry, *y]):
                raise GradientWanted
        else:
            watched.begin(index, carry, x)
            with torch.no_grad(), self._ambient(), uncompiled(), watched:
                carry, y = self._call(index, carry, x)
            watched.end(carry, y)
        return [leaf.detach() for leaf in carry], [leaf.detach() for leaf in y]

    def run_with_gradients(
        self, carry: Leaves, x: Leaves, mode: AbstractContextManager[Any] | None
    ) -> tuple[Leaves, Leaves, tuple[Leaves, Leaves]]:
        """Run step 0 as the plain loop does: watched, inside a mode; without one, as it is.

        Returns:
            The leaves that its arguments came from, its arguments, and its results.
        """
        watched = Closures(notes=False)
        with torch.enable_grad(), self._ambient():
            own = [leaf.detach().requires_grad_(differentiable(leaf)) for leaf in carry]
            own += [leaf.detach().requires_grad_(wants) for leaf, wants in zip(x, self._wants_x, strict=True)]
            given = [leaf.clone() for leaf in own]
            watched.begin(0, given[: len(carry)], given[len(carry) :])
            with ExitStack() as stack:
                for context in () if mode is None else (uncompiled(), mode, watched):
                    stack.enter_context(context)
                results = self._call(0, given[: len(carry)], given[len(carry) :])
        _refuse_hooks(0, given[: len(carry)])
        return own, given, results

    def rehearse(self, carry: Leaves, xs: list[Leaves]) -> None:
        """Run the first steps, to know what they close over and return."""
        for index, x in enumerate(xs):
            carry, self._y_leaves = self.advance(index, carry, x)

    @property
    def y_leaves(self) -> Leaves:
        """What a rehearsed step returned beside the carry."""
        return self._y_leaves

    def accumulated(self) -> list[torch.Tensor | None]:
        """What `pull_back` has accumulated so far, in the order of the closed-over tensors."""
        return self.gradients()

    def put_accumulated(self, gradients: list[torch.Tensor | None]) -> None:
        """Go on from these."""
        for tensor, gradient in zip(self._closed, gradients, strict=True):
            if gradient is not None:
                self._gradients[id(tensor)] = gradient
                self._owned.add(id(tensor))

    def closed_over(self) -> Leaves:
        """Every tensor requiring a gradient that steps run so far have used, beside carry and x."""
        return [] if self.closures is None else self.closures.tensors()

    def outside(self) -> Leaves:
        """Every tensor that steps run so far have read, beside carry and x."""
        return [] if self.closures is None else self.closures.outside()

    def forget(self) -> None:
        """Drop what was accumulated."""
        self._gradients, self._owned = {}, set()

    def try_step(self, index: int, carry: Leaves, x: Leaves) -> tuple[Leaves, Leaves, Cotangents, Cotangents]:
        """Results of a step, run before, and the cotangents of carry and x for cotangents of one."""
        self.begin_reverse(self.closed_over())
        _, tape = self.tape(index, carry, x)
        ones = ones_like(tape.carry_out + tape.y_out)
        with without_autocast():
            bars = self.pull_back(tape, ones[: len(tape.carry_out)], ones[len(tape.carry_out) :])
        return tape.carry_out, tape.y_out, *bars

    # Adjoint ---------------------------------------------------------------------------------

    def begin_reverse(self, closed: Leaves) -> None:
        """Start accumulating cotangents of the closed-over tensors, from nothing."""
        self._closed, self._gradients, self._owned = closed, {}, set()
        self._stand_ins = {id(tensor): tensor.detach().requires_grad_() for tensor in _dependent(closed)}
        self._known = {id(tensor) for tensor in [*closed, *self._stand_ins.values()]}
        own = [tensor for tensor in closed if tensor.grad_fn and id(tensor) not in self._stand_ins]
        self._outside_edges = {_edge(tensor) for tensor in own}

    def tape(self, index: int, carry: Leaves, x: Leaves) -> tuple[Leaves, Tape]:
        """Run one step with gradients; returns the detached carry and the graph."""
        made: dict[int, torch.Tensor] = {}
        with torch.enable_grad(), ExitStack() as stack:
            stack.enter_context(self._ambient())
            stack.enter_context(self._as_watched())
            carry_in = [leaf.detach().requires_grad_(differentiable(leaf)) for leaf in carry]
            x_in = [leaf.detach().requires_grad_(wants) for leaf, wants in zip(x, self._wants_x, strict=True)]
            if self.closures is not None and (self.closures.some_died or self.closures.generators.used):
                made = stack.enter_context(Created(index)).made
            if self._stand_ins:
                stack.enter_context(_StandIns(self._stand_ins))
            newest = torch.zeros((), requires_grad=True).clone().grad_fn
            # A leaf that requires a gradient must not be written to; a copy of it may.
            given = [leaf.clone() for leaf in carry_in] if self._mutates_carry else carry_in
            carry_out, y_out = self._call(index, given, x_in)
            _refuse_hooks(index, given)
            self._check_graph(index, newest, carry_in + x_in, carry_out + y_out, made)
        return [leaf.detach() for leaf in carry_out], Tape(index, carry_in, x_in, carry_out, y_out)

    def _check_graph(
        self, index: int, newest: Any, own: Leaves, outputs: Leaves, made: dict[int, torch.Tensor]
    ) -> None:
        """Every edge that leaves the step's graph must lead to a tensor whose cotangent is accounted for."""
        first = newest._sequence_nr()
        known = {id(tensor) for tensor in own} | self._known
        seen: set[Any] = set()
        pending = [_edge(leaf) for leaf in outputs if leaf.grad_fn is not None]
        while pending:
            edge = pending.pop()
            node = edge[0]
            if node in seen or edge in self._outside_edges:
                continue
            seen.add(node)
            variable = getattr(node, "variable", None)
            if variable is not None:
                if id(variable) not in known and id(variable) not in made:
                    raise _unknown_closure(index, variable)
            elif node._sequence_nr() < first:
                raise _unknown_closure(index, None)
            else:
                pending.extend(child for child in node.next_functions if child[0] is not None)

    def _as_watched(self) -> AbstractContextManager[None]:
        """Run compiled functions uncompiled, as in the forward sweep, so that they give the same bits."""
        return nullcontext() if self.closures is None or self.closures.takes_functions else uncompiled()

    def pull_back(self, tape: Tape, carry_bar: Cotangents, y_bar: Cotangents) -> tuple[Cotangents, Cotangents]:
        """Cotangents of the carry and x that one step was given; those of closed-over tensors accumulate."""
        outputs, seeds = [], []
        for leaf, bar in zip(tape.carry_out + tape.y_out, [*carry_bar, *y_bar], strict=True):
            if bar is not None and leaf.requires_grad:
                outputs.append(leaf)
                seeds.append(bar)
        own = [leaf for leaf in tape.carry_in + tape.x_in if leaf.requires_grad]
        targets = own + [self._stand_ins.get(id(tensor), tensor) for tensor in self._closed]
        if not outputs or not targets:
            found: Iterator[torch.Tensor | None] = iter([None] * len(targets))
        else:
            with without_hooks(self._closed), self._as_watched():  # a checkpoint inside the step runs it once more
                found = iter(_gradients(tape.step, outputs, targets, seeds))
        bars = [next(found) if leaf.requires_grad else None for leaf in tape.carry_in + tape.x_in]
        for tensor, gradient in zip(self._closed, found, strict=True):
            if gradient is not None:
                self._accumulate(tensor, gradient)
        count = len(tape.carry_in)
        return bars[:count], bars[count:]

    def _accumulate(self, tensor: torch.Tensor, gradient: torch.Tensor) -> None:
        identity = id(tensor)
        kept = self._gradients.get(identity)
        if kept is None:
            self._gradients[identity] = gradient  # perhaps shared with a cotangent still in use: not to be written to
        elif identity in self._owned and not gradient.is_sparse:
            kept.add_(gradient)
        else:
            self._gradients[identity] = kept + gradient
            self._owned.add(identity)

    def gradients(self) -> Cotangents:
        """What `pull_back` has accumulated, in the order of the closed-over tensors."""
        return [self._gradients.get(id(tensor)) for tensor in self._closed]


def _gradients(index: int, outputs: Leaves, targets: Leaves, seeds: Leaves) -> tuple[torch.Tensor | None, ...]:
    try:
        return torch.autograd.grad(outputs, targets, seeds, allow_unused=True)
    except RuntimeError as error:
        if "use_reentrant=True" not in str(error):
            raise
        raise StepError(
            f"step {index} calls torch.utils.checkpoint with use_reentrant=True, which works under .backward() only, "
            "while a scan asks autograd for the gradients of one step at a time; pass use_reentrant=False"
        ) from error


class _StandIns(TorchFunctionMode):
    """Replaces tensors by others wherever they are an argument."""

    def __init__(self, by_identity: dict[int, torch.Tensor]) -> None:
        super().__init__()
        self._by_identity = by_identity

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = pytree.tree_map_only(
            torch.Tensor, lambda tensor: self._by_identity.get(id(tensor), tensor), (args, kwargs or {})
        )
        return func(*args, **kwargs)


def _refuse_hooks(index: int, carry: Leaves) -> None:
    if any(leaf._backward_hooks or (leaf.retains_grad and not leaf.is_leaf) for leaf in carry):
        raise StepError(
            f"step {index} hooks into the gradient of the carry it is given, which lacks there what the step before "
            "adds to it by its y; register the hook on the new carry, before the step returns it"
        )


def _versions(leaves: Leaves) -> list[int]:
    return [0 if leaf.is_inference() else leaf._version for leaf in leaves]


def _edge(tensor: torch.Tensor) -> tuple[Any, int]:
    return tensor.grad_fn, tensor.output_nr


def _dependent(closed: Leaves) -> Leaves:
    """Those tensors that are computed from others of them.

    Asked for the gradients of both, autograd would go on from the one to the other outside the step, and what
    goes that way would be counted twice.
    """
    nodes = {tensor.grad_fn for tensor in closed if tensor.grad_fn is not None}
    identities = {id(tensor) for tensor in closed}
    return [tensor for tensor in closed if tensor.grad_fn is not None and _leads_to(tensor.grad_fn, nodes, identities)]


def _leads_to(start: Any, nodes: set[Any], identities: set[int]) -> bool:
    """Whether the graph behind a node holds one of these nodes or leaves."""
    seen, pending = {start}, [start]
    while pending:
        for child, _ in pending.pop().next_functions:
            if child is None or child in seen:
                continue
            if child in nodes or id(getattr(child, "variable", None)) in identities:
                return True
            seen.add(child)
            pending.append(child)
    return False


def _unknown_closure(index: int, variable: torch.Tensor | None) -> StepError:
    what = "a tensor" if variable is None else f"a tensor of shape {list(variable.shape)}"
    return StepError(
        f"when step {index} was run again for its adjoint it used {what} requiring a gradient that it did not use in "
        "the forward sweep, so the gradient would be lost; make the step depend on carry, x and fixed tensors only"
    )
