"""Measuring: little is written where storage is slow, what transfers cost compute is seen, and no trial waits."""

from itertools import pairwise
from time import perf_counter, sleep

import pytest

from longtape.engine.workers import Workers
from longtape.errors import StorageError
from longtape.measure import LEAST_WINDOWS, measure_tier, measure_windows
from longtape.testing.tiers import FailingTier, GatedTier, ThrottledTier, nth
from longtape.tiers.memory import MemoryTier

SMALL, LARGE = 64 << 10, 4 << 20


def measured(bandwidth):
    inner = MemoryTier()
    tier = ThrottledTier(inner, write_bytes_per_second=bandwidth, read_bytes_per_second=bandwidth)
    workers = Workers(tier, perf_counter)
    try:
        return measure_tier(tier, workers, [SMALL, LARGE]), inner.bytes_written
    finally:
        workers.close(30.0)
        tier.close()


def test_a_slow_tier_is_measured_with_small_items():
    speed, written = measured(5e6)
    assert speed.write_bytes_per_second == pytest.approx(5e6, rel=0.2)
    assert speed.read_bytes_per_second == pytest.approx(5e6, rel=0.2)
    assert written < LARGE / 2


def test_a_quick_tier_is_measured_with_items_of_both_sizes():
    _, written = measured(4e9)
    assert written >= 3 * (SMALL + LARGE)


def test_what_a_worker_computes_for_a_transfer_is_counted():
    speed, _ = measured(4e9)
    assert 0.0 < speed.handling + speed.handling_per_byte * LARGE < 0.5
    assert speed.copy_per_byte > 0.0


class Sleeping:
    """Windows whose steps take a known time; blocks must come back as they were recorded."""

    def __init__(self, record, pull_back):
        self.seconds = {"record": record, "pull_back": pull_back}
        self.calls = {"record": 0, "pull_back": 0}
        self.used = {"record": [], "pull_back": []}
        self.ended = False

    def _run(self, which, slot, count):
        self.calls[which] += 1
        self.used[which].append(id(slot))
        sleep(count * self.seconds[which])

    def record(self, slot, count):
        slot.data[:] = 7
        self._run("record", slot, count)

    def pull_back(self, slot, count):
        assert (slot.data == 7).all()
        self._run("pull_back", slot, count)

    def end(self):
        self.ended = True


def tried(windows, tier, seconds, handling=0.0):
    workers = Workers(tier, perf_counter)
    try:
        return measure_windows(windows, SMALL, 3, (tier, workers), seconds=seconds, handling=handling)
    finally:
        workers.close(30.0)


def test_windows_are_timed_each_way_beside_transfers():
    windows, tier = Sleeping(2e-3, 5e-3), MemoryTier()
    record, pull_back = tried(windows, tier, 0.1)
    assert 2e-3 <= record < 4e-3
    assert 5e-3 <= pull_back < 8e-3
    assert tier.bytes_written >= LEAST_WINDOWS * SMALL
    assert tier.bytes_read >= LEAST_WINDOWS * SMALL
    assert tier.bytes_in_use == 0
    assert windows.ended


def test_blocks_take_turns_where_storage_keeps_up():
    windows = Sleeping(2e-3, 2e-3)
    tried(windows, MemoryTier(), 0.1)
    for used in (windows.used["record"][2:], windows.used["pull_back"]):
        assert all(a != b for a, b in pairwise(used))


def test_few_windows_are_tried_where_time_is_short():
    windows = Sleeping(1e-3, 1e-3)
    tried(windows, MemoryTier(), 0.0)
    assert windows.calls == {"record": LEAST_WINDOWS + 2, "pull_back": LEAST_WINDOWS}


def test_no_step_waits_for_slow_storage():
    windows, tier = Sleeping(1e-3, 1e-3), MemoryTier()
    slow = ThrottledTier(tier, write_bytes_per_second=5e5, read_bytes_per_second=5e5)
    record, pull_back = tried(windows, slow, 0.2)
    assert record < 2e-3
    assert pull_back < 2e-3
    assert windows.calls["record"] > 5 * tier.bytes_written / SMALL


def test_storage_that_does_not_answer_is_waited_for_once():
    tier, began = GatedTier(MemoryTier()), perf_counter()
    workers = Workers(tier, perf_counter)
    with pytest.raises(StorageError, match=r"no answer for 0\.3 s"):
        measure_windows(Sleeping(1e-3, 1e-3), SMALL, 3, (tier, workers), seconds=0.0, stuck_seconds=0.3)
    assert perf_counter() - began < 0.55
    tier.open()
    workers.close(30.0)


def test_windows_can_be_tried_without_storage():
    windows = Sleeping(2e-3, 5e-3)
    record, pull_back = measure_windows(windows, SMALL, 3, None, seconds=0.05)
    assert 2e-3 <= record < 4e-3
    assert 5e-3 <= pull_back < 8e-3


def test_what_transfers_cost_is_not_counted_twice():
    record, pull_back = tried(Sleeping(5e-3, 5e-3), MemoryTier(), 0.1, handling=6e-3)
    assert 2.5e-3 < record < 4.5e-3
    assert 2.5e-3 < pull_back < 4.5e-3


@pytest.mark.parametrize("way", ["write", "read"])
def test_a_tier_that_fails_meanwhile_is_named(way):
    windows, tier = Sleeping(1e-3, 1e-3), FailingTier(MemoryTier(), nth(way, 1))
    with pytest.raises(StorageError):
        tried(windows, tier, 0.0)
    assert windows.ended
