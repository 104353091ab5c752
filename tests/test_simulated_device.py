"""The simulated device itself: as late as it may be, and never later."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import numpy as np
import pytest

from longtape.errors import BudgetError, DeviceError, UsageError
from longtape.protocols import Bytes
from longtape.testing.device import SimulatedDevice, at_once, drawn, when_wanted

pytestmark = pytest.mark.slow


@pytest.fixture
def device() -> Iterator[SimulatedDevice]:
    with SimulatedDevice(when_wanted) as device:
        yield device


def pinned(device: SimulatedDevice, value: int = 0) -> Bytes:
    memory = np.full(8, value, np.uint8)
    device.pin(memory)
    return memory


def test_a_copy_comes_when_it_is_wanted_and_no_sooner(device: SimulatedDevice) -> None:
    here, there = pinned(device, 1), device.reserve(8)
    device.into.copy(there, here)
    arrived = device.into.record()
    assert not arrived.is_over()
    assert there[0] == 0xFF
    arrived.wait()
    assert arrived.is_over()
    assert there[0] == 1


def test_one_stream_waits_for_another(device: SimulatedDevice) -> None:
    first, there, last = pinned(device, 3), device.reserve(8), pinned(device)
    device.into.copy(there, first)
    device.out.wait(device.into.record())
    device.out.copy(last, there)
    device.out.synchronize()
    assert last[0] == 3


def test_compute_waits_where_it_is_told_to(device: SimulatedDevice) -> None:
    here, there = pinned(device, 2), device.reserve(8)
    device.into.copy(there, here)
    device.compute.wait(device.into.record())
    assert there[0] == 2


def test_times_go_forward(device: SimulatedDevice) -> None:
    began = device.compute.record()
    ended = device.compute.record()
    ended.wait()
    assert device.seconds(began, ended) >= 0.0
    with pytest.raises(DeviceError, match="not over"):
        device.seconds(ended, device.compute.record())


@pytest.mark.parametrize("ordered", [True, False])
def test_accesses_that_no_event_orders(device: SimulatedDevice, ordered: bool) -> None:
    here, there = pinned(device), device.reserve(8)
    device.compute.touches(there, writes=True)
    if ordered:
        device.out.wait(device.compute.record())
        device.out.copy(here, there)
        return
    with pytest.raises(DeviceError, match="'out' reads bytes that the stream 'compute' may not yet have written"):
        device.out.copy(here, there)


def test_two_may_read_what_nobody_writes(device: SimulatedDevice) -> None:
    here, other, there = pinned(device), pinned(device), device.reserve(8)
    device.compute.touches(there, writes=False)
    device.out.copy(here, there)
    device.compute.touches(there, writes=False)
    device.out.copy(other, there)


def test_what_the_host_has_seen_is_done(device: SimulatedDevice) -> None:
    here, there = pinned(device), device.reserve(8)
    device.out.copy(here, there)
    with pytest.raises(DeviceError, match="no event orders them"):
        device.into.copy(there, here)
    device.out.record().wait()
    device.into.copy(there, here)


def test_what_a_worker_has_seen_orders_nothing(device: SimulatedDevice) -> None:
    here, there = pinned(device), device.reserve(8)
    device.out.copy(here, there)
    thread = threading.Thread(target=device.out.record().wait, name="longtape-write-0")
    thread.start()
    thread.join()
    with pytest.raises(DeviceError, match="no event orders them"):
        device.into.copy(there, here)


def test_only_pinned_memory_can_be_copied_from(device: SimulatedDevice) -> None:
    with pytest.raises(DeviceError, match="not pinned"):
        device.into.copy(device.reserve(8), np.zeros(8, np.uint8))
    with pytest.raises(UsageError, match="8 bytes were to be copied to a place of 4"):
        device.into.copy(device.reserve(8)[:4], pinned(device))


def test_limits() -> None:
    with SimulatedDevice(memory_nbytes=10, pinnable_nbytes=10) as device:
        device.reserve(10)
        with pytest.raises(BudgetError, match="which has 10 B"):
            device.reserve(11)
        pinned(device)
        with pytest.raises(BudgetError, match="could not be pinned"):
            pinned(device)


def test_a_lost_device_stays_lost_and_nobody_hangs() -> None:
    with SimulatedDevice(when_wanted, fail_at=2) as device:
        here, there = pinned(device), device.reserve(8)
        device.into.copy(there, here)
        device.into.record().wait()
        device.into.copy(there, here)
        arrived = device.into.record()
        for _ in range(2):
            with pytest.raises(DeviceError, match="lost at copy 2"):
                arrived.wait()
        with pytest.raises(DeviceError):
            device.compute.record()


def test_a_closed_device_takes_nothing_more() -> None:
    device = SimulatedDevice()
    device.compute.record().wait()
    device.close()
    device.close()
    with pytest.raises(DeviceError, match="is closed"):
        device.compute.record()


def test_delays() -> None:
    assert at_once("out") == 0.0
    first, second = drawn(3), drawn(3)
    assert [first("in") for _ in range(20)] == [second("in") for _ in range(20)]
