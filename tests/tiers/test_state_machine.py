"""Every tier against a dict, under orders that Hypothesis thinks of."""

import tempfile

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, rule

from longtape.actions import Key, Kind
from longtape.errors import StateError, StorageError, StorageFull, UsageError
from longtape.protocols import Bytes
from longtape.testing.tiers import FailingTier, noise
from longtape.tiers.disk import DiskTier
from longtape.tiers.memory import MemoryTier

KEYS = st.builds(Key, st.sampled_from(Kind), st.integers(0, 4))
LENGTHS = st.sampled_from([0, 1, 500, 4096, 5000, 8192, 20_000, 70_000])
LIMIT = 300_000


class TierAgainstDict(RuleBasedStateMachine):
    """A model of reserved lengths and written bytes; one write or read in some fails on the way."""

    def __init__(self) -> None:
        super().__init__()
        self.room: dict[Key, int] = {}
        self.bytes: dict[Key, Bytes] = {}
        self.fail_next = False
        self.inner = self.make()
        self.tier = FailingTier(self.inner, lambda call: call.operation in ("write", "read") and self.fail_next)

    def make(self) -> MemoryTier | DiskTier:
        return MemoryTier(limit=LIMIT)

    def teardown(self) -> None:
        for key in list(self.room):
            self.release(key)
        assert self.inner.bytes_in_use == 0
        assert self.inner.peak_bytes <= LIMIT
        self.tier.close()

    @rule(key=KEYS, nbytes=LENGTHS)
    def reserve(self, key: Key, nbytes: int) -> None:
        if key in self.room:
            with pytest.raises(StateError):
                self.tier.reserve(key, nbytes)
            return
        try:
            self.tier.reserve(key, nbytes)
        except StorageFull:
            assert sum(self.room.values()) + nbytes > LIMIT / 8  # not without cause
        else:
            self.room[key] = nbytes

    @rule(
        key=KEYS, seed=st.integers(0, 1000), shorter=st.sampled_from([0, 0, 0, 1, 4096]), misaligned=st.integers(0, 1)
    )
    def write(self, key: Key, seed: int, shorter: int, misaligned: int) -> None:
        data = noise(max(0, self.room.get(key, 10) - shorter), seed, misaligned=misaligned)
        if key not in self.room:
            with pytest.raises(StateError):
                self.tier.write(key, data)
            return
        self.tier.write(key, data)
        self.bytes[key] = data

    @rule(key=KEYS)
    def write_too_much(self, key: Key) -> None:
        if key in self.room:
            with pytest.raises(UsageError):
                self.tier.write(key, noise(self.room[key] + 1))

    @rule(key=KEYS, misaligned=st.integers(0, 1))
    def read(self, key: Key, misaligned: int) -> None:
        out = noise(self.bytes[key].nbytes if key in self.bytes else 10, 5, misaligned=misaligned)
        if key not in self.bytes:
            with pytest.raises(StateError):
                self.tier.read(key, out)
            return
        self.tier.read(key, out)
        assert np.array_equal(out, self.bytes[key])

    @rule(key=KEYS)
    def fail(self, key: Key) -> None:
        self.fail_next = True
        with pytest.raises(StorageError):
            self.tier.read(key, noise(10))
        with pytest.raises(StorageError):
            self.tier.write(key, noise(10))
        self.fail_next = False

    @rule(key=KEYS)
    def release(self, key: Key) -> None:
        if key not in self.room:
            with pytest.raises(StateError):
                self.tier.release(key)
            return
        self.tier.release(key)
        del self.room[key]
        self.bytes.pop(key, None)


class DiskAgainstDict(TierAgainstDict):
    direct: bool | None = None

    def make(self) -> DiskTier:
        return DiskTier(tempfile.gettempdir(), limit=LIMIT, direct=self.direct)

    def teardown(self) -> None:
        super().teardown()
        assert isinstance(self.inner, DiskTier)
        assert self.inner.file_bytes <= LIMIT


class BufferedAgainstDict(DiskAgainstDict):
    direct = False


TestMemoryAgainstDict = TierAgainstDict.TestCase
TestDiskAgainstDict = DiskAgainstDict.TestCase
TestBufferedAgainstDict = BufferedAgainstDict.TestCase
for case in (TestMemoryAgainstDict, TestDiskAgainstDict, TestBufferedAgainstDict):
    case.settings = settings(max_examples=40, stateful_step_count=40, deadline=None)
del case
