"""For those who write a tier, or test what uses one: a conformance suite, and tiers that misbehave.

Owns `TierConformance`, to be subclassed by a tier's own tests; offers the wrappers of
`longtape.testing.tier_fakes` too.  Must not know any particular tier, nor need pytest.
The suite runs on one thread but where it tests several.

Invariant: every test starts with a new tier, and closes it.
"""

from __future__ import annotations

import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from longtape.actions import Key, Kind
from longtape.errors import LongtapeError, StateError, StorageFull, UsageError
from longtape.protocols import Bytes, Tier
from longtape.testing.tier_fakes import (
    Call,
    Damage,
    DamagingTier,
    FailingTier,
    GatedTier,
    ThrottledTier,
    damage,
    nth,
)

__all__ = [
    "SIZES",
    "Call",
    "Damage",
    "DamagingTier",
    "FailingTier",
    "GatedTier",
    "ThrottledTier",
    "TierConformance",
    "damage",
    "noise",
    "nth",
    "refused",
    "snapshot",
]

SIZES = (0, 1, 511, 512, 513, 4095, 4096, 4097, 100_003, 1 << 20, (1 << 20) + 7, 5_000_000)
"""Payload lengths in bytes around every boundary a tier may have."""


def snapshot(step: int) -> Key:
    """The key of a snapshot."""
    return Key(Kind.SNAPSHOT, step)


def noise(nbytes: int, seed: int = 0, *, misaligned: int = 0) -> Bytes:
    """Random bytes, whose address is `misaligned` bytes past a multiple of 4096."""
    room = np.empty(nbytes + 4096 + misaligned, dtype=np.uint8)
    start = -room.ctypes.data % 4096 + misaligned
    data = room[start : start + nbytes]
    data[:] = np.random.default_rng(seed).integers(0, 256, nbytes, dtype=np.uint8)
    return data


@contextmanager
def refused(kind: type[LongtapeError]) -> Iterator[None]:
    """The body must raise `kind`, with a message."""
    message = None
    try:
        yield
    except kind as error:
        message = str(error)
    assert message is not None, f"should have raised {kind.__name__}"
    assert len(message) > 20, f"{message!r} does not say what happened"


