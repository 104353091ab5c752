"""A plan before it is paid for: the choice, what would be better, and a replay in the event model."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import inf

from longtape.actions import Key, Kind
from longtape.plan.asynchronous import Rules
from longtape.plan.choice import layout_of
from longtape.plan.choose import Choice, choose
from longtape.plan.costs import Costs, Device, Problem
from longtape.plan.nested import alone, least_device_nbytes
from longtape.plan.predict import Prediction, can_record, recorded_seconds
from longtape.plan.simulate import Outcome, Speeds, simulate

STORAGE_BYTES_PER_SECOND = 1e9
"""Of an ordinary solid-state disk, to say what one would bring where there is none."""


@dataclass(frozen=True, slots=True)
class Improvement:
    """What the run would take with more of something."""

    what: str
    time_seconds: float
    saved_seconds: float


@dataclass(frozen=True, slots=True)
class Alternative:
    """Another schedule for the same job."""

    schedule: str
    time_seconds: float
    peak_memory_bytes: int
    fits: bool
    """Whether it fits the budget; storing everything is listed even where it does not.

    With a device, that is in the memory of the device.
    """


@dataclass(frozen=True, slots=True)
class Foresight:
    """A plan, its alternatives and what would be better."""

    problem: Problem
    costs: Costs
    choice: Choice
    improvements: tuple[Improvement, ...]
    """Those that would save at least a hundredth of the time, the largest saving first."""
    alternatives: tuple[Alternative, ...] = ()
    """The best of each other schedule, the quickest first; what storing everything would need is always among them."""


def foresee(problem: Problem, costs: Costs) -> Foresight:
    """Choose a plan, and say what more memory or faster storage would bring and how other schedules compare.

    Raises:
        BudgetError: The memory cannot hold one state; says the least that would.
        UsageError: Numbers that make no sense.
    """
    choice = choose(problem, costs)
    seconds = choice.prediction.time_seconds
    found = [(what, choose(*case).prediction.time_seconds) for what, case in _better(problem, costs).items()]
    gains = [Improvement(what, taken, seconds - taken) for what, taken in found if taken < 0.99 * seconds]
    return Foresight(
        problem,
        costs,
        choice,
        tuple(sorted(gains, key=lambda gain: gain.time_seconds)),
        tuple(sorted(_alternatives(problem, costs, choice), key=lambda other: other.time_seconds)),
    )


def _better(problem: Problem, costs: Costs) -> dict[str, tuple[Problem, Costs]]:
    """What the user could give more of."""
    memory = "memory" if problem.device is None else "host memory"
    found = {
        f"{words} the {memory}": (replace(problem, memory_nbytes=times * problem.memory_nbytes), costs)
        for words, times in (("twice", 2), ("four times", 4))
    }
    if problem.device is not None:
        found |= _better_device(problem, problem.device, costs)
    if not problem.has_disk:
        speed = dict.fromkeys(("write_bytes_per_second", "read_bytes_per_second"), STORAGE_BYTES_PER_SECOND)
        found["storage at 1 GB/s"] = (replace(problem, has_disk=True), replace(costs, **speed))
        return found
    for words, times in (("twice", 2), ("four times", 4)):
        faster = replace(
            costs,
            write_bytes_per_second=times * costs.write_bytes_per_second,
            read_bytes_per_second=times * costs.read_bytes_per_second,
        )
        found[f"storage {words} as fast"] = (problem, faster)
    if problem.disk_nbytes is not None:
        found["storage without a limit"] = (replace(problem, disk_nbytes=None), costs)
    return found


def _better_device(problem: Problem, device: Device, costs: Costs) -> dict[str, tuple[Problem, Costs]]:
    found = {}
    for words, times in (("twice", 2), ("four times", 4)):
        larger = replace(device, memory_nbytes=times * device.memory_nbytes)
        found[f"{words} the device memory"] = (replace(problem, device=larger), costs)
        faster = replace(
            costs,
            out_bytes_per_second=times * costs.out_bytes_per_second,
            in_bytes_per_second=times * costs.in_bytes_per_second,
        )
        found[f"a link {words} as fast"] = (problem, faster)
    return found


def _alternatives(problem: Problem, costs: Costs, choice: Choice) -> Iterator[Alternative]:
    for name, other in choice.alternatives:
        yield Alternative(name, other.time_seconds, other.peak_memory_bytes, fits=True)
    found = ((choice.schedule, choice.prediction), *choice.alternatives)
    # Behind a device, all windows may be kept and their steps run again for all that.
    if problem.steps is None or any(name == "store_all" and _is_ideal(problem, kept) for name, kept in found):
        return
    item = problem.residual_nbytes if costs.record is not None and problem.residual_nbytes else problem.state_nbytes
    within = problem if problem.device is None else alone(problem)
    enough = replace(within, memory_nbytes=problem.state_nbytes + (problem.steps + 1) * item, has_disk=False)
    everything = choose(enough, costs).prediction
    yield Alternative("store_all", everything.time_seconds, everything.peak_memory_bytes, fits=False)


def _is_ideal(problem: Problem, prediction: Prediction) -> bool:
    return problem.device is None or prediction.overhead < 1.01


def replay(foresight: Foresight, rules: Rules | None = None) -> Outcome:
    """Run the chosen plan in the event model; takes time and memory that grow with the number of steps."""
    problem, costs, choice = foresight.problem, foresight.costs, foresight.choice
    steps = problem.steps or 10_000
    block = problem.block_nbytes(choice.window)

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
    if problem.device is not None and not choice.on_device:
        taped = choice.window > 1 and not choice.device_slots and can_record(problem, costs)
        speeds = replace(
            speeds,
            reverse=recorded_seconds(costs) if taped else costs.reverse,
            copy_out=lambda key: costs.out_seconds(nbytes(key)),
            copy_in=lambda key: costs.in_seconds(nbytes(key)),
            staging=problem.device.staging,
            device_slots=choice.device_slots,
        )
    layout = layout_of(choice)
    limit = inf if problem.disk_nbytes is None else problem.disk_nbytes
    return simulate(
        steps,
        choice.slots,
        speeds,
        layout=layout,
        rules=rules,
        blocks=choice.blocks,
        known=problem.steps is not None,
        storage_limit=limit,
        item_nbytes={Kind.SNAPSHOT: problem.state_nbytes, Kind.RESIDUALS: block},
    )


def time_against_memory(problem: Problem, costs: Costs, *, points: int = 24) -> list[tuple[str, int, float]]:
    """(schedule, budget in bytes, predicted seconds) for budgets from the least that would do upwards.

    With a device it is the device's budget that varies.
    """
    device = problem.device
    least = max(1, problem.state_nbytes if device is None else least_device_nbytes(problem))
    given = problem.memory_nbytes if device is None else device.memory_nbytes
    ratio = (max(given * 8, least * 64) / least) ** (1 / (points - 1))
    found: list[tuple[str, int, float]] = []
    for k in range(points):
        budget = round(least * ratio**k)
        larger = replace(problem, memory_nbytes=budget)
        if device is not None:
            larger = replace(problem, device=replace(device, memory_nbytes=budget))
        choice = choose(larger, costs)
        found += [(choice.schedule, budget, choice.prediction.time_seconds)]
        found += [(name, budget, other.time_seconds) for name, other in choice.alternatives]
    return found
