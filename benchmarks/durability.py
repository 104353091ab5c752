"""What being resumable costs: the LSTM with and without `resume`, in turn, at the default and at a short interval.

``python -m benchmarks.durability [--steps N] [--repeats R] [--disk DIR] [--quick]``
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from typing import Any

from benchmarks import common
from benchmarks.overhead import LSTM_MEMORY

SHORT_SECONDS = 2.0


def run(steps: int, memory: int, directory: str, seconds: float | None) -> dict[str, Any]:
    """One gradient after a short one that captures the step; `seconds` None: not resumable."""
    import torch

    from benchmarks.lstm import Problem
    from longtape.torch import scan

    problem = Problem(min(steps, 2_000))

    class Inputs:
        def __init__(self, length: int) -> None:
            self.length = length

        def __len__(self) -> int:
            return self.length

        def __getitem__(self, step: int) -> torch.Tensor:
            return problem.inputs[step % len(problem.inputs)]

    def gradient(length: int) -> tuple[float, Any]:
        reports: list[Any] = []
        given: Any = {"disk": directory} if seconds is None else {"resume": directory, "resume_seconds": seconds}
        began = time.perf_counter()
        carry, _ = scan(
            problem.step, problem.carry, Inputs(length), memory=memory, on_report=reports.append, capture=True, **given
        )
        torch.autograd.grad(problem.loss(carry), problem.leaves)
        return time.perf_counter() - began, reports[0]

    gradient(300)
    taken, report = gradient(steps)
    return {
        "seconds": taken,
        "sweeps_seconds": report.measured.seconds,
        "schedule": report.schedule,
        "durable_points": report.durable_points,
        "stood_still_seconds": report.durable_seconds,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=16_000)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--disk")
    parser.add_argument("--quick", action="store_true")
    parsed = parser.parse_args()
    steps, repeats = (1_000, 1) if parsed.quick else (parsed.steps, parsed.repeats)
    with tempfile.TemporaryDirectory(dir=parsed.disk) as directory:
        cases = {
            "not resumable": (run, (steps, LSTM_MEMORY, directory, None)),
            "every 60 s": (run, (steps, LSTM_MEMORY, directory, 60.0)),
            f"every {SHORT_SECONDS:g} s": (run, (steps, LSTM_MEMORY, directory, SHORT_SECONDS)),
        }
        outcomes = common.interleave_apart(cases, repeats=repeats)
    medians = {name: statistics.median(o["seconds"] for o in found) for name, found in outcomes.items()}
    results = {
        name: {
            "seconds": common.summary([o["seconds"] for o in found]),
            "ratio_to_not_resumable": medians[name] / medians["not resumable"],
            "runs": found,
        }
        for name, found in outcomes.items()
    }
    if parsed.quick:
        print(results)
    else:
        common.write("durability", {"steps": steps, "repeats": repeats, "memory": LSTM_MEMORY}, results)


if __name__ == "__main__":
    main()