class TierConformance:
    """What every tier must do.  Subclass it as ``class TestMyTier(TierConformance)`` and override `make_tier`."""

    directory: Path
    tier: Tier

    def make_tier(self, directory: Path) -> Tier:
        """A new tier; `directory` is empty, and its own."""
        raise NotImplementedError

    def make_limited_tier(self, directory: Path, limit: int) -> Tier | None:
        """A new tier that holds at most `limit` bytes; None if this kind has no limit."""
        return None

    def setup_method(self) -> None:
        self._temporary = tempfile.TemporaryDirectory(prefix="longtape-conformance-")
        self.directory = Path(self._temporary.name)
        self.tier = self.make_tier(self.directory)

    def teardown_method(self) -> None:
        self.tier.close()
        self._temporary.cleanup()

    def put(self, key: Key, data: Bytes) -> None:
        """Reserve and write."""
        self.tier.reserve(key, data.nbytes)
        self.tier.write(key, data)

    def get(self, key: Key, nbytes: int, *, misaligned: int = 0) -> Bytes:
        """Read into a new array."""
        out = noise(nbytes, seed=99, misaligned=misaligned)
        self.tier.read(key, out)
        return out

    def expect(self, key: Key, data: Bytes) -> None:
        """The item reads back as `data`."""
        assert np.array_equal(self.get(key, data.nbytes), data), f"{key} came back changed"

    # Bytes come back

    def test_every_length_comes_back(self) -> None:
        items = {snapshot(i): noise(nbytes, i) for i, nbytes in enumerate(SIZES)}
        for key, data in items.items():
            self.put(key, data)
        for key, data in reversed(items.items()):
            self.expect(key, data)

    def test_unaligned_memory_will_do(self) -> None:
        for i, nbytes in enumerate(SIZES):
            data = noise(nbytes, i, misaligned=1 + i)
            self.put(snapshot(i), data)
            assert np.array_equal(self.get(snapshot(i), nbytes, misaligned=3), data)

    def test_reading_twice_gives_the_same(self) -> None:
        data = noise(10_000)
        self.put(snapshot(1), data)
        self.expect(snapshot(1), data)
        self.expect(snapshot(1), data)

    def test_a_read_fills_no_more_than_its_array(self) -> None:
        self.put(snapshot(1), noise(1000))
        room = np.full(3000, 7, dtype=np.uint8)
        self.tier.read(snapshot(1), room[1000:2000])
        assert (room[:1000] == 7).all()
        assert (room[2000:] == 7).all()

    def test_the_source_is_left_alone_and_free_on_return(self) -> None:
        data = noise(9999)
        before = data.copy()
        data.flags.writeable = False
        self.put(snapshot(1), data)
        assert np.array_equal(data, before)
        data.flags.writeable = True
        data[:] = 0
        self.expect(snapshot(1), before)

    def test_kinds_and_steps_are_told_apart(self) -> None:
        keys = [Key(kind, step) for kind in Kind for step in (-1, 0, 1, 2**40)]
        for i, key in enumerate(keys):
            self.put(key, noise(5000, i))
        for i, key in enumerate(keys):
            self.expect(key, noise(5000, i))

    def test_a_second_write_replaces_the_first(self) -> None:
        self.put(snapshot(1), noise(5000, 1))
        self.tier.write(snapshot(1), noise(5000, 2))
        self.expect(snapshot(1), noise(5000, 2))

    def test_a_write_may_be_shorter_than_its_room(self) -> None:
        self.tier.reserve(snapshot(1), 10_000)
        for nbytes in (10_000, 17, 8192):
            self.tier.write(snapshot(1), noise(nbytes, nbytes))
            self.expect(snapshot(1), noise(nbytes, nbytes))

    def test_room_is_used_again(self) -> None:
        for i in range(200):
            self.put(snapshot(i), noise(3000 + i % 2 * 5000, i))
            if i >= 3:
                self.expect(snapshot(i - 3), noise(3000 + (i - 3) % 2 * 5000, i - 3))
                self.tier.release(snapshot(i - 3))

    # Calls that make no sense

    def test_reading_what_was_never_written_is_refused(self) -> None:
        with refused(StateError):
            self.get(snapshot(1), 100)
        self.tier.reserve(snapshot(1), 100)
        with refused(StateError):
            self.get(snapshot(1), 100)

    def test_what_was_released_is_gone(self) -> None:
        self.put(snapshot(1), noise(100))
        self.tier.release(snapshot(1))
        with refused(StateError):
            self.get(snapshot(1), 100)
        with refused(StateError):
            self.tier.write(snapshot(1), noise(100))
        with refused(StateError):
            self.tier.release(snapshot(1))
        self.tier.reserve(snapshot(1), 100)
        with refused(StateError):
            self.get(snapshot(1), 100)

    def test_reserving_twice_is_refused_and_harmless(self) -> None:
        self.put(snapshot(1), noise(100))
        with refused(StateError):
            self.tier.reserve(snapshot(1), 100)
        self.expect(snapshot(1), noise(100))

    def test_a_negative_length_is_refused(self) -> None:
        with refused(UsageError):
            self.tier.reserve(snapshot(1), -1)
        self.put(snapshot(1), noise(100))

    def test_wrong_lengths_are_refused(self) -> None:
        self.put(snapshot(1), noise(100))
        with refused(UsageError):
            self.tier.write(snapshot(1), noise(101))
        for nbytes in (99, 101):
            with refused(UsageError):
                self.get(snapshot(1), nbytes)
        self.expect(snapshot(1), noise(100))

    def test_other_arrays_are_refused(self) -> None:
        self.put(snapshot(1), noise(128))
        strange: list[Any] = [np.zeros(16), np.zeros((2, 64), np.uint8), np.zeros(256, np.uint8)[::2]]
        for array in strange:
            with refused(UsageError):
                self.tier.write(snapshot(1), array)
            with refused(UsageError):
                self.tier.read(snapshot(1), array)
        fixed = np.zeros(128, np.uint8)
        fixed.flags.writeable = False
        with refused(UsageError):
            self.tier.read(snapshot(1), fixed)
        self.expect(snapshot(1), noise(128))

    def test_after_close_everything_is_refused(self) -> None:
        self.put(snapshot(1), noise(100))
        self.tier.close()
        self.tier.close()
        attempts: list[Callable[[], object]] = [
            lambda: self.tier.reserve(snapshot(2), 1),
            lambda: self.tier.write(snapshot(1), noise(100)),
            lambda: self.get(snapshot(1), 100),
            lambda: self.tier.release(snapshot(1)),
        ]
        for attempt in attempts:
            with refused(StateError):
                attempt()

    # Limits

    def test_a_full_tier_refuses_and_recovers(self) -> None:
        limited = self.make_limited_tier(self.directory, 1 << 20)
        if limited is None:
            return
        self.tier.close()
        self.tier = limited
        kept = 0
        with refused(StorageFull):
            while kept < 100:
                self.put(snapshot(kept), noise(50_000, kept))
                kept += 1
        assert 10 <= kept <= 20, f"{kept} items of 50 000 bytes fitted into a mebibyte"
        for i in range(kept):
            self.expect(snapshot(i), noise(50_000, i))
        self.tier.release(snapshot(0))
        self.put(snapshot(kept + 1), noise(50_000, kept))
        self.expect(snapshot(kept + 1), noise(50_000, kept))

    def test_room_of_small_items_serves_for_a_large_one(self) -> None:
        limited = self.make_limited_tier(self.directory, 1 << 20)
        if limited is None:
            return
        self.tier.close()
        self.tier = limited
        for i in range(10):
            self.put(snapshot(i), noise(80_000, i))
        with refused(StorageFull):
            self.put(snapshot(98), noise(300_000))  # a tier may find the room only when it is written
        for i in (3, 4, 5, 6):
            self.tier.release(snapshot(i))
        self.put(snapshot(99), noise(300_000, 99))
        for i in (0, 1, 2, 7, 8, 9):
            self.expect(snapshot(i), noise(80_000, i))
        self.expect(snapshot(99), noise(300_000, 99))

    # Threads

    def test_workers_move_different_items_at_once(self) -> None:
        threads, each = 4, 12
        lengths = {snapshot(i): 1000 + 40_961 * (i % 5) for i in range(threads * each)}
        for key, nbytes in lengths.items():
            self.tier.reserve(key, nbytes)
        failures: list[BaseException] = []

        def work(number: int) -> None:
            try:
                mine = [key for key in lengths if key.step % threads == number]
                for key in mine:
                    self.tier.write(key, noise(lengths[key], key.step))
                for key in mine:
                    self.expect(key, noise(lengths[key], key.step))
            except BaseException as error:
                failures.append(error)

        workers = [threading.Thread(target=work, args=(number,)) for number in range(threads)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        assert not failures, failures
        for key in lengths:
            self.expect(key, noise(lengths[key], key.step))
