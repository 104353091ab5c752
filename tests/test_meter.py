"""Times by events: told in order, once they are known, and by no wait but where a list is full."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest

from longtape.engine.meter import EventMeter, Notes, Timeline


@dataclass
class FakeEvent:
    at: float
    over: bool = False
    waited: bool = False

    def is_over(self) -> bool:
        return self.over

    def wait(self) -> None:
        self.over = self.waited = True


@dataclass
class FakeDevice:
    """Its clock began at another moment, and its events are over when a test says so."""

    now: float = 500.0
    events: list[FakeEvent] = field(default_factory=list)
    asked: list[float] = field(default_factory=list)

    @property
    def compute(self) -> Any:
        return self

    def record(self) -> FakeEvent:
        self.events.append(FakeEvent(self.now))
        return self.events[-1]

    def seconds(self, began: FakeEvent, ended: FakeEvent) -> float:
        self.asked.append(ended.at - began.at)
        return ended.at - began.at


@pytest.fixture
def device() -> FakeDevice:
    return FakeDevice()


def test_events_become_readings_of_the_engines_clock(device: FakeDevice) -> None:
    timeline = Timeline(device, lambda: 3.0)  # type: ignore[arg-type]
    device.now = 502.5
    began = device.record()
    device.now = 504.0
    assert timeline.span(began, device.record()) == (5.5, 7.0)


def test_how_long_something_took_is_asked_for_by_itself(device: FakeDevice) -> None:
    timeline = Timeline(device, lambda: 0.0)  # type: ignore[arg-type]
    device.now = 9_000.0
    began = device.record()
    device.now += 1e-6
    timeline.span(began, device.record())
    assert device.asked[-1] == pytest.approx(1e-6, rel=1e-3)  # and not the difference of two times since the start


def test_notes_are_told_in_order_when_they_are_over(device: FakeDevice) -> None:
    notes, told = Notes(Timeline(device, lambda: 0.0)), []  # type: ignore[arg-type]
    pairs = []
    for number in range(3):
        device.now = 501.0 + number
        pairs.append((device.record(), device.record()))
        notes.add(*pairs[-1], lambda began, ended, number=number: told.append((number, began, ended)))
    pairs[1][1].over = True
    notes.poll()
    assert told == []
    pairs[0][1].over = True
    notes.poll()
    assert told == [(0, 1.0, 1.0), (1, 2.0, 2.0)]
    notes.drain()
    assert [number for number, _, _ in told] == [0, 1, 2]
    assert pairs[2][1].waited


def test_a_meter_waits_for_the_action_so_many_back(device: FakeDevice) -> None:
    meter = EventMeter(device, Timeline(device, lambda: 0.0), most_ahead=2)  # type: ignore[arg-type]
    marks = []
    for _ in range(5):
        began = meter.mark()
        marks.append(meter.mark())
        meter.note(began, marks[-1], lambda began, ended: None)
    assert [mark.waited for mark in marks] == [True, True, True, False, False]
    assert meter.ahead == 2


def test_notes_of_other_streams_are_told_along_the_way(device: FakeDevice) -> None:
    """So that a long sweep does not gather them."""
    timeline, told = Timeline(device, lambda: 0.0), []  # type: ignore[arg-type]
    copies = Notes(timeline)
    meter = EventMeter(device, timeline, beside=[copies])  # type: ignore[arg-type]
    copies.add(device.record(), device.record(), lambda began, ended: told.append(began))
    meter.poll()
    assert not told
    device.events[-1].over = True
    meter.poll()
    assert told
    assert len(copies) == 0
