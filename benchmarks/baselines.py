"""The peers: how the same gradients are had without Longtape.

For the LSTM: plain autograd that keeps everything; `torch.utils.checkpoint` over √N
segments; Revolve in memory; and, as the *ideal*, plain autograd over a sequence so short
that its memory is warm.  For the stencil: the bare kernels as the ideal; Revolve in
memory; pyrevolve in memory; and the multistage schedule of checkpoint_schedules, part
of it on disk.  The two packages are used where installed: ``pip install '.[bench]'``.

Each function sets its problem up, and only then looks at the clock.

``python -m benchmarks.baselines [lstm|stencil]``
"""

from __future__ import annotations

import argparse
import math
import statistics
import tempfile
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from benchmarks import common, stencil
from longtape.plan.binomial import advances, split

Outcome = dict[str, float]
"""``seconds``, ``peak_bytes`` beyond the problem itself, and ``gradient_norm`` to compare by."""


class Steps(Protocol):
    """What `revolve` drives."""

    def save(self, slot: int) -> None: ...
    def load(self, slot: int) -> None: ...
    def advance(self, start: int, stop: int) -> None: ...
    def turn(self) -> None: ...
    def reverse(self, index: int) -> None: ...


def revolve(job: Steps, steps: int, slots: int) -> int:
    """Revolve in memory, as one writes it by hand: synchronous, one step's adjoint at a time.

    Returns:
        Plain steps run.  The one that yields the final state is not among them: it is run in `turn`.
    """
    job.save(0)
    kept, count = [0], 0  # slot j holds state kept[j]
    for target in reversed(range(steps)):
        if kept[-1] > target:
            kept.pop()
        position = kept[-1]
        if target < steps - 1:
            job.load(len(kept) - 1)
        while position < target:
            free = slots - len(kept) + 1
            reach = split(target + 1 - position, free) if free > 1 else target - position
            job.advance(position, position + reach)
            position, count = position + reach, count + reach
            if position < target:
                job.save(len(kept))
                kept.append(position)
        if target == steps - 1:
            job.turn()
        job.reverse(target)
    return count


# LSTM ---------------------------------------------------------------------------------------


def lstm_store_all(steps: int, hidden: int = 256) -> Outcome:
    """Plain autograd: a graph of every step."""
    from benchmarks.lstm import Problem

    problem = Problem(steps, hidden=hidden)
    return _timed(lambda: problem.loss(problem.run(problem.carry, problem.inputs)).backward(), problem.leaves)


def lstm_segments(steps: int) -> Outcome:
    """`torch.utils.checkpoint` over √N segments."""
    from torch.utils.checkpoint import checkpoint

    from benchmarks.lstm import Problem

    problem = Problem(steps)
    length = math.ceil(math.sqrt(steps))

    def run() -> None:
        carry = problem.carry
        for segment in problem.inputs.split(length):
            carry = checkpoint(problem.run, carry, segment, use_reentrant=False)
        problem.loss(carry).backward()

    return _timed(run, problem.leaves)


def lstm_revolve(steps: int, slots: int) -> Outcome:
    """Revolve in memory."""
    from benchmarks.lstm import InPlace, Problem

    problem = Problem(steps)
    meter = common.Meter()
    job = InPlace(problem, slots)
    meter.start()
    revolve(job, steps, slots)
    return {**meter.stop(), "gradient_norm": _norm(job.result)}


