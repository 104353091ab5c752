"""The benchmarks' steps have true adjoints, and the peers compute the same gradients."""

from __future__ import annotations

import json
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("numba")

from benchmarks import baselines, stencil
from longtape.plan.binomial import advances

SIDE = 6


class TestStencil:
    """x -> x + dt (lap x + x - x³), and its adjoint by hand."""

    def test_the_step_is_the_formula(self) -> None:
        x = stencil.initial(SIDE)
        out = np.empty_like(x)
        stencil.step(x, out, stencil.DT)
        laplacian = sum(np.roll(x, shift, axis) for axis in range(3) for shift in (1, -1)) - 6 * x
        np.testing.assert_allclose(out, x + stencil.DT * (laplacian + x - x**3), atol=1e-6)

    def test_dot_product(self) -> None:
        """<a, J v> = <Jᵀ a, v>, with J v by central differences in double precision."""
        x, v, a = (stencil.initial(SIDE, seed).astype(np.float64) for seed in (0, 1, 2))
        plus, minus, pulled = np.empty_like(x), np.empty_like(x), np.empty_like(x)
        dt, size = 0.1, 1e-5
        stencil.step(x + size * v, plus, dt)
        stencil.step(x - size * v, minus, dt)
        stencil.adjoint_step(x, a, pulled, dt)
        assert np.vdot(a, (plus - minus) / (2 * size)) == pytest.approx(np.vdot(pulled, v), rel=1e-8)

    def test_taylor(self) -> None:
        """The remainder of <a, step(x + h v)> after its first-order term falls as h²."""
        x, v, a = (stencil.initial(SIDE, seed).astype(np.float64) for seed in (0, 1, 2))
        gradient, out = np.empty_like(x), np.empty_like(x)
        stencil.adjoint_step(x, a, gradient, 0.1)

        def value(size: float) -> float:
            stencil.step(x + size * v, out, 0.1)
            return float(np.vdot(a, out))

        start, slope = value(0.0), float(np.vdot(gradient, v))
        remainders = [abs(value(size) - start - size * slope) for size in (1e-2, 5e-3, 2.5e-3)]
        orders = [np.log2(coarse / fine) for coarse, fine in pairwise(remainders)]
        assert orders == pytest.approx([2, 2], abs=0.05)


class Counting:
    """Steps that only remember which state they are at."""

    def __init__(self, slots: int) -> None:
        self.at, self.slots, self.reversed = 0, [-1] * slots, []

    def save(self, slot: int) -> None:
        self.slots[slot] = self.at

    def load(self, slot: int) -> None:
        self.at = self.slots[slot]

    def advance(self, start: int, stop: int) -> None:
        assert self.at == start < stop
        self.at = stop

    def turn(self) -> None:
        self.turned_at = self.at

    def reverse(self, index: int) -> None:
        assert self.at == index
        self.reversed.append(index)


@pytest.mark.parametrize(("steps", "slots"), [(1, 1), (2, 1), (7, 1), (10, 3), (57, 4), (100, 8), (9, 20)])
def test_the_revolve_peer_is_optimal(steps: int, slots: int) -> None:
    job = Counting(slots)
    assert baselines.revolve(job, steps, slots) == advances(steps, slots)
    assert job.reversed == list(reversed(range(steps)))
    assert job.turned_at == steps - 1


def norm(outcome: baselines.Outcome) -> float:
    return outcome["gradient_norm"]


def test_the_stencil_peers_agree() -> None:
    expected = norm(baselines.stencil_store_all(SIDE, 20))
    assert norm(baselines.stencil_revolve(SIDE, 20, 3)) == expected


def test_pyrevolve_agrees() -> None:
    pytest.importorskip("pyrevolve")
    assert norm(baselines.stencil_pyrevolve(SIDE, 20, 3)) == norm(baselines.stencil_store_all(SIDE, 20))


def test_checkpoint_schedules_agrees(tmp_path: Path) -> None:
    pytest.importorskip("checkpoint_schedules")
    expected = norm(baselines.stencil_store_all(SIDE, 20))
    assert norm(baselines.stencil_multistage(SIDE, 20, 2, 2, str(tmp_path))) == expected
    assert norm(baselines.stencil_followed(SIDE, 20, 2, 2, str(tmp_path))) == expected


def test_the_lstm_peers_agree() -> None:
    pytest.importorskip("torch")
    expected = norm(baselines.lstm_store_all(30))
    assert norm(baselines.lstm_segments(30)) == pytest.approx(expected, rel=1e-5)
    assert norm(baselines.lstm_revolve(30, 4)) == pytest.approx(expected, rel=1e-5)


def test_a_noisy_run_is_set_beside_its_model(scratch: Path) -> None:
    from benchmarks import noise

    found = noise.one("r=2 s=8 lognormal", 150, 0, str(scratch))
    assert found["schedule"] == "asynchronous"
    assert found["forward_stall_seconds"] == 0
    assert 0.7 < found["measured_over_simulated"] < 3.0  # a loaded machine is slower than the model


def test_the_draws_of_noise_have_mean_one() -> None:
    from itertools import islice

    from benchmarks import noise

    for draw in (noise.lognormal, noise.pareto):
        assert np.mean(list(islice(noise.draws(draw, 1.0, 3), 200_000))) == pytest.approx(1.0, rel=0.1)


def test_memory_grows_by_less_than_64_bytes_a_step(tmp_path: Path) -> None:
    """The resident size of a fresh process, at two lengths: nothing is kept a step but what the budget counts."""
    pytest.importorskip("torch")
    program = "import sys; from benchmarks import residuals; residuals.print_growth(4_000, 20_000, sys.argv[1])"
    command = [sys.executable, "-c", program, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=110, check=False)
    assert done.returncode == 0, done.stderr
    slack = 512 * 1024 / 16_000  # pages, and the trace before it is full
    for way, grown in json.loads(done.stdout).items():
        assert grown < 64 + slack, f"{way} keeps {grown:.0f} bytes a step"


class TestGpu:
    """The program of the promises on a device, tried on a simulated one."""

    def test_it_runs_on_a_simulated_device(self) -> None:
        torch = pytest.importorskip("torch")
        from benchmarks import gpu

        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        document = gpu.main(["--simulated", "--quick", "--only", "delays", "--runs", "4"])
        torch.set_num_threads(threads)
        assert document["device"] == "a simulated device"
        assert len(document["kept"]) == 1
        assert all(document["kept"].values())

    def test_without_a_device_it_says_what_to_do(self, monkeypatch: pytest.MonkeyPatch) -> None:
        torch = pytest.importorskip("torch")
        from benchmarks import gpu

        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        with pytest.raises(SystemExit, match="needs a CUDA device.*make bench-gpu.*--simulated --quick"):
            gpu.main([])
