"""What a step reads and writes beside its carry and its x, found by watching its operators.

Owns the rules of what a step may touch: it may read any tensor from outside, and may
write to its carry and to tensors it has made itself.  Anything else would come out
differently when the step is run again, and is refused before it happens.

The step runs without gradients on detached carry and inputs, so a tensor that requires
a gradient and reaches an operator was closed over (or made inside the step, and is
gone after it).  One thread at a time.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from typing import Any

import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from longtape.errors import StepError
from longtape.torch.generators import Generators, refusal
from longtape.torch.standins import on_stand_ins
from longtape.torch.structure import Leaves

RUNS_EXAMINED = 2
"""Runs in which it is also found out what a step keeps for itself; a second run of the same step would read it."""

_aten = torch.ops.aten
_RUNNING_STATISTICS = {
    _aten.native_batch_norm.default: 5,
    _aten.cudnn_batch_norm.default: 5,
    _aten.miopen_batch_norm.default: 5,
}
"""Operators that write to arguments 3 and 4 without saying so, if the argument at this place is true."""


def tensors_in(args: Iterable[Any]) -> Iterator[torch.Tensor]:
    """The tensors among the arguments of an operator."""
    for arg in args:
        if isinstance(arg, torch.Tensor):
            yield arg
        elif isinstance(arg, (list, tuple)):
            yield from tensors_in(arg)


def memory_of(tensor: torch.Tensor) -> int:
    """Identifies the memory that a tensor and its views share, as long as one of them lives."""
    try:
        return int(tensor.untyped_storage()._cdata)
    except (NotImplementedError, RuntimeError):  # sparse tensors have none
        return id(tensor)


class Closures(TorchDispatchMode):
    """Watches the runs of one step; enter it around each, between `begin` and `end`.

    Inside it nothing may be compiled, see `compiling`.


    Args:
        notes: Note what the step reads.  False where it runs with gradients, and makes tensors that require one.
    """

    supports_higher_order_operators = True

    def __init__(self, *, notes: bool = True) -> None:
        super().__init__()
        self._notes = notes
        self.generators = Generators()
        self.takes_functions = False
        """Whether the step used an operator that takes functions, whose gradients need TorchDynamo."""
        self.some_died = False
        """Whether the step made tensors of its own that require a gradient."""
        self._found: dict[int, weakref.ref[torch.Tensor]] = {}
        self._outside: dict[int, weakref.ref[torch.Tensor]] = {}
        """By memory: a tensor from outside."""
        self._runs = 0
        self._index = 0
        self._carry: list[int] = []
        self._x: set[int] = set()
        self._made: set[int] = set()
        self._borrowed: dict[int, torch.Tensor] = {}
        """Memory of carry leaves that the step before returned without having made them."""
        self._dependent: set[int] | None = None
        """In examined runs: memory that holds what depends on carry, x or parameters."""
        self._dependents: list[weakref.ref[torch.Tensor]] = []
        self._kept: dict[int, weakref.ref[torch.Tensor]] = {}
        self._writes: dict[Any, tuple[tuple[int, str], ...]] = {}

    # Around a run ------------------------------------------------------------------------------

    def begin(self, index: int, carry: Leaves, x: Leaves) -> None:
        """Step `index` is about to run."""
        self._index, self._made = index, set()
        self.generators.begin()
        self._carry, self._x = [memory_of(leaf) for leaf in carry], {memory_of(leaf) for leaf in x}
        self._runs += 1
        self._dependent = {*self._carry, *self._x} if self._runs <= RUNS_EXAMINED else None

    def end(self, carry: Leaves, y: Leaves) -> None:
        """It has run, and returned these."""
        ours = self._made.union(set(self._carry) - self._borrowed.keys())
        self._borrowed = {memory: leaf for leaf in carry if (memory := memory_of(leaf)) not in ours}
        if self._dependent is None:
            return
        returned = {memory_of(leaf) for leaf in [*carry, *y]}
        for reference in self._dependents:
            tensor = reference()
            if tensor is not None and memory_of(tensor) not in returned:
                self._kept[memory_of(tensor)] = reference
        self._dependents, self._dependent = [], None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = [*tensors_in(args), *tensors_in(kwargs.values())] if kwargs else list(tensors_in(args))
        made, depends = self._made, False
        if func is _aten.lift_fresh.default:  # what torch.tensor() has just made
            made.add(memory_of(args[0]))
        for tensor in given:
            memory = memory_of(tensor)
            if self._notes and tensor.requires_grad and id(tensor) not in self._found:
                self._note(tensor)
            if memory not in made and memory not in self._outside:
                self._meet(tensor, memory)
            if self._dependent is not None:
                depends = depends or tensor.requires_grad or memory in self._dependent
        self._check_writes(func, args, kwargs or {})
        if isinstance(func, torch._ops.HigherOrderOperator):
            self.takes_functions = True
            if func.name() == "cond":
                self._watch_branches(*args)
            args = pytree.tree_map_only(callable, self._watched, args)
        result = func(*args, **kwargs) if kwargs else func(*args)
        for tensor in tensors_in((result,)):
            memory = memory_of(tensor)
            if memory not in self._outside and memory not in self._x and memory not in self._carry:
                made.add(memory)
            if depends:
                self._mark(tensor, memory)
        return result

    def _watched(self, branch: Callable[..., Any]) -> Callable[..., Any]:
        """A function that a higher-order operator is given; it would call it unwatched."""

        def watched(*args: Any, **kwargs: Any) -> Any:
            with self:
                return branch(*args, **kwargs)

        return watched

    def _watch_branches(self, _: Any, if_true: Any, if_false: Any, operands: Any) -> None:
        """Meet what both branches close over: autograd gives a gradient, of zeros, to the one that is not taken."""
        for branch in (if_true, if_false):
            with suppress(Exception), on_stand_ins(), self:
                branch(*operands)

    # Reading -----------------------------------------------------------------------------------

    def _note(self, tensor: torch.Tensor) -> None:
        identity = id(tensor)

        def forget(_: object) -> None:
            self._found.pop(identity, None)
            self.some_died = True

        self._found[identity] = weakref.ref(tensor, forget)

    def _meet(self, tensor: torch.Tensor, memory: int) -> None:
        """Note a tensor met for the first time in this run, unless it is the step's own."""
        if memory in self._x or memory in self._carry:
            return
        kept = self._kept.get(memory)
        if kept is not None and kept() is not None:
            self._refuse(
                f"reads a tensor of shape {list(tensor.shape)} that an earlier run of the step has computed from its "
                "carry, its x or parameters and kept; put it in the carry, or compute it before the scan"
            )
        self._outside[memory] = weakref.ref(tensor, lambda _: self._outside.pop(memory, None))

    def _mark(self, tensor: torch.Tensor, memory: int) -> None:
        assert self._dependent is not None
        self._dependent.add(memory)
        self._dependents.append(weakref.ref(tensor))

    # Writing -----------------------------------------------------------------------------------

    def _check_writes(self, func: Any, args: Any, kwargs: dict[str, Any]) -> None:
        places = self._writes.get(func)
        if places is None:
            places = self._writes[func] = _written_arguments(func)
        for position, name in places:
            for tensor in tensors_in((args[position] if position < len(args) else kwargs.get(name),)):
                self._check_write(func, tensor)
        if func in _RUNNING_STATISTICS and args[_RUNNING_STATISTICS[func]]:
            for tensor in tensors_in(args[3:5]):
                self._check_write(func, tensor)
        generator = kwargs.get("generator")
        if generator is not None and not self.generators.is_repeatable(generator):
            self._refuse(refusal(func))

    def _check_write(self, func: Any, tensor: torch.Tensor) -> None:
        memory = memory_of(tensor)
        if memory in self._made:
            return
        if memory in self._x:
            self._refuse(f"modifies its input x in place ({func}), which would change what it is run on again")
        elif memory in self._borrowed:
            self._refuse(
                f"modifies its carry in place ({func}), where the step before returned an x or a closed-over tensor "
                "as the carry, which would change; return a clone of it"
            )
        elif self._carry.count(memory) > 1:
            self._refuse(f"modifies its carry in place ({func}), two leaves of which share memory; return a clone")
        elif memory not in self._carry:
            self._refuse(
                f"modifies a tensor of shape {list(tensor.shape)} that it closes over in place ({func}), so it would "
                "not compute the same when it is run again; put the tensor in the carry, or switch the update off "
                "(such as running statistics, with .eval())"
            )

    def _refuse(self, what: str) -> None:
        raise StepError(f"step {self._index} {what}")

    # Afterwards --------------------------------------------------------------------------------

    def tensors(self) -> Leaves:
        """Tensors requiring a gradient that were met and still live, in the order they were met."""
        return [tensor for ref in self._found.values() if (tensor := ref()) is not None]

    def outside(self) -> Leaves:
        """Tensors from outside that were read, whether or not they require a gradient, and still live."""
        return [tensor for ref in list(self._outside.values()) if (tensor := ref()) is not None]


def _written_arguments(func: Any) -> tuple[tuple[int, str], ...]:
    """Positions and names of the arguments that an operator writes to."""
    schema = getattr(func, "_schema", None)
    if schema is None or not schema.is_mutable:
        return ()
    arguments = [(k, argument.name, argument.alias_info) for k, argument in enumerate(schema.arguments)]
    return tuple((k, name) for k, name, alias in arguments if alias and alias.is_write)


class Created(TorchDispatchMode):
    """Keeps the tensors that operators return, so that leaves made inside a step can be told apart.

    Refuses draws that are not repeatable, too.
    """

    supports_higher_order_operators = True

    def __init__(self, index: int) -> None:
        super().__init__()
        self.made: dict[int, torch.Tensor] = {}
        self._index, self._generators = index, Generators()

    def ignore_compile_internals(self) -> bool:  # type: ignore[override]
        """What is compiled inside makes no leaves: TorchDynamo need not refuse to compile it."""
        return True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        generator = (kwargs or {}).get("generator")
        if generator is not None and not self._generators.is_repeatable(generator):
            raise StepError(f"step {self._index} {refusal(func)}")
        result = func(*args, **(kwargs or {}))
        for tensor in tensors_in((result,)):
            self.made[id(tensor)] = tensor
        return result
