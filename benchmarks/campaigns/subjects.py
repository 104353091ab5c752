"""What campaigns run: small sweeps and scans, plain and resumable, and what must hold of each of them."""

from __future__ import annotations

import contextlib
import gc
import os
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from models import Chaotic, OutOfPlace, Spanning

import longtape
from longtape.errors import LongtapeError
from tests.durable import programs, scans
from tests.faults.sweeps import nbytes, storing_costs, unhurried

SIZE, STEPS = 2000, 30
SWEEPS = {"in place": Chaotic, "spanning": Spanning, "out of place": OutOfPlace}
SCANS = ("eager", "random", "captured")
PATIENCE_SECONDS = 5.0


class Stop(Exception):
    """A run is given up."""


class Stopper:
    """An observer that takes its time, and stops the run after so many actions; None: never."""

    def __init__(self, after: int | None, pause: float) -> None:
        self.left, self._pause = after, pause

    def on_action(self, action: Any, began: float, ended: float) -> None:
        if self._pause:
            time.sleep(self._pause)
        if self.left is not None:
            self.left -= 1
            if self.left <= 0:
                raise Stop

    def on_transfer(self, *_: Any) -> None:
        pass


@dataclass(frozen=True)
class Subject:
    """A gradient to be computed in one way or another."""

    front: str
    kind: str
    steps: int = STEPS
    is_tight: bool = False
    """Whether a scan has so little memory that it needs its disk."""

    @property
    def name(self) -> str:
        return f"{self.front}, {self.kind}"

    def run(
        self,
        *,
        disk: Path | None = None,
        resume: Path | None = None,
        seconds: float = 60.0,
        pause: float = 0.0,
        stop_after: int | None = None,
        stuck_seconds: float = 30.0,
        observers: Any = (),
    ) -> tuple[bytes, longtape.Report]:
        """The bits of the gradient, and the report.  Raises `Stop` after `stop_after` actions."""
        watching = [Stopper(stop_after, pause), *observers]
        if self.front == "scan":
            where = None if resume is None else str(resume)
            options: dict[str, Any] = {"disk": disk, "stuck_seconds": stuck_seconds, "observers": watching}
            if self.is_tight:
                options["memory"] = 70_000 if self.kind == "captured" else 12_000
            return scans.gradient(self.kind, where, seconds, 0.0, steps=self.steps, **options)
        model = unhurried(SWEEPS[self.kind])(SIZE)
        with longtape.Sweep(
            model,
            self.steps,
            memory=5 * nbytes(SIZE),
            disk=disk,
            resume=resume,
            resume_seconds=seconds,
            stuck_seconds=stuck_seconds,
            costs=storing_costs(SIZE),
            observers=watching,
        ) as sweep:
            sweep.forward()
            model.start_adjoint()
            sweep.reverse()
        return model.result(), sweep.report

    def half_way(self, directory: Path, stop_after: int) -> None:
        """A resumable run with many durable points that is given up after so many actions."""
        directory.mkdir(exist_ok=True)
        with contextlib.suppress(Stop):
            self.run(resume=directory, seconds=1e-6, pause=1e-3, stop_after=stop_after)
        gc.collect()

    @property
    def expected(self) -> bytes:
        return _expected(self)

    @property
    def actions(self) -> int:
        """About how many actions a run takes."""
        return _actions(self)


@cache
def _expected(subject: Subject) -> bytes:
    return programs.exact(subject.steps, SIZE) if subject.front == "sweep" else subject.run()[0]


class _Counter(Stopper):
    def __init__(self) -> None:
        super().__init__(None, 0.0)
        self.count = 0

    def on_action(self, action: Any, began: float, ended: float) -> None:
        self.count += 1


@cache
def _actions(subject: Subject) -> int:
    import tempfile

    seen = _Counter()
    with tempfile.TemporaryDirectory() as there:
        subject.run(resume=Path(there), observers=[seen])
    return seen.count


def of(front: str) -> list[Subject]:
    """All subjects of one front end."""
    return [Subject(front, kind) for kind in (SWEEPS if front == "sweep" else SCANS)]


def one_thread() -> None:
    """One compute thread, so that a small step takes the same time twice."""
    import torch

    torch.set_num_threads(1)


def outcome(subject: Subject, call: Callable[[], tuple[bytes, longtape.Report]]) -> tuple[str, longtape.Report | None]:
    """How a run ends: with the right bits, or an error of ours that says what to do."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        try:
            bits, report = call()
        except LongtapeError as error:
            text = str(error)
            assert ";" in text, f"{subject.name}: it does not say what to do: {text}"
            return f"refused ({type(error).__name__})", None
    assert bits == subject.expected, f"{subject.name}: wrong bits; {report.faults}"
    return "same bits", report


@contextlib.contextmanager
def nothing_left(directory: Path) -> Iterator[None]:
    """No thread, and no descriptor of a file below `directory`, is left, and no thread ends with an exception."""
    threads, failures, before = set(threading.enumerate()), [], threading.excepthook
    threading.excepthook = lambda arguments: failures.append(arguments.exc_value)
    try:
        yield
        until = time.monotonic() + PATIENCE_SECONDS
        while (left := _left(directory, threads)) and time.monotonic() < until:
            gc.collect()
            time.sleep(0.002)
    finally:
        threading.excepthook = before
    assert not left, f"left: {left}"
    assert not failures, f"a thread ended with {failures}"


def _left(directory: Path, threads: set[threading.Thread]) -> list[str]:
    found = [thread.name for thread in threading.enumerate() if thread not in threads]
    for fd in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            name = os.readlink(f"/proc/self/fd/{fd}")
            if name.startswith(str(directory)):
                found.append(name)
    return found
