"""What a gradient costs beside the ideal: the LSTM, the stencil, the executor itself, and planning.

*Ideal* is the same steps forward and backward with nothing stored and nothing run again:
for the LSTM, plain autograd over 50 steps at a time, whose memory is warm; for the
stencil, the bare kernels.  It is timed in the same process, before and after each run.
Every run is a process of its own, and the cases take turns.

``python -m benchmarks.overhead [lstm|stencil|executor|planning] [--repeats N] [--disk DIR]``
"""

from __future__ import annotations

import argparse
import math
import statistics
import tempfile
import time
from typing import Any

import numpy as np

from benchmarks import common

LSTM_LENGTHS = (1_000, 4_000, 16_000, 64_000)
LSTM_MEMORY = 64 * 128 * 1024
"""64 states of 128 KiB."""
STENCIL_LENGTHS = (200, 1_000)
STENCIL_SLOTS = 16
MIB = 2**20


# LSTM -------------------------------------------------------------------------------------------


def lstm(
    steps: int,
    memory: int,
    disk: str | None,
    capture: bool | None = None,
    hidden: int = 256,
    bandwidth: float | None = None,
    compress: str | None = None,
) -> dict[str, Any]:
    """One gradient by `longtape.torch.scan`, after a short one that captures the step.

    `bandwidth` slows storage down to so many bytes per second in each direction.
    """
    import torch

    from benchmarks.lstm import BATCH, INPUTS, Problem
    from longtape.testing.tiers import ThrottledTier
    from longtape.tiers.disk import DiskTier
    from longtape.torch import scan

    problem = Problem(2_000, hidden=hidden)

    class Inputs:
        """As many steps as asked for, from the few that are kept."""

        def __init__(self, length: int) -> None:
            self.length = length

        def __len__(self) -> int:
            return self.length

        def __getitem__(self, step: int) -> torch.Tensor:
            return problem.inputs[step % len(problem.inputs)]

    assert problem.inputs.shape[1:] == (BATCH, INPUTS)

    def gradient(length: int) -> tuple[float, Any]:
        reports: list[Any] = []
        tier = None
        if bandwidth is not None and disk is not None:
            tier = ThrottledTier(DiskTier(disk), write_bytes_per_second=bandwidth, read_bytes_per_second=bandwidth)
        began = time.perf_counter()
        carry, _ = scan(
            problem.step,
            problem.carry,
            Inputs(length),
            memory=memory,
            disk=disk,
            tier=tier,
            capture=capture,
            compress=compress,
            on_report=reports.append,
        )
        torch.autograd.grad(problem.loss(carry), problem.leaves)
        seconds = time.perf_counter() - began
        if tier is not None:
            tier.close()
        return seconds, reports[0]

    ideal = [lstm_ideal(problem)]
    first, _ = gradient(300)
    meter = common.Meter()
    meter.start()
    seconds, report = gradient(steps)
    peak = meter.stop()["peak_bytes"]
    ideal.append(lstm_ideal(problem))
    return {**figures_of(report, seconds, steps, ideal), "rss_growth_bytes": peak, "first_scan_seconds": first}


def lstm_ideal(problem: Any) -> float:
    """Seconds a step of plain autograd over a short sequence, median of 20, or of 5 where steps are long."""
    import torch

    inputs, seconds = problem.inputs[:50], []
    for _ in range(22 if problem.carry[0].shape[1] <= 256 else 7):
        began = time.perf_counter()
        torch.autograd.grad(problem.loss(problem.run(problem.carry, inputs)), problem.leaves)
        seconds.append((time.perf_counter() - began) / len(inputs))
    return statistics.median(seconds[2:])


def lstm_peer(name: str, steps: int, hidden: int = 256) -> dict[str, Any]:
    """One gradient by another way; see `baselines`."""
    from benchmarks import baselines, lstm

    peers = {
        "store everything": lambda: baselines.lstm_store_all(steps, hidden),
        "torch.utils.checkpoint": lambda: baselines.lstm_segments(steps),
        "revolve": lambda: baselines.lstm_revolve(steps, 64),
    }
    ideal = [lstm_ideal(lstm.Problem(100, hidden=hidden))]
    outcome = peers[name]()
    ideal.append(lstm_ideal(lstm.Problem(100, hidden=hidden)))
    per_step = outcome["seconds"] / steps
    return {
        "seconds": outcome["seconds"],
        "seconds_per_step": per_step,
        "ideal_seconds_per_step": statistics.mean(ideal),
        "ratio_to_ideal": per_step / statistics.mean(ideal),
        "rss_growth_bytes": outcome["peak_bytes"],
    }


