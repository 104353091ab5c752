"""Which random number generators a step may draw from, beside PyTorch's default ones, which are replayed.

One that the step makes or seeds itself gives the same numbers whenever the step is run
again.  It is known by having drawn nothing since it was seeded.
"""

from __future__ import annotations

from typing import Any

import torch


class Generators:
    """The generators that one run of a step draws from."""

    def __init__(self) -> None:
        self.used = False
        """Whether any run has drawn from a generator of its own."""
        self._met: dict[int, torch.Generator] = {}

    def begin(self) -> None:
        """Another run begins."""
        self._met.clear()

    def is_repeatable(self, generator: Any) -> bool:
        """Whether a draw from it, now, would give the same numbers when the step is run again."""
        identity = generator._cdata
        if identity not in self._met:
            seeded = torch.Generator(device=generator.device).manual_seed(generator.initial_seed())
            if not torch.equal(seeded.get_state(), generator.get_state()):
                return False
            self._met[identity] = generator  # held, so that no other one gets its address in this run
            self.used = True
        return True


def refusal(func: object) -> str:
    """What is wrong with a draw that is not repeatable."""
    return (
        f"draws random numbers from a generator that it has not seeded itself ({func}), which would give others when "
        "the step is run again; make or seed it inside the step, or use PyTorch's default generator, which is replayed"
    )
