"""What goes wrong on a device is said, and leaves nothing behind."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from random_scans import case_of
from scan_steps import leaf
from simulated import plan, quickly, simulated, use_plan

from longtape.errors import BudgetError, DeviceError, UsageError
from longtape.testing.device import SimulatedDevice, drawn, when_wanted
from longtape.torch import scan, while_loop
from longtape.torch.devices import standing_in

CUDA = torch.cuda.is_available()


@pytest.fixture(autouse=True)
def _times_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    quickly(monkeypatch)


def small(**options: Any) -> Any:
    case, _ = case_of("lstm", 24)
    return case.outcome(scan, **{"memory": 1_000, "host_memory": 1_000, "capture": False, **options})


@pytest.mark.skipif(CUDA, reason="there is CUDA")
def test_host_memory_without_a_device() -> None:
    with pytest.raises(
        UsageError, match=r"host_memory=1000 is pinned memory .* carry is on cpu, and .*CUDA.*leave out"
    ):
        small()
    init = leaf(3)
    with pytest.raises(UsageError, match="host_memory='1MiB'"):
        while_loop(lambda h: h.sum() < 3, lambda h: h + 1, init, memory=100, host_memory="1MiB")


def test_tensors_on_several_devices() -> None:
    init = (torch.zeros(3), torch.zeros(3, device="meta"))
    with simulated(), pytest.raises(UsageError, match="on several devices \\(cpu, meta\\)"):
        scan(lambda carry, _: (carry, None), init, length=3, memory=1_000)


def test_too_little_memory_says_the_least_that_would_do() -> None:
    with simulated(), pytest.raises(BudgetError, match="the least that would do is 832 bytes on the device") as caught:
        small(memory=300, host_memory=10_000)
    assert "208 bytes in the host's memory" in str(caught.value)
    with simulated(), pytest.raises(BudgetError, match="the least that would do"):
        small(memory=1_000, host_memory=100)
    with simulated():
        small(memory=832, host_memory=208)


def test_too_little_memory_on_the_device_alone() -> None:
    with simulated(), pytest.raises(BudgetError, match="memory=100 B cannot hold one state"):
        small(memory=100, host_memory=None)


def test_memory_that_the_device_has_not() -> None:
    with simulated(memory_nbytes=500), pytest.raises(BudgetError, match="which has 500 B"):
        small()


def test_memory_that_cannot_be_pinned() -> None:
    with simulated(pinnable_nbytes=900), pytest.raises(BudgetError, match="could not be pinned; give a smaller"):
        small(memory=1_000, host_memory=1_000_000)


def test_a_scan_on_a_device_cannot_be_resumed(tmp_path: Path) -> None:
    with simulated(), pytest.raises(UsageError, match="cannot be resumed yet"):
        small(resume=tmp_path)


def test_a_graph_that_is_being_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SimulatedDevice, "is_capturing", lambda self: True)
    with simulated(), pytest.raises(UsageError, match="while a CUDA graph is being captured"):
        small()


@pytest.mark.parametrize("at", range(1, 60, 5))
@pytest.mark.parametrize("delay", [when_wanted, drawn(2)])
def test_a_device_lost_midway(
    at: int, delay: Callable[[str], float], scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At any copy: the error is the device's own, nothing hangs, and nothing stays."""
    use_plan(monkeypatch, plan("asynchronous", window=1, slots=3, spacing=1))
    monkeypatch.setattr("longtape.torch.linked.STAGING", 2)
    with SimulatedDevice(delay, fail_at=at) as device:
        with standing_in(device):
            try:
                small(disk=scratch, memory=1 << 20, host_memory=1 << 20)
            except DeviceError as error:
                assert f"lost at copy {at}" in str(error)
            else:
                assert device.copies < at or device.failure is not None
        assert not device.pinned


def test_a_step_that_raises_leaves_nothing(scratch: Path) -> None:
    calls = itertools.count()

    def step(h: torch.Tensor, _: None) -> tuple[torch.Tensor, None]:
        if next(calls) > 40:
            raise ValueError("enough")
        return torch.sin(h), None

    init = leaf(30)
    with simulated(when_wanted), pytest.raises(ValueError, match="enough") as caught:
        scan(step, init, length=60, memory=1_000, host_memory=1_000, disk=scratch, capture=False)
    assert any("in step" in note for note in caught.value.__notes__)


def test_a_graph_that_is_dropped_gives_everything_back() -> None:
    init = leaf(30)
    with simulated(when_wanted) as device:
        carry, _ = scan(lambda h, _: (torch.sin(h), None), init, length=60, memory=1_000, host_memory=3_000)
        assert device.pinned
        del carry
        assert not device.pinned
