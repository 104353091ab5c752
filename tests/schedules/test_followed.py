"""Any schedule of checkpoint_schedules runs on Longtape: same bits, limits kept, transfers in the background."""

import functools
import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from models import Chaotic, OutOfPlace, store_everything

import longtape
from longtape.errors import StorageError
from longtape.plan.transcript import transcribe
from longtape.testing.tier_fakes import FailingTier
from longtape.tiers.memory import MemoryTier

library = pytest.importorskip("checkpoint_schedules")
from checkpoint_schedules import Copy, EndForward, EndReverse, Forward, Move, Reverse, StorageType  # noqa: E402

exact = functools.lru_cache(maxsize=4096)(store_everything)
STATE = 64 + 12
COSTS = longtape.Costs(1e-5, 2e-5, write_bytes_per_second=1e7, read_bytes_per_second=1e7)
RAM, DISK, WORK, NONE = StorageType.RAM, StorageType.DISK, StorageType.WORK, StorageType.NONE

SCHEDULES = {
    "Revolve": lambda n, s: library.Revolve(n, s),
    "Multistage": lambda n, s: library.MultistageCheckpointSchedule(n, s // 2, s - s // 2),
    "Multistage, disk": lambda n, s: library.MultistageCheckpointSchedule(n, 0, s),
    "Multistage, revolve": lambda n, s: library.MultistageCheckpointSchedule(n, s, 0, trajectory="revolve"),
    "DiskRevolve": lambda n, s: library.DiskRevolve(n, s),
    "PeriodicDiskRevolve": lambda n, s: library.PeriodicDiskRevolve(n, s),
    "HRevolve": lambda n, s: library.HRevolve(n, max(1, s // 2), s),
    "Mixed": lambda n, s: library.MixedCheckpointSchedule(n, s, storage=DISK),
    "Mixed, RAM": lambda n, s: library.MixedCheckpointSchedule(n, s, storage=RAM),
    "TwoLevel": lambda n, s: library.TwoLevelCheckpointSchedule(s, max(1, s // 3)),
    "TwoLevel, RAM": lambda n, s: library.TwoLevelCheckpointSchedule(s, max(1, s // 3), binomial_storage=RAM),
    "SingleMemory": lambda n, s: library.SingleMemoryStorageSchedule(),
    "SingleDisk": lambda n, s: library.SingleDiskStorageSchedule(),
    "SingleDisk, moving": lambda n, s: library.SingleDiskStorageSchedule(move_data=True),
}
SLOW_TO_MAKE = {"HRevolve", "DiskRevolve", "PeriodicDiskRevolve", "Mixed", "Mixed, RAM", "Revolve"}


def follow(schedule, steps, *, model=None, spare=0, tier=None, **options):
    """Run a schedule in the least memory that it takes, and `spare` states more."""
    model = model or Chaotic()
    tier = MemoryTier() if tier is None else tier
    with pytest.raises(longtape.BudgetError) as least:
        longtape.Sweep(model, 1, memory=0)
    assert "at least" in str(least.value)
    sweep = longtape.Sweep(model, steps, schedule=schedule, memory=10**9, tier=tier, costs=COSTS, **options)
    transcript = sweep._run._transcript
    return model, sweep, transcript


def run(name, steps, slots, *, spare=0, kind=Chaotic, disk=None):
    transcript = transcribe(SCHEDULES[name](steps, slots), steps)
    least = max(1, transcript.memory_items + (1 if transcript.uses_disk else 0))
    tier = MemoryTier() if disk is None else None
    model = kind()
    sweep = longtape.Sweep(
        model,
        steps,
        schedule=SCHEDULES[name](steps, slots),
        memory=(least + spare) * STATE,
        disk=disk,
        tier=tier,
        costs=COSTS,
    )
    sweep.forward()
    model.start_adjoint()
    sweep.reverse()
    return model, sweep, transcript, tier


@settings(max_examples=250, deadline=None)
@given(
    name=st.sampled_from(sorted(SCHEDULES)),
    steps=st.one_of(st.integers(1, 30), st.integers(1, 300)),
    slots=st.integers(1, 20),
    spare=st.sampled_from([0, 1, 5]),
    kind=st.sampled_from([Chaotic, OutOfPlace]),
)
def test_same_bits_for_every_schedule(name, steps, slots, spare, kind):
    if name in SLOW_TO_MAKE or slots < 3:
        steps = min(steps, 120)
    model, sweep, transcript, tier = run(name, steps, slots, spare=spare, kind=kind)
    assert model.result() == exact(steps)
    report = sweep.report
    least = max(1, transcript.memory_items + (1 if transcript.uses_disk else 0))
    assert report.measured.peak_memory_bytes <= (least + spare) * STATE
    assert report.measured.peak_disk_bytes <= max(transcript.disk_items, 0) * STATE + STATE
    assert report.schedule in name + "CheckpointSchedule" or report.schedule.startswith(name.split(",")[0])
    assert model.advanced == transcript.advances
    assert tier.bytes_in_use == 0
