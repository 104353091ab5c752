"""Mixed precision as PyTorch recommends it: autocast with its cache, backward outside of the block, a scaler."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from longtape import StepError
from longtape.torch import scan, while_loop

BF16 = torch.bfloat16
STEPS, BATCH = 6, 4


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    """No progress bars of PyTorch's own, which would start a thread."""
    with contextlib.suppress(ImportError):
        monkeypatch.setattr("tqdm.std.tqdm.monitor_interval", 0)


def plain(step: Any, carry: Any, xs: Tensor, **_: Any) -> tuple[Any, Tensor]:
    ys = []
    for x in xs:
        carry, y = step(carry, x)
        ys.append(y)
    return carry, torch.stack(ys)


def eager(step: Any, carry: Any, xs: Tensor, **options: Any) -> tuple[Any, Tensor]:
    return scan(step, carry, xs, memory="1MiB", capture=False, **options)


def captured(step: Any, carry: Any, xs: Tensor, **options: Any) -> tuple[Any, Tensor]:
    def told(report: Any) -> None:
        assert not any("could not be captured" in note for note in report.notes)

    return scan(step, carry, xs, memory="1MiB", capture=True, on_report=told, **options)


loops = pytest.mark.parametrize("loop", [eager, captured])


class Model(nn.Module):
    """A recurrent network whose layers are used inside the step, and before and after the loop."""

    def __init__(self, loop: Callable[..., Any]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.loop = loop
        self.encode, self.cell, self.decode = nn.Linear(3, 3), nn.GRUCell(3, 8), nn.Linear(8, 2)

    def step(self, carry: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        carry = self.cell(self.encode(x), carry)
        return carry, self.decode(carry)

    def forward(self, xs: Tensor) -> Tensor:
        first = self.encode(xs).float()
        carry, ys = self.loop(self.step, xs.new_zeros(BATCH, 8), xs)
        return ys.float() + self.decode(carry) + first.mean()


def data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(STEPS, BATCH, 3, generator=generator), torch.randn(STEPS, BATCH, 2, generator=generator)


def gradients(model: nn.Module, run: Callable[[nn.Module], Tensor]) -> list[Tensor]:
    run(model).backward()
    return [parameter.grad for parameter in model.parameters()]


def assert_same(found: Any, expected: Any) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def losses(loop: Callable[..., Any], dtype: torch.dtype, optimiser_steps: int, *, cache: bool = True) -> Tensor:
    """A loss curve, by the loop of PyTorch's documentation."""
    model, (xs, target) = Model(loop), data()
    optimiser = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.5)
    scaler = torch.amp.GradScaler("cpu", enabled=dtype == torch.float16, growth_interval=50)
    curve = []
    for _ in range(optimiser_steps):
        optimiser.zero_grad()
        with torch.autocast("cpu", dtype=dtype, cache_enabled=cache):
            loss = (model(xs) - target).pow(2).mean()
        scaler.scale(loss).backward()
        scaler.step(optimiser)
        scaler.update()
        curve.append(loss.item())
    return torch.tensor(curve)


@pytest.mark.parametrize("optimiser_steps", [5, pytest.param(200, marks=[pytest.mark.slow, pytest.mark.timeout(400)])])
@pytest.mark.parametrize("dtype", [BF16, torch.float16])
@loops
def test_loss_curves_are_those_of_the_plain_loop(loop: Any, dtype: torch.dtype, optimiser_steps: int) -> None:
    found = losses(loop, dtype, optimiser_steps)
    # With the cache, the plain loop sums the gradients of weights over steps in the dtype of autocast.
    torch.testing.assert_close(found, losses(plain, dtype, optimiser_steps), rtol=4 * torch.finfo(dtype).eps, atol=0.0)
    uncached = losses(plain, dtype, optimiser_steps, cache=False)
    torch.testing.assert_close(found, uncached, rtol=1e-5, atol=0.0)
    assert found[-1] < found[0]


@loops
def test_no_cast_of_the_users_stands_for_a_weight_and_none_of_a_step_outlives_it(loop: Any) -> None:
    """The weights are cast, in the same block, before and after the loop."""

    def run(model: nn.Module) -> Tensor:
        xs, target = data()
        with torch.autocast("cpu", dtype=BF16):
            with torch.no_grad():
                model.encode(xs)
            loss = (model(xs) - target).pow(2).mean()
        return loss + model.decode.weight.sum()

    def run_uncached(model: nn.Module) -> Tensor:
        xs, target = data()
        with torch.autocast("cpu", dtype=BF16, cache_enabled=False):
            return (model(xs) - target).pow(2).mean() + model.decode.weight.sum()

    assert_same(gradients(Model(loop), run), gradients(Model(plain), run_uncached))


class Inside(Model):
    """A step with an autocast of its own, and a part that is out of it."""

    def __init__(self, loop: Callable[..., Any], context: Any) -> None:
        super().__init__(loop)
        self.context = context

    def step(self, carry: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        with self.context:
            x = self.encode(x)
        return super().step(carry, x.float())


def on(dtype: torch.dtype = BF16, **options: Any) -> Any:
    return torch.autocast("cpu", dtype=dtype, **options)


CONTEXTS: dict[str, tuple[dict[str, Any] | None, dict[str, Any]]] = {
    "inside alone": (None, {}),
    "inside another block": ({}, {}),
    "disabled inside a block": ({}, {"enabled": False}),
    "another dtype inside a block": ({}, {"dtype": torch.float16}),
    "inside a block that is disabled": ({"enabled": False}, {}),
}
"""Options of the caller's block, if there is one, and of the one in the step; each has a cache of its own."""


@loops
@pytest.mark.parametrize("where", ["inside", "outside"])
@pytest.mark.parametrize("kind", CONTEXTS)
def test_autocast_inside_the_step(loop: Any, kind: str, where: str) -> None:
    around, inside = CONTEXTS[kind]
    xs, target = data()

    def run(loop: Any, where: str, *, cache: bool) -> list[Tensor]:
        model = Inside(loop, on(**inside, cache_enabled=cache))
        with contextlib.nullcontext() if around is None else on(**around, cache_enabled=cache):
            loss = (model(xs) - target).pow(2).mean()
            if where == "inside":
                loss.backward()
        if where == "outside":
            loss.backward()
        return [parameter.grad for parameter in model.parameters()]

    found, expected = run(loop, where, cache=True), run(plain, "outside", cache=False)
    if where == "inside":  # what surrounds the loop is differentiated under autocast
        torch.testing.assert_close(found, expected, rtol=0.05, atol=0.01)
    else:
        assert_same(found, expected)


@loops
def test_backward_in_a_block_that_the_loop_was_not_in(loop: Any) -> None:
    xs, target = data()

    def gradient(loop: Any, block: Any) -> Tensor:
        model = Model(loop)
        _, ys = model.loop(model.step, xs.new_zeros(BATCH, 8), xs)
        loss = (ys - target).pow(2).mean()
        with block:
            return torch.autograd.grad(loss, model.cell.weight_hh)[0]

    assert_same(gradient(loop, on()), gradient(plain, contextlib.nullcontext()))


@pytest.mark.parametrize("capture", [False, True])
def test_a_loop_of_unknown_length_whose_condition_reads_a_weight(capture: bool) -> None:
    def run(ours: bool, **options: Any) -> list[Tensor]:
        torch.manual_seed(0)
        layer = nn.Linear(4, 4)

        def condition(state: tuple[Tensor, Tensor]) -> Tensor:
            return state[1] + 0.0 * layer(state[0]).sum() < 5

        def step(state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
            return torch.tanh(layer(state[0])).float(), state[1] + 1

        state = (torch.ones(2, 4), torch.zeros(()))
        with torch.autocast("cpu", dtype=BF16, **options):
            if ours:
                state = while_loop(condition, step, state, memory="1MiB", capture=capture)
            else:
                for _ in range(5):
                    state = step(state)
            loss = state[0].sum() + layer(state[0]).float().sum()
        loss.backward()
        return [parameter.grad for parameter in layer.parameters()]

    assert_same(run(True), run(False, cache_enabled=False))


def test_without_gradients_the_callers_cache_is_used() -> None:
    model, (xs, _) = Model(eager), data()
    with torch.no_grad(), torch.autocast("cpu", dtype=BF16):
        assert torch.equal(model(xs), Model(plain)(xs))


@loops
def test_a_carry_whose_dtype_autocast_changes(loop: Any) -> None:
    layer = nn.Linear(3, 3)
    with torch.autocast("cpu", dtype=BF16), pytest.raises(StepError, match=r"autocast.*torch\.float32"):
        loop(lambda carry, x: (layer(carry), carry), torch.ones(2, 3), torch.ones(STEPS))
