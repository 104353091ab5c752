"""The actions that reverse a window on a device, within slots of its own: Revolve, by the plan that every run follows.

Pure; the same for every window of one length, so they are kept.
"""

from __future__ import annotations

from functools import lru_cache

from longtape.actions import Action
from longtape.plan.layout import EXACT, Layout
from longtape.plan.simulate import Speeds, play


@lru_cache(maxsize=64)
def within(steps: int, slots: int) -> tuple[Action, ...]:
    """The actions that reverse so many steps within slots alone, at the fewest advances there are.

    The first state is the working one at the beginning, and takes a slot; the last step is not
    run before the sweep turns.

    Example: ``within(3, 1)`` stores state 0, advances to 2, reverses step 2, and goes back to 0 twice.
    """
    speeds = Speeds(1.0, 1.0, lambda key: 1.0, lambda key: 1.0)
    layout = Layout(tail=steps, stores=False, final_state=False)
    return tuple(play(steps, slots, speeds, layout, EXACT))
