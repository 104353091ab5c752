"""A traced graph made plain: what cannot be replayed is refused, what does nothing removed.

This file owns what may be said of single nodes, and changes that leave every value as
it is, bit for bit.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from longtape.torch.graphs import CaptureFailed

_aten = torch.ops.aten
_IDENTITIES = {_aten.detach.default, _aten.alias.default, _aten.lift_fresh.default, _aten.lift_fresh_copy.default}
"""Nothing in the graph changes a tensor in place, so these give what they are given."""


def bind_constants(joint: fx.GraphModule) -> None:
    """Note the tensor behind each ``get_attr`` on its node; refuse sub-graphs."""
    for node in joint.graph.nodes:
        if node.op == "get_attr":
            value: Any = joint
            for part in str(node.target).split("."):
                value = getattr(value, part)
            if not isinstance(value, torch.Tensor):
                raise CaptureFailed(f"the step uses a higher-order operator ({node.target})")
            node.meta["constant"] = value


def refuse_what_cannot_be_replayed(graph: fx.Graph) -> None:
    """Raise `CaptureFailed` for nodes whose second run would need more than their arguments."""
    for node in graph.nodes:
        value = node.meta.get("val")
        if isinstance(value, torch.SymInt | torch.SymFloat | torch.SymBool):
            raise CaptureFailed("a Python number of the step depends on the values of its tensors")
        for leaf in value if isinstance(value, tuple | list) else (value,):
            if isinstance(leaf, torch.Tensor):
                _refuse_tensor(leaf)
        if node.op != "call_function" or node.target is operator.getitem:
            continue
        if not isinstance(node.target, torch._ops.OpOverload):
            raise CaptureFailed(f"the step uses {node.target}, which cannot be split into forward and backward")
        if node.target._schema.is_mutable:
            raise CaptureFailed(f"the step changes a tensor in place ({node.target})")


def _refuse_tensor(value: torch.Tensor) -> None:
    if value.layout is not torch.strided or value.is_quantized:
        raise CaptureFailed(f"the step uses a tensor that is not an array in memory (layout {value.layout})")
    if not all(isinstance(n, int) for n in value.shape):
        raise CaptureFailed("a shape in the step depends on the values of its tensors")


def simplify(graph: fx.Graph) -> None:
    """Remove what has no effect on values: detaches, double transposes, repeated operations."""
    for node in list(graph.nodes):
        if node.op != "call_function":
            continue
        if node.target in _IDENTITIES:
            _replace(node, node.args[0])
        elif node.target is _aten.t.default and node.args[0].target is _aten.t.default:
            _replace(node, node.args[0].args[0])
    _merge_repeated(graph)


def _replace(node: fx.Node, by: Any) -> None:
    node.replace_all_uses_with(by)
    node.graph.erase_node(node)


def _merge_repeated(graph: fx.Graph) -> None:
    """Let equal operations of one phase share a result.

    Across phases it would make backward's own values residuals: those are only shared
    where they are views, which are never stored twice.
    """
    seen: dict[Any, fx.Node] = {}
    last = last_forward(graph)
    backward = False
    for node in list(graph.nodes):
        # An output's clone marks it as an output of its own; it is removed later.
        if node.op == "call_function" and not is_random(node) and node.target is not _aten.clone.default:
            phase = backward and not is_view(node)
            key = (phase, node.target, _hashable(node.args), _hashable(node.kwargs))
            try:
                first = seen.setdefault(key, node)
            except TypeError:  # an argument that cannot be hashed
                first = node
            if first is not node:
                _replace(node, first)
        if node is last:
            backward = True


def _hashable(value: Any) -> Any:
    """Arguments as a key; a number carries its type, for 1, 1.0 and True are equal and mean different things."""
    if isinstance(value, list | tuple):
        return tuple(_hashable(v) for v in value)
    if isinstance(value, dict):
        return tuple((k, _hashable(v)) for k, v in value.items())
    return (type(value), repr(value)) if isinstance(value, bool | int | float | complex) else value


def is_random(node: fx.Node) -> bool:
    """Whether a node draws from a random number generator."""
    return isinstance(node.target, torch._ops.OpOverload) and torch.Tag.nondeterministic_seeded in node.target.tags


def is_view(node: fx.Node) -> bool:
    """Whether a node shares the memory of its first argument, and can be taken again from an equal tensor."""
    if node.op != "call_function":
        return False
    if node.target is operator.getitem:
        return is_view(node.args[0])  # type: ignore[arg-type]
    if node.target is _aten.as_strided.default:  # speaks of the memory, not of the values
        return False
    schema = node.target._schema  # type: ignore[union-attr]
    alias = schema.arguments[0].alias_info if schema.arguments else None
    return alias is not None and not alias.is_write and all(r.alias_info is not None for r in schema.returns)


def view_root(node: fx.Node) -> fx.Node:
    """The node whose memory `node` shares."""
    while is_view(node):
        node = node.args[0]  # type: ignore[assignment]
    return node


def last_forward(graph: fx.Graph) -> fx.Node | None:
    """The last node of forward; None where there is no backward."""
    if not any(is_tangent(node) for node in graph.nodes):
        return None
    last = None
    for node in graph.nodes:
        if node.meta.get("partitioner_tag") == "is_forward" or (node.op == "placeholder" and not is_tangent(node)):
            last = node
    return last


def is_tangent(node: fx.Node) -> bool:
    """Whether a node is an output's cotangent."""
    return node.op == "placeholder" and str(node.target).startswith("tangents")
