"""An interrupt at any line leaves no thread, file, lock or memory of slots."""

from __future__ import annotations

import os
import random
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from models import Chaotic, OutOfPlace, Recording, Spanning

import longtape
from longtape.plan.costs import Costs
from tests.edges.interrupting import Nothing, interrupted, lines_of, locked

# An interrupt that comes in a finalizer is printed and lost, as Python has it; what it would have released goes later.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")

SIZE, STEPS = 9000, 30
STORING = Costs(1e-3, 2e-3, write_bytes_per_second=1e9, read_bytes_per_second=1e9)
"""Costs with which storage is used for all it can carry."""


def sweep(kind: type, *, closes: bool, costs: Costs | None = None, **where: Any) -> None:
    model = kind(SIZE)
    memory = 6 * (8 * SIZE + 64)
    made = longtape.Sweep(model, STEPS, memory=memory, costs=costs, stuck_seconds=5.0, **where)
    if closes:
        with made:
            made.forward()
            model.start_adjoint()
            made.reverse()
    else:
        made.forward()
        model.start_adjoint()
        made.reverse()


def check(body: Callable[[], Any], directory: Path, count: int, *, stays: bool = False) -> set[str]:
    """Interrupt it so many times; where it was interrupted."""
    seen: set[str] = set()
    chance = random.Random(7)
    with warnings.catch_warnings(), Nothing() as nothing:
        warnings.simplefilter("ignore")
        total = lines_of(body)
        for _ in range(count):
            where = interrupted(body, chance.randrange(total))
            seen.add(where or "the end")
            left = nothing.left()
            left += locked(directory) if stays else os.listdir(directory)
            assert not left, f"interrupted at {where}: {left}"
            if stays:
                for name in os.listdir(directory):
                    os.unlink(directory / name)
    return seen


@pytest.mark.parametrize("closes", [True, False], ids=["with", "without"])
@pytest.mark.parametrize("kind", [Chaotic, OutOfPlace, Recording, Spanning])
def test_a_sweep(kind: type, closes: bool, scratch: Path) -> None:
    seen = check(lambda: sweep(kind, closes=closes, costs=STORING, disk=scratch), scratch, 8)
    assert len(seen) > 3


@pytest.mark.parametrize("closes", [True, False], ids=["with", "without"])
def test_a_sweep_that_is_timed(closes: bool, scratch: Path) -> None:
    check(lambda: sweep(Chaotic, closes=closes, disk=scratch, compress="lz4"), scratch, 8)


@pytest.mark.parametrize("closes", [True, False], ids=["with", "without"])
def test_a_sweep_that_can_be_resumed(closes: bool, tmp_path: Path) -> None:
    where = {"resume": tmp_path, "resume_seconds": 1e-6}
    check(lambda: sweep(Chaotic, closes=closes, costs=STORING, **where), tmp_path, 8, stays=True)


def test_the_opening_of_files(scratch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every line of it, also where no file can be anonymous."""
    from longtape.tiers.disk import DiskTier

    real = os.open

    def refuse(path: Any, flags: int, *rest: Any, **named: Any) -> int:
        if flags & os.O_TMPFILE == os.O_TMPFILE:
            raise OSError(95, "made to fail")
        return real(path, flags, *rest, **named)

    for opening in (real, refuse):
        monkeypatch.setattr(os, "open", opening)
        with Nothing() as nothing:
            for line in range(lines_of(lambda: DiskTier(scratch).close())):
                where = interrupted(lambda: DiskTier(scratch).close(), line)
                assert where is not None
                left = nothing.left() + os.listdir(scratch)
                assert not left, f"interrupted at {where}: {left}"


def test_the_start_of_threads() -> None:
    """Every line of it."""
    from time import perf_counter

    from longtape.engine.workers import Workers
    from longtape.tiers.memory import MemoryTier

    def body() -> None:
        Workers(MemoryTier(), perf_counter).close(5.0)

    with Nothing() as nothing:
        for line in range(lines_of(body)):
            where = interrupted(body, line)
            assert where is not None
            left = nothing.left()
            assert not left, f"interrupted at {where}: {left}"


def scan_of_pytorch(directory: Path, *, capture: bool) -> Callable[[], Any]:
    torch = pytest.importorskip("torch")
    from longtape.torch import scan

    def step(carry: Any, x: Any) -> Any:
        return torch.tanh(carry * weight + x), None

    weight = torch.full((2000,), 0.9, requires_grad=True)
    init, xs = torch.zeros(2000, requires_grad=True), torch.linspace(0, 1, STEPS)

    def body() -> None:
        carry, _ = scan(step, init, xs, memory=60_000, disk=directory, capture=capture)
        torch.autograd.grad(carry.sum(), [init, weight])

    body()
    return body


def scan_of_jax(directory: Path) -> Callable[[], Any]:
    jax = pytest.importorskip("jax")
    import longtape.jax as lt

    init, xs = np.zeros(2000, np.float32), np.linspace(0, 1, STEPS, dtype=np.float32)

    def step(carry: Any, x: Any) -> Any:
        return jax.numpy.tanh(0.9 * carry + x), None

    def body() -> None:
        jax.grad(lambda init: lt.scan(step, init, xs, memory=60_000, disk=directory)[0].sum())(init)

    body()
    return body


@pytest.mark.parametrize("capture", [False, True])
def test_a_scan_of_pytorch(capture: bool, scratch: Path) -> None:
    check(scan_of_pytorch(scratch, capture=capture), scratch, 8)


def test_a_scan_of_jax(scratch: Path) -> None:
    check(scan_of_jax(scratch), scratch, 8)
