"""The campaigns of `benchmarks.campaigns` in small."""

import random
import warnings

import pytest
import torch

from benchmarks.campaigns import damage, errors, fuzz, power, resumed, slow
from longtape.tiers import disk

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def as_before(monkeypatch):
    monkeypatch.setattr(disk, "LEAST_GROWTH_NBYTES", disk.LEAST_GROWTH_NBYTES)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("campaign", [power.power, power.power_scan])
def test_the_power_goes_at_any_moment(campaign):
    assert campaign(60, random.Random(2))["wrong"] == 0


def test_files_are_damaged_between_a_run_and_its_resumption():
    chance = random.Random(3)
    for _ in range(20):
        damage._damage_between(chance)
    assert resumed.resumed_damage(16, chance)["cases"] == 16


def test_files_of_any_bytes():
    with warnings.catch_warnings():
        assert fuzz.fuzz(1500, random.Random(4))["executed"] == 0


@pytest.mark.parametrize("campaign", [errors.errno_sweep, errors.errno_scan])
def test_single_calls_fail(campaign):
    found = campaign(50, random.Random(5))
    assert found["cases"] == 50
    assert any("fault reported" in how for kind in found["outcomes"].values() for how in kind)


@pytest.mark.parametrize("campaign", [slow.slow_sweep, slow.slow_scan])
def test_calls_take_their_time(campaign):
    assert campaign(9, random.Random(6))["calls_delayed"]
