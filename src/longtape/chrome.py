"""A run as a file for the trace viewers of Chrome (``chrome://tracing``) and Perfetto (``ui.perfetto.dev``).

This file reads finished traces and reports; it knows neither engine nor plan.

Source: the Trace Event Format, JSON object form: complete events (``X``) for what was done
when, counters (``C``) for bytes held, an instant (``i``) for the turn, metadata (``M``) for
the names of the lanes.  Times in it are microseconds.
"""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Iterable, Iterator
from typing import Any, Protocol

from longtape.report import Report

_PROCESS = 1
_LANES = {
    "compute": {
        "forward": "forward step",
        "replay": "step run again",
        "reverse": "adjoint step",
        "copy": "copy",
        "wait": "wait",
        "idle": "stands still for a copy",
    },
    "writes": {"write": "write"},
    "reads": {"read": "read"},
    "link out": {"out": "copy out of the device"},
    "link in": {"in": "copy into the device"},
}
_OF_DEVICES = ("link out", "link in")
"""Lanes that are there where anything is in them."""

_COLOURS = {"forward": "good", "replay": "bad", "reverse": "rail_load", "copy": "grey", "wait": "terrible"}
"""Names that the format reserves; viewers that do not know them choose for themselves."""

Span = tuple[str, float, float]


class Happened(Protocol):
    """What is read of a trace.  Times are seconds from the start of the run."""

    turned_at: float | None

    @property
    def spans(self) -> Iterable[Span]:
        """What was done when: (activity, began, ended)."""

    @property
    def levels(self) -> Iterable[tuple[float, int, int]]:
        """Now and then: (time, bytes held in memory, bytes held on storage)."""


def write_chrome_trace(trace: Happened, path: str | os.PathLike[str], *, report: Report | None = None) -> None:
    """Write a run for Chrome's and Perfetto's viewers.

    Args:
        trace: What happened, such as ``sweep.trace``.
        path: The file to write; one that ends in ``.gz`` is compressed, which both viewers read.
        report: The run's report, to go into the file beside the events.
    """
    document: dict[str, Any] = {"traceEvents": list(events(trace)), "displayTimeUnit": "ms"}
    if report is not None:
        document["otherData"] = report.to_dict()
    text = json.dumps(document, separators=(",", ":"), allow_nan=False)
    if os.fspath(path).endswith(".gz"):
        with gzip.open(path, "wt", encoding="utf-8") as file:
            file.write(text)
    else:
        with open(path, "w", encoding="utf-8") as file:
            file.write(text)


def events(trace: Happened) -> Iterator[dict[str, Any]]:
    """The events of a run."""
    yield {"ph": "M", "pid": _PROCESS, "name": "process_name", "args": {"name": "longtape"}}
    spans = list(trace.spans)
    for lane, (name, activities) in enumerate(_LANES.items(), start=1):
        if name in _OF_DEVICES and not any(span[0] in activities for span in spans):
            continue
        yield {"ph": "M", "pid": _PROCESS, "tid": lane, "name": "thread_name", "args": {"name": name}}
        yield {"ph": "M", "pid": _PROCESS, "tid": lane, "name": "thread_sort_index", "args": {"sort_index": lane}}
        for activity, began, ended in _nested(span for span in spans if span[0] in activities):
            event = {"ph": "X", "pid": _PROCESS, "tid": lane, "name": activities[activity], "cat": activity}
            event |= {"ts": 1e6 * began, "dur": 1e6 * (ended - began)}
            yield event | ({"cname": _COLOURS[activity]} if activity in _COLOURS else {})
    for seconds, memory, disk in trace.levels:
        for name, nbytes in (("memory", memory), ("disk", disk)):
            yield {"ph": "C", "pid": _PROCESS, "name": name, "ts": 1e6 * seconds, "args": {"bytes": nbytes}}
    if trace.turned_at is not None:
        yield {"ph": "i", "pid": _PROCESS, "tid": 1, "name": "turn", "ts": 1e6 * trace.turned_at, "s": "p"}


def _nested(spans: Iterable[Span]) -> Iterator[Span]:
    """The spans in order, each wholly inside or outside of every other, as the format wants it.

    Only spans that a trace has merged can overlap: the later one gives way.
    """
    open_ends: list[float] = []
    for activity, began, ended in sorted(spans, key=lambda span: (span[1], -span[2])):
        start = began
        while open_ends and open_ends[-1] < ended:
            start = max(start, open_ends.pop())
        if start < ended:
            open_ends.append(ended)
            yield activity, start, ended
