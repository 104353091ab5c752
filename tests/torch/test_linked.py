"""The ring, the guards and the copies between a device and pinned memory, one by one."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch

from longtape.actions import Key, Kind
from longtape.errors import BudgetError, DeviceError
from longtape.plan.choose import choose
from longtape.plan.costs import Costs, Problem
from longtape.protocols import Slot
from longtape.testing.device import SimulatedDevice, when_wanted
from longtape.torch.linked import Linked
from longtape.torch.places import Form
from longtape.torch.ring import Ring

LIKE = [torch.zeros(4, dtype=torch.float64), torch.zeros(3, dtype=torch.int64)]
STATE = 96


def state(value: int) -> list[torch.Tensor]:
    return [torch.full((4,), float(value), dtype=torch.float64), torch.full((3,), value)]


class Bench:
    """A place with two buffers, and some slots."""

    def __init__(self, device: SimulatedDevice, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("longtape.torch.linked.STAGING", 2)
        self.place = Linked(device, 10 * STATE)
        self.place.lay_out(Form(LIKE, 0))
        choice = choose(Problem(steps=4, state_nbytes=STATE, memory_nbytes=4 * STATE), Costs(1.0, 1.0))
        self.place.settle(choice, STATE)
        self.pool = self.place.pool(6, STATE, 64, is_state=True)

    def slot(self) -> Slot:
        return self.pool.take()

    def close(self) -> None:
        self.place.close()
        self.pool.close()


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Iterator[Bench]:
    with SimulatedDevice(when_wanted) as device:
        bench = Bench(device, monkeypatch)
        yield bench
        bench.close()


def save(bench: Bench, value: int) -> Slot:
    slot = bench.slot()
    bench.place.save(slot, state(value), None)
    return slot


def loaded(bench: Bench, slot: Slot) -> float:
    carry, _ = bench.place.load(slot)
    assert carry[0][0] == carry[1][0]
    return float(carry[0][0])


def test_what_is_still_in_the_ring_is_used_from_there(bench: Bench) -> None:
    first = save(bench, 1)
    assert loaded(bench, first) == 1
    assert not first.data.any()  # it has not even been copied: nobody wanted it
    first.guard.wait()
    assert first.data.any()


def test_what_has_left_the_ring_comes_back(bench: Bench) -> None:
    slots = [save(bench, value) for value in range(1, 6)]
    assert [loaded(bench, slot) for slot in slots] == [1, 2, 3, 4, 5]


def test_what_is_expected_is_on_its_way_and_stays(bench: Bench) -> None:
    slots = [save(bench, value) for value in range(1, 6)]
    bench.place.expect(Key(Kind.SNAPSHOT, 0), slots[0])
    later = save(bench, 9)
    assert loaded(bench, slots[0]) == 1
    assert loaded(bench, later) == 9
    bench.place.end_sweep()
    assert [link.count for link in bench.place.usage().links] == [6, 1]


def test_what_was_given_up_is_not_used(bench: Bench) -> None:
    slot = save(bench, 1)
    bench.place.forget(slot)
    slot.guard.wait()
    for view, leaf in zip(bench.place._form.leaves(torch.from_numpy(slot.data)), state(7), strict=True):
        view.copy_(leaf)
    assert loaded(bench, slot) == 7


def test_the_guard_of_a_slot_orders_copies_that_nothing_else_does(bench: Bench) -> None:
    """A leaves by one buffer, which is then computed into; A comes back into the other, last used before that."""

    def there_and_back() -> float:
        first, other = save(bench, 1), save(bench, 2)
        bench.place.load(other)
        bench.place._ring.find(other)
        save(bench, 3)  # into the buffer that A left by, after A has left
        return loaded(bench, first)

    assert there_and_back() == 1


def test_without_the_guard_of_a_slot_they_are_not_ordered(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    first = save(bench, 1)
    copied = bench.place._copied

    def unguarded(stream: object, lane: str, target: object, source: object, slot: Slot) -> object:
        slot.guard = None
        return copied(stream, lane, target, source, slot)

    monkeypatch.setattr(bench.place, "_copied", unguarded)
    bench.place.forget(first)
    with pytest.raises(DeviceError, match="no event orders them"):
        for buffer in bench.place._ring._buffers:
            buffer.busy = []
        bench.place.expect(Key(Kind.SNAPSHOT, 0), first)


def test_the_ring_gives_up_what_was_not_used_for_longest_and_spares_what_is_expected() -> None:
    ring = Ring([torch.zeros(1, dtype=torch.uint8) for _ in range(3)])
    slots = [Slot(np.zeros(1, np.uint8)) for _ in range(3)]
    for slot in slots:
        ring.take().holds = slot
    found = ring.find(slots[0])
    assert found is not None
    found.is_expected = True
    ring.find(slots[1])
    assert ring.take() is not found
    assert [ring.find(slot) is None for slot in slots] == [False, False, True]
    ring.forget(slots[0])
    assert not found.is_expected
    assert found in (ring.take(), ring.take())


def test_too_little_for_two_items(monkeypatch: pytest.MonkeyPatch) -> None:
    with SimulatedDevice() as device:
        place = Linked(device, STATE)
        place.lay_out(Form(LIKE, 0))
        choice = choose(Problem(steps=4, state_nbytes=STATE, memory_nbytes=4 * STATE), Costs(1.0, 1.0))
        with pytest.raises(BudgetError, match=f"give at least {2 * STATE} bytes"):
            place.settle(choice, STATE)
        place.close()
