"""A run as a Chrome trace: it loads, it is well formed, and its spans are those of the run."""

from __future__ import annotations

import gzip
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
from models import Chaotic

import longtape
from longtape.chrome import _nested, events, write_chrome_trace

STATE = 8 * 20_000 + 64


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> longtape.Sweep:
    model = Chaotic(20_000)
    sweep = longtape.Sweep(model, 300, memory=8 * (STATE + 4096), disk=tmp_path_factory.mktemp("scratch"))
    sweep.forward()
    model.start_adjoint()
    sweep.reverse()
    return sweep


@pytest.fixture
def document(sweep: longtape.Sweep, tmp_path: Path) -> dict[str, Any]:
    write_chrome_trace(sweep.trace, tmp_path / "run.json", report=sweep.report)
    loaded: dict[str, Any] = json.loads((tmp_path / "run.json").read_text())
    return loaded


def of_phase(document: dict[str, Any], phase: str) -> list[dict[str, Any]]:
    return [event for event in document["traceEvents"] if event["ph"] == phase]


def test_every_event_has_what_the_format_asks_for(document: dict[str, Any]) -> None:
    needed = {"X": {"tid", "ts", "dur"}, "C": {"ts", "args"}, "i": {"ts", "s"}, "M": {"args"}}
    for event in document["traceEvents"]:
        assert {"name", "ph", "pid"} | needed[event["ph"]] <= event.keys()
        assert event.get("dur", 0) >= 0
    assert [e["args"]["name"] for e in of_phase(document, "M") if e["name"] == "thread_name"] == [
        "compute", "writes", "reads",
    ]  # fmt: skip
    assert len(of_phase(document, "i")) == 1
    assert document["otherData"]["steps"] == 300


def test_the_spans_are_those_of_the_run(sweep: longtape.Sweep, document: dict[str, Any]) -> None:
    found, expected = defaultdict(float), defaultdict(float)
    for event in of_phase(document, "X"):
        found[event["cat"]] += event["dur"] / 1e6
    for activity, began, ended in sweep.trace.spans:
        expected[activity] += ended - began
    assert found.keys() == expected.keys()
    for activity, seconds in expected.items():
        assert found[activity] == pytest.approx(seconds, rel=0.05, abs=1e-3), activity


def test_spans_of_a_lane_lie_inside_or_outside_of_each_other(document: dict[str, Any]) -> None:
    for lane in (1, 2, 3):
        ends: list[float] = []
        events = [event for event in of_phase(document, "X") if event["tid"] == lane]
        for event in sorted(events, key=lambda event: (event["ts"], -event["dur"])):
            while ends and ends[-1] <= event["ts"] + 1e-3:
                ends.pop()
            assert not ends or event["ts"] + event["dur"] <= ends[-1] + 1e-3
            ends.append(event["ts"] + event["dur"])


def test_counters_follow_memory_and_disk(sweep: longtape.Sweep, document: dict[str, Any]) -> None:
    memory = [event["args"]["bytes"] for event in of_phase(document, "C") if event["name"] == "memory"]
    assert 0 < max(memory) <= sweep.report.measured.peak_memory_bytes
    assert len(memory) == len(sweep.trace.levels)


def test_a_compressed_file(sweep: longtape.Sweep, tmp_path: Path) -> None:
    write_chrome_trace(sweep.trace, tmp_path / "run.json.gz")
    with gzip.open(tmp_path / "run.json.gz", "rt") as file:
        assert json.load(file)["traceEvents"]


def test_overlapping_spans_give_way() -> None:
    spans = [("a", 0.0, 10.0), ("b", 2.0, 3.0), ("c", 9.0, 12.0), ("d", 11.0, 13.0)]
    assert list(_nested(spans)) == [("a", 0.0, 10.0), ("b", 2.0, 3.0), ("c", 10.0, 12.0), ("d", 12.0, 13.0)]


def test_a_device_has_lanes_for_its_link(sweep: longtape.Sweep) -> None:
    class OnDevice:
        turned_at = 1.0
        levels = ()
        spans = (("copy", 0.0, 2.0), ("idle", 0.5, 1.0), ("out", 0.0, 0.5), ("in", 0.5, 1.0))

    found = list(events(OnDevice()))
    names = [event["args"]["name"] for event in found if event["name"] == "thread_name"]
    assert names == ["compute", "writes", "reads", "link out", "link in"]
    assert {event["cat"] for event in found if event["ph"] == "X"} == {"copy", "idle", "out", "in"}
