"""The memory behind a tensor, also where it is not one array: sparse, nested, or a subclass that wraps others."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import torch
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

_COMPRESSED_ROWS = (torch.sparse_csr, torch.sparse_bsr)
_COMPRESSED = (*_COMPRESSED_ROWS, torch.sparse_csc, torch.sparse_bsc)


def arrays_of(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """The dense tensors that hold a tensor's data; itself, where it is dense."""
    parts: Any = tensor
    if is_traceable_wrapper_subclass(parts):
        for name in parts.__tensor_flatten__()[0]:
            yield from arrays_of(getattr(parts, name))
    elif tensor.layout is torch.sparse_coo:
        yield from (tensor._indices(), tensor._values())
    elif tensor.layout in _COMPRESSED:
        by_row = tensor.layout in _COMPRESSED_ROWS
        yield tensor.crow_indices() if by_row else tensor.ccol_indices()
        yield tensor.col_indices() if by_row else tensor.row_indices()
        yield tensor.values()
    elif tensor.is_nested:
        yield tensor.values()
    elif tensor.layout is torch.strided:
        yield tensor


def held_by(tensor: torch.Tensor) -> dict[int, int]:
    """Bytes that a tensor keeps from being freed, by where they begin; none for one that only stands for another."""
    held = {}
    for array in arrays_of(tensor):
        with suppress(RuntimeError):  # a tensor in a trace has no memory
            storage = array.detach().untyped_storage()
            held[storage.data_ptr()] = storage.nbytes()
    return held
