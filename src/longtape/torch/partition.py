"""From the traced graph of one step to its forward, its backward, and its residuals.

This file owns the ahead-of-time trace of a step's joint graph and everything decided
once per graph: what is forward and what is backward, which values are *residuals*, how
residuals lie in a byte buffer, and which of them need not be stored because they are
closed-over tensors, views of those, or values that the caller still has.

It knows nothing of Dynamo's guards (``capture.py``) nor of how a program is written as
Python (``programs.py``).

Invariants:

* no value is computed twice: what backward needs of forward is stored, or is a view;
* nothing that mutates its arguments survives in a graph; the trace refuses it;
* a stored value keeps its strides where it is dense, so kernels see what they saw.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from longtape.torch.graphs import CaptureFailed, Residual, Signature, StepGraph
from longtape.torch.simplify import (
    bind_constants,
    is_random,
    is_view,
    last_forward,
    refuse_what_cannot_be_replayed,
    simplify,
    view_root,
)

ALIGNMENT = 64
"""Every residual starts at a multiple of this many bytes, as PyTorch's own allocations do."""

_aten = torch.ops.aten


def trace(function: Callable[..., Any], inputs: Sequence[torch.Tensor], signature: Signature) -> StepGraph:
    """Trace forward and backward of `function` and split them.

    Args:
        function: takes `inputs`, returns a tuple of tensors that alias neither inputs nor each other.
        inputs: real or fake tensors; those that require grad get a cotangent.
        signature: what they are.

    Raises:
        CaptureFailed: something in the graph cannot be split or replayed faithfully.
        Exception: whatever the tracer raises.
    """
    from torch._functorch import config
    from torch._functorch.aot_autograd import aot_export_joint_simple

    wanted = any(signature.differentiable)
    with config.patch(backward_pass_autocast="off"):  # as outside of the block, where backward belongs
        joint: Any = aot_export_joint_simple(lambda *args: function(*args), tuple(inputs), trace_joint=wanted)
    graph: fx.Graph = joint.graph
    bind_constants(joint)
    refuse_what_cannot_be_replayed(graph)
    simplify(graph)
    return _split(graph, signature)


def _split(graph: fx.Graph, signature: Signature) -> StepGraph:
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    count, differentiable = len(signature.operands), signature.differentiable
    primals, tangent_nodes = placeholders[:count], placeholders[count:]
    if len(tangent_nodes) != sum(differentiable):
        raise CaptureFailed("the traced graph has other differentiable outputs than the step")
    tangents = iter(tangent_nodes)
    results: list[Any] = list(graph.output_node().args[0])  # type: ignore[arg-type]
    outputs = [_without_clone(node) for node in results[: len(differentiable)]]
    gradients = results[len(differentiable) :] or [None] * count
    forward, backward = _phases(graph)
    forward = live(forward, set(outputs) | _crossing(forward, backward))
    again = _views_taken_again(forward, backward, set(primals))
    backward = live([*again, *backward], {g for g in gradients if g is not None})
    split = StepGraph(
        operands=signature.operands,
        carry_leaves=signature.carry_leaves,
        x_leaves=signature.x_leaves,
        placeholders=primals,
        outputs=outputs,
        tangents=[next(tangents) if wanted else None for wanted in differentiable],
        gradients=gradients,
        forward=forward,
        backward=backward,
        uses_rng=any(is_random(node) for node in forward),
    )
    _lay_out(split, signature.carry_positions)
    return split


def _without_clone(node: fx.Node) -> fx.Node:
    """The value an output stands for: the trace cloned it only to have outputs that alias nothing."""
    if node.target is _aten.clone.default:
        return node.args[0]  # type: ignore[return-value]
    return node


def _phases(graph: fx.Graph) -> tuple[list[fx.Node], list[fx.Node]]:
    """The calls of the trace before and after its last forward one."""
    forward: list[fx.Node] = []
    backward: list[fx.Node] = []
    phase, last = forward, last_forward(graph)
    for node in graph.nodes:
        if node.op in ("call_function", "get_attr"):
            phase.append(node)
        if node is last:
            phase = backward
    return forward, backward


def _crossing(forward: list[fx.Node], backward: list[fx.Node]) -> set[fx.Node]:
    """Forward values that backward reads."""
    late = set(backward)
    return {node for node in forward if not late.isdisjoint(node.users)}


