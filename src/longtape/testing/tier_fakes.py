"""Tiers that misbehave, for those who test what uses a tier: gated, failing, slow, damaging.

Owns wrappers that go around any tier.  Must not know any particular tier.  Entered as
`longtape.protocols.Tier` says; whatever else the wrapped tier offers (counters,
`direct`) is passed on.

Invariant: nothing here waits for a length of time, except `ThrottledTier`, whose
purpose that is.
"""

from __future__ import annotations

import os
import random
import threading
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from errno import EIO, ENOSPC
from math import inf
from typing import Any, Literal

from longtape.actions import Key
from longtape.errors import DamagedBlock, StateError, StorageError, StorageFull, UsageError
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
