"""What a step leaves behind: the first run of step 0, done as the plain loop does it.

The sweeps run steps without gradients, or record them later.  A tensor that a step computes and
keeps would therefore have no gradient, or one that nobody asks for.  Step 0 is first run with
gradients, and its results are dropped: what it made and still lives is what it keeps.

A step may keep its results, and what it computed from parameters alone, which is the same at each
run: such as a weight that is cached, or made from others.  Anything else it changes shows when
step 0 is run once more.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from longtape.errors import StepError
from longtape.reach import Place
from longtape.torch.closures import tensors_in
from longtape.torch.eager import EagerStep
from longtape.torch.replayed import LastResults
from longtape.torch.structure import Leaves, unique
from longtape.torch.surroundings import Surroundings


class Made(TorchFunctionMode):
    """Remembers the tensors that PyTorch's functions return, as long as somebody holds them."""

    def __init__(self) -> None:
        super().__init__()
        self._made: list[weakref.ref[torch.Tensor]] = []

    def add(self, tensors: Leaves) -> None:
        """And these."""
        self._made += map(weakref.ref, tensors)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.add(list(tensors_in((result,))))
        return result

    def alive(self) -> Leaves:
        """Those that still live, each once."""
        return unique([tensor for ref in self._made if (tensor := ref()) is not None])


Left = tuple[Place, int | torch.Tensor]
"""A place where the steps leave a result, by its position among the leaves of the carry and y, or this tensor."""


@dataclass(frozen=True, slots=True)
class _Trial:
    """A run of step 0 with gradients, after its results were dropped."""

    results: LastResults
    returned: dict[int, int]
    """Position of each result, the leaves of the carry first, by identity; only of results that still live."""
    own: Leaves
    """The leaves that the step's carry and x came from."""
    kept: Leaves
    """What the step made, that has a graph and that still lives."""

    def depends(self, tensor: torch.Tensor) -> bool:
        """Whether it was computed from the carry or x."""
        own = {id(leaf) for leaf in self.own}
        return any(id(getattr(node, "variable", None)) in own for node in _graph([tensor]))


def examine(
    step: EagerStep, fresh: Callable[[], Leaves], x: Leaves, before: Surroundings, now: Callable[[], Surroundings]
) -> tuple[list[Left], Surroundings]:
    """Run step 0 as the plain loop does, and see what it keeps and changes.

    Args:
        step: Whose step to run.
        fresh: Gives the first carry, and sets PyTorch's generators back.
        x: Of step 0.
        before: What the step reaches.
        now: Tells what it reaches after a run.

    Returns:
        What it leaves, to be given its gradient; and what the step reaches from then on.

    Raises:
        StepError: The step keeps what it computed from its carry or x, or changes what it reaches.
    """
    first = _run_once(step, fresh, x)
    after = now()
    changed = before.differences(after, tensors=True)
    places, cached = _sort(first, after)
    if not changed and not cached:
        return places, after
    second = _run_once(step, fresh, x)
    later = now()
    if again := after.differences(later, tensors=True):
        raise changes_what_it_reaches("step 0", again)
    _, made_anew = _sort(second, later)
    for tensor in made_anew:
        if all(tensor is not other for other in cached):
            holders = later.bindings_of(tensor)
            if not holders:
                raise left_behind("step 0", tensor, later.path_of(tensor))
            places += [(place, tensor) for place in holders]
    if (leaf := first.results.difference(second.results)) is not None:
        what = f"changes {_listed(changed)}" if changed else "keeps something"
        raise StepError(
            f"step 0 {what} the first time it is run, and then gives another {leaf}. It is run more than once, so its "
            "adjoint would be taken of another step; put what it changes in the carry, or set it before the scan"
        )
    return places, later


def _run_once(step: EagerStep, fresh: Callable[[], Leaves], x: Leaves) -> _Trial:
    made = Made()
    with torch.enable_grad():
        first = _sequence_number(torch.zeros((), requires_grad=True).clone())
    try:
        own, given, (carry_out, y_out) = step.run_with_gradients(fresh(), x, made)
    except StepError:
        raise
    except Exception:
        # Operators that take functions need TorchDynamo for their gradients, which refuses to trace what is watched.
        # Where the step itself fails, it does so again.
        own, given, (carry_out, y_out) = step.run_with_gradients(fresh(), x, None)
    made.add(given)
    results = LastResults(0, carry_out, y_out)
    positions = [(weakref.ref(leaf), position) for position, leaf in enumerate([*carry_out, *y_out])]
    del given, carry_out, y_out

    def kept() -> Leaves:
        return [tensor for tensor in made.alive() if _sequence_number(tensor) >= first]

    if kept():
        gc.collect()  # what only a cycle of references holds is not kept
    returned = {id(leaf): position for ref, position in positions if (leaf := ref()) is not None}
    return _Trial(results, returned, own, kept())


def _sequence_number(tensor: torch.Tensor) -> int:
    return -1 if tensor.grad_fn is None else tensor.grad_fn._sequence_nr()


def _sort(trial: _Trial, after: Surroundings) -> tuple[list[Left], Leaves]:
    """Places that hold results, and tensors that are kept and depend on parameters alone; others are refused."""
    places: list[Left] = []
    cached: Leaves = []
    held = [tensor for tensor in trial.kept if id(tensor) in after.tensors]
    saved = _graph(held)  # of what has a holder, the graph keeps some
    for tensor in held + [tensor for tensor in trial.kept if tensor.grad_fn not in saved]:
        holders = after.bindings_of(tensor)
        if id(tensor) in trial.returned and holders:
            places += [(place, trial.returned[id(tensor)]) for place in holders]
        elif trial.depends(tensor):
            raise left_behind("step 0", tensor, after.path_of(tensor))
        else:
            cached.append(tensor)
    return places, cached


def _graph(tensors: Leaves) -> set[Any]:
    """The nodes that lead to these tensors."""
    seen, pending = set[Any](), [tensor.grad_fn for tensor in tensors]
    while pending:
        node = pending.pop()
        if node is not None and node not in seen:
            seen.add(node)
            pending.extend(child for child, _ in node.next_functions)
    return seen


def left_behind(which: str, tensor: torch.Tensor, path: str | None) -> StepError:
    """Of a tensor that a step computes and keeps."""
    where = "somewhere that is not reached from its code, such as in a hook or a library" if path is None else path
    return StepError(
        f"{which} leaves a tensor of shape {list(tensor.shape)} behind in {where}. It would have no gradient: "
        "steps are run without gradients first, and again for their adjoints. Return it as y, put it in the carry, or "
        "detach it"
    )


def changes_what_it_reaches(which: str, changes: list[str]) -> StepError:
    """Of steps that count, log, or draw from generators of their own."""
    return StepError(
        f"{which} changes {_listed(changes)}. A step is run more than once, so it would not compute the same again; "
        "put it in the carry, return it as y, or remove it"
    )


def _listed(changes: list[str]) -> str:
    return "; ".join(changes[:3]) + (f"; and {len(changes) - 3} more" if len(changes) > 3 else "")
