"""A `StepGraph` written out as straight-line Python.

This file owns the text of the forward and backward programs and nothing else.  A
generated line is one call of a prebound operator: interpreting the graph would cost as
much as small operators do.  A value is dropped right after its last use, so that its
memory, still in cache, serves the next one.

Backward is written once per *pattern* of cotangents.  Where an output's cotangent is
undefined, what depends on it alone is left out, as autograd leaves it out; filling in
zeros would cost time, and 0 · ∞ would make NaN of a right gradient.

A cotangent may come in several *contributions* (a tensor used twice gets two): they are
handed on unsummed and added where autograd's engine would add them, in its order, so
that sums over steps come out with the same bits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from longtape.torch.graphs import StepGraph, is_random, is_view

_aten = torch.ops.aten

Pattern = tuple[int, ...]
"""Per output: how many contributions its cotangent has; 0 where it is undefined."""


def _operators(names: str) -> dict[str, Any]:
    """ATen's operators by name; ``add.Tensor`` names an overload, ``mm`` the default one."""
    split = [name.partition(".") for name in names.split()]
    return {name: getattr(getattr(_aten, name), overload or "default") for name, _, overload in split}


_FAST: dict[Any, Callable[..., Any]] = {
    operator: getattr(torch, name)
    for name, operator in _operators(
        "add.Tensor sub.Tensor mul.Tensor div.Tensor unsafe_split.Tensor neg tanh sigmoid relu exp log sqrt rsqrt sin"
        " cos mm addmm bmm baddbmm t cat unsqueeze permute sum.dim_IntList transpose.int select.int where.self"
        " pow.Tensor_Scalar"
    ).items()
} | {_aten.view.default: torch.Tensor.view, _aten.expand.default: torch.Tensor.expand}
"""Operators whose own Python binding takes the same arguments and is about 0.5 µs quicker to enter."""

_IN_PLACE: dict[Any, Callable[..., Any]] = {
    operator: getattr(torch.Tensor, name + "_")
    for name, operator in _operators(
        "add.Tensor sub.Tensor mul.Tensor div.Tensor neg tanh sigmoid relu exp sin cos"
    ).items()
}
"""Operators that compute the same bits into their first argument."""

_COMMUTATIVE = {_aten.add.Tensor, _aten.mul.Tensor}

_FRESH = {*_IN_PLACE, *_operators("mm addmm bmm baddbmm tanh_backward").values()}
"""Operators known to return memory that nothing else refers to."""

_ZERO_FROM_ZERO = {
    *_operators(
        "mul.Tensor mul.Scalar div.Scalar neg mm bmm mv dot cat stack clone sum.dim_IntList _to_copy triu tril"
        " scatter_add _conj _unsafe_view constant_pad_nd flip roll"
    ).values()
} | {_aten.sum.default}
"""Operators that, with `_backward` ones and views, are known to make zeros of zero cotangents.

Any other, in a backward that a user wrote, might not be linear: it is given zeros.
"""


def forward_program(graph: StepGraph, *, saving: bool) -> Callable[..., Any]:
    """``f(*inputs) -> outputs``, or ``-> (outputs, residuals)`` when `saving`.

    Run it with gradients off.  Outputs may share memory with each other and with inputs,
    but each is an object of its own.
    """
    key = ("forward", saving)
    if key not in graph.cache:
        graph.cache[key] = _write_forward(graph, saving)
    program: Callable[..., Any] = graph.cache[key]
    return program


def backward_program(graph: StepGraph, pattern: Pattern) -> Callable[..., Any]:
    """``f(residuals, closed, x, cotangents, accumulators) -> (carry cotangents, x cotangents)``.

    `cotangents` is flat: the contributions of the first output, then the second's.  A carry
    cotangent is a tensor, a tuple of contributions, or None; an x cotangent is a tensor or
    None; those of closed-over tensors go to ``accumulators[k].add(tensor)``.
    """
    if pattern not in graph.cache:
        graph.cache[pattern] = _Backward(graph, pattern).write()
    program: Callable[..., Any] = graph.cache[pattern]
    return program


@dataclass(frozen=True, slots=True)
class _Line:
    target: str | None
    text: str
    inputs: tuple[str, ...]
    keep: bool = False
    """Needed even where nothing reads its result."""
    node: fx.Node | None = None
    """The computation, where it is one of the trace."""
    arguments: tuple[str, ...] = ()
    """Its positional arguments, then its keyword ones, as text."""


class _Writer:
    """The lines of one function in single-assignment form, and the objects they name."""

    def __init__(self) -> None:
        self.lines: list[_Line] = []
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
        self.lines.append(_Line(target, text, tuple(inputs), **more))
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

    def _in_place(self, line: _Line, ended: list[str]) -> str | None:
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
    return _same_kind(a, b) and bool(a.meta["val"].stride() == b.meta["val"].stride())


