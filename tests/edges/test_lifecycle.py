"""Nothing is left behind: of sweeps that are dropped, kept, forked, or there when the process ends."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import threading
import time
import warnings
import weakref
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from models import Chaotic, OutOfPlace, Recording

import longtape
from longtape.plan.costs import Costs
from longtape.tiers.memory import MemoryTier
from tests.edges.interrupting import Nothing, locked

SIZE, STEPS = 9000, 30
MEMORY = 6 * (8 * SIZE + 64)
STORING = Costs(1e-3, 2e-3, write_bytes_per_second=1e9, read_bytes_per_second=1e9)
KINDS = (Chaotic, OutOfPlace, Recording)


def sweep(model: Any, **where: Any) -> longtape.Sweep:
    return longtape.Sweep(model, STEPS, **{"memory": MEMORY, "costs": STORING, "stuck_seconds": 5.0, **where})


# Dropped ------------------------------------------------------------------------------------------


class Failing(Chaotic):
    def reverse(self, start: int, stop: int) -> None:
        if start == STEPS // 2:
            raise ArithmeticError
        super().reverse(start, stop)


def drop(way: str, number: int, **where: Any) -> None:
    """Make a sweep, and refer to it no more."""
    model = KINDS[number % len(KINDS)](SIZE)
    if way == "fails":
        made = sweep(Failing(SIZE), **where)
        made.forward()
        made._model.adjoint[0][:] = 1.0
        with pytest.raises(ArithmeticError):  # whose traceback holds every frame
            made.reverse()
        return
    made = sweep(model, **where)
    if way != "before":
        made.forward()
    if way == "cycle":
        model.sweep = made
        made.model = model  # type: ignore[attr-defined]
    if way == "error":
        try:
            raise ValueError
        except ValueError as error:
            model.error = error
    if way == "observed":
        made.observer = lambda: made  # type: ignore[attr-defined]


@pytest.mark.parametrize("way", ["before", "forward", "cycle", "error", "fails", "observed"])
def test_a_dropped_sweep_leaves_nothing(way: str, tmp_path: Path) -> None:
    with Nothing() as nothing:
        for number in range(17):
            drop(way, number, disk=tmp_path)
        assert not nothing.left() + os.listdir(tmp_path)


def test_a_dropped_sweep_that_can_be_resumed_is_not_locked(tmp_path: Path) -> None:
    with Nothing() as nothing:
        for number in range(8):
            drop(("forward", "cycle")[number % 2], 0, resume=tmp_path, resume_seconds=1e-6, name=f"run{number}")
        assert not nothing.left() + locked(tmp_path)
    for number in range(8):  # and is gone on with
        model = Chaotic(SIZE)
        with sweep(model, resume=tmp_path, name=f"run{number}") as again:
            again.forward()
            model.start_adjoint()
            again.reverse()
        assert again.report.resumed_from is not None
    assert not os.listdir(tmp_path)


def test_what_is_dropped_goes_without_a_garbage_collection(scratch: Path) -> None:
    gc.disable()
    try:
        with Nothing() as nothing:
            made = sweep(Chaotic(SIZE), disk=scratch)
            made.forward()
            run = weakref.ref(made._run)
            del made
            assert run() is None
            assert not nothing.left(collects=False)
    finally:
        gc.enable()


def test_a_scan_whose_graph_is_dropped_empties_the_tier_before_the_next_begins_in_it() -> None:
    torch = pytest.importorskip("torch")
    from longtape.torch import scan

    weight = torch.full((500,), 0.9, requires_grad=True)
    tier = MemoryTier()
    for _ in range(5):
        carry, _ = scan(
            lambda h, x: (torch.sin(h * weight + x), None),
            torch.zeros(500),
            torch.linspace(0, 1, 200),
            memory=12_000,
            tier=tier,
            capture=False,
        )
        del carry
    until = time.monotonic() + 5.0
    while tier.bytes_in_use and time.monotonic() < until:
        time.sleep(0.001)
    assert tier.bytes_in_use == 0


class Slow(MemoryTier):
    """Takes its time to give room back."""

    def release(self, key: Any) -> None:
        time.sleep(5e-3)
        super().release(key)


def test_a_lent_tier_is_empty_when_the_call_returns() -> None:
    """And so an attempt that begins anew finds it empty."""
    with closing(Slow()) as tier:
        for _ in range(2):
            made = sweep(Chaotic(SIZE), tier=tier)
            made.forward()
            assert tier.bytes_in_use > 0
            made.close()
            assert tier.bytes_in_use == 0


# Kept ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("ends", [True, False])
def test_a_kept_sweep_holds_no_slots(kind: type, ends: bool, scratch: Path) -> None:
    with Nothing() as nothing:
        kept: list[Any] = []
        model = kind(SIZE)
        made = sweep(model, disk=scratch)
        made.forward()
        if ends:
            model.start_adjoint()
            made.reverse()
            kept += [made.report, made.report.trace, made.trace]
        else:
            made.close()
        kept += [made, made.plan]
        assert not nothing.left()


def gradients(front: str, directory: Path, **hooks: Any) -> None:
    if front == "torch":
        torch = pytest.importorskip("torch")
        from longtape.torch import scan

        weight = torch.full((2000,), 0.9, requires_grad=True)
        for capture in (False, True):
            init, xs = torch.zeros(2000, requires_grad=True), torch.linspace(0, 1, STEPS)
            carry, _ = scan(
                lambda h, x: (torch.tanh(h * weight + x), None),
                init,
                xs,
                memory=60_000,
                disk=directory,
                capture=capture,
                **hooks,
            )
            torch.autograd.grad(carry.sum(), [init, weight])
    else:
        jax = pytest.importorskip("jax")
        import longtape.jax as lt

        init, xs = np.zeros(2000, np.float32), np.linspace(0, 1, STEPS, dtype=np.float32)

        def loss(init: Any) -> Any:
            carry, _ = lt.scan(
                lambda h, x: (jax.numpy.tanh(0.9 * h + x), None), init, xs, memory=60_000, disk=directory, **hooks
            )
            return carry.sum()

        for _ in range(2):
            jax.grad(loss)(init)


@pytest.mark.parametrize("front", ["torch", "jax"])
def test_hooks_are_given_reports_which_hold_no_slots(front: str, scratch: Path) -> None:
    with Nothing() as nothing:
        reports: list[Any] = []
        plans: list[Any] = []
        gradients(front, scratch, on_report=reports.append, on_plan=plans.append)
        assert not nothing.left()
    for report in reports:
        assert isinstance(report, longtape.Report)
        assert report.trace.steps_forward == STEPS
        assert "trace" not in report.to_json()
        assert "trace" not in repr(report)


class Tiny(Chaotic):
    """Steps so short that windows of them are reversed at once, from rows beside the slots."""

    def advance(self, start: int, stop: int) -> None:
        for _ in range(start, stop):
            self.state[0] *= 0.999

    def reverse(self, start: int, stop: int) -> None:
        self.adjoint[0] *= 0.999


def test_a_kept_sweep_of_tiny_steps_holds_no_rows() -> None:
    made = longtape.Sweep(Tiny(50), 20_000, memory="64KiB")
    made.forward()
    made._model.adjoint[0][:] = 1.0
    made.reverse()
    assert made.report.window > 1
    gc.collect()
    lists = [found for found in gc.get_objects() if type(found) is list and len(found) == made.report.window - 1]
    assert not [rows for rows in lists if all(type(row) is list and type(row[0]) is np.ndarray for row in rows)]


@pytest.mark.slow
@pytest.mark.parametrize("way", ["reversed", "closed", "dropped"])
def test_sweeps_of_devito(way: str, scratch: Path) -> None:
    pytest.importorskip("devito")
    import longtape.devito
    from benchmarks.devito_acoustic import Acoustic

    problem = Acoustic((60, 50), 4, 60)
    arguments = {"dt": problem.dt}
    with warnings.catch_warnings(), Nothing() as nothing:
        warnings.simplefilter("ignore")  # Devito's own
        made: Any = longtape.devito.Sweep(
            problem.forward,
            problem.reverse,
            [problem.u],
            forward_args=arguments,
            reverse_args=arguments,
            memory="512KiB",
            disk=scratch,
        )
        made.forward()
        if way == "reversed":
            problem.set_residual()
            made.reverse()
        elif way == "closed":
            made.close()
        else:
            made = None
        assert not nothing.left()


# Threads that cannot be started -----------------------------------------------------------------------


def refuse_start(monkeypatch: pytest.MonkeyPatch, number: int) -> list[str]:
    """Fail the start of one of our threads; returns the names of those that were started."""
    started: list[str] = []
    real = threading.Thread.start

    def start(thread: threading.Thread) -> None:
        if thread.name.startswith("longtape"):
            started.append(thread.name)
            if len(started) - 1 == number:
                raise RuntimeError("can't start new thread")
        real(thread)

    monkeypatch.setattr(threading.Thread, "start", start)
    return started


@pytest.mark.parametrize("number", range(4))
def test_where_no_thread_can_be_started_the_run_goes_on(
    number: int, scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = Chaotic(SIZE)
    with sweep(expected) as plain:
        plain.forward()
        expected.start_adjoint()
        plain.reverse()
    started = refuse_start(monkeypatch, number)
    began = time.monotonic()
    model = Chaotic(SIZE)
    memory = MEMORY + (64 << 20)  # of which much is provided aside
    with Nothing() as nothing, warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        with sweep(model, disk=scratch, memory=memory) as made:
            made.forward()
            model.start_adjoint()
            made.reverse()
        assert not nothing.left()
    assert time.monotonic() - began < 5.0
    assert model.result() == expected.result()
    needed = number < len(started) and ("write" in started[number] or "read" in started[number])
    assert any("no more threads" in fault for fault in made.report.faults) == needed
    assert any("no more threads" in str(warning.message) for warning in seen) == needed


@pytest.mark.parametrize("number", range(3))
def test_a_run_that_is_to_be_resumed_says_so_at_once(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refuse_start(monkeypatch, number)
    with Nothing() as nothing:
        with pytest.raises(longtape.StorageError, match="no more threads"):
            sweep(Chaotic(SIZE), resume=tmp_path)
        assert not nothing.left() + locked(tmp_path)


# The end of a process -------------------------------------------------------------------------------

PENDING = """
import sys
sys.path[:0] = {path!r}
from tests.edges.test_lifecycle import *
import tests.edges.test_lifecycle as here
made = sweep(Chaotic(SIZE), **{where!r})
{body}
print("ends", flush=True)
"""
BODIES = {
    "forward": "made.forward()",
    "a global of another module": "made.forward(); here.kept = made",
    "a fork": """
