"""This checkout against another one: the LSTM, the stencil, short steps of a `Sweep`, and the executor.

Every run is a process of its own; the checkouts take turns, so that both see the same machine.  What counts is the
ratio of their medians.

``python -m benchmarks.side_by_side --against DIR [--repeats N] [--only CASE …] [--disk DIR]``
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks import common

HERE = Path(__file__).parents[1]
SHORT_SECONDS = (20e-6, 100e-6, 500e-6, 2e-3)

OVERHEAD = "from benchmarks import overhead; found = overhead.{call}"
SHORT = "import runpy; found = runpy.run_path({path!r})['short_steps']({seconds}, {disk!r})"


def short_steps(seconds: float, disk: str) -> dict[str, Any]:
    """A sweep of some two seconds, whose steps update 64 KiB and are as long as asked; memory for 16 states."""
    import numpy as np

    import longtape

    class Model:
        outputs: tuple[Any, ...] = ()

        def __init__(self) -> None:
            self.state, self.adjoint = [np.linspace(0.1, 1.0, 8192)], [np.zeros(8192)]
            began = time.perf_counter()
            for _ in range(50):
                self._once()
            self._loops = max(1, round(seconds / ((time.perf_counter() - began) / 50)))
            self.state[0][:] = np.linspace(0.1, 1.0, 8192)

        def _once(self) -> None:
            self.state[0] += 1e-4 * (self.state[0] - self.state[0] ** 3)

        def advance(self, start: int, stop: int) -> None:
            for _ in range((stop - start) * self._loops):
                self._once()

        def reverse(self, start: int, stop: int) -> None:
            for _ in range(self._loops):
                self.adjoint[0] *= 1.0 + 1e-4 * (1.0 - 3.0 * self.state[0] ** 2)

    model, steps = Model(), int(2.0 / seconds)
    with longtape.Sweep(model, steps, memory=16 << 16, disk=disk) as sweep:
        began = time.perf_counter()
        sweep.forward()
        model.adjoint[0][:] = model.state[0]
        sweep.reverse()
        taken = time.perf_counter() - began
    report = sweep.report
    return {
        "seconds": taken,
        "predicted_seconds": report.predicted.seconds,
        "schedule": report.schedule,
        "window": report.window,
        "steps_recomputed": report.measured.steps_recomputed,
    }


def _cases(disk: str) -> dict[str, str]:
    found = {
        "lstm N=4000": OVERHEAD.format(call=f"lstm(4000, overhead.LSTM_MEMORY, {disk!r})"),
        "lstm N=4000, states": OVERHEAD.format(call=f"lstm(4000, overhead.LSTM_MEMORY, {disk!r}, capture=False)"),
        "stencil N=200": OVERHEAD.format(call=f"stencil(200, overhead.STENCIL_SLOTS, {disk!r})"),
        "executor": OVERHEAD.format(call="executor(1_000_000, 1)"),
    }
    for seconds in SHORT_SECONDS:
        found[f"steps of {seconds * 1e6:g} µs"] = SHORT.format(path=__file__, seconds=seconds, disk=disk)
    return found


def _run(checkout: Path, code: str) -> dict[str, Any]:
    """The outcome of a case in a fresh process that imports that checkout."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(checkout / "src"), str(checkout)])}
    # The other modules of this package are imported from the checkout; a file that it lacks is run by its path.
    code += "; import json; print('\\n' + json.dumps(found))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=checkout, env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(f"{checkout}: {done.stderr[-2000:]}")
    outcome: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return outcome


def _value(outcome: dict[str, Any]) -> float:
    return float(outcome.get("seconds", outcome.get("microseconds_per_step", 0.0)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--against", type=Path, required=True, help="another checkout")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", nargs="*", default=None, metavar="CASE")
    parser.add_argument("--disk", default=None)
    given = parser.parse_args()
    other = given.against.resolve()
    with tempfile.TemporaryDirectory(dir=given.disk) as disk:
        cases = {name: code for name, code in _cases(disk).items() if given.only is None or name in given.only}
        seen: dict[str, dict[str, list[dict[str, Any]]]] = {name: {"this": [], "other": []} for name in cases}
        for _ in range(given.repeats):
            for name, code in cases.items():
                for who, checkout in (("other", other), ("this", HERE)):
                    seen[name][who].append(_run(checkout, code))
    results = {}
    for name, found in seen.items():
        ours, theirs = ([_value(outcome) for outcome in found[who]] for who in ("this", "other"))
        results[name] = {
            "ratio": statistics.median(ours) / statistics.median(theirs),
            "this": {**found["this"][-1], "values": ours},
            "other": {**found["other"][-1], "values": theirs},
        }
    commit = subprocess.run(["git", "-C", other, "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
    settings = {"against": commit.stdout.strip(), "repeats": given.repeats}
    common.write("side_by_side", settings, results)


if __name__ == "__main__":
    main()
