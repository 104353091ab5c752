"""Files of any bytes in a resume directory."""

from __future__ import annotations

import contextlib
import os
import random
import struct
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks import common


def fuzz(count: int, chance: random.Random) -> dict[str, Any]:
    """Files of any bytes, half of them with checksums made right: nothing is executed, little is allocated."""
    import tracemalloc

    from longtape.durable import journal, points
    from longtape.durable.leftovers import leftovers
    from longtape.errors import DamagedBlock

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
            records = (record for record, _ in journal.read(fd))
            first = next(records, None)
            if first is None:
                return 0
            with contextlib.suppress(DamagedBlock, points.OddRecord):
                points.read_point(records, points.read_begin(first), most=1 << 10)
            return 1

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
        found.append([(r.run_id, r.header, r.payload) for r in [home.first, *home.later()] if r is not None])
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
