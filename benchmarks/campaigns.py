"""Faults at length: kills, losses of power, damage, fuzz, full disks, races and a memory limit.

Each campaign checks what `tests/durable` and `tests/faults` check in small, many more times, and
writes what it found to ``benchmarks/results/campaign_<name>.json``.  A campaign that finds a wrong
bit, a hang or a crash stops with an error.

``python -m benchmarks.campaigns kill|power|damage|fuzz|disk|races|limit [--count N] [--seed S]``
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import gc
import os
import random
import resource
import struct
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import numpy as np  # noqa: E402

from benchmarks import common  # noqa: E402

# Kill --------------------------------------------------------------------------------------------

SWEEP_STEPS = 300
INTERVAL = 0.04
SLACK = 0.5
"""Seconds beside the stated interval, for a machine with other work on two cores."""


def kill(count: int, chance: random.Random) -> dict[str, Any]:
    """SIGKILL at random moments, also while resuming, until `count` kills have been made."""
    import torch

    from tests.durable import programs, scans

    torch.set_num_threads(1)
    expected = {kind: scans.gradient(kind, None, 1.0, 0.0)[0] for kind in ("eager", "random", "captured")}
    kinds = [*programs.MODELS, *expected]
    killed, runs, resumed_from, oldest = Counter[str](), Counter[str](), Counter[str](), 0.0
    while killed.total() < count:
        kind = kinds[runs.total() % len(kinds)]
        with tempfile.TemporaryDirectory() as there:
            directory, log = Path(there) / "run", programs.Log(SWEEP_STEPS)

            def body(kind: str = kind, directory: Path = directory, log: Any = log) -> bytes:
                if kind in expected:
                    bits, report = scans.gradient(kind, str(directory), INTERVAL, 1e-3)
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
                found = programs.forked(body, kill_after=chance.uniform(0.0, most))
                if found is not None:
                    break
                killed[kind] += 1
                log.killed()
            found = found or programs.forked(body, patience=120.0)
            assert found is not None
            where, bits = found.split(b"|", 1)
            right = expected[kind] if kind in expected else programs.right_bits(SWEEP_STEPS)
            assert bits == right, f"wrong bits: {kind}, run {runs.total()}"
            assert not os.listdir(directory)
            oldest = max(oldest, log.oldest_repeated)
            assert oldest <= INTERVAL + SLACK, f"{oldest} s of work were repeated"
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
        "oldest_repeated_work_seconds": oldest,
        "slack_seconds": SLACK,
    }


# Power -------------------------------------------------------------------------------------------


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
    """Cut a recorded run off after every event, and resume from what may be left."""
    from models import Chaotic, OutOfPlace

    import longtape
    from longtape.tiers import disk
    from tests.durable import programs
    from tests.faults.sweeps import nbytes, storing_costs

    disk.LEAST_GROWTH_NBYTES = 1 << 20  # so that what is replayed is small
    steps, size = 40, 2000
    cases, resumed, anew, unreadable = 0, Counter[str](), 0, 0

    def sweep(kind: type, directory: Path, seconds: float, pause: float) -> tuple[bytes, Any]:
        class Model(kind):  # type: ignore[misc]
            def _reverse_from(self, step: int, state: Any) -> None:
                time.sleep(pause)
                super()._reverse_from(step, state)

        Model.__qualname__ = kind.__qualname__
        model = Model(size)
        run = longtape.Sweep(
            model, steps, memory=5 * nbytes(size), resume=directory, resume_seconds=seconds, costs=storing_costs(size)
        )
        run.forward()
        if pause:
            time.sleep(0.02)
        model.start_adjoint()
        run.reverse()
        return model.result(), run.report

    recorded = []
    for kind in (Chaotic, OutOfPlace):
        with tempfile.TemporaryDirectory() as there:
            directory = Path(there) / "run"
            directory.mkdir()
            recorder = Recorder(directory)
            with recorder.recording():
                sweep(kind, directory, 1e-6, 3e-3)
            recorded.append((kind, recorder.events))
    prefixes = sum(len(events) + 1 for _, events in recorded)
    while cases < count:
        for kind, events in recorded:
            for length in range(len(events) + 1):
                with tempfile.TemporaryDirectory() as there, warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    directory = Path(there) / "run"
                    replay(events[:length], directory, chance)
                    bits, report = sweep(kind, directory, 60.0, 0.0)
                    assert bits == programs.exact(steps, size), f"wrong bits after event {length}"
                    assert not os.listdir(directory)
                cases += 1
                anew += report.resumed_from is None
                unreadable += bool(report.faults)
                where = report.resumed_from or "the beginning"
                resumed[where.translate({ord(c): None for c in "0123456789,"})] += 1
    return {
        "cases": cases,
        "events": prefixes - len(recorded),
        "prefixes": prefixes,
        "wrong": 0,
        "resumed_from": dict(resumed),
        "with_faults_reported": unreadable,
        "begun_anew": anew,
    }


# Damage ------------------------------------------------------------------------------------------


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
        if stops and stop is not None:

            def reverse(start: int, end: int) -> None:
                if start < stop:
                    raise Stop
                time.sleep(5e-4)
                Chaotic.reverse(model, start, end)

            model.reverse = reverse  # type: ignore[method-assign]
        seconds = 1e-6 if stops else 60.0
        with longtape.Sweep(
            model, steps, memory=5 * nbytes(size), resume=directory, resume_seconds=seconds, costs=storing_costs(size)
        ) as sweep:
            sweep.forward()
            if stops and stop is None:
                raise Stop
            model.start_adjoint()
            sweep.reverse()
        return model.result(), sweep.report

    with tempfile.TemporaryDirectory() as there, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with contextlib.suppress(Stop):
            run(there, stops=True)
        path = Path(there) / chance.choice(["sweep.longtape-data"] * 3 + ["sweep.longtape-journal"])
        how = chance.choice(["flip", "zero", "truncate", "swap"])
        if path.exists():
            _damage_file(path, how, chance)
        try:
            bits, report = run(there, stops=False)
        except longtape.ResumeError as error:
            # The very first bytes are damaged: it may be anybody's file, and is left alone.
            assert "not a journal" in str(error)
            return True, f"{how} (refused)"
    assert bits == programs.exact(steps, size), "wrong bits"
    return bool(report.faults), how


def _damage_file(path: Path, how: str, chance: random.Random) -> None:
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


# Fuzz --------------------------------------------------------------------------------------------


def fuzz(count: int, chance: random.Random) -> dict[str, Any]:
    """Files of any bytes, half of them with checksums made right: nothing is executed, little is allocated."""
    import tracemalloc

    from longtape.durable import journal, points
    from longtape.durable.home import leftovers

    with tempfile.TemporaryDirectory() as there:
        seeds = _journals(Path(there), chance)
        executed: list[str] = []
        watching = False

        def audit(event: str, arguments: Any) -> None:
            if watching and event in (
                "exec",
                "compile",
                "import",
                "os.exec",
                "os.system",
                "subprocess.Popen",
                "ctypes.dlopen",
            ):
                executed.append(event)

        sys.addaudithook(audit)
        scratch = Path(there) / "x"
        scratch.mkdir()
        path = scratch / "x.longtape-journal"
        path.touch()
        fd = os.open(path, os.O_RDWR)
        sound, excess = 0, 0

        def load() -> int:
            records = [record for record, _ in journal.read(fd)]
            if records:
                points.read_begin(records[0])
                points.read_point(records[1:])
            return len(records)

        load()
        peak = common.reset_peak()
        for number in range(count):
            data = _mutated(seeds, chance)
            os.ftruncate(fd, 0)
            os.pwrite(fd, data, 0)
            watching = True
            if number % 50 == 0:
                tracemalloc.start()
                sound += load() > 0
                excess = max(excess, tracemalloc.get_traced_memory()[1] - len(data))
                tracemalloc.stop()
            else:
                sound += load() > 0
            if number % 500 == 0:
                leftovers(scratch)
            watching = False
        growth = common.peak() - peak
        os.close(fd)
    assert not executed, executed
    assert excess <= 16 << 20, excess
    return {
        "inputs": count,
        "with_sound_records": sound,
        "crashes": 0,
        "executed": 0,
        "most_allocated_beyond_file_size_bytes": excess,
        "resident_growth_over_all_bytes": growth,
    }


def _journals(where: Path, chance: random.Random) -> list[list[tuple[bytes, dict[str, Any], bytes]]]:
    """Records of real journals, of runs given up."""
    from models import Chaotic

    import longtape
    from longtape.durable.home import Home
    from tests.faults.sweeps import nbytes, storing_costs

    found = []
    for name, steps in ("short", 12), ("long", 60):
        model = Chaotic(2000)
        with longtape.Sweep(
            model,
            steps,
            memory=5 * nbytes(2000),
            resume=where,
            name=name,
            resume_seconds=1e-6,
            costs=storing_costs(2000),
        ) as sweep:
            sweep.forward()
        home = Home(where, name)
        found.append([(r.run_id, r.header, r.payload) for r in home.records])
        home.close()
    return found


def _mutated(seeds: list[Any], chance: random.Random) -> bytes:
    from longtape.durable import journal

    records = list(chance.choice(seeds))
    kind = chance.randrange(4)
    if kind == 0:
        return chance.randbytes(chance.choice([0, 1, 7, 100, 5000]))
    if kind == 1:  # any bytes changed
        data = bytearray(b"".join(journal.encode(i, n, h, p) for n, (i, h, p) in enumerate(records)))
        for _ in range(chance.choice([1, 2, 8, 100])):
            at = chance.randrange(len(data))
            action = chance.randrange(4)
            if action == 0:
                data[at] = chance.randrange(256)
            elif action == 1:
                del data[at : at + chance.randrange(200)]
            elif action == 2:
                data[at : at + 8] = struct.pack("<Q", chance.choice([0, 1, 1 << 31, 1 << 40, (1 << 64) - 1]))
            else:
                data[at:at] = chance.randbytes(chance.randrange(100))
            if not data:
                break
        return bytes(data)
    number = chance.randrange(len(records))  # sound records that say odd things
    run_id, header, payload = records[number]
    if kind == 2:
        header = _odd(header, chance)
    else:
        payload = chance.choice([chance.randbytes(48 * chance.randrange(200)), payload[:-1], payload * 40, b""])
        if len(payload) >= 48 and chance.random() < 0.5:
            payload = (
                struct.pack("<6q", chance.choice([1, 2, 3, 4, 9]), *[chance.getrandbits(63) for _ in range(5)])
                + payload
            )
    records[number] = (run_id, header, payload)
    return b"".join(journal.encode(i, n, h, p) for n, (i, h, p) in enumerate(records))


def _odd(header: dict[str, Any], chance: random.Random) -> dict[str, Any]:
    values = [None, True, -1, 1 << 70, 1e300, "", "x" * 1000, [], [[]] * 50, {}, {"a": {"b": 1}}, float("nan")]
    changed = dict(header)
    name = chance.choice([*header, "other"])
    if isinstance(changed.get(name), dict) and changed[name] and chance.random() < 0.7:
        changed[name] = _odd(changed[name], chance)
    elif chance.random() < 0.3:
        changed.pop(name, None)
    else:
        changed[name] = chance.choice(values)
    return changed


# Full disk ---------------------------------------------------------------------------------------


def disk(count: int, chance: random.Random) -> dict[str, Any]:
    """A tmpfs of every multiple of a page, from none to more than the run needs."""
    from models import Chaotic, OutOfPlace

    import longtape
    from tests.faults import sweeps
    from tests.faults.sweeps import run

    page, sizes, faulty, refused = 4096, 0, 0, 0
    with tempfile.TemporaryDirectory() as there:
        for pages in range(1, count + 1):
            for kind in (Chaotic, OutOfPlace):
                for resumable in (False, True):
                    where = Path(there) / "disk"
                    where.mkdir()
                    mounted = ["mount", "-t", "tmpfs", "-o", f"size={pages * page}", "tmpfs", str(where)]
                    subprocess.run(mounted, check=True)
                    try:
                        if resumable:
                            faulty += _full_and_resumable(longtape, sweeps, kind, where)
                        else:
                            faulty += bool(run(disk=where, kind=kind).report.faults)
                        assert not list(where.iterdir())
                    except longtape.StorageError as error:
                        assert resumable
                        assert error.errno in (errno.ENOSPC, None)
                        refused += 1
                    finally:
                        gc.collect()
                        subprocess.run(["umount", "-l", str(where)], check=True)
                    where.rmdir()
                    sizes += 1
    return {
        "cases": sizes,
        "largest_pages": count,
        "with_faults_reported": faulty,
        "wrong": 0,
        "resumable_runs_refused_at_the_start": refused,
    }


def _full_and_resumable(longtape: Any, sweeps: Any, kind: type, where: Path) -> bool:
    model = sweeps.unhurried(kind)(sweeps.SIZE)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        sweep = longtape.Sweep(
            model,
            30,
            memory=5 * sweeps.nbytes(),
            resume=where,
            resume_seconds=1e-3,
            costs=sweeps.storing_costs(),
        )
        sweep.forward()
        model.start_adjoint()
        sweep.reverse()
    assert model.result() == sweeps.exact(30, sweeps.SIZE)
    return bool(sweep.report.faults)


# Races -------------------------------------------------------------------------------------------


def races(count: int, chance: random.Random) -> dict[str, Any]:
    """Interleavings of compute, writer and reader, drawn by Hypothesis; see `tests/faults/test_scripted.py`."""
    from hypothesis import HealthCheck, given, seed, settings

    from tests.faults.test_scripted import attempt, cases

    tried = 0

    @seed(chance.randrange(1 << 30))
    @settings(max_examples=count, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(cases())
    def search(case: Any) -> None:
        nonlocal tried
        tried += 1
        attempt(case)

    search()
    return {"interleavings": tried, "wrong": 0}


# Limit -------------------------------------------------------------------------------------------

GROUP = Path("/sys/fs/cgroup")


def limit(count: int, chance: random.Random) -> dict[str, Any]:
    """Runs in a control group that allows baseline + budget + working set + 64 MiB."""
    outcomes = []
    for budget_mib in (64, 128)[: max(1, count)]:
        for how in ("disk", "resume"):
            outcomes.append(_limited(budget_mib << 20, how))
    return {"runs": outcomes}


def _limited(budget: int, how: str) -> dict[str, Any]:
    state = 8 << 20
    baseline = common.apart(_baseline, state)
    allowed = baseline + budget + 4 * state + (64 << 20)
    kind, path = _make_group(allowed)
    try:
        report = common.apart(_in_group, str(path) if path else None, allowed, state, budget, how)
    finally:
        if path is not None:
            path.rmdir()
    return {
        "means": kind,
        "how": how,
        "budget_bytes": budget,
        "baseline_bytes": baseline,
        "limit_bytes": allowed,
        **report,
    }


def _baseline(state: int) -> int:
    import longtape  # noqa: F401

    common.reset_peak()
    return common.peak()


def _make_group(allowed: int) -> tuple[str, Path | None]:
    for kind, root, name in (
        ("control group, version 2", GROUP, "memory.max"),
        ("control group, version 1", GROUP / "memory", "memory.limit_in_bytes"),
    ):
        path = root / f"longtape-{os.getpid()}"
        try:
            path.mkdir()
        except OSError:
            continue
        if (path / name).exists():
            with contextlib.suppress(OSError):
                (path / name).write_text(str(allowed))
                return kind, path
        path.rmdir()
    return "RLIMIT_DATA, for there is no memory controller", None


class _Drifting:
    """A state of many megabytes; a step and its adjoint allocate nothing."""

    def __init__(self, nbytes: int) -> None:
        self.state = [np.ones(nbytes // 8)]
        self.adjoint = [np.ones(nbytes // 8)]

    def advance(self, start: int, stop: int) -> None:
        for _ in range(start, stop):
            self.state[0] *= 0.999
            self.state[0] += 1e-3

    def reverse(self, start: int, stop: int) -> None:
        self.adjoint[0] *= 0.999


def _in_group(path: str | None, allowed: int, state: int, budget: int, how: str) -> dict[str, Any]:
    import longtape

    if path is None:
        resource.setrlimit(resource.RLIMIT_DATA, (allowed, allowed))
    else:
        Path(path, "cgroup.procs").write_text(str(os.getpid()))
    with tempfile.TemporaryDirectory(dir=ROOT) as there:
        model = _Drifting(state)
        given: Any = {how: there}
        sweep = longtape.Sweep(model, 400, memory=budget, **given)
        sweep.forward()
        sweep.reverse()
        report = sweep.report
    expected = np.ones(1)
    for _ in range(400):
        expected *= 0.999
    assert (model.adjoint[0] == expected[0]).all()
    if path is not None:
        Path(path).parent.joinpath("cgroup.procs").write_text(str(os.getpid()))
    return {
        "schedule": report.schedule,
        "bytes_written": report.measured.bytes_written,
        "peak_resident_bytes": common.peak(),
        "completed": True,
    }


CAMPAIGNS: dict[str, tuple[Callable[[int, random.Random], dict[str, Any]], int]] = {
    "kill": (kill, 240),
    "power": (power, 600),
    "damage": (damage, 1200),
    "fuzz": (fuzz, 100_000),
    "disk": (disk, 150),
    "races": (races, 10_000),
    "limit": (limit, 2),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("campaign", choices=CAMPAIGNS)
    parser.add_argument("--count", type=int)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--dry", action="store_true", help="write no results")
    parsed = parser.parse_args()
    function, usual = CAMPAIGNS[parsed.campaign]
    count = parsed.count or usual
    began = time.perf_counter()
    results = function(count, random.Random(parsed.seed))
    results["seconds"] = time.perf_counter() - began
    if parsed.dry:
        print(results)
    else:
        common.write(f"campaign_{parsed.campaign}", {"count": count, "seed": parsed.seed}, results)


if __name__ == "__main__":
    main()
