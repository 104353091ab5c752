"""A compute-bound step with small state: an LSTM cell of 256 units, batch 64, in float32.

The loss is the squared norm of the last h, so that nothing but the final carry matters.
Gradients are taken for the cell's parameters and the initial carry.
"""

from __future__ import annotations

import torch
from torch import Tensor

BATCH, INPUTS, HIDDEN = 64, 64, 256

Carry = tuple[Tensor, Tensor]


class Problem:
    """The cell, its inputs and its initial carry, the same for every run."""

    def __init__(self, steps: int, seed: int = 0, hidden: int = HIDDEN) -> None:
        torch.manual_seed(seed)
        self.steps = steps
        self.cell = torch.nn.LSTMCell(INPUTS, hidden)
        self.inputs = torch.randn(steps, BATCH, INPUTS)
        self.carry = (
            (0.1 * torch.randn(BATCH, hidden)).requires_grad_(),
            (0.1 * torch.randn(BATCH, hidden)).requires_grad_(),
        )

    @property
    def leaves(self) -> list[Tensor]:
        """What gradients are taken for."""
        return [*self.carry, *self.cell.parameters()]

    def step(self, carry: Carry, x: Tensor) -> tuple[Carry, None]:
        """One step, in the form that a scan takes."""
        return self.cell(x, carry), None

    def run(self, carry: Carry, inputs: Tensor) -> Carry:
        """Every step of `inputs`, as one writes it by hand."""
        for x in inputs:
            carry, _ = self.step(carry, x)
        return carry

    @staticmethod
    def loss(carry: Carry) -> Tensor:
        return carry[0].square().sum()


class InPlace:
    """The problem as `baselines.revolve` drives it: a working carry, slots, and one step's adjoint at a time."""

    def __init__(self, problem: Problem, slots: int) -> None:
        self.problem = problem
        self.work: Carry = tuple(part.detach() for part in problem.carry)  # type: ignore[assignment]
        self.slots = torch.zeros(slots, 2, BATCH, HIDDEN)
        self.adjoint: list[Tensor] = []
        self.gradients = [torch.zeros_like(leaf) for leaf in problem.cell.parameters()]

    def save(self, slot: int) -> None:
        self.slots[slot, 0], self.slots[slot, 1] = self.work

    def load(self, slot: int) -> None:
        self.work = (self.slots[slot, 0], self.slots[slot, 1])

    def advance(self, start: int, stop: int) -> None:
        with torch.no_grad():
            self.work = self.problem.run(self.work, self.problem.inputs[start:stop])

    def turn(self) -> None:
        """The working carry is that before the last step; set the adjoint of the one after it."""
        with torch.no_grad():
            last, _ = self.problem.step(self.work, self.problem.inputs[-1])
        self.adjoint = [2 * last[0], torch.zeros_like(last[1])]

    def reverse(self, index: int) -> None:
        carry: Carry = tuple(part.detach().requires_grad_() for part in self.work)  # type: ignore[assignment]
        after, _ = self.problem.step(carry, self.problem.inputs[index])
        parameters = list(self.problem.cell.parameters())
        gradients = torch.autograd.grad(after, [*carry, *parameters], self.adjoint)
        self.adjoint = list(gradients[:2])
        for total, gradient in zip(self.gradients, gradients[2:], strict=True):
            total += gradient

    @property
    def result(self) -> list[Tensor]:
        """Gradients in the order of `Problem.leaves`."""
        return [*self.adjoint, *self.gradients]