# Stencil ----------------------------------------------------------------------------------------


def stencil(steps: int, slots: int, disk: str | None, effort: int = 1) -> dict[str, Any]:
    """Forward and adjoint of the stencil by `longtape.Sweep`; with `effort`, of steps so many times as long."""
    import longtape
    from benchmarks.stencil import AllenCahn, initial

    model, weights = AllenCahn(effort=effort), initial(seed=1)
    state = model.state[0].nbytes
    ideal = [_stencil_ideal(model)]
    began = time.perf_counter()
    sweep = longtape.Sweep(model, steps, memory=slots * state, disk=disk)
    prepared = time.perf_counter()
    sweep.forward()
    model.start_adjoint(weights)
    sweep.reverse()
    ended = time.perf_counter()
    ideal.append(_stencil_ideal(model))
    report = sweep.report
    figures = figures_of(report, ended - prepared, steps, ideal)
    return {**figures, "prepare_seconds": prepared - began, "theory": _theory(sweep, steps, slots, report)}


def _stencil_ideal(model: Any) -> float:
    """Seconds a step of the bare kernels, forward and adjoint, median of 10."""
    source, target = model.state, [np.zeros_like(model.state[0])]
    seconds = []
    for _ in range(12):
        began = time.perf_counter()
        model.advance_into(0, source, target)
        model.reverse_from(0, source)
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds[2:])


def _theory(sweep: Any, steps: int, slots: int, report: Any) -> dict[str, float]:
    """What the predictor says for the speeds that storage and kernels had while the run went on."""
    from longtape import Costs, Problem, choose

    trace, state = sweep.trace, report.memory_budget_bytes // slots
    forward = (trace.seconds("forward") + trace.seconds("replay")) / (steps + report.measured.steps_recomputed)
    costs = Costs(
        forward,
        trace.seconds("reverse") / steps,
        write_bytes_per_second=report.measured.bytes_written / max(report.write_seconds, 1e-9) or math.inf,
        read_bytes_per_second=report.measured.bytes_read / max(report.read_seconds, 1e-9) or math.inf,
    )
    choice = choose(Problem(steps, state, slots * state, has_disk=report.writes > 0), costs)
    seconds = choice.prediction.time_seconds
    return {"seconds": seconds, "measured_over_theory": report.measured.seconds / seconds, "spacing": choice.spacing}


# The executor and planning ----------------------------------------------------------------------


class Trivial:
    """A 1 KiB state whose steps cost nothing, so that what is left is the executor's."""

    def __init__(self, span: int) -> None:
        self.state = [np.zeros(256, np.float32)]
        self.max_reverse = span
        self.seconds = 0.0

    def advance(self, start: int, stop: int) -> None:
        began = time.perf_counter()
        self.state[0] += 1
        self.seconds += time.perf_counter() - began

    def reverse(self, start: int, stop: int) -> None:
        pass


def executor(steps: int, span: int) -> dict[str, Any]:
    """Microseconds a step that are not the model's."""
    import longtape

    model = Trivial(span)
    sweep = longtape.Sweep(model, steps, memory=64 * 1024)
    model.seconds = 0.0
    began = time.perf_counter()
    sweep.forward()
    sweep.reverse()
    seconds = time.perf_counter() - began - model.seconds
    return {"microseconds_per_step": seconds / steps * 1e6, "schedule": sweep.plan.schedule}


