"""From the traced graph of one step to a forward and a backward program.

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

import operator
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import fx

from longtape.errors import LongtapeError

ALIGNMENT = 64
"""Every residual starts at a multiple of this many bytes, as PyTorch's own allocations do."""

_aten = torch.ops.aten
_IDENTITIES = {_aten.detach.default, _aten.alias.default, _aten.lift_fresh.default, _aten.lift_fresh_copy.default}
"""Nothing in the graph changes a tensor in place, so these give what they are given."""


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
    def on_host(self) -> bool:
        """Whether all residuals are CPU tensors."""
        return all(r.device.type == "cpu" for r in self.residuals)


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
    from torch._functorch.aot_autograd import aot_export_joint_simple

    wanted = any(signature.differentiable)
    joint: Any = aot_export_joint_simple(lambda *args: function(*args), tuple(inputs), trace_joint=wanted)
    graph: fx.Graph = joint.graph
    _bind_constants(joint)
    _refuse_what_cannot_be_replayed(graph)
    _simplify(graph)
    return _split(graph, signature)


def _bind_constants(joint: fx.GraphModule) -> None:
    """Note the tensor behind each ``get_attr`` on its node; refuse sub-graphs."""
    for node in joint.graph.nodes:
        if node.op == "get_attr":
            value: Any = joint
            for part in str(node.target).split("."):
                value = getattr(value, part)
            if not isinstance(value, torch.Tensor):
                raise CaptureFailed(f"the step uses a higher-order operator ({node.target})")
            node.meta["constant"] = value


def _refuse_what_cannot_be_replayed(graph: fx.Graph) -> None:
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


# --- simplification -------------------------------------------------------------------


def _simplify(graph: fx.Graph) -> None:
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
    last_forward = _last_forward(graph)
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
        if node is last_forward:
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


# --- forward, backward, and what goes from one to the other ---------------------------


def _last_forward(graph: fx.Graph) -> fx.Node | None:
    """The last node of forward; None where there is no backward."""
    if not any(_is_tangent(node) for node in graph.nodes):
        return None
    last = None
    for node in graph.nodes:
        if node.meta.get("partitioner_tag") == "is_forward" or (node.op == "placeholder" and not _is_tangent(node)):
            last = node
    return last


def _is_tangent(node: fx.Node) -> bool:
    return node.op == "placeholder" and str(node.target).startswith("tangents")


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
    phase, last_forward = forward, _last_forward(graph)
    for node in graph.nodes:
        if node.op in ("call_function", "get_attr"):
            phase.append(node)
        if node is last_forward:
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
