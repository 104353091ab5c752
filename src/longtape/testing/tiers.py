"""For those who write a tier, or test what uses one: a conformance suite, and tiers that misbehave.

Owns `TierConformance`, to be subclassed by a tier's own tests, and the wrappers
`GatedTier`, `FailingTier`, `ThrottledTier` and `DamagingTier`, which go around any
tier.  Must not know any particular tier, nor need pytest.

Wrappers are entered as `longtape.protocols.Tier` says, and pass on whatever else the
wrapped tier offers (counters, `direct`).

Invariant: nothing here waits for a length of time, except `ThrottledTier`, whose
purpose that is.
"""

from __future__ import annotations

import os
import random
import tempfile
import threading
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from errno import EIO, ENOSPC
from math import inf
from pathlib import Path
from typing import Any, Literal

import numpy as np

from longtape.actions import Key, Kind
from longtape.errors import DamagedBlock, LongtapeError, StateError, StorageError, StorageFull, UsageError
from longtape.protocols import Bytes, Tier

Operation = Literal["reserve", "write", "read", "release"]


class _Wrapper:
    """Passes every call on."""

    def __init__(self, inner: Tier) -> None:
        self.inner = inner

    def __getattr__(self, name: str) -> Any:
        if name == "inner":  # not there yet: a copy or an unpickling is being made
            raise AttributeError(name)
        return getattr(self.inner, name)

    def reserve(self, key: Key, nbytes: int) -> None:
        self.inner.reserve(key, nbytes)

    def write(self, key: Key, data: Bytes) -> None:
        self.inner.write(key, data)

    def read(self, key: Key, out: Bytes) -> None:
        self.inner.read(key, out)

    def release(self, key: Key) -> None:
        self.inner.release(key)

    def close(self) -> None:
        self.inner.close()