def _write_forward(graph: StepGraph, saving: bool) -> Callable[..., Any]:
    writer = _Writer()
    writer.values = {node: f"p{k}" for k, node in enumerate(graph.placeholders)}
    for node in graph.forward:
        writer.run(node)
    results = []
    for node in graph.outputs:
        name = writer.name(node)
        # One object in two leaves would be guarded as such; a closed-over one must not be handed out.
        fresh = name.startswith("v") and name not in results
        results.append(name if fresh else writer.add(f"{writer.bind(_aten.alias.default._op, 'op')}({name})", [name]))
    result = f"({', '.join(results)},)"
    if saving:
        residuals = [writer.name(r.node) for r in graph.residuals]
        result += f", [{', '.join(residuals)}]"
        results += residuals
    return writer.finish(", ".join(f"p{k}" for k in range(len(graph.placeholders))), result, results)


class _Backward:
    """Writes backward for one pattern of cotangents."""

    def __init__(self, graph: StepGraph, pattern: Pattern) -> None:
        self.graph = graph
        self.writer = _Writer()
        self.contributions: dict[fx.Node, list[str]] = {}
        self.header: list[str] = []
        self.linear = _depending_on_tangents(graph)
        """The nodes whose values are linear in the cotangents, and so undefined where those are."""
        self._name_arguments(pattern)

    def _name_arguments(self, pattern: Pattern) -> None:
        flat: list[str] = []
        for node, count in zip(self.graph.tangents, pattern, strict=True):
            if node is not None:
                self.contributions[node] = [f"t{len(flat) + k}" for k in range(count)]
                flat += self.contributions[node]
        self.flat = flat
        values = self.writer.values
        for k, residual in enumerate(self.graph.residuals):
            values[residual.node] = f"r{k}"
        for node, operand in zip(self.graph.placeholders, self.graph.operands, strict=True):
            if operand.role != "carry":
                values[node] = f"{operand.role}[{operand.index}]"

    def write(self) -> Callable[..., Any]:
        graph, writer = self.graph, self.writer
        for node in graph.backward:
            self._run(node)
        carry: list[str] = ["None"] * graph.carry_leaves
        x: list[str] = ["None"] * graph.x_leaves
        results: list[str] = []
        closed: list[tuple[int, list[str]]] = []
        for operand, gradient in zip(graph.operands, graph.gradients, strict=True):
            names = [] if gradient is None else self._summands(gradient, split=operand.role != "x")
            if operand.role == "closed":
                closed.append((operand.index, names))
                continue
            results += names
            if names:
                text = f"({', '.join(names)})" if len(names) > 1 else names[0]
                (carry if operand.role == "carry" else x)[operand.index] = text
        self._place_accumulations(closed)
        self._unpack()
        result = f"[{', '.join(carry)}], [{', '.join(x)}]"
        return writer.finish("residuals, closed, x, cotangents, accumulators", result, results)

    def _unpack(self) -> None:
        """Put the lines that name residuals and contributions before all others."""
        count = len(self.graph.residuals)
        lines = []
        if count:
            lines.append(_Line(None, ", ".join(f"r{k}" for k in range(count)) + ", = residuals", (), keep=True))
        if self.flat:
            lines.append(_Line(None, ", ".join(self.flat) + ", = cotangents", (), keep=True))
        self.writer.lines[:0] = lines

    # --- cotangents, defined and undefined ---

    def _cotangent(self, node: fx.Node) -> str | None:
        """The sum of an output's contributions, in their order."""
        values = self.writer.values
        if node not in values:
            values[node] = self._sum(None, self.contributions[node])
        return values[node]

    def _sum(self, first: str | None, rest: list[str]) -> str | None:
        total = first
        for name in rest:
            total = name if total is None else self.writer.add(f"{self._op('add')}({total}, {name})", [total, name])
        return total

    def _op(self, name: str) -> str:
        return self.writer.bind(getattr(torch, name), "op")

    def _run(self, node: fx.Node) -> None:
        writer = self.writer
        if self._joins_two_outputs(node):
            return
        for argument in node.all_input_nodes:
            if argument in self.contributions:
                self._cotangent(argument)
        linear = [n for n in node.all_input_nodes if n in self.linear]
        undefined = [n for n in linear if writer.values[n] is None]
        if not undefined:
            writer.run(node)
        elif len(undefined) == len(linear) and _keeps_zero(node, linear):
            writer.values[node] = None
        elif not self._passes_one_summand(node):
            self._run_with_zeros(node, undefined)

    def _joins_two_outputs(self, node: fx.Node) -> bool:
        """Sum the cotangents of a value that is returned twice, as carry and as y.

        Autograd's engine, run over a loop whose ys are stacked afterwards, meets y's
        cotangent first and then each use of the carry in the next step.
        """
        if node.target is not _aten.add.Tensor or node.kwargs or any(a not in self.contributions for a in node.args):
            return False
        first, second = sorted(node.args, key=self.graph.tangents.index, reverse=True)  # type: ignore[arg-type]
        if second in self.writer.values or len(second.users) > 1:  # type: ignore[union-attr]
            return False
        self.writer.values[node] = self._sum(self._cotangent(first), self.contributions[second])  # type: ignore[arg-type, index]
        return True

    def _passes_one_summand(self, node: fx.Node) -> bool:
        """A sum or difference of which one side is undefined is its other side."""
        if node.target not in (_aten.add.Tensor, _aten.sub.Tensor) or node.kwargs or len(node.args) != 2:
            return False
        if not all(isinstance(a, fx.Node) and _same_kind(a, node) for a in node.args):
            return False
        left, right = (self.writer.values.get(a) for a in node.args)  # type: ignore[arg-type]
        if left is not None:
            self.writer.values[node] = left
        elif node.target is _aten.add.Tensor:
            self.writer.values[node] = right
        else:
            self.writer.values[node] = self.writer.add(f"{self._op('neg')}({right})", [str(right)])
        return True

    def _run_with_zeros(self, node: fx.Node, undefined: list[fx.Node]) -> None:
        values = self.writer.values
        for argument in undefined:
            value = argument.meta["val"]
            dtype, device = self.writer.bind(value.dtype), self.writer.bind(value.device)
            text = f"{self._op('zeros')}({tuple(value.shape)}, dtype={dtype}, device={device})"
            values[argument] = self.writer.add(text, [])
        self.writer.run(node)
        for argument in undefined:  # elsewhere it stays undefined
            values[argument] = None

    # --- what leaves the program ---

    def _summands(self, gradient: fx.Node, *, split: bool) -> list[str]:
        """The defined contributions of a gradient, in the engine's order.

        The engine sums the contributions of one step from the left; ``((a + b) + c)`` whose
        inner sums nothing else reads gives back a, b, c.
        """
        parts: list[fx.Node] = []
        node = gradient
        while split and self._is_sum_for_output(node):
            parts.append(node.args[1])  # type: ignore[arg-type]
            node = node.args[0]  # type: ignore[assignment]
        names = map(self._result, [node, *reversed(parts)])
        return [name for name in names if name is not None]

    def _result(self, node: fx.Node) -> str | None:
        if node in self.contributions:
            return self._cotangent(node)
        if node in self.linear:
            return self.writer.values[node]
        name = self.writer.name(node)  # may lie in the residual buffer, or be a closed-over tensor
        return self.writer.add(f"{name}.clone()", [name])

    def _is_sum_for_output(self, node: fx.Node) -> bool:
        return (
            node.target is _aten.add.Tensor
            and not node.kwargs
            and len(node.users) == 1
            and self.graph.gradients.count(node) < 2
            and node in self.linear
            and all(isinstance(a, fx.Node) and a in self.linear and _same_kind(a, node) for a in node.args)
            and not all(a in self.contributions for a in node.args)
        )

    def _place_accumulations(self, closed: list[tuple[int, list[str]]]) -> None:
        """Add each contribution to its accumulator as soon as those before it are added."""
        waiting = [(index, list(names)) for index, names in closed if names]
        lines = self.writer.lines
        available: set[str | None] = set()
        placed: list[_Line] = []
        for line in [_Line(None, "", ()), *lines]:
            available.add(line.target)
            if line.text:
                placed.append(line)
            for index, names in waiting:
                while names and (names[0] in available or not names[0].startswith("v")):
                    name = names.pop(0)
                    placed.append(_Line(None, f"accumulators[{index}].add({name})", (name,), keep=True))
        self.writer.lines = placed


def _keeps_zero(node: fx.Node, zeros: list[fx.Node]) -> bool:
    """Whether a node's value is zero where `zeros`, all of its arguments that depend on cotangents, are."""
    if is_view(node) or not isinstance(node.target, torch._ops.OpOverload):
        return True
    if "_backward" in node.target._schema.name:
        return True
    if node.target in (_aten.add.Tensor, _aten.sub.Tensor):
        return all(a in zeros for a in node.args)
    if node.target is _aten.div.Tensor:
        return node.args[0] in zeros and node.args[1] not in zeros
    return node.target in _ZERO_FROM_ZERO


def _same_kind(a: fx.Node, b: fx.Node) -> bool:
    left, right = a.meta["val"], b.meta["val"]
    return bool(left.shape == right.shape and left.dtype == right.dtype)


def _depending_on_tangents(graph: StepGraph) -> set[fx.Node]:
    linear = {node for node in graph.tangents if node is not None}
    for node in graph.backward:
        if not linear.isdisjoint(node.all_input_nodes):
            linear.add(node)
    return linear
