"""Disks of every size."""

from __future__ import annotations

import errno
import gc
import random
import subprocess
import tempfile
import warnings
from pathlib import Path
from typing import Any


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
