"""A noisy disk, with the real executor: the runs of theory's table of noise, beside the event model.

Steps take a fixed time on a small state; transfers go to the real disk and take as long
as was drawn for them.  The event model is given the same draws.  Times are relative to the
plan on a disk without noise, and the real run should be within 10 % of the model.

Besides, *surprises*: costs that are not what the plan was told.  The best plan for what really
happened is found in the event model, and the real run should be within 10 % of it, without ever
waiting in the forward sweep.

``python -m benchmarks.noise [--only table|surprises] [--seeds N] [--disk DIR] [--quick]``
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
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

import longtape
from benchmarks import common
from longtape.actions import Key
from longtape.foresee import layout_of
from longtape.plan.asynchronous import EXACT, Layout, Rules
from longtape.plan.costs import LEAST_TO_PIN
from longtape.plan.simulate import Duration, Outcome, Speeds, simulate
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


def drawn(seconds: Iterator[float]) -> Duration:
    """What the next transfer takes, whichever it is."""
    return lambda key: next(seconds)


class NoisyTier:
    """The real disk, where each transfer takes as long as it is told to."""

    def __init__(self, inner: DiskTier, writes: Duration, reads: Duration) -> None:
        self._inner, self._writes, self._reads = inner, writes, reads
        self._closed = threading.Event()
        self.reserve, self.release, self.item_nbytes = inner.reserve, inner.release, inner.item_nbytes

    def write(self, key: Key, data: Any) -> None:
        ends = time.perf_counter() + self._writes(key)
        self._inner.write(key, data)
        self._wait(ends)

    def read(self, key: Key, out: Any) -> None:
        ends = time.perf_counter() + self._reads(key)
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
    """A model whose steps take a stated time; it checks that it is given the right state."""

    def __init__(self, seconds: Callable[[int], float] = lambda step: STEP_SECONDS) -> None:
        self.state, self._seconds = [np.zeros(STATE_NBYTES // 8)], seconds

    def advance(self, start: int, stop: int) -> None:
        for step in range(start, stop):
            assert self.state[0][0] == step
            self._pass(self._seconds(step))
            self.state[0] += 1

    def reverse(self, start: int, stop: int) -> None:
        assert self.state[0][0] == start
        self._pass(ADJOINT * self._seconds(start))

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
    tier = NoisyTier(DiskTier(disk), drawn(draws(draw, told, 2 * seed)), drawn(draws(draw, told, 2 * seed + 1)))
    began = time.perf_counter()
    with (
        closing(tier),
        longtape.Sweep(Ticking(), steps, memory=slots * STATE_NBYTES, tier=tier, costs=costs) as sweep,
    ):
        sweep.forward()
        sweep.reverse()
    report, plan = sweep.report, sweep.plan
    layout = replace(layout_of(plan), pin_initial=plan.uses_disk and plan.slots >= LEAST_TO_PIN)
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


# Surprises --------------------------------------------------------------------------------------

SURPRISE_SECONDS = 2e-3
SURPRISE_STEPS = 4_000
STALL_SECONDS = 5.0
BUDGETS = ((2, 8), (5, 8), (10, 24))
"""Told t_w / t_f, and states in memory."""
SPACINGS = (1, 2, 3, 4, 5, 6, 8, 10, 12, 15, 20, 25, 30, 40)


@dataclass(frozen=True)
class Truth:
    """What really happens; durations may remember, so that every run has a truth of its own."""

    forward: Callable[[int], float]
    write: Duration
    read: Duration

    def reverse(self, step: int) -> float:
        return ADJOINT * self.forward(step)


def _stalls_once(step: int, stall: float, told: float) -> Duration:
    """The first write of a state from `step` on takes `stall` seconds."""
    stalled = []

    def write(key: Key) -> float:
        if key.step < step or stalled:
            return told
        stalled.append(key)
        return stall

    return write


def truth(name: str, told: float, steps: int, *, step: float, stall: float) -> Truth:
    """A disk twice as slow as told, one stall, or steps that become three times as slow."""
    if name == "disk twice as slow as told":
        return Truth(lambda k: step, lambda key: 2 * told, lambda key: 2 * told)
    if name == "one write stalls":
        return Truth(lambda k: step, _stalls_once(steps // 10, stall, told), lambda key: told)
    return Truth(lambda k: step if k < steps // 2 else 3 * step, lambda key: told, lambda key: told)


SURPRISES = ("disk twice as slow as told", "one write stalls", "steps three times as slow midway")


def surprised(
    name: str, r: float, slots: int, disk: str, *, steps: int, step: float, stall: float = STALL_SECONDS
) -> dict[str, Any]:
    """A real run that was told wrong costs, beside the best plans for what happened.

    The model's steps take what the real ones took on average more than they were to take.
    """
    told = r * step
    costs = longtape.Costs(step, ADJOINT * step, write_latency=told, read_latency=told)
    real = truth(name, told, steps, step=step, stall=stall)
    tier = NoisyTier(DiskTier(disk), real.write, real.read)
    with (
        closing(tier),
        longtape.Sweep(Ticking(real.forward), steps, memory=slots * STATE_NBYTES, tier=tier, costs=costs) as sweep,
    ):
        sweep.forward()
        sweep.reverse()
    report, plan, trace = sweep.report, sweep.plan, sweep.trace
    run = trace.seconds("forward") + trace.seconds("reverse")
    slower = run / sum(real.forward(k) + real.reverse(k) for k in range(steps))
    ours = layout_of(plan)

    def model(believed: bool = True, **options: Any) -> Outcome:
        what = truth(name, told, steps, step=step, stall=stall)
        times = slower
        speeds = Speeds(lambda k: times * what.forward(k), lambda k: times * what.reverse(k), what.write, what.read)
        before = Speeds(step, ADJOINT * step, lambda key: told, lambda key: told) if believed else None
        return simulate(steps, plan.slots, speeds, **{"layout": ours, "believed": before, **options})

    others = {"ours": model(), "ours, told the truth": model(believed=False)}
    others |= {
        f"every {k} steps": model(layout=replace(ours, fixed_spacing=k, tail=tail), believed=False)
        for k in SPACINGS
        for tail in {ours.tail, 1}
    }
    others["not elastic"] = model(rules=Rules(elastic=False, margin=0.0))
    others["revolve"] = model(layout=Layout(stores=False, tail=steps), believed=False)
    best = min(others, key=lambda other: others[other].seconds)
    unhindered = [other for other in others if others[other].forward_stall_seconds == 0.0]
    best_unhindered = min(unhindered, key=lambda other: others[other].seconds)
    seconds = report.measured.seconds
    return {
        "seconds": seconds,
        "model_seconds": others["ours"].seconds,
        "best": best,
        "over_best": seconds / others[best].seconds,
        "best_without_waiting": best_unhindered,
        "over_best_without_waiting": seconds / others[best_unhindered].seconds,
        "best_waits_seconds": others[best].forward_stall_seconds,
        "forward_stall_seconds": report.forward_stall_seconds,
        "forward_seconds": report.forward_seconds,
        "forward_step_seconds": trace.seconds("forward"),
        "stall_seconds": report.measured.stall_seconds,
        "steps_recomputed": report.measured.steps_recomputed,
        "replans": report.replan_count,
        "schedule": plan.schedule,
        "steps_slower_than_asked": slower,
    }


def _surprises(disk: str, *, quick: bool) -> dict[str, Any]:
    steps, step, stall = (400, 1e-3, 0.1) if quick else (SURPRISE_STEPS, SURPRISE_SECONDS, STALL_SECONDS)
    results = {}
    for name in SURPRISES:
        for r, slots in BUDGETS:
            found = surprised(name, r, slots, disk, steps=steps, step=step, stall=stall)
            found["within"] = found["over_best_without_waiting"] <= 1 + WITHIN and not found["forward_stall_seconds"]
            results[f"r={r} s={slots} {name}"] = found
    return results


def _table(disk: str, steps: int, seeds: int) -> dict[str, Any]:
    results = {}
    for name in CASES:
        found = [one(name, steps, seed, disk) for seed in range(seeds)]
        medians = {
            key: statistics.median(run[key] for run in found)
            for key in ("measured", "simulated", "measured_over_simulated")
        }
        within = abs(medians["measured_over_simulated"] - 1) <= WITHIN
        results[name] = {**medians, "within": within, "runs": found}
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=("table", "surprises"), default=None)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--disk", default=None, help="directory to spill to; beside this program if not given")
    parser.add_argument("--quick", action="store_true", help="one short run a case, to see that it works")
    arguments = parser.parse_args()
    steps, seeds = (800, 1) if arguments.quick else (STEPS, arguments.seeds)
    settings = {"steps": steps, "step_seconds": STEP_SECONDS, "adjoint": ADJOINT}
    if arguments.only != "surprises":
        with tempfile.TemporaryDirectory(dir=arguments.disk or common.RESULTS.parent) as disk:
            table = _table(disk, steps, seeds)
        common.write("noise_quick" if arguments.quick else "noise", {**settings, "seeds": seeds}, table)
        for name, result in table.items():
            verdict = "within" if result["within"] else "OUTSIDE"
            print(f"{name:<45} measured {result['measured']:.3f}  simulated {result['simulated']:.3f}  {verdict}")
    if arguments.only != "table":
        with tempfile.TemporaryDirectory(dir=arguments.disk or common.RESULTS.parent) as disk:
            found = _surprises(disk, quick=arguments.quick)
        settings |= {"steps": SURPRISE_STEPS, "step_seconds": SURPRISE_SECONDS, "stall_seconds": STALL_SECONDS}
        common.write("surprises_quick" if arguments.quick else "surprises", settings, found)
        for name, result in found.items():
            verdict = "within" if result["within"] else "OUTSIDE"
            print(
                f"{name:<45} over the best {result['over_best']:.3f}, over the best that never waits "
                f"{result['over_best_without_waiting']:.3f}, waits {result['forward_stall_seconds']:.3f} s  {verdict}"
            )


if __name__ == "__main__":
    main()
