"""Residuals on disk: what a gradient costs where storage carries what the adjoint needs, and where it does not.

``python -m benchmarks.residuals PART``, where PART is one of

* ``lstm``: an LSTM of 256 units, batch 64, beside the ideal and beside plain autograd that
  stores everything, with 64 and 256 MiB, from 4,000 to 100,000 steps;
* ``wide``: the same with 1,024 units;
* ``throttled``: with storage slowed down to 1/2 … 1/64 of what residuals need, beside the
  same storage with snapshots alone, and beside what was predicted;
* ``stencil``: states of 64 MiB and a step that costs more than storing one (r ≤ 1): the state
  is all that the adjoint needs, so that no step is run twice;
* ``compression``: the throttled LSTM with and without a codec;
* ``growth``: how much memory grows with the number of steps, by the resident size.

Each run is a process of its own, the cases take turns, and figures are medians.  *Ideal* is
as in `benchmarks.overhead`.  ``--quick`` is for trying the program, not for figures.

``--only CASE …`` runs some of the cases, named by what stands before the comma, so that a
part can be run in slices: runs join those in the file that the same sources gave.
"""

from __future__ import annotations

import argparse
import gc
import json
import tempfile
import time
from itertools import pairwise
from typing import Any
from unittest import mock

import numpy as np

from benchmarks import common
from benchmarks.overhead import lstm, lstm_peer, medians, stencil

MIB = 2**20
SHARES = (2, 4, 8, 16, 32, 64)
COSTLY = 8
"""Kernels a step of the costlier stencil: about 0.1 s, longer than a state takes to be written."""


def snapshots_alone(*arguments: Any) -> dict[str, Any]:
    """`lstm` with a planner that never puts residuals on storage."""
    import longtape.plan.choose as planner

    planner._with_residuals = lambda problem, costs: iter(())
    return lstm(*arguments)


def needs(hidden: int) -> dict[str, float]:
    """Bytes per second that storage must take, and give back, to carry every residual of the LSTM."""
    import torch

    from benchmarks.lstm import Problem
    from longtape.compose import Run
    from longtape.torch import scan

    problem, runs = Problem(300, hidden=hidden), list[Run]()

    def noting(*arguments: Any, **options: Any) -> Run:
        runs.append(Run(*arguments, **options))
        return runs[-1]

    for _ in range(2):  # the first captures the step
        with mock.patch("longtape.torch.scan.Run", noting):
            carry, _ = scan(problem.step, problem.carry, problem.inputs, memory=4096 * MIB)
        torch.autograd.grad(problem.loss(carry), problem.leaves)
    run = runs[-1]
    nbytes = run._traits.residual_nbytes
    longest = min(run.costs.record, run.costs.pull_back)
    return {"bytes_per_step": nbytes, "bytes_per_second": nbytes / longest}


# Memory that grows -------------------------------------------------------------------------------


class Tiny:
    """A state of 512 bytes whose step does next to nothing."""

    def __init__(self) -> None:
        self.state = [np.full(64, 0.5)]
        self.adjoint = [np.ones(64)]
        self.max_reverse = 1

    def advance(self, start: int, stop: int) -> None:
        for _ in range(start, stop):
            self.state[0] *= 0.999

    def reverse(self, start: int, stop: int) -> None:
        self.adjoint[0] *= 0.999


def sweep_growth(steps: int, memory: int, disk: str) -> dict[str, Any]:
    """How far the resident size rises in a `Sweep` of tiny steps."""
    import longtape

    def run(count: int) -> Any:
        sweep = longtape.Sweep(Tiny(), count, memory=memory, disk=disk)
        sweep.forward()
        sweep.reverse()
        return sweep.report

    run(2_000)
    return _grown(lambda: run(steps))


def scan_growth(steps: int, memory: int, disk: str) -> dict[str, Any]:
    """The same in a scan of small captured steps whose residuals go to disk."""
    import torch

    from longtape.torch import scan

    weight = torch.full((64,), 0.999, requires_grad=True)
    start = torch.full((64,), 0.5, requires_grad=True)

    def run(count: int) -> Any:
        reports: list[Any] = []
        carry, _ = scan(
            lambda h, _: (torch.sin(h * weight), None),
            start,
            None,
            count,
            memory=memory,
            disk=disk,
            on_report=reports.append,
        )
        torch.autograd.grad(carry.sum(), [start, weight])
        return reports[0]

    run(2_000)
    return _grown(lambda: run(steps))


def _grown(run: Any) -> dict[str, Any]:
    gc.collect()
    meter = common.Meter()
    meter.start()
    report = run()
    found = meter.stop()
    return {
        "seconds": found["seconds"],
        "rss_growth_bytes": found["peak_bytes"],
        "schedule": report.schedule,
        "peak_memory_bytes": report.measured.peak_memory_bytes,
        "peak_disk_bytes": report.measured.peak_disk_bytes,
        "writes": report.writes,
    }


def growth_cases(lengths: tuple[int, int], disk: str) -> dict[str, tuple[Any, tuple[Any, ...]]]:
    """Both ways at both lengths, with a MiB of memory."""
    ways = {"Sweep": sweep_growth, "scan": scan_growth}
    return {f"{name} N={n}": (way, (n, MIB, disk)) for name, way in ways.items() for n in lengths}


def per_step(results: dict[str, dict[str, Any]], lengths: tuple[int, int]) -> dict[str, float]:
    """Bytes a step by which memory grows from the shorter to the longer run, for each way that was run at both."""
    short, long = lengths
    found = {}
    for way in ("Sweep", "scan"):
        names = [f"{way} N={steps}" for steps in lengths]
        if all(name in results for name in names):
            grown = [results[name]["rss_growth_bytes"] for name in names]
            found[way] = (grown[1] - grown[0]) / (long - short)
    return found


