"""A `StepGraph` written out as straight-line Python.

This file owns which computations the forward and backward programs hold, and in what
order sums are taken; ``writer.py`` owns the text of each.  Interpreting the graph would
cost as much as small operators do; a generated line is one call of a prebound operator.

Backward is written once per *pattern* of cotangents.  Where an output's cotangent is
undefined, what depends on it alone is left out, as autograd leaves it out; filling in
zeros would cost time, and 0 · ∞ would make NaN of a right gradient.

A cotangent may come in several *contributions* (a tensor used twice gets two): they are
handed on unsummed and added where autograd's engine would add them, in its order, so
that sums over steps come out with the same bits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from longtape.torch.graphs import StepGraph
from longtape.torch.simplify import is_view
from longtape.torch.writer import Line, Writer, operators, same_kind

_aten = torch.ops.aten

Pattern = tuple[int, ...]
"""Per output: how many contributions its cotangent has; 0 where it is undefined."""

_ZERO_FROM_ZERO = {
    operator
    for _, operator in operators(
        "mul.Tensor mul.Scalar div.Scalar neg mm bmm mv dot cat stack clone sum sum.dim_IntList _to_copy triu tril"
        " scatter_add _conj _unsafe_view constant_pad_nd flip roll"
    )
}
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


def _write_forward(graph: StepGraph, saving: bool) -> Callable[..., Any]:
    writer = Writer()
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
        self.writer = Writer()
        self.contributions: dict[fx.Node, list[str]] = {}
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
            lines.append(Line(None, ", ".join(f"r{k}" for k in range(count)) + ", = residuals", (), keep=True))
        if self.flat:
            lines.append(Line(None, ", ".join(self.flat) + ", = cotangents", (), keep=True))
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
        if not all(isinstance(a, fx.Node) and same_kind(a, node) for a in node.args):
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
            and all(isinstance(a, fx.Node) and a in self.linear and same_kind(a, node) for a in node.args)
            and not all(a in self.contributions for a in node.args)
        )

    def _place_accumulations(self, closed: list[tuple[int, list[str]]]) -> None:
        """Add each contribution to its accumulator as soon as those before it are added."""
        waiting = [(index, list(names)) for index, names in closed if names]
        lines = self.writer.lines
        available: set[str | None] = set()
        placed: list[Line] = []
        for line in [Line(None, "", ()), *lines]:
            available.add(line.target)
            if line.text:
                placed.append(line)
            for index, names in waiting:
                while names and (names[0] in available or not names[0].startswith("v")):
                    name = names.pop(0)
                    placed.append(Line(None, f"accumulators[{index}].add({name})", (name,), keep=True))
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


def _depending_on_tangents(graph: StepGraph) -> set[fx.Node]:
    linear = {node for node in graph.tangents if node is not None}
    for node in graph.backward:
        if not linear.isdisjoint(node.all_input_nodes):
            linear.add(node)
    return linear
