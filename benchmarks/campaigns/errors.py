"""Every system call on a run's files fails in turn, or moves less than it was asked to."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import random
import shutil
import tempfile
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from benchmarks.campaigns import subjects
from benchmarks.campaigns.subjects import Subject, nothing_left, outcome
from longtape.tiers import disk, linux

ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EINTR, errno.ENOENT)
SHORT = (0, 1, 512, 5000)
"""Bytes that a transfer moves at most."""

BY_PATH = ("open", "mkdir", "unlink")
BY_FILE = ("close", "fdatasync", "fsync", "ftruncate", "pread", "preadv", "pwrite", "pwritev")
MOVING = ("pread", "preadv", "pwrite", "pwritev")
CLAIMING = ("allocate", "begin_writeback", "finish_writeback")

Fault = int | None
"""An errno; None: a short transfer."""


class Calls:
    """Counts the calls on files below a directory; those that `fails` chooses fail.

    Args:
        directory: Only its files are ours.
        fails: Told the number and the name of each call.
        fault: What they fail with; an errno, or None to move `most` bytes at most.
    """

    def __init__(
        self,
        directory: Path,
        fails: Callable[[int, str], bool] = lambda number, name: False,
        fault: Fault = errno.EIO,
        most: int = 0,
    ) -> None:
        self._directory, self._fails, self._fault, self._most = str(directory), fails, fault, most
        self.names: list[str] = []
        self.hits = 0
        self._lock = threading.Lock()

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        places: list[tuple[Any, str]] = [(os, name) for name in (*BY_PATH, *BY_FILE)]
        places += [(linux, name) for name in CLAIMING] + [(fcntl, "flock")]
        real = [(where, name, getattr(where, name)) for where, name in places]
        try:
            for where, name, function in real:
                setattr(where, name, self._faked(name, function))
            yield
        finally:
            for where, name, function in real:
                setattr(where, name, function)

    def _faked(self, name: str, real: Any) -> Any:
        def call(first: Any, *rest: Any, **named: Any) -> Any:
            if not self._is_ours(first) or not self._is_hit(name):
                return real(first, *rest, **named)
            if self._fault is None:
                if name not in MOVING:
                    return real(first, *rest, **named)
                return self._short(name, real, first, *rest)
            if name == "close" or (name == "unlink" and self._fault == errno.ENOENT):
                real(first)  # a closed file is closed all the same, and one that is not there has been removed
            raise OSError(self._fault, os.strerror(self._fault))

        return call

    def _short(self, name: str, real: Any, fd: int, what: Any, offset: int) -> Any:
        if name == "pread":
            return real(fd, min(what, self._most), offset)
        if name == "pwrite":
            return real(fd, memoryview(what)[: self._most], offset)
        return real(fd, [memoryview(what[0])[: self._most]], offset)

    def _is_ours(self, file: Any) -> bool:
        if isinstance(file, int):
            try:
                file = os.readlink(f"/proc/self/fd/{file}")
            except OSError:
                return False
        return os.fspath(file).startswith(self._directory) if isinstance(file, str | Path) else False

    def _is_hit(self, name: str) -> bool:
        with self._lock:
            number = len(self.names)
            self.names.append(name)
            hit = self._fails(number, name)
            self.hits += hit
            return hit


class _Way:
    """A way to come to a gradient: plain, resumable from the start, or gone on with."""

    def __init__(self, subject: Subject, name: str, there: Path) -> None:
        self.subject, self.name = subject, name
        self._seed = there / "half-way" if name == "resumed" else None
        if self._seed is not None:
            subject.half_way(self._seed, int(0.8 * subject.actions))
            assert os.listdir(self._seed)
        self._there = there / "run"

    @contextlib.contextmanager
    def directory(self) -> Iterator[Path]:
        if self._seed is not None:
            shutil.copytree(self._seed, self._there)
        else:
            self._there.mkdir()
        try:
            yield self._there
        finally:
            shutil.rmtree(self._there, ignore_errors=True)

    def run(self, where: Path) -> Any:
        if self.name == "plain":
            return self.subject.run(disk=where)
        # Points are made all the time by a run that begins; one that is resumed is to end soon.
        return self.subject.run(resume=where, seconds=1e-6 if self.name == "resumable" else 60.0)


def errno_sweep(count: int, chance: random.Random) -> dict[str, Any]:
    """Every call of a sweep."""
    return _campaign("sweep", ("in place", "out of place"), count, chance)


def errno_scan(count: int, chance: random.Random) -> dict[str, Any]:
    """Every call of a scan."""
    subjects.one_thread()
    return _campaign("scan", ("eager", "captured"), count, chance)


def _campaign(front: str, kinds: tuple[str, ...], count: int, chance: random.Random) -> dict[str, Any]:
    before = disk.LEAST_GROWTH_NBYTES
    disk.LEAST_GROWTH_NBYTES = 1 << 20
    cases: list[tuple[str, str, int, Fault]] = []
    found: dict[str, Counter[str]] = {}
    calls: dict[str, dict[str, int]] = {}
    ways = {}
    with tempfile.TemporaryDirectory() as there:
        try:
            for kind in kinds:
                for name in ("plain", "resumable", "resumed"):
                    place = Path(there) / f"{kind}-{name}"
                    place.mkdir()
                    subject = Subject(front, kind, is_tight=name == "plain")
                    way = ways[kind, name] = _Way(subject, name, place)
                    counted = _count(way)
                    calls[f"{front}, {kind}, {name}"] = dict(Counter(counted))
                    cases += [(kind, name, k, error) for k in range(len(counted)) for error in (*ERRORS, None)]
            if count < len(cases):
                cases = chance.sample(cases, count)
            for kind, name, k, error in cases:
                result = _attempt(ways[kind, name], k, error, chance.choice(SHORT))
                found.setdefault(f"{front}, {kind}, {name}", Counter())[result] += 1
        finally:
            disk.LEAST_GROWTH_NBYTES = before
    return {
        "cases": len(cases),
        "calls": calls,
        "errors": [errno.errorcode[error] for error in ERRORS] + ["short transfers"],
        "outcomes": {name: dict(counts) for name, counts in found.items()},
        "wrong": 0,
        "hangs": 0,
        "leaked_threads_or_descriptors": 0,
    }


def _count(way: _Way) -> list[str]:
    with way.directory() as where, nothing_left(where):
        calls = Calls(where)
        with calls.watching():
            how, _ = outcome(way.subject, lambda: way.run(where))
        assert how == "same bits"
        assert not os.listdir(where)
    return calls.names


def _attempt(way: _Way, k: int, error: Fault, most: int) -> str:
    """One call fails; what comes of it, and of the call after it."""
    with way.directory() as where:
        calls = Calls(where, lambda number, name: number == k, error, most)
        try:
            with nothing_left(where), calls.watching():
                how, report = outcome(way.subject, lambda: way.run(where))
            left = os.listdir(where)
            if report is not None and left:
                assert any("could not be removed" in fault for fault in report.faults), (left, report.faults)
                how = "same bits, and a file that could not be removed"
            if way.name == "plain":
                assert how == "same bits", how
                assert not left, left
            elif left or report is None:
                again, _ = outcome(way.subject, lambda: way.subject.run(resume=where))
                assert again == "same bits", f"the call after: {again}"
                assert not os.listdir(where)
        except Exception as failure:
            name = calls.names[k] if k < len(calls.names) else "none"
            failure.add_note(f"{way.subject.name}, {way.name}: call {k} ({name}), {error or f'at most {most} bytes'}")
            raise
    if not calls.hits:
        return "the run made fewer calls"
    return how + (", fault reported" if report is not None and report.faults else "")
