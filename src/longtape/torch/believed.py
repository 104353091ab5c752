"""What one scan believes of its step, and the moments at which that is checked.

Thin: `surroundings` knows what a step reaches, `leavings` what step 0 keeps and changes, and the
job compares the last step's results.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch

from longtape.torch.eager import EagerStep
from longtape.torch.inputs import Inputs
from longtape.torch.job import ScanJob, named
from longtape.torch.leavings import Left, changes_what_it_reaches, examine, left_behind
from longtape.torch.structure import Leaves, unique
from longtape.torch.surroundings import ReadTensors, Surroundings


class Believed:
    """The beliefs of one call, from before the first step runs until autograd releases its graph.

    Args:
        roots: The step, and other functions of the caller's that the sweeps run.
        init: Leaves of the first carry.
        inputs: x of every step.
    """

    def __init__(self, roots: Sequence[Any], init: Leaves, inputs: Inputs) -> None:
        self._roots, self._init, self._inputs = roots if torch.is_grad_enabled() else (), init, inputs
        self._before = Surroundings(self._roots)
        self._held: Surroundings | None = None
        self._read: ReadTensors | None = None
        self._left: list[Left] | None = None
        """None before step 0 was examined."""

    def begin_anew(self) -> None:
        """Steps of the plain loop were run, and the sweeps are to begin as they did.

        Raises:
            StepError: They wrote to tensors.
        """
        self._before.put_back()
        if written := self._before.written():
            raise changes_what_it_reaches("a step", [f"the tensor {path} in place" for path in written])

    def examine(self, job: ScanJob) -> None:
        """See what step 0 keeps and changes; captured graphs do neither."""
        step, randomness = job.stepper, job.randomness
        if not isinstance(step, EagerStep) or self._left is not None:
            return
        start = randomness.state()

        def fresh() -> Leaves:
            job.load_initial()
            randomness.set(start)
            return job.carry

        with named(0):
            x = self._inputs.leaves(0)
            self._left, self._before = examine(step, fresh, x, self._before, lambda: Surroundings(self._roots))
        randomness.note()

    def hold(self, job: ScanJob) -> None:
        """The forward sweep has run: keep hold of what its steps reached, read and gave at last.

        Raises:
            StepError: They changed what they reach.
        """
        held = Surroundings(self._roots)
        changed = self._before.differences(held, besides=lambda: Surroundings([self._inputs.reader]).keys())
        if changed:
            raise changes_what_it_reaches("a step", changed)
        closed = unique([*job.stepper.closed_over(), *job.stepper.outside()])
        self._read = ReadTensors(
            [
                *((f"leaf {k} of init", leaf) for k, leaf in enumerate(self._init)),
                *((f"leaf {k} of xs", leaf) for k, leaf in enumerate(self._inputs.stacked)),
                *((held.path_of(t) or f"a tensor of shape {list(t.shape)}", t) for t in closed),
            ]
        )
        self._before = self._held = held
        job.remember_last()

    def give_back(self, outputs: Sequence[torch.Tensor]) -> None:
        """Where the last step has left something, leave what is the same and has a gradient."""
        for place, what in self._left or ():
            if isinstance(what, torch.Tensor):
                result = what
            else:
                result = outputs[what] if what < len(self._init) else outputs[what][-1]
            try:
                left = place.read()
            except LookupError:
                continue  # it has left nothing
            if not isinstance(left, torch.Tensor) or not torch.equal(left, result):
                raise left_behind("the last step", result, place.path)
            place.write(result)

    def hold_while_alive(self, token: torch.Tensor) -> None:
        """Hold on only as long as this lives, so that no call keeps what others returned."""
        weakref.finalize(token, _let_go, weakref.ref(self))

    def let_go(self) -> None:
        """Autograd has released its graph: there is no other way back."""
        self._before, self._held, self._read = Surroundings(()), None, None

    # In backward -----------------------------------------------------------------------------------

    def check_unchanged(self) -> None:
        """Refuse to go back through steps whose tensors and arrays were changed since."""
        if self._read is not None and self._held is not None:
            self._read.check()
            self._held.check_arrays()

    def restored(self) -> AbstractContextManager[None]:
        """Steps reach what they reached in the forward sweep."""
        assert self._held is not None
        return self._held.restored()

    def check_nothing_left(self) -> None:
        """Steps ran with gradients: what they have kept shows."""
        assert self._held is not None
        expected = {(id(place.owner), place.key) for place, _ in self._left or ()}
        for place in Surroundings(self._roots).differentiable_since(self._held):
            if (id(place.owner), place.key) not in expected:
                raise left_behind("a step", place.value, place.path)


def _let_go(believed: weakref.ref[Believed]) -> None:
    if (known := believed()) is not None:
        known.let_go()
