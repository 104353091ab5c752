"""`longtape.pyrevolve`: operators and checkpoints that are not what pyrevolve's protocol takes them to be."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import numpy as np
import pytest

import longtape
import longtape.pyrevolve as lp

STEPS, WIDTH = 40, 1000


class Field:
    """One array and its adjoint: x ← 3.7 x (1 - x), driven by a parameter."""

    def __init__(self, dtype: Any = np.float64) -> None:
        self.x = np.linspace(0.1, 0.9, WIDTH).astype(dtype)
        self.adjoint = np.ones(WIDTH, dtype)
        self.rate = 3.7


class Ahead:
    def __init__(self, field: Field) -> None:
        self.field, self.calls = field, []

    def apply(self, *, t_start: int, t_end: int) -> None:
        self.calls.append((t_start, t_end))
        for _ in range(t_start, t_end):
            self.step()

    def step(self) -> None:
        x = self.field.x
        x[:] = self.field.rate * x * (1 - x)


class Back:
    """Needs state k: the step is taken again before it is called, so it keeps what it saw before."""

    def __init__(self, field: Field) -> None:
        self.field, self.seen = field, []

    def apply(self, *, t_start: int, t_end: int) -> None:
        self.seen.append(self.field.x.copy())


class Live:
    def __init__(self, field: Field) -> None:
        self.field = field

    def get_data(self, timestep: int) -> list[np.ndarray]:
        return [self.field.x]

    def get_data_location(self, timestep: int) -> list[np.ndarray]:
        return self.get_data(timestep)


def states(steps: int = STEPS) -> list[np.ndarray]:
    field, found = Field(), []
    ahead = Ahead(field)
    for _ in range(steps):
        ahead.step()
        found.append(field.x.copy())
    return found


def make(ahead: type = Ahead, checkpoint: type = Live, **options: Any) -> tuple[Any, Field, Any, Back]:
    field = Field()
    forward, back = ahead(field), Back(field)
    arguments = {"n_checkpoints": 4, "n_timesteps": STEPS} | options
    return lp.Revolver(checkpoint(field), forward, back, **arguments), field, forward, back


def both(revolver: Any) -> None:
    revolver.apply_forward()
    revolver.apply_reverse()


class OneStep(Ahead):
    """Ignores t_end."""

    def apply(self, *, t_start: int, t_end: int) -> None:
        self.step()


class AllSteps(Ahead):
    """Ignores both."""

    def apply(self, *, t_start: int, t_end: int) -> None:
        for _ in range(STEPS):
            self.step()


class FromZero(Ahead):
    """Ignores t_start."""

    def apply(self, *, t_start: int, t_end: int) -> None:
        for _ in range(t_end):
            self.step()


class Counts(Ahead):
    """Goes by a count of its own, which is not part of the state."""

    count = 0

    def step(self) -> None:
        super().step()
        self.field.x[:] *= 1.0 - 0.001 * (self.count % 7)
        self.count += 1


@pytest.mark.parametrize("ahead", [OneStep, AllSteps, FromZero, Counts])
@pytest.mark.parametrize("verify", [False, True])
def test_operators_that_do_not_run_the_steps_they_are_told(ahead: type, verify: bool) -> None:
    revolver, *_ = make(ahead, verify=verify)
    with pytest.raises(longtape.ReplayError, match=r"exactly the steps t_start to t_end - 1|same each time"):
        both(revolver)


def test_what_the_operator_reads_is_changed_between_the_sweeps() -> None:
    revolver, field, _, _ = make()
    revolver.apply_forward()
    field.rate = 3.6
    with pytest.raises(longtape.ReplayError, match="nothing that it reads may change before apply_reverse"):
        revolver.apply_reverse()


class Rounds(Ahead):
    """Adds in another order each time, as threads do."""

    chance = np.random.default_rng(0)

    def step(self) -> None:
        super().step()
        self.field.x[:] *= 1.0 + 4.0 * np.finfo(np.float64).eps * self.chance.integers(-1, 2, WIDTH)


def test_rounding_is_no_other_state() -> None:
    revolver, field, _, _ = make(Rounds, n_checkpoints=15)
    field.rate = 2.0  # no chaos that would make more of it
    both(revolver)


class Rebinding(Ahead):
    def step(self) -> None:
        self.field.x = self.field.rate * self.field.x * (1 - self.field.x)


class Stale(Live):
    """Gives the arrays that were there at first."""

    def __init__(self, field: Field) -> None:
        super().__init__(field)
        self.arrays = [field.x]

    def get_data(self, timestep: int) -> list[np.ndarray]:
        return self.arrays


def test_arrays_that_are_rebound_are_looked_up_each_time() -> None:
    revolver, _, _, back = make(Rebinding)
    both(revolver)
    assert all(np.array_equal(a, b) for a, b in zip(back.seen[::-1], states(), strict=True))


def test_arrays_that_nobody_works_on_any_more() -> None:
    revolver, *_ = make(Rebinding, Stale)
    with pytest.raises(longtape.StepError, match=r"nothing has changed in the arrays that Stale gives"):
        both(revolver)


class Growing(Live):
    """More entries from step 9 on."""

    def get_data(self, timestep: int) -> list[np.ndarray]:
        return [self.field.x if timestep < 9 else np.concatenate([self.field.x, [1.0]])]


def test_a_checkpoint_that_grows() -> None:
    revolver, *_ = make(checkpoint=Growing, n_checkpoints=15)
    with pytest.raises(longtape.StepError, match=r"float64\[1001\]"):
        both(revolver)


@pytest.mark.parametrize(("steps", "verify"), [(1, False), (2, False), (2, True), (STEPS, False), (STEPS, True)])
def test_going_forward_no_step_is_run_twice(steps: int, verify: bool) -> None:
    revolver, field, ahead, _ = make(n_timesteps=steps, verify=verify)
    revolver.apply_forward()
    assert [step for start, stop in ahead.calls for step in range(start, stop)] == list(range(steps))
    assert ahead.calls[0] == (0, 1)
    assert np.array_equal(field.x, states(steps)[-1])
    revolver.close()


@pytest.mark.parametrize(
    ("field", "forward", "back", "message"),
    [
        (object(), Ahead(Field()), Back(Field()), "checkpoint must have the method get_data and get_data_location"),
        (Live(Field()), object(), Back(Field()), "fwd_operator must have the method apply"),
        (Live(Field()), Ahead(Field()), object(), "rev_operator must have the method apply"),
    ],
)
def test_what_is_missing_shows_before_a_step_is_run(field: Any, forward: Any, back: Any, message: str) -> None:
    with pytest.raises(longtape.UsageError, match=message):
        lp.Revolver(field, forward, back, 4, STEPS)


def test_numpy_integers() -> None:
    revolver, _, _, back = make(
        n_checkpoints=np.int64(4), n_timesteps=np.int32(STEPS), max_reverse=np.int8(1), memory=np.int64(40_000)
    )
    both(revolver)
    assert all(np.array_equal(a, b) for a, b in zip(back.seen[::-1], states(), strict=True))


def test_single_precision_and_scalars_in_a_state() -> None:
    class Scalars(Live):
        count = np.zeros((), np.int32)
        flag = np.zeros(3, bool)

        def get_data(self, timestep: int) -> list[np.ndarray]:
            return [self.field.x, self.count, self.flag]

    revolver, _, _, back = make(checkpoint=Scalars)
    both(revolver)
    assert all(np.array_equal(a, b) for a, b in zip(back.seen[::-1], states(), strict=True))


@pytest.mark.parametrize("in_a_cycle", [False, True])
def test_a_dropped_revolver_releases_everything(in_a_cycle: bool, scratch: Any) -> None:
    revolver, _, forward, _ = make(disk=scratch)
    revolver.apply_forward()
    if in_a_cycle:
        forward.revolver = revolver
    gone = weakref.ref(revolver._run._job)
    del revolver, forward
    gc.collect()
    assert gone() is None  # and the fixtures look for threads and files
