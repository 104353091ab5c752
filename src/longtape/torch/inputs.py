"""What a scan reads: stacked tensors, or anything with a length and an index, one step at a time."""

from __future__ import annotations

import operator
from typing import Any

import torch

from longtape.errors import UsageError
from longtape.torch.contract import is_dense, no_array
from longtape.torch.structure import Leaves, Structure, flatten


class Inputs:
    """The per-step inputs of a scan; `leaves(i)` are those of step i, detached."""

    length: int | None
    stacked: Leaves
    """Tensors whose first dimension is the step; empty for inputs read lazily."""

    reader: Any = None
    """Code of the caller's that is run to read x."""

    structure: Structure
    """Of the x of one step; for inputs read lazily, of the last one read."""

    def leaves(self, step: int) -> Leaves:
        """The tensors of one step, which must not be modified."""
        raise NotImplementedError

    def absent(self) -> Any:
        """In place of the tensors of a step, for who does not read them."""
        return [None] * len(self.structure.contract(self.structure.present))

    def check_repeatable(self) -> None:
        """Raise if the inputs of a step are others when they are read again."""


class NoInputs(Inputs):
    """``xs=None``: the step is given None."""

    def __init__(self) -> None:
        self.length, self.stacked = None, []
        _, self.structure = flatten(None)

    def leaves(self, step: int) -> Leaves:
        return []


class StackedInputs(Inputs):
    """A pytree of tensors with one common first dimension."""

    def __init__(self, tree: Any) -> None:
        self.stacked, self.structure = flatten(tree)
        self._detached = [leaf.detach() for leaf in self.stacked]
        lengths = {leaf.shape[0] if leaf.ndim else None for leaf in self.stacked}
        if len(lengths) > 1 or None in lengths:
            shapes = ", ".join(str(list(leaf.shape)) for leaf in self.stacked[:6])
            raise UsageError(
                f"the tensors in xs must share their first dimension, the steps; their shapes are {shapes}. "
                "To give one item a step, stack them, or pass an object with len() and indexing"
            )
        self.length = lengths.pop() if lengths else None

    def leaves(self, step: int) -> Leaves:
        return [leaf[step] for leaf in self._detached]


class LazyInputs(Inputs):
    """An object with ``len`` and indexing, such as a dataset or a memory map; never held whole."""

    def __init__(self, source: Any) -> None:
        self._source = source
        self.reader = source.__getitem__
        self.length, self.stacked = len(source), []
        _, self.structure = flatten(None)

    def leaves(self, step: int) -> Leaves:
        leaves, self.structure = flatten(self._source[step])
        tensors = [leaf if isinstance(leaf, torch.Tensor) else _as_tensor(leaf, step) for leaf in leaves]
        if any(tensor.requires_grad for tensor in tensors):
            raise UsageError(
                f"xs[{step}] requires a gradient, but xs is read lazily and would lose it; "
                "pass xs as stacked tensors, or detach what it returns"
            )
        return tensors

    def check_repeatable(self) -> None:
        for first, again in zip(self.leaves(0), self.leaves(0), strict=True):
            if first.shape != again.shape or not ((first == again) | (first != first)).all():
                raise UsageError(
                    "xs[0] has other values when it is read again, so the adjoint would be taken of other steps than "
                    "those that were run; draw random inputs before the scan, or from a seed that is made of the index"
                )


def _as_tensor(leaf: Any, step: int) -> torch.Tensor:
    try:
        return torch.tensor(leaf)
    except (TypeError, ValueError, RuntimeError) as error:
        raise UsageError(f"xs[{step}] holds a {type(leaf).__name__}, which is no tensor: {error}") from error


def as_inputs(xs: Any, length: int | None) -> tuple[Inputs, int]:
    """Understand `xs` and `length` as `jax.lax.scan` does; returns the inputs and the number of steps.

    Raises:
        UsageError: No length can be told, or the two disagree.
    """
    if length is not None:
        length = _as_integer(length)
    inputs = _understand(xs)
    if isinstance(xs, list) and inputs.stacked and inputs.length != length:
        raise UsageError(_ambiguous(xs, inputs.length))
    if inputs.length is None and length is None:
        raise UsageError("give xs, or length= when xs is None or empty")
    if inputs.length is not None and length is not None and inputs.length != length:
        raise UsageError(f"length={length}, but xs has {inputs.length} steps")
    steps = inputs.length if inputs.length is not None else length
    assert steps is not None
    return inputs, steps


def check_init(position: int, leaf: Any) -> None:
    """Raise unless this can be a leaf of the carry."""
    if not isinstance(leaf, torch.Tensor):
        raise UsageError(f"init leaf {position} is a {type(leaf).__name__}; a carry is a pytree of tensors")
    if wrong := no_array(leaf):
        raise UsageError(f"init leaf {position} is {wrong}")


def _ambiguous(xs: list[Any], steps: int | None) -> str:
    return (
        f"xs is a list of {len(xs)}: {len(xs)} steps, or as in JAX a pytree of tensors with {steps} steps? "
        "For one item a step pass torch.stack(xs), or an object with len() and indexing; "
        f"for a pytree pass a tuple, or add length={steps}"
    )


def _as_integer(length: Any) -> int:
    try:
        return operator.index(length)
    except TypeError:
        raise UsageError(f"length must be an integer, not {length!r}") from None


def _understand(xs: Any) -> Inputs:
    if xs is None:
        return NoInputs()
    leaves, _ = flatten(xs)
    odd = next((leaf for leaf in leaves if isinstance(leaf, torch.Tensor) and not is_dense(leaf)), None)
    if odd is not None:
        raise UsageError(
            f"xs holds a tensor of layout {odd.layout}; stacked xs are dense, one row a step: use xs.to_dense(), or "
            "close over it and pass what selects its part"
        )
    if all(isinstance(leaf, torch.Tensor) for leaf in leaves):
        return StackedInputs(xs)
    if len(leaves) == 1 and leaves[0] is xs and hasattr(xs, "__len__") and hasattr(xs, "__getitem__"):
        return LazyInputs(xs)
    odd = next(leaf for leaf in leaves if not isinstance(leaf, torch.Tensor))
    raise UsageError(
        f"xs must be a pytree of tensors, or one object with len() and indexing; it holds a {type(odd).__name__}"
    )
