"""Runs of which only the shapes are wanted, or what is touched: nothing is computed, drawn or changed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode


@contextmanager
def on_stand_ins() -> Iterator[None]:
    """Inside it operators get stand-ins for their tensors, which have a shape and no values."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    mode = FakeTensorMode()
    with torch.no_grad(), mode, _OnStandIns(mode):
        yield


class _OnStandIns(TorchDispatchMode):
    supports_higher_order_operators = True

    def __init__(self, mode: Any) -> None:
        super().__init__()
        self._mode = mode

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        def stand_in(tensor: torch.Tensor) -> Any:
            return tensor if getattr(tensor, "fake_mode", None) is self._mode else self._mode.from_tensor(tensor)

        args, kwargs = pytree.tree_map_only(torch.Tensor, stand_in, (args, kwargs or {}))
        return func(*args, **kwargs)
