"""What PyTorch may be doing around a scan: what its sweeps cannot pass through is refused, the rest kept apart.

Owns the words for transformations of `torch.func`, forward-mode derivatives and tracers.  The sweeps
take their own gradients of single steps, so a transformation that wraps tensors around them sees
constants, and its derivatives would be zero without a word.  Inside a step anything goes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ParamSpec, TypeVar

import torch
from torch._C._dynamo.eval_frame import _FrameAction, _FrameExecStrategy, set_code_exec_strategy
from torch._C._functorch import TransformType, is_legacy_batchedtensor, peek_interpreter_stack
from torch.autograd import forward_ad

from longtape.errors import UsageError

_P = ParamSpec("_P")
_R = TypeVar("_R")

_VMAP_ADVICE = (
    "give carry and x a batch dimension and let the step map over it (torch.func.vmap inside the step works), "
    "so that one loop carries the whole batch"
)
_PLAIN_LOOP = "a plain loop over the steps can be transformed in any way"


def refuse_transforms(what: str) -> None:
    """Raise where the call is transformed by something that would lose its gradients.

    Raises:
        UsageError: Names the transformation, and what to use instead.
    """
    innermost: Any = peek_interpreter_stack()
    if innermost is not None:
        raise UsageError(_refusal(what, innermost.key()))
    if vars(forward_ad)["_current_level"] >= 0 and torch._C._is_fwd_grad_enabled():
        raise UsageError(_refusal(what, TransformType.Jvp))
    if torch.is_grad_enabled() and _is_traced():
        raise UsageError(
            f"longtape.torch.{what} is being traced (torch.export, make_fx, torch.jit.trace, FakeTensorMode), but it "
            "moves data between its steps from Python; trace the step by itself, or call under torch.no_grad(), where "
            f"{what} is a plain loop"
        )


def _refusal(what: str, transform: TransformType) -> str:
    name = f"longtape.torch.{what}"
    if transform == TransformType.Vmap:
        return f"{name} cannot be called inside torch.func.vmap; {_VMAP_ADVICE}"
    if transform == TransformType.Jvp:
        return (
            f"{name} has no forward-mode derivatives (torch.func.jvp, jacfwd, hessian, linearize, "
            f"torch.autograd.forward_ad); use reverse mode (backward or torch.autograd.grad), or move the call out of "
            f"the transformation if nothing is to be differentiated through it; {_PLAIN_LOOP}"
        )
    if transform == TransformType.Grad:
        return (
            f"{name} cannot be differentiated by torch.func (grad, vjp, jacrev); use "
            "backward or torch.autograd.grad on tensors that require a gradient, also with torch.func.functional_call, "
            "or move the call out of the transformation if nothing is to be differentiated through it; "
            f"{_PLAIN_LOOP}"
        )
    return f"{name} cannot be called inside a transformation of torch.func ({transform}); {_PLAIN_LOOP}"


def _is_traced() -> bool:
    modes = torch._C._TorchDispatchModeKey
    found = (torch._C._get_dispatch_mode(mode) for mode in (modes.FAKE, modes.PROXY))
    return torch._C._is_tracing() or any(mode is not None for mode in found)


def refuse_batched(cotangents: Iterable[torch.Tensor | None]) -> None:
    """Raise where a backward pass is to pull back many cotangents at once.

    Raises:
        UsageError: What to do instead.
    """
    batched = any(bar is not None and is_legacy_batchedtensor(bar) for bar in cotangents)
    if batched or peek_interpreter_stack() is not None:
        raise UsageError(
            "a longtape.torch loop pulls back one set of cotangents at a time, but its backward pass is inside "
            "torch.func.vmap (is_grads_batched=True, torch.autograd.functional.jacobian with vectorize=True, gradcheck "
            "with check_batched_grad=True, torch.func.jacrev); call torch.autograd.grad once for each with "
            "retain_graph=True, or leave those options out"
        )


@contextmanager
def hidden_from_hooks() -> Iterator[None]:
    """Around sweeps: saved-tensor hooks around the call, such as a checkpoint's, do not see what single steps save.

    A checkpoint counts what is saved, and a sweep that is run again saves another number of tensors.
    """
    state: Any = torch._C._autograd
    hidden = []
    while (hooks := state._top_saved_tensors_default_hooks(True)) is not None:
        state._pop_saved_tensors_default_hooks()
        hidden.append(hooks)
    try:
        yield
    finally:
        for pack, unpack in reversed(hidden):
            state._push_saved_tensors_default_hooks(pack, unpack)


@contextmanager
def without_hooks(tensors: Sequence[torch.Tensor]) -> Iterator[None]:
    """While a step is pulled back: hooks on what it closes over wait for the gradient of all steps."""
    hooked = [(hooks, dict(hooks)) for tensor in tensors if (hooks := tensor._backward_hooks)]
    retained = [(tensor, tensor.grad) for tensor in tensors if tensor.retains_grad]
    for hooks, _ in hooked:
        hooks.clear()
    try:
        yield
    finally:
        for hooks, kept in hooked:
            hooks.update(kept)
        for tensor, gradient in retained:
            tensor.grad = gradient


def graph_break(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """Have `torch.compile` leave a function, and all that it calls, as it is: a graph break.

    As `torch.compiler.disable`, which imports TorchDynamo, for seconds, whether or not it is used.
    """

    @functools.wraps(function)
    def call(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        return function(*args, **kwargs)

    marked: Any = call
    marked._torchdynamo_disable, marked._torchdynamo_disable_msg = True, "longtape runs its sweeps from Python"
    set_code_exec_strategy(marked.__code__, _FrameExecStrategy(_FrameAction.SKIP, _FrameAction.SKIP))
    return call
