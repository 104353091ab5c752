"""Predicted against measured: the LSTM and the stencil, three budgets each, on two disks.

One disk is the real one; the other is the real one throttled to a tenth of what was
measured of it.  Every run is a process of its own and the cases take turns.  Time should
be predicted within 10 % (median of the runs), counted memory within 5 %.

``python -m benchmarks.prediction [--only lstm|stencil] [--on real|tenth] [--repeats N] [--disk DIR] [--quick]``

A part of the cases joins what the same sources gave for the others.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from typing import Any

from benchmarks import common

LSTM_STEPS, LSTM_STATES = 4_000, (24, 64, 512)
"""States of 128 KiB."""
STENCIL_STEPS, STENCIL_STATES = 200, (4, 8, 16)
"""States of 64 MiB."""
DISKS = {"real": 1.0, "tenth": 0.1}
WITHIN_TIME, WITHIN_MEMORY = 0.10, 0.05


def _tier(disk: str, speeds: tuple[float, float], share: float) -> Any:
    """The real disk, throttled where only a share of it is wanted."""
    from longtape.testing.tiers import ThrottledTier
    from longtape.tiers.disk import DiskTier

    real = DiskTier(disk)
    if share == 1.0:
        return real
    return ThrottledTier(real, write_bytes_per_second=share * speeds[0], read_bytes_per_second=share * speeds[1])


def lstm(steps: int, states: int, disk: str, speeds: tuple[float, float], share: float) -> dict[str, Any]:
    """One gradient by `longtape.torch.scan`, after a short one that captures the step."""
    import torch

    from benchmarks.lstm import BATCH, HIDDEN, Problem
    from longtape.torch import scan

    problem, reports = Problem(steps), []
    memory = states * 2 * 4 * BATCH * HIDDEN

    def gradient(length: int) -> None:
        carry, _ = scan(
            problem.step,
            problem.carry,
            problem.inputs[:length],
            memory=memory,
            tier=_tier(disk, speeds, share),
            on_report=reports.append,
        )
        torch.autograd.grad(problem.loss(carry), problem.leaves)

    gradient(300)
    gradient(steps)
    return _figures(reports[-1])


def stencil(steps: int, states: int, disk: str, speeds: tuple[float, float], share: float) -> dict[str, Any]:
    """Forward and adjoint of the stencil by `longtape.Sweep`, which is told what an adjoint step takes."""
    import longtape
    from benchmarks.stencil import AllenCahn, initial

    model, weights = AllenCahn(), initial(seed=1)
    model.start_adjoint(weights)
    seconds = []
    for _ in range(4):
        began = time.perf_counter()
        model.reverse_from(0, model.state)
        seconds.append(time.perf_counter() - began)
    model.reverse_seconds = statistics.median(seconds[1:])
    memory = states * model.state[0].nbytes
    with longtape.Sweep(model, steps, memory=memory, tier=_tier(disk, speeds, share)) as sweep:
        sweep.forward()
        model.start_adjoint(weights)
        sweep.reverse()
    return _figures(sweep.report)


def _figures(report: Any) -> dict[str, Any]:
    predicted, measured, simulated = report.predicted, report.measured, report.simulated
    return {
        "schedule": report.schedule,
        "predicted_seconds": predicted.seconds,
        "measured_seconds": measured.seconds,
        "simulated_seconds": None if simulated is None else simulated.seconds,
        "time_error": measured.seconds / predicted.seconds - 1,
        "predicted_peak_memory_bytes": predicted.peak_memory_bytes,
        "measured_peak_memory_bytes": measured.peak_memory_bytes,
        "memory_error": measured.peak_memory_bytes / predicted.peak_memory_bytes - 1,
        "predicted_peak_disk_bytes": predicted.peak_disk_bytes,
        "measured_peak_disk_bytes": measured.peak_disk_bytes,
        "steps_recomputed": measured.steps_recomputed,
        "stall_seconds": measured.stall_seconds,
        "overlap_fraction": report.overlap_fraction,
    }


def speeds_of(disk: str) -> tuple[float, float]:
    """Bytes a second that the real disk writes and reads."""
    from longtape.probe import probe

    found = probe(disk, item="16MiB")
    return found.write_bytes_per_second, found.read_bytes_per_second


def judged(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """The medians, whether they are within the bars, and every run."""
    time_error = statistics.median(run["time_error"] for run in runs)
    memory_error = statistics.median(run["memory_error"] for run in runs)
    return {
        "time_error": time_error,
        "memory_error": memory_error,
        "within": abs(time_error) <= WITHIN_TIME and abs(memory_error) <= WITHIN_MEMORY,
        "runs": runs,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--disk", default=None, help="directory to spill to; beside this program if not given")
    parser.add_argument("--quick", action="store_true", help="one short run a case, to see that it works")
    parser.add_argument("--only", choices=("lstm", "stencil"), default=None)
    parser.add_argument("--on", choices=tuple(DISKS), default=None)
    arguments = parser.parse_args()
    repeats = 1 if arguments.quick else arguments.repeats
    shorter = 6 if arguments.quick else 1
    with tempfile.TemporaryDirectory(dir=arguments.disk or common.RESULTS.parent) as disk:
        speeds = speeds_of(disk)
        cases: dict[str, Any] = {}
        for share_name, share in DISKS.items():
            for what, function, steps, budgets in (
                ("lstm", lstm, LSTM_STEPS, LSTM_STATES),
                ("stencil", stencil, STENCIL_STEPS, STENCIL_STATES),
            ):
                wanted = arguments.only in (None, what) and arguments.on in (None, share_name)
                for states in budgets if wanted else ():
                    name = f"{what}, memory for {states} states, disk: {share_name}"
                    cases[name] = (function, (steps // shorter, states, disk, speeds, share))
        outcomes = common.interleave_apart(cases, repeats=repeats)
    settings = {
        "repeats": repeats,
        "lstm_steps": LSTM_STEPS // shorter,
        "stencil_steps": STENCIL_STEPS // shorter,
        "sources": common.sources(),
    }
    name = "prediction_quick" if arguments.quick else "prediction"
    speed = {"write_bytes_per_second": speeds[0], "read_bytes_per_second": speeds[1]}
    results = {case: {**judged(runs), "disk_was_probed_at": speed} for case, runs in outcomes.items()}
    common.write(name, settings, {**common.earlier(name).get("results", {}), **results})
    for case, found in results.items():
        verdict = "within" if found["within"] else "OUTSIDE"
        print(f"{case:<50} time {found['time_error']:+7.1%}  memory {found['memory_error']:+7.1%}  {verdict}")


if __name__ == "__main__":
    main()
