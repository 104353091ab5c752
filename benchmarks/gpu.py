"""Scans on a CUDA device, held against what they promise.

Writes ``benchmarks/results/gpu.json`` with the name of the device.  Needs a device, and
memory and a disk behind it; ``--simulated --quick`` tries the program itself on a simulated
device, which says nothing of speed.

Promises, each with what was measured and whether it is kept:

* the time of a sequence whose storing everywhere would take four times the device's memory, in a
  sixteenth of it, is at most 1.05 times the ideal where the link carries residuals, or else that of the
  ideal and one forward step more; and a step's does not depend on N by more than 3 %;
* at equal memory it is less than that of other ways;
* compute stands still for copies for less than 2 % of the time, and copies overlap it by 95 %;
* bits are plain autograd's, with deterministic algorithms, also when copies are delayed at random;
* the device's peak is within the budget and what a step itself takes.

``compute-sanitizer`` checks a short run::

    compute-sanitizer --tool memcheck --error-exitcode 1 python -m benchmarks.gpu --quick --only bits delays
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # before CUDA begins: deterministic products

import torch
from torch import Tensor

from benchmarks import common, gpu_cases
from benchmarks.gpu_cases import Case
from longtape.testing.device import SimulatedDevice, drawn
from longtape.torch import scan
from longtape.torch.devices import standing_in

SANITIZER = (
    "compute-sanitizer --tool memcheck --error-exitcode 1 python -m benchmarks.gpu --quick --only bits delays --dry"
)
SHARE = 16
"""The budget is the device's memory over this."""

MOST_OF_IDEAL, MOST_BY_N, MOST_IDLE, LEAST_OVERLAP = 1.05, 0.03, 0.02, 0.95
PARTS = ("time", "others", "bits", "delays")


