"""Steps that break the contract: run as they are, or refused; never a wrong gradient."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from scan_steps import Case, assert_same, leaf, plain

from longtape.errors import StepError
from longtape.torch import scan

COUNT = [0]


def numpy_noise(h: Any, _: Any) -> Any:
    return torch.sin(h) + float(np.random.rand()), None


def counts_calls(h: Any, _: Any) -> Any:
    COUNT[0] += 1
    return torch.sin(h) * (1.0 + 0.1 * COUNT[0]), None


class KeepsAState:
    def __init__(self) -> None:
        self.kept = torch.zeros(3, dtype=torch.float64)

    def __call__(self, h: Any, _: Any) -> Any:
        self.kept = self.kept + 1.0
        return torch.sin(h) * self.kept, None


@pytest.mark.parametrize("capture", [True, False])
@pytest.mark.parametrize("make", [lambda: numpy_noise, lambda: counts_calls, KeepsAState])
def test_a_step_that_is_another_one_when_run_again_is_refused(make: Any, capture: bool) -> None:
    with pytest.raises(StepError):
        scan(make(), leaf(3), None, 20, memory=1 << 16, capture=capture)


@pytest.mark.parametrize("capture", [True, False])
@pytest.mark.parametrize("memory", [4096, 1 << 20])
def test_views_of_what_a_step_was_given_are_not_mixed_up(memory: int, capture: bool) -> None:
    """The carry comes back as views of itself, of x and of a closed-over tensor."""
    torch.manual_seed(0)
    shared = leaf(4)

    def step(carry: Any, x: Any) -> Any:
        a, b, c = carry
        return (b[:], torch.sin(a + c) * shared, x.view(4)), a[1:3]

    case = Case(step, (leaf(4), leaf(4), leaf(4)), leaf(9, 2, 2), None, [shared])
    assert_same(case.outcome(scan, memory=memory, capture=capture), case.outcome(plain))


@pytest.mark.parametrize("capture", [True, False])
def test_residuals_may_change_shape_from_step_to_step(capture: bool) -> None:
    torch.manual_seed(0)
    weight, width = leaf(6), [0]

    class Inputs:
        def __len__(self) -> int:
            return 24

        def __getitem__(self, k: int) -> torch.Tensor:
            width[0] = 2 + k // 8 * 2
            return torch.full((6,), 0.1 * k, dtype=torch.float64)

    def step(h: Any, x: Any) -> Any:
        part = torch.sin(h[: width[0]] * weight[: width[0]])
        return torch.tanh(h + x + part.sum()), None

    start = leaf(6)

    def by_hand() -> Any:
        h, inputs = start, Inputs()
        for k in range(24):
            h, _ = step(h, inputs[k])
        return torch.autograd.grad(h.sum(), [start, weight])

    def by_scan() -> Any:
        h, _ = scan(step, start, Inputs(), memory=1 << 20, capture=capture)
        return torch.autograd.grad(h.sum(), [start, weight])

    for ours, theirs in zip(by_scan(), by_hand(), strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-10)
