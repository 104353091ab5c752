"""What watching costs: progress, trace and report, on the LSTM.

Runs with and without are taken in pairs, in one process.  *Without* has even the built-in
trace silenced.  As the difference of two runs is less certain than what it is to show,
the time spent in the observers themselves is measured too.  It should be under 1 %.

``python -m benchmarks.observing [--pairs N] [--disk DIR] [--quick]``
"""

from __future__ import annotations

import argparse
import io
import statistics
import tempfile
import time
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch

from benchmarks import common
from benchmarks.lstm import Problem
from longtape.chrome import write_chrome_trace
from longtape.engine.trace import Trace
from longtape.progress import Progress
from longtape.report import Report
from longtape.torch import scan

STEPS, MEMORY = 4_000, 64 * 128 * 1024


class Timed:
    """An observer, and the time that is spent in it."""

    def __init__(self, inner: Any) -> None:
        self._inner, self.seconds, self.calls = inner, 0.0, 0

    def on_action(self, *what: Any) -> None:
        began = time.perf_counter()
        self._inner.on_action(*what)
        self.seconds += time.perf_counter() - began
        self.calls += 1

    def on_transfer(self, *what: Any) -> None:
        began = time.perf_counter()
        self._inner.on_transfer(*what)
        self.seconds += time.perf_counter() - began
        self.calls += 1


def _nothing(*_: Any) -> None:
    pass


@contextmanager
def silenced() -> Any:
    """Runs whose trace remembers nothing."""
    with (
        mock.patch.object(Trace, "on_action", _nothing),
        mock.patch.object(Trace, "on_transfer", _nothing),
    ):
        yield


@contextmanager
def timed_trace(into: list[float]) -> Any:
    """Notes the seconds that are spent in the trace of runs."""

    def wrapped(method: Any) -> Any:
        def call(*what: Any) -> None:
            began = time.perf_counter()
            method(*what)
            into[0] += time.perf_counter() - began

        return call

    with (
        mock.patch.object(Trace, "on_action", wrapped(Trace.on_action)),
        mock.patch.object(Trace, "on_transfer", wrapped(Trace.on_transfer)),
    ):
        yield


def gradient(problem: Problem, disk: str, observers: list[Any], on_report: Any) -> float:
    began = time.perf_counter()
    carry, _ = scan(
        problem.step,
        problem.carry,
        problem.inputs,
        memory=MEMORY,
        disk=disk,
        observers=observers,
        on_report=on_report,
    )
    torch.autograd.grad(problem.loss(carry), problem.leaves)
    return time.perf_counter() - began


def watched(problem: Problem, disk: str) -> float:
    """With a bar that is drawn, a report that is asked for and written, and the trace."""

    def show(report: Report) -> None:
        str(report)
        report.append_to(f"{disk}/runs.jsonl")

    return gradient(problem, disk, [Progress(problem.steps, show=True, file=io.StringIO())], show)


def unwatched(problem: Problem, disk: str) -> float:
    with silenced():
        return gradient(problem, disk, [], None)


def inside(problem: Problem, disk: str) -> dict[str, float]:
    """Seconds spent in each observer of one run, and in making its report and writing its trace."""
    spent: dict[str, float] = {}
    progress, trace = Timed(Progress(problem.steps, show=True, file=io.StringIO())), [0.0]

    def show(report: Report) -> None:
        began = time.perf_counter()
        str(report)
        spent["report"] = time.perf_counter() - began
        began = time.perf_counter()
        write_chrome_trace(report.trace, f"{disk}/run.json")
        spent["writing the Chrome trace"] = time.perf_counter() - began

    with timed_trace(trace):
        seconds = gradient(problem, disk, [progress], show)
    spent |= {"progress": progress.seconds, "trace": trace[0], "calls": progress.calls, "run": seconds}
    watching = spent["report"] + spent["progress"] + spent["trace"]
    return {**spent, "share": watching / seconds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=9)
    parser.add_argument("--disk", default=None, help="directory to spill to; beside this program if not given")
    parser.add_argument("--quick", action="store_true", help="one short pair, to see that it works")
    arguments = parser.parse_args()
    steps, pairs = (600, 1) if arguments.quick else (STEPS, arguments.pairs)
    common.use_one_thread()
    problem = Problem(steps)
    with tempfile.TemporaryDirectory(dir=arguments.disk or common.RESULTS.parent) as disk:
        cases = {"with": lambda: watched(problem, disk), "without": lambda: unwatched(problem, disk)}
        seconds = common.interleave(cases, repeats=pairs)
        measured = inside(problem, disk)
    ratios = [a / b for a, b in zip(seconds["with"], seconds["without"], strict=True)]
    results = {
        **{name: common.summary(found) for name, found in seconds.items()},
        "with_over_without": common.summary(ratios),
        "ratios": ratios,
        "inside_the_observers": measured,
    }
    name = "observing_quick" if arguments.quick else "observing"
    common.write(name, {"steps": steps, "pairs": pairs, "memory_bytes": MEMORY}, results)
    print(f"with / without: {statistics.median(ratios):.4f}; inside the observers: {measured['share']:.3%} of the run")


if __name__ == "__main__":
    main()
