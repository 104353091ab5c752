"""Storage whose every call may take its time, or never come back."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.campaigns import subjects
from benchmarks.campaigns.subjects import Subject, nothing_left, outcome

STUCK_SECONDS = 0.1
MOST_SECONDS = 15.0
"""A run that takes longer is said to hang; undisturbed it takes well under a second."""

CALLS = ("fdatasync", "preadv", "pwrite", "pwritev")


class Slow:
    """Calls on files below a directory take from a millisecond to for ever, until `let_go`.

    What the computing thread itself calls, which is opening a run's files, always comes back.
    """

    def __init__(self, directory: Path, chance: random.Random, *, likely: float, for_ever: float) -> None:
        self._directory, self._chance = str(directory), chance
        self._likely, self._for_ever = likely, for_ever
        self._gate = threading.Event()
        self.delayed = self.stuck = 0

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        real = {name: getattr(os, name) for name in CALLS}
        try:
            for name, function in real.items():
                setattr(os, name, self._slowed(function))
            yield
        finally:
            self.let_go()
            for name, function in real.items():
                setattr(os, name, function)

    def let_go(self) -> None:
        self._gate.set()

    def _slowed(self, real: Any) -> Any:
        def call(fd: int, *rest: Any) -> Any:
            with contextlib.suppress(OSError):
                if os.readlink(f"/proc/self/fd/{fd}").startswith(self._directory):
                    self._wait()
            return real(fd, *rest)

        return call

    def _wait(self) -> None:
        if self._chance.random() >= self._likely:
            return
        if self._chance.random() < self._for_ever and threading.current_thread() is not threading.main_thread():
            self.stuck += 1
            self._gate.wait()
            return
        self.delayed += 1
        self._gate.wait(10 ** self._chance.uniform(-3, -0.5))  # about 1 to 300 ms


def slow_sweep(count: int, chance: random.Random) -> dict[str, Any]:
    """Sweeps over slow and stuck storage."""
    return _campaign(subjects.of("sweep"), count, chance)


def slow_scan(count: int, chance: random.Random) -> dict[str, Any]:
    """Scans over slow and stuck storage."""
    subjects.one_thread()
    return _campaign(subjects.of("scan"), count, chance)


def _campaign(kinds: list[Subject], count: int, chance: random.Random) -> dict[str, Any]:
    found: dict[str, Counter[str]] = {}
    delayed = stuck = 0
    longest = 0.0
    with tempfile.TemporaryDirectory() as there:
        for subject in kinds:
            subject.half_way(Path(there) / subject.kind, int(0.8 * subject.actions))
        for number in range(count):
            subject, how = kinds[number % len(kinds)], ("plain", "resumable", "resumed")[number // len(kinds) % 3]
            subject = replace(subject, is_tight=how == "plain")
            where = Path(there) / "run"
            if how == "resumed":
                shutil.copytree(Path(there) / subject.kind, where)
            else:
                where.mkdir()
            drawn = random.Random(chance.randrange(1 << 30))
            slow = Slow(where, drawn, likely=chance.choice([0.02, 0.1, 0.5]), for_ever=chance.choice([0.0, 0.1, 0.5]))
            given: dict[str, Any] = {"disk": where} if how == "plain" else {"resume": where, "seconds": 0.02}

            def call(subject: Subject = subject, given: dict[str, Any] = given) -> Any:
                return subject.run(**given, stuck_seconds=STUCK_SECONDS)

            began = time.monotonic()
            with nothing_left(where), slow.watching():
                result, report = outcome(subject, call)
                seconds = time.monotonic() - began
            if (
                result == "refused (StorageError)" and how == "resumed"
            ):  # what is durable is good, and waits for another call
                result, report = outcome(subject, lambda s=subject, g=given: s.run(**g))
                result += ", once storage answered"
            assert result.startswith("same bits"), f"{subject.name}, {how}: {result}"
            assert report is not None
            assert seconds < MOST_SECONDS, f"{subject.name}, {how}: {seconds:.1f} s"
            assert not os.listdir(where), os.listdir(where)
            where.rmdir()
            longest = max(longest, seconds)
            delayed, stuck = delayed + slow.delayed, stuck + slow.stuck
            result += ", fault reported" if report.faults else ""
            found.setdefault(f"{subject.name}, {how}", Counter())[result] += 1
    return {
        "cases": count,
        "outcomes": {name: dict(counts) for name, counts in found.items()},
        "calls_delayed": delayed,
        "calls_that_never_came_back": stuck,
        "stuck_seconds": STUCK_SECONDS,
        "longest_seconds": longest,
        "wrong": 0,
        "hangs": 0,
    }
