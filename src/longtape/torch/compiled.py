"""A `StepGraph` handed to the framework's own compiler, forward and backward.

Owns the way there: each part as a graph of its own, with the strides its values will
have, and the calls that fit what the compiler returns to what `programs.py` offers.  The
compiler fuses operators, so results differ from the step's own in the last bits.  It
needs a C++ compiler when it runs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from longtape.torch.graphs import CaptureFailed, StepGraph


def compiled_forward(graph: StepGraph, *, saving: bool) -> Callable[..., Any]:
    """As `programs.forward_program`; compiles at its first call for a graph."""
    key = ("compiled forward", saving)
    if key not in graph.cache:
        outputs = [*graph.outputs, *(r.node for r in graph.residuals if saving)]
        run = _compiled(graph.placeholders, graph.forward, outputs)
        count = len(graph.outputs)

        def program(*inputs: torch.Tensor) -> Any:
            found = run(inputs)
            results = tuple(_own(found[:count], inputs))
            return (results, list(found[count:])) if saving else results

        graph.cache[key] = program
    result: Callable[..., Any] = graph.cache[key]
    return result


def compiled_backward(graph: StepGraph, pattern: tuple[int, ...]) -> Callable[..., Any]:
    """As `programs.backward_program`; a cotangent that is undefined comes in as zeros."""
    key = ("compiled backward", pattern)
    if key not in graph.cache:
        if "compiled backward" not in graph.cache:
            graph.cache["compiled backward"] = _compiled(
                _backward_inputs(graph), graph.backward, _backward_outputs(graph)
            )
        graph.cache[key] = _Backward(graph, pattern, graph.cache["compiled backward"])
    result: Callable[..., Any] = graph.cache[key]
    return result


class _Backward:
    """Calls the compiled backward of a graph for one pattern of cotangents."""

    def __init__(self, graph: StepGraph, pattern: tuple[int, ...], run: Callable[..., Any]) -> None:
        self._graph, self._pattern, self._run = graph, pattern, run
        self._operands = [operand for operand in graph.operands if operand.role != "carry"]

    def __call__(
        self,
        residuals: Sequence[torch.Tensor],
        closed: Sequence[torch.Tensor],
        x: Sequence[Any],
        cotangents: Sequence[torch.Tensor],
        accumulators: Sequence[Any],
    ) -> Any:
        graph = self._graph
        outside = [(closed if operand.role == "closed" else x)[operand.index] for operand in self._operands]
        found = iter(self._run([*residuals, *map(_given, outside, self._like()), *self._tangents(cotangents)]))
        carry: list[Any] = [None] * graph.carry_leaves
        of_x: list[Any] = [None] * graph.x_leaves
        for operand, gradient in zip(graph.operands, graph.gradients, strict=True):
            if gradient is None:
                continue
            value = next(found)
            if operand.role == "closed":
                accumulators[operand.index].add(value)
            else:
                (carry if operand.role == "carry" else of_x)[operand.index] = value
        return carry, of_x

    def _like(self) -> list[torch.Tensor]:
        pairs = zip(self._graph.placeholders, self._graph.operands, strict=True)
        return [node.meta["val"] for node, operand in pairs if operand.role != "carry"]

    def _tangents(self, cotangents: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        flat, tangents = iter(cotangents), []
        for node, count in zip(self._graph.tangents, self._pattern, strict=True):
            if node is None:
                continue
            like = node.meta["val"]
            parts = [next(flat) for _ in range(count)]
            total = sum(parts[1:], parts[0]) if parts else torch.zeros(like.shape, dtype=like.dtype, device=like.device)
            tangents.append(_restrided(total, like))
        return tangents


def _given(value: Any, like: torch.Tensor) -> torch.Tensor:
    """An input; where backward does not read it the caller may have none to give."""
    return torch.empty_strided(like.shape, like.stride(), dtype=like.dtype) if value is None else value


def _restrided(value: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """The value in the layout that was compiled for."""
    if value.stride() == like.stride():
        return value
    return torch.empty_strided(like.shape, like.stride(), dtype=like.dtype, device=like.device).copy_(value)


def _own(results: Sequence[torch.Tensor], inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Results as objects of their own, which the caller may hand out."""
    taken = {id(value) for value in inputs}
    found = []
    for value in results:
        found.append(torch.ops.aten.alias(value) if id(value) in taken else value)
        taken.add(id(value))
    return found


def _backward_inputs(graph: StepGraph) -> list[fx.Node]:
    outside = [
        node for node, operand in zip(graph.placeholders, graph.operands, strict=True) if operand.role != "carry"
    ]
    return [*(r.node for r in graph.residuals), *outside, *(node for node in graph.tangents if node is not None)]


def _backward_outputs(graph: StepGraph) -> list[fx.Node]:
    return [node for node in graph.gradients if node is not None]


def _compiled(inputs: list[fx.Node], nodes: list[fx.Node], outputs: list[fx.Node]) -> Callable[..., Any]:
    """A part of the trace through the compiler."""
    from torch._guards import TracingContext, detect_fake_mode, tracing
    from torch._inductor import config
    from torch._inductor.compile_fx import compile_fx

    part = fx.Graph()
    constants: dict[str, Any] = {}
    by_node: dict[fx.Node, fx.Node] = {}
    for k, node in enumerate(inputs):
        by_node[node] = part.placeholder(f"i{k}")
        by_node[node].meta["val"] = node.meta["val"]
    for node in nodes:
        if node in by_node:
            continue
        if node.op == "get_attr":
            constants[f"c{len(constants)}"] = node.meta["constant"]
            by_node[node] = part.get_attr(f"c{len(constants) - 1}")
            by_node[node].meta = dict(node.meta)
        else:
            by_node[node] = part.node_copy(node, by_node.__getitem__)
    part.output(tuple(by_node[node] for node in outputs))
    module = fx.GraphModule(constants, part)
    values = [node.meta["val"] for node in inputs]
    mode = detect_fake_mode(values)
    try:
        # Random numbers are to be those that the step itself draws; a pool of compiling processes would stay.
        with config.patch(fallback_random=True, compile_threads=1), tracing(TracingContext(mode)), torch.no_grad():
            run: Any = compile_fx(module, values)
    except Exception as error:
        raise CaptureFailed(
            f"the compiler refuses it ({type(error).__name__}: {str(error).splitlines()[0]})"
        ) from error
    return lambda given: run(*given)
