"""The files of a resumable run are damaged, or items in them lost, between a kill and the next call."""

from __future__ import annotations

import os
import random
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks.campaigns import subjects
from benchmarks.campaigns.damage import damage_file
from benchmarks.campaigns.subjects import Subject, outcome
from longtape.actions import Kind
from longtape.durable import points
from longtape.durable.home import DATA, JOURNAL, Home
from longtape.tiers.named import Place

STAGES = (0.15, 0.45, 0.6, 0.8, 0.95)
"""Of the actions of a run, after which it was given up."""

IN_A_FILE = ("flip", "zero", "truncate", "swap")
OF_FILES = ("missing", "another run's", "both of another run")
OF_ITEMS = ("an item lost", "the final state lost", "the adjoint lost", "all snapshots lost")
EMPTYING = ("missing", "truncate")
"""After these nothing may be left that tells a new run from a damaged one."""


def resumed_damage(count: int, chance: random.Random) -> dict[str, Any]:
    """Damage of every kind, at every stage of sweeps and scans."""
    subjects.one_thread()
    kinds = [*subjects.of("sweep"), *subjects.of("scan")]
    cases: Counter[str] = Counter()
    found: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as there:
        for number in range(count):
            subject, how = kinds[number % len(kinds)], chance.choice([*IN_A_FILE * 2, *OF_FILES, *OF_ITEMS])
            stage = _stage(Path(there), subject, chance.choice(STAGES))
            other = _stage(Path(there), subject, chance.choice(STAGES), number=1)
            where = Path(there) / "run"
            shutil.copytree(stage, where)
            what = _damage(where, other, how, chance)
            result = resume_damaged(subject, where, is_emptied=how in EMPTYING)
            cases[f"{subject.front}, {what}"] += 1
            found[result] += 1
            shutil.rmtree(where)
    return {"cases": cases.total(), "by_kind": dict(cases), "outcomes": dict(found), "wrong": 0}


def _stage(there: Path, subject: Subject, after: float, number: int = 0) -> Path:
    """A run that was given up there; made once."""
    path = there / f"{subject.name} {after} {number}"
    if not path.exists():
        path.mkdir()
        # A run that is taken up at another pace may take fewer actions; it must not come to its end.
        while not list(path.glob(f"*{JOURNAL}")):
            subject.half_way(path, int(after * subject.actions))
            after -= 0.1
    return path


def resume_damaged(subject: Subject, where: Path, *, is_emptied: bool = False) -> str:
    """The right bits, gone on with or begun anew, or a refusal after which nothing has changed."""
    before = {path.name: path.read_bytes() for path in where.iterdir()}
    result, report = outcome(subject, lambda: subject.run(resume=where))
    if report is None:
        assert result == "refused (ResumeError)", result
        assert {path.name: path.read_bytes() for path in where.iterdir()} == before, "it was refused, and changed"
        return result
    assert not os.listdir(where), os.listdir(where)
    if report.resumed_from is None:
        told = report.faults or any("of the journal could not be read" in note for note in report.notes)
        assert told or is_emptied, "begun anew, and nothing said"
        return "same bits, begun anew"
    return "same bits, " + ("gone on with, fault reported" if report.faults else "gone on with")


def _damage(where: Path, other: Path, how: str, chance: random.Random) -> str:
    if how in OF_ITEMS:
        lose(where, how, chance)
        return how
    suffix = chance.choice([DATA, DATA, JOURNAL])
    (path,) = where.glob(f"*{suffix}")
    if how == "missing":
        path.unlink()
    elif how in OF_FILES:
        for ending in (DATA, JOURNAL) if how.startswith("both") else (suffix,):
            (theirs,) = other.glob(f"*{ending}")
            shutil.copyfile(theirs, where / theirs.name)
    else:
        damage_file(path, how, chance)
    return f"{how}, {suffix.removeprefix('.longtape-')}"


def lose(where: Path, how: str, chance: random.Random) -> None:
    """Overwrite some of what the last point names."""
    point = last_point(where)
    adjoint = set() if point.adjoint is None else set(point.adjoint.names())
    lost = [
        place
        for key, place in point.items.items()
        if {
            "an item lost": True,
            "the final state lost": point.turned and key.kind is Kind.RESTART and key.step == point.reached,
            "the adjoint lost": key in adjoint,
            "all snapshots lost": key.kind in (Kind.SNAPSHOT, Kind.RESTART),
        }[how]
    ]
    destroy(where, [chance.choice(lost)] if how == "an item lost" and lost else lost, chance)


def last_point(where: Path) -> points.Point:
    """What the journal of the only run there comes to."""
    (path,) = where.glob(f"*{JOURNAL}")
    home = Home(where, path.name.removesuffix(JOURNAL))
    assert home.first is not None
    point = points.read_point(home.later(), points.read_begin(home.first), most=10**6)
    home.close()
    return point


def destroy(where: Path, places: Iterable[Place], chance: random.Random) -> None:
    """Change a few bytes of each of these items."""
    (path,) = where.glob(f"*{DATA}")
    with open(path, "r+b") as file:
        for place in places:
            file.seek(place.offset + chance.randrange(max(1, place.written)))
            before = file.read(3)
            file.seek(-len(before), os.SEEK_CUR)
            file.write(bytes(byte ^ 0x5A for byte in before))
