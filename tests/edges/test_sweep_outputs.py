"""Rows and sums that steps write beside the state: written once, and there again after a kill."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from models import Chaotic

import longtape
from tests.durable.programs import forked
from tests.faults.sweeps import storing_costs

SIZE, N = 2000, 120
NBYTES = 8 * SIZE


class Observed:
    """x ← sin(x + k); step k notes three numbers, and adds to a misfit and to a mean state.

    Its rows are residuals by the time of the reverse sweep, and the adjoint is driven by them and by the sums.
    """

    def __init__(self, steps: int = N) -> None:
        self.x = np.random.default_rng(0).random(SIZE)
        self.state = [self.x]
        self.receivers = np.zeros((steps, 3))
        self.calls = np.zeros(steps, np.int16)
        self.misfit = np.zeros(())
        self.mean = np.zeros(SIZE)
        self.outputs, self.sums = [self.receivers, self.calls], [self.misfit, self.mean]
        self.adjoint = [np.zeros(SIZE), np.zeros(1)]
        self.runs = 0

    def _step(self, k: int, source: np.ndarray, target: np.ndarray) -> None:
        self.runs += 1
        np.sin(source + k, out=target)
        self.receivers[k] = target[:3]
        self.calls[k] += 1
        self.misfit += target[0] ** 2
        self.mean += target

    def advance(self, start: int, stop: int) -> None:
        for k in range(start, stop):
            self._step(k, self.x, self.x)

    def reverse(self, start: int, stop: int) -> None:
        assert stop == start + 1
        self._reverse(start, self.x)

    def _reverse(self, k: int, source: np.ndarray) -> None:
        self.adjoint[0][:3] += self.receivers[k]
        self.adjoint[0] += 1e-3 * self.mean
        self.adjoint[1] += self.misfit
        self.adjoint[0] *= np.cos(source + k)

    def seed(self) -> None:
        """As a caller does between the sweeps: receivers become residuals in place."""
        self.receivers -= 0.25

    def result(self) -> bytes:
        return b"".join(a.tobytes() for a in (*self.adjoint, self.receivers, self.calls, self.misfit, self.mean))


class ObservedOutOfPlace(Observed):
    def advance_into(self, step: int, source: Any, target: Any) -> None:
        self._step(step, source[0], target[0])

    def reverse_from(self, step: int, source: Any) -> None:
        self._reverse(step, source[0])


class ObservedRecording(Observed):
    residual_nbytes = NBYTES

    def record(self, step: int, residuals: np.ndarray) -> None:
        residuals.view(float)[:] = self.x
        self.advance(step, step + 1)

    def pull_back(self, step: int, residuals: np.ndarray) -> None:
        self._reverse(step, residuals.view(float))


KINDS = [Observed, ObservedOutOfPlace, ObservedRecording]


def exact(steps: int = N) -> bytes:
    model, states = Observed(steps), []
    for k in range(steps):
        states.append(model.x.copy())
        model.advance(k, k + 1)
    model.seed()
    for k in reversed(range(steps)):
        model._reverse(k, states[k])
    return model.result()


def run(model: Any, steps: int = N, **options: Any) -> longtape.Sweep:
    with longtape.Sweep(model, steps, **options) as sweep:
        before = model.result()
        assert not any(model.calls), "steps that are only tried leave nothing behind"
        sweep.forward()
        assert model.result() != before
        model.seed()
        sweep.reverse()
    return sweep


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("slots", [2, 5, 200])
@pytest.mark.parametrize("verify", [False, True])
def test_rows_and_sums_are_written_once(kind: type, slots: int, verify: bool, scratch: Path) -> None:
    model = kind()
    sweep = run(model, memory=slots * (NBYTES + 4096), disk=scratch, verify=verify)
    assert model.result() == exact()
    if slots < 10:
        assert model.runs > N
        assert sweep.report.measured.steps_recomputed > 0


@pytest.mark.parametrize("kind", KINDS)
def test_with_stated_costs_too(kind: type, scratch: Path) -> None:
    model = kind()
    costs = longtape.Costs(1e-3, 3e-3, 1.1e-3, 1e-3, write_bytes_per_second=NBYTES / 5e-3)
    run(model, memory=12 * (NBYTES + 4096), disk=scratch, costs=costs)
    assert model.result() == exact()


def test_tiny_steps_in_windows_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("longtape.sweep.TINY_SECONDS", 1.0)
    monkeypatch.setattr("longtape.sweep.LONG", 100)
    model = Observed()
    sweep = run(model, memory=30 * NBYTES)
    assert sweep.report.window > 1
    assert model.result() == exact()


def test_long_rows_are_put_aside_a_few_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("longtape.model.outputs.MOST_KEPT_NBYTES", 60)
    model = Observed()
    run(model, memory=3 * NBYTES)
    assert model.result() == exact()


def test_rows_survive_a_replay_that_raises() -> None:
    class Failing(Observed):
        armed = False

        def _step(self, k: int, source: Any, target: Any) -> None:
            super()._step(k, source, target)
            if self.armed and k == 50:
                raise ZeroDivisionError

    model, whole = Failing(), Observed()
    whole.advance(0, N)
    with longtape.Sweep(model, N, memory=3 * NBYTES) as sweep:
        sweep.forward()
        model.armed = True
        with pytest.raises(ZeroDivisionError):
            sweep.reverse()
    assert np.array_equal(model.receivers, whole.receivers)
    assert np.array_equal(model.mean, whole.mean)


def test_what_reverse_writes_stays() -> None:
    class Writing(Observed):
        def reverse(self, start: int, stop: int) -> None:
            super().reverse(start, stop)
            self.receivers[start] = start

    model = Writing()
    run(model, memory=3 * NBYTES)
    assert np.array_equal(model.receivers[:, 0], np.arange(N))


def test_sums_need_no_length() -> None:
    class Ending(Observed):
        def advance(self, start: int, stop: int) -> int:
            super().advance(start, min(stop, N))
            return min(stop, N)

    model, whole = Ending(N), Observed()
    model.outputs = []
    model.receivers, model.calls = np.zeros((N, 3)), np.zeros(N, np.int16)
    with longtape.Sweep(model, None, memory=4 * NBYTES) as sweep:
        sweep.forward()
        sweep.reverse()
    whole.advance(0, N)
    assert np.array_equal(model.mean, whole.mean)
    assert model.misfit == whole.misfit


# Resumed --------------------------------------------------------------------------------------


class Slow(Observed):
    """Stops the process at the first step that it is told to stop at."""

    stop_at: tuple[str, int] | None = None

    def advance(self, start: int, stop: int) -> None:
        for k in range(start, stop):
            if self.stop_at == ("forward", k):
                raise KeyboardInterrupt
            self._step(k, self.x, self.x)

    def reverse(self, start: int, stop: int) -> None:
        if self.stop_at == ("reverse", start):
            raise KeyboardInterrupt
        super().reverse(start, stop)


def durable(directory: Path, stop_at: tuple[str, int] | None) -> bytes:
    model = Slow()
    sweep = longtape.Sweep(
        model,
        N,
        memory=5 * (NBYTES + 4096),
        costs=storing_costs(SIZE),
        resume=directory,
        resume_seconds=1e-6,
    )
    model.stop_at = stop_at
    try:
        with sweep:
            sweep.forward()
            model.seed()
            sweep.reverse()
    except KeyboardInterrupt:
        return b""
    return model.result() + (sweep.report.resumed_from or "").encode()


@pytest.mark.parametrize(
    "stops",
    [
        [("forward", 70)],
        [("forward", 40), ("forward", 41), ("forward", 100)],
        [("reverse", N - 1)],
        [("reverse", 60)],
        [("forward", 90), ("reverse", 100), ("reverse", 20)],
    ],
)
def test_rows_and_sums_of_the_process_before_are_there(tmp_path: Path, stops: list[tuple[str, int]]) -> None:
    for stop_at in stops:
        assert forked(lambda stop_at=stop_at: durable(tmp_path, stop_at)) == b""
    found = forked(lambda: durable(tmp_path, None))
    assert found is not None
    assert found.startswith(exact())
    assert len(found) > len(exact()), "it was resumed"


def test_another_beginning_of_the_sums_is_another_run(tmp_path: Path) -> None:
    assert forked(lambda: durable(tmp_path, ("forward", 70))) == b""
    model = Slow()
    model.misfit[...] = 1.0
    with pytest.raises(longtape.ResumeError, match="sums"):
        longtape.Sweep(model, N, memory=5 * (NBYTES + 4096), costs=storing_costs(SIZE), resume=tmp_path)


def test_a_resumable_run_that_declares_no_outputs_warns(tmp_path: Path) -> None:
    model = Chaotic()
    if hasattr(model, "outputs"):
        del model.outputs
    with pytest.warns(RuntimeWarning, match=r"model\.outputs"):
        longtape.Sweep(model, 10, memory="1MiB", resume=tmp_path).close()
    for name in ("outputs", "sums"):
        model = Chaotic()
        model.__dict__.pop("outputs", None)
        setattr(model, name, [])
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            longtape.Sweep(model, 10, memory="1MiB", resume=tmp_path, name=name).close()


def test_rows_that_do_not_fit_are_not_taken() -> None:
    """A file that holds something else is damaged, and changes nothing."""
    from longtape.errors import DamagedBlock
    from longtape.model.outputs import Outputs

    model = Observed()
    outputs = Outputs(model)
    with outputs.running(0, 10):
        model.advance(0, 10)
    saved = [array.copy() for array in outputs.saved(0, 10)]
    fresh = Observed()
    for wrong in ([], saved[:-1], [*saved[:-1], saved[-1][:-8]], [np.zeros(3, np.uint8), *saved[1:]]):
        with pytest.raises(DamagedBlock):
            Outputs(fresh).take(wrong)
    later = [np.array([5, 15], "<i8").view(np.uint8), *saved[1:]]
    with pytest.raises(DamagedBlock):
        Outputs(fresh).take(later)
    assert not fresh.receivers.any()
    taken = Outputs(fresh)
    taken.take(saved)
    assert taken.done == 10
    assert np.array_equal(fresh.receivers, model.receivers)
    assert fresh.misfit == model.misfit


# At construction ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("outputs", [np.zeros((N + 1, 3))], "first dimension must be the 120 steps"),
        ("outputs", [np.zeros(())], "first dimension"),
        ("outputs", [[1.0] * N], "NumPy array"),
        ("outputs", [np.array([None] * N)], "plain numbers"),
        ("outputs", 3, "a list of NumPy arrays"),
        ("sums", [0.0], "NumPy array"),
        ("sums", [np.float64(0.0)], "NumPy array"),
        ("sums", [np.broadcast_to(np.zeros(1), (3,))], "read-only"),
    ],
)
def test_outputs_are_checked(name: str, value: Any, message: str) -> None:
    model = Observed()
    setattr(model, name, value)
    with pytest.raises(longtape.UsageError, match=message):
        longtape.Sweep(model, N, memory="1MiB")


def test_outputs_need_a_length() -> None:
    with pytest.raises(longtape.UsageError, match="needs steps"):
        longtape.Sweep(Observed(), None, memory="1MiB")


@pytest.mark.parametrize("name", ["misfit", "mean", "receivers"])
def test_an_output_that_a_step_rebinds_is_refused(name: str) -> None:
    class Rebinding(Observed):
        def _step(self, k: int, source: Any, target: Any) -> None:
            np.sin(source + k, out=target)
            setattr(self, name, getattr(self, name) + target.sum())

    with pytest.raises(longtape.StepError, match=rf"model\.{name}"):
        longtape.Sweep(Rebinding(), N, memory="1MiB")


def test_a_large_row_is_not_multiplied_before_the_sweep() -> None:
    """Trying steps puts aside a few rows, not one for each of thousands of steps."""
    import tracemalloc

    class Wide:
        def __init__(self) -> None:
            self.state = [np.ones(4)]
            self.outputs = [np.zeros((2000, 20_000), np.float32)]

        def advance(self, start: int, stop: int) -> None:
            self.state[0] += stop - start

        def reverse(self, start: int, stop: int) -> None:
            pass

    model = Wide()
    tracemalloc.start()
    try:
        longtape.Sweep(model, 2000, memory="1MiB").close()
        assert tracemalloc.get_traced_memory()[1] < 2 << 20
    finally:
        tracemalloc.stop()
