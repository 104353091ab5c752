"""How long a schedule takes to make: Longtape's against those of checkpoint_schedules and pyrevolve.

For every schedule: seconds until its first action is there, which is how long a run
waits before its first step, and until its last one, as if steps cost nothing.  20 states
in memory, and 100 on disk where there is one.  Each runs in a process of its own, which
is ended when it takes too long (Longtape's own are given three times as long, to have
the figure); what takes too long for a length is not tried for a longer one.

``python -m benchmarks.planning [--limit SECONDS] [--quick]``
"""

from __future__ import annotations

import argparse
import contextlib
import io
import multiprocessing
import time
from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from multiprocessing.connection import Connection
from types import SimpleNamespace
from typing import Any

from benchmarks import common

LENGTHS = (10**4, 10**6)
SLOTS, ON_DISK = 20, 100
WRITE = READ = 5.0
"""In forward steps; an adjoint step takes two."""


# Ours ---------------------------------------------------------------------------------------------


def async_multistage(steps: int) -> Iterable[Any]:
    from longtape.schedules import AsyncMultistage

    return AsyncMultistage(steps, SLOTS, write=WRITE, read=READ)


def async_multistage_limited(steps: int) -> Iterable[Any]:
    from longtape.schedules import AsyncMultistage

    return AsyncMultistage(steps, SLOTS, ON_DISK, write=WRITE, read=READ)


def revolve(steps: int) -> Iterable[Any]:
    from longtape.schedules import Revolve

    return Revolve(steps, SLOTS)


def followed(steps: int) -> Iterable[Any]:
    """Another package's schedule, read, checked and noted down before Longtape follows it."""
    import checkpoint_schedules

    from longtape.plan.transcript import transcribe

    return transcribe(checkpoint_schedules.MultistageCheckpointSchedule(steps, SLOTS, 0), steps)


# Others' ------------------------------------------------------------------------------------------


def multistage(steps: int) -> Iterable[Any]:
    import checkpoint_schedules

    return checkpoint_schedules.MultistageCheckpointSchedule(steps, SLOTS, 0)


def multistage_with_disk(steps: int) -> Iterable[Any]:
    import checkpoint_schedules

    return checkpoint_schedules.MultistageCheckpointSchedule(steps, SLOTS, ON_DISK)


def two_level(steps: int) -> Iterable[Any]:
    import checkpoint_schedules

    schedule = checkpoint_schedules.TwoLevelCheckpointSchedule(-(-steps // ON_DISK), SLOTS)
    return _finalized(schedule, steps)


def _finalized(schedule: Any, steps: int) -> Iterator[Any]:
    for action in schedule:
        yield action
        if schedule.max_n is None and schedule.n >= steps:
            schedule.finalize(steps)
        if type(action).__name__ == "EndReverse":
            return


def their_revolve(steps: int) -> Iterable[Any]:
    import checkpoint_schedules

    return checkpoint_schedules.Revolve(steps, SLOTS)


def disk_revolve(steps: int) -> Iterable[Any]:
    import checkpoint_schedules

    return checkpoint_schedules.DiskRevolve(steps, SLOTS, ub=2, wd=WRITE, rd=READ)


def periodic_disk_revolve(steps: int) -> Iterable[Any]:
    import checkpoint_schedules

    with contextlib.redirect_stdout(io.StringIO()):
        return checkpoint_schedules.PeriodicDiskRevolve(steps, SLOTS, ub=2, wd=WRITE, rd=READ)


def h_revolve(steps: int) -> Iterable[Any]:
    import checkpoint_schedules

    return checkpoint_schedules.HRevolve(steps, SLOTS, ON_DISK, ub=2, wd=WRITE, rd=READ)


def mixed(steps: int) -> Iterable[Any]:
    import checkpoint_schedules

    return checkpoint_schedules.MixedCheckpointSchedule(steps, SLOTS)


def pyrevolve_revolve(steps: int) -> Iterable[Any]:
    from pyrevolve.schedulers import CRevolve

    return CRevolve(SLOTS, steps).oplist  # type: ignore[no-any-return]


def pyrevolve_h_revolve(steps: int) -> Iterable[Any]:
    from pyrevolve.schedulers import HRevolve

    levels = SimpleNamespace(nblevels=2, wd=[0, WRITE], rd=[0, READ], sizes=[SLOTS, ON_DISK])
    return [HRevolve(steps, steps, levels, uf=1, ub=2)]


CASES: dict[str, Callable[[int], Iterable[Any]]] = {
    "longtape AsyncMultistage": async_multistage,
    "longtape AsyncMultistage, 100 on disk": async_multistage_limited,
    "longtape Revolve": revolve,
    "longtape following Multistage": followed,
    "checkpoint_schedules Multistage": multistage,
    "checkpoint_schedules Multistage, 100 on disk": multistage_with_disk,
    "checkpoint_schedules TwoLevel": two_level,
    "checkpoint_schedules Revolve": their_revolve,
    "checkpoint_schedules DiskRevolve": disk_revolve,
    "checkpoint_schedules PeriodicDiskRevolve": periodic_disk_revolve,
    "checkpoint_schedules HRevolve": h_revolve,
    "checkpoint_schedules Mixed": mixed,
    "pyrevolve Revolve": pyrevolve_revolve,
    "pyrevolve HRevolve": pyrevolve_h_revolve,
}


# Timing -------------------------------------------------------------------------------------------


def timed(make: Callable[[int], Iterable[Any]], steps: int, limit: float) -> dict[str, Any]:
    """Seconds to the first action and to the last, and how many there are; None for what took more than `limit`."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=_time, args=(there, make, steps))
    process.start()
    there.close()
    found: dict[str, Any] = {"first_seconds": None, "all_seconds": None, "actions": None}
    try:
        here.recv()  # imported, and compiled where something is
        until = time.monotonic() + limit
        while found["all_seconds"] is None and here.poll(max(0.0, until - time.monotonic())):
            found |= here.recv()
    except EOFError:
        process.join()
        found["ended"] = f"exit code {process.exitcode}"
    finally:
        process.kill()
        process.join()
        here.close()
    return found


def _time(pipe: Connection, make: Callable[[int], Iterable[Any]], steps: int) -> None:
    for _ in make(300):
        pass
    pipe.send(None)
    began = time.perf_counter()
    actions = iter(make(steps))
    first = next(actions)
    pipe.send({"first_seconds": time.perf_counter() - began})
    count = sum(1 for _ in chain((first,), actions))
    pipe.send({"all_seconds": time.perf_counter() - began, "actions": count})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--limit", type=float, default=10.0, help="seconds for each schedule and length")
    parser.add_argument("--quick", action="store_true", help="short sequences, and nothing is written")
    arguments = parser.parse_args()
    lengths = (100, 1_000) if arguments.quick else LENGTHS
    results: dict[str, dict[str, Any]] = {}
    for name, make in CASES.items():
        limit = arguments.limit * (3 if name.startswith("longtape") else 1)
        for steps in lengths:
            results[f"{name} N={steps}"] = found = timed(make, steps, limit)
            print(f"{name} N={steps}: {found}", flush=True)
            if found["all_seconds"] is None:
                break
    settings = {"slots": SLOTS, "on_disk": ON_DISK, "write": WRITE, "read": READ, "limit_seconds": arguments.limit}
    if not arguments.quick:
        common.write("planning", settings, results)


if __name__ == "__main__":
    main()
