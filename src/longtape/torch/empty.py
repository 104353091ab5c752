"""A scan of no steps: the carry as it was, and ys of length zero."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from longtape.torch.compiling import uncompiled
from longtape.torch.inputs import Inputs


def scan_nothing(step: Callable[[Any, Any], Any], init: Any, inputs: Inputs) -> tuple[Any, Any]:
    """The carry, and ys with a first dimension of zero; None where only running the step would tell its y."""
    carry = pytree.tree_map_only(torch.Tensor, torch.clone, init)
    return carry, _ys(step, init, inputs)


def _ys(step: Callable[[Any, Any], Any], init: Any, inputs: Inputs) -> Any:
    from torch._subclasses.fake_tensor import FakeTensorMode

    if inputs.length is not None and not inputs.stacked:
        return None  # read lazily, and there is nothing to read
    mode = FakeTensorMode()
    x = inputs.structure.build([leaf.detach().new_empty(leaf.shape[1:]) for leaf in inputs.stacked])
    try:
        carry, x = pytree.tree_map_only(torch.Tensor, mode.from_tensor, (init, x))
        with torch.no_grad(), uncompiled(), mode, _OnStandIns(mode):
            _, y = step(carry, x)
    except Exception:  # it asks for values, which nothing has
        return None
    return pytree.tree_map_only(torch.Tensor, _none_of, y)


class _OnStandIns(TorchDispatchMode):
    """Gives operators stand-ins for the tensors that a step closes over, so that it cannot change them."""

    def __init__(self, mode: Any) -> None:
        super().__init__()
        self._mode = mode

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = pytree.tree_map_only(torch.Tensor, self._mode.from_tensor, (args, kwargs or {}))
        return func(*args, **kwargs)


def _none_of(leaf: torch.Tensor) -> torch.Tensor:
    return torch.empty((0, *leaf.shape), dtype=leaf.dtype, device=leaf.device)
