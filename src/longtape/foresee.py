"""A plan before it is paid for: the choice, what would be better, and a replay in the event model."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import inf

from longtape.actions import Key, Kind
from longtape.plan.asynchronous import Layout
from longtape.plan.choose import Choice, choose
from longtape.plan.costs import LEAST_TO_PIN, Costs, Problem
from longtape.plan.recording import safety_windows
from longtape.plan.simulate import Outcome, Speeds, simulate


@dataclass(frozen=True, slots=True)
class Improvement:
    """What the run would take with more of something."""

    what: str
    time_seconds: float
    saved_seconds: float


@dataclass(frozen=True, slots=True)
class Foresight:
    """A plan, its alternatives and what would be better."""

    problem: Problem
    costs: Costs
    choice: Choice
    improvements: tuple[Improvement, ...]
    """Those that would save at least a hundredth of the time, the largest saving first."""


def layout_of(choice: Choice, problem: Problem) -> Layout:
    """The choice in the terms of the plan generator."""
    # Where every window is recorded, snapshots only insure them, and one of state 0 does that best.
    least = LEAST_TO_PIN if choice.record_fraction < 1.0 else 1
    return Layout(
        window=choice.window,
        tail=choice.tail,
        fixed_spacing=choice.stall_spacing,
        records=choice.blocks > 0,
        record_fraction=choice.record_fraction,
        stores=choice.uses_disk,
        safety=safety_windows(problem, choice.window),
        pin_initial=problem.pins_initial and choice.uses_disk and choice.slots >= least,
    )


def foresee(problem: Problem, costs: Costs) -> Foresight:
    """Choose a plan and say what twice the memory, or storage twice as fast, would bring.

    Raises:
        BudgetError: The memory cannot hold one state; says the least that would.
        UsageError: Numbers that make no sense.
    """
    choice = choose(problem, costs)
    seconds = choice.prediction.time_seconds
    faster = replace(
        costs,
        write_bytes_per_second=2 * costs.write_bytes_per_second,
        read_bytes_per_second=2 * costs.read_bytes_per_second,
    )
    others = {"twice the memory": (replace(problem, memory_nbytes=2 * problem.memory_nbytes), costs)}
    if problem.has_disk:
        others["storage twice as fast"] = (problem, faster)
    found = [(what, choose(*case).prediction.time_seconds) for what, case in others.items()]
    gains = [Improvement(what, taken, seconds - taken) for what, taken in found if taken < 0.99 * seconds]
    return Foresight(problem, costs, choice, tuple(sorted(gains, key=lambda gain: gain.time_seconds)))


def replay(foresight: Foresight) -> Outcome:
    """Run the chosen plan in the event model; takes time and memory that grow with the number of steps."""
    problem, costs, choice = foresight.problem, foresight.costs, foresight.choice
    steps = problem.steps or 10_000
    block = choice.window * (problem.residual_nbytes or 0)

    def nbytes(key: Key) -> int:
        return problem.state_nbytes if key.kind is Kind.SNAPSHOT else block

    speeds = Speeds(
        costs.forward,
        costs.reverse,
        lambda key: costs.write_seconds(nbytes(key)),
        lambda key: costs.read_seconds(nbytes(key)),
        costs.record,
        costs.pull_back,
    )
    layout = layout_of(choice, problem)
    limit = inf if problem.disk_nbytes is None else problem.disk_nbytes
    return simulate(
        steps,
        choice.slots,
        speeds,
        layout=layout,
        blocks=choice.blocks,
        known=problem.steps is not None,
        storage_limit=limit,
        item_nbytes={Kind.SNAPSHOT: problem.state_nbytes, Kind.RESIDUALS: block},
    )


def time_against_memory(problem: Problem, costs: Costs, *, points: int = 24) -> list[tuple[str, int, float]]:
    """(schedule, budget in bytes, predicted seconds) for budgets from the least that would do upwards."""
    largest = max(problem.memory_nbytes * 8, problem.state_nbytes * 64)
    ratio = (largest / problem.state_nbytes) ** (1 / (points - 1))
    found: list[tuple[str, int, float]] = []
    for k in range(points):
        budget = round(problem.state_nbytes * ratio**k)
        choice = choose(replace(problem, memory_nbytes=budget), costs)
        found += [(choice.schedule, budget, choice.prediction.time_seconds)]
        found += [(name, budget, other.time_seconds) for name, other in choice.alternatives]
    return found
