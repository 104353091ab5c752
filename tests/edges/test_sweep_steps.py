"""What a `Sweep` believes of a model's steps: each fault stops it, and what is sound is let through."""

from __future__ import annotations

import time
import warnings
from typing import Any

import numpy as np
import pytest
from models import Chaotic, OutOfPlace, Recording, store_everything

import longtape

STATE = 64 + 12
N = 200


class Plain:
    """x ← sin(x) + 0.3 x, by whatever way a test wants it."""

    def __init__(self) -> None:
        self.u = np.random.default_rng(0).random(5)
        self.state = [self.u]
        self.adjoint = np.ones(5)

    def advance(self, start: int, stop: int) -> Any:
        for _ in range(start, stop):
            self.step()

    def step(self) -> None:
        self.u[:] = np.sin(self.u) + 0.3 * self.u

    def reverse(self, start: int, stop: int) -> None:
        self.adjoint *= np.cos(self.state[0]) + 0.3


def exact(steps: int) -> np.ndarray:
    model, states = Plain(), []
    for _ in range(steps):
        states.append(model.u.copy())
        model.step()
    for state in reversed(states):
        model.adjoint *= np.cos(state) + 0.3
    return model.adjoint


def run(model: Any, steps: int = N, *, between: Any = lambda: None, **options: Any) -> longtape.Sweep:
    with longtape.Sweep(model, steps, **{"memory": 5 * 40} | options) as sweep:
        sweep.forward()
        between()
        sweep.reverse()
    return sweep


# A model that rebinds -------------------------------------------------------------------------


class Rebinding(Plain):
    def step(self) -> None:
        self.u = np.sin(self.u) + 0.3 * self.u


