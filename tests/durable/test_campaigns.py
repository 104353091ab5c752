"""The campaigns of `benchmarks.campaigns` in small."""

import random
import warnings

import pytest

from benchmarks import campaigns
from longtape.tiers import disk


@pytest.fixture(autouse=True)
def usual_growth(monkeypatch):
    monkeypatch.setattr(disk, "LEAST_GROWTH_NBYTES", disk.LEAST_GROWTH_NBYTES)


def test_the_power_goes_at_any_moment():
    assert campaigns.power(1, random.Random(2))["wrong"] == 0


def test_files_are_damaged_between_a_run_and_its_resumption():
    chance = random.Random(3)
    for _ in range(20):
        campaigns._damage_between(chance)


def test_files_of_any_bytes():
    with warnings.catch_warnings():
        assert campaigns.fuzz(1500, random.Random(4))["executed"] == 0
