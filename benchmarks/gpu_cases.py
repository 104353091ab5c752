"""The steps that `benchmarks.gpu` times, and the other ways to take their gradients.

Steps are the same on any device; sizes are given.  Inputs are made on the device from the
number of the step, so that a long sequence holds none of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import save_on_cpu
from torch.utils.checkpoint import checkpoint


class Inputs:
    """x of step k: one of a few tensors on the device."""

    def __init__(self, few: list[Tensor], steps: int) -> None:
        self._few, self._steps = few, steps

    def __len__(self) -> int:
        return self._steps

    def __getitem__(self, step: int) -> Tensor:
        return self._few[step % len(self._few)]


@dataclass
class Case:
    """A step, where it begins, and what gradients are taken for."""

    name: str
    step: Callable[[Any, Any], tuple[Any, None]]
    init: Any
    few: list[Tensor]
    leaves: list[Tensor]
    state_nbytes: int

    def inputs(self, steps: int) -> Inputs:
        return Inputs(self.few, steps)

    def gradients(self, final: Any) -> list[Tensor]:
        loss = sum(leaf.square().sum() for leaf in (final if isinstance(final, tuple) else (final,)))
        return list(torch.autograd.grad(loss, self.leaves))


def lstm(device: torch.device, *, hidden: int = 2048, batch: int = 256, inputs: int = 256) -> Case:
    """A compute-bound step with a small state."""
    torch.manual_seed(0)
    cell = torch.nn.LSTMCell(inputs, hidden).to(device)
    init = tuple((0.1 * torch.randn(batch, hidden, device=device)).requires_grad_() for _ in range(2))
    few = [torch.randn(batch, inputs, device=device) for _ in range(4)]
    step = lambda carry, x: (cell(x, carry), None)  # noqa: E731
    return Case("lstm", step, init, few, [*init, *cell.parameters()], 2 * batch * hidden * 4)


def stencil(device: torch.device, *, side: int = 512) -> Case:
    """A memory-bound step with a large state: Allen-Cahn on a periodic cube, with a coefficient to be found."""
    torch.manual_seed(0)
    init = (0.1 * torch.randn(side, side, side, device=device)).requires_grad_()
    rate = torch.tensor(0.1, device=device, requires_grad=True)

    def step(u: Tensor, x: Tensor) -> tuple[Tensor, None]:
        laplacian = sum(torch.roll(u, shift, axis) for axis in range(3) for shift in (1, -1)) - 6 * u
        return u + rate * (laplacian + u - u * u * u) + x, None

    few = [torch.full((), 1e-3 * k, device=device) for k in range(4)]
    return Case("stencil", step, init, few, [init, rate], side**3 * 4)


# Other ways ---------------------------------------------------------------------------------------


def run_steps(case: Case, carry: Any, start: int, stop: int) -> Any:
    """Steps as one writes them by hand."""
    for k in range(start, stop):
        carry, _ = case.step(carry, case.few[k % len(case.few)])
    return carry


def plain(case: Case, steps: int) -> list[Tensor]:
    """Everything kept by autograd: the ideal, as long as it fits."""
    return case.gradients(run_steps(case, case.init, 0, steps))


def forward_only(case: Case, steps: int) -> None:
    """The steps alone."""
    with torch.no_grad():
        run_steps(case, case.init, 0, steps)


def segments(case: Case, steps: int) -> list[Tensor]:
    """`torch.utils.checkpoint` in √N segments."""
    length = max(1, math.isqrt(steps))
    carry = case.init
    for start in range(0, steps, length):
        stop = min(start + length, steps)
        carry = checkpoint(lambda c, a=start, b=stop: run_steps(case, c, a, b), carry, use_reentrant=False)
    return case.gradients(carry)


def on_cpu(case: Case, steps: int, *, pinned: bool) -> list[Tensor]:
    """What autograd saves goes to the host's memory, tensor by tensor."""
    with save_on_cpu(pin_memory=pinned):
        final = run_steps(case, case.init, 0, steps)
    return case.gradients(final)


def community() -> tuple[str, Callable[[], AbstractContextManager[Any]]] | None:
    """A context that offloads what autograd saves on streams of its own, from a package that is installed."""
    try:
        from torchtune.training import OffloadActivations
    except ImportError:
        return None
    return "torchtune OffloadActivations", lambda: OffloadActivations(use_pin_memory=True, use_streams=True)


def offloaded(case: Case, steps: int, context: Callable[[], AbstractContextManager[Any]] = nullcontext) -> list[Tensor]:
    """Plain autograd within such a context."""
    with context():
        final = run_steps(case, case.init, 0, steps)
    return case.gradients(final)
