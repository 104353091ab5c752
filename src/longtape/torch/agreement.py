"""Whether two ways of running one step agree: in results, cotangents and gradients.

Owns what "agree" means.  Bits may differ where a step computes in place on part of a
tensor: operators round otherwise on rows than on contiguous memory, and a graph has no
memory to compute in.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch

from longtape.torch.structure import Leaves

Cotangents = list[torch.Tensor | None]
Outcome = dict[tuple[str, int], torch.Tensor | None]


class Stepper(Protocol):
    """Runs a step, one way or another."""

    def try_step(self, index: int, carry: Leaves, x: Leaves) -> tuple[Leaves, Leaves, Cotangents, Cotangents]:
        """Results of a step, and the cotangents of carry and x for cotangents of one."""

    def closed_over(self) -> Leaves:
        """The tensors it used that require a gradient."""

    def gradients(self) -> Cotangents:
        """Theirs, in that order."""


def outcome(stepper: Stepper, index: int, carry: Leaves, x: Leaves) -> Outcome:
    """Everything that a step gives at this state, by name."""
    new_carry, y, carry_bar, x_bar = stepper.try_step(index, carry, x)
    parts: dict[str, Sequence[torch.Tensor | None]] = {"a leaf of the carry": new_carry, "a leaf of y": y}
    parts |= {"the gradient of a carry leaf": carry_bar, "the gradient of an x leaf": x_bar}
    named: Outcome = {(name, k): leaf for name, leaves in parts.items() for k, leaf in enumerate(leaves)}
    for tensor, bar in zip(stepper.closed_over(), stepper.gradients(), strict=True):
        named["the gradient of a closed-over tensor", id(tensor)] = bar
    return named


def disagreement(ours: Outcome, theirs: Outcome, index: int) -> tuple[str | None, str | None]:
    """Why captured graphs cannot stand for the step, and what differs by rounding only."""
    if ours.keys() != theirs.keys():
        return f"on step {index}, they close over other tensors than the step run as it is", None
    differ = [name for name in ours if not same_bits(ours[name], theirs[name])]
    wrong = [name for name in differ if not agree(ours[name], theirs[name])]
    said: Callable[[str], str] = f"on step {index}, {{}} differs from that of the step run as it is".format
    if wrong:
        return said(wrong[0][0]), None
    return None, said(differ[0][0]) if differ else None


def same_bits(a: torch.Tensor | None, b: torch.Tensor | None) -> bool:
    """Whether two tensors hold the same values, NaN included; None is zero."""
    if a is None or b is None:
        return all(part is None or not part.any() for part in (a, b))
    return bool(((a == b) | ((a != a) & (b != b))).all())


def agree(a: torch.Tensor | None, b: torch.Tensor | None) -> bool:
    """Whether two tensors are equal but for rounding, measured against the largest number in them."""
    if a is None or b is None:
        return False  # the one that is there is not zero
    if not (a.is_floating_point() or a.is_complex()):
        return False
    tolerance = 3.0 * torch.finfo(a.dtype).eps ** 0.5
    size = float(torch.nan_to_num(b.detach()).abs().max()) if b.numel() else 0.0
    return torch.allclose(a, b, rtol=tolerance, atol=tolerance * size, equal_nan=True)
