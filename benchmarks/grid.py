"""Plans and predictions against the event simulator, over a grid of machines and jobs.

For every cell: the chosen plan's predicted time against its simulated time, and that against
the lower bound, Revolve alone, the published asynchronous scheme and the best synchronous
two-level schedule.  Nothing is timed, so it may run beside other work::

    python -m benchmarks.grid [--quick]

Steps take 1; an adjoint takes b, a transfer r, memory holds s states; the caller needs the
final state before the adjoint begins.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from math import ceil, floor, inf
from pathlib import Path
from statistics import median

from longtape.foresee import layout_of
from longtape.plan.asynchronous import EXACT
from longtape.plan.binomial import advances, capacity, repetitions
from longtape.plan.choose import choose
from longtape.plan.costs import Costs, Problem
from longtape.plan.simulate import Speeds, simulate

STATE = 1000
RULES = replace(EXACT, deep=True)
SLOTS = (2, 3, 4, 6, 8, 12, 16, 24, 32, 50, 64, 100)
RATIOS = (0.25, 0.8, 1, 1.25, 1.5, 2.5, 3, 5, 10, 20, 33, 50, 100, 200, 500, 1000)
ADJOINTS = (1.0, 2.0, 3.0, 4.0)
RESULT = Path(__file__).parent / "results" / "grid.json"


@dataclass(frozen=True)
class Cell:
    """One machine and job, and what it takes; times in steps."""

    steps: int
    slots: int
    ratio: float
    adjoint: float
    schedule: str
    predicted: float
    simulated: float
    bound: float
    revolve: float
    published: float
    synchronous: float

    @property
    def error(self) -> float:
        """Of the prediction, relative."""
        return self.predicted / self.simulated - 1.0

    @property
    def meets_the_bound(self) -> bool:
        """Slots for an interval and a read, and reads that hide behind the shortest interval, or a slot more."""
        shortest = max(1, floor(self.ratio))
        hides = self.ratio <= shortest - 1 + shortest * self.adjoint
        return self.slots >= ceil(self.ratio) + 1 + (not hides)

    @property
    def rival(self) -> float:
        """The best of the others."""
        return min(self.revolve, self.published, self.synchronous)


def cells(*, quick: bool) -> Iterator[tuple[int, int, float, float]]:
    """N, s, r, b."""
    if quick:
        yield from itertools.product((100, 700), (2, 5, 16), (0.25, 1.5, 10, 100), (2.0,))
        return
    yield from itertools.product((100, 1000), SLOTS, RATIOS, ADJOINTS)
    yield from itertools.product((10_000,), SLOTS[::2], RATIOS[::2], (2.0,))
    yield from itertools.product((100_000,), (4, 16, 64), (1.0, 2.5, 33, 300), (2.0,))


def examine(steps: int, slots: int, ratio: float, adjoint: float) -> Cell:
    """Choose, predict and simulate one cell."""
    problem = Problem(steps, STATE, STATE * slots, has_disk=True)
    costs = Costs(1.0, adjoint, write_bytes_per_second=STATE / ratio, read_bytes_per_second=STATE / ratio)
    choice = choose(problem, costs)
    speeds = Speeds(1.0, adjoint, lambda key: ratio, lambda key: ratio)
    outcome = simulate(steps, choice.slots, speeds, layout=layout_of(choice), rules=RULES)
    back = steps * adjoint
    return Cell(
        steps,
        slots,
        ratio,
        adjoint,
        choice.schedule,
        choice.prediction.time_seconds,
        outcome.seconds,
        steps + back + max(0, steps - slots - floor(steps / ratio)),
        _revolve(steps, slots) + back,
        _published(steps, slots, ratio) + back,
        _synchronous(steps, slots, ratio) + back,
    )


def _revolve(steps: int, slots: int) -> float:
    return advances(steps, slots) + repetitions(steps + 1, slots)


def _published(steps: int, slots: int, ratio: float) -> float:
    """Spacing ⌈r⌉, one slot for the prefetch, Revolve on the others."""
    spacing = min(steps, max(1, ceil(ratio)))
    whole, rest = divmod(steps, spacing)
    again = whole * advances(spacing, slots - 1) + (advances(rest, slots - 1) if rest else 0)
    wait = max(0.0, ratio - spacing) * whole
    return steps + again + wait + repetitions((rest or spacing) + 1, slots - 1)


def _synchronous(steps: int, slots: int, ratio: float) -> float:
    """Every I-th state written and read while compute waits, and a tail of M steps: the best of both."""
    reach = {capacity(slots, k) for k in range(1, 9)} | {capacity(slots - 1, k) for k in range(1, 9)}
    spacings = {i for i in reach | {round(1.15**k) for k in range(80)} if 1 <= i <= steps}
    best = inf
    for spacing in spacings:
        for tail in {spacing, *(m for m in reach if m <= steps)}:
            whole, rest = divmod(steps - tail, spacing)
            again = whole * advances(spacing, slots) + advances(rest, slots)
            moved = 2.0 * ratio * (whole + (rest > 0))
            time = steps - tail + again + moved + advances(tail, slots) + repetitions(tail + 1, slots)
            best = min(best, time)
    return best


def summary(found: list[Cell]) -> dict[str, float | int]:
    """The figures that the bars are about."""
    errors = [abs(cell.error) for cell in found]
    worse = [cell.simulated / cell.rival - 1.0 for cell in found]
    near = [c.simulated / c.bound - 1.0 for c in found if c.slots >= ceil(c.ratio) + 1 and c.steps >= 1000]
    hidden = [c.simulated / c.bound - 1.0 for c in found if c.meets_the_bound and c.steps >= 1000]
    return {
        "cells": len(found),
        "median_error": median(errors),
        "worst_error": max(errors),
        "worst_against_rivals": max(worse),
        "cells_worse_than_a_rival": sum(w > 1e-9 for w in worse),
        "worst_above_bound": max(near, default=0.0),
        "cells_with_the_bound": len(near),
        "cells_2_percent_above_bound": sum(n > 0.02 for n in near),
        "worst_above_bound_where_reads_hide": max(hidden, default=0.0),
        "cells_where_reads_hide": len(hidden),
        "cells_2_percent_above_bound_where_reads_hide": sum(n > 0.02 for n in hidden),
    }


def main() -> None:
    """Run and write the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a few cells, nothing written")
    quick = parser.parse_args().quick
    found = [examine(*cell) for cell in cells(quick=quick)]
    print(json.dumps(summary(found), indent=1))
    worst = sorted(found, key=lambda c: -abs(c.error))[:5] + sorted(found, key=lambda c: -c.simulated / c.rival)[:5]
    for cell in worst:
        print(f"error {cell.error:+.3f}, against the best rival {cell.simulated / cell.rival - 1:+.3f}: {cell}")
    if not quick:
        RESULT.write_text(
            json.dumps({"summary": summary(found), "cells": [[*asdict(c).values()] for c in found]}) + "\n"
        )


if __name__ == "__main__":
    main()
