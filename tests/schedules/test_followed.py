"""Any schedule of checkpoint_schedules runs on Longtape: same bits, limits kept, transfers in the background."""

import functools
import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from models import Chaotic, OutOfPlace, store_everything

import longtape
from longtape.actions import Advance, Read, Restore, Reverse
from longtape.plan.transcript import transcribe
from longtape.plan.verify import verify
from longtape.testing.tier_fakes import FailingTier, GatedTier
from longtape.tiers.memory import MemoryTier

library = pytest.importorskip("checkpoint_schedules")
from checkpoint_schedules import Copy, EndForward, EndReverse, Forward, Move, StorageType  # noqa: E402
from checkpoint_schedules import Reverse as TakeAdjoint  # noqa: E402
from checkpoint_schedules.schedule import CheckpointSchedule  # noqa: E402

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
    "HRevolve": lambda n, s: library.HRevolve(max(2, n), max(1, s // 2), s),
    "Mixed": lambda n, s: library.MixedCheckpointSchedule(n, s, storage=DISK),
    "Mixed, RAM": lambda n, s: library.MixedCheckpointSchedule(n, s, storage=RAM),
    "TwoLevel": lambda n, s: library.TwoLevelCheckpointSchedule(s, max(1, s // 3)),
    "TwoLevel, RAM": lambda n, s: library.TwoLevelCheckpointSchedule(s, max(1, s // 3), binomial_storage=RAM),
    "SingleMemory": lambda n, s: library.SingleMemoryStorageSchedule(),
    "SingleDisk": lambda n, s: library.SingleDiskStorageSchedule(),
    "SingleDisk, moving": lambda n, s: library.SingleDiskStorageSchedule(move_data=True),
}
"""By name; made from the number of steps, and of slots.  The one for H-Revolve cannot be made for a single step."""

LIMITS = {
    "Revolve": lambda n, s: (s, 0),
    "Multistage": lambda n, s: (s // 2, s - s // 2),
    "Multistage, disk": lambda n, s: (0, s),
    "Multistage, revolve": lambda n, s: (s, 0),
    "DiskRevolve": lambda n, s: (s, n),
    "PeriodicDiskRevolve": lambda n, s: (s, n),
    "HRevolve": lambda n, s: (max(1, s // 2), s),
    "Mixed": lambda n, s: (0, s),
    "Mixed, RAM": lambda n, s: (s, 0),
    "TwoLevel": lambda n, s: (0, -(-n // s) + max(1, s // 3)),
    "TwoLevel, RAM": lambda n, s: (max(1, s // 3), -(-n // s)),
    "SingleMemory": lambda n, s: (n, 0),
    "SingleDisk": lambda n, s: (0, n),
    "SingleDisk, moving": lambda n, s: (0, n),
}
"""What each schedule promises to keep in RAM and on disk; its working storage holds one state more."""


def least_states(schedule, steps):
    """The states that memory must hold, as the error about too small a budget says."""
    with pytest.raises(longtape.BudgetError, match="takes") as caught:
        longtape.Sweep(Chaotic(), steps, schedule=schedule, memory=STATE, tier=MemoryTier(), costs=COSTS)
    return int(str(caught.value).split("that takes ")[1].split()[0]) // STATE


class Actions:
    """Remembers what was done, in order."""

    def __init__(self):
        self.seen = []

    def on_action(self, action, began, ended):
        self.seen.append(action)

    def on_transfer(self, *arguments):
        pass


def follow(schedule, steps, states, *, model=None, tier=None, observers=()):
    model = model or Chaotic()
    sweep = longtape.Sweep(
        model,
        steps,
        schedule=schedule,
        memory=states * STATE,
        tier=tier or MemoryTier(),
        costs=COSTS,
        observers=observers,
    )
    model.advanced = 0  # a few first steps were run to check them
    sweep.forward()
    model.start_adjoint()
    sweep.reverse()
    return model, sweep.report


@settings(max_examples=150, deadline=None)
@given(
    name=st.sampled_from(sorted(SCHEDULES)),
    steps=st.one_of(st.integers(1, 30), st.integers(1, 300)),
    slots=st.integers(1, 20),
    spare=st.sampled_from([0, 1, 5]),
    kind=st.sampled_from([Chaotic, OutOfPlace]),
)
@pytest.mark.filterwarnings("ignore::RuntimeWarning:checkpoint_schedules")
def test_same_bits_for_every_schedule(name, steps, slots, spare, kind):
    if slots < 3:
        steps = min(steps, 150)  # quadratic with one slot
    steps = max(2, steps) if name == "HRevolve" else steps
    ram, disk = LIMITS[name](steps, slots)
    states = ram + 1 + (1 if disk else 0) + spare
    tier = MemoryTier(limit=disk * STATE)
    actions = Actions()
    model, report = follow(SCHEDULES[name](steps, slots), steps, states, model=kind(), tier=tier, observers=[actions])
    verify(actions.seen, steps, slots=states)
    assert model.result() == exact(steps)
    assert not report.faults
    assert report.measured.peak_memory_bytes <= states * STATE
    assert model.advanced == report.measured.steps_recomputed + steps
    assert tier.bytes_in_use == 0


@pytest.mark.parametrize("name", ["Multistage", "HRevolve", "SingleDisk"])
def test_on_a_real_disk(name, scratch):
    model = Chaotic(20_000)
    sweep = longtape.Sweep(model, 80, schedule=SCHEDULES[name](80, 8), memory="4MiB", disk=scratch)
    sweep.forward()
    model.start_adjoint()
    sweep.reverse()
    assert model.result() == exact(80, 20_000)
    assert sweep.report.writes > 0
    assert sweep.report.schedule.startswith(name)
    assert "stored on disk" in longtape.describe(sweep.plan)


def test_it_runs_no_step_that_the_schedule_does_not():
    """t(100, 5) advances; the 100th of the first sweep is there for the final state, which the caller gets."""
    _, report = follow(library.MultistageCheckpointSchedule(100, 5, 0), 100, 6)
    assert report.measured.steps_recomputed == 316 - 99


def test_writes_do_not_hold_up_the_forward_sweep():
    tier = GatedTier(MemoryTier(), holds=("write",))
    model = Chaotic()
    schedule = library.MultistageCheckpointSchedule(60, 2, 6)
    sweep = longtape.Sweep(model, 60, schedule=schedule, memory=10 * STATE, tier=tier, costs=COSTS)
    sweep.forward()  # with every write still waiting
    tier.open()
    model.start_adjoint()
    sweep.reverse()
    assert model.result() == exact(60)


def test_reads_are_begun_ahead_of_their_use():
    actions = Actions()
    follow(library.SingleDiskStorageSchedule(), 100, 6, observers=[actions])
    begun, lead, working = {}, [], 0
    for action in actions.seen:
        if isinstance(action, (Reverse, Advance)):
            working += 1
        elif isinstance(action, Read):
            begun[action.key.step] = working
        elif isinstance(action, Restore) and action.step in begun:
            lead.append(working - begun[action.step])
    assert len(lead) > 50
    assert sorted(lead)[5] >= 2, "steps between the beginning of a read and its use"


@pytest.mark.parametrize("name", ["Multistage", "Multistage, disk", "HRevolve", "SingleDisk", "Mixed", "TwoLevel, RAM"])
@pytest.mark.parametrize("operation", ["write", "read", "reserve"])
@pytest.mark.parametrize("every", [1, 3])
def test_failing_storage_costs_time_only(name, operation, every):
    steps, calls = 60, iter(range(10**9))
    tier = FailingTier(MemoryTier(), lambda call: call.operation == operation and next(calls) % every == 0)
    ram, _ = LIMITS[name](steps, 6)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        try:
            model, report = follow(SCHEDULES[name](steps, 6), steps, ram + 2, tier=tier)
        except longtape.StorageError as error:
            # Storage that never works costs state 0 where the schedule trusts it to nothing else.
            assert every == 1
            assert "state 0" in str(error) or "nothing below" in str(error)
            return
    assert model.result() == exact(steps)
    assert report.faults


def test_a_schedule_without_an_adjoint_says_so():
    model = Chaotic()
    sweep = longtape.Sweep(model, 20, schedule=library.NoneCheckpointSchedule(), memory=STATE)
    sweep.forward()
    model.start_adjoint()
    with pytest.raises(longtape.UsageError, match="takes no adjoint"):
        sweep.reverse()


# Bad input -----------------------------------------------------------------------------------------


class Listed(CheckpointSchedule):
    """Yields what it is told to."""

    def __init__(self, actions, max_n=3):
        super().__init__(max_n)
        self.actions = actions

    def _iterator(self):
        yield from self.actions

    def uses_storage_type(self, storage_type):
        return True

    is_exhausted = False


FORWARD = [Forward(0, 2, True, False, RAM), Forward(2, 3, False, True, WORK), EndForward()]
AGAIN = [
    TakeAdjoint(3, 2, True),
    Copy(0, RAM, WORK),
    Forward(0, 1, False, False, WORK),
    Forward(1, 2, False, True, WORK),
]
REST = [TakeAdjoint(2, 1, True), Move(0, RAM, WORK), Forward(0, 1, False, True, WORK), TakeAdjoint(1, 0, True)]


def test_the_sound_schedule_that_the_broken_ones_are_made_from():
    model, _ = follow(Listed([*FORWARD, *AGAIN, *REST, EndReverse()]), 3, 3)
    assert model.result() == exact(3)


@pytest.mark.parametrize(
    ("actions", "complaint"),
    [
        ([Forward(1, 3, True, False, RAM)], "action 0.*forward is not at step 1"),
        ([Forward(0, 0, True, False, RAM)], "no step"),
        ([Forward(0, 2, True, False, WORK)], "RAM or on disk only"),
        ([Forward(0, 2, False, True, NONE)], "need a storage"),
        ([Forward(0, 2, True, False, "RAM")], "no storage type"),
        ([Forward(0, 2, True, False, RAM), EndForward()], "not reached step 3"),
        ([*FORWARD, EndForward()], "has ended before"),
        ([FORWARD[0], FORWARD[1], TakeAdjoint(3, 2, True)], "has not ended"),
        ([*FORWARD, TakeAdjoint(2, 1, True)], "does not continue the adjoint"),
        ([*FORWARD, AGAIN[0], Copy(1, RAM, WORK)], "nothing of step 1"),
        ([*FORWARD, AGAIN[0], Copy(0, DISK, WORK)], "nothing of step 0"),
        ([*FORWARD, AGAIN[0], Copy(0, RAM, NONE)], "somewhere to go"),
        ([*FORWARD, AGAIN[0], Move(0, RAM, WORK), Copy(0, RAM, WORK)], "nothing of step 0"),
        ([*FORWARD, AGAIN[0], Forward(0, 1, False, True, WORK)], "forward is not at step 0"),
        ([*FORWARD, AGAIN[0], Copy(0, RAM, WORK), Forward(0, 3, False, False, WORK)], "beyond the adjoint"),
        ([*FORWARD, *AGAIN[:3], TakeAdjoint(2, 1, True)], "of step 1 are not in working storage"),
        ([*FORWARD, *AGAIN, EndReverse()], "adjoint at step 2"),
        ([*FORWARD, *AGAIN], "ended with the adjoint at step 2"),
        ([FORWARD[0]], "ended before the forward"),
        ([*FORWARD, "sleep"], "no action"),
    ],
)
def test_a_schedule_that_breaks_its_rules(actions, complaint):
    with pytest.raises(longtape.ScheduleError, match=complaint) as caught:
        follow(Listed(actions), 3, 9)
    assert "Listed over 3 steps" in str(caught.value)


def test_adjoint_dependencies_are_no_place_to_restart_from():
    actions = [Forward(0, 1, False, True, DISK), Forward(1, 2, True, False, RAM), Forward(2, 3, False, True, WORK)]
    actions += [EndForward(), TakeAdjoint(3, 2, True), Copy(0, DISK, WORK), Forward(0, 1, False, False, WORK)]
    with pytest.raises(longtape.ScheduleError, match="action 6"):
        follow(Listed(actions), 3, 9)


def test_a_schedule_for_other_steps_or_used_before():
    with pytest.raises(longtape.UsageError, match="for 10 steps, but the sweep has 11"):
        follow(library.MultistageCheckpointSchedule(10, 3, 0), 11, 9)
    schedule = library.MultistageCheckpointSchedule(10, 3, 0)
    next(schedule)
    with pytest.raises(longtape.UsageError, match="used already"):
        follow(schedule, 10, 9)
    with pytest.raises(longtape.UsageError, match="CheckpointSchedule"):
        follow([1, 2], 10, 9)


def test_memory_and_disk_that_do_not_suffice_say_what_would():
    assert least_states(library.MultistageCheckpointSchedule(50, 4, 6), 50) == 6
    assert least_states(library.MultistageCheckpointSchedule(50, 4, 0), 50) == 5
    with pytest.raises(longtape.BudgetError, match="6 states at once on disk"):
        schedule = library.MultistageCheckpointSchedule(50, 4, 6)
        longtape.Sweep(Chaotic(), 50, schedule=schedule, memory=900, tier=MemoryTier(), disk_limit=300, costs=COSTS)
    with pytest.raises(longtape.UsageError, match="disk='/scratch'"):
        longtape.Sweep(Chaotic(), 50, schedule=library.MultistageCheckpointSchedule(50, 4, 6), memory=900)


def test_a_state_that_changes_size_is_refused():
    model = Chaotic()
    sweep = longtape.Sweep(model, 10, schedule=library.MultistageCheckpointSchedule(10, 3, 0), memory=1000)
    model.state[0] = np.zeros(6)
    with pytest.raises(longtape.StepError, match=r"state\[0\].*at step 0"):
        sweep.forward()


def test_a_step_that_raises_keeps_its_error_and_says_where():
    class Failing(Chaotic):
        def advance(self, start, stop):
            if start <= 7 < stop and self.advanced > 20:
                raise ZeroDivisionError("mine")
            super().advance(start, stop)

    with pytest.raises(ZeroDivisionError) as caught:
        follow(library.MultistageCheckpointSchedule(20, 3, 0), 20, 4, model=Failing())
    assert "again" in caught.value.__notes__[0]
    assert "for the adjoint of step" in caught.value.__notes__[0]


def test_a_model_that_does_not_go_back_to_what_it_was_is_found():
    class Drifting(Chaotic):
        """Steps depend on something that no snapshot holds."""

        drift = 0.0

        def advance(self, start, stop):
            super().advance(start, stop)
            self.state[0] += self.drift

    model = Drifting()
    sweep = longtape.Sweep(
        model, 20, schedule=library.MultistageCheckpointSchedule(20, 3, 0), memory=900, costs=COSTS, verify=True
    )
    sweep.forward()
    model.start_adjoint()
    model.drift = 1e-9
    with pytest.raises(longtape.ReplayError, match="step"):
        sweep.reverse()


def test_transcripts_are_small():
    transcript = transcribe(library.MultistageCheckpointSchedule(2000, 10, 0), 2000)
    assert len(transcript) < 6 * 2000
    assert transcript.memory_items == 11
