"""A noisy disk, with the real executor: the runs of theory's table of noise, beside the event model.

Steps take a fixed time on a small state; transfers go to the real disk and take as long
as was drawn for them.  The event model is given the same draws.  Times are relative to the
plan on a disk without noise, and the real run should be within 10 % of the model.

``python -m benchmarks.noise [--seeds N] [--disk DIR] [--quick]``
"""

from __future__ import annotations

import argparse
import itertools
import math
import random
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np

import longtape
from benchmarks import common
from longtape.actions import Key
from longtape.foresee import layout_of
from longtape.plan.asynchronous import EXACT
from longtape.plan.costs import LEAST_TO_PIN
from longtape.plan.simulate import Speeds, simulate
from longtape.tiers.disk import DiskTier

STEP_SECONDS = 1e-3
ADJOINT = 2.0
STEPS = 6_000
STATE_NBYTES = 4096
WITHIN = 0.10

Draw = Callable[[random.Random], float]


def lognormal(rng: random.Random) -> float:
    """Mean 1, σ = 1."""
    return math.exp(rng.gauss(-0.5, 1.0))


def pareto(rng: random.Random) -> float:
    """Mean 1, exponent 1.5."""
    return rng.paretovariate(1.5) / 3.0


def twice(rng: random.Random) -> float:
    """A disk twice as slow as told."""
    return 2.0


def steady(rng: random.Random) -> float:
    return 1.0


def stalling(r: float) -> Draw:
    """Now and then a transfer takes as long as a thousand steps."""
    return lambda rng: 1000.0 / r if rng.random() < 0.002 else 1.0


CASES: dict[str, tuple[float, int, Draw]] = {
    "r=2 s=8 lognormal": (2, 8, lognormal),
    "r=2 s=8 0.2 % stalls of 1000 steps": (2, 8, stalling(2)),
    "r=10 s=8 Pareto": (10, 8, pareto),
    "r=10 s=24 lognormal": (10, 24, lognormal),
    "r=10 s=24 Pareto": (10, 24, pareto),
    "r=10 s=24 disk twice as slow as told": (10, 24, twice),
}


def draws(draw: Draw, mean: float, seed: int) -> Iterator[float]:
    """Seconds of one transfer after another."""
    rng = random.Random(seed)
    while True:
        yield mean * draw(rng)


class NoisyTier:
    """The real disk, where each transfer takes as long as was drawn for it."""

    def __init__(self, inner: DiskTier, writes: Iterator[float], reads: Iterator[float]) -> None:
        self._inner, self._writes, self._reads = inner, writes, reads
        self._closed = threading.Event()
        self.reserve, self.release = inner.reserve, inner.release

    def write(self, key: Key, data: Any) -> None:
        ends = time.perf_counter() + next(self._writes)
        self._inner.write(key, data)
        self._wait(ends)

    def read(self, key: Key, out: Any) -> None:
        ends = time.perf_counter() + next(self._reads)
        self._inner.read(key, out)
        self._wait(ends)

    def _wait(self, until: float) -> None:
        """In a system call, so that the step has the processor."""
        if (left := until - time.perf_counter()) > 0:
            self._closed.wait(left)

    def close(self) -> None:
        self._closed.set()
        self._inner.close()


