"""Storage that an earlier run left busy is waited for a little, and believed in the end."""

from dataclasses import replace

import pytest
from models import Chaotic

from longtape import Sweep, settled
from longtape.measure import TierSpeed
from longtape.settled import PATIENCE_SHARE, measure_settled

SIZES = [1 << 17, 1 << 22]
QUICK = TierSpeed(2e9, 2e9, 1e-4, 1e-4, 1e9)
BUSY = TierSpeed(4e7, 4e7, 1e-2, 1e-2, 1e9)


class Time:
    """A clock that only moves when somebody waits, and a disk whose speed depends on it."""

    def __init__(self):
        self.now, self.measured, self.busy_until = 0.0, 0, 0.0

    def sleep(self, seconds):
        self.now += seconds

    def measure(self):
        self.measured += 1
        return BUSY if self.now < self.busy_until else QUICK

    def run(self, directory="/scratch"):
        return measure_settled(self.measure, directory, SIZES, clock=lambda: self.now, sleep=self.sleep)


@pytest.fixture
def time(monkeypatch):
    monkeypatch.setattr(settled, "_seen", {})
    return Time()


def test_a_disk_is_measured_once_where_nothing_is_known_of_it(time):
    time.busy_until = 1.0
    assert time.run() == BUSY
    assert time.measured == 1


def test_a_disk_that_an_earlier_run_left_busy_is_waited_for(time):
    time.run()
    time.now, time.busy_until = 60.0, 61.0
    assert time.run() == QUICK
    assert time.now == pytest.approx(61.0, abs=0.2)


def test_no_longer_than_a_share_of_the_time_between(time):
    time.run()
    time.now, time.busy_until = 10.0, 1e9
    assert time.run() == BUSY
    assert time.now == pytest.approx(10.0 * (1 + PATIENCE_SHARE), abs=0.11)


def test_what_was_believed_is_what_the_next_run_compares_with(time):
    time.run()
    time.now, time.busy_until = 10.0, 1e9
    time.run()
    time.measured = 0
    assert time.run() == BUSY
    assert time.measured == 1


def test_a_disk_that_is_as_quick_or_quicker_is_believed_at_once(time):
    time.run()
    time.now, time.measured = 100.0, 0
    assert time.run() == QUICK
    assert time.measured == 1


def test_another_directory_is_another_disk(time):
    time.run()
    time.now, time.busy_until, time.measured = 60.0, 61.0, 0
    assert time.run("/other") == BUSY
    assert time.measured == 1


@pytest.mark.parametrize("slow", ["write_bytes_per_second", "read_bytes_per_second"])
def test_either_way_counts(time, slow):
    time.run()
    time.now = 60.0
    answers = iter([replace(QUICK, **{slow: 1e8}), QUICK])
    assert measure_settled(lambda: next(answers), "/scratch", SIZES, clock=lambda: time.now, sleep=time.sleep) == QUICK


def test_a_run_measures_its_disk_so(time, tmp_path):
    Sweep(Chaotic(), 200, memory="1KiB", disk=tmp_path).close()
    assert list(settled._seen) == [str(tmp_path)]
