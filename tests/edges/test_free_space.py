"""The free space of a disk, less a reserve, is a limit: planned with, said, kept to, and refused with numbers."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from models import Chaotic

import longtape
from longtape import Sweep
from longtape.cli import main
from longtape.plan.costs import Costs
from tests.faults.sweeps import SIZE, exact, nbytes, storing_costs, unhurried

GB = 10**9
PAGE = 4096
ITEM = (-(-nbytes() // PAGE) + 1) * PAGE
"""What a state takes on disk."""

STEPS = 200


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Has every file system say that so much of it is free."""

    def say(nbytes: int, *, of: int = 0) -> None:
        size = max(of, nbytes)
        monkeypatch.setattr(
            os,
            "statvfs",
            lambda path: SimpleNamespace(f_frsize=1, f_bsize=1, f_blocks=size, f_bfree=nbytes, f_bavail=nbytes),
        )

    return say


def run(**options: Any) -> Sweep:
    model = unhurried(Chaotic)(SIZE)
    with Sweep(model, STEPS, memory=5 * nbytes(), **{"costs": storing_costs(), **options}) as sweep:
        sweep.forward()
        model.start_adjoint()
        sweep.reverse()
    assert model.result() == exact(STEPS, SIZE)
    return sweep


def test_a_plan_fits_what_is_free(scratch: Path, free: Callable[..., None]) -> None:
    plenty = run(disk=scratch)
    assert plenty.report.measured.peak_disk_bytes > 40 * ITEM
    free(20 * ITEM)
    scarce = run(disk=scratch)
    assert scarce.plan.prediction.peak_disk_bytes <= 19 * ITEM
    assert scarce.report.measured.peak_disk_bytes <= 19 * ITEM
    assert not scarce.report.faults


def test_no_more_than_is_stated_where_that_is_less(scratch: Path, free: Callable[..., None]) -> None:
    free(1000 * ITEM)
    assert run(disk=scratch, disk_limit=10 * ITEM).report.measured.peak_disk_bytes <= 10 * ITEM
    free(10 * ITEM)
    assert run(disk=scratch, disk_limit=1000 * ITEM).report.measured.peak_disk_bytes <= 10 * ITEM


