"""Storage for 64 states and a length that nobody knows: what thinning costs beside storing at even distances.

``python -m benchmarks.thinning [--ratio 2] [--slots 8] [--disk DIR] [--quick]``

The model's steps are cheap, and a write takes `ratio` of them.  With N = 64·64·⌈ratio⌉ steps a real run on a real
disk should take at most 0.2 advances a step more than the event model does with even spacing, which knows N.
"""

from __future__ import annotations

import argparse
import tempfile
from contextlib import closing
from math import ceil
from typing import Any

import longtape
from benchmarks import common
from benchmarks.noise import ADJOINT, STATE_NBYTES, NoisyTier, Ticking
from longtape.plan.asynchronous import Layout
from longtape.plan.simulate import Outcome, Speeds, simulate
from longtape.tiers.disk import DiskTier

ROOM = 64
STEP_SECONDS = 3e-4
MOST_EXTRA = 0.2


class Ending(Ticking):
    """Steps until `count`, which only the model knows."""

    def __init__(self, count: int) -> None:
        super().__init__(lambda step: STEP_SECONDS)
        self._count = count

    def advance(self, start: int, stop: int) -> int:
        stop = min(stop, self._count)
        super().advance(start, stop)
        return stop


def thinned(ratio: float, slots: int, disk: str, *, room: int = ROOM) -> dict[str, Any]:
    """A real run, the event model of it, and even spacing in the event model."""
    steps, told = room * room * ceil(ratio), ratio * STEP_SECONDS
    costs = longtape.Costs(STEP_SECONDS, ADJOINT * STEP_SECONDS, write_latency=told, read_latency=told)
    tier = NoisyTier(DiskTier(disk), lambda key: told, lambda key: told)
    limit = room * tier.item_nbytes(STATE_NBYTES)
    with (
        closing(tier),
        longtape.Sweep(
            Ending(steps), None, memory=slots * STATE_NBYTES, tier=tier, disk_limit=limit, costs=costs
        ) as sweep,
    ):
        sweep.forward()
        sweep.reverse()
    report = sweep.report

    def model(**options: Any) -> Outcome:
        speeds = Speeds(1.0, ADJOINT, lambda key: ratio, lambda key: ratio)
        return simulate(steps, slots, speeds, known=False, **options)

    even = model(layout=Layout(fixed_spacing=steps // room, pin_initial=True))
    simulated = model(layout=Layout(pin_initial=True), storage_limit=room)
    advances = steps + report.measured.steps_recomputed
    return {
        "steps": steps,
        "advances": advances,
        "advances_simulated": simulated.advances,
        "advances_evenly_spaced": even.advances,
        "extra_a_step": (advances - even.advances) / steps,
        "extra_a_step_simulated": (simulated.advances - even.advances) / steps,
        "within": advances - even.advances <= MOST_EXTRA * steps,
        "writes": report.writes,
        "peak_disk_bytes": report.measured.peak_disk_bytes,
        "disk_limit_bytes": limit,
        "forward_stall_seconds": report.forward_stall_seconds,
        "seconds": report.measured.seconds,
        "schedule": report.schedule,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ratio", type=float, nargs="*", default=[1.0, 2.5])
    parser.add_argument("--slots", type=int, nargs="*", default=[4, 8, 16])
    parser.add_argument("--disk", default=None, help="directory to spill to; beside this program if not given")
    parser.add_argument("--quick", action="store_true", help="storage for 16 states, to see that it works")
    arguments = parser.parse_args()
    room = 16 if arguments.quick else ROOM
    with tempfile.TemporaryDirectory(dir=arguments.disk or common.RESULTS.parent) as disk:
        results = {
            f"r={ratio:g} s={slots}": thinned(ratio, slots, disk, room=room)
            for ratio in arguments.ratio
            for slots in arguments.slots
        }
    settings = {"room": room, "step_seconds": STEP_SECONDS, "adjoint": ADJOINT}
    common.write("thinning_quick" if arguments.quick else "thinning", settings, results)
    for name, found in results.items():
        verdict = "within" if found["within"] else "OUTSIDE"
        print(
            f"{name:<12} {found['extra_a_step']:+.3f} advances a step, "
            f"in the model {found['extra_a_step_simulated']:+.3f}  {verdict}"
        )


if __name__ == "__main__":
    main()
