"""A step captured as graphs.

This file owns the meeting with TorchDynamo: compiling a step, calling it under Dynamo's
guards, and telling which graph answered.  ``partition.py`` splits a graph,
``programs.py`` writes it as Python, ``tape.py`` runs and reverses a loop with it.

Every call of a step passes Dynamo's guards, so a step that would now take another path
(a closed-over flag, another shape) meets another graph, or `CaptureFailed`; it is never
answered by a graph traced for something else.  Python side effects of a step are
refused at capture: a graph could not repeat them when a step is run again.

Threads: any number may use one `CapturedStep`, each through tapes of its own.
"""

from __future__ import annotations

import contextlib
import threading
import types
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.utils._pytree as pytree

from longtape.torch.compiled import compiled_forward
from longtape.torch.graphs import CaptureFailed, Operand, Signature, StepGraph, leaf_number
from longtape.torch.partition import trace
from longtape.torch.programs import forward_program
from longtape.torch.reasons import is_lasting, reason, silence_loggers, this_thread

Leaves = Sequence[Any]
"""Leaves of a pytree in its order: tensors, and None where the tree has None."""

below_autograd = torch._C._AutoDispatchBelowAutograd
"""Programs run under it: nothing is recorded for autograd, and operators are entered quicker."""

_SETTINGS = {
    # Shapes and Python numbers are part of what is captured.
    "automatic_dynamic_shapes": False,
    "assume_static_by_default": True,
    "capture_scalar_outputs": False,
    "capture_dynamic_output_shape_ops": False,
    # A force that is the gradient of an energy is part of the step.
    "trace_autograd_ops": True,
    # What would differ from the step as it is must fail, and not be approximated.
    "suppress_errors": False,
    "side_effect_replay_policy": "error",
    "use_numpy_random_stream": True,
    "skip_nnmodule_hook_guards": False,
    # A profiler hook that costs as much as the guards of a small step.
    "record_runtime_overhead": False,
}


class Call(threading.local):
    """The call of a step that this thread is in, and its answer."""

    def __init__(self) -> None:
        self.saving = False
        self.leaves: tuple[Leaves, Leaves] = ((), ())
        self.graph: StepGraph | None = None
        """The graph that answered; None until it has begun to run."""
        self.inputs: tuple[torch.Tensor, ...] = ()
        self.outputs: tuple[torch.Tensor, ...] = ()
        self.residuals: list[torch.Tensor] = []
        self.rng_states: dict[torch.device, torch.Tensor] = {}
        """Before the call, where it compiled a graph that draws random numbers."""
        self.settled = False
        """Inside `CapturedStep.settings`."""
        self.outside: dict[str, Any] = {}
        """Dynamo's settings outside of it."""
        self.switched_off = False
        """Dynamo is switched off, and would run the step without capturing anything."""

    def begin(self, carry: Leaves, x: Leaves, *, saving: bool) -> None:
        """Forget the answer of the call before."""
        self.saving, self.leaves, self.graph = saving, (carry, x), None

    def forget(self) -> None:
        """Hold no tensor: some are views of slots."""
        self.leaves, self.graph = ((), ()), None
        self.inputs = self.outputs = ()
        self.residuals = []


