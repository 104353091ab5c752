"""What not knowing the length costs: the LSTM with its number of steps told, and not told.

One problem, one budget, runs taken in turn::

    python -m benchmarks.unknown [--quick] [--disk DIR] [--repeats 5]

*known* is a scan, *unknown* a while_loop that ends when a counter in the carry says so.  Both
have the counter, and read their inputs by it, so that they differ in what is known of the end alone.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from functools import partial
from typing import Any

from benchmarks import common

MEMORY_STATES = 64
PLACES = ("disk", "memory alone")


def once(how: str, steps: int, disk: str | None) -> float:
    """Seconds of both sweeps of one run, preparing left out."""
    import torch

    import longtape.torch as lt
    from benchmarks.lstm import BATCH, HIDDEN, Problem

    common.use_one_thread()
    problem = Problem(min(steps, 1024))
    inputs, reports = problem.inputs, []
    settings: dict[str, Any] = {
        "memory": MEMORY_STATES * (2 * 4 * BATCH * HIDDEN + 128),
        "disk": disk,
        "on_report": reports.append,
    }
    zero = torch.zeros((), dtype=torch.int64)

    def step(carry: Any) -> Any:
        pair, count = carry
        return problem.cell(inputs.index_select(0, (count % len(inputs)).reshape(1))[0], pair), count + 1

    if how == "unknown":
        pair, _ = lt.while_loop(lambda carry: carry[1] < steps, step, (problem.carry, zero), capture=True, **settings)
    else:
        (pair, _), _ = lt.scan(
            lambda carry, x: (step(carry), None), (problem.carry, zero), length=steps, capture=True, **settings
        )
    problem.loss(pair).backward()
    report = reports[0]
    print(f"{how}: {report.schedule}, {report.measured.steps_recomputed:,} recomputed", flush=True)
    return float(report.measured.seconds)


def main() -> None:
    """Run and write the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="400 steps once each, nothing written")
    parser.add_argument("--steps", type=int, default=16_000)
    parser.add_argument("--disk", help="directory for scratch files (default: a temporary one)")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--where", choices=PLACES, nargs="*", default=PLACES, help="a part of the cases")
    parsed = parser.parse_args()
    steps, repeats = (400, 1) if parsed.quick else (parsed.steps, parsed.repeats)
    with tempfile.TemporaryDirectory(dir=parsed.disk) as scratch:
        cases = {
            f"{how}, {where}": partial(once, how, steps, scratch if where == "disk" else None)
            for where in parsed.where
            for how in ("known", "unknown")
        }
        samples: dict[str, list[float]] = {name: [] for name in cases}
        for turn in range(repeats + (not parsed.quick)):
            for name, case in cases.items():
                began = time.perf_counter()
                seconds = case()
                print(f"{name}: {seconds:.3f} s of {time.perf_counter() - began:.1f} s")
                if turn or parsed.quick:  # the first round warms up
                    samples[name].append(seconds)
    results = {name: common.summary(taken) for name, taken in samples.items()}
    for where in parsed.where:
        known, unknown = (results[f"{how}, {where}"]["median"] for how in ("known", "unknown"))
        print(f"{where}: unknown length costs {unknown / known - 1:+.1%}")
    if not parsed.quick:
        settings = {"steps": steps, "memory_states": MEMORY_STATES, "repeats": repeats, "sources": common.sources()}
        common.write("unknown", settings, {**common.earlier("unknown").get("results", {}), **results})


if __name__ == "__main__":
    main()