class RebindingOneOfTwo(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.v = np.zeros(5)
        self.state = [self.v, self.u]

    def step(self) -> None:
        self.v += self.u
        self.u = np.sin(self.u)


class RebindingInside(Plain):
    class Fields:
        pass

    def __init__(self) -> None:
        super().__init__()
        self.fields = self.Fields()
        self.fields.u = self.u
        self.levels = {"u": self.u}

    def step(self) -> None:
        self.fields.u = np.sin(self.fields.u)


class RebindingInDict(RebindingInside):
    def step(self) -> None:
        self.levels["u"] = np.sin(self.levels["u"])


class RebindingAView(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.first = self.u[:3]

    def step(self) -> None:
        self.first = np.sin(self.first)


REBINDING = [
    (Rebinding, r"model\.u"),
    (RebindingOneOfTwo, r"model\.u"),
    (RebindingInside, r"model\.fields\.u"),
    (RebindingInDict, r"model\.levels\['u'\]"),
    (RebindingAView, r"model\.first"),
]


@pytest.mark.parametrize("verify", [False, True])
@pytest.mark.parametrize(("kind", "name"), REBINDING)
def test_a_step_that_rebinds_is_refused_before_the_sweep(kind: type, name: str, verify: bool) -> None:
    with pytest.raises(longtape.StepError, match=name):
        longtape.Sweep(kind(), N, memory=5 * 80, verify=verify)


@pytest.mark.parametrize(("kind", "name"), REBINDING)
def test_or_at_its_first_step_where_none_runs_before_the_sweep(kind: type, name: str) -> None:
    sweep = longtape.Sweep(kind(), 10, memory=50 * 80, costs=longtape.Costs(1.0, 2.0))
    with sweep, pytest.raises(longtape.StepError, match=name):
        sweep.forward()


def test_swapped_buffers_are_noticed() -> None:
    class Swapping(Plain):
        def __init__(self) -> None:
            super().__init__()
            self.v = self.u * 2
            self.state = [self.u, self.v]

        def step(self) -> None:
            self.v[:] = np.sin(self.u) + 0.3 * self.v
            self.u, self.v = self.v, self.u

    with pytest.raises(longtape.StepError, match="same each time"):
        longtape.Sweep(Swapping(), N, memory=5 * 128)
    with pytest.raises(longtape.StepError, match="computes it again"):
        run(Swapping(), 31, memory=5 * 128, costs=longtape.Costs(1.0, 2.0))


def test_a_state_that_is_listed_anew_each_time_may_be_rebound() -> None:
    class Listing(Plain):
        @property
        def state(self) -> Any:
            return [self.u]

        @state.setter
        def state(self, value: Any) -> None:
            pass

        def step(self) -> None:
            self.u = np.sin(self.u) + 0.3 * self.u

    model = Listing()
    run(model)
    assert np.array_equal(model.adjoint, exact(N))


def test_elements_of_the_list_may_be_replaced() -> None:
    class Replacing(Plain):
        def step(self) -> None:
            self.state[0] = np.sin(self.state[0]) + 0.3 * self.state[0]

    model = Replacing()
    run(model)
    assert np.array_equal(model.adjoint, exact(N))


class AtRest(Plain):
    """Nothing moves before the source does, at step 5; scratch arrays are rebound all the time."""

    def __init__(self) -> None:
        super().__init__()
        self.u[:] = 0.0
        self.scratch = np.zeros(5)
        self.initial = self.u.copy()

    def advance(self, start: int, stop: int) -> None:
        for step in range(start, stop):
            self.scratch = 0.3 * self.u
            self.u[:] = np.sin(self.u) + self.scratch + (step >= 5)


def test_a_wave_at_rest_is_no_fault() -> None:
    model = AtRest()
    sweep = run(model)
    assert any("changed no byte" in note for note in sweep.report.notes)


def test_a_state_that_never_moves_warns() -> None:
    class Still(Plain):
        def step(self) -> None:
            pass

    with pytest.warns(RuntimeWarning, match="the final state is the initial one"):
        run(Still())


# Ranges ---------------------------------------------------------------------------------------


class OneStepWhateverIsAsked(Plain):
    def advance(self, start: int, stop: int) -> None:
        self.step()


class TwoStepsWhateverIsAsked(Plain):
    def advance(self, start: int, stop: int) -> None:
        self.step()
        self.step()


class AtMostFour(Plain):
    """Seen by no first step."""

    def advance(self, start: int, stop: int) -> None:
        super().advance(start, min(stop, start + 4))


@pytest.mark.parametrize("verify", [False, True])
@pytest.mark.parametrize("kind", [OneStepWhateverIsAsked, TwoStepsWhateverIsAsked])
@pytest.mark.parametrize("costs", [None, longtape.Costs(1e-3, 2e-3)])
def test_a_range_must_be_its_steps(kind: type, verify: bool, costs: Any) -> None:
    with pytest.raises(longtape.StepError, match=r"advance\(0, 2\)"):
        longtape.Sweep(kind(), N, memory=5 * 40, verify=verify, costs=costs)


def test_verify_sees_what_the_run_without_it_does() -> None:
    with pytest.raises(longtape.StepError, match=r"advance\(\d+, \d+\) does not give"):
        run(AtMostFour(), verify=True)


def test_a_range_that_ends_early_is_seen_when_it_is_run_again() -> None:
    with pytest.raises(longtape.ReplayError, match="exactly the steps"):
        run(AtMostFour())


def test_costly_steps_that_are_asked_for_one_by_one_may_ignore_stop() -> None:
    model = OneStepWhateverIsAsked()
    run(model, 31, costs=longtape.Costs(1.0, 2.0))
    assert np.array_equal(model.adjoint, exact(31))


@pytest.mark.parametrize("returned", [0, 3, -1])
def test_a_sweep_of_known_length_does_not_end_early(returned: int) -> None:
    class Early(Plain):
        def advance(self, start: int, stop: int) -> int:
            super().advance(start, stop)
            return min(returned, stop - 1) if stop > 100 else stop

    with pytest.raises(longtape.StepError, match=r"returned .*steps=None"):
        run(Early())


def test_nor_does_a_model_that_runs_out_of_place() -> None:
    class Ends(OutOfPlace):
        def advance_into(self, step: int, source: Any, target: Any) -> Any:
            super().advance_into(step, source, target)
            return step < 50

    with pytest.raises(longtape.StepError, match=r"advance_into.*steps=None"):
        run(Ends(), memory=5 * STATE)


def test_out_of_place_steps_must_leave_their_source() -> None:
    class InPlaceAfterAll(OutOfPlace):
        def advance_into(self, step: int, source: Any, target: Any) -> None:
            super().advance_into(step, source, target)
            source[0][0] = 7.0

    with pytest.raises(longtape.StepError, match="source"):
        longtape.Sweep(InPlaceAfterAll(), N, memory=5 * STATE)


# Replays --------------------------------------------------------------------------------------


class Parametrised(Plain):
    dt = 0.3

    def step(self) -> None:
        self.u[:] = np.sin(self.u) + self.dt * self.u


class ParametrisedOutOfPlace(Parametrised):
    def advance_into(self, step: int, source: Any, target: Any) -> None:
        target[0][:] = np.sin(source[0]) + self.dt * source[0]

    def reverse_from(self, step: int, source: Any) -> None:
        self.adjoint *= np.cos(source[0]) + self.dt


class ParametrisedSpanning(Parametrised):
    max_reverse = 3

    def reverse(self, start: int, stop: int) -> None:
        pass


@pytest.mark.parametrize("kind", [Parametrised, ParametrisedOutOfPlace, ParametrisedSpanning])
@pytest.mark.parametrize("memory", [2 * 40, 5 * 40, 50 * 40])
@pytest.mark.parametrize("costs", [None, longtape.Costs(1.0, 2.0)])
def test_what_changes_between_forward_and_reverse_is_seen(kind: type, memory: int, costs: Any) -> None:
    model = kind()
    with pytest.raises(longtape.ReplayError, match="has changed since"):
        run(model, memory=memory, costs=costs, between=lambda: setattr(model, "dt", 0.31))


@pytest.mark.parametrize("kind", [Parametrised, ParametrisedOutOfPlace])
@pytest.mark.parametrize("gap", [2e-3, 2e-2])
def test_with_storage_too(scratch: Any, kind: type, gap: float) -> None:
    model, speed = kind(), 40 / gap
    costs = longtape.Costs(1e-3, 2e-3, write_bytes_per_second=speed, read_bytes_per_second=speed)
    with pytest.raises(longtape.ReplayError, match="has changed since"):
        run(model, disk=scratch, costs=costs, between=lambda: setattr(model, "dt", 0.31))


def test_in_windows_of_tiny_steps_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("longtape.sweep.TINY_SECONDS", 1.0)
    model = Parametrised()
    with pytest.raises(longtape.ReplayError, match="has changed since"):
        run(model, 10_000, memory=300 * 40, between=lambda: setattr(model, "dt", 0.31))


def test_a_model_that_counts_its_calls_is_seen() -> None:
    class Counting(Plain):
        calls = 0

        def step(self) -> None:
            self.calls += 1
            self.u[:] = np.sin(self.u) + 1e-3 * self.calls

    with pytest.raises(longtape.ReplayError, match="same each time"):
        longtape.Sweep(Counting(), N, memory=5 * 40)
    with pytest.raises(longtape.ReplayError, match="counts its calls"):
        run(Counting(), 31, costs=longtape.Costs(1.0, 2.0))


def test_the_check_costs_a_few_hashes(monkeypatch: pytest.MonkeyPatch) -> None:
    import longtape.known as known

    seen = []
    hash_of = known._hash
    monkeypatch.setattr(known, "_hash", lambda array: (seen.append(1), hash_of(array))[1])
    run(Plain(), 5000)
    assert 2 < len(seen) <= 20


def test_rounded_snapshots_are_not_compared(tmp_path: Any) -> None:
    model = Chaotic(20_000)
    costs = longtape.Costs(1e-3, 2e-3, write_bytes_per_second=2e7, read_bytes_per_second=2e7)
    memory = 6 * (8 * 20_000 + 8192)
    with longtape.Sweep(model, 100, memory=memory, disk=tmp_path, compress="relative:1e-3+zstd", costs=costs) as sweep:
        sweep.forward()
        model.start_adjoint()
        sweep.reverse()
    assert sweep.report.measured.steps_recomputed > 0


# verify=True and recording --------------------------------------------------------------------


def test_verify_checks_a_model_that_records(scratch: Any) -> None:
    costs = longtape.Costs(1e-3, 3e-3, 1.1e-3, 1e-3, write_bytes_per_second=8e4, read_bytes_per_second=8e4)

    class Differs(Recording):
        """A recorded step does not do quite what a plain one does."""

        def record(self, step: int, residuals: Any) -> None:
            super().record(step, residuals)
            self.state[0] *= 1 + 1e-15

    def swept(model: Any) -> longtape.Sweep:
        with longtape.Sweep(model, 120, memory=12 * STATE, disk=scratch, costs=costs, verify=True) as sweep:
            sweep.forward()
            model.start_adjoint()
            sweep.reverse()
        return sweep

    model = Recording()
    sweep = swept(model)
    assert model.result() == store_everything(120)
    assert model.recorded > 0
    assert sweep.report.states_verified > 0
    with pytest.raises(longtape.ReplayError, match=r"state\[0\]"):
        swept(Differs())


def test_verify_checks_that_residuals_come_back_as_they_were() -> None:
    class Careless(Recording):
        """Writes beyond its own residuals, into those of the step before."""

        last: Any = None

        def record(self, step: int, residuals: Any) -> None:
            super().record(step, residuals)
            if step == 7:
                self.last[0] += 1
            self.last = residuals

    model = Careless()
    with longtape.Sweep(model, 20, memory="1MiB", costs=longtape.Costs(1.0, 3.0, 1.1, 1.0), verify=True) as sweep:
        sweep.forward()
        model.start_adjoint()
        with pytest.raises(longtape.ReplayError, match="residuals of step 6"):
            sweep.reverse()


# The protocol, at construction ----------------------------------------------------------------


@pytest.mark.parametrize("kind", [Chaotic, Recording])
@pytest.mark.parametrize("missing", ["advance", "reverse"])
def test_a_missing_method_is_named_at_once(kind: type, missing: str) -> None:
    model = kind()
    setattr(model, missing, None)
    with pytest.raises(longtape.UsageError, match=missing):
        longtape.Sweep(model, 10, memory="1MiB")
    assert model.advanced == 0


@pytest.mark.parametrize(("there", "missing"), [("advance_into", "reverse_from"), ("reverse_from", "advance_into")])
def test_half_of_an_out_of_place_model_is_refused(there: str, missing: str) -> None:
    model = Chaotic()
    setattr(model, there, lambda *arguments: None)
    with pytest.raises(longtape.UsageError, match=f"{there} .*{missing}"):
        longtape.Sweep(model, 10, memory="1MiB")


def test_a_model_that_runs_out_of_place_needs_nothing_else() -> None:
    class Only:
        state = (np.ones(3),)
        advance_into = staticmethod(lambda step, source, target: np.sin(source[0], out=target[0]))
        reverse_from = staticmethod(lambda step, source: None)

    model = Only()
    run(model, 20)


@pytest.mark.parametrize("kind", [Chaotic, OutOfPlace])
def test_an_adjoint_that_was_never_seeded_warns(kind: type) -> None:
    with pytest.warns(RuntimeWarning, match="all zeros"):
        run(kind(), 20, memory="1MiB")
    model = kind()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(model, 20, memory="1MiB", between=model.start_adjoint)


def test_but_not_where_outputs_seed_it() -> None:
    model = Chaotic()
    model.outputs = [np.zeros((20, 2))]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(model, 20, memory="1MiB")


def test_a_state_of_no_bytes_is_refused() -> None:
    model = Plain()
    model.state = [np.zeros((0, 3))]
    with pytest.raises(longtape.UsageError, match="0 bytes"):
        longtape.Sweep(model, 10, memory="1MiB")


@pytest.mark.parametrize("verify", [False, True])
def test_an_array_of_no_bytes_beside_others_is_fine(verify: bool, scratch: Any) -> None:
    model = Plain()
    model.state = [np.zeros((0, 3)), model.u, np.zeros(0, np.int8)]
    model.reverse = lambda start, stop: model.adjoint.__imul__(np.cos(model.u) + 0.3)  # type: ignore[method-assign]
    run(model, verify=verify, memory=5 * 200, disk=scratch)
    assert np.array_equal(model.adjoint, exact(N))


def test_a_read_only_state_is_refused() -> None:
    model = Plain()
    model.u.flags.writeable = False
    with pytest.raises(longtape.UsageError, match=r"state\[0\] is read-only"):
        longtape.Sweep(model, 10, memory="1MiB")


@pytest.mark.parametrize("name", ["state", "outputs", "sums", "adjoint"])
def test_arrays_that_share_memory_are_refused(name: str) -> None:
    model = Plain()
    model.outputs = []
    other = [model.u[1:]] if name != "outputs" else [model.u]
    setattr(model, name, [model.u, *other] if name == "state" else other)
    with pytest.raises(longtape.UsageError, match="share memory"):
        longtape.Sweep(model, 5, memory="1MiB")


def test_interleaved_arrays_do_not_share_memory() -> None:
    model = Plain()
    both = np.random.default_rng(1).random(10)
    model.u = both[::2]
    model.state = [model.u, both[1::2]]
    run(model, memory="1MiB")


def test_numbers_may_be_those_of_numpy() -> None:
    model = Plain()
    model.max_reverse = np.int64(1)
    run(model, np.int64(N), memory=200.0)
    assert np.array_equal(model.adjoint, exact(N))
    run(Plain(), np.uint8(20), memory=np.float64(1e9), disk_limit=1e9)
    with pytest.raises(longtape.UsageError, match="amount of bytes"):
        longtape.Sweep(Plain(), 10, memory=1e3 + 0.5)
    for steps in (np.bool_(True), np.float64(10.0), 10.0):
        with pytest.raises(longtape.UsageError, match="steps must be an integer"):
            longtape.Sweep(Plain(), steps, memory="1MiB")


def test_a_slow_clock_does_not_matter() -> None:
    """Steps that take a while in truth are asked for one by one, and give the same bits."""

    class Slow(Plain):
        def advance(self, start: int, stop: int) -> None:
            time.sleep(0.055 * (start == 0))
            super().advance(start, stop)

    model = Slow()
    run(model, 150)
    assert np.array_equal(model.adjoint, exact(150))


def test_rounding_that_differs_from_run_to_run_is_no_fault() -> None:
    """Threads that add to the same number do so in any order."""

    class Rounding:
        def __init__(self) -> None:
            self.state, self.adjoint = [np.linspace(0.5, 1.0, 50)], [np.zeros(50)]
            self.runs = 0

        def advance(self, start: int, stop: int) -> None:
            for _ in range(start, stop):
                self.runs += 1
                x = self.state[0]
                x[:] = np.nextafter(np.sin(x) + 0.1, 2.0 * (self.runs % 2))

        def reverse(self, start: int, stop: int) -> None:
            self.adjoint[0] *= np.cos(self.state[0])

    model = Rounding()
    sweep = longtape.Sweep(model, 60, memory=5 * 400)
    sweep.forward()
    model.adjoint[0][:] = 1.0
    sweep.reverse()
    assert sweep.report.measured.steps_recomputed > 0
    model = Rounding()
    sweep = longtape.Sweep(model, 60, memory=5 * 400, verify=True)
    with pytest.raises(longtape.ReplayError):
        sweep.forward()
        model.adjoint[0][:] = 1.0
        sweep.reverse()
