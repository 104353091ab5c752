"""Measuring a tier: what is written stays little where it is slow, and what a transfer costs compute is seen."""

from time import perf_counter

import pytest

from longtape.engine.workers import Workers
from longtape.measure import measure_tier
from longtape.testing.tiers import ThrottledTier
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
