"""Runs that are killed at any moment, and gone on with."""

from __future__ import annotations

import os
import random
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

from benchmarks import common
from longtape.actions import Advance, PullBack, Record, Reverse, Turn

SWEEP_STEPS = 300
INTERVAL = 0.04
SLACK = 0.5
"""Seconds beside the stated interval, for a machine with other work on two cores."""


class Watch:
    """An observer that notes in a `Log` when each step of a scan was first run, forward and back, by the action.

    An action that is killed in its middle is not noted; it takes a few milliseconds.
    """

    def __init__(self, log: Any) -> None:
        self._log, self._turned = log, False

    def on_action(self, action: Any, began: float, ended: float) -> None:
        if isinstance(action, Turn):
            self._turned = True
        back = isinstance(action, PullBack | Reverse)
        if back or (isinstance(action, Advance | Record) and not self._turned):
            for step in range(action.start, action.stop):
                self._log.ran(step, back=back, at=began)

    def on_transfer(self, *_: Any) -> None:
        pass


def kill(count: int, chance: random.Random) -> dict[str, Any]:
    """SIGKILL at random moments, also while resuming, until `count` kills have been made."""
    import torch

    from tests.durable import programs, scans

    torch.set_num_threads(1)
    expected = {kind: scans.gradient(kind, None, 1.0, 0.0)[0] for kind in ("eager", "random", "captured")}
    kinds = [*programs.MODELS, *expected]
    killed, runs, resumed_from = Counter[str](), Counter[str](), Counter[str]()
    oldest: dict[str, list[float]] = {"sweep": [], "scan": []}
    while killed.total() < count:
        kind = kinds[runs.total() % len(kinds)]
        with tempfile.TemporaryDirectory() as there:
            directory, log = Path(there), programs.Log(SWEEP_STEPS)

            def body(kind: str = kind, directory: Path = directory, log: Any = log) -> bytes:
                if kind in expected:
                    bits, report = scans.gradient(kind, str(directory), INTERVAL, 1e-3, observers=[Watch(log)])
                else:
                    model = programs.MODELS[kind](programs.SIZE)
                    model.log = log
                    report = programs.sweep(directory, model, SWEEP_STEPS, INTERVAL)
                    bits = model.result()
                assert not report.faults, report.faults
                return (report.resumed_from or "the beginning").encode() + b"|" + bits

            most = 0.4 if kind == "captured" else 0.9 if kind in expected else 0.35
            found = None
            for _ in range(chance.randint(1, 4)):
                found = programs.forked(body, kill_after=chance.uniform(0.0, most), at_kill=log.killed)
                if found is not None:
                    break
                killed[kind] += 1
            found = found or programs.forked(body, patience=120.0)
            assert found is not None
            where, bits = found.split(b"|", 1)
            right = expected[kind] if kind in expected else programs.right_bits(SWEEP_STEPS)
            assert bits == right, f"wrong bits: {kind}, run {runs.total()}"
            assert not os.listdir(directory)
            front = "scan" if kind in expected else "sweep"
            oldest[front].append(log.oldest_repeated)
            assert log.oldest_repeated <= INTERVAL + SLACK, f"{log.oldest_repeated} s of work were repeated ({kind})"
            log.close()
            runs[kind] += 1
            resumed_from[where.decode().translate({ord(c): None for c in "0123456789,"})] += 1
    return {
        "kills": killed.total(),
        "kills_by_kind": dict(killed),
        "runs": dict(runs),
        "last_resumed_from": dict(resumed_from),
        "wrong": 0,
        "interval_seconds": INTERVAL,
        "oldest_repeated_work_seconds": {front: common.summary(found) for front, found in oldest.items()},
        "slack_seconds": SLACK,
    }
