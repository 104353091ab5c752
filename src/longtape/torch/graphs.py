"""What a captured step is made of.

This file owns the data that the tracer, the programs and the tape share, and the error
that says a step cannot be had in this form.  It computes nothing of weight.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import fx

from longtape.errors import LongtapeError


class CaptureFailed(LongtapeError):
    """The step cannot be turned into graphs; the message is one line that says why.

    Nothing has been changed: the step can be run as it is instead.
    """


@dataclass(frozen=True, slots=True)
class Operand:
    """What one input of the graph is."""

    role: str
    """``"carry"``, ``"x"`` or ``"closed"``."""

    index: int
    """Which carry leaf, x leaf or closed-over tensor."""


@dataclass(frozen=True, slots=True)
class Residual:
    """Where one stored value lies in a step's part of the buffer."""

    node: fx.Node
    offset: int
    nbytes: int
    size: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device


@dataclass(eq=False)
class StepGraph:
    """One step, split into forward and backward."""

    operands: list[Operand]
    carry_leaves: int
    x_leaves: int
    placeholders: list[fx.Node]
    outputs: list[fx.Node]
    """The carry's tensors in their order, then y's."""

    tangents: list[fx.Node | None]
    """Per output: the placeholder of its cotangent, or None where it has none."""

    gradients: list[fx.Node | None]
    """Per input: its cotangent's node, or None."""

    forward: list[fx.Node]
    backward: list[fx.Node]
    """In the order of the trace; begins with the views that are taken again."""

    residuals: list[Residual] = field(default_factory=list)
    """In the order they lie in the buffer; the last `linkable` may be left out of it."""

    linkable: int = 0
    """How many residuals, all at the end, are carry leaves that the step before may have stored."""

    nbytes: int = 0
    """What a step takes, all its residuals stored."""

    linked_nbytes: int = 0
    """What a step takes whose linkable residuals the step before has stored."""

    stored_carry: dict[int, int] = field(default_factory=dict)
    """Carry leaf → the residual that holds its new value."""

    uses_rng: bool = False
    needs_x: bool = False
    """Backward reads x leaves."""

    carry_slots: list[int | None] = field(default_factory=list)
    """Per carry leaf its output; None where the leaf is None."""

    y_slots: list[int | None] | None = None
    """Per leaf of y its output; None until the graph has run once."""

    compared: bool = False
    """Whether it was compared with the step itself."""

    rounding: str | None = None
    """In what it differs from the step by rounding, if it does."""

    cache: dict[Any, Any] = field(default_factory=dict)
    """Compiled programs, kept by ``programs.py``."""

    @cached_property
    def linked_leaves(self) -> list[int]:
        """The carry leaf of each linkable residual."""
        by_node = dict(zip(self.placeholders, self.operands, strict=True))
        return [by_node[r.node].index for r in self.residuals[len(self.residuals) - self.linkable :]]

    @cached_property
    def closed_inputs(self) -> list[int]:
        """The inputs that are closed-over tensors."""
        return [k for k, operand in enumerate(self.operands) if operand.role == "closed"]

    @cached_property
    def devices(self) -> frozenset[torch.device]:
        """Where the residuals are when backward reads them."""
        return frozenset(r.device for r in self.residuals)


@dataclass(frozen=True, slots=True)
class Signature:
    """What the inputs and outputs of a traced function are."""

    operands: list[Operand]
    """Per input."""

    differentiable: list[bool]
    """Per output: whether it requires grad."""

    carry_positions: list[int]
    """The carry leaves that are tensors; the outputs begin with their new values."""

    carry_leaves: int
    x_leaves: int


_LEAF = re.compile(r"L\['leaves'\]\[(\d+)\]")


def leaf_number(source: str) -> int | None:
    """Which argument leaf a Dynamo source names, or None for a closed-over tensor.

    Raises:
        CaptureFailed: it is part of a leaf, such as its ``.grad``.
    """
    whole = _LEAF.fullmatch(source)
    if whole is None and _LEAF.search(source):
        raise CaptureFailed(f"the step reads an attribute of one of its arguments ({source})")
    return int(whole[1]) if whole else None
