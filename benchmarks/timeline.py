"""Draws the README's picture from a real run of the stencil.

``python -m benchmarks.timeline`` writes ``docs/images/timeline.png`` and prints the run's report.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import longtape
from benchmarks import common, stencil
from longtape import plots
from longtape.progress import Progress

IMAGES = common.RESULTS.parent.parent / "docs" / "images"


def main() -> None:
    parser = argparse.ArgumentParser(description="Draw the timeline of a run of the stencil.")
    parser.add_argument("--side", type=int, default=192)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--memory", default="256MiB")
    parser.add_argument("--disk", default=None, help="directory for the scratch file; beside this program if absent")
    parser.add_argument("--out", type=Path, default=IMAGES / "timeline.png")
    arguments = parser.parse_args()
    common.use_one_thread()
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=common.RESULTS.parent) as beside:
        model = stencil.AllenCahn(arguments.side)
        sweep = longtape.Sweep(
            model,
            arguments.steps,
            memory=arguments.memory,
            disk=arguments.disk or beside,
            observers=[Progress(arguments.steps)],
        )
        print(longtape.describe(sweep.plan))
        sweep.forward()
        model.start_adjoint(stencil.initial(arguments.side, seed=1))
        sweep.reverse()
    print(sweep.report)
    plots.timeline(sweep.trace, arguments.out, report=sweep.report)


if __name__ == "__main__":
    main()