made.forward()
child = os.fork()
if child:
    assert os.waitpid(child, 0)[1] == 0
""",
    "a fork that drops it": """
made.forward()
child = os.fork()
if child:
    assert os.waitpid(child, 0)[1] == 0
else:
    del made
    gc.collect()
    sys.exit(0)
""",
}


@pytest.mark.parametrize("where", ["disk", "resume"])
@pytest.mark.parametrize("body", BODIES)
def test_a_process_that_ends_with_a_pending_sweep(body: str, where: str, tmp_path: Path) -> None:
    root = Path(__file__).parents[2]
    paths = [str(root), str(root / "tests"), str(Path(longtape.__file__).parents[1])]
    program = PENDING.format(path=paths, where={where: str(tmp_path)}, body=BODIES[body])
    began = time.monotonic()
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "ends" in done.stdout
    assert time.monotonic() - began < 30.0
    if where == "disk":
        assert not os.listdir(tmp_path)
    else:
        assert not locked(tmp_path)


# Odd amounts --------------------------------------------------------------------------------------


def test_amounts_may_be_whole_floats_and_integers_of_numpy(scratch: Path) -> None:
    made = sweep(Chaotic(SIZE), memory=float(MEMORY), disk=scratch, disk_limit=np.int64(1 << 30))
    assert made.plan.slots > 0
    made.close()
    for memory in (1.5, float("nan"), float("inf"), -1.0):
        with pytest.raises(longtape.UsageError, match=r"amount of bytes"):
            sweep(Chaotic(SIZE), memory=memory)
    with suppress(longtape.BudgetError):
        sweep(Chaotic(SIZE), memory=np.int64(10))


def test_carries_without_bytes_and_counts_of_numpy(scratch: Path, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    from longtape.torch import scan, while_loop

    weight = torch.ones(3, requires_grad=True)
    for capture in (False, True):
        for where in ({}, {"disk": scratch}, {"resume": tmp_path, "resume_seconds": np.int64(3)}):
            _, ys = scan(
                lambda c, x: (c * 1.0, (weight * x).sum()),
                torch.zeros(0),
                torch.arange(20.0),
                length=np.int64(20),
                memory=1e3,
                capture=capture,
                **where,
            )
            (found,) = torch.autograd.grad(ys.sum(), [weight])
            assert found.tolist() == [190.0] * 3
    carry = while_loop(lambda c: True, lambda c: c * weight, torch.ones(3), memory=1e3, max_steps=np.int64(7))
    assert torch.autograd.grad(carry.sum(), [weight])[0].tolist() == [7.0] * 3


def test_the_same_in_jax(scratch: Path, tmp_path: Path) -> None:
    jax = pytest.importorskip("jax")
    import longtape.jax as lt

    jnp, weight = jax.numpy, jax.numpy.ones(3)
    for init in (jnp.zeros(0), (), (jnp.zeros(0), jnp.zeros((2, 0)))):
        for where in ({}, {"disk": scratch}, {"resume": tmp_path, "resume_seconds": np.int64(3)}):

            def loss(weight: Any, init: Any = init, where: Any = where) -> Any:
                def step(carry: Any, x: Any) -> Any:
                    return jax.tree.map(lambda leaf: leaf * 1.0, carry), (weight * x).sum()

                return lt.scan(step, init, jnp.arange(20.0), memory=1e3, **where)[1].sum()

            assert jax.grad(loss)(weight).tolist() == [190.0] * 3
    assert lt.scan(lambda c, x: (c, None), weight, length=np.int64(0), memory=100)[0].tolist() == [1.0] * 3

    def loop(weight: Any) -> Any:
        return lt.while_loop(lambda c: True, lambda c: c * weight, jnp.ones(3), memory=1e3, max_steps=np.int64(7)).sum()

    assert jax.grad(loop)(weight).tolist() == [7.0] * 3
