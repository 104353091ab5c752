"""JAX scans that are stopped or killed, and found again by their name."""

import os
import random
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

import longtape
import longtape.jax as lt
from longtape.actions import Turn
from tests.jax import resumed

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
KINDS = ["residuals", "snapshots"]


class Stop(Exception):
    pass


class Stopper:
    """An observer that stops the run after so many actions, counted from the turn if asked for."""

    def __init__(self, after, *, turned=False):
        self.after, self.counts = after, not turned

    def on_action(self, action, began, ended):
        time.sleep(1e-3)
        self.counts = self.counts or isinstance(action, Turn)
        self.after -= self.counts
        if self.after == 0:
            raise Stop

    def on_transfer(self, *_):
        pass


@pytest.fixture(scope="module")
def expected():
    return {kind: resumed.gradient(kind, None, 1.0) for kind in KINDS}


@pytest.mark.parametrize("kind", KINDS)
def test_killed_once_in_each_sweep(tmp_path, kind, expected):
    """In fresh processes, killed while the journal says that they are in one sweep or the other."""
    out, journal = tmp_path / "out", tmp_path / "run" / "scan.longtape-journal"
    journal.parent.mkdir()
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'src'}:{os.environ.get('PYTHONPATH', '')}"}
    program = [sys.executable, "-m", "tests.jax.resumed", kind, str(tmp_path / "run"), str(out)]
    for size in (1, 12_000):
        running = subprocess.Popen(program, cwd=ROOT, env=environment)
        while running.poll() is None and not (journal.exists() and journal.stat().st_size > size):
            time.sleep(0.002)
        time.sleep(0.05)
        running.kill()
        running.wait()
    if not out.exists():
        subprocess.run(program, cwd=ROOT, env=environment, check=True)
    assert out.read_bytes() == expected[kind]
    assert not os.listdir(tmp_path / "run")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("reverse", [False, True])
def test_stopped_anywhere(tmp_path, kind, reverse):
    expected = resumed.gradient(kind, None, 1.0, reverse=reverse)
    chance, resumptions = random.Random(kind), set()
    for _ in range(3):
        for after in [*(chance.randrange(1, 300) for _ in range(4)), 0]:
            told = []
            stopper = [Stopper(after, turned=chance.random() < 0.5)]
            try:
                found = resumed.gradient(kind, tmp_path, 0.01, stopper, on_report=told.append, reverse=reverse)
            except Stop:
                continue
            break
        assert found == expected
        assert not told[0].faults
        resumptions.add(told[0].resumed_from is not None)
        assert not os.listdir(tmp_path)
    assert True in resumptions


def test_the_reverse_sweep_goes_on_where_it_was(tmp_path, expected):
    told = []
    with pytest.raises(Stop):
        resumed.gradient("snapshots", tmp_path, 1e-6, [Stopper(150, turned=True)])
    found = resumed.gradient("snapshots", tmp_path, 1.0, on_report=told.append)
    assert found == expected["snapshots"]
    assert "adjoint" in told[0].resumed_from


def small(directory, *, scale=1.0, steps=50, step_scale=1.0, memory=200, observers=(), **options):
    weights = jnp.full(3, scale)

    def loss(init):
        def step(carry, _):
            return jnp.sin(carry * weights) * step_scale, None

        last, _ = lt.scan(step, init, None, steps, memory=memory, resume=directory, observers=observers, **options)
        return last.sum()

    return jax.grad(loss)(jnp.arange(3.0))


@pytest.mark.parametrize(
    ("what", "options"),
    [
        ("set of parameters", {"scale": 2.0}),
        ("number of steps", {"steps": 51}),
        ("step", {"step_scale": 0.5}),
    ],
)
def test_another_scan_is_refused(tmp_path, what, options):
    with pytest.raises(Stop):
        small(tmp_path, observers=[Stopper(2, turned=True)], resume_seconds=1e-6)
    with pytest.raises(longtape.ResumeError, match=what):
        small(tmp_path, **options)
    assert (small(tmp_path) == small(None)).all()


def test_another_derivative_rule_is_refused(tmp_path):
    def gradient(factor, observers=()):
        @jax.custom_vjp
        def rule(u):
            return jnp.sin(u)

        rule.defvjp(lambda u: (jnp.sin(u), u), lambda u, bar: (factor * bar * jnp.cos(u),))

        def loss(init):
            options = {"memory": 200, "resume": tmp_path, "resume_seconds": 1e-6}
            return lt.scan(lambda c, _: (rule(c), None), init, None, 50, observers=observers, **options)[0].sum()

        return jax.grad(loss)(jnp.arange(3.0))

    with pytest.raises(Stop):
        gradient(1.0, [Stopper(2, turned=True)])
    with pytest.raises(longtape.ResumeError, match="adjoint of the step"):
        gradient(0.5)
    gradient(1.0)
    assert not os.listdir(tmp_path)


def test_other_cotangents_begin_the_reverse_sweep_anew(tmp_path):
    weights, init, xs = resumed.problem()

    def pulled_back(bar, observers=()):
        def last(weights):
            def step(carry, x):
                return jnp.tanh(carry @ weights + x), None

            options = {"memory": 10 * resumed.STATE, "resume": tmp_path, "resume_seconds": 1e-6}
            return lt.scan(step, init[0], xs, observers=observers, **options)[0]

        return jax.vjp(last, weights)[1](jnp.full_like(init[0], bar))[0]

    with pytest.raises(Stop):
        pulled_back(1.0, [Stopper(100, turned=True)])
    with pytest.warns(RuntimeWarning, match="another one"):
        found = pulled_back(2.0)
    assert (found == pulled_back(2.0)).all()
    assert not os.listdir(tmp_path)


def test_bad_input(tmp_path):
    with pytest.raises(longtape.UsageError, match="resume_seconds"):
        small(tmp_path, resume_seconds=0)
    with pytest.raises(longtape.UsageError, match="tier"):
        small(tmp_path, tier=object())
    with pytest.raises(longtape.BudgetError):
        small(tmp_path, memory=12)
    assert not os.listdir(tmp_path)
