"""A real pyadjoint tape with time steps runs Longtape's schedules, in memory and on disk."""

import contextlib

import numpy as np
import pytest

pytest.importorskip("pyadjoint")

import checkpoint_schedules as library
import pyadjoint
from checkpoint_schedules import StorageType
from pyadjoint.tape import set_working_tape
from pyadjoint.verification import taylor_test

from examples import pyadjoint_heat as heat
from longtape.schedules import AsyncMultistage, Revolve

STEPS = 40
RAM, DISK = StorageType.RAM, StorageType.DISK

IN_MEMORY = {
    "ours, Revolve": lambda n: Revolve(n, 4),
    "ours, one state": lambda n: Revolve(n, 1),
    "ours, disk too slow": lambda n: AsyncMultistage(n, 5, write=1e4, read=1e4),
    "Revolve": lambda n: library.Revolve(n, 4),
    "Multistage": lambda n: library.MultistageCheckpointSchedule(n, 4, 0),
    "Mixed": lambda n: library.MixedCheckpointSchedule(n, 4, storage=RAM),
    "SingleMemory": lambda n: library.SingleMemoryStorageSchedule(),
}
ON_DISK = {
    "ours": lambda n: AsyncMultistage(n, 4, write=3.0, read=3.0),
    "ours, two states": lambda n: AsyncMultistage(n, 2, write=1.5, read=1.5),
    "ours, few on disk": lambda n: AsyncMultistage(n, 3, 4, write=5.0, read=5.0),
    "Multistage": lambda n: library.MultistageCheckpointSchedule(n, 2, 3),
    "HRevolve": lambda n: library.HRevolve(n, 2, 3),
    "Mixed": lambda n: library.MixedCheckpointSchedule(n, 4, storage=DISK),
    "TwoLevel": lambda n: library.TwoLevelCheckpointSchedule(7, 2),
    "SingleDisk": lambda n: library.SingleDiskStorageSchedule(),
}


@pytest.fixture(autouse=True)
def annotation_is_off_afterwards():
    yield
    pyadjoint.pause_annotation()


def floats(schedule, steps=STEPS, package_data=None):
    """The step x + 0.1 sin(c x) on pyadjoint's own floats, and the derivative of x² at the end with respect to c."""
    with set_working_tape(pyadjoint.Tape(package_data=package_data)) as tape:
        pyadjoint.continue_annotation()
        if schedule is not None:
            tape.enable_checkpointing(schedule)
        control, x = pyadjoint.AdjFloat(0.7), pyadjoint.AdjFloat(0.3)
        for _ in tape.timestepper(iter(range(steps))):
            x = x + 0.1 * np.sin(control * x)
        functional = pyadjoint.ReducedFunctional(x * x, pyadjoint.Control(control))
        pyadjoint.pause_annotation()
        derivative = functional.derivative()
        order = taylor_test(functional, control, pyadjoint.AdjFloat(1.0))
    return float(derivative), order


# pyadjoint cannot store its own floats as adjoint dependencies: run again, a step gives it NumPy's.
@pytest.mark.parametrize("name", sorted(IN_MEMORY.keys() - {"Mixed"}))
def test_floats(name):
    expected, _ = floats(None)
    derivative, order = floats(IN_MEMORY[name](STEPS))
    assert derivative == expected
    assert order > 1.95


def test_floats_stay_in_memory_under_a_schedule_that_uses_the_disk(scratch):
    package = heat.Scratch(str(scratch))
    try:
        derivative, _ = floats(ON_DISK["ours"](STEPS), package_data={"longtape": package})
    finally:
        package.close()
    assert derivative == floats(None)[0]
    assert package.written == 0


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_short_tapes(steps):
    assert floats(Revolve(steps, 2), steps)[0] == floats(None, steps)[0]


@contextlib.contextmanager
def arrays(schedule, steps, package_data):
    generator = np.random.default_rng(1)
    initial, direction = heat.Field(generator.random(50)), heat.Field(generator.random(50))
    with set_working_tape(pyadjoint.Tape(package_data=package_data)) as tape:
        tape.enable_checkpointing(schedule)
        yield heat.record(tape, initial, steps), initial, direction


@pytest.mark.parametrize("name", sorted(IN_MEMORY))
def test_arrays_in_memory(name):
    with arrays(IN_MEMORY[name](STEPS), STEPS, None) as (functional, initial, direction):
        assert np.array_equal(functional.derivative().values, heat.exact_gradient(initial.values, STEPS))
        assert taylor_test(functional, initial, direction) > 1.95


@pytest.mark.parametrize("name", sorted(ON_DISK))
def test_arrays_on_disk(name, scratch):
    package = heat.Scratch(str(scratch))
    try:
        with arrays(ON_DISK[name](STEPS), STEPS, {"longtape": package}) as (functional, initial, direction):
            assert np.array_equal(functional.derivative().values, heat.exact_gradient(initial.values, STEPS))
            assert package.written > 0
            assert package.read > 0 or not name.startswith("ours")
            assert taylor_test(functional, initial, direction) > 1.95
    finally:
        package.close()


def test_disk_without_a_place_for_it_is_refused():
    with (
        pytest.raises(pyadjoint.checkpointing.CheckpointError, match="disk"),
        arrays(ON_DISK["ours"](STEPS), STEPS, None),
    ):
        pass


def test_the_example(capsys):
    assert heat.main(steps=60, size=200) > 1.95
    assert "read back" in capsys.readouterr().out