@pytest.mark.parametrize(("size", "reserve"), [(1000, 50), (10 * GB, GB // 2), (1000 * GB, 1 << 30)])
def test_a_reserve_is_left(scratch: Path, free: Callable[..., None], size: int, reserve: int) -> None:
    from longtape.tiers.space import usable_nbytes

    free(size // 2, of=size)
    assert usable_nbytes(scratch) == size // 2 - reserve
    free(reserve // 2, of=size)
    assert usable_nbytes(scratch) == 0


def test_a_disk_with_nothing_to_spare_is_not_used(scratch: Path, free: Callable[..., None]) -> None:
    free(GB // 2, of=1000 * GB)
    sweep = run(disk=scratch)
    assert sweep.report.writes == 0
    assert sweep.report.measured.peak_disk_bytes == 0


def test_a_file_system_that_does_not_say_is_not_limited(scratch: Path, free: Callable[..., None]) -> None:
    free(0)
    assert run(disk=scratch).report.writes > 0


def test_unknown_length_is_thinned(scratch: Path, free: Callable[..., None]) -> None:
    class Ending(Chaotic):
        def advance(self, start: int, stop: int) -> int:
            stop = min(stop, STEPS)
            super().advance(start, stop)
            return stop

    free(20 * ITEM)
    model = Ending(SIZE)
    with Sweep(model, None, memory=5 * nbytes(), costs=storing_costs(), disk=scratch) as sweep:
        sweep.forward()
        model.start_adjoint()
        sweep.reverse()
    assert model.result() == exact(STEPS, SIZE)
    assert sweep.report.measured.peak_disk_bytes <= 19 * ITEM
    assert not sweep.report.faults


def test_a_run_that_can_be_resumed(tmp_path: Path, free: Callable[..., None]) -> None:
    free(20 * ITEM)
    sweep = run(resume=tmp_path, costs=None)
    assert sweep.plan.prediction.peak_disk_bytes <= 19 * ITEM
    assert sweep.report.measured.peak_disk_bytes <= 19 * ITEM


def test_what_a_resumed_run_has_is_not_asked_for_again(tmp_path: Path, free: Callable[..., None]) -> None:
    """Its file fills the disk; it goes on in it."""
    where, model = tmp_path, Chaotic(SIZE)
    first = Sweep(model, STEPS, memory=6 * nbytes(), resume=where, resume_seconds=1e-3)
    first.forward()
    first.close()
    kept = next(iter(where.glob("*-data"))).stat().st_blocks * 512
    free(0, of=kept)
    model = Chaotic(SIZE)
    with Sweep(model, STEPS, memory=6 * nbytes(), resume=where) as sweep:
        sweep.forward()
        model.start_adjoint()
        sweep.reverse()
    assert model.result() == exact(STEPS, SIZE)
    assert sweep.report.resumed_from


def test_a_given_schedule_that_needs_more_is_refused_with_numbers(scratch: Path, free: Callable[..., None]) -> None:
    schedules = pytest.importorskip("checkpoint_schedules")
    free(5 * ITEM)
    with pytest.raises(longtape.BudgetError, match=r"10 states .* disk.*free less a reserve"):
        Sweep(
            Chaotic(SIZE),
            STEPS,
            memory=5 * nbytes(),
            disk=scratch,
            schedule=schedules.MultistageCheckpointSchedule(STEPS, 2, 10),
        )


def test_what_is_written_in_all_stands_in_plan_and_report(scratch: Path, free: Callable[..., None]) -> None:
    free(1000 * ITEM)
    sweep = run(disk=scratch)
    room = longtape.sizes.format_bytes(sweep.plan.disk_nbytes)
    assert sweep.plan.disk_nbytes <= 950 * ITEM
    said = longtape.describe(sweep.plan)
    assert f"{longtape.sizes.format_bytes(sweep.plan.prediction.bytes_written)} written to disk in all" in said
    assert f"of the {room} there is room for" in said
    assert sweep.report.disk_limit_bytes == sweep.plan.disk_nbytes
    assert f"of {room} there was room for" in str(sweep.report)
    assert "were written in all" in str(sweep.report)


def test_the_command_line_looks_at_the_disk(
    scratch: Path, free: Callable[..., None], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A hundred thousand states of 12 MB take 1.2 TB; there are 70 GB."""
    free(70 * GB, of=500 * GB)
    found = SimpleNamespace(
        write_bytes_per_second=2e9, read_bytes_per_second=2e9, write_latency=1e-4, read_latency=1e-4
    )
    monkeypatch.setattr("longtape.cli.probe", lambda directory, item: found)
    asked = ["plan", "--steps", "100000", "--state", "12MB", "--forward", "0.02", "--memory", "200MB"]
    assert main([*asked, "--disk", str(scratch), "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert 0 < figures["peak_disk_bytes"] <= 69 * GB
    assert figures["bytes_written"] >= figures["peak_disk_bytes"]
    assert main([*asked, "--disk", str(scratch)]) == 0
    said = capsys.readouterr().out
    assert "written in all" in said
    assert "there is room for" in said


# A disk that is really small ------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    if os.geteuid() != 0:
        pytest.skip("only root can mount")
    where = tmp_path / "small"
    where.mkdir()
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={20 * ITEM}", "tmpfs", str(where)], capture_output=True, text=True
    )
    if made.returncode:
        pytest.skip(f"cannot mount: {made.stderr}")
    yield where
    subprocess.run(["umount", str(where)], check=True)


def test_a_small_file_system_is_not_filled(small_disk: Path) -> None:
    least = []

    class Watching:
        def on_action(self, *given: Any) -> None:
            pass

        def on_transfer(self, *given: Any) -> None:
            least.append(os.statvfs(small_disk).f_bavail * PAGE)

    report = run(disk=small_disk, observers=[Watching()]).report
    assert report.writes > 10
    assert min(least) >= ITEM
    assert not report.faults


def test_tiny_costs_do_not_matter(scratch: Path, free: Callable[..., None]) -> None:
    """Storage that is infinitely quick stores every state, if there is room."""
    free(30 * ITEM)
    quick = Costs(1e-3, 2e-3)
    assert run(disk=scratch, costs=quick).report.measured.peak_disk_bytes <= 29 * ITEM
