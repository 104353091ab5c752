"""A tier that is lent comes back empty and open."""

from contextlib import closing

import numpy as np

from longtape.testing.tiers import noise, snapshot
from longtape.tiers.disk import DiskTier
from longtape.tiers.lent import LentTier
from longtape.tiers.memory import MemoryTier


def test_what_was_not_released_is_released_at_the_end(scratch):
    with closing(DiskTier(scratch)) as tier:
        data = noise(5000)
        tier.reserve(snapshot(9), 5000)  # the owner's own
        tier.write(snapshot(9), data)
        before = tier.bytes_in_use
        for _ in range(2):
            lent = LentTier(tier)
            for step in range(3):
                lent.reserve(snapshot(step), 100)
            lent.release(snapshot(1))
            lent.close()
            lent.close()
            assert tier.bytes_in_use == before
        out = np.empty(5000, np.uint8)
        tier.read(snapshot(9), out)
        assert np.array_equal(out, data)


def test_an_owner_may_close_it_first():
    tier = MemoryTier()
    lent = LentTier(tier)
    lent.reserve(snapshot(0), 10)
    tier.close()
    lent.close()
