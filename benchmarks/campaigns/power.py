"""Runs whose last writes are lost with the power."""

from __future__ import annotations

import contextlib
import os
import random
import tempfile
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.campaigns import subjects
from benchmarks.campaigns.subjects import SCANS, Subject, outcome
from longtape.tiers import disk


class Recorder:
    """Every change that a run makes to its files, and every sync, in order."""

    def __init__(self, directory: Path) -> None:
        self.directory = str(directory)
        self.events: list[tuple[Any, ...]] = []
        self._lock = threading.Lock()

    def _name(self, fd: int) -> str | None:
        path = os.readlink(f"/proc/self/fd/{fd}").removesuffix(" (deleted)")
        name = os.path.basename(path)
        return name if os.path.dirname(path) == self.directory and not name.startswith("#") else None  # anonymous

    def _add(self, *event: Any) -> None:
        with self._lock:
            self.events.append(event)

    @contextlib.contextmanager
    def recording(self) -> Iterator[None]:
        from longtape.tiers import linux

        real = {name: getattr(os, name) for name in ("pwritev", "pwrite", "ftruncate", "fdatasync", "fsync", "unlink")}
        allocate = linux.allocate

        def pwritev(fd: int, buffers: Any, offset: int, *rest: Any) -> int:
            done = real["pwritev"](fd, buffers, offset, *rest)
            if name := self._name(fd):
                self._add("write", name, offset, b"".join(bytes(b) for b in buffers)[:done])
            return done

        def pwrite(fd: int, data: Any, offset: int) -> int:
            done = real["pwrite"](fd, data, offset)
            if name := self._name(fd):
                self._add("write", name, offset, bytes(data)[:done])
            return done

        def ftruncate(fd: int, length: int) -> None:
            real["ftruncate"](fd, length)
            if name := self._name(fd):
                self._add("truncate", name, length)

        def allocating(fd: int, offset: int, nbytes: int) -> None:
            allocate(fd, offset, nbytes)
            if name := self._name(fd):
                self._add("grow", name, offset + nbytes)

        def fdatasync(fd: int) -> None:
            name, before = self._name(fd), len(self.events)
            real["fdatasync"](fd)
            if name:
                self._add("sync", name, before)

        def fsync(fd: int) -> None:
            before = len(self.events)
            is_directory = os.readlink(f"/proc/self/fd/{fd}") == self.directory
            real["fsync"](fd)
            if is_directory:
                self._add("sync", "", before)

        def unlink(path: Any, **more: Any) -> None:
            real["unlink"](path, **more)
            if os.path.dirname(os.fspath(path)) == self.directory:
                self._add("unlink", os.path.basename(path))

        fakes = {"pwritev": pwritev, "pwrite": pwrite, "ftruncate": ftruncate, "fdatasync": fdatasync, "fsync": fsync}
        try:
            for name, fake in {**fakes, "unlink": unlink}.items():
                setattr(os, name, fake)
            linux.allocate = allocating
            yield
        finally:
            for name, function in real.items():
                setattr(os, name, function)
            linux.allocate = allocate


def replay(events: list[tuple[Any, ...]], directory: Path, chance: random.Random) -> None:
    """What may be on the disk if the power goes after these events."""
    synced: dict[str, int] = {}
    for event in events:
        if event[0] == "sync":
            synced[event[1]] = max(synced.get(event[1], 0), event[2])
    files: dict[str, bytearray] = {}
    lost = set()
    for index, event in enumerate(events):
        what, name = event[0], event[1]
        if what == "sync":
            continue
        if what == "unlink":
            if chance.random() < 0.5:
                lost.add(name)
            continue
        data = files.setdefault(name, bytearray())
        safe = index < synced.get(name, 0)
        if not safe and chance.random() < 0.5 and what != "grow":
            continue
        if what == "grow":
            data.extend(bytes(max(0, event[2] - len(data))))
        elif what == "truncate":
            data.extend(bytes(max(0, event[2] - len(data))))
            del data[event[2] :]
        else:
            offset, written = event[2], event[3]
            if not safe and chance.random() < 0.5:  # torn: some of its sectors
                sectors = [written[k : k + 512] for k in range(0, len(written), 512)]
                for k, sector in enumerate(sectors):
                    if chance.random() < 0.5:
                        _put(data, offset + 512 * k, sector)
            else:
                _put(data, offset, written)
    directory.mkdir()
    for name, data in files.items():
        if name in lost or ("" not in synced and chance.random() < 0.3):
            continue
        with open(directory / name, "wb") as file:
            size = len(data)
            while size and data[size - 4096 : size].count(0) == min(4096, size):
                size -= min(4096, size)
            file.write(data[:size])
            file.truncate(len(data))


def _put(data: bytearray, offset: int, part: bytes) -> None:
    data.extend(bytes(max(0, offset + len(part) - len(data))))
    data[offset : offset + len(part)] = part


def power(count: int, chance: random.Random) -> dict[str, Any]:
    """Cut recorded sweeps off after every event, and resume from what may be left."""
    return _campaign([Subject("sweep", kind, steps=40) for kind in ("in place", "out of place")], count, chance)


def power_scan(count: int, chance: random.Random) -> dict[str, Any]:
    """Cut recorded scans off after every event, or after as many as `count` allows."""
    subjects.one_thread()
    return _campaign([Subject("scan", kind, steps=40) for kind in SCANS], count, chance)


def _campaign(kinds: list[Subject], count: int, chance: random.Random) -> dict[str, Any]:
    disk.LEAST_GROWTH_NBYTES = 1 << 20  # so that what is replayed is small
    recorded = []
    for subject in kinds:
        with tempfile.TemporaryDirectory() as there:
            directory = Path(there) / "run"
            directory.mkdir()
            recorder = Recorder(directory)
            with recorder.recording():
                subject.run(resume=directory, seconds=1e-6, pause=1e-3)
            recorded.append((subject, recorder.events))
    prefixes = [(subject, events, length) for subject, events in recorded for length in range(len(events) + 1)]
    cases, resumed, faulty = Counter[str](), Counter[str](), 0
    while cases.total() < count:
        rest = count - cases.total()
        for subject, events, length in prefixes if rest >= len(prefixes) else chance.sample(prefixes, rest):
            with tempfile.TemporaryDirectory() as there:
                directory = Path(there) / "run"
                replay(events[:length], directory, chance)
                result, report = outcome(subject, lambda s=subject, d=directory: s.run(resume=d))
                assert report is not None, f"{subject.name}, after event {length}: {result}"
                assert not os.listdir(directory)
            cases[subject.name] += 1
            faulty += bool(report.faults)
            where = report.resumed_from or "the beginning"
            resumed[where.translate({ord(c): None for c in "0123456789,"})] += 1
    return {
        "cases": cases.total(),
        "by_kind": dict(cases),
        "events": len(prefixes) - len(recorded),
        "prefixes": len(prefixes),
        "wrong": 0,
        "resumed_from": dict(resumed),
        "with_faults_reported": faulty,
        "begun_anew": resumed["the beginning"],
    }
