"""Longtape's plans as schedules: legal by the other package's rules, and as good as the plan they come from."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("checkpoint_schedules")

from models import Chaotic, store_everything
from schedule_rules import judge

import longtape
from longtape.plan.binomial import advances
from longtape.schedules import AsyncMultistage, Revolve
from longtape.tiers.memory import MemoryTier


@settings(max_examples=300, deadline=None)
@given(
    steps=st.integers(1, 300),
    slots=st.integers(1, 20),
    transfer=st.sampled_from([0.1, 1.0, 1.7, 2.5, 10.0, 100.0]),
    limit=st.sampled_from([None, 1, 3, 10]),
)
def test_async_multistage_keeps_the_rules(steps, slots, transfer, limit):
    schedule = AsyncMultistage(steps, slots, limit, write=transfer, read=transfer)
    ran, _, on_disk = judge(schedule, steps, ram=slots, disk=limit)
    assert (on_disk > 0) <= schedule.choice.uses_disk
    assert ran <= advances(steps, slots) + steps


@settings(max_examples=150, deadline=None)
@given(steps=st.integers(1, 300), slots=st.integers(1, 20))
def test_revolve_is_optimal(steps, slots):
    schedule = Revolve(steps, slots)
    ran, _, _ = judge(schedule, steps, ram=slots, disk=0)
    assert ran == advances(steps, slots) + steps == schedule.steps_run


@pytest.mark.parametrize(("steps", "slots", "transfer"), [(100, 8, 1.5), (100, 8, 10.0), (1000, 16, 20.0)])
def test_a_disk_saves_steps(steps, slots, transfer):
    """A good part of the steps that Revolve runs again."""
    schedule = AsyncMultistage(steps, slots, write=transfer, read=transfer)
    ran, _, on_disk = judge(schedule, steps, ram=slots)
    assert on_disk > 0
    assert ran - 2 * steps < 0.7 * (advances(steps, slots) - steps)


@pytest.mark.parametrize(("steps", "slots"), [(1, 1), (2, 2), (60, 5), (200, 9)])
def test_it_runs_on_longtape_too(steps, slots):
    model = Chaotic()
    sweep = longtape.Sweep(
        model,
        steps,
        schedule=AsyncMultistage(steps, slots, write=3.0, read=3.0),
        memory=(slots + 2) * 76,
        tier=MemoryTier(),
    )
    sweep.forward()
    model.start_adjoint()
    sweep.reverse()
    assert model.result() == store_everything(steps)


@pytest.mark.parametrize(
    ("arguments", "options", "name"),
    [
        ((0, 3), {}, "max_n"),
        ((True, 3), {}, "max_n"),
        ((10, 0), {}, "snapshots_in_ram"),
        ((10, 2, -1), {}, "snapshots_on_disk"),
        ((10, 2.0), {}, "snapshots_in_ram"),
        ((10, 2), {"write": 0.0}, "write"),
        ((10, 2), {"forward": float("nan")}, "forward"),
    ],
)
def test_numbers_that_make_no_sense_are_named(arguments, options, name):
    with pytest.raises(longtape.UsageError, match=name):
        AsyncMultistage(*arguments, **options)
