"""A scan of no steps: the carry as it was, and ys of length zero."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils import _pytree as pytree

from longtape.torch.compiling import uncompiled
from longtape.torch.inputs import Inputs
from longtape.torch.standins import on_stand_ins


def scan_nothing(step: Callable[[Any, Any], Any], init: Any, inputs: Inputs) -> tuple[Any, Any]:
    """The carry, and ys with a first dimension of zero; None where only running the step would tell its y."""
    carry = pytree.tree_map_only(torch.Tensor, torch.clone, init)
    return carry, _ys(step, init, inputs)


def _ys(step: Callable[[Any, Any], Any], init: Any, inputs: Inputs) -> Any:
    if inputs.length is not None and not inputs.stacked:
        return None  # read lazily, and there is nothing to read
    x = inputs.structure.build([leaf.detach().new_empty(leaf.shape[1:]) for leaf in inputs.stacked])
    try:
        with uncompiled(), on_stand_ins():
            carry, x = pytree.tree_map_only(torch.Tensor, torch.clone, (init, x))
            _, y = step(carry, x)
    except Exception:  # it asks for values, which nothing has
        return None
    return pytree.tree_map_only(torch.Tensor, _none_of, y)


def _none_of(leaf: torch.Tensor) -> torch.Tensor:
    return torch.empty((0, *leaf.shape), dtype=leaf.dtype, device=leaf.device)
