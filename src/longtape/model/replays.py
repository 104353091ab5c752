"""Checks that steps give the same states when the reverse sweep runs them again.

Owns what is remembered of a few states of the forward sweep that no snapshot keeps, so that they have to be
computed again.  Always on: some eight hashes a sweep, and rounding is allowed.  `Witness` compares every state bit
for bit, where the caller asks for it.

Invariant: a state is noted only where the reverse sweep must pass through it, which is where a window starts.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence

from longtape.errors import ReplayError
from longtape.known import KnownState
from longtape.model.protocol import Array

MOST_NOTED = 4
"""States noted at the beginning of the sweep; beside them, the last one that is not kept."""


class Replays:
    """Watches one sweep.

    Args:
        live: The arrays of the working state.
        steps: N, or None where it is not known.
    """

    def __init__(self, live: Callable[[], Sequence[Array]], steps: int | None) -> None:
        self._live, self._steps = live, steps
        self.window = 1
        """Steps that are reversed in one call of the model, which then runs those inside by itself."""
        self.kept: int | None = 0
        """The state that was kept last; None: the one that is live was loaded."""
        self._left = MOST_NOTED
        self._known: dict[int, KnownState] = {}
        self._initial: KnownState | None = None
        self._watches = True
        self._ran = False
        self.turned = False

    def give_up(self) -> None:
        """Watch nothing: what comes back from storage is rounded."""
        self._watches = False

    def begin(self, start: int, stop: int) -> int | None:
        """Before steps ``[start, stop)``: the state among them to be noted, if there is one."""
        if self.turned:
            return None
        kept, self.kept = start if self.kept is None else self.kept, start
        if start == 0:
            self._initial = KnownState(self._live())
        if not self._watches or not (self._left or stop == self._steps):
            return None
        last = (stop - 1) // self.window * self.window
        if last > start:
            return last
        if start != kept and start % self.window == 0:
            self.note(start)
        return None

    def note(self, state: int) -> None:
        """The working state is `state`, which no snapshot keeps."""
        self._left = max(0, self._left - 1)
        self._known[state] = KnownState(self._live())

    def passed(self, state: int) -> None:
        """Steps have led to `state`."""
        self._ran = self._ran or state > 0
        if self.turned and state in self._known:
            self._compare(state)

    def turn(self) -> None:
        """The forward sweep has ended."""
        self.turned = True
        if self._ran and self._initial is not None and self._initial.is_same(KnownState(self._live())):
            warnings.warn(
                "longtape: the final state is the initial one, bit for bit; if steps should have changed it, "
                "check that they update the arrays in model.state in place",
                RuntimeWarning,
                stacklevel=2,
            )

    def _compare(self, state: int) -> None:
        for index in self._known.pop(state).differing(self._live()):
            raise ReplayError(
                f"state {state} is another one when the reverse sweep computes it again: state[{index}] differs. "
                "The gradient would be that of other steps. Either something that the steps read has changed since "
                "forward(), such as an attribute of the model, or advance() counts its calls or does not run "
                "exactly the steps that it is asked for; verify=True finds the first such step",
                step=state - 1,
                leaf=f"state[{index}]",
            )
