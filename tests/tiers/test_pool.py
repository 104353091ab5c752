import mmap
import sys

import numpy as np
import pytest

from longtape.errors import StateError, UsageError
from longtape.protocols import Pool, Slot
from longtape.tiers import linux
from longtape.tiers.aligned import HUGE_PAGE, address_of, map_aligned, provide
from longtape.tiers.pool import SlotPool


def resident_bytes() -> int:
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * mmap.PAGESIZE


@pytest.mark.parametrize("alignment", [1, 8, 64, 512, 4096, 65536, 4 << 20])
@pytest.mark.parametrize("nbytes", [0, 1, 8, 100, 4096, 5000, 3 << 20])
def test_slots_are_aligned_and_apart(nbytes: int, alignment: int) -> None:
    pool = SlotPool(3, nbytes, alignment=alignment)
    slots = [pool.take() for _ in range(3)]
    for number, slot in enumerate(slots):
        assert slot.data.dtype == np.uint8
        assert slot.data.shape == (nbytes,)
        assert not nbytes or address_of(slot.data) % alignment == 0
        slot.data[:] = number + 1
    for number, slot in enumerate(slots):
        assert (slot.data == number + 1).all()
    del slot, slots
    pool.close()


def test_large_arenas_start_at_a_huge_page() -> None:
    mapping, data = map_aligned(HUGE_PAGE, 8)
    assert address_of(data) % HUGE_PAGE == 0
    del data
    mapping.close()


def test_the_slot_given_back_last_goes_out_first() -> None:
    pool: Pool = SlotPool(4, 10)
    first, second = pool.take(), pool.take()
    pool.give(first)
    pool.give(second)
    assert pool.take() is second
    assert pool.take() is first


def test_counts() -> None:
    pool = SlotPool(3, 10)
    assert (pool.free, pool.high_water) == (3, 0)
    slots = [pool.take(), pool.take()]
    assert (pool.free, pool.high_water) == (1, 2)
    for slot in slots:
        pool.give(slot)
    pool.take()
    assert (pool.free, pool.high_water) == (2, 2)


def test_contents_and_views_stay_with_a_slot() -> None:
    pool = SlotPool(1, 16)
    slot = pool.take()
    slot.data[:], slot.views = 5, "typed views"
    pool.give(slot)
    assert (pool.take().data == 5).all()
    assert slot.views == "typed views"


def test_an_empty_pool_gives_nothing_out() -> None:
    pool = SlotPool(1, 10)
    pool.take()
    with pytest.raises(StateError, match="all 1 slots"):
        pool.take()
    with pytest.raises(StateError, match="all 0 slots"):
        SlotPool(0, 10).take()


def test_a_slot_is_given_back_once_and_to_its_own_pool() -> None:
    pool, other = SlotPool(2, 10), SlotPool(2, 10)
    slot = pool.take()
    for stranger in (other.take(), Slot(np.empty(10, np.uint8))):
        with pytest.raises(UsageError, match="does not belong"):
            pool.give(stranger)
    pool.give(slot)
    with pytest.raises(StateError, match="already"):
        pool.give(slot)
    assert pool.free == 2


def test_arguments_are_checked() -> None:
    for count, nbytes, alignment in ((-1, 1, 8), (1, -1, 8), (1, 1, 0), (1, 1, 24)):
        with pytest.raises(UsageError):
            SlotPool(count, nbytes, alignment=alignment)


@pytest.mark.parametrize("nbytes", [1 << 56, sys.maxsize])
def test_more_memory_than_there_is_is_refused(nbytes: int) -> None:
    with pytest.raises(UsageError, match="refuses"):
        SlotPool(4, nbytes)


def test_memory_is_touched_only_when_used_and_goes_with_the_pool() -> None:
    before = resident_bytes()
    pool = SlotPool(64, 4 << 20)
    assert resident_bytes() - before < 8 << 20
    slot = pool.take()
    slot.data[:] = 1
    assert resident_bytes() - before >= 4 << 20
    assert resident_bytes() - before < 16 << 20
    del slot
    pool.close()
    assert resident_bytes() - before < 3 << 20


def test_after_close_nothing_is_given_or_taken() -> None:
    pool = SlotPool(2, 10)
    slot = pool.take()
    pool.close()
    pool.close()
    assert pool.free == 0
    assert slot.data.nbytes == 0
    with pytest.raises(StateError, match="closed"):
        pool.take()
    with pytest.raises(StateError, match="closed"):
        pool.give(slot)


def test_a_view_that_outlives_the_pool_stays_good() -> None:
    pool = SlotPool(1, 1 << 16)
    view = pool.take().data[100:200]
    view[:] = 9
    pool.close()
    assert (view == 9).all()
    view[:] = 1


def test_provided_memory_is_there_and_keeps_its_content() -> None:
    mapping, data = map_aligned(16 * HUGE_PAGE, 4096)
    data[5] = 7
    before = resident_bytes()
    if not provide(data[1:]):
        pytest.skip("this system provides memory only when it is used")
    assert resident_bytes() - before > 14 * HUGE_PAGE
    assert data[5] == 7
    assert not data[6:].any()
    del data
    mapping.close()


def test_a_system_that_cannot_provide_memory_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linux, "_POPULATE_WRITE", 9999)
    _, data = map_aligned(100, 8)
    assert not provide(data)


def test_the_memory_of_the_slots_that_go_out_first() -> None:
    pool = SlotPool(5, 100, alignment=64)
    pool.memory(2)[:] = 1
    slots = [pool.take() for _ in range(5)]
    assert [int(slot.data.sum()) for slot in slots] == [100, 100, 0, 0, 0]
    assert pool.memory(99).nbytes == 5 * 128
    del slots
    pool.close()
    with pytest.raises(StateError):
        pool.memory(1)
