"""Windows of a captured scan, run as its sweeps run theirs, to be timed; nothing is kept of them."""

from __future__ import annotations

from collections.abc import Callable

from longtape.protocols import Slot
from longtape.torch.blocks import Block
from longtape.torch.captured import CapturedSteps
from longtape.torch.eager import Cotangents, ones_like
from longtape.torch.inputs import Inputs
from longtape.torch.places import Place
from longtape.torch.structure import Leaves
from longtape.torch.tape import Cotangent


class TrialWindows:
    """Windows in which step 0 is run again and again, each time from its last result.

    Args:
        steps: Runs it.
        inputs: Where its x is.
        initial: A new copy of state 0.
        place: Where blocks are.
    """

    def __init__(self, steps: CapturedSteps, inputs: Inputs, initial: Callable[[], Leaves], place: Place) -> None:
        self._steps, self._inputs = steps, inputs
        self._initial, self._place = initial, place
        self._numbers: list[int] = []
        self._last: tuple[Leaves, Leaves] = [], []

    def record(self, slot: Slot, count: int) -> None:
        self.record_into(self._place.filling(slot, self._steps.as_block), count)

    def pull_back(self, slot: Slot, count: int) -> None:
        self.pull_back_from(self._place.reading(slot, self._steps.as_block), count)

    def record_into(self, block: Block, count: int) -> None:
        """Run so many steps and keep their residuals."""
        carry, y = self._initial(), Leaves()
        self._numbers = []
        for place in range(count):
            carry, y, number = self._steps.record(0, carry, self._inputs.leaves(0), block, place)
            self._numbers.append(number)
        self._last = carry, y

    def pull_back_from(self, block: Block, count: int) -> None:
        """Their adjoint, for cotangents of one."""
        steps = self._steps
        carry, y = self._last
        ones = ones_like([*carry, *y])
        carry_bar: list[Cotangent] = list(ones[: len(carry)])
        y_bar: Cotangents = list(ones[len(carry) :])
        for place in reversed(range(count)):
            number = self._numbers[place]
            x = self._inputs.leaves(0) if steps.needs_x(number) else self._inputs.absent()
            carry_bar, _ = steps.pull_back(number, block, place, x, carry_bar, y_bar)

    def end(self) -> None:
        self._steps.forget()
