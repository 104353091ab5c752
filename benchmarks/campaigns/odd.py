"""One value of a journal is odd, and its checksum right: the right gradient, or a refusal, and soon."""

from __future__ import annotations

import contextlib
import copy
import os
import random
import shutil
import signal
import struct
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.campaigns import subjects
from benchmarks.campaigns.subjects import Subject, outcome
from longtape.durable import journal

MOST_SECONDS = 20
STAGES = (0.3, 0.8)
ODD: tuple[Any, ...] = (None, True, False, -1, 0, 1, 2, 7, 1 << 40, 1 << 70, -0.5, 0.5, 1e-300, 1e300, float("nan"),
                        float("inf"), "", "x", [], {}, [1], {"a": 1})  # fmt: skip
ODD_NUMBERS = (-1, 0, 1, 1 << 20, 1 << 40, (1 << 63) - 1)

Path_ = tuple[Any, ...]
Records = list[tuple[bytes, dict[str, Any], bytes]]


def odd_values(count: int, chance: random.Random) -> dict[str, Any]:
    """Journals of sweeps and scans given up in either sweep."""
    subjects.one_thread()
    kinds = [*subjects.of("sweep"), *subjects.of("scan")]
    found: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as there:
        for number in range(count):
            subject = kinds[number % len(kinds)]
            stage = Path(there) / f"{subject.name} {(after := chance.choice(STAGES))}"
            while not stage.exists() or not os.listdir(stage):
                subject.half_way(stage, int(after * subject.actions))
                after -= 0.05
            found[_attempt(subject, stage, Path(there) / "run", chance)] += 1
    return {"cases": count, "outcomes": dict(found), "wrong": 0, "hangs": 0}


def _attempt(subject: Subject, stage: Path, where: Path, chance: random.Random) -> str:
    shutil.copytree(stage, where)
    (path,) = where.glob("*.longtape-journal")
    records = read(path)
    what = mutated(records, chance)
    write(path, records)
    try:
        with at_most(MOST_SECONDS):
            result, report = outcome(subject, lambda: subject.run(resume=where))
    except BaseException as error:
        error.add_note(f"{subject.name}, {stage.name}: {what}")
        raise
    finally:
        shutil.rmtree(where)
    if report is None:
        return result
    return result + (", gone on with" if report.resumed_from else ", begun anew")


def read(path: Path) -> Records:
    """The records of a journal."""
    with open(path, "rb") as file:
        return [(r.run_id, r.header, bytes(r.payload)) for r, _ in journal.read(file.fileno())]


def write(path: Path, records: Records) -> None:
    """The same journal with other records, checksums made right."""
    path.write_bytes(b"".join(journal.encode(i, n, h, p) for n, (i, h, p) in enumerate(records)))


def mutated(records: Records, chance: random.Random) -> str:
    """Give one value in one of the records an odd one; returns which, in words."""
    number = chance.choice([0, chance.randrange(len(records)), len(records) - 1])
    run_id, header, payload = records[number]
    if number and len(payload) >= 48 and chance.random() < 0.4:
        at = 8 * chance.randrange(len(payload) // 8)
        (before,) = struct.unpack_from("<q", payload, at)
        value = chance.choice([*ODD_NUMBERS, before + 1, before - 1, before + 4096, 2 * before])
        changed = payload[:at] + struct.pack("<q", value) + payload[at + 8 :]
        records[number] = run_id, header, changed
        return f"record {number}, column {at // 8 % 6} of its items: {before} → {value}"
    header = copy.deepcopy(header)
    path = chance.choice(list(_leaves(header)))
    holder = header
    for name in path[:-1]:
        holder = holder[name]
    before = holder[path[-1]]
    near = (
        [before + 1, before - 1, 2 * before]
        if type(before) in (int, float)
        else [not before] * isinstance(before, bool)
    )
    holder[path[-1]] = value = chance.choice([*ODD, *near * 4])
    records[number] = run_id, header, payload
    return f"record {number}, {'.'.join(map(str, path))}: {before} → {value}"


def _leaves(tree: dict[str, Any], start: Path_ = ()) -> Iterator[Path_]:
    for name, value in tree.items():
        yield (*start, name)
        if isinstance(value, dict):
            yield from _leaves(value, (*start, name))


@contextlib.contextmanager
def at_most(seconds: int) -> Iterator[None]:
    """An error in place of a hang."""

    def over(*_: Any) -> None:
        raise AssertionError(f"it hangs: {seconds} s have passed")

    before = signal.signal(signal.SIGALRM, over)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