def print_growth(short: int, long: int, disk: str) -> None:
    """`per_step` as JSON, all in this process, for the tests."""
    cases = growth_cases((short, long), disk)
    results = {name: function(*arguments) for name, (function, arguments) in cases.items()}
    print(json.dumps(per_step(results, (short, long))))


# Together ----------------------------------------------------------------------------------------


def cases_of(part: str, disk: str, quick: bool, needed: float) -> dict[str, tuple[Any, tuple[Any, ...]]]:
    if part == "lstm":
        lengths = (300, 600) if quick else (4_000, 16_000, LONGEST)
        found = {f"N={n}, 64 MiB": (lstm, (n, 64 * MIB, disk)) for n in lengths}
        found[f"N={lengths[1]}, 256 MiB"] = (lstm, (lengths[1], 256 * MIB, disk))
        for n in lengths[:2]:
            found[f"plain autograd N={n}"] = (lstm_peer, ("store everything", n))
        return found
    if part == "wide":
        lengths = (300,) if quick else (4_000, 16_000)
        found = {f"N={n}, {m} MiB": (lstm, (n, m * MIB, disk, None, 1024)) for n in lengths for m in (64, 256)}
        found[f"plain autograd N={lengths[0]}"] = (lstm_peer, ("store everything", lengths[0], 1024))
        return found
    if part == "stencil":
        return {f"N={n}": (stencil, (n, 16, disk, COSTLY)) for n in ((20,) if quick else (100, 400))}
    if part == "growth":
        return growth_cases(GROWTH_QUICK if quick else GROWTH, disk)
    n, memory = (400 if quick else 2_000), (8 if quick else 16) * MIB
    if part == "compression":
        return {
            f"1/{share}, {codec or 'no codec'}": (lstm, (n, memory, disk, None, 256, needed / share, codec))
            for share in (2, 8)
            for codec in (None, "bitshuffle+lz4", "relative:1e-3+bitshuffle+lz4")
        }
    found = {}
    for share in SHARES[:2] if quick else (1, *SHARES):
        found[f"1/{share}"] = (lstm, (n, memory, disk, None, 256, needed / share))
        found[f"1/{share}, snapshots alone"] = (snapshots_alone, (n, memory, disk, None, 256, needed / share))
    return found


LONGEST = 100_000
"""Steps of the longest LSTM: their residuals take 43 GiB of disk."""
GROWTH, GROWTH_QUICK = (10_000, 1_000_000), (2_000, 20_000)


def judged(part: str, results: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """What the figures come to, beside the bars."""
    ratios = {name: found["ratio_to_ideal"] for name, found in results.items() if "ratio_to_ideal" in found}
    if part in ("lstm", "wide", "stencil"):
        ours = {name: ratio for name, ratio in ratios.items() if not name.startswith("plain")}
        if not ours:
            return {}
        return {
            "largest_ratio_to_ideal": max(ours.values()),
            "seconds_per_step_spread": max(ours.values()) / min(ours.values()) - 1.0,
            "steps_recomputed": max(results[name]["steps_recomputed"] for name in ours),
        }
    if part == "throttled":
        mixed = [ratios[name] for name in ratios if "alone" not in name]
        return {
            "rises_as_bandwidth_falls": all(b >= 0.98 * a for a, b in pairwise(mixed)),
            "over_snapshots_alone": {
                name: ratios[name] / ratios[other] for name in ratios if (other := f"{name}, snapshots alone") in ratios
            },
            "measured_over_predicted": {
                name: results[name]["sweeps_seconds"] / results[name]["predicted_seconds"] for name in ratios
            },
        }
    return {}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("lstm", "wide", "throttled", "stencil", "compression", "growth"))
    parser.add_argument("--repeats", type=int, default=None, help="3, or 1 where it is quick")
    parser.add_argument("--disk", default=None, help="directory to spill to; a temporary one if not given")
    parser.add_argument("--only", nargs="*", default=None, metavar="CASE", help="run these, and add them to the file")
    parser.add_argument("--quick", action="store_true", help="short runs, printed and not kept")
    arguments = parser.parse_args()
    repeats = arguments.repeats or (1 if arguments.quick else 3)
    part, quick, name = arguments.part, arguments.quick, f"residuals_{arguments.part}"
    before = {} if quick else common.earlier(name)
    found = {case: list(result["runs"]) for case, result in before.get("results", {}).items()}
    settings = before.get("settings", {"sources": common.sources()})
    if part in ("throttled", "compression") and "needs" not in settings:
        settings["needs"] = common.apart(needs, 256)
    began = time.perf_counter()
    with tempfile.TemporaryDirectory(dir=arguments.disk) as disk:
        cases = cases_of(part, disk, quick, settings.get("needs", {}).get("bytes_per_second", 0.0))
        wanted = {case: how for case, how in cases.items() if chosen(case, arguments.only)}
        for case, runs in common.interleave_apart(wanted, repeats=repeats).items():
            found.setdefault(case, []).extend(runs)
    results = {case: {**medians(found[case]), "runs": found[case]} for case in cases if case in found}
    settings["seconds_in_all"] = settings.get("seconds_in_all", 0.0) + time.perf_counter() - began
    settings["summary"] = judged(part, results)
    if part == "growth":
        settings["summary"] = {"bytes_per_step": per_step(results, GROWTH_QUICK if quick else GROWTH)}
    if quick:
        print(settings, *results.items(), sep="\n")
    else:
        common.write(name, settings, results)


def chosen(case: str, only: list[str] | None) -> bool:
    """Whether to run a case, named in full or by what stands before the comma."""
    return not only or case in only or case.partition(",")[0] in only


if __name__ == "__main__":
    main()
