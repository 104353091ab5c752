"""Bytes change on the disk behind the sweep's back: every damage is found, counted and recomputed."""

import os
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from models import Chaotic, OutOfPlace, Spanning

import longtape
from longtape.errors import StorageError
from longtape.testing.tiers import DamagingTier
from longtape.tiers.disk import DiskTier
from longtape.tiers.memory import MemoryTier
from tests.faults.sweeps import nbytes, run, storing_costs


class DamagedDisk(DiskTier):
    """Before some of the reads, the item is damaged in the file itself."""

    def __init__(self, directory, damages, how, seed=0):
        super().__init__(directory, direct=False)
        self._damages, self._how, self._random = damages, how, random.Random(seed)
        self.reads = []
        self.damaged = set()

    def read(self, key, out):
        self.reads.append(key)
        if self._damages(len(self.reads) - 1, key):
            self._damage(key)
        super().read(key, out)

    def _damage(self, key):
        entry = self._ledger._entries[key]
        fd, size = self.fileno(), self._file.size_of(entry.nbytes)
        where = entry.offset + self._random.randrange(entry.nbytes)
        if self._how == "flip":
            byte = os.pread(fd, 1, where)[0]
            os.pwrite(fd, bytes([byte ^ 1 << self._random.randrange(8)]), where)
        elif self._how == "zero":
            os.pwrite(fd, bytes(size), entry.offset)
        elif self._how == "truncate":
            os.ftruncate(fd, where)
        else:
            others = [e for e in self._ledger._entries.values() if e is not entry and e.written and not e.busy]
            if not others:
                return
            other = self._random.choice(others)
            mine, theirs = os.pread(fd, size, entry.offset), os.pread(fd, size, other.offset)
            os.pwrite(fd, theirs, entry.offset)
            os.pwrite(fd, mine, other.offset)
        self.damaged.add(key)


HOW = ["flip", "zero", "truncate", "swap"]


@settings(max_examples=60, deadline=None)
@given(
    how=st.sampled_from(HOW),
    likely=st.sampled_from([0.1, 0.5, 1.0]),
    slots=st.integers(3, 9),
    kind=st.sampled_from([Chaotic, Spanning, OutOfPlace]),
    seed=st.integers(0, 1000),
)
def test_damage_at_random(tmp_path_factory, how, likely, slots, kind, seed):
    chance = random.Random(seed)
    tier = DamagedDisk(tmp_path_factory.getbasetemp(), lambda index, key: chance.random() < likely, how, seed)
    report = run(kind=kind, slots=slots, tier=tier).report
    if how in ("flip", "zero"):
        assert report.failed_transfers >= len(tier.damaged)
        assert report.repeated_reads >= len(tier.damaged)


@pytest.mark.parametrize("how", HOW)
def test_the_initial_state_survives(tmp_path, how):
    """Everything that is read is damaged: nothing is left but what is in memory."""
    tier = DamagedDisk(tmp_path, lambda index, key: True, how)
    report = run(tier=tier, slots=3).report
    assert report.failed_transfers > 0
    assert 0 not in [key.step for key in tier.reads], "state 0 has a slot of its own"


@pytest.mark.parametrize("slots", [1, 2])
def test_with_less_memory_a_lost_initial_state_is_said(tmp_path, slots):
    tier = DamagedDisk(tmp_path, lambda index, key: key.step == 0, "flip")
    try:
        run(tier=tier, slots=slots)
    except StorageError as error:
        assert "state 0" in str(error)
        assert "three states" in str(error)
        assert 0 in [key.step for key in tier.reads]
    else:
        assert 0 not in [key.step for key in tier.damaged]


def test_a_read_that_fails_once_costs_nothing(tmp_path):
    """The bytes on the disk are sound; only their first transfer was not."""
    seen = set()

    def first(call):
        return call.key not in seen and not seen.add(call.key)

    tier = DamagingTier(MemoryTier(), first, detected=True)
    report = run(tier=tier).report
    assert report.reads > 0
    assert report.repeated_reads == report.failed_transfers == report.reads
    assert "read back" in report.faults[0]


def test_the_warning_is_given_once(tmp_path):
    tier = DamagedDisk(tmp_path, lambda index, key: True, "flip")
    model = Chaotic(2000)
    sweep = longtape.Sweep(model, 300, memory=4 * nbytes(), tier=tier, costs=storing_costs())
    sweep.forward()
    model.start_adjoint()
    with pytest.warns(RuntimeWarning, match="damaged block") as told:
        sweep.reverse()
    assert len(told) == 1
