"""Faults at length: kills, power, damage, edits, failing calls, slow and full disks, races, a memory limit, a device.

Each campaign checks what `tests/durable` and `tests/faults` check in small, many more times, and
writes what it found to ``benchmarks/results/campaign_<name>.json``.  A campaign that finds a wrong
bit, a hang or a crash stops with an error.

``python -m benchmarks.campaigns NAME [--count N] [--seed S]``; see `__main__` for the names.
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
for _path in (str(ROOT / "tests"), str(ROOT)):
    if _path not in sys.path:
        sys.path.insert(0, _path)
