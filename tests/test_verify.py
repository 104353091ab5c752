"""`verify=True`: steps that do not repeat are named, and sound ones pass."""

from __future__ import annotations

import itertools
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from models import Chaotic, OutOfPlace, Spanning, store_everything

import longtape
from longtape.errors import ReplayError
from longtape.testing.tiers import DamagingTier
from longtape.tiers.memory import MemoryTier

STATE = 64 + 12


class Forgetful:
    """Mixes in a step that reads a counter: it gives something else each time it is run."""

    at = 20
    runs = 0
    armed = False

    def disturb(self, step: int, count: Any) -> None:
        if self.armed and step == self.at:
            self.runs += 1
            count += 1000 * (self.runs > 1)


class ForgetfulInPlace(Forgetful, Chaotic):
    def advance(self, start, stop):
        for step in range(start, stop):
            super().advance(step, step + 1)
            self.disturb(step, self.state[0])


class ForgetfulOutOfPlace(Forgetful, OutOfPlace):
    def advance_into(self, step, source, target):
        super().advance_into(step, source, target)
        self.disturb(step, target[0])


def run(model: Any, steps: int, **options: Any) -> longtape.Sweep:
    with longtape.Sweep(model, steps, **options) as sweep:
        model.armed = True
        sweep.forward()
        model.start_adjoint()
        sweep.reverse()
    return sweep


@pytest.mark.parametrize("kind", [ForgetfulInPlace, ForgetfulOutOfPlace])
@pytest.mark.parametrize("on_disk", [False, True])
def test_a_step_that_reads_a_counter_is_named(kind: type, on_disk: bool, scratch: Path) -> None:
    with pytest.raises(ReplayError, match=r"step 20 .*state\[0\]") as caught:
        run(kind(), 60, memory=4 * STATE, disk=scratch if on_disk else None, verify=True)
    assert (caught.value.step, caught.value.leaf) == (20, "state[0]")
    assert "while running steps" in " ".join(caught.value.__notes__)


def test_without_verify_it_is_not_named() -> None:
    """What the check is for: the few states that are always compared lie steps behind it."""
    with pytest.raises(ReplayError, match="verify=True") as caught:
        run(ForgetfulInPlace(), 60, memory=4 * STATE)
    assert caught.value.step > 20


@pytest.mark.parametrize("kind", [Chaotic, Spanning, OutOfPlace])
def test_sound_steps_pass(kind: type, scratch: Path) -> None:
    model = kind()
    sweep = run(model, 200, memory=5 * STATE, disk=scratch, verify=True)
    assert model.result() == store_everything(200)
    assert sweep.report.states_verified > 50
    assert run(kind(), 20, memory=5 * STATE).report.states_verified is None


def test_tiny_steps_in_windows_are_verified_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("longtape.sweep.TINY_SECONDS", 1.0)
    model = Chaotic()
    sweep = run(model, 10_000, memory=60 * STATE, verify=True)
    assert sweep.report.window > 1
    assert model.result() == store_everything(10_000)
    assert sweep.report.states_verified >= 5_000


def test_a_snapshot_that_storage_changes_unseen_is_found() -> None:
    costs = longtape.Costs(1e-3, 2e-3, write_bytes_per_second=4e6, read_bytes_per_second=4e6)
    tier = DamagingTier(MemoryTier(), lambda call: True, how="truncate")

    class Slow(Chaotic):
        def advance(self, start, stop):
            time.sleep(1e-4 * (stop - start))
            super().advance(start, stop)

    with pytest.raises(ReplayError, match="snapshot of state"):
        run(Slow(500), 200, memory=5 * 4096, tier=tier, costs=costs, verify=True)
    assert tier.damaged


def test_a_kept_state_that_a_step_writes_to_is_found() -> None:
    class Careless(OutOfPlace):
        armed = False

        def advance_into(self, step, source, target):
            super().advance_into(step, source, target)
            if self.armed and step == 12:
                source[0][0] += 1.0

    with pytest.raises(ReplayError, match="only have read"):
        run(Careless(), 40, memory=40 * STATE, verify=True)


class TestScan:
    """The same for PyTorch."""

    @pytest.fixture(autouse=True)
    def _torch(self) -> None:
        self.torch = pytest.importorskip("torch")

    def scan(self, step: Any, steps: int, **options: Any) -> Any:
        import longtape.torch as lt

        torch = self.torch
        carry = {"h": torch.full((3,), 0.3, requires_grad=True), "n": torch.zeros(2)}
        reports: list[Any] = []
        out, _ = lt.scan(step, carry, length=steps, verify=True, on_report=reports.append, **options)
        out["h"].sum().backward()
        return reports[0]

    @pytest.mark.parametrize("capture", [False, True])
    def test_a_hidden_tensor_is_found(self, capture: bool) -> None:
        torch = self.torch
        hidden = torch.zeros(2)

        def step(carry: Any, x: Any) -> Any:
            return {"h": torch.tanh(1.1 * carry["h"]), "n": carry["n"] + hidden}, None

        class Turned:
            """Changes what the step reads when the sweep turns: real, and seen by no guard of shapes."""

            def on_action(self, action: Any, began: float, ended: float) -> None:
                if type(action).__name__ == "Turn":
                    hidden.numpy()[:] = 1.0

            def on_transfer(self, *_: Any) -> None:
                pass

        with pytest.raises(ReplayError, match=r"step \d+ .*carry\['n'\]") as caught:
            self.scan(step, 60, memory=240 if not capture else 3000, capture=capture, observers=[Turned()])
        assert caught.value.leaf == "carry['n']"

    def test_a_counter_in_python_is_found(self) -> None:
        torch, calls = self.torch, itertools.count(1)  # whose state no walk through Python sees

        def step(carry: Any, x: Any) -> Any:
            return {"h": torch.tanh(carry["h"] + 1e-3 * max(0, next(calls) - 50)), "n": carry["n"]}, None

        with pytest.raises(ReplayError, match=r"carry\['h'\]"):
            self.scan(step, 60, memory=240, capture=False)

    @pytest.mark.parametrize("capture", [False, True])
    def test_sound_steps_pass(self, capture: bool, scratch: Path) -> None:
        torch = self.torch
        cell = torch.nn.LSTMCell(3, 3)

        def step(carry: Any, x: Any) -> Any:
            h, n = cell(torch.ones(1, 3), (carry["h"][None], carry["h"][None]))
            noise = torch.rand(2) if not capture else torch.ones(2)
            return {"h": h[0] * n[0].cos(), "n": carry["n"] + noise}, None

        report = self.scan(step, 300, memory=30_000, capture=capture, disk=scratch)
        assert report.states_verified is not None
        report = self.scan(step, 300, memory=8_000, capture=capture)
        assert report.states_verified > 100


def test_arrays_need_not_be_contiguous() -> None:
    class Strided(Chaotic):
        def __init__(self) -> None:
            super().__init__()
            self.state[0] = np.random.default_rng(0).random(10)[::2]

    run(Strided(), 50, memory=4 * STATE, verify=True)


def test_rounded_states_cannot_be_verified(tmp_path: Path) -> None:
    with pytest.raises(longtape.UsageError, match="leave one out"):
        longtape.Sweep(Chaotic(), 10, memory="1MiB", disk=tmp_path, verify=True, compress="relative:1e-3+zstd")