def live(nodes: list[fx.Node], wanted: set[fx.Node]) -> list[fx.Node]:
    """`nodes` without those that nothing needs; a random one is kept, for it moves the generator."""
    needed = set(wanted)
    kept = []
    for node in reversed(nodes):
        if node in needed or (node.op == "call_function" and node.is_impure()):
            kept.append(node)
            needed.update(node.all_input_nodes)
    return kept[::-1]


def _views_taken_again(forward: list[fx.Node], backward: list[fx.Node], primals: set[fx.Node]) -> list[fx.Node]:
    """The forward views that backward takes again from their root instead of having them stored.

    A root that is an input, or is stored anyway, costs nothing; any other is stored in
    place of its views where that is not larger.
    """
    crossing = _crossing(forward, backward)
    views: dict[fx.Node, list[fx.Node]] = {}
    for node in forward:
        if node in crossing and is_view(node):
            views.setdefault(view_root(node), []).append(node)
    wanted: set[fx.Node] = set()
    for root, members in views.items():
        if root in primals or root in crossing or nbytes_of(root) <= sum(map(nbytes_of, members)):
            wanted.update(members)
    return live([node for node in forward if is_view(node)], wanted) if wanted else []


def nbytes_of(node: fx.Node) -> int:
    """Bytes of a node's value, each element once; 2**62 where the value is not one tensor."""
    value = node.meta.get("val")
    if not isinstance(value, torch.Tensor):
        return 1 << 62
    return value.numel() * value.element_size()


# --- the layout of residuals ----------------------------------------------------------


def _lay_out(graph: StepGraph, carry_positions: list[int]) -> None:
    """Choose the residuals and their places; values the caller has are not stored."""
    operands = dict(zip(graph.placeholders, graph.operands, strict=True))
    read = _read_from_forward(graph)
    graph.needs_x = any(n in operands and operands[n].role == "x" for n in read)
    own = [n for n in read if n not in operands]
    carry = [n for n in read if n in operands and operands[n].role == "carry"]
    new_carry = dict(zip(carry_positions, graph.outputs, strict=False))
    stored = {leaf: own.index(node) for leaf, node in new_carry.items() if node in own}
    linkable = [n for n in carry if operands[n].index in stored]
    for node in [*own, *(n for n in carry if n not in linkable)]:
        _append(graph, node)
    graph.linked_nbytes = graph.nbytes
    for node in linkable:
        _append(graph, node)
    graph.linkable = len(linkable)
    graph.stored_carry = stored


def _read_from_forward(graph: StepGraph) -> dict[fx.Node, None]:
    """What backward reads that it has not computed, in the order of first use."""
    inside = {*graph.backward, *graph.tangents}
    read: dict[fx.Node, None] = {}
    for node in graph.backward:
        read.update(dict.fromkeys(node.all_input_nodes))
    read.update(dict.fromkeys(node for node in graph.gradients if node is not None))
    return {node: None for node in read if node not in inside and node.op != "get_attr"}


def _append(graph: StepGraph, node: fx.Node) -> None:
    value = node.meta["val"]
    if not isinstance(value, torch.Tensor):
        raise CaptureFailed(f"backward needs a value of forward that is not a tensor ({node.target})")
    shape, stride = tuple(value.shape), dense_strides(value)
    graph.residuals.append(Residual(node, graph.nbytes, nbytes_of(node), shape, stride, value.dtype, value.device))
    graph.nbytes += -(-nbytes_of(node) // ALIGNMENT) * ALIGNMENT


def dense_strides(value: torch.Tensor) -> tuple[int, ...]:
    """The strides of `value` if it fills its memory; otherwise those of a dense tensor with its order of axes."""
    axes = sorted(range(value.dim()), key=lambda k: (value.stride(k), value.shape[k]))
    strides = [0] * value.dim()
    step = 1
    for axis in axes:
        strides[axis] = step
        step *= max(value.shape[axis], 1)
    if all(value.shape[k] <= 1 or value.stride(k) == strides[k] for k in range(value.dim())):
        return tuple(value.stride())
    return tuple(strides) if 0 not in value.stride() else torch.empty(value.shape, device="meta").stride()