class Setting:
    """The device, the sizes, and how time is taken."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.quick, self.simulated = options.quick, options.simulated
        self.repeats = 1 if self.quick else options.repeats
        self.disk = options.disk
        self.runs = options.runs
        self.device = torch.device("cpu" if self.simulated else "cuda")
        if self.simulated:
            self.name, self.memory_nbytes = SimulatedDevice.name, 64 << 20
        else:
            self.name = torch.cuda.get_device_name(self.device)
            self.memory_nbytes = torch.cuda.get_device_properties(self.device).total_memory
        self.host_nbytes = options.host_memory or int(0.5 * common.machine()["memory_bytes"])
        if self.quick:
            self.host_nbytes = min(self.host_nbytes, 256 << 20)

    @property
    def budget(self) -> int:
        return (64 << 20 if self.quick else self.memory_nbytes) // SHARE

    def cases(self) -> list[Case]:
        if self.quick:
            return [
                gpu_cases.lstm(self.device, hidden=32, batch=8, inputs=8),
                gpu_cases.stencil(self.device, side=16),
            ]
        return [gpu_cases.lstm(self.device), gpu_cases.stencil(self.device)]

    def steps_of(self, case: Case) -> int:
        """So many that storing everything takes four times the device's memory."""
        if self.quick:
            return 24
        return max(64, 4 * self.memory_nbytes // self.tape_nbytes(case))

    def tape_nbytes(self, case: Case) -> int:
        """What autograd keeps of one step."""
        if self.simulated:
            return 4 * case.state_nbytes
        held = []
        for steps in (2, 6):
            torch.cuda.synchronize()
            before = torch.cuda.memory_allocated()
            final = gpu_cases.run_steps(case, case.init, 0, steps)
            held.append(torch.cuda.memory_allocated() - before)
            del final
        return max(case.state_nbytes, (held[1] - held[0]) // 4)

    def working_set(self, case: Case) -> int:
        """The most that one step, there and back, takes beside what was there before, gradients included."""
        if self.simulated:
            return 1 << 62
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        gpu_cases.plain(case, 2)
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before

    def seconds(self, function: Callable[..., Any], *arguments: Any) -> float:
        if not self.simulated:
            torch.cuda.synchronize()
        began = time.perf_counter()
        function(*arguments)
        if not self.simulated:
            torch.cuda.synchronize()
        return time.perf_counter() - began

    def scan(self, case: Case, steps: int, **options: Any) -> tuple[list[Tensor], Any]:
        """The gradients, and the report."""
        reports: list[Any] = []
        options = {"memory": self.budget, "host_memory": self.host_nbytes, "disk": self.disk, **options}
        final, _ = scan(case.step, case.init, case.inputs(steps), on_report=reports.append, **options)
        return case.gradients(final), reports[-1]


def bar(value: float, limit: float, *, at_least: bool = False) -> dict[str, Any]:
    """A promise: what was measured, what is allowed, and whether it is kept."""
    return {"value": value, "limit": limit, "kept": value >= limit if at_least else value <= limit}


# The promises -------------------------------------------------------------------------------------


def times(setting: Setting) -> dict[str, Any]:
    """Against the ideal, for two lengths."""
    found = {}
    for case in setting.cases():
        steps, short = setting.steps_of(case), 8 if setting.quick else 32
        setting.scan(case, short)  # captured once, so that no measurement has to
        per_step: dict[str, list[float]] = {"ideal": [], "forward": [], "scan": [], "half": []}
        report = None
        for _ in range(setting.repeats):
            per_step["ideal"].append(setting.seconds(gpu_cases.plain, case, short) / short)
            per_step["forward"].append(setting.seconds(gpu_cases.forward_only, case, short) / short)
            for name, length in (("scan", steps), ("half", steps // 2)):
                _, found = setting.scan(case, length)
                report = found if name == "scan" else report
                per_step[name].append(found.measured.seconds / length)
        middle = {name: statistics.median(values) for name, values in per_step.items()}
        assert report is not None
        records = report.steps_recorded >= 0.99 * steps
        ideal = middle["ideal"] if records else middle["ideal"] + middle["forward"]
        overlaps = [link.overlap_fraction for link in report.device.links if link.overlap_fraction is not None]
        found[case.name] = {
            "steps": steps,
            "state_bytes": case.state_nbytes,
            "seconds_per_step": middle,
            "residuals_carried": records,
            "schedule": report.schedule,
            "bars": {
                "times the ideal": bar(middle["scan"] / ideal, MOST_OF_IDEAL),
                "change with N": bar(abs(middle["scan"] / middle["half"] - 1.0), MOST_BY_N),
                "share idle for copies": bar(report.device.idle_seconds / report.measured.seconds, MOST_IDLE),
                "overlap": bar(min(overlaps, default=1.0), LEAST_OVERLAP, at_least=True),
                "peak of the device": bar(report.device.peak_bytes, setting.budget + setting.working_set(case)),
            },
            "report": report.to_json(),
        }
    return found


def others(setting: Setting) -> dict[str, Any]:
    """Ratios to other ways at equal memory, on a sequence whose tapes fit the host's memory."""
    found = {}
    community = gpu_cases.community()
    for case in setting.cases():
        tape = setting.tape_nbytes(case)
        steps = 16 if setting.quick else max(64, min(setting.steps_of(case), setting.host_nbytes // (2 * tape)))
        ways: dict[str, Callable[[], Any]] = {
            "torch.utils.checkpoint, √N segments": lambda c=case, n=steps: gpu_cases.segments(c, n),
            "save_on_cpu(pin_memory=True)": lambda c=case, n=steps: gpu_cases.on_cpu(
                c, n, pinned=not setting.simulated
            ),
        }
        if community is not None and not setting.simulated:
            ways[community[0]] = lambda c=case, n=steps: gpu_cases.offloaded(c, n, community[1])
        taken: dict[str, list[float]] = {name: [] for name in ("longtape", *ways)}
        peaks: dict[str, int] = {}
        setting.scan(case, 8)
        for _ in range(setting.repeats):
            for name, way in {"longtape": lambda c=case, n=steps: setting.scan(c, n), **ways}.items():
                if not setting.simulated:
                    torch.cuda.reset_peak_memory_stats()
                taken[name].append(setting.seconds(way))
                peaks[name] = 0 if setting.simulated else torch.cuda.max_memory_allocated()
        ours = statistics.median(taken["longtape"])
        found[case.name] = {
            "steps": steps,
            "peak_bytes": peaks,
            "seconds": {name: statistics.median(values) for name, values in taken.items()},
            "bars": {f"ours over {name}": bar(ours / statistics.median(taken[name]), 1.0) for name in ways},
        }
    found["not installed"] = [] if community is not None else ["torchtune OffloadActivations"]
    return found


def bits(setting: Setting) -> dict[str, Any]:
    """Gradients of a length that plain autograd can hold, bit for bit."""
    found = {}
    for case in setting.cases():
        steps = 24 if setting.quick else 96
        expected = gpu_cases.plain(case, steps)
        budget = max(setting.budget // 16, 24 * case.state_nbytes)
        for capture in (False, True):
            got, report = setting.scan(case, steps, memory=budget, capture=capture)
            same = all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
            name = f"{case.name}, {'captured' if capture else 'as it is'}"
            found[name] = {
                "steps": steps,
                "schedule": report.schedule,
                "bars": {"same bits": bar(same, 1, at_least=True)},
            }
    return found


class Delayed:
    """A stream whose copies are kept waiting on the device, at random."""

    def __init__(self, inner: Any, chance: random.Random) -> None:
        self.__dict__.update(stream=inner, chance=chance)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["stream"], name)

    def copy(self, target: Tensor, source: Tensor) -> None:
        with torch.cuda.stream(self.stream.inner):
            torch.cuda._sleep(self.chance.choice((0, 0, 10_000, 1_000_000)))  # cycles
        self.stream.copy(target, source)


def _delayed_device(setting: Setting, seed: int) -> Any:
    if setting.simulated:
        return SimulatedDevice(drawn(seed))
    from longtape.torch.cuda import CudaDevice

    device = CudaDevice(torch.device("cuda", torch.cuda.current_device()))
    chance = random.Random(seed)
    device.out, device.into = Delayed(device.out, chance), Delayed(device.into, chance)  # type: ignore[assignment]
    return device


def delays(setting: Setting) -> dict[str, Any]:
    """Short scans of a small step, by many budgets, with copies delayed at random: the same bits every time."""
    case = gpu_cases.lstm(setting.device, hidden=32, batch=8, inputs=8)
    expected = {steps: gpu_cases.plain(case, steps) for steps in (7, 24, 40)}
    wrong, plans = 0, set()
    count = min(setting.runs, 20) if setting.quick else setting.runs
    for seed in range(count):
        chance = random.Random(seed)
        steps = chance.choice(list(expected))
        options: dict[str, Any] = {
            "memory": case.state_nbytes * chance.randint(4, 10),
            "host_memory": case.state_nbytes * chance.randint(1, 40),
            "capture": chance.random() < 0.5,
        }
        with ExitStack() as stack:
            options["disk"] = stack.enter_context(tempfile.TemporaryDirectory()) if chance.random() < 0.3 else None
            device = _delayed_device(setting, seed)
            if setting.simulated:
                stack.enter_context(device)
            stack.enter_context(standing_in(device))
            got, report = setting.scan(case, steps, **options)
        plans.add(report.schedule)
        wrong += not all(torch.equal(a, b) for a, b in zip(got, expected[steps], strict=True))
    return {"delays": {"runs": count, "schedules": sorted(plans), "bars": {"wrong runs": bar(wrong, 0)}}}


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__.split("\n\n")[0])
    parser.add_argument("--simulated", action="store_true", help="try the program on a simulated device")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to see that the program works")
    parser.add_argument("--only", nargs="*", choices=PARTS, default=PARTS)
    parser.add_argument("--disk", help="a directory for scratch files behind the host's memory")
    parser.add_argument("--host-memory", type=int, help="bytes to pin; half of the machine's memory otherwise")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--runs", type=int, default=1000, help="with random delays")
    parser.add_argument("--dry", action="store_true", help="write no results")
    options = parser.parse_args(arguments)
    if not options.simulated and not torch.cuda.is_available():
        sys.exit(
            "benchmarks.gpu needs a CUDA device, and this PyTorch finds none; run it where there is one "
            "(make bench-gpu), or try the program with --simulated --quick"
        )
    setting = Setting(options)
    results: dict[str, Any] = {}
    with ExitStack() as stack:
        stack.callback(torch.use_deterministic_algorithms, torch.are_deterministic_algorithms_enabled())
        torch.use_deterministic_algorithms(True)
        if options.simulated:
            stack.enter_context(standing_in(stack.enter_context(SimulatedDevice(drawn(0)))))
        for part in options.only:
            results[part] = {"time": times, "others": others, "bits": bits, "delays": delays}[part](setting)
    kept = {
        f"{part}: {name}: {what}": found["kept"]
        for part, by_name in results.items()
        for name, outcome in by_name.items()
        if isinstance(outcome, dict)
        for what, found in outcome.get("bars", {}).items()
    }
    document = {"device": setting.name, "kept": kept, "compute-sanitizer": _sanitizer(options), **results}
    settings = {"memory_bytes": setting.budget, "host_memory_bytes": setting.host_nbytes, **vars(options)}
    if options.dry or options.simulated:
        for name, is_kept in kept.items():
            judged = not options.simulated or name.startswith(("bits", "delays"))
            print(f"{('kept' if is_kept else 'NOT KEPT') if judged else 'ran':<8}  {name}")
    else:
        common.write("gpu", settings, document)
    return document


def _sanitizer(options: argparse.Namespace) -> str:
    there = shutil.which("compute-sanitizer") is not None and not options.simulated
    return f"{'run by hand' if there else 'not found'}: {SANITIZER}"


if __name__ == "__main__":
    main()
