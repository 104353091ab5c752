"""Whether what a journal says can be: the checks between a sound checksum and a run that goes by it.

Owns them all; each returns the first fault in words for a sentence that begins "it says", or
None.  No I/O.

A checksum tells a record from noise, not from a mistake: a value that was written wrongly, or
by somebody else, comes with a right one.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import fields
from itertools import pairwise
from math import inf, isfinite
from typing import TYPE_CHECKING, Any

from longtape.actions import Kind
from longtape.plan.choose import Choice
from longtape.plan.costs import Costs, Problem

if TYPE_CHECKING:
    from longtape.durable.points import Point

_MOST = 1 << 62
_MOST_SECONDS = 1e9
"""Of one step, or one transfer."""
_SCHEDULES = ("store_all", "revolve", "asynchronous", "residuals")


def is_count(value: Any, *, most: int = _MOST) -> bool:
    """An integer from 0 on."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= most


def is_amount(value: Any, *, most: float = inf) -> bool:
    """A finite number from 0 on."""
    return isinstance(value, int | float) and not isinstance(value, bool) and isfinite(value) and 0 <= value <= most


def of_plan(choice: Choice, costs: Costs, steps: Any) -> str | None:
    """A plan by itself."""
    if not is_count(steps) or not steps:
        return f"that the run has {steps!r:.60} steps"
    least_most = {
        "window": (1, steps), "slots": (1, 1 << 40), "blocks": (0, 1 << 40), "tail": (0, steps), "dense": (0, steps),
        "device_slots": (0, 0), "safety": (1, _MOST),
    }  # fmt: skip
    for name, (least, most) in least_most.items():
        value = getattr(choice, name)
        if not is_count(value, most=most) or value < least:
            return f"{name}={value!r:.60} of a plan for {steps:,} steps"
    for name in ("stall_spacing", "longest_piece", "staging", "held"):
        value = getattr(choice, name)
        if value is not None and (not is_count(value) or not value):
            return f"{name}={value!r:.60} of a plan for {steps:,} steps"
    if choice.disk_nbytes is not None and not is_count(choice.disk_nbytes):
        return f"disk_nbytes={choice.disk_nbytes!r:.60}"
    for name, value in (("records", choice.blocks > 0), ("on_device", False), ("out_seconds", 0), ("in_seconds", 0)):
        if getattr(choice, name) != value:
            return f"{name}={getattr(choice, name)!r:.60} of a plan with {choice.blocks:,} blocks"
    if choice.schedule not in _SCHEDULES or choice.pins_initial not in (True, False):
        return f"that the plan is {choice.schedule!r:.60}, pins_initial={choice.pins_initial!r:.60}"
    if not is_amount(choice.spacing, most=1 << 40) or not choice.spacing:
        return f"spacing={choice.spacing!r:.60} of a plan for {steps:,} steps"
    if not is_amount(choice.record_fraction, most=1.0) or (choice.record_fraction and not choice.blocks):
        return f"record_fraction={choice.record_fraction!r:.60} of a plan with {choice.blocks:,} blocks"
    return _of_numbers(choice.prediction, ()) or _of_costs(costs)


def _of_costs(costs: Costs) -> str | None:
    for name in ("forward", "reverse"):
        if getattr(costs, name) is None:
            return f"{name}=None"
    speeds = tuple(field.name for field in fields(Costs) if field.name.endswith("bytes_per_second"))
    for name in speeds:
        value = getattr(costs, name)
        if value != inf and (not is_amount(value) or not value):
            return f"{name}={value!r:.60}"
    return _of_numbers(costs, speeds, most=_MOST_SECONDS)


def _of_numbers(found: Any, but: Iterable[str], *, most: float = inf) -> str | None:
    for field in fields(found):
        value = getattr(found, field.name)
        if field.name in but or (value is None and field.default is None):
            continue
        if not (is_count(value) if field.type == "int" else is_amount(value, most=most)):
            return f"{field.name}={value!r:.60}"
    return None


def of_plan_for(choice: Choice, problem: Problem) -> str | None:
    """A plan that is to be followed for this problem; what it takes of memory is looked at elsewhere."""
    if choice.blocks and problem.residual_nbytes is None:
        return f"{choice.blocks:,} residual blocks of a job that does not record"
    if not choice.blocks and choice.window > problem.max_window:
        return f"window={choice.window:,} of a job whose adjoint takes {problem.max_window:,} steps at once"
    if choice.initial_is_free is not problem.initial_is_free:
        return f"initial_is_free={choice.initial_is_free!r:.60} of another kind of job"
    return None


def of_point(point: Point, steps: int, window: int) -> str | None:
    """Where a run was, after one more record; those before were looked at."""
    if point.reached > steps or point.turned != (point.reached == steps) or not _is_edge(point.reached, steps, window):
        turned = "turned" if point.turned else "not turned"
        return f"that step {point.reached:,} of {steps:,} was reached, in windows of {window:,}, and it has {turned}"
    if point.rows:
        rows, before = point.rows[-1], point.rows[-2].stop if len(point.rows) > 1 else 0
        if rows.start != before or rows.stop <= rows.start or rows.stop > steps:
            return f"that rows {rows.start:,} to {rows.stop:,} of {steps:,} come after row {before:,}"
        if rows.stop < point.reached:
            return f"that there are {rows.stop:,} rows, and step {point.reached:,} was reached"
    standing = point.standing
    if standing is not None and not standing.start == standing.stop == point.reached:
        return f"that sums are of steps {standing.start:,} to {standing.stop:,}, and step {point.reached:,} was reached"
    return _of_adjoint(point, steps, window)


def _of_adjoint(point: Point, steps: int, window: int) -> str | None:
    adjoint = point.adjoint
    if point.bars:
        bars, before = point.bars[-1], point.bars[-2].start if len(point.bars) > 1 else steps
        if bars.stop != before or bars.start >= bars.stop:
            return f"that cotangents of rows {bars.start:,} to {bars.stop:,} come after row {before:,} of {steps:,}"
    if adjoint is None:
        return "cotangents of rows without an adjoint" if point.bars else None
    if point.seed is None or not point.turned:
        return "an adjoint of a run that has not turned"
    if adjoint.start != adjoint.stop or adjoint.start > steps or not _is_edge(adjoint.start, steps, window):
        return f"an adjoint of steps {adjoint.start:,} to {adjoint.stop:,} of {steps:,}, in windows of {window:,}"
    if point.bars and point.bars[-1].start != adjoint.start:
        return f"cotangents down to row {point.bars[-1].start:,}, and an adjoint at step {adjoint.start:,}"
    return None


def _is_edge(step: int, steps: int, window: int) -> bool:
    return step == steps or step % window == 0


def of_items(point: Point, steps: int, window: int, block: int) -> str | None:
    """What is stored, and where."""
    end = block
    for key, place in sorted(point.items.items(), key=lambda item: item[1].offset):
        if key.kind is not Kind.PARTS and (key.step > steps or not _is_edge(key.step, steps, window)):
            return f"that {key} is stored, of {steps:,} steps in windows of {window:,}"
        if place.offset < end or place.offset % block:
            return f"that {key} lies at byte {place.offset:,}, in the place of another item"
        end = place.offset + place.reserved
    names = sorted((stretch.first, stretch.count) for stretch in point.stretches)
    for (first, count), (after, _) in pairwise(names):
        if first + count > after:
            return f"that part {after:,} belongs to two stretches"
    return None
