"""Devito operators on Longtape: the bits of ``save=True``, nothing stored that is not read, and clear errors.

Devito's own tests of checkpointing are run with `longtape.pyrevolve` in pyrevolve's
place where their source can be had: set ``DEVITO_SOURCE`` to a checkout of the installed
version, or be able to clone it.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import shutil
import subprocess
import sys
import textwrap
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("devito", reason="Devito is not installed")
pytestmark = [
    pytest.mark.skipif(shutil.which("gcc") is None, reason="Devito needs a C compiler"),
    pytest.mark.filterwarnings("default"),  # Devito's own
    pytest.mark.slow,
]

import devito  # noqa: E402
from devito import Buffer, Eq, Function, Grid, Inc, Operator, TimeFunction  # noqa: E402

import longtape  # noqa: E402
import longtape.devito  # noqa: E402
import longtape.pyrevolve as lp  # noqa: E402
from benchmarks.devito_acoustic import Acoustic  # noqa: E402
from longtape.testing.tier_fakes import FailingTier  # noqa: E402
from longtape.tiers.disk import DiskTier  # noqa: E402

SHAPE, ORDER, STEPS = (60, 50), 4, 200
STATE = 2 * 4 * (SHAPE[0] + 2 * ORDER) * (SHAPE[1] + 2 * ORDER)
"""Two levels, with halo."""


@functools.cache
def reference(steps: int = STEPS) -> tuple[Any, Any]:
    """Gradient and shot record of ``save=True``."""
    problem = Acoustic(SHAPE, ORDER, steps, save=True)
    problem.forward.apply(dt=problem.dt)
    problem.set_residual()
    problem.reverse.apply(dt=problem.dt)
    assert steps < 10 or np.abs(problem.result()).max() > 0
    return problem.result(), np.array(problem.rec.data)


@functools.cache
def built(steps: int, levels: int | None) -> Acoustic:
    return Acoustic(SHAPE, ORDER, steps, levels=levels)


def fresh(levels: int | None = None, steps: int = STEPS) -> Acoustic:
    """Operators take a second to build: those of an earlier test, with all that they wrote set to zero."""
    problem = built(steps, levels)
    for function in (problem.u, problem.v, problem.gradient, problem.rec, problem.residual):
        function.data_with_halo[:] = 0
    return problem


def sweep(problem: Acoustic, **options: Any) -> longtape.devito.Sweep:
    dt = {"dt": problem.dt}
    found = longtape.devito.Sweep(
        problem.forward, problem.reverse, [problem.u], forward_args=dt, reverse_args=dt, **options
    )
    found.forward()
    problem.set_residual()
    found.reverse()
    return found


MEMORY = {"two states": 2 * STATE + 8192, "eight": 8 * STATE, "plenty": "64MiB"}


@pytest.mark.parametrize("levels", [None, 4, 8], ids=lambda levels: f"{levels or 3} levels")
@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("on_disk", [False, True])
def test_the_gradient_of_save(memory: str, on_disk: bool, levels: int | None, scratch: Path) -> None:
    gradient, record = reference()
    problem = fresh(levels)
    budget = MEMORY[memory]
    found = sweep(problem, memory=budget, disk=scratch if on_disk else None)
    assert np.array_equal(problem.result(), gradient)
    assert np.array_equal(problem.rec.data, record)  # steps that were run again left it alone
    assert isinstance(budget, str) or found.report.measured.peak_memory_bytes <= budget


@pytest.mark.parametrize("steps", [1, 2, 4, 5])
def test_few_steps(steps: int) -> None:
    for memory in ("1MiB", 2 * STATE):
        problem = fresh(steps=steps)
        sweep(problem, memory=memory)
        assert np.array_equal(problem.result(), reference(steps)[0])


def forced(record: bool) -> longtape.Costs:
    """Costs that make storing residuals the best choice, or make it impossible."""
    speed = 1e12 if record else 4e9
    return longtape.Costs(
        1e-3, 3e-3, 1e-3 if record else None, 1e-3 if record else None, write_bytes_per_second=speed,
        read_bytes_per_second=speed,
    )  # fmt: skip


@pytest.mark.parametrize("levels", [None, 6])
def test_residuals_on_disk(levels: int | None, scratch: Path) -> None:
    """Every level of the wavefield is stored once, and the reverse operator runs on it where it was read to."""
    problem = fresh(levels)
    found = sweep(problem, memory=30 * STATE, disk=scratch, costs=forced(True))
    assert found.plan.schedule == "residuals"
    assert found.plan.record_fraction == 1.0
    assert np.array_equal(problem.result(), reference()[0])
    snapshots_and_headers = 10 * STATE + 100 * 4096
    assert found.report.measured.bytes_written <= STEPS * STATE / 2 + snapshots_and_headers
    assert found.report.measured.bytes_read > 0


def test_snapshots_on_disk(scratch: Path) -> None:
    problem = fresh()
    found = sweep(problem, memory=5 * (STATE + 8192), disk=scratch, costs=forced(False))
    assert found.plan.schedule == "asynchronous"
    assert found.report.reads > 0
    assert np.array_equal(problem.result(), reference()[0])


def test_what_storage_loses_is_run_again(scratch: Path) -> None:
    """Recorded strides that cannot be read are recorded again, in other buffers."""
    problem = fresh()
    tier = FailingTier(DiskTier(scratch), lambda call: call.operation == "read" and call.key.step % 3 == 1)
    with pytest.warns(RuntimeWarning, match="longtape"):
        found = sweep(problem, memory=30 * STATE, tier=tier, costs=forced(True))
    assert found.report.faults
    assert found.report.measured.steps_recomputed > 0
    assert np.array_equal(problem.result(), reference()[0])


def test_costs_can_be_used_again() -> None:
    problem = fresh()
    first = sweep(problem, memory=8 * STATE)
    problem = fresh()
    assert sweep(problem, memory=8 * STATE, costs=first.costs).plan.window == first.plan.window
    assert np.array_equal(problem.result(), reference()[0])


# Which levels ------------------------------------------------------------------------------------


def diffusion(reads: tuple[int, ...], levels: int | None, save: int | None = None) -> tuple[Any, ...]:
    """Diffusion, u + a·lap(u), of first order in time; the reverse operator adds up products of levels."""
    devito.configuration["log-level"] = "ERROR"
    grid = Grid(shape=(24, 24), extent=(23.0, 23.0), dtype=np.float32)
    kept = {"save": save} if save else {"save": Buffer(levels)} if levels else {}
    u = TimeFunction(name="u", grid=grid, time_order=1, space_order=2, **kept)
    first = np.random.default_rng(0).random((24, 24)).astype(np.float32)
    u.data[0] = first
    grad, weight = Function(name="grad", grid=grid), TimeFunction(name="w", grid=grid, time_order=1)
    weight.data[:] = 1.0
    ahead = Operator([Eq(u.forward, u + 0.1 * u.laplace)], name="Ahead")
    levels_read = {-1: u.backward, 0: u, 1: u.forward}
    product = functools.reduce(lambda a, b: a * b, [levels_read[level] for level in reads])
    back = Operator([Eq(weight.backward, 0.9 * weight), Inc(grad, product * weight)], name="Back")
    return u, ahead, back, grad, weight


CASES = [((0,), None), ((0, 1), None), ((1,), None), ((1,), 5), ((-1, 1), 3), ((-1,), 4)]
"""Levels that the reverse operator reads, and those of the buffer."""


@pytest.mark.parametrize(("reads", "levels"), CASES)
def test_first_order_in_time_and_other_levels(reads: tuple[int, ...], levels: int | None) -> None:
    steps = 60
    times = {"time_m": 1, "time_M": steps}
    u, ahead, back, expected, _ = diffusion(reads, None, save=steps + 3)
    u.data[1] = u.data[0]
    ahead.apply(**times)
    back.apply(**times)
    for memory in (7_000, "1MiB"):
        u, ahead, back, grad, _ = diffusion(reads, levels)
        u.data[1] = u.data[0]
        run = longtape.devito.Sweep(ahead, back, [u], memory=memory, forward_args=times, reverse_args=times)
        run.forward()
        run.reverse()
        np.testing.assert_allclose(np.array(grad.data), np.array(expected.data), rtol=1e-6)
        assert np.any(grad.data)


def test_two_wavefields_of_which_one_is_read() -> None:
    """A first-order system: velocity and pressure, written one after the other; the gradient reads the pressure."""
    times = {"time_m": 0, "time_M": 40}
    results = []
    for memory in (None, 15_000, 50_000, "1MiB"):
        grid = Grid(shape=(20, 20), extent=(19.0, 19.0), dtype=np.float32)
        kept = {} if memory else {"save": 42}
        p, q = (TimeFunction(name=name, grid=grid, time_order=1, space_order=2, **kept) for name in "pq")
        p.data[0] = np.random.default_rng(0).random((20, 20))
        weight, grad = TimeFunction(name="w", grid=grid, time_order=1), Function(name="grad", grid=grid)
        weight.data[:] = 1.0
        ahead = Operator([Eq(q.forward, q + 0.2 * p.laplace), Eq(p.forward, p + 0.2 * q.forward)], name="System")
        back = Operator([Eq(weight.backward, 0.9 * weight), Inc(grad, p * weight)], name="Back")
        if memory is None:
            ahead.apply(**times)
            back.apply(**times)
        else:
            run = longtape.devito.Sweep(ahead, back, [p, q], memory=memory, forward_args=times, reverse_args=times)
            run.forward()
            run.reverse()
        results.append(np.array(grad.data))
    assert np.any(results[0])
    for found in results[1:]:
        np.testing.assert_allclose(found, results[0], rtol=1e-5)


def test_what_the_forward_operator_adds_up_is_added_once() -> None:
    problem = Acoustic(SHAPE, ORDER, STEPS)
    u = problem.u
    light = Function(name="light", grid=u.grid)
    model = {f.name: f for f in problem.forward.input}
    m, damp = model["m"], model["damp"]
    step = devito.solve(m * u.dt2 - u.laplace + damp * u.dt, u.forward)
    dt = u.grid.stepping_dim.spacing
    problem.forward = Operator(
        [Eq(u.forward, step), problem.src.inject(field=u.forward, expr=problem.src * dt**2 / m),
         problem.rec.interpolate(expr=u), Inc(light, u**2)], name="Lit"
    )  # fmt: skip
    problem.forward.apply(dt=problem.dt)
    expected = np.array(light.data)
    for function in (u, light):
        function.data[:] = 0
    sweep(problem, memory=2 * STATE)
    assert np.array_equal(light.data, expected)
    assert np.array_equal(problem.result(), reference()[0])


def test_inversion_example(scratch: Path) -> None:
    """The misfit falls, and the model comes closer to the true one."""
    path = Path(__file__).parents[1] / "examples" / "fwi.py"
    spec = importlib.util.spec_from_file_location("fwi", path)
    assert spec is not None
    assert spec.loader is not None
    fwi = importlib.util.module_from_spec(spec)
    sys.modules["fwi"] = fwi
    spec.loader.exec_module(fwi)
    result = fwi.invert(fwi.SHORT, str(scratch))
    assert result.misfits == sorted(result.misfits, reverse=True)
    assert result.misfits[-1] < 0.5 * result.misfits[0]
    error = [np.linalg.norm(model - result.true) for model in (result.start, result.found)]
    assert error[1] < error[0]


# Bad input ---------------------------------------------------------------------------------------


def test_operators_that_run_over_different_times() -> None:
    problem = fresh()
    with pytest.raises(longtape.UsageError, match="Forward runs over times 1 to 200, Gradient over 1 to 100"):
        longtape.devito.Sweep(
            problem.forward, problem.reverse, [problem.u], memory="1MiB", forward_args={"dt": 1.0},
            reverse_args={"dt": 1.0, "time_M": 100},
        )  # fmt: skip


def test_a_wavefield_that_is_saved() -> None:
    problem = Acoustic(SHAPE, ORDER, STEPS, save=True)
    with pytest.raises(longtape.UsageError, match="u saves every time step"):
        sweep(problem, memory="1MiB")


def test_a_wavefield_that_is_left_out() -> None:
    problem = fresh()
    dt = {"dt": problem.dt}
    with pytest.raises(longtape.UsageError, match="wavefields"):
        longtape.devito.Sweep(problem.forward, problem.reverse, [], memory="1MiB", forward_args=dt, reverse_args=dt)
    u, ahead, back, _, weight = diffusion((0,), None)
    with pytest.raises(longtape.UsageError, match="operator Ahead does not have the wavefield w"):
        longtape.devito.Sweep(ahead, back, [weight], memory="1MiB", forward_args={"time_M": 9})
    other = TimeFunction(name="p", grid=u.grid, time_order=1, space_order=2)
    both = Operator([Eq(u.forward, u + other), Eq(other.forward, u - other)], name="Both")
    times = {"time_m": 0, "time_M": 9}
    with pytest.raises(longtape.UsageError, match="Both updates p and reads what the time before left in it"):
        longtape.devito.Sweep(both, back, [u], memory="1MiB", forward_args=times, reverse_args=times)
    derived = Operator([Eq(u.forward, 0.9 * u), Eq(other.forward, u.forward**2)], name="Derived")
    uses = Operator([Inc(Function(name="g", grid=u.grid), other)], name="Uses")
    with pytest.raises(longtape.UsageError, match="Derived updates p and operator Uses reads it"):
        longtape.devito.Sweep(derived, uses, [u], memory="1MiB", forward_args=times, reverse_args=times)


def test_a_buffer_that_is_too_short() -> None:
    u, ahead, *_ = diffusion((1, 0), None)
    backward = Operator([Inc(Function(name="g", grid=u.grid), u * u.backward * u.forward)], name="Old")
    times = {"time_m": 1, "time_M": 9}
    with pytest.raises(longtape.UsageError, match=r"Old accesses u at times -1 to \+1.*save=Buffer\(4\)"):
        longtape.devito.Sweep(ahead, backward, [u], memory="1MiB", forward_args=times, reverse_args=times)


def test_an_operator_that_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = fresh()
    run = longtape.devito.Sweep(
        problem.forward, problem.reverse, [problem.u], memory=3 * STATE, forward_args={"dt": problem.dt},
        reverse_args={"dt": problem.dt},
    )  # fmt: skip
    monkeypatch.setattr(run._job._forward, "_function", lambda *values: 200)
    with pytest.raises(RuntimeError, match="Forward returned 200 at times 1 to") as caught:
        run.forward()
    assert "forward sweep" in caught.value.__notes__[0]


# In pyrevolve's place ----------------------------------------------------------------------------


def test_devitos_checkpoints_on_longtape(scratch: Path) -> None:
    """The classes that Devito makes for pyrevolve run on Longtape as they are."""
    pytest.importorskip("pyrevolve")
    for at_once in (1, 2):  # the reverse operator reads u at its own time only: two of three levels
        problem = fresh()
        forward = devito.CheckpointOperator(problem.forward, dt=problem.dt, u=problem.u)
        reverse = devito.CheckpointOperator(problem.reverse, dt=problem.dt, u=problem.u)
        checkpoint = devito.DevitoCheckpoint([problem.u])
        revolver = lp.Revolver(checkpoint, forward, reverse, None, STEPS, disk=scratch, max_reverse=at_once)
        revolver.apply_forward()
        problem.set_residual()
        revolver.apply_reverse()
        assert np.array_equal(problem.result(), reference()[0])


def test_devito_runs_on_it_where_pyrevolve_is_missing(tmp_path: Path) -> None:
    program = """
        import longtape.pyrevolve
        longtape.pyrevolve.install()
        import devito
        from benchmarks.devito_acoustic import Acoustic
        import numpy as np
        assert devito.Revolver is longtape.pyrevolve.Revolver
        problem = Acoustic((30, 30), 4, 50)
        forward = devito.CheckpointOperator(problem.forward, dt=problem.dt, u=problem.u)
        reverse = devito.CheckpointOperator(problem.reverse, dt=problem.dt, u=problem.u)
        revolver = devito.Revolver(devito.DevitoCheckpoint([problem.u]), forward, reverse, None, 50)
        revolver.apply_forward()
        problem.set_residual()
        revolver.apply_reverse()
        whole = Acoustic((30, 30), 4, 50, save=True)
        whole.forward.apply(dt=whole.dt)
        whole.set_residual()
        whole.reverse.apply(dt=whole.dt)
        assert np.abs(whole.result()).max() > 0 and np.array_equal(problem.result(), whole.result())
    """
    root = Path(__file__).parents[1]
    subprocess.run([sys.executable, "-c", textwrap.dedent(program)], cwd=root, check=True, timeout=100)


def source_of_devito(directory: Path) -> Path:
    """A checkout of the installed version, or a skipped test."""
    if given := os.environ.get("DEVITO_SOURCE"):
        return Path(given)
    address, tag = "https://github.com/devitocodes/devito.git", f"v{version('devito')}"
    command = ["git", "clone", "--quiet", "--depth", "1", "--branch", tag, address, str(directory / "devito")]
    environment = {**os.environ, "GIT_TERMINAL_PROMPT": "0"}
    try:
        subprocess.run(command, capture_output=True, text=True, timeout=60, check=True, env=environment)
    except (OSError, subprocess.SubprocessError) as error:
        reason = (getattr(error, "stderr", None) or str(error)).strip().splitlines()[-1:]
        pytest.skip(f"the source of Devito {tag} cannot be had: {reason}")
    return directory / "devito"


@pytest.mark.timeout(300)
def test_devitos_own_tests(tmp_path: Path) -> None:
    if importlib.util.find_spec("scipy") is None:
        pytest.skip("Devito's examples need SciPy")
    source = source_of_devito(tmp_path)
    for name in ("conftest.py", "tests/test_checkpointing.py"):
        (tmp_path / Path(name).name).write_bytes((source / name).read_bytes())
    program = "import longtape.pyrevolve as p; p.install(); import pytest, sys; sys.exit(pytest.main(sys.argv[1:]))"
    arguments = ["-q", "-p", "no:cacheprovider", "--rootdir", str(tmp_path), "test_checkpointing.py"]
    path = os.pathsep.join(str(Path(p).resolve()) for p in sys.path if p and Path(p).name == "src")
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "skipped" not in done.stdout.splitlines()[-1]
