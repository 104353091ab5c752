"""What a carry is, and what a step must return; in words, where it is something else."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch.utils import _pytree as pytree

from longtape.torch.structure import Structure


def is_dense(tensor: torch.Tensor) -> bool:
    """Whether it is one array in memory, and so can be stacked, indexed by step, and kept as bytes."""
    return tensor.layout is torch.strided and not tensor.is_nested


def no_array(tensor: torch.Tensor) -> str | None:
    """What a tensor is that cannot be a carry leaf, and what to do about it; None for one that can."""
    if not is_dense(tensor):
        what = "nested tensor" if tensor.is_nested else f"tensor of layout {tensor.layout}"
        return f"a {what}; what a scan keeps and stacks is dense: give its values, or .to_dense()"
    if type(tensor) not in (torch.Tensor, torch.nn.Parameter, torch.nn.Buffer):
        return (
            f"a {type(tensor).__name__}, which would come back from storage as a plain tensor; "
            "carry .as_subclass(torch.Tensor), and make it a subclass inside the step"
        )
    return None


def not_a_pair(index: int, result: Any) -> str:
    """Why what a step returned is no ``(carry, y)``."""
    wanted = f"step {index} must return (carry, y), not "
    if inspect.iscoroutine(result):
        result.close()  # or Python would warn that nobody awaited it
        return f"{wanted}a coroutine: a scan calls its step and cannot await it; write it without async"
    if inspect.isgenerator(result):
        return f"{wanted}a generator; use return in place of yield"
    if isinstance(result, list):
        return f"{wanted}a list of {len(result)}; return a tuple"
    if isinstance(result, tuple):
        return f"{wanted}a tuple of {len(result)}"
    if isinstance(result, torch.Tensor):
        return f"{wanted}one tensor of shape {list(result.shape)}; where there is no y, return (carry, None)"
    return f"{wanted}{type(result).__name__}"


def another_structure(index: int, tree: Any, given: Structure) -> str:
    """How the carry that a step returned differs from the one that it was given."""
    leaves, spec = pytree.tree_flatten_with_path(tree)
    if spec != given.spec:
        return f"step {index} returned a carry of another structure: {spec} instead of {given.spec}"
    for (path, leaf), was_there in zip(leaves, given.present, strict=True):
        name = "carry" + pytree.keystr(path)
        if leaf is not None and not was_there:
            what = f"a {type(leaf).__name__} as {name}, which was None before it; begin with a tensor, such as zeros"
            break
        if leaf is None and was_there:
            what = f"None as {name}, which was a tensor before it; return the tensor, or begin with None"
            break
    else:
        raise AssertionError("the structures are equal")
    return f"step {index} returned {what}: a carry keeps its structure"
