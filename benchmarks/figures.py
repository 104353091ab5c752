"""Writes the measured figures into README.md and docs/schedules.md, from the JSON under ``benchmarks/results``.

``python -m benchmarks.figures``; what stands between ``<!-- figures:NAME -->`` and
``<!-- /figures -->`` is replaced.
"""

from __future__ import annotations

import json
import re
from typing import Any

from benchmarks import common

README = common.RESULTS.parent.parent / "README.md"


def load(name: str) -> dict[str, Any]:
    document: dict[str, Any] = json.loads((common.RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    return document


def ratios(name: str, heading: str) -> list[str]:
    """A table of time over ideal, memory and disk, a row a case."""
    lines = [f"| {heading} | time / ideal | lowest–highest | memory | disk |", "|---|---|---|---|---|"]
    for case, found in load(name)["results"].items():
        spread = found["ratios_to_ideal"]
        memory = found.get("peak_memory_bytes")
        held = f"{memory / 2**20:,.0f} MiB" if memory is not None else f"{found['rss_growth_bytes'] / 2**20:,.0f} MiB*"
        disk = f"{found['peak_disk_bytes'] / 2**30:,.1f} GiB" if found.get("peak_disk_bytes") else "–"
        ratio = f"{found['ratio_to_ideal']:.2f}"
        lines.append(f"| {case} | {ratio} | {min(spread):.2f}–{max(spread):.2f} | {held} | {disk} |")
    return lines


def jax() -> str:
    """The paragraph on JAX, in Markdown."""
    lines = []
    names = {"mlp_ode": "MLP-ODE step, state of 512 KiB", "lorenz96": "Lorenz-96 step, 40 variables"}
    for part in names:
        found = load(f"jax_scan_{part}")["results"]
        heading = f"{names[part]}, memory {found['memory_bytes'] / 2**20:.0f} MiB"
        lines += [
            f"| {heading} | µs a step | lowest–highest | growth of the resident size | disk |",
            "|---|---|---|---|---|",
        ]
        for case, taken in found["cases"].items():
            spread = {key: 1e3 * taken["milliseconds_per_step"][key] for key in ("median", "lowest", "highest")}
            disk = f"{taken['peak_disk_bytes'] / 2**30:,.1f} GiB" if taken.get("peak_disk_bytes") else "–"
            lines.append(
                f"| {case} | {spread['median']:,.4g} | {spread['lowest']:,.4g}–{spread['highest']:,.4g} "
                f"| {taken['rss_growth_bytes'] / 2**20:,.0f} MiB | {disk} |"
            )
        lines.append("")
    return "\n".join(lines[:-1])


def measured() -> str:
    """The section, in Markdown."""
    machine = load("overhead_lstm")["machine"]
    executor = load("overhead_executor")["results"]
    planning = load("overhead_planning")["results"]
    lines = [
        f"On a virtual machine with {machine['cores']} cores ({machine['cpu']}), one compute thread, runs taken in "
        "turn, medians. *Ideal* is the same steps forward and backward with nothing stored and nothing run again. "
        "Storage and memory are counted; the figures with a star are growth of the resident size instead.",
        "",
        *ratios("overhead_lstm", "LSTM, 256 units, batch 64, memory for 64 states"),
        "",
        *ratios("overhead_stencil", "256³ stencil, states of 64 MiB, memory for 16"),
        "",
        "The executor's own cost on a 1 KiB state and a million steps: "
        + ", ".join(f"{found['microseconds_per_step']:.2f} µs a step with {case}" for case, found in executor.items())
        + ". Choosing a plan: "
        + ", ".join(f"{found['choose_seconds'] * 1e3:.0f} ms for {case}" for case, found in planning.items())
        + ".",
    ]
    return "\n".join(lines)


def observed() -> str:
    """Predictions, noise and the cost of watching, as far as they were measured."""
    lines: list[str] = []
    if (prediction := _found("prediction")) is not None:
        lines += ["| predicted against measured, medians | time | memory |", "|---|---|---|"]
        lines += [
            f"| {case} | {found['time_error']:+.1%} | {found['memory_error']:+.1%} |"
            for case, found in prediction["results"].items()
        ]
        lines.append("")
    if (noise := _found("noise")) is not None:
        lines += ["| noisy disk, time over that without noise | real run | event model |", "|---|---|---|"]
        lines += [
            f"| {case} | {found['measured']:.3f} | {found['simulated']:.3f} |"
            for case, found in noise["results"].items()
        ]
        lines.append("")
    if (surprises := _found("surprises")) is not None:
        lines += [
            "| other costs than the plan was told, real runs | over the best that never waits | forward sweep waited |",
            "|---|---|---|",
        ]
        lines += [
            f"| {case} | {found['over_best_without_waiting']:.3f} | {found['forward_stall_seconds']:.1f} s |"
            for case, found in surprises["results"].items()
        ]
        lines.append("")
    if (thinning := _found("thinning")) is not None:
        extra = [f"{found['extra_a_step']:+.2f} ({case})" for case, found in thinning["results"].items()]
        lines += [
            f"Unknown length and storage for {thinning['settings']['room']} states: advances a step beyond those of an "
            f"even spacing, in real runs: {', '.join(extra)}.",
            "",
        ]
    if (unknown := _found("unknown")) is not None:
        medians = {case: found["median"] for case, found in unknown["results"].items()}
        costs = [
            f"{medians[f'unknown, {where}'] / medians[f'known, {where}'] - 1:+.1%} with {where}"
            for where in ("disk", "memory alone")
            if f"unknown, {where}" in medians
        ]
        lines += [f"An LSTM of unknown length, {unknown['settings']['steps']:,} steps: {', '.join(costs)}.", ""]
    if (observing := _found("observing")) is not None:
        found = observing["results"]
        lines += [
            f"Progress, trace and report take {found['inside_the_observers']['share']:.2%} of the LSTM's time "
            f"(runs with and without them, in pairs: {found['with_over_without']['median'] - 1:+.1%}).",
            "",
        ]
    return "\n".join(lines).rstrip("\n")


def devito() -> str:
    """Acoustic gradients under Devito beside `save=True` and pyrevolve."""
    lines: list[str] = []
    for name in ("devito_acoustic_2d", "devito_acoustic_3d"):
        if (document := _found(name)) is None:
            continue
        shape, steps = document["settings"]["shape"], document["settings"]["steps"]
        heading = f"{' × '.join(map(str, shape))}, {steps:,} steps"
        lines += [f"| {heading} | seconds | over ideal | pyrevolve at equal memory over this |", "|---|---|---|---|"]
        for case, found in document["results"]["cases"].items():
            over = document["results"]["ratios"].get(case, {})
            values = [over.get("over ideal"), over.get("pyrevolve at equal memory over this")]
            cells = ["–" if value is None else f"{value:.2f}" for value in values]
            lines.append(f"| {case} | {found['seconds']['median']:.1f} | {cells[0]} | {cells[1]} |")
        lines.append("")
    return "\n".join(lines).strip()


def planning() -> str:
    """How long it takes to have a schedule, first action to last."""
    lines = ["| | N | first action | all actions |", "|---|---|---|---|"]
    for case, found in load("planning")["results"].items():
        name, steps = case.rsplit(" N=", 1)
        cells = [
            "took too long" if found[key] is None else f"{found[key]:.2g} s" for key in ("first_seconds", "all_seconds")
        ]
        lines.append(f"| {name} | {int(steps):,} | {cells[0]} | {cells[1]} |")
    return "\n".join(lines)


def _found(name: str) -> dict[str, Any] | None:
    return load(name) if (common.RESULTS / f"{name}.json").exists() else None


RESIDUALS = {
    "residuals_lstm": "LSTM, 256 units, batch 64, residuals on disk",
    "residuals_wide": "LSTM, 1,024 units, batch 64, residuals on disk",
    "residuals_stencil": "256³ stencil, a step of 8 kernels, memory for 16 states",
    "residuals_throttled": "LSTM, 256 units, 2,000 steps, 16 MiB, storage slowed to a share of what residuals need",
    "residuals_compression": "the same, with a codec",
}
"""Parts of `benchmarks.residuals`, as far as they were measured."""


def residuals() -> str:
    """What storage that carries residuals, or a share of them, makes of the time."""
    lines: list[str] = []
    for name, heading in RESIDUALS.items():
        if (common.RESULTS / f"{name}.json").exists():
            lines += [*ratios(name, heading), ""]
    if (common.RESULTS / "residuals_growth.json").exists():
        grown = load("residuals_growth")["settings"]["summary"]["bytes_per_step"]
        lines.append(
            "Memory beyond the budget, from 10,000 to 1,000,000 steps of 512 bytes: "
            + ", ".join(f"{max(0.0, value):.1f} bytes a step in a {way}" for way, value in grown.items())
            + "."
        )
    return "\n".join(lines).strip()


CAMPAIGNS = {
    "kills": ("kills", ("kill",)),
    "losses of power": ("cases", ("power", "power_scan")),
    "damaged blocks and files": ("cases", ("damage", "resumed_damage")),
    "failing or short system calls": ("cases", ("errno_sweep", "errno_scan")),
    "runs on slow or stuck storage": ("cases", ("slow_sweep", "slow_scan")),
    "sizes of a full disk": ("cases", ("disk",)),
    "interleavings": ("interleavings", ("races",)),
    "files of any bytes": ("inputs", ("fuzz",)),
}
"""What was counted in which campaigns."""


def durable() -> str:
    """What being resumable costs, and how often faults were tried."""
    lines = []
    if (found := _found("durability")) is not None:
        costs = [f"{case['ratio_to_not_resumable']:.3f} ({name})" for name, case in found["results"].items()]
        steps = found["settings"]["steps"]
        lines.append(
            f"An LSTM run of {steps:,} steps with `resume`, as a multiple of its time without: {', '.join(costs[1:])}."
        )
    counted = []
    for name, (field, files) in CAMPAIGNS.items():
        parts = [part["results"][field] for file in files if (part := _found(f"campaign_{file}")) is not None]
        counted += [f"{sum(parts):,} {name}"] if parts else []
    if counted:
        lines.append(f"`benchmarks.campaigns` tried {', '.join(counted)}: no wrong bit, no hang, no leak.")
    return "\n".join(lines)


def fill(text: str, name: str, content: str) -> str:
    """Replace one spot."""
    pattern = rf"(<!-- figures:{name} -->\n).*?(<!-- /figures -->)"
    return re.sub(pattern, lambda match: f"{match[1]}{content}\n{match[2]}", text, flags=re.DOTALL)


def main() -> None:
    text = fill(README.read_text(encoding="utf-8"), "measured", measured())
    text = fill(text, "observed", observed())
    text = fill(text, "residuals", residuals())
    text = fill(text, "durable", durable())
    text = fill(text, "devito", devito())
    text = fill(text, "jax", jax())
    README.write_text(text, encoding="utf-8")
    page = README.parent / "docs" / "schedules.md"
    page.write_text(fill(page.read_text(encoding="utf-8"), "planning", planning()), encoding="utf-8")


if __name__ == "__main__":
    main()
