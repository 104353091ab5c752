"""The wrappers that tests of the engine lean on."""

import errno
import random
import threading
from collections.abc import Callable

import numpy as np
import pytest

from longtape.errors import DamagedBlock, StateError, StorageError, StorageFull, UsageError
from longtape.testing.tiers import (
    Call,
    DamagingTier,
    FailingTier,
    GatedTier,
    ThrottledTier,
    damage,
    noise,
    nth,
    snapshot,
)
from longtape.tiers.memory import MemoryTier


class Task:
    """A call in a thread of its own."""

    def __init__(self, call: Callable[[], None]) -> None:
        self.error: Exception | None = None
        self._call = call
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._call()
        except Exception as error:
            self.error = error

    def join(self) -> None:
        self._thread.join(30)
        assert not self._thread.is_alive()

    @property
    def is_running(self) -> bool:
        return self._thread.is_alive()


def with_items(count: int = 3) -> MemoryTier:
    tier = MemoryTier()
    for step in range(count):
        tier.reserve(snapshot(step), 1000)
        tier.write(snapshot(step), noise(1000, step))
    return tier


def test_the_gate_holds_and_lets_through_by_count() -> None:
    gate = GatedTier(with_items())
    tasks = [Task(lambda step=step: gate.write(snapshot(step), noise(1000, 9))) for step in range(3)]  # type: ignore[misc]
    gate.wait_held(3)
    assert sorted(gate.held) == [snapshot(0), snapshot(1), snapshot(2)]
    gate.let(2)
    gate.wait_ended(2)
    assert (len(gate.held), gate.ended) == (1, 2)
    gate.let()
    for task in tasks:
        task.join()
        assert task.error is None
    assert gate.ended == 3


def test_the_gate_lets_one_item_through() -> None:
    gate = GatedTier(with_items())
    first = Task(lambda: gate.write(snapshot(0), noise(1000)))
    second = Task(lambda: gate.read(snapshot(1), noise(1000)))
    gate.wait_held(2)
    gate.let_key(snapshot(1))
    second.join()
    assert first.is_running
    assert gate.held == (snapshot(0),)
    gate.open()
    first.join()
    gate.write(snapshot(2), noise(1000))
    gate.shut()
    third = Task(lambda: gate.write(snapshot(2), noise(1000)))
    gate.wait_held()
    gate.let()
    third.join()


def test_the_gate_may_hold_one_direction_only() -> None:
    gate = GatedTier(with_items(), holds={"write"})
    gate.read(snapshot(0), noise(1000))
    task = Task(lambda: gate.write(snapshot(0), noise(1000)))
    gate.wait_held()
    gate.let()
    task.join()


def test_waiting_for_the_gate_gives_up() -> None:
    gate = GatedTier(with_items())
    with pytest.raises(TimeoutError, match="1 transfers to be held"):
        gate.wait_held(timeout=0)
    with pytest.raises(TimeoutError, match="1 transfers to end"):
        gate.wait_ended(timeout=0)


def test_closing_sends_those_at_the_gate_away() -> None:
    gate = GatedTier(with_items())
    task = Task(lambda: gate.write(snapshot(0), noise(1000)))
    gate.wait_held()
    gate.close()
    task.join()
    assert isinstance(task.error, StateError)
    assert gate.held == ()


def test_chosen_calls_fail_and_others_do_not() -> None:
    tier = FailingTier(with_items(), nth("read", 1, 2))
    out = noise(1000)
    tier.read(snapshot(0), out)
    for _ in range(2):
        with pytest.raises(StorageError, match="made to fail") as caught:
            tier.read(snapshot(0), out)
        assert caught.value.errno == errno.EIO
    tier.read(snapshot(0), out)
    tier.write(snapshot(0), out)
    assert tier.failed == [Call("read", snapshot(0), 1), Call("read", snapshot(0), 2)]


def test_calls_may_fail_by_key_and_in_other_ways() -> None:
    full = FailingTier(MemoryTier(), lambda call: call.key.step == 7, error=errno.ENOSPC)
    full.reserve(snapshot(6), 10)
    with pytest.raises(StorageFull):
        full.reserve(snapshot(7), 10)
    own = FailingTier(with_items(), nth("release", 0), error=DamagedBlock("on purpose"))
    with pytest.raises(DamagedBlock, match="on purpose"):
        own.release(snapshot(0))
    own.release(snapshot(0))


class FakeTime:
    """A clock that only sleeping moves."""

    now = 100.0

    def clock(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


def test_transfers_take_their_time() -> None:
    time = FakeTime()
    tier = ThrottledTier(
        with_items(),
        write_bytes_per_second=1000,
        read_bytes_per_second=500,
        latency=0.25,
        clock=time.clock,
        sleep=time.sleep,
    )
    tier.write(snapshot(0), noise(1000))
    assert time.now == pytest.approx(101.25)
    tier.read(snapshot(0), noise(1000))
    assert time.now == pytest.approx(103.5)


def test_transfers_at_once_share_the_device_but_not_the_latency() -> None:
    time = FakeTime()
    tier = ThrottledTier(with_items(), write_bytes_per_second=1000, latency=0.25, clock=time.clock, sleep=time.sleep)
    ends = [tier._book(1.0) for _ in range(3)]
    assert ends == pytest.approx([101.25, 102.25, 103.25])


def test_a_throttle_without_numbers_costs_no_time() -> None:
    time = FakeTime()
    tier = ThrottledTier(with_items(), clock=time.clock, sleep=time.sleep)
    tier.write(snapshot(0), noise(1000))
    assert time.now == 100
    for options in ({"latency": -1.0}, {"write_bytes_per_second": 0.0}, {"read_bytes_per_second": -5.0}):
        with pytest.raises(UsageError):
            ThrottledTier(MemoryTier(), **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("how", ["flip", "zero", "truncate", "swap"])
@pytest.mark.parametrize("detected", [False, True])
def test_chosen_reads_are_damaged(how: str, detected: bool) -> None:
    tier = DamagingTier(with_items(), lambda call: call.key.step == 1, how=how, detected=detected)  # type: ignore[arg-type]
    out = noise(1000)
    tier.read(snapshot(0), out)
    assert np.array_equal(out, noise(1000, 0))
    if detected:
        with pytest.raises(DamagedBlock, match="on purpose"):
            tier.read(snapshot(1), out)
    else:
        tier.read(snapshot(1), out)
    assert not np.array_equal(out, noise(1000, 1))
    assert tier.damaged == [snapshot(1)]


def test_damage_is_what_it_says() -> None:
    data = noise(1000, 1)
    flipped, cut, swapped = data.copy(), data.copy(), data.copy()
    damage(flipped, "flip", random.Random(1))
    assert np.unpackbits(flipped ^ data).sum() == 1
    damage(cut, "truncate", random.Random(1))
    last = int(np.flatnonzero(cut)[-1]) + 1
    assert np.array_equal(cut[:last], data[:last])
    damage(swapped, "swap", random.Random(1))
    assert np.array_equal(np.roll(swapped, 500), data)
    damage(data[:0], "flip", random.Random(1))


def test_a_wrapper_offers_what_the_tier_offers() -> None:
    tier = GatedTier(with_items(2))
    assert tier.bytes_written == 2000
    with pytest.raises(AttributeError):
        tier.nonsense  # noqa: B018
    with pytest.raises(AttributeError):
        GatedTier.__new__(GatedTier).inner  # noqa: B018
