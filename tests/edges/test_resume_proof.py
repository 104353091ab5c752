"""What no fingerprint sees: steps that are run again on resume tell another run by where they end."""

import gc
import os
import time

import numpy as np
import pytest
import torch
from models import Chaotic, Recording

import longtape
from longtape.actions import Turn

STEPS, SIZE = 60, 50
STATE = 64 * -(-8 * SIZE // 64) + 12
STORING = longtape.Costs(1e-3, 2e-3, write_bytes_per_second=STATE / 2e-3, read_bytes_per_second=STATE / 2e-3)
IN_MEMORY = longtape.Costs(1e-3, 2e-3, write_bytes_per_second=1.0, read_bytes_per_second=1.0)
NAME = "LONGTAPE_TEST_GAIN"


class Stop(Exception):
    pass


class Stopper:
    """Stops a run after so many actions; a negative number counts from the turn on."""

    def __init__(self, after):
        self.after, self.counts = abs(after), after > 0

    def on_action(self, action, began, ended):
        time.sleep(3e-4)
        self.after -= self.counts
        self.counts = self.counts or isinstance(action, Turn)
        if self.after == 0:
            raise Stop

    def on_transfer(self, *_):
        pass


class FromOutside:
    """Depends on what is no value of the program."""

    outputs = ()

    def advance(self, start, stop):
        for step in range(start, stop):
            super().advance(step, step + 1)
            self.state[0][0] += float(os.environ[NAME]) * 1e-3


class Hidden(FromOutside, Chaotic):
    pass


class HiddenRecording(FromOutside, Recording):
    pass


@pytest.fixture(autouse=True)
def gain(monkeypatch):
    monkeypatch.setenv(NAME, "1.0")
    return lambda value: monkeypatch.setenv(NAME, value)


def by_sweep(directory, after=None, costs=STORING, slots=5, kind=Hidden):
    model = kind(SIZE)
    options = {} if directory is None else {"resume": directory, "resume_seconds": 1e-6}
    with longtape.Sweep(
        model, STEPS, memory=slots * STATE, costs=costs, observers=[] if after is None else [Stopper(after)], **options
    ) as run:
        run.forward()
        model.start_adjoint()
        run.reverse()
    return model.result(), run.report


def by_torch(directory, after=None):
    from longtape.torch import scan

    def step(carry, x):
        return torch.sin(carry) + torch.tensor(float(os.environ[NAME])) * x, carry

    init, told = torch.ones(3, requires_grad=True), []
    options = {} if directory is None else {"resume": directory, "resume_seconds": 1e-6}
    observers = [] if after is None else [Stopper(after)]
    carry, ys = scan(
        step,
        init,
        torch.ones(STEPS, 3),
        memory=120,
        capture=False,
        observers=observers,
        on_report=told.append,
        **options,
    )
    (found,) = torch.autograd.grad(carry.sum() + ys.sum(), [init])
    report = told[0]
    return found.numpy().tobytes(), getattr(report, "report", report)


def by_jax(directory, after=None):
    import jax
    import jax.numpy as jnp

    import longtape.jax as lt

    def host(x):
        return np.asarray(x * np.float32(os.environ[NAME]), np.float32)

    @jax.custom_vjp
    def called(x):
        return jax.pure_callback(host, jax.ShapeDtypeStruct((3,), jnp.float32), x)

    called.defvjp(lambda x: (called(x), None), lambda _, bar: (bar,))
    told = []
    options = {} if directory is None else {"resume": directory, "resume_seconds": 1e-6}
    costs = longtape.Costs(1e-3, 2e-3, 1.1e-3, 1e-3, write_bytes_per_second=6e3, read_bytes_per_second=6e3)

    def loss(init):
        step = lambda c, _: (jnp.sin(called(c)), None)  # noqa: E731
        observers = [] if after is None else [Stopper(after)]
        last, _ = lt.scan(
            step, init, None, STEPS, memory=400, costs=costs, observers=observers, on_report=told.append, **options
        )
        return last.sum()

    found = jax.grad(loss)(jnp.ones(3))
    report = told[0]
    return np.asarray(found).tobytes(), getattr(report, "report", report)


@pytest.mark.parametrize("front", [by_sweep, by_torch, by_jax])
@pytest.mark.parametrize("after", [8, -4])
def test_steps_that_do_something_else_are_refused(tmp_path, gain, front, after):
    with pytest.raises(Stop):
        front(tmp_path, after)
    gc.collect()
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    gain("1.25")
    with pytest.raises(longtape.ResumeError, match=r"run again from the same state, end with another (state|carry)"):
        front(tmp_path)
    gc.collect()
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    gain("1.0")
    found, report = front(tmp_path)
    assert found == front(None)[0]
    assert report.resumed_from
    assert any("were run again" in note for note in report.notes)


@pytest.mark.parametrize("after", [30, 75, 100, 112])
@pytest.mark.parametrize("costs", [STORING, IN_MEMORY])
def test_there_is_always_something_to_run_again(tmp_path, gain, after, costs):
    """Late in the reverse sweep no state is stored but the final one: the first steps are held against their hash."""
    with pytest.raises(Stop):
        by_sweep(tmp_path, after, costs, slots=3)
    gain("1.25")
    with pytest.raises(longtape.ResumeError, match="run again"):
        by_sweep(tmp_path, costs=costs, slots=3)
    gain("1.0")
    assert by_sweep(tmp_path, costs=costs, slots=3)[0] == by_sweep(None)[0]


def test_it_takes_no_more_memory_than_a_run_that_begins(tmp_path):
    """Two states: one to keep, one to be made durable from."""
    with pytest.raises(Stop):
        by_sweep(tmp_path, 40, IN_MEMORY, slots=2)
    found, report = by_sweep(tmp_path, None, IN_MEMORY, slots=2)
    assert found == by_sweep(None)[0]
    assert report.measured.peak_memory_bytes <= 2 * STATE


def test_a_run_of_which_residuals_are_stored(tmp_path, gain):
    costs = longtape.Costs(1e-3, 3e-3, 1.1e-3, 2e-3, write_bytes_per_second=1e9, read_bytes_per_second=1e9)
    with pytest.raises(Stop):
        by_sweep(tmp_path, -2, costs, slots=40, kind=HiddenRecording)
    gain("1.25")
    with pytest.raises(longtape.ResumeError, match="run again"):
        by_sweep(tmp_path, None, costs, slots=40, kind=HiddenRecording)
    gain("1.0")
    found, report = by_sweep(tmp_path, None, costs, slots=40, kind=HiddenRecording)
    assert found == by_sweep(None, None, costs, slots=40, kind=HiddenRecording)[0]
    assert report.resumed_from


def test_what_steps_write_is_no_part_of_what_they_are(tmp_path):
    """A counter and a work array, which nobody sets to the same before each call."""

    class Scribbling(Chaotic):
        outputs = ()

        def __init__(self, size):
            super().__init__(size)
            self.work, self.calls = np.random.random(size), os.getpid()

        def advance(self, start, stop):
            self.work[:] = self.state[0]
            self.calls += 1
            super().advance(start, stop)

    with pytest.raises(Stop):
        by_sweep(tmp_path, 40, kind=Scribbling)
    found, report = by_sweep(tmp_path, kind=Scribbling)
    assert found == by_sweep(None, kind=Scribbling)[0]
    assert report.resumed_from
