"""Pictures of a run and of the plans it was chosen from.

This file reads finished traces, reports and plain numbers; it knows neither engine nor plan.
matplotlib is imported when a picture is drawn, and only its object interface is used:
no global figure, no display, safe in any thread.

A run of 20,000 steps has far more spans than a picture has pixels.  Few spans are drawn
one by one; many are summed into columns, and a column shows the *share* of its time that
each activity took, so nothing is lost by painting over.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from longtape.errors import UsageError
from longtape.report import Report
from longtape.sizes import format_bytes, format_seconds

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.transforms import Transform

Floats = npt.NDArray[np.float64]
Path = str | os.PathLike[str]

_COLOURS = {
    "forward": "#3a6ea8",
    "replay": "#eeb04c",
    "reverse": "#4f9d76",
    "copy": "#a9b0ba",
    "wait": "#d62f2f",
    "write": "#7d6bb0",
    "read": "#2f9fa8",
    "out": "#b06d97",
    "in": "#6f9c3a",
    "idle": "#7a1f1f",
}
_MEANINGS = {
    "forward": "forward step",
    "replay": "step run again",
    "reverse": "adjoint step",
    "copy": "copying",
    "wait": "waiting",
    "write": "writing",
    "read": "reading",
    "out": "copying out",
    "in": "copying in",
    "idle": "waiting for a copy",
}
_LANES = (
    ("compute", ("forward", "replay", "reverse", "copy", "wait", "idle")),
    ("writes", ("write",)),
    ("reads", ("read",)),
)
_LINK_LANES = (("link out", ("out",)), ("link in", ("in",)))
"""Drawn where a device was copied from or to."""
_COMPUTE = ("forward", "replay", "reverse", "copy")
_MOST_SPANS_DRAWN_SINGLY = 400
_MOST_COLUMNS = 2000
_SPANS_PER_COLUMN = 12
_TOO_THIN_TO_SEE = 1e-3
_INK = "#33373d"
_LEFT = 0.075


class Timeline(Protocol):
    """What `timeline` reads of a run.  Times are seconds from the start of the run."""

    turned_at: float | None
    """When the forward sweep was over."""

    @property
    def spans(self) -> Iterable[tuple[str, float, float]]:
        """What was done when: (activity, began, ended).

        Activities are ``forward``, ``replay``, ``reverse``, ``copy`` and ``wait`` of the
        computing thread, and ``write`` and ``read`` of the workers; transfers may overlap.  Of a
        device, ``out`` and ``in`` over its link, and ``idle`` while it computes nothing for want of a copy.
        """

    @property
    def levels(self) -> Iterable[tuple[float, int, int]]:
        """Now and then, in order: (time, bytes held in memory, bytes held on storage)."""


class Candidate(NamedTuple):
    """One way a run could be done, for `time_against_memory`."""

    family: str
    """Candidates of one family are joined by a line."""
    memory_nbytes: float
    seconds: float


def timeline(
    trace: Timeline, path: Path, *, report: Report | None = None, window: tuple[float, float] | None = None
) -> None:
    """Draw what a run did when, above the memory and disk it held.

    Args:
        trace: What happened.
        path: Where to write the picture; the suffix says the format.
        report: The run's report, for the title, the prediction and the budget.
        window: Seconds from the start between which to draw; the whole run if not given.

    Raises:
        ImportError: matplotlib is not installed.
        UsageError: Nothing happened in the window.
    """
    figure = _new_figure(11.0, 5.6)
    unions = _unions(trace.spans)
    began, ended = window or (0.0, max((float(union[-1, 1]) for union in unions.values() if len(union)), default=0.0))
    clipped = {activity: _clip(union, began, ended) for activity, union in unions.items()}
    if not any(map(len, clipped.values())):
        raise UsageError(f"a timeline from {began} s to {ended} s was asked for, but nothing happened in that time")
    lanes, memory, disk = figure.subplots(3, sharex=True, height_ratios=[3.4, 1, 1])
    figure.subplots_adjust(left=_LEFT, right=0.91, top=0.79, bottom=0.095, hspace=0.16)
    _draw_lanes(lanes, clipped, began, ended)
    _draw_levels(memory, disk, trace, began, ended, None if report is None else report.memory_budget_bytes)
    if trace.turned_at is not None and began <= trace.turned_at <= ended:
        _mark_turn([lanes, memory, disk], trace.turned_at)
    _legend(lanes, clipped)
    disk.set_xlim(began, ended)
    disk.set_xlabel("seconds from the start", color=_INK)
    title = "Timeline" if report is None else f"{report.title}: {report.steps:,} steps"
    figure.text(_LEFT, 0.945, title, size=13, weight="bold", color=_INK)
    whole = report if window is None else None
    summary = _seen(clipped, ended - began) if whole is None else _reported(whole)
    figure.text(_LEFT, 0.895, " · ".join(summary), size=9.5, color=_INK)
    figure.savefig(path, dpi=150)


def time_against_memory(
    candidates: Iterable[Candidate],
    chosen: Candidate,
    path: Path,
    *,
    ideal_seconds: float | None = None,
    memory: str = "memory",
) -> None:
    """Draw what each way to run costs in time and memory, and which was chosen.

    Args:
        candidates: Every plan that was considered.
        chosen: The plan that is run; it need not be among the candidates.
        path: Where to write the picture; the suffix says the format.
        ideal_seconds: Time without any recomputation or waiting, drawn as a floor.
        memory: What memory it is.

    Raises:
        ImportError: matplotlib is not installed.
    """
    figure = _new_figure(7.5, 4.6)
    axes = figure.subplots()
    figure.subplots_adjust(left=0.1, right=0.74, top=0.88, bottom=0.14)
    families: dict[str, list[Candidate]] = {}
    for candidate in candidates:
        families.setdefault(candidate.family, []).append(candidate)
    palette = [_COLOURS[name] for name in ("replay", "forward", "reverse", "write", "read")]
    for index, (family, members) in enumerate(families.items()):
        members.sort(key=lambda candidate: candidate.memory_nbytes)
        budgets, seconds = [c.memory_nbytes for c in members], [c.seconds for c in members]
        axes.plot(budgets, seconds, "o-", ms=3.5, lw=1.6, color=palette[index % len(palette)], label=family)
    if ideal_seconds is not None:
        axes.axhline(ideal_seconds, color=_INK, lw=1, ls=":", label="no recomputation")
    axes.plot([chosen.memory_nbytes], [chosen.seconds], "*", ms=17, color=_COLOURS["wait"], mec="white", label="chosen")
    note = f"{format_bytes(round(chosen.memory_nbytes))}, {format_seconds(chosen.seconds)}"
    axes.annotate(
        note,
        (chosen.memory_nbytes, chosen.seconds),
        xytext=(0, -20),
        ha="center",
        textcoords="offset points",
        color=_INK,
        bbox={"color": "white", "alpha": 0.85, "pad": 1.5, "lw": 0},
    )
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda nbytes, _: format_bytes(round(nbytes)))
    # With one or two slots Revolve takes a hundred times longer; that is off the picture, or hides the rest.
    highest = max(max(c.seconds for c in members) for members in families.values()) if families else chosen.seconds
    axes.set_ylim(0, 1.05 * min(highest, 4 * chosen.seconds))
    axes.set_xlabel(f"{memory} for snapshots, residuals and transfers", color=_INK)
    axes.set_ylabel("seconds", color=_INK)
    axes.set_title(f"Time against memory: {chosen.family} was chosen", loc="left", weight="bold", color=_INK)
    axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1), frameon=False, labelcolor=_INK)
    axes.grid(color="#e4e6ea", lw=0.7)
    _bare(axes)
    figure.savefig(path, dpi=150)


def _new_figure(width: float, height: float) -> Figure:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("a picture needs matplotlib: pip install 'longtape[plot]'") from error
    return Figure(figsize=(width, height))


def _draw_lanes(axes: Axes, unions: dict[str, Floats], began: float, ended: float) -> None:
    """A lane each, the computing thread on top; as high as its share of the time."""
    duration = ended - began
    lanes = _LANES + tuple(lane for lane in _LINK_LANES if any(len(unions[activity]) for activity in lane[1]))
    for row, (_, activities) in enumerate(lanes):
        bottom = 1.25 * (len(lanes) - 1 - row)
        axes.axhspan(bottom, bottom + 1, color="#f3f4f6", lw=0, zorder=0)
        present = {activity: unions[activity] for activity in activities if len(unions[activity])}
        if sum(map(len, present.values())) <= _MOST_SPANS_DRAWN_SINGLY:
            _draw_singly(axes, present, bottom)
        else:
            _draw_columns(axes, present, bottom, began, ended)
        working = [unions[activity] for activity in activities if activity not in ("wait", "idle")]
        busy = _measure(_merge(working)) / duration
        axes.text(1.008, bottom + 0.5, f"{100 * busy:.0f} % busy", transform=_beside(axes), va="center", color=_INK)
    bottoms = [1.25 * (len(lanes) - 1 - row) + 0.5 for row in range(len(lanes))]
    axes.set_yticks(bottoms, [lane for lane, _ in lanes])
    axes.set_ylim(-0.12, 1.25 * len(lanes) - 0.13)
    _bare(axes, "left", "bottom")
    axes.tick_params(length=0)


def _draw_singly(axes: Axes, unions: dict[str, Floats], bottom: float) -> None:
    for activity, union in unions.items():
        bars = [(begin, end - begin) for begin, end in union.tolist()]
        axes.broken_barh(bars, (bottom, 1), color=_COLOURS[activity], lw=0)


def _draw_columns(axes: Axes, unions: dict[str, Floats], bottom: float, began: float, ended: float) -> None:
    """Stack the share that each activity has of each column; waits come last, so they hang from the top."""
    spans = sum(map(len, unions.values()))
    columns = min(max(spans // _SPANS_PER_COLUMN, 100), _MOST_COLUMNS)
    edges = np.linspace(began, ended, columns + 1)
    low = np.zeros(columns)
    for activity, union in unions.items():
        high = np.minimum(low + np.diff(_busy_until(union, edges)) / np.diff(edges), 1.0)
        axes.stairs(bottom + high, edges, baseline=bottom + low, fill=True, color=_COLOURS[activity], lw=0)
        low = high


def _draw_levels(  # noqa: PLR0913 - two panels, one time axis
    memory: Axes, disk: Axes, trace: Timeline, began: float, ended: float, limit: int | None
) -> None:
    """Bytes held, as the range within each column, so that a peak is never averaged away."""
    levels = np.array(list(trace.levels), dtype=np.float64).reshape(-1, 3)
    for axes, column, name, colour in ((memory, 1, "memory", "#5b6472"), (disk, 2, "disk", _COLOURS["write"])):
        budget = limit if column == 1 else None
        scale, unit = _byte_unit(max(levels[:, column].max(initial=0.0), budget or 0.0))
        low, high, edges = _envelope(levels[:, 0], levels[:, column] / scale, began, ended)
        axes.stairs(low, edges, fill=True, color=colour, alpha=0.75, lw=0)
        axes.stairs(high, edges, baseline=low, fill=True, color=colour, alpha=0.4, lw=0)
        if budget is not None:
            axes.axhline(budget / scale, color=_INK, lw=1, ls=":")
            axes.text(1.008, budget / scale, "budget", transform=_beside(axes), va="center", color=_INK)
        axes.set_ylim(0, 1.15 * max(high.max(initial=0.0), (budget or 0) / scale, 1e-9))
        axes.set_ylabel(f"{name}\n{unit}", color=_INK)
        axes.yaxis.set_label_coords(-0.045, 0.5)
        _bare(axes)


def _mark_turn(panels: list[Axes], turn: float) -> None:
    for axes in panels:
        axes.axvline(turn, color=_INK, lw=1, ls=(0, (4, 3)))
    panels[0].annotate(
        "turn",
        (turn, 1),
        xycoords=("data", "axes fraction"),
        xytext=(0, 1),
        textcoords="offset points",
        ha="center",
        size=9,
        color=_INK,
        annotation_clip=True,
    )


def _legend(axes: Axes, unions: dict[str, Floats]) -> None:
    from matplotlib.patches import Patch

    total = sum(map(_measure, unions.values()))
    shown = [activity for activity in _MEANINGS if _measure(unions[activity]) > _TOO_THIN_TO_SEE * total]
    patches = [Patch(color=_COLOURS[activity], label=_MEANINGS[activity]) for activity in shown]
    axes.legend(
        handles=patches,
        ncols=len(patches),
        loc="lower left",
        bbox_to_anchor=(-0.007, 1.06),
        frameon=False,
        labelcolor=_INK,
        fontsize=9.5 if len(patches) <= len(_COMPUTE) + 3 else 8.0,
        handlelength=1.1,
        borderpad=0,
    )


def _reported(report: Report) -> list[str]:
    """The whole run in a line, with the figures of its report."""
    took, said = report.measured, report.predicted
    parts = [f"{format_seconds(took.seconds)} ({format_seconds(said.seconds)} predicted)"]
    if report.overlap_fraction is not None:
        transfers = format_seconds(report.write_seconds + report.read_seconds)
        parts.append(f"{report.overlap_fraction:.1%} of {transfers} of transfers overlapped")
    if report.device is not None and report.device.links:
        parts.append(f"stood still for copies for {format_seconds(report.device.idle_seconds)}")
        return [*parts, f"waited {format_seconds(took.stall_seconds)}"]
    parts.append(f"waited {format_seconds(took.stall_seconds)}")
    parts.append(
        f"at most {format_bytes(took.peak_memory_bytes)} of memory, {format_bytes(took.peak_disk_bytes)} of disk"
    )
    return parts


def _seen(unions: dict[str, Floats], duration: float) -> list[str]:
    """What the spans alone say of a stretch of a run."""
    parts = [format_seconds(duration)]
    transfers = _merge([unions["write"], unions["read"]])
    if len(transfers):
        steps = _merge([unions[activity] for activity in _COMPUTE])
        both = _measure(transfers) + _measure(steps) - _measure(_merge([transfers, steps]))
        parts.append(f"compute went on during {both / _measure(transfers):.1%} of the time in which bytes moved")
    return [*parts, f"waited {format_seconds(_measure(unions['wait']))}"]


# Intervals: an (n, 2) array of begin and end, sorted and disjoint once merged.


def _unions(spans: Iterable[tuple[str, float, float]]) -> dict[str, Floats]:
    """The time each activity took, as disjoint intervals that start in order."""
    sorted_out: dict[str, list[tuple[float, float]]] = {activity: [] for activity in _COLOURS}
    for activity, began, ended in spans:
        sorted_out[activity].append((began, ended))
    return {
        activity: _merge([np.array(intervals, dtype=np.float64).reshape(-1, 2)], touching=False)
        for activity, intervals in sorted_out.items()
    }


def _merge(parts: list[Floats], *, touching: bool = True) -> Floats:
    """Disjoint intervals that cover what `parts` cover; intervals that only touch are joined if `touching`."""
    intervals = np.concatenate(parts)
    intervals = intervals[np.argsort(intervals[:, 0], kind="stable")]
    if len(intervals) == 0:
        return intervals
    ends = np.maximum.accumulate(intervals[:, 1])
    apart = intervals[1:, 0] > ends[:-1] if touching else intervals[1:, 0] >= ends[:-1]
    first = np.flatnonzero(np.concatenate([[True], apart]))
    last = np.concatenate([first[1:] - 1, [len(ends) - 1]])
    return np.stack([intervals[first, 0], ends[last]], axis=1)


def _clip(union: Floats, began: float, ended: float) -> Floats:
    clipped = np.clip(union, began, ended)
    return clipped[clipped[:, 1] > clipped[:, 0]]


def _measure(union: Floats) -> float:
    return float((union[:, 1] - union[:, 0]).sum())


def _busy_until(union: Floats, times: Floats) -> Floats:
    """Time covered by `union` before each of `times`: piecewise linear, so sums over columns are exact."""
    if len(union) == 0:
        return np.zeros_like(times)
    ended = np.cumsum(union[:, 1] - union[:, 0])
    began = np.concatenate([[0.0], ended[:-1]])
    covered: Floats = np.interp(times, union.ravel(), np.stack([began, ended], axis=1).ravel())
    return covered


def _envelope(times: Floats, values: Floats, began: float, ended: float) -> tuple[Floats, Floats, Floats]:
    """Lowest and highest value of a step function within each column, and the columns' edges."""
    edges = np.linspace(began, ended, _MOST_COLUMNS // 2 + 1)
    index = np.searchsorted(times, edges, side="right")  # values known by each edge
    held = np.concatenate([[0.0], values])[index]  # the value at each edge
    low, high = held[:-1].copy(), held[:-1].copy()
    inside = (times >= began) & (times <= ended)
    column = np.minimum(np.searchsorted(edges, times[inside], side="right") - 1, len(low) - 1)
    np.minimum.at(low, column, values[inside])
    np.maximum.at(high, column, values[inside])
    return low, high, edges


def _byte_unit(nbytes: float) -> tuple[float, str]:
    for power, unit in ((4, "TiB"), (3, "GiB"), (2, "MiB"), (1, "KiB")):
        if nbytes >= 1024**power:
            return float(1024**power), unit
    return 1.0, "B"


def _beside(axes: Axes) -> Transform:
    """Coordinates to the right of a panel: x in panel widths, y as on its axis."""
    return axes.get_yaxis_transform()


def _bare(axes: Axes, *more: str) -> None:
    for side in ("top", "right", *more):
        axes.spines[side].set_visible(False)
    axes.tick_params(colors=_INK, labelsize=9)
