"""Interrupts at random lines of sweeps and scans, and sweeps that are dropped."""

from __future__ import annotations

import gc
import os
import random
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

DROPPED = 100

SHARES = {
    "sweep": 3,
    "sweep, closed": 3,
    "timed sweep": 2,
    "timed sweep, closed": 2,
    "resumable sweep": 3,
    "resumable sweep, closed": 3,
    "scan of PyTorch": 2,
    "captured scan of PyTorch": 1,
    "scan of JAX": 1,
}
"""Of the interrupts, in twentieths."""


def interrupts(count: int, chance: random.Random) -> dict[str, Any]:
    """No thread, lock, file, descriptor or memory of slots may be left."""
    from tests.edges import test_lifecycle

    lost: list[str] = []
    hook, sys.unraisablehook = sys.unraisablehook, lambda hint: lost.append(str(hint.object))
    try:
        with tempfile.TemporaryDirectory() as there, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = {
                name: _interrupted(subject(Path(there)), Path(there), count * SHARES[name] // 20, chance)
                for name, subject in _subjects().items()
            }
            with test_lifecycle.Nothing() as nothing:
                for number in range(DROPPED):
                    where = "resume" if number % 4 == 3 else "disk"
                    way = chance.choice(["before", "forward", "cycle", "error", "fails", "observed"])
                    named = {"name": f"run{number}", "resume_seconds": 1e-6} if where == "resume" else {}
                    test_lifecycle.drop(way, 0 if named else number, **{where: Path(there), **named})
                left = nothing.left() + test_lifecycle.locked(there)
                assert not left, f"dropped: {left}"
    finally:
        sys.unraisablehook = hook
    return {
        "interrupts": sum(places.total() for places in found.values()),
        "by_subject": {name: places.total() for name, places in found.items()},
        "lines": {name: len(places) for name, places in found.items()},
        "lost_in_finalizers": len(lost),
        "dropped_sweeps": DROPPED,
        "left": 0,
    }


def _subjects() -> dict[str, Callable[[Path], Callable[[], Any]]]:
    from models import Chaotic

    from tests.edges import test_interrupts as cases

    def sweeps(directory: Path, *, closes: bool, costs: Any, where: str, **named: Any) -> Callable[[], Any]:
        return partial(cases.sweep, Chaotic, closes=closes, costs=costs, **{where: directory, **named})

    found: dict[str, Callable[[Path], Callable[[], Any]]] = {}
    for closes, end in ((False, ""), (True, ", closed")):
        found[f"sweep{end}"] = partial(sweeps, closes=closes, costs=cases.STORING, where="disk")
        found[f"timed sweep{end}"] = partial(sweeps, closes=closes, costs=None, where="disk", compress="lz4")
        found[f"resumable sweep{end}"] = partial(
            sweeps, closes=closes, costs=cases.STORING, where="resume", resume_seconds=1e-6
        )
    found["scan of PyTorch"] = partial(cases.scan_of_pytorch, capture=False)
    found["captured scan of PyTorch"] = partial(cases.scan_of_pytorch, capture=True)
    found["scan of JAX"] = cases.scan_of_jax
    return found


def _interrupted(body: Callable[[], Any], there: Path, count: int, chance: random.Random) -> Counter[str]:
    """Where it was interrupted, and how often."""
    from tests.edges.interrupting import Nothing, interrupted, lines_of, locked

    places: Counter[str] = Counter()
    stays = "resume" in getattr(body, "keywords", {})
    with Nothing() as nothing:
        total = lines_of(body)
        for _ in range(count):
            where = interrupted(body, chance.randrange(total))
            places[where or "the end"] += 1
            left = nothing.left() + (locked(there) if stays else os.listdir(there))
            assert not left, f"interrupted at {where}: {left}"
            for name in os.listdir(there):
                os.unlink(there / name)
    gc.collect()
    return places
