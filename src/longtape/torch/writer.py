"""Straight-line Python, written a node at a time.

This file owns the text of single computations: which callable enters an operator
quickest, when a value is dropped, and when its memory may take the next result.  Which
computations are written, ``programs.py`` decides.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from longtape.torch.simplify import is_random, is_view

_aten = torch.ops.aten


def operators(names: str) -> list[tuple[str, Any]]:
    """ATen's operators with their names; ``add.Tensor`` asks for an overload of ``add``, ``mm`` for the default one."""
    split = [name.partition(".") for name in names.split()]
    return [(name, getattr(getattr(_aten, name), overload or "default")) for name, _, overload in split]


_FAST: dict[Any, Callable[..., Any]] = {
    operator: getattr(torch, name)
    for name, operator in operators(
        "add.Tensor sub.Tensor mul.Tensor div.Tensor unsafe_split.Tensor neg tanh sigmoid relu exp log sqrt rsqrt sin"
        " cos mm addmm bmm baddbmm t cat unsqueeze permute sum.dim_IntList transpose.int select.int where.self"
        " pow.Tensor_Scalar"
    )
} | {_aten.view.default: torch.Tensor.view, _aten.expand.default: torch.Tensor.expand}
"""Operators whose own Python binding takes the same arguments and is about 0.5 µs quicker to enter."""

_IN_PLACE: dict[Any, Callable[..., Any]] = {
    operator: getattr(torch.Tensor, name + "_")
    for name, operator in operators("add.Tensor sub.Tensor mul.Tensor div.Tensor neg tanh sigmoid relu exp sin cos")
}
"""Operators that compute the same bits into their first argument."""

_COMMUTATIVE = {_aten.add.Tensor, _aten.mul.Tensor}

_FRESH = {*_IN_PLACE, *(operator for _, operator in operators("mm addmm bmm baddbmm tanh_backward"))}
"""Operators known to return memory that nothing else refers to."""


@dataclass(frozen=True, slots=True)
class Line:
    """One line of a program."""

    target: str | None
    text: str
    inputs: tuple[str, ...]
    keep: bool = False
    """Needed even where nothing reads its result."""
    node: fx.Node | None = None
    """The computation, where it is one of the trace."""
    arguments: tuple[str, ...] = ()
    """Its positional arguments, then its keyword ones, as text."""


class Writer:
    """The lines of one function in single-assignment form, and the objects they name."""

    def __init__(self) -> None:
        self.lines: list[Line] = []
        self.values: dict[fx.Node, str | None] = {}
        """Per node the name of its value; None where it is undefined (a zero cotangent)."""
        self._bound: dict[str, Any] = {}
        self._known: dict[int, str] = {}

    def bind(self, value: Any, prefix: str = "k") -> str:
        """A name for an object that cannot be written as a literal."""
        if id(value) not in self._known:
            self._known[id(value)] = f"{prefix}{len(self._bound)}"
            self._bound[self._known[id(value)]] = value
        return self._known[id(value)]

    def add(self, text: str, inputs: Iterable[str], **more: Any) -> str:
        """Append a line; returns the name of its value."""
        target = f"v{len(self.lines)}"
        self.lines.append(Line(target, text, tuple(inputs), **more))
        return target

    def name(self, node: fx.Node) -> str:
        if node.op == "get_attr":
            return self.bind(node.meta["constant"])
        name = self.values[node]
        assert name is not None, f"{node} is undefined where its value is read"
        return name

    def text(self, value: Any) -> str:
        """An argument as source text."""
        if isinstance(value, fx.Node):
            return self.name(value)
        if isinstance(value, list | tuple):
            inner = ", ".join(map(self.text, value))
            # A tuple of numbers is a constant of the code object; a list is built anew at each call.
            return f"[{inner}]" if any(isinstance(v, fx.Node) for v in value) else f"({inner},)" if value else "()"
        if value is None or isinstance(value, bool | int | str) or (isinstance(value, float) and math.isfinite(value)):
            return repr(value)
        return self.bind(value)

    def run(self, node: fx.Node) -> None:
        """Append a node's computation."""
        if node.op == "get_attr":
            return
        arguments = (*map(self.text, node.args), *(f"{k}={self.text(v)}" for k, v in node.kwargs.items()))
        if isinstance(node.target, torch._ops.OpOverload):
            function = self.bind(_FAST.get(node.target) or node.target._op, "op")
            text = f"{function}({', '.join(arguments)})"
        else:
            text = f"{arguments[0]}[{arguments[1]}]"
        inputs = map(self.name, node.all_input_nodes)
        self.values[node] = self.add(text, inputs, keep=is_random(node), node=node, arguments=arguments)

    def finish(self, signature: str, result: str, results: Iterable[str]) -> Callable[..., Any]:
        """Compile the lines that matter, dropping or reusing each value after its last use."""
        used = set(results)
        reusable = self._reusable()
        body = [f"return {result}"]
        for line in reversed(self.lines):
            if line.target not in used and not line.keep:
                continue
            named = dict.fromkeys((*line.inputs, line.target or ""))
            ended = [name for name in named if name not in used and name.startswith("v")]
            if ended:
                body.append("del " + ", ".join(ended))
            text = self._in_place(line, [name for name in ended if name in reusable]) or line.text
            body.append(f"{line.target} = {text}" if line.target else text)
            used.update(line.inputs)
        source = f"def program({signature}):\n    " + "\n    ".join(reversed(body))
        scope = dict(self._bound)
        exec(compile(source, "<longtape program>", "exec"), scope)
        program: Callable[..., Any] = scope["program"]
        program.__doc__ = source
        return program

    def _reusable(self) -> dict[str, fx.Node]:
        """The values whose memory nothing else refers to, now or later, and what computes them."""
        shared = {name for line in self.lines if line.node is None or _may_share(line.node) for name in line.inputs}
        made = {line.target: line.node for line in self.lines if line.node is not None and line.target is not None}
        return {name: node for name, node in made.items() if node.target in _FRESH and name not in shared}

    def _in_place(self, line: Line, ended: list[str]) -> str | None:
        """A line rewritten to compute into an operand that ends with it, where that gives the same bits and layout."""
        node = line.node
        if node is None or node.target not in _IN_PLACE:
            return None
        for k in (0, 1) if node.target in _COMMUTATIVE and not node.kwargs else (0,):
            operand, name = node.args[k], line.arguments[k]
            if name in ended and isinstance(operand, fx.Node) and _same_layout(operand, node):
                rest = [text for i, text in enumerate(line.arguments) if i != k]
                return f"{self.bind(_IN_PLACE[node.target], 'op')}({', '.join([name, *rest])})"
        return None


def _may_share(node: fx.Node) -> bool:
    """Whether a value may lie in memory of an argument."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return True
    name = node.target._schema.name
    return is_view(node) or "unsafe" in name or any(r.alias_info is not None for r in node.target._schema.returns)


def _same_layout(a: fx.Node, b: fx.Node) -> bool:
    return same_kind(a, b) and bool(a.meta["val"].stride() == b.meta["val"].stride())


def same_kind(a: fx.Node, b: fx.Node) -> bool:
    """Whether two nodes' values agree in shape and type."""
    left, right = a.meta["val"], b.meta["val"]
    return bool(left.shape == right.shape and left.dtype == right.dtype)