class GatedTier(_Wrapper):
    """Transfers wait at a gate until the test lets them through.

    Tests may call `let`, `let_key`, `open`, `shut` and the `wait_…` methods from any thread.

    Args:
        inner: The tier behind the gate.
        is_open: Whether the gate stands open at first.
        holds: Which transfers the gate is for; others pass freely.
    """

    def __init__(
        self,
        inner: Tier,
        *,
        is_open: bool = False,
        holds: Collection[Literal["write", "read"]] = ("write", "read"),
    ) -> None:
        super().__init__(inner)
        self._holds = frozenset(holds)
        self._changed = threading.Condition()
        self._open, self._closed = is_open, False
        self._permits = 0
        self._key_permits: set[Key] = set()
        self._held: list[Key] = []
        self._passed = 0
        self._ended = 0

    def open(self) -> None:
        """Let all through from now on."""
        with self._changed:
            self._open = True
            self._changed.notify_all()

    def shut(self) -> None:
        """Let none through from now on, but those already allowed."""
        with self._changed:
            self._open = False

    def let(self, count: int = 1) -> None:
        """Let `count` transfers through: those waiting, or the next to come."""
        with self._changed:
            self._permits += count
            self._changed.notify_all()

    def let_key(self, key: Key) -> None:
        """Let one transfer of this item through."""
        with self._changed:
            self._key_permits.add(key)
            self._changed.notify_all()

    @property
    def held(self) -> tuple[Key, ...]:
        """The items whose transfers wait at the gate, in the order of their coming."""
        with self._changed:
            return tuple(self._held)

    @property
    def ended(self) -> int:
        """How many transfers have ended, well or badly."""
        with self._changed:
            return self._ended

    def wait_held(self, count: int = 1, *, timeout: float = 10.0) -> None:
        """Wait until at least `count` transfers are at the gate.  Raises `TimeoutError` after `timeout` seconds."""
        self._wait(lambda: len(self._held) >= count, f"{count} transfers to be held", timeout)

    def wait_ended(self, count: int = 1, *, timeout: float = 10.0) -> None:
        """Wait until `count` transfers in all have ended.  Raises `TimeoutError` after `timeout` seconds."""
        self._wait(lambda: self._ended >= count, f"{count} transfers to end", timeout)

    def _wait(self, condition: Callable[[], bool], what: str, timeout: float) -> None:
        with self._changed:
            if not self._changed.wait_for(condition, timeout):
                state = f"{len(self._held)} are held, {self._ended} have ended"
                raise TimeoutError(f"waited {timeout:g} s for {what}; {state}")

    def write(self, key: Key, data: Bytes) -> None:
        with self._gate("write", key):
            self.inner.write(key, data)

    def read(self, key: Key, out: Bytes) -> None:
        with self._gate("read", key):
            self.inner.read(key, out)

    def close(self) -> None:
        """Close the tier; transfers still at the gate fail with `StateError`."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self.inner.close()

    @contextmanager
    def _gate(self, operation: Literal["write", "read"], key: Key) -> Iterator[None]:
        try:
            if operation in self._holds:
                self._pass(key)
            yield
        finally:
            with self._changed:
                self._ended += 1
                self._changed.notify_all()

    def _pass(self, key: Key) -> None:
        with self._changed:
            self._held.append(key)
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._closed or self._may_pass(key))
            self._held.remove(key)
            if self._closed:
                raise StateError(f"the tier was closed while {key} waited at the gate")

    def _may_pass(self, key: Key) -> bool:
        """Whether this transfer may go; uses its permit up."""
        if self._open:
            return True
        if key in self._key_permits:
            self._key_permits.discard(key)
            return True
        if self._permits:
            self._permits -= 1
            return True
        return False


@dataclass(frozen=True, slots=True)
class Call:
    """One call of a tier, for a test to judge."""

    operation: Operation
    key: Key
    index: int
    """How many calls of the same operation came before."""


def nth(operation: Operation, *indices: int) -> Callable[[Call], bool]:
    """For `FailingTier`: true for the calls of `operation` with these indices, counted from 0."""
    return lambda call: call.operation == operation and call.index in indices


class FailingTier(_Wrapper):
    """Calls fail that the test chooses; the wrapped tier never sees them.

    Args:
        inner: The tier that does what does not fail.
        fails: Whether a call fails; see `nth`.
        error: An errno, raised as `StorageError` or, where it means "full", `StorageFull`; or an
            exception to raise.
    """

    def __init__(self, inner: Tier, fails: Callable[[Call], bool], *, error: int | Exception = EIO) -> None:
        super().__init__(inner)
        self._fails, self._error = fails, error
        self._lock = threading.Lock()
        self._counts: dict[Operation, int] = {}
        self.failed: list[Call] = []
        """The calls that were made to fail, in order."""

    def reserve(self, key: Key, nbytes: int) -> None:
        self._judge("reserve", key)
        self.inner.reserve(key, nbytes)

    def write(self, key: Key, data: Bytes) -> None:
        self._judge("write", key)
        self.inner.write(key, data)

    def read(self, key: Key, out: Bytes) -> None:
        self._judge("read", key)
        self.inner.read(key, out)

    def release(self, key: Key) -> None:
        self._judge("release", key)
        self.inner.release(key)

    def _judge(self, operation: Operation, key: Key) -> None:
        with self._lock:
            call = Call(operation, key, self._counts.get(operation, 0))
            self._counts[operation] = call.index + 1
            if not self._fails(call):
                return
            self.failed.append(call)
        if isinstance(self._error, Exception):
            raise self._error
        kind = StorageFull if self._error == ENOSPC else StorageError
        raise kind(self._error, f"{operation} {key} was made to fail ({os.strerror(self._error)})")


class ThrottledTier(_Wrapper):
    """As slow as a slower device: for benchmarks.

    All transfers share one device, as on a disk: each occupies it for its bytes divided by
    the bandwidth, and takes `latency` more, during which others may use the device.

    Args:
        inner: The tier that moves the bytes; should be faster.
        write_bytes_per_second: Bandwidth of writes.
        read_bytes_per_second: Bandwidth of reads.
        latency: Seconds that every transfer takes besides.
        clock: Seconds, monotonic.
        sleep: Waits for seconds, in the worker's thread.
    """

    def __init__(
        self,
        inner: Tier,
        *,
        write_bytes_per_second: float = inf,
        read_bytes_per_second: float = inf,
        latency: float = 0.0,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        if write_bytes_per_second <= 0 or read_bytes_per_second <= 0 or latency < 0:
            raise UsageError("a throttled tier needs bandwidths above zero and a latency of zero or more")
        super().__init__(inner)
        self._write_speed, self._read_speed, self._latency = write_bytes_per_second, read_bytes_per_second, latency
        self._clock, self._sleep = clock, sleep
        self._lock = threading.Lock()
        self._free_at = -inf

    def write(self, key: Key, data: Bytes) -> None:
        ends = self._book(data.nbytes / self._write_speed)
        self.inner.write(key, data)
        self._sleep_until(ends)

    def read(self, key: Key, out: Bytes) -> None:
        ends = self._book(out.nbytes / self._read_speed)
        self.inner.read(key, out)
        self._sleep_until(ends)

    def _book(self, seconds: float) -> float:
        """Occupy the device for so long, as soon as it is free; when the transfer ends."""
        with self._lock:
            self._free_at = max(self._free_at, self._clock()) + seconds
            return self._free_at + self._latency

    def _sleep_until(self, when: float) -> None:
        while (left := when - self._clock()) > 0:
            self._sleep(left)


Damage = Literal["flip", "zero", "truncate", "swap"]


def damage(data: Bytes, how: Damage, rng: random.Random) -> None:
    """Damage bytes in place, at random places.  What was all zeros, or all alike, may come out as it was.

    ``"flip"`` flips one bit, ``"zero"`` zeroes a stretch, ``"truncate"`` zeroes all from some
    place on, ``"swap"`` exchanges the two halves.
    """
    if data.nbytes == 0:
        return
    start = rng.randrange(data.nbytes)
    if how == "flip":
        data[start] ^= 1 << rng.randrange(8)
    elif how == "zero":
        data[start : start + rng.randint(1, 512)] = 0
    elif how == "truncate":
        data[start:] = 0
    else:
        half = data.nbytes // 2
        first = data[:half].copy()
        data[:half] = data[half : 2 * half]
        data[half : 2 * half] = first


class DamagingTier(_Wrapper):
    """Reads bring damaged bytes where the test chooses.

    Args:
        inner: The tier that is sound.
        damages: Whether this read is damaged; `Call.operation` is always ``"read"``.
        how: The kind of damage; see `damage`.
        detected: True: raise `DamagedBlock`, as a tier with checksums would; False: say nothing.
        seed: Of the places of the damage.
    """

    def __init__(
        self,
        inner: Tier,
        damages: Callable[[Call], bool],
        *,
        how: Damage = "flip",
        detected: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__(inner)
        self._damages, self._how, self._detected = damages, how, detected
        self._rng = random.Random(seed)
        self._lock = threading.Lock()
        self._reads = 0
        self.damaged: list[Key] = []
        """The items whose bytes were damaged, in order."""

    def read(self, key: Key, out: Bytes) -> None:
        self.inner.read(key, out)
        with self._lock:
            call = Call("read", key, self._reads)
            self._reads += 1
            if not self._damages(call):
                return
            self.damaged.append(key)
            damage(out, self._how, self._rng)
        if self._detected:
            raise DamagedBlock(f"{key} was damaged on purpose ({self._how})")


# Conformance -----------------------------------------------------------------------------------

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
        self.put(snapshot(kept), noise(50_000, kept))
        self.expect(snapshot(kept), noise(50_000, kept))

    def test_room_of_small_items_serves_for_a_large_one(self) -> None:
        limited = self.make_limited_tier(self.directory, 1 << 20)
        if limited is None:
            return
        self.tier.close()
        self.tier = limited
        for i in range(10):
            self.put(snapshot(i), noise(80_000, i))
        with refused(StorageFull):
            self.tier.reserve(snapshot(99), 300_000)
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
