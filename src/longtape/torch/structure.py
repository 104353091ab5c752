"""Pytrees whose leaves are tensors, where None stands for nothing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.utils import _pytree as pytree

Leaves = list[torch.Tensor]


@dataclass(frozen=True, slots=True)
class Structure:
    """How to rebuild a tree from its tensors."""

    spec: Any
    present: tuple[bool, ...]
    """Which leaves of `spec` are tensors; the others are None."""

    def build(self, leaves: list[Any]) -> Any:
        """The tree with these tensors as leaves."""
        return pytree.tree_unflatten(self.expand(leaves), self.spec)

    def expand(self, leaves: list[Any]) -> list[Any]:
        """The leaves of `spec`, None included."""
        rest = iter(leaves)
        return [next(rest) if there else None for there in self.present]

    def contract(self, leaves: Any) -> list[Any]:
        """The reverse of `expand`."""
        return [leaf for leaf, there in zip(leaves, self.present, strict=True) if there]


def paths(tree: Any, name: str) -> list[str]:
    """What to call each leaf that is not None: ``name['h'][0]``; just `name` for a tree that is one leaf."""
    found, _ = pytree.tree_flatten_with_path(tree)
    return [name + pytree.keystr(path) for path, leaf in found if leaf is not None]


def flatten(tree: Any) -> tuple[list[Any], Structure]:
    """The leaves of a tree that are not None, and how to put them back."""
    leaves, spec = pytree.tree_flatten(tree)
    present = tuple(leaf is not None for leaf in leaves)
    return [leaf for leaf in leaves if leaf is not None], Structure(spec, present)


def unique(leaves: Leaves) -> Leaves:
    """Each tensor once."""
    return list({id(leaf): leaf for leaf in leaves}.values())
