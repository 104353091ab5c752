"""Runs that are killed and gone on with, each in a process of its own."""

from __future__ import annotations

import mmap
import os
import signal
import struct
import time
import warnings
from collections.abc import Callable
from pathlib import Path

from models import Chaotic, OutOfPlace, Spanning

import longtape
from tests.faults.sweeps import exact, nbytes, storing_costs

SIZE = 2000


class Clocked:
    """Steps that take a while, and note in shared memory when each was first run, forward and back."""

    log: Log | None = None
    seconds = 2e-4
    turned = False

    def _spend(self, step: int, *, back: bool = False) -> None:
        time.sleep(self.seconds)
        if self.log is not None and (back or not self.turned):
            self.log.ran(step, back=back)

    def start_adjoint(self) -> None:
        self.turned = True
        super().start_adjoint()  # type: ignore[misc]


class InPlaceModel(Clocked, Chaotic):
    def advance(self, start, stop):
        for step in range(start, stop):
            super().advance(step, step + 1)
            self._spend(step)

    def reverse(self, start, stop):
        super().reverse(start, stop)
        self._spend(start, back=True)


class SpanningModel(Clocked, Spanning):
    def advance(self, start, stop):
        for step in range(start, stop):
            super().advance(step, step + 1)
            self._spend(step)

    def reverse(self, start, stop):
        turned, self.turned = self.turned, True
        super().reverse(start, stop)
        self.turned = turned
        for step in range(stop - 1, start - 1, -1):
            self._spend(step, back=True)


class OutOfPlaceModel(Clocked, OutOfPlace):
    def advance_into(self, step, source, target):
        super().advance_into(step, source, target)
        self._spend(step)

    def reverse_from(self, step, source):
        super().reverse_from(step, source)
        self._spend(step, back=True)


MODELS = {"in place": InPlaceModel, "spanning": SpanningModel, "out of place": OutOfPlaceModel}


class Log:
    """When each step was last run as new work, forward and back, shared by a process and those it forks."""

    MOST_KILLS = 16

    def __init__(self, steps: int) -> None:
        self._kills, self._oldest = 2 * steps, 2 * steps + self.MOST_KILLS
        self._memory = mmap.mmap(-1, 8 * (self._oldest + 1))

    def _get(self, k: int) -> float:
        return struct.unpack_from("<d", self._memory, 8 * k)[0]

    def _put(self, k: int, value: float) -> None:
        struct.pack_into("<d", self._memory, 8 * k, value)

    def _killed(self) -> list[float]:
        return [t for k in range(self.MOST_KILLS) if (t := self._get(self._kills + k))]

    def killed(self) -> None:
        """The process is killed now."""
        self._put(self._kills + len(self._killed()), time.monotonic())

    @property
    def oldest_repeated(self) -> float:
        """Of all steps run again after a kill, how long before it the oldest had been run; seconds."""
        return self._get(self._oldest)

    def ran(self, step: int, *, back: bool, at: float | None = None) -> None:
        k = 2 * step + back
        before = self._get(k)
        if before:
            lost_by = min((t for t in self._killed() if t > before), default=before)
            self._put(self._oldest, max(self.oldest_repeated, lost_by - before))
        self._put(k, time.monotonic() if at is None else at)

    def close(self) -> None:
        self._memory.close()


def sweep(directory: Path, model, steps: int, seconds: float, *, memory: int = 5, costs=True) -> longtape.Report:
    run = longtape.Sweep(
        model,
        steps,
        memory=memory * nbytes(SIZE),
        resume=directory,
        resume_seconds=seconds,
        costs=storing_costs(SIZE) if costs is True else costs,
    )
    run.forward()
    model.start_adjoint()
    run.reverse()
    return run.report


def forked(
    body: Callable[[], bytes],
    *,
    kill_after: float | None = None,
    patience: float = 60.0,
    at_kill: Callable[[], None] = lambda: None,
) -> bytes | None:
    """What `body` returns in a process of its own; None if it was killed before, just after `at_kill` was called."""
    here, there = os.pipe()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            os.close(here)
            warnings.simplefilter("ignore")
            with os.fdopen(there, "wb") as pipe:
                pipe.write(b"+" + body())
            status = 0
        finally:
            os._exit(status)
    os.close(there)
    until = time.monotonic() + (patience if kill_after is None else kill_after)
    ended = (0, 0)
    with os.fdopen(here, "rb") as pipe:
        os.set_blocking(pipe.fileno(), False)
        found = b""
        while not ended[0] and time.monotonic() < until:
            found += pipe.read() or b""
            time.sleep(0.001)
            ended = os.waitpid(child, os.WNOHANG)
        if not ended[0]:
            at_kill()
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            assert kill_after is not None, "it hung"
        os.set_blocking(pipe.fileno(), True)
        found += pipe.read()
        if ended[0]:
            assert ended[1] == 0, "the run failed"
    return found[1:] if found.startswith(b"+") and ended[0] else None


def right_bits(steps: int) -> bytes:
    return exact(steps, SIZE)
