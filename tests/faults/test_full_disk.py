"""A disk that is really full, at every size from nothing to enough."""

import os
import subprocess

import pytest
from models import Chaotic, OutOfPlace

from tests.faults.sweeps import nbytes, run

PAGE = 4096
ITEM = (-(-nbytes() // PAGE) + 1) * PAGE


@pytest.fixture
def small_disk(tmp_path):
    """Mounts file systems of given sizes."""
    if os.geteuid() != 0:
        pytest.skip("only root can mount")
    mounted = []

    def mount(size):
        where = tmp_path / f"disk-{size}"
        where.mkdir()
        made = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(where)], capture_output=True, text=True
        )
        if made.returncode:
            pytest.skip(f"cannot mount: {made.stderr}")
        mounted.append(where)
        return where

    yield mount
    for where in mounted:
        subprocess.run(["umount", str(where)], check=True)


@pytest.mark.parametrize("kind", [Chaotic, OutOfPlace])
@pytest.mark.parametrize("probing", [False, True])
def test_a_full_disk_only_slows(small_disk, kind, probing, monkeypatch):
    """What was free when the run began, others have taken."""
    monkeypatch.setattr("longtape.tiers.disk.usable_nbytes", lambda directory, beside: None)
    faults, writes = [], []
    for pages in [1, 2, 3, 4, 5, 6, 7, 9, 12, 16, 22, 30, 45, 60, 100, 300]:
        where = small_disk(pages * PAGE)
        report = run(disk=where, kind=kind, probing=probing).report
        faults.append(len(report.faults))
        writes.append(report.writes)
        assert not list(where.iterdir())
    assert faults[0]
    assert not faults[-1]
    if not probing:
        assert writes[-1] > writes[0] == 0


@pytest.mark.parametrize("kind", [Chaotic, OutOfPlace])
def test_a_small_disk_is_planned_for(small_disk, kind):
    writes = []
    for pages in [1, 4, 7, 12, 22, 45, 100, 300]:
        report = run(disk=small_disk(pages * PAGE), kind=kind).report
        assert not report.faults
        writes.append(report.writes)
    assert writes[-1] > writes[0] == 0


def test_a_disk_that_others_fill(small_disk):
    """Room goes and comes back in the middle of a run."""
    where = small_disk(40 * PAGE)

    def fill(sweep):
        (where / "other").write_bytes(bytes(60 * PAGE)[: os.statvfs(where).f_bavail * PAGE])

    run(disk=where, between=fill)
    (where / "other").unlink()


@pytest.mark.parametrize("items", [0, 1, 2, 3, 5, 8, 13, 100])
def test_a_stated_limit(scratch, items):
    report = run(disk=scratch, disk_limit=items * ITEM).report
    assert report.measured.peak_disk_bytes <= items * ITEM
