"""First windows of a captured scan, run as its sweeps run theirs, to be timed; nothing is kept of them."""

from __future__ import annotations

from collections.abc import Callable

from longtape.protocols import Slot
from longtape.torch.captured import CapturedSteps
from longtape.torch.eager import Cotangents, ones_like
from longtape.torch.inputs import Inputs
from longtape.torch.places import Place
from longtape.torch.structure import Leaves
from longtape.torch.tape import Cotangent


class FirstWindows:
    """The windows at the start of a sequence, all of the same length.

    Args:
        steps: Runs them.
        inputs: x of every step.
        known: How many steps there are at least.
        initial: A new copy of state 0.
        place: Where blocks are.
    """

    def __init__(
        self, steps: CapturedSteps, inputs: Inputs, known: int, initial: Callable[[], Leaves], place: Place
    ) -> None:
        self._steps, self._inputs, self._known = steps, inputs, known
        self._initial, self._place = initial, place
        self._numbers: list[int] = []
        self._last: tuple[Leaves, Leaves] = [], []

    def record(self, slot: Slot, count: int) -> None:
        steps, block = self._steps, self._place.filling(slot, self._steps.as_block)
        carry, y = self._initial(), Leaves()
        self._numbers = []
        for place in range(count):
            index = place % self._known
            carry, y, number = steps.record(index, carry, self._inputs.leaves(index), block, place)
            self._numbers.append(number)
        self._last = carry, y

    def pull_back(self, slot: Slot, count: int) -> None:
        steps, block = self._steps, self._place.reading(slot, self._steps.as_block)
        carry, y = self._last
        ones = ones_like([*carry, *y])
        carry_bar: list[Cotangent] = list(ones[: len(carry)])
        y_bar: Cotangents = list(ones[len(carry) :])
        for place in reversed(range(count)):
            x = self._inputs.leaves(place % self._known)
            carry_bar, _ = steps.pull_back(self._numbers[place], block, place, x, carry_bar, y_bar)

    def end(self) -> None:
        self._steps.forget()
