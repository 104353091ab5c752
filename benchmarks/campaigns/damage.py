"""Blocks that change on the disk while a run goes on."""

from __future__ import annotations

import contextlib
import random
import tempfile
import time
import warnings
from collections import Counter
from pathlib import Path
from typing import Any


def damage(count: int, chance: random.Random) -> dict[str, Any]:
    """Flip, zero, truncate and swap blocks of every kind, while a run goes on and between a run and its resumption."""
    from models import Chaotic, OutOfPlace, Spanning

    from tests.faults import sweeps, test_residuals
    from tests.faults.test_damage import HOW, DamagedDisk

    read: Counter[str] = Counter()
    cases: Counter[str] = Counter()
    while cases.total() < count * 3 // 4:
        how, seed = chance.choice(HOW), chance.randrange(1 << 30)
        likely = chance.choice([0.05, 0.3, 1.0])
        drawn = random.Random(seed)
        with tempfile.TemporaryDirectory() as there:
            tier = DamagedDisk(there, lambda index, key, d=drawn, p=likely: d.random() < p, how, seed)
            if chance.random() < 0.5:
                kind = chance.choice([Chaotic, Spanning, OutOfPlace])
                report = sweeps.run(kind=kind, slots=chance.randint(3, 9), tier=tier).report
                what = "snapshots"
            else:
                memory = chance.randint(4, 12) * (test_residuals.STATE + test_residuals.BLOCK)
                report, _ = test_residuals.sweep(tier, memory=memory, stuck_seconds=30.0, initial_is_free=True)
                what = "residuals"
        cases[f"{what}, {how}"] += 1
        read[what] += len(tier.damaged)
        if how in ("flip", "zero"):
            assert report.failed_transfers >= len(tier.damaged), "a damage was read and not counted"
    faults = 0
    while cases.total() < count:
        found, how = _damage_between(chance)
        cases[f"files of a resumable run, {how}"] += 1
        faults += found
    return {
        "cases": cases.total(),
        "by_kind": dict(cases),
        "damaged_and_read": dict(read),
        "wrong": 0,
        "resumed_runs_with_faults": faults,
    }


def _damage_between(chance: random.Random) -> tuple[bool, str]:
    """Give a run up in one sweep or the other, damage its files, and resume it."""
    from models import Chaotic

    import longtape
    from tests.durable import programs
    from tests.faults.sweeps import nbytes, storing_costs

    class Stop(Exception):
        pass

    steps, size = 60, 2000
    stop = chance.choice([None, chance.randrange(steps)])

    def run(directory: str, *, stops: bool) -> tuple[bytes, Any]:
        model = Chaotic(size)

        def stopping(start: int, end: int) -> None:
            if stop is not None and start < stop:
                raise Stop
            time.sleep(5e-4)
            Chaotic.reverse(model, start, end)

        seconds = 1e-6 if stops else 60.0
        with longtape.Sweep(
            model, steps, memory=5 * nbytes(size), resume=directory, resume_seconds=seconds, costs=storing_costs(size)
        ) as sweep:
            sweep.forward()
            if stops and stop is None:
                raise Stop
            model.start_adjoint()
            if stops:
                model.reverse = stopping  # type: ignore[method-assign]
            sweep.reverse()
        return model.result(), sweep.report

    with tempfile.TemporaryDirectory() as there, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with contextlib.suppress(Stop):
            run(there, stops=True)
        path = Path(there) / chance.choice(["sweep.longtape-data"] * 3 + ["sweep.longtape-journal"])
        how = chance.choice(["flip", "zero", "truncate", "swap"])
        if path.exists():
            damage_file(path, how, chance)
        try:
            bits, report = run(there, stops=False)
        except longtape.ResumeError as error:
            # The very first bytes are damaged: it may be anybody's file, and is left alone.
            assert "not a journal" in str(error) or "not a data file" in str(error)
            return True, f"{how} (refused)"
    assert bits == programs.exact(steps, size), "wrong bits"
    return bool(report.faults), how


def damage_file(path: Path, how: str, chance: random.Random) -> None:
    data = bytearray(path.read_bytes().rstrip(b"\0"))
    if not data:
        return
    full = path.stat().st_size
    for _ in range(chance.choice([1, 3, 20])):
        at, length = chance.randrange(len(data)), chance.choice([1, 100, 4096, 20_000])
        if how == "flip":
            data[at] ^= 1 << chance.randrange(8)
        elif how == "zero":
            data[at : at + length] = bytes(len(data[at : at + length]))
        elif how == "swap":
            other = chance.randrange(len(data))
            length = min(length, len(data) - at, len(data) - other)
            mine, theirs = bytes(data[at : at + length]), bytes(data[other : other + length])
            data[at : at + length], data[other : other + length] = theirs, mine
    if how == "truncate":
        full = chance.randrange(len(data))
        del data[full:]
    with open(path, "r+b") as file:
        file.write(data)
        file.truncate(full)
