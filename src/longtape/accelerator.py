"""What a run asks of the device that its steps run on.

Implemented by a front end; nothing here knows a framework.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from longtape.actions import Key
from longtape.engine.meter import EventMeter
from longtape.plan.choose import Choice
from longtape.plan.costs import Costs, Device
from longtape.protocols import Pool, Slot
from longtape.report import DeviceReport

OnLink = Callable[[str, float, float], None]
"""``on_link(lane, began, ended)``: a copy ``"out"`` or ``"in"``, or compute ``"idle"`` for one; engine's clock."""


class SlotPool(Pool, Protocol):
    """A pool that is closed at the end."""

    @property
    def high_water(self) -> int:
        """The most slots that were out at once."""

    def close(self) -> None:
        """Release the memory; idempotent."""


class Accelerator(Protocol):
    """A device in front of the memory that a run keeps its items in, or which is that memory; executor's thread."""

    meter: EventMeter

    @property
    def limits(self) -> Device | None:
        """What the device has room for; None where the memory of the run is the device's."""

    def with_link(self, costs: Costs, nbytes: int) -> Costs:
        """Costs with the link's, measured with items of this size."""

    def pool(self, count: int, nbytes: int, alignment: int, *, is_state: bool) -> SlotPool:
        """The slots of one kind."""

    def settle(self, choice: Choice, item_nbytes: int) -> None:
        """The plan is chosen, and its largest item takes so many bytes: reserve what is needed on the device.

        Raises:
            BudgetError: It does not fit.
        """

    def watch(self, on_link: OnLink) -> None:
        """Whom to tell of copies."""

    def begin_sweep(self) -> None:
        """A sweep begins; may wait for the device."""

    def end_sweep(self) -> None:
        """A sweep has ended: wait until it has, on the device too."""

    def expect(self, key: Key, slot: Slot) -> None:
        """As `longtape.protocols.Ahead`."""

    def forget(self, slot: Slot) -> None:
        """As `longtape.protocols.Ahead`."""

    def usage(self) -> DeviceReport:
        """What was used of the device; complete after `close`."""

    def close(self) -> None:
        """Have nothing more touch the slots, and give the device's memory back; idempotent, raises nothing."""