class CapturedStep:
    """The graphs of a step, kept between runs.

    A step is compiled at its first call, and again when its guards fail; both take
    seconds, so keep one `CapturedStep` per function.  It serves function objects that
    differ in what they close over but share their code.
    """

    def __init__(
        self, carry_spec: pytree.TreeSpec, x_spec: pytree.TreeSpec, *, limit: int = 8, compiled: bool = False
    ) -> None:
        """Make an empty one; nothing is compiled yet.

        Args:
            carry_spec: structure of the carry.
            x_spec: structure of x.
            limit: how many graphs a step may need before capture gives up.
            compiled: hand graphs to PyTorch's compiler.
        """
        self.compiled = compiled
        self.carry_spec = carry_spec
        self.x_spec = x_spec
        self.y_spec: pytree.TreeSpec | None = None
        """Structure of y; None before the first call."""
        self.graphs: list[StepGraph] = []
        self.failure: str | None = None
        """Why capture has failed; later calls fail at once for the same reason."""
        self._limit = limit
        self._old_graphs = 0
        self._call = Call()
        self._compiled: Callable[..., Any] | None = None

    def begin(self) -> None:
        """A new run begins: graphs of earlier ones may be forgotten if it needs many of its own."""
        self._old_graphs = len(self.graphs)

    @property
    def uses_rng(self) -> bool:
        """Whether a graph seen so far draws random numbers: running a step again needs the generator's state."""
        return any(graph.uses_rng for graph in self.graphs)

    @property
    def stride_nbytes(self) -> int:
        """Bytes that each step of a block takes, the most over the graphs seen so far."""
        linkable = all(set(g.linked_leaves) <= set(h.stored_carry) for g in self.graphs for h in self.graphs)
        return max((g.linked_nbytes if linkable else g.nbytes for g in self.graphs), default=0)

    @property
    def head_nbytes(self) -> int:
        """Bytes that the first step of a block takes beyond `stride_nbytes`."""
        return max((g.nbytes for g in self.graphs), default=0) - self.stride_nbytes

    def block_nbytes(self, steps: int) -> int:
        """Bytes of a block for `steps` consecutive steps."""
        return self.head_nbytes + steps * self.stride_nbytes

    @contextlib.contextmanager
    def settings(self) -> Iterator[None]:
        """What must hold while steps run: gradients on, Dynamo strict and quiet.

        Entering costs about as much as a small step; hold it around a sweep.
        """
        import torch._dynamo
        from torch._dynamo import config

        wanted = {**_SETTINGS, "recompile_limit": self._limit}
        known = {name: value for name, value in wanted.items() if hasattr(config, name)}
        call = self._call
        before = call.settled, call.outside, call.switched_off
        outside = {name: getattr(config, name) for name in known}
        switched_off = config.disable or torch._dynamo.eval_frame._stance.stance != "default"
        with config.patch(known), warnings.catch_warnings(), torch.enable_grad():
            warnings.filterwarnings("ignore", module=r"torch\.")
            call.settled, call.outside, call.switched_off = True, outside, switched_off
            try:
                yield
            finally:
                call.settled, call.outside, call.switched_off = before

    @contextlib.contextmanager
    def outside_settings(self) -> Iterator[None]:
        """Inside `settings`: Dynamo as the caller has set it."""
        from torch._dynamo import config

        with config.patch(self._call.outside) if self._call.outside else contextlib.nullcontext():
            yield

    @property
    def answer(self) -> StepGraph:
        """The graph that answered this thread's last call."""
        assert self._call.graph is not None
        return self._call.graph

    def forget(self) -> None:
        """Hold nothing of the last call."""
        self._call.forget()

    def run(self, step: Callable[..., Any], carry: Leaves, x: Leaves, *, saving: bool) -> Call:
        """Run one step under its guards; the answer stands until this thread's next call.

        Raises:
            CaptureFailed: the step was not run, or its generator was set back; run it as it is.
        """
        call = self._call
        if self.failure is not None:
            raise CaptureFailed(self.failure)
        if not call.settled:
            with self.settings():
                return self.run(step, carry, x, saving=saving)
        if call.switched_off:
            raise CaptureFailed("TorchDynamo is switched off")
        call.begin(carry, x, saving=saving)
        this_thread.capturing = True
        try:
            tree = (self._compiled or self._compile())(step, *carry, *x)
        except Exception as error:
            if call.graph is not None:  # the program ran: this is the step's own failure
                raise
            if self._old_graphs and type(error).__name__ == "FailOnRecompileLimitHit":
                self._compiled, self.graphs, self._old_graphs = None, [], 0
                return self.run(step, carry, x, saving=saving)
            said = reason(error)
            if is_lasting(error):
                self.failure = said
            raise CaptureFailed(said) from error
        finally:
            this_thread.capturing = False
        if call.graph is None:
            raise CaptureFailed("the step computes nothing")
        if call.graph.y_slots is None:
            self._learn_structure(call, call.graph, tree)
        return call

    def _compile(self) -> Callable[..., Any]:
        silence_loggers()
        carry_spec, x_spec, split = self.carry_spec, self.x_spec, self.carry_spec.num_leaves

        def flat_step(step: Callable[..., Any], *leaves: Any) -> Any:
            carry, y = step(
                pytree.tree_unflatten(list(leaves[:split]), carry_spec),
                pytree.tree_unflatten(list(leaves[split:]), x_spec),
            )
            # A clone makes each leaf an output of the graph, even one that is an argument or a closed-over
            # tensor.  The traced clones are taken out again.
            return pytree.tree_map(lambda leaf: leaf.clone() if isinstance(leaf, torch.Tensor) else leaf, (carry, y))

        # Dynamo keeps compiled code, and counts it, per code object: each captured step has its own.
        code, cells = flat_step.__code__.replace(), flat_step.__closure__
        own = types.FunctionType(code, flat_step.__globals__, "flat_step", None, cells)
        self._compiled = torch.compile(own, backend=self._backend, fullgraph=True)
        return self._compiled

    def _backend(self, module: torch.fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        """Dynamo's back end: trace and split the graph of the call in progress."""
        call = self._call
        carry, x = call.leaves
        if not all(isinstance(value, torch.Tensor) for value in inputs):
            raise CaptureFailed("the step uses a Python number that changes from call to call")
        asked: list[torch.fx.Node] = list(module.graph.output_node().args[0])  # type: ignore[arg-type]
        place = {node: k for k, node in enumerate(module.graph.nodes)}
        # The clones of the leaves were traced in the leaves' order.
        order = sorted(range(len(asked)), key=lambda k: place[asked[k]])
        signature = Signature(
            operands=_operands(module, len(carry)),
            differentiable=[bool(asked[k].meta["example_value"].requires_grad) for k in order],
            carry_positions=[k for k, leaf in enumerate(carry) if leaf is not None],
            carry_leaves=len(carry),
            x_leaves=len(x),
        )
        forward = module.forward

        def in_order(*arguments: torch.Tensor) -> tuple[torch.Tensor, ...]:
            outputs = forward(*arguments)
            return tuple(outputs[k] for k in order)

        graph = trace(in_order, inputs, signature)
        self.graphs.append(graph)
        call.rng_states = rng_states(inputs) if graph.uses_rng else {}
        return _dispatcher(call, graph, [order.index(k) for k in range(len(order))], compiled=self.compiled)

    def _learn_structure(self, call: Call, graph: StepGraph, tree: Any) -> None:
        """Check, at a graph's first answer, that its outputs are the leaves of the step's results, in order."""
        leaves, spec = pytree.tree_flatten(tree[0])
        y_leaves, y_spec = pytree.tree_flatten(tree[1])
        carry = call.leaves[0]
        outputs = [leaf for leaf in [*leaves, *y_leaves] if leaf is not None]
        if spec != self.carry_spec or any((a is None) != (b is None) for a, b in zip(leaves, carry, strict=True)):
            self.failure = f"the step returned a carry of another structure ({spec} after {self.carry_spec})"
        elif not all(isinstance(leaf, torch.Tensor) for leaf in outputs):
            self.failure = "the step returned something that is no tensor, in a carry or y of tensors"
        elif len(outputs) != len(call.outputs) or any(a is not b for a, b in zip(outputs, call.outputs, strict=True)):
            self.failure = "the step has results besides those it returns"
        elif self.y_spec is not None and self.y_spec != y_spec:
            self.failure = f"the step returned a y of another structure ({y_spec} after {self.y_spec})"
        if self.failure is not None:
            self.failure = " ".join(self.failure.split())
            set_back(call.rng_states)
            raise CaptureFailed(self.failure)
        self.y_spec = y_spec
        numbers = iter(range(len(outputs)))
        slots = [None if leaf is None else next(numbers) for leaf in [*leaves, *y_leaves]]
        graph.carry_slots, graph.y_slots = slots[: len(leaves)], slots[len(leaves) :]


def rng_states(inputs: Sequence[torch.Tensor]) -> dict[torch.device, torch.Tensor]:
    """States of the default generators that a step with these inputs may draw from."""
    devices = {tensor.device for tensor in inputs if tensor.device.type not in ("cpu", "meta")}
    states = {device: torch.get_device_module(device).get_rng_state(device) for device in devices}
    return {torch.device("cpu"): torch.get_rng_state(), **states}


def set_back(states: dict[torch.device, torch.Tensor]) -> None:
    """Put the generators into these states."""
    for device, state in states.items():
        if device.type == "cpu":
            torch.set_rng_state(state)
        else:
            torch.get_device_module(device).set_rng_state(state, device)


def _operands(module: torch.fx.GraphModule, carry_leaves: int) -> list[Operand]:
    """What each placeholder of Dynamo's graph is, by the source that its guards name."""
    operands = []
    closed = 0
    for node in module.graph.find_nodes(op="placeholder"):
        source = node.meta["grapharg"].source.name
        leaf = leaf_number(source if isinstance(source, str) else source())
        if leaf is None:
            operands.append(Operand("closed", closed))
            closed += 1
        elif leaf < carry_leaves:
            operands.append(Operand("carry", leaf))
        else:
            operands.append(Operand("x", leaf - carry_leaves))
    return operands


def _dispatcher(call: Call, graph: StepGraph, asked: list[int], *, compiled: bool) -> Callable[..., Any]:
    """What Dynamo calls in place of its graph; it leaves its answer in `call`."""
    written = compiled_forward if compiled else forward_program
    advance, record = written(graph, saving=False), written(graph, saving=True)
    in_order = asked == list(range(len(asked)))
    casting = torch._C._is_any_autocast_enabled()

    def dispatch(*inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        call.graph, call.inputs = graph, inputs
        with below_autograd():
            if call.saving:
                outputs, call.residuals = record(*inputs)
            else:
                outputs = advance(*inputs)
        call.outputs = outputs
        return outputs if in_order else tuple(outputs[k] for k in asked)

    def dispatch_without_casts(*inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        with torch._C._DisableAutocast():  # the casts are in the graph
            return dispatch(*inputs)

    return dispatch_without_casts if casting else dispatch
