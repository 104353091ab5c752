"""The command line: `longtape probe`, `longtape plan` and `longtape clean`.

Thin: parses, calls `longtape.probe` and `longtape.foresee`, prints.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from math import inf
from typing import Any

from longtape.compose import describe
from longtape.durable.journal import Record
from longtape.durable.leftovers import Leftover, leftovers, remove_leftover
from longtape.durable.points import OddRecord, Point, apply_header, read_begin
from longtape.errors import LongtapeError, UsageError
from longtape.foresee import Foresight, foresee, replay, time_against_memory
from longtape.plan.choose import Choice
from longtape.plan.costs import Costs, Device, Problem
from longtape.plan.simulate import Outcome
from longtape.probe import Probe, probe
from longtape.sizes import format_bytes, format_seconds, parse_bytes
from longtape.tiers.space import usable_nbytes


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status: 0, or 2 for what cannot be done as asked."""
    parsed = _parser().parse_args(arguments)
    try:
        parsed.run(parsed)
    except (LongtapeError, ImportError, OSError) as error:
        print(f"longtape {parsed.command}: {error}", file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="longtape", description="Plan gradients through sequences longer than memory."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    asked = commands.add_parser("probe", help="measure how fast a directory stores and fetches")
    asked.add_argument("directory")
    asked.add_argument("--item", default="16MiB", help="size of the items to move (default: %(default)s)")
    asked.add_argument("--json", action="store_true")
    asked.set_defaults(run=_probe)
    asked = commands.add_parser("plan", help="say what a run would take, before it is started")
    asked.add_argument("--steps", default="unknown", help="number of steps, or 'unknown' (the default)")
    asked.add_argument("--state", required=True, help="size of one state")
    asked.add_argument("--residuals", help="size of one step's residuals, if the job can record them")
    asked.add_argument("--forward", type=float, required=True, help="seconds of one step")
    asked.add_argument("--reverse", type=float, help="seconds of one adjoint step without its taped re-run")
    asked.add_argument("--tape", type=float, help="seconds of one step while it is taped (default: --forward)")
    asked.add_argument("--memory", required=True, help="memory budget; of the device, with --host-memory")
    asked.add_argument("--host-memory", help="budget in the host's memory, if the steps run on a device")
    asked.add_argument(
        "--link-bandwidth", metavar="OUT[,IN]", help="bytes a second from the device to the host, and back"
    )
    asked.add_argument("--link-latency", type=float, help="seconds a copy over the link takes however small")
    asked.add_argument("--disk", help="directory to spill to; it is probed")
    asked.add_argument("--write-bandwidth", help="bytes a second, in place of --disk")
    asked.add_argument("--read-bandwidth", help="bytes a second (default: --write-bandwidth)")
    asked.add_argument("--latency", type=float, help="seconds a transfer takes however small (default: 0)")
    asked.add_argument("--disk-limit", help="most bytes on disk")
    asked.add_argument("--simulate", action="store_true", help="replay the plan in the event model")
    asked.add_argument("--json", action="store_true")
    asked.add_argument("--plot", metavar="FILE", help="draw time against memory")
    asked.set_defaults(run=_plan)
    asked = commands.add_parser("clean", help="list and remove what resumable runs have left in a directory")
    asked.add_argument("directory")
    asked.add_argument("--yes", action="store_true", help="remove without asking")
    asked.set_defaults(run=_clean)
    return parser


# probe ------------------------------------------------------------------------------------------


def _probe(parsed: argparse.Namespace) -> None:
    found = probe(parsed.directory, item=parsed.item)
    print(json.dumps(asdict(found)) if parsed.json else _probe_table(found))


def _probe_table(found: Probe) -> str:
    path = "direct I/O" if found.direct_io else f"buffered I/O ({found.fallback_reason})"
    lines = [f"{found.directory}: {path}, items of {format_bytes(found.item_nbytes)}, while a core computes", ""]
    lines[0] += f"; blocks of {format_bytes(found.block_nbytes)}, one transfer of a kind at a time"
    lines.append(f"{'':<8}{'bandwidth':>14}{'latency':>12}")
    for name, speed, latency in (
        ("write", found.write_bytes_per_second, found.write_latency),
        ("read", found.read_bytes_per_second, found.read_latency),
    ):
        lines.append(f"{name:<8}{format_bytes(round(speed)) + '/s':>14}{format_seconds(latency):>12}")
    lines += ["", f"{format_bytes(found.bytes_written)} written in {format_seconds(found.seconds)}; nothing is left"]
    return "\n".join(lines)


# clean ------------------------------------------------------------------------------------------


def _clean(parsed: argparse.Namespace) -> None:
    found = leftovers(parsed.directory)
    for left in found:
        print(_described(left))
    free = [left for left in found if not left.held]
    if not free:
        print(f"nothing to remove in {parsed.directory}")
        return
    if not parsed.yes and not _agreed(f"remove {len(free)} of these runs? [y/N] "):
        print("nothing was removed")
        return
    for left in free:
        print(f"{left.name}: {'removed' if remove_leftover(left) else 'taken up meanwhile, and left'}")


def _described(left: Leftover) -> str:
    what = "no durable point"
    try:
        if left.records:
            what = _place(left.records)
    except OddRecord as error:
        what = f"its journal {error}"
    age = format_seconds(max(0.0, time.time() - left.modified))
    held = ", a process is working on it" if left.held else ""
    return f"{left.name}: {what}; {format_bytes(left.nbytes)}, last written {age} ago{held}"


def _place(records: Sequence[Record]) -> str:
    begin, point = read_begin(records[0]), Point()
    for record in records[1:]:
        apply_header(point, record)
    sweep = f"adjoint at step {point.adjoint.start:,}" if point.adjoint else f"forward sweep at step {point.reached:,}"
    return f"{begin.title}, {sweep} of {begin.steps:,}"


def _agreed(question: str) -> bool:
    try:
        return input(question).strip().lower() in ("y", "yes")
    except EOFError:
        return False


# plan -------------------------------------------------------------------------------------------


def _plan(parsed: argparse.Namespace) -> None:
    problem = _problem(parsed)
    foresight = foresee(problem, _costs(parsed, problem))
    outcome = replay(foresight) if parsed.simulate else None
    if parsed.plot:
        _plot(foresight, parsed.plot)
    print(json.dumps(_figures(foresight, outcome)) if parsed.json else _table(foresight, outcome))


def _problem(parsed: argparse.Namespace) -> Problem:
    if parsed.disk and parsed.write_bandwidth:
        raise UsageError("give --disk, which is probed, or --write-bandwidth, not both")
    for name in ("read_bandwidth", "latency"):
        if getattr(parsed, name) is not None and not parsed.write_bandwidth:
            raise UsageError(
                f"--{name.replace('_', '-')} needs --write-bandwidth"
                + (", and --disk is probed" if parsed.disk else "")
            )
    for name in ("link_bandwidth", "link_latency"):
        if getattr(parsed, name) is not None and parsed.host_memory is None:
            raise UsageError(f"--{name.replace('_', '-')} needs --host-memory, for it is that of a device")
    if parsed.host_memory is not None and parsed.link_bandwidth is None:
        raise UsageError("--host-memory needs --link-bandwidth, which says how fast a device copies to it and back")
    for name in ("forward", "reverse", "tape", "latency", "link_latency"):
        seconds = getattr(parsed, name)
        if seconds is not None and not 0 <= seconds < inf:
            raise UsageError(f"--{name.replace('_', '-')} must be seconds, 0 or more, not {seconds}")
    has_disk = bool(parsed.disk or parsed.write_bandwidth)
    if parsed.disk_limit and not has_disk:
        raise UsageError("--disk-limit needs --disk or --write-bandwidth")
    memory = parse_bytes(parsed.memory)
    residuals = None if parsed.residuals is None else _positive("--residuals", parse_bytes(parsed.residuals))
    return Problem(
        steps=_steps(parsed.steps),
        state_nbytes=_positive("--state", parse_bytes(parsed.state)),
        memory_nbytes=memory if parsed.host_memory is None else parse_bytes(parsed.host_memory),
        has_disk=has_disk,
        disk_nbytes=_disk_nbytes(parsed),
        residual_nbytes=residuals,
        device=None if parsed.host_memory is None else Device(memory, residuals or 0),
    )


def _disk_nbytes(parsed: argparse.Namespace) -> int | None:
    """The stated limit, and what is free in the directory."""
    limits = (
        None if parsed.disk_limit is None else parse_bytes(parsed.disk_limit),
        None if parsed.disk is None else usable_nbytes(parsed.disk),
    )
    return min((nbytes for nbytes in limits if nbytes is not None), default=None)


def _steps(text: str) -> int | None:
    if text == "unknown":
        return None
    try:
        return int(text.replace("_", ""))
    except ValueError:
        raise UsageError(f"--steps must be a whole number or 'unknown', not {text!r}") from None


def _positive(name: str, nbytes: int) -> int:
    if nbytes < 1:
        raise UsageError(f"{name} must be at least one byte")
    return nbytes


def _costs(parsed: argparse.Namespace, problem: Problem) -> Costs:
    tape = parsed.forward if parsed.tape is None else parsed.tape
    reverse = 2.0 * parsed.forward if parsed.reverse is None else parsed.reverse
    costs = Costs(parsed.forward, tape + reverse)
    if problem.residual_nbytes is not None:
        costs = Costs(parsed.forward, tape + reverse, record=tape, pull_back=reverse)
    if problem.device is not None:
        out, back = _link(parsed.link_bandwidth)
        latency = parsed.link_latency or 0.0
        costs = replace(costs, out_bytes_per_second=out, in_bytes_per_second=back, link_latency=latency)
    if not problem.has_disk:
        return costs
    write, read, write_latency, read_latency = _storage(parsed, problem)
    return replace(
        costs,
        write_bytes_per_second=write,
        read_bytes_per_second=read,
        write_latency=write_latency,
        read_latency=read_latency,
    )


def _link(text: str) -> tuple[float, float]:
    """Out and in, from one value or two."""
    both = text.split(",")
    if len(both) > 2:
        raise UsageError(f"--link-bandwidth is one value, or two with a comma between, out,in; not {text!r}")
    return _bandwidth("--link-bandwidth", both[0]), _bandwidth("--link-bandwidth", both[-1])


def _storage(parsed: argparse.Namespace, problem: Problem) -> tuple[float, float, float, float]:
    if parsed.disk:
        found = probe(parsed.disk, item=max(problem.state_nbytes, 4 << 20))
        return found.write_bytes_per_second, found.read_bytes_per_second, found.write_latency, found.read_latency
    write = _bandwidth("--write-bandwidth", parsed.write_bandwidth)
    read = write if parsed.read_bandwidth is None else _bandwidth("--read-bandwidth", parsed.read_bandwidth)
    latency = parsed.latency or 0.0
    return write, read, latency, latency


def _bandwidth(name: str, text: str) -> float:
    """Bytes a second, with or without the ``/s``."""
    return float(_positive(name, parse_bytes(text.strip().removesuffix("/s"))))


def _figures(foresight: Foresight, outcome: Outcome | None) -> dict[str, Any]:
    choice, prediction = foresight.choice, foresight.choice.prediction
    seconds = prediction.time_seconds if outcome is None else outcome.seconds
    return {
        "schedule": choice.schedule,
        "window": choice.window,
        "spacing": choice.spacing,
        "slots": choice.slots,
        "blocks": choice.blocks,
        "record_fraction": choice.record_fraction,
        "tail": choice.tail,
        "dense": choice.dense,
        "time_seconds": seconds,
        "ideal_seconds": prediction.ideal_seconds,
        "overhead": seconds / prediction.ideal_seconds if prediction.ideal_seconds else 1.0,
        "peak_memory_bytes": prediction.peak_memory_bytes if outcome is None else _held(foresight, outcome),
        "peak_disk_bytes": prediction.peak_disk_bytes,
        "disk_nbytes": choice.disk_nbytes,
        "bytes_written": prediction.bytes_written,
        "bytes_read": prediction.bytes_read,
        "advances": prediction.advances if outcome is None else outcome.advances,
        "writes": prediction.writes if outcome is None else outcome.writes,
        "reads": prediction.reads if outcome is None else outcome.reads,
        "stall_seconds": prediction.stall_seconds if outcome is None else outcome.stall_seconds,
        "on_device": choice.on_device,
        "device_slots": choice.device_slots,
        "peak_device_bytes": prediction.peak_device_bytes,
        "bytes_out": prediction.bytes_out if outcome is None else outcome.bytes_out,
        "bytes_in": prediction.bytes_in if outcome is None else outcome.bytes_in,
        "link_stall_seconds": prediction.link_stall_seconds if outcome is None else outcome.link_stall_seconds,
        "simulated": outcome is not None,
        "alternatives": [asdict(other) for other in foresight.alternatives],
        "improvements": [asdict(gain) for gain in foresight.improvements],
    }


def _held(foresight: Foresight, outcome: Outcome) -> int:
    choice, problem = foresight.choice, foresight.problem
    if choice.on_device:
        return 0
    tapes = 0 if choice.blocks or problem.device else (choice.window - 1) * problem.tape_nbytes
    block = problem.block_nbytes(choice.window)
    return outcome.peak_slots * problem.state_nbytes + outcome.peak_blocks * block + tapes


def _table(foresight: Foresight, outcome: Outcome | None) -> str:
    figures = _figures(foresight, outcome)
    memory = "memory" if foresight.problem.device is None else "device memory"
    rows = [
        ("plan", describe(foresight.choice)),
        ("time", f"{format_seconds(figures['time_seconds'])}, {figures['overhead']:.2f} times the ideal"),
        ("peak memory", format_bytes(figures["peak_memory_bytes"])),
        ("peak disk", format_bytes(figures["peak_disk_bytes"]) + _of_room(foresight.choice)),
        (
            "moved",
            f"{format_bytes(figures['bytes_written'])} written in all, {format_bytes(figures['bytes_read'])} read",
        ),
        ("steps run", f"{figures['advances']:,} plainly"),
        ("waiting", format_seconds(figures["stall_seconds"])),
    ]
    if foresight.problem.device is not None:
        rows[1:3] = [rows[1], *_device_rows(foresight.choice, figures)]
    rows += [
        (
            "instead",
            f"{other.schedule}: {format_seconds(other.time_seconds)}"
            + ("" if other.fits else f", but in {format_bytes(other.peak_memory_bytes)} of {memory}"),
        )
        for other in foresight.alternatives
    ]
    rows += [
        ("better", f"{gain.what}: {format_seconds(gain.time_seconds)}, {format_seconds(gain.saved_seconds)} less")
        for gain in foresight.improvements
    ]
    heading = "replayed in the event model" if outcome is not None else "predicted"
    return "\n".join([heading, *(f"  {name:<13}{text}" for name, text in rows)])


def _of_room(choice: Choice) -> str:
    return "" if choice.disk_nbytes is None else f" of the {format_bytes(choice.disk_nbytes)} there is room for"


def _device_rows(choice: Choice, figures: dict[str, Any]) -> list[tuple[str, str]]:
    how = f"windows of {choice.window:,} steps, taped in one go" if choice.window > 1 else "one step at a time"
    if choice.on_device:
        how = "everything is kept there"
    elif choice.device_slots:
        how = f"windows of {choice.window:,} steps, on {choice.device_slots:,} snapshots"
    moved = f"{format_bytes(figures['bytes_out'])} out, {format_bytes(figures['bytes_in'])} in"
    return [
        ("device", how),
        ("peak device", format_bytes(figures["peak_device_bytes"])),
        ("link", f"{moved}, waiting {format_seconds(figures['link_stall_seconds'])}"),
        ("peak host", format_bytes(figures["peak_memory_bytes"])),
    ]


def _plot(foresight: Foresight, path: str) -> None:
    from longtape.plots import Candidate
    from longtape.plots import time_against_memory as draw

    points = time_against_memory(foresight.problem, foresight.costs)
    candidates = [Candidate(*point) for point in points]
    prediction, device = foresight.choice.prediction, foresight.problem.device
    budget = foresight.problem.memory_nbytes if device is None else device.memory_nbytes
    chosen = Candidate(foresight.choice.schedule, budget, prediction.time_seconds)
    memory = "memory" if device is None else "device memory"
    draw(candidates, chosen, path, ideal_seconds=prediction.ideal_seconds, memory=memory)


if __name__ == "__main__":
    sys.exit(main())