class Ticking:
    """A model whose steps take a fixed time; it checks that it is given the right state."""

    def __init__(self) -> None:
        self.state = [np.zeros(STATE_NBYTES // 8)]

    def advance(self, start: int, stop: int) -> None:
        for step in range(start, stop):
            assert self.state[0][0] == step
            self._pass(STEP_SECONDS)
            self.state[0] += 1

    def reverse(self, start: int, stop: int) -> None:
        assert self.state[0][0] == start
        self._pass(ADJOINT * STEP_SECONDS)

    @staticmethod
    def _pass(seconds: float) -> None:
        """Sleep most of it, so that workers run, and spin the rest, to be exact."""
        until = time.perf_counter() + seconds
        time.sleep(max(0.0, seconds - 2e-4))
        while time.perf_counter() < until:
            pass


def one(name: str, steps: int, seed: int, disk: str) -> dict[str, Any]:
    """A real run and its models."""
    r, slots, draw = CASES[name]
    told = r * STEP_SECONDS
    costs = longtape.Costs(STEP_SECONDS, ADJOINT * STEP_SECONDS, write_latency=told, read_latency=told)
    tier = NoisyTier(DiskTier(disk), draws(draw, told, 2 * seed), draws(draw, told, 2 * seed + 1))
    began = time.perf_counter()
    with longtape.Sweep(Ticking(), steps, memory=slots * STATE_NBYTES, tier=tier, costs=costs) as sweep:
        sweep.forward()
        sweep.reverse()
    report, plan = sweep.report, sweep.plan
    problem = longtape.Problem(steps, STATE_NBYTES, slots * STATE_NBYTES, has_disk=True)
    layout = replace(layout_of(plan, problem), pin_initial=plan.uses_disk and plan.slots >= LEAST_TO_PIN)
    step = (sweep.trace.seconds("forward") + sweep.trace.seconds("replay")) / (steps + report.measured.steps_recomputed)
    adjoint = sweep.trace.seconds("reverse") / steps

    def replayed(write: Iterator[float], read: Iterator[float], **options: Any) -> Any:
        # The model asks for two durations beforehand: what the plan is told.
        writes, reads = itertools.chain([told] * 2, write), itertools.chain([told] * 2, read)
        speeds = Speeds(step, adjoint, lambda _: next(writes), lambda _: next(reads))
        return simulate(steps, plan.slots, speeds, layout=layout, **options)

    noisy = replayed(draws(draw, told, 2 * seed), draws(draw, told, 2 * seed + 1))
    quiet = replayed(draws(steady, told, 0), draws(steady, told, 0), rules=EXACT)
    seconds = report.measured.seconds
    return {
        "measured": seconds / quiet.seconds,
        "simulated": noisy.seconds / quiet.seconds,
        "measured_over_simulated": seconds / noisy.seconds,
        "schedule": plan.schedule,
        "seconds": seconds,
        "step_seconds": step,
        "adjoint_seconds": adjoint,
        "forward_stall_seconds": report.forward_stall_seconds,
        "stall_seconds": report.measured.stall_seconds,
        "simulated_stall_seconds": noisy.stall_seconds,
        "steps_recomputed": report.measured.steps_recomputed,
        "simulated_steps_recomputed": noisy.advances - steps,
        "replans": report.replan_count,
        "wall_seconds": time.perf_counter() - began,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--disk", default=None, help="directory to spill to; beside this program if not given")
    parser.add_argument("--quick", action="store_true", help="one short run a case, to see that it works")
    arguments = parser.parse_args()
    steps, seeds = (800, 1) if arguments.quick else (STEPS, arguments.seeds)
    with tempfile.TemporaryDirectory(dir=arguments.disk or common.RESULTS.parent) as disk:
        runs = {name: [one(name, steps, seed, disk) for seed in range(seeds)] for name in CASES}
    results = {}
    for name, found in runs.items():
        medians = {
            key: statistics.median(run[key] for run in found)
            for key in ("measured", "simulated", "measured_over_simulated")
        }
        within = abs(medians["measured_over_simulated"] - 1) <= WITHIN
        results[name] = {**medians, "within": within, "runs": found}
    settings = {"steps": steps, "seeds": seeds, "step_seconds": STEP_SECONDS, "adjoint": ADJOINT}
    common.write("noise_quick" if arguments.quick else "noise", settings, results)
    for name, result in results.items():
        verdict = "within" if result["within"] else "OUTSIDE"
        print(f"{name:<40} measured {result['measured']:.3f}  simulated {result['simulated']:.3f}  {verdict}")


if __name__ == "__main__":
    main()