def planning(steps: int) -> dict[str, Any]:
    """Seconds to choose a plan, and to yield its first thousand actions."""
    from itertools import islice

    from longtape import Costs, Problem, choose
    from longtape.plan.asynchronous import AsynchronousPlan, Layout
    from longtape.plan.stock import Stock

    costs = Costs(1e-3, 2e-3, 1e-3, 1e-3, 1e9, 1e9, 1e-4, 1e-4)
    problem = Problem(steps, MIB, 64 * MIB, has_disk=True, residual_nbytes=4 * MIB)
    began = time.perf_counter()
    choice = choose(problem, costs)
    chosen = time.perf_counter()
    stock = Stock(choice.slots, choice.blocks, steps=steps)
    for _ in islice(AsynchronousPlan(stock, Layout(tail=steps)), 1000):
        break
    return {"choose_seconds": chosen - began, "schedule": choice.schedule}


# Together ---------------------------------------------------------------------------------------


def figures_of(report: Any, seconds: float, steps: int, ideal: list[float]) -> dict[str, Any]:
    per_step, best = seconds / steps, statistics.mean(ideal)
    measured, predicted = report.measured, report.predicted
    return {
        "seconds": seconds,
        "seconds_per_step": per_step,
        "ideal_seconds_per_step": best,
        "ratio_to_ideal": per_step / best,
        "schedule": report.schedule,
        "window": report.window,
        "predicted_seconds": predicted.seconds,
        "sweeps_seconds": measured.seconds,
        "peak_memory_bytes": measured.peak_memory_bytes,
        "peak_disk_bytes": measured.peak_disk_bytes,
        "bytes_written": measured.bytes_written,
        "bytes_read": measured.bytes_read,
        "steps_recomputed": measured.steps_recomputed,
        "stall_seconds": measured.stall_seconds,
        "overlap_fraction": report.overlap_fraction,
    }


def medians(outcomes: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians of the numbers of several runs, with every ratio kept."""
    summary: dict[str, Any] = {}
    for name, value in outcomes[0].items():
        values = [outcome[name] for outcome in outcomes]
        if isinstance(value, dict):
            summary[name] = medians(values)
        elif isinstance(value, (int, float)):
            summary[name] = statistics.median(values)
        else:
            summary[name] = value
    if "ratio_to_ideal" in outcomes[0]:
        summary["ratios_to_ideal"] = [outcome["ratio_to_ideal"] for outcome in outcomes]
    return summary


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("lstm", "stencil", "executor", "planning"))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--disk", default=None, help="directory to spill to; a temporary one if not given")
    parser.add_argument("--lengths", type=int, nargs="*", default=None)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.disk) as disk:
        cases = _cases(arguments.what, disk, arguments.lengths)
        outcomes = common.interleave_apart(cases, repeats=arguments.repeats)
    results = {name: medians(found) for name, found in outcomes.items()}
    settings = {"repeats": arguments.repeats, "lstm_memory_bytes": LSTM_MEMORY, "stencil_slots": STENCIL_SLOTS}
    common.write(f"overhead_{arguments.what}", settings, results)


def _cases(what: str, disk: str, lengths: list[int] | None) -> dict[str, tuple[Any, tuple[Any, ...]]]:
    if what == "lstm":
        found = {f"longtape N={n}": (lstm, (n, LSTM_MEMORY, disk)) for n in lengths or LSTM_LENGTHS}
        return {
            **found,
            "longtape without disk N=4000": (lstm, (4_000, LSTM_MEMORY, None)),
            "plain autograd N=4000": (lstm_peer, ("store everything", 4_000)),
            "torch.utils.checkpoint N=4000": (lstm_peer, ("torch.utils.checkpoint", 4_000)),
            "Revolve, 64 states N=4000": (lstm_peer, ("revolve", 4_000)),
        }
    if what == "stencil":
        found = {f"longtape N={n}": (stencil, (n, STENCIL_SLOTS, disk)) for n in lengths or STENCIL_LENGTHS}
        alone = {f"Revolve alone N={n}": (stencil, (n, STENCIL_SLOTS, None)) for n in lengths or STENCIL_LENGTHS}
        return found | alone
    if what == "executor":
        return {f"reverse in ranges of {span}": (executor, (10**6, span)) for span in (1, 10, 100, 1000)}
    return {f"N={n}": (planning, (n,)) for n in (10**4, 10**6, 10**9)}


if __name__ == "__main__":
    main()