def lstm_ideal(steps: int, sequence: int = 50) -> Outcome:
    """Plain autograd over a short sequence, repeated until `steps` steps are done.

    The gradient's norm is that of one short sequence, and not to be compared.
    """
    from benchmarks.lstm import Problem

    problem = Problem(sequence)
    rounds = max(1, steps // sequence)

    def run() -> None:
        for _ in range(rounds):
            problem.loss(problem.run(problem.carry, problem.inputs)).backward()

    run()
    outcome = _timed(run, problem.leaves)
    return {**outcome, "seconds": outcome["seconds"] * steps / (rounds * sequence)}


def _timed(run: Callable[[], None], leaves: list[Any]) -> Outcome:
    for leaf in leaves:
        leaf.grad = None
    meter = common.Meter()
    meter.start()
    run()
    return {**meter.stop(), "gradient_norm": _norm([leaf.grad for leaf in leaves])}


def _norm(gradients: list[Any]) -> float:
    return math.sqrt(sum(float(gradient.double().square().sum()) for gradient in gradients))


# Stencil ------------------------------------------------------------------------------------


class StencilJob:
    """The stencil as `revolve` drives it, with preallocated and page-faulted slots."""

    def __init__(self, model: stencil.AllenCahn, side: int, slots: int) -> None:
        self.model = model
        self._weights = weights(side)
        self._slots = np.full((slots, side, side, side), 1, np.float32)
        self._final = np.empty((side, side, side), np.float32)

    def save(self, slot: int) -> None:
        np.copyto(self._slots[slot], self.model.state[0])

    def load(self, slot: int) -> None:
        np.copyto(self.model.state[0], self._slots[slot])

    def advance(self, start: int, stop: int) -> None:
        self.model.advance(start, stop)

    def turn(self) -> None:
        self.model.advance_into(0, self.model.state, [self._final])
        self.model.start_adjoint(self._weights)

    def reverse(self, index: int) -> None:
        self.model.reverse(index, index + 1)


def weights(side: int) -> stencil.Field:
    """The adjoint of the final state."""
    return stencil.initial(side, seed=1)


def stencil_ideal(side: int, steps: int) -> Outcome:
    """Every step and every adjoint step once, nothing kept: the time no schedule can beat.

    The adjoints are those of a wrong state, so the norm is not to be compared.
    """
    model, start = _model(side), weights(side)
    meter = common.Meter()
    meter.start()
    model.advance(0, steps)
    model.start_adjoint(start)
    for index in reversed(range(steps)):
        model.reverse(index, index + 1)
    return {**meter.stop(), "gradient_norm": _length(model)}


def stencil_store_all(side: int, steps: int) -> Outcome:
    """Every state in fresh memory, as one first writes it."""
    model, start = _model(side), weights(side)
    meter = common.Meter()
    meter.start()
    states = []
    for index in range(steps):
        states.append(model.state[0].copy())
        model.advance(index, index + 1)
    model.start_adjoint(start)
    for index in reversed(range(steps)):
        model.reverse_from(index, [states.pop()])
    return {**meter.stop(), "gradient_norm": _length(model)}


def stencil_revolve(side: int, steps: int, slots: int) -> Outcome:
    """Revolve in memory."""
    model = _model(side)
    meter = common.Meter()
    job = StencilJob(model, side, slots)
    meter.start()
    revolve(job, steps, slots)
    return {**meter.stop(), "gradient_norm": _length(model)}


def stencil_pyrevolve(side: int, steps: int, slots: int) -> Outcome:
    """Revolve in memory as pyrevolve does it; it runs a step again before each adjoint step, needed here or not."""
    from pyrevolve import Checkpoint, MemoryRevolver, Operator

    class Forward(Operator):  # type: ignore[misc]
        def apply(self, **kwargs: int) -> None:
            previous[0] = model.state[0]
            model.advance(kwargs["t_start"], kwargs["t_end"])

    class Reverse(Operator):  # type: ignore[misc]
        def apply(self, **kwargs: int) -> None:
            model.reverse_from(kwargs["t_start"], previous)

    class Live(Checkpoint):  # type: ignore[misc]
        dtype, size = np.float32, side**3

        def get_data(self, timestep: int) -> list[stencil.Field]:
            return [model.state[0]]

        get_data_location = get_data

    model, start = _model(side), weights(side)
    meter = common.Meter()
    previous = [model.state[0]]
    revolver = MemoryRevolver(Live(), Forward(), Reverse(), slots, steps)
    meter.start()
    revolver.apply_forward()
    model.start_adjoint(start)
    revolver.apply_reverse()
    return {**meter.stop(), "gradient_norm": _length(model)}


def stencil_multistage(side: int, steps: int, slots: int, on_disk: int, directory: str) -> Outcome:
    """The multistage schedule of checkpoint_schedules: `slots` states in memory, `on_disk` in files."""
    from checkpoint_schedules import (
        Copy,
        EndForward,
        EndReverse,
        Forward,
        Move,
        MultistageCheckpointSchedule,
        Reverse,
        StorageType,
    )

    model, start = _model(side), weights(side)
    meter = common.Meter()
    free = list(np.full((slots, side, side, side), 1, np.float32))
    held: dict[int, stencil.Field] = {}
    final = np.empty((side, side, side), np.float32)
    schedule = MultistageCheckpointSchedule(steps, slots, on_disk)
    meter.start()
    while True:
        action = next(schedule)
        match action:
            case Forward():
                if action.write_ics and action.storage == StorageType.DISK:
                    model.state[0].tofile(Path(directory) / str(action.n0))
                elif action.write_ics:
                    held[action.n0] = free.pop()
                    np.copyto(held[action.n0], model.state[0])
                if not action.write_adj_deps:  # the working state is what the adjoint of the step needs
                    model.advance(action.n0, action.n1)
            case EndForward():
                model.advance_into(steps - 1, model.state, [final])
                model.start_adjoint(start)
            case Reverse():
                model.reverse(action.n0, action.n1)
            case Copy() | Move() if action.from_storage == StorageType.RAM:
                np.copyto(model.state[0], held[action.n])
                if isinstance(action, Move):
                    free.append(held.pop(action.n))
            case Copy() | Move():
                path = Path(directory) / str(action.n)
                with path.open("rb") as file:
                    file.readinto(model.state[0].data.cast("B"))
                if isinstance(action, Move):
                    path.unlink()
            case EndReverse():
                break
    return {**meter.stop(), "gradient_norm": _length(model)}


def stencil_followed(side: int, steps: int, slots: int, on_disk: int, directory: str) -> Outcome:
    """The same multistage schedule, followed by Longtape: its disk transfers go on in the background.

    It takes two slots more: one for the state before the last step, and one for staging.
    """
    from checkpoint_schedules import MultistageCheckpointSchedule

    import longtape

    model, start = _model(side), weights(side)
    meter = common.Meter()
    schedule = MultistageCheckpointSchedule(steps, slots, on_disk)
    memory = (slots + 2) * model.state[0].nbytes
    with longtape.Sweep(model, steps, memory=memory, disk=directory, schedule=schedule) as sweep:
        meter.start()
        sweep.forward()
        model.start_adjoint(start)
        sweep.reverse()
    return {**meter.stop(), "gradient_norm": _length(model)}


def _model(side: int) -> stencil.AllenCahn:
    """The stencil at its initial state, both kernels compiled and every buffer touched."""
    model = stencil.AllenCahn(side)
    first = model.state[0].copy()
    model.advance(0, 1)
    model.reverse(0, 1)
    model.reverse(0, 1)
    np.copyto(model.state[0], first)
    return model


def _length(model: stencil.AllenCahn) -> float:
    """The adjoint's Euclidean length, in double precision."""
    return float(np.linalg.norm(model.adjoint[0].ravel().astype(np.float64)))


# The comparison -----------------------------------------------------------------------------


def compare(name: str, cases: dict[str, Any], settings: dict[str, Any], repeats: int) -> None:
    """Run the cases in turn, each in its own process, and write what they took beside the ideal."""
    outcomes = common.interleave_apart(cases, repeats=repeats)
    ideal = statistics.median(outcome["seconds"] for outcome in outcomes["ideal"])
    results = {}
    for case, found in outcomes.items():
        seconds = [outcome["seconds"] for outcome in found]
        results[case] = {
            "seconds": common.summary(seconds),
            "over_ideal": statistics.median(seconds) / ideal,
            "peak_bytes": max(outcome["peak_bytes"] for outcome in found),
            "gradient_norm": found[0]["gradient_norm"],
        }
    common.write(name, settings, results)


def compare_lstm(steps: int, slots: int, repeats: int) -> None:
    cases = {
        "ideal": (lstm_ideal, (steps,)),
        "store_all": (lstm_store_all, (steps,)),
        "segments": (lstm_segments, (steps,)),
        "revolve": (lstm_revolve, (steps, slots)),
    }
    settings = {"steps": steps, "slots": slots, "revolve_advances": advances(steps, slots)}
    compare("baselines_lstm", cases, settings, repeats)


def compare_stencil(steps: int, slots: int, repeats: int, side: int = stencil.SIDE) -> None:
    cases: dict[str, Any] = {
        "ideal": (stencil_ideal, (side, steps)),
        "store_all": (stencil_store_all, (side, steps)),
        "revolve": (stencil_revolve, (side, steps, slots)),
    }
    if find_spec("pyrevolve"):
        cases["pyrevolve"] = (stencil_pyrevolve, (side, steps, slots))
    settings = {"side": side, "steps": steps, "slots": slots, "revolve_advances": advances(steps, slots)}
    with tempfile.TemporaryDirectory(dir=common.RESULTS.parent) as directory:
        if find_spec("checkpoint_schedules"):
            cases["multistage"] = (stencil_multistage, (side, steps, slots, slots, directory))
            cases["multistage, followed by longtape"] = (stencil_followed, (side, steps, slots, slots, directory))
        compare("baselines_stencil", cases, settings, repeats)


def main() -> None:
    parser = argparse.ArgumentParser(description="Time the peers.")
    parser.add_argument("what", nargs="?", choices=["lstm", "stencil"])
    parser.add_argument("--steps", type=int, default=None)
    parser.add_argument("--slots", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    if arguments.what in (None, "lstm"):
        compare_lstm(arguments.steps or 2000, arguments.slots, arguments.repeats)
    if arguments.what in (None, "stencil"):
        compare_stencil(arguments.steps or 100, arguments.slots, arguments.repeats)


if __name__ == "__main__":
    main()
